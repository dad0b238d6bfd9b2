"""Whether a fit predicts what a perturbation does: kicks and silenced regions, against the true system.

Run `python benchmarks/perturbations.py`. Three correlations for every system:

- *kick*: total impulse responses of all pairs of regions at twenty lags, the fit's posterior mean against the truth;
- *new trials*: what silencing a region does to the log of the expected rate of every unit of the others, from the same
  equilibrium, which is a matter of their variances: all other effects of silence average out over new trials;
- *replay*: the same in each bin of the recorded trials, innovations inferred from the spikes, against what the true
  innovations would have done. Beside it, what the true parameters reach from the same spikes: the path is not known
  better than that.
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
from _regions import path_under_truth

import pyrodyn as dyn
from pyrodyn import inference, models
from pyrodyn.coupling.intervention import Surgery, replay
from pyrodyn.distributions import Transition
from pyrodyn.linalg.recursion import spread
from pyrodyn.systems import System, coupled_regions, feedback_loop

DRAWS = 60  # of paths under the true parameters


def true_graph(system: System) -> xr.Dataset:
    """The coupling graph of the true parameters."""
    draw = system.truth[["dynamics", "process_noise", "loading"]].expand_dims(("chain", "draw"))
    tree = xr.DataTree.from_dict({"posterior": draw})
    tree.attrs["bin_width"] = system.truth.attrs["bin_width"]
    return dyn.coupling_graph(tree)


class Truth:
    """The true system, to be perturbed."""

    def __init__(self, system: System) -> None:
        truth = system.truth
        self.region, self.loading = truth["latent_region"].values, truth["loading"].values
        self.dynamics, self.noise = (
            torch.from_numpy(truth[name].values).unsqueeze(0) for name in ("dynamics", "process_noise")
        )
        self.start = torch.from_numpy(truth["stationary_covariance"].values).unsqueeze(0)
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


def row(name: str, seed: int, system: System) -> str:
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        engine = inference.Gibbs(draws=40, warmup=40, chains=2)
        posterior = dyn.fit(models.MultiRegionLDS(2), system.recording, engine, seed=0)
    recording, truth = system.recording, Truth(system)
    graphs = [
        graph["impulse_response_total"].mean(("chain", "draw"))
        for graph in (dyn.coupling_graph(posterior), true_graph(system))
    ]
    apart = ~np.eye(graphs[0].sizes["target"], dtype=bool)
    kick = correlation(*([graph.values[apart]] for graph in graphs))
    path = torch.from_numpy(system.truth["latents"].values).unsqueeze(0)
    torch.manual_seed(0)
    paths = path_under_truth(system).sample((DRAWS,))
    found: dict[str, list[np.ndarray]] = {key: [] for key in ("new", "true new", "replay", "true replay", "ceiling")}
    for region in recording.regions:
        others = recording.region != region
        for key, where in (("new", recording.isel(trial=[0]).blank()), ("replay", recording)):
            effect = dyn.intervene(posterior, where, silence=region, draws=40).isel(unit=others)
            found[key].append(np.log(effect["expected"].values / effect["factual"].values))
        found["true new"].append(truth.new_trials(region)[:, others])
        found["true replay"].append(truth.replayed(path, region)[..., others])
        found["ceiling"].append(truth.replayed(paths, region)[..., others].mean(0))
    new, again, most = (
        correlation(found[a], found[b])
        for a, b in (("new", "true new"), ("replay", "true replay"), ("ceiling", "true replay"))
    )
    return (
        f"| {name} | {seed} | {kick:.2f} | {new:.2f} | {again:.2f} | {most:.2f} | {time.perf_counter() - began:.0f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/tables/perturbations.md"))
    options = parser.parse_args()
    lines = [
        "# Perturbations",
        "",
        "Made by `python benchmarks/perturbations.py`; 8 trials of 500 bins, 40 + 40 sweeps of 2 chains.",
        "Correlations of predicted and true responses; what each column is stands at the head of that script.",
        "Silence shifts the expected rates of new trials through their variances alone: by some hundredths, in which",
        "the loops' few strong edges leave little to tell units apart by.",
        "",
        "| system | seed | kick | silence, new trials | silence, replay | its ceiling | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed in range(options.seeds):
        for name, system in (
            ("four regions", coupled_regions(trials=8, seed=seed)),
            ("loop of two", feedback_loop("two", trials=8, seed=seed)),
            ("loop of three", feedback_loop("three", trials=8, seed=seed)),
        ):
            lines.append(row(name, seed, system))
            print(lines[-1], flush=True)
            options.out.write_text("\n".join([*lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
