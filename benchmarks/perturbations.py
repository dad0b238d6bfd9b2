"""Whether a fit predicts what a perturbation does: kicks and silenced regions, against the true system.

Run `python benchmarks/perturbations.py`. Three correlations for every system:

- *kick*: total impulse responses of all pairs of regions at twenty lags, the fit's posterior mean against the truth;
- *new trials*: what silencing a region does to the log of the expected rate of every unit of the others, from the same
  equilibrium, which is a matter of their variances: all other effects of silence average out over new trials, since
  nothing in these systems is locked to time;
- *replay*: the same in each bin of the recorded trials, innovations inferred from the spikes, against what the true
  innovations would have done.

Beside each stands what an oracle reaches from the same spikes. For kicks and new trials it knows the graph and the
process noise, and learns dynamics and readout, from their true values on; for a replay it knows all parameters, and
infers the path.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from _oracle import graph_of, oracle
from _regions import path_under_truth

import pyrodyn as dyn
from pyrodyn import inference, models
from pyrodyn.coupling.intervention import Surgery, replay
from pyrodyn.distributions import Transition
from pyrodyn.linalg.recursion import spread
from pyrodyn.linalg.stationary import stationary_covariance
from pyrodyn.systems import System, coupled_regions, feedback_loop

DRAWS = 60  # of paths under the true parameters
COLUMNS = ("kick", "kick, oracle", "new", "new, oracle", "replay", "replay, oracle")


class Truth:
    """A system whose parameters are known, to be perturbed."""

    def __init__(self, truth: xr.Dataset) -> None:
        self.region, self.loading = truth["latent_region"].values, truth["loading"].values
        self.dynamics, self.noise = (
            torch.from_numpy(truth[name].values).unsqueeze(0) for name in ("dynamics", "process_noise")
        )
        self.start = stationary_covariance(self.dynamics, self.noise)
        self.bins = truth.sizes["time"]

    def silent(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.tile(self.region == name, (self.bins, 1)))

    def replayed(self, path: torch.Tensor, name: str) -> np.ndarray:
        """Change of the log rates (draw, trial, time, unit) along paths (draw, trial, time, latent)."""
        transition = Transition(self.dynamics, self.noise, self.noise, None)
        surgery = Surgery(self.silent(name), torch.zeros_like(self.dynamics[0], dtype=torch.bool), np.zeros((0, 0)))
        return (replay(transition, path, surgery) - path).numpy() @ self.loading.T

    def new_trials(self, name: str) -> np.ndarray:
        """Change of the log of expected rates (time, unit)."""
        variances = [
            np.einsum("tij,ui,uj->tu", spread(self.dynamics, self.noise, self.start, held)[0], *[self.loading] * 2)
            for held in (self.silent(name), torch.zeros(self.bins, len(self.region), dtype=torch.bool))
        ]
        return 0.5 * (variances[0] - variances[1])


def correlation(found: list[np.ndarray], true: list[np.ndarray]) -> float:
    one, other = (np.concatenate([part.ravel() for part in parts]) for parts in (found, true))
    return float(np.corrcoef(one, other)[0, 1])


def row(name: str, seed: int, system: System, sweeps: int) -> str:
    engine = inference.Gibbs(draws=sweeps, warmup=sweeps, chains=2)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        posterior = dyn.fit(models.MultiRegionLDS(2), system.recording, engine, seed=0)
    seconds = time.perf_counter() - began
    learned = oracle(system)
    recording, truth, best = system.recording, Truth(system.truth), Truth(learned)
    fitted, ideal, true = (
        graph["impulse_response_total"].mean(("chain", "draw"))
        for graph in (dyn.coupling_graph(posterior), graph_of(learned), graph_of(system.truth))
    )
    apart = ~np.eye(true.sizes["target"], dtype=bool)
    path = torch.from_numpy(system.truth["latents"].values).unsqueeze(0)
    torch.manual_seed(0)
    paths = path_under_truth(system).sample((DRAWS,))
    found: dict[str, list[np.ndarray]] = {
        "kick": [fitted.values[apart]],
        "kick, oracle": [ideal.values[apart]],
        "kick, truth": [true.values[apart]],
    }
    for region in recording.regions:
        others = recording.region != region
        blank = recording.isel(trial=[0]).blank()
        for key, where in (("new", blank), ("replay", recording)):
            effect = dyn.intervene(posterior, where, silence=region, draws=40).isel(unit=others)
            found.setdefault(key, []).append(np.log(effect["expected"].values / effect["factual"].values))
        for key, values in (
            ("new, truth", truth.new_trials(region)),
            ("new, oracle", best.new_trials(region)),
            ("replay, truth", truth.replayed(path, region)),
            ("replay, oracle", truth.replayed(paths, region).mean(0)),
        ):
            found.setdefault(key, []).append(values[..., others])
    cells = [f"{correlation(found[key], found[key.split(',')[0] + ', truth']):.2f}" for key in COLUMNS]
    return f"| {name} | {recording.num_trials} | {seed} | {' | '.join(cells)} | {seconds:.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--trials", type=int, nargs="*", default=[8, 20])
    parser.add_argument("--sweeps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("docs/tables/perturbations.md"))
    options = parser.parse_args()
    lines = [
        "# Perturbations",
        "",
        f"Made by `python benchmarks/perturbations.py`; trials of 500 bins, {options.sweeps} + {options.sweeps} sweeps",
        "of 2 chains. Correlations of predicted and true responses; what each column is, the script's head says.",
        "",
        "| system | trials | seed | kick | oracle | silence, new trials | oracle | silence, replay | oracle | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for trials in options.trials:
        for seed in options.seeds:
            for name, system in (
                ("four regions", coupled_regions(trials=trials, seed=seed)),
                ("loop of two", feedback_loop("two", trials=trials, seed=seed)),
                ("loop of three", feedback_loop("three", trials=trials, seed=seed)),
            ):
                lines.append(row(name, seed, system, options.sweeps))
                print(lines[-1], flush=True)
                options.out.write_text("\n".join([*lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
