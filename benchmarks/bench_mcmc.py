"""Effective draws a second of MCMC, warm-up and compilation counted, beside numpyro, blackjax and Pyro.

Run `python benchmarks/bench_mcmc.py`; some ten minutes. One core. Two posteriors, the same for all: parameters of a
linear dynamical system (2 latents, 5 units, 200 bins; all integrate the path out, peers by dynamax's Kalman filter),
and a hierarchical normal model of 20 numbers. The effective sample size is arviz-stats' bulk ESS, the least over all
coordinates. Peers: see `peers_jax.py`; without PYRODYN_PEERS only ours and Pyro's are run.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyrodyn as dyn
from pyrodyn import inference, models, readouts
from pyrodyn.diagnostics import nested_rhat
from pyrodyn.inference import LogDensity, collapse
from pyrodyn.inference.engine import Engine, numerics, starting_values
from pyrodyn.program import Program
from pyrodyn.recording import Recording

GROUPS = 18


def blank(bins: int, units: int) -> Recording:
    zeros = np.zeros((1, bins, units))
    return Recording.from_arrays(zeros, bin_width=0.1, center=np.zeros(units), scale=np.ones(units), counts=False)


def lds() -> tuple[Program, Recording]:
    model = models.LDS(2, readouts.Gaussian())
    return model, dyn.simulate(model, blank(200, 5).blank(), seed=3)[0]


class Hierarchical:
    """Group means about a common one, each seen once with noise."""

    def __init__(self) -> None:
        self.seen = torch.randn(GROUPS, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.5

    def __call__(self, recording: Recording) -> Tensor:
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        spread = pyro.sample("spread", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
        groups = dist.Normal(mean.unsqueeze(-1), spread.unsqueeze(-1)).expand([*mean.shape, GROUPS])
        each = pyro.sample("each", groups.to_event(1))
        return pyro.sample("seen", dist.Normal(each, 1.0).to_event(1), obs=self.seen)


def draws_of(program: Program, recording: Recording, engine: Engine) -> tuple[np.ndarray, float]:
    """Unconstrained draws (chain, draw, coordinate), and processor seconds."""
    began = time.process_time()
    samples = engine.run(program, recording, seed=0).samples
    seconds = time.process_time() - began
    with numerics():
        density = LogDensity(collapse(program) if isinstance(program, models.LDS) else program, recording)
        flat = {name: value.flatten(0, 1).unsqueeze(1) for name, value in samples.items()}
        vectors = density.unconstrain(flat)
    lead = next(iter(samples.values())).shape[:2]
    return vectors.reshape(*lead, -1).numpy(), seconds


def peers_lds(model: Program, recording: Recording) -> dict[str, np.ndarray]:
    """The recording, and where our chains start from under the names of the peers' sites."""
    with numerics():
        found = {name: value.numpy() for name, value in starting_values(model, recording, 200, "mode").items()}
    rows = found["weights"]
    assert isinstance(model, models.LDS)
    first, second = model.pivots(recording)
    others = [unit for unit in range(len(rows)) if unit not in (first, second)]
    order = [first, second, *others]  # the peers' pivots are their first two units
    return {
        "values": recording.values.numpy()[..., order],
        "mixing": found["mixing"],
        "first": rows[first, 0],
        "second": rows[second, 1],
        "rest": np.concatenate([[rows[second, 0]], rows[others].ravel()]),
        "offset": found["offset"][order],
        "noise_sd": found["noise_sd"][order],
    }


def peer(case: str, **inputs: np.ndarray) -> tuple[np.ndarray, float] | None:
    """The same in the environment of the peers; None where there is none."""
    python = os.environ.get("PYRODYN_PEERS")
    if not python:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file, found = Path(folder) / "inputs.npz", Path(folder) / "draws.npz"
        np.savez(file, **inputs)
        script = Path(__file__).with_name("peers_jax.py")
        subprocess.run([python, str(script), case, str(file), str(found)], capture_output=True, check=True)
        with np.load(found) as held:
            return held["draws"].astype(float), float(held["seconds"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Effective draws a second of MCMC.")
    parser.add_argument("--table", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", dyn.FitWarning)
    lines = ["# MCMC: effective draws a second", "", f"Made by `{' '.join(['python', *sys.argv])}`.", ""]

    def say(text: str = "") -> None:
        print(text, flush=True)
        lines.append(text)

    def row(name: str, found: tuple[np.ndarray, float] | None, superchains: int | None = None) -> None:
        if found is None:
            say(f"| {name} | - | - | - | - | - |")
            return
        draws, seconds = found
        ess = min(float(arviz_stats.ess(np.ascontiguousarray(draws[..., i]))) for i in range(draws.shape[-1]))
        kind = "R-hat"
        worst = max(float(arviz_stats.rhat(np.ascontiguousarray(draws[..., i]))) for i in range(draws.shape[-1]))
        if superchains is not None:
            import xarray as xr

            kind = "nested R-hat"
            nested = nested_rhat(xr.Dataset({"x": (("chain", "draw", "i"), draws)}), superchains)
            worst = float(nested["x"].max())
        shape = f"{draws.shape[0]} x {draws.shape[1]}"
        say(f"| {name} | {shape} | {seconds:.1f} | {ess:.0f} | {ess / seconds:.2f} | {kind} {worst:.3f} |")

    for title, (program, recording), nuts in (
        ("Linear dynamical system: 23 coordinates", lds(), inference.NUTS(draws=100, warmup=100, chains=1)),
        (
            "Hierarchical normal: 20 coordinates",
            (Hierarchical(), blank(1, 1)),
            inference.NUTS(draws=300, warmup=300, chains=2, collapse=False),
        ),
    ):
        say(f"## {title}")
        say()
        say("| sampler | chains x draws | s | least bulk ESS | ESS / s | |")
        say("| --- | --- | --- | --- | --- | --- |")
        hierarchical = isinstance(program, Hierarchical)
        ours = inference.HMC(collapse=False) if hierarchical else inference.HMC()
        row("pyrodyn HMC", draws_of(program, recording, ours), ours.superchains)
        if isinstance(program, Hierarchical):
            row("numpyro NUTS", peer("hierarchical", seen=program.seen.numpy()))
            row("blackjax NUTS, window adaptation", peer("hierarchical_blackjax", seen=program.seen.numpy()))
        else:
            # From the same mode as ours: from its own random starts its chains end in different places.
            row("numpyro NUTS over dynamax", peer("lds_nuts", **peers_lds(program, recording)))
        # Another object, or it would be handed the start that ours has climbed to.
        row("Pyro NUTS on our density", draws_of(copy.copy(program), recording, nuts))
        say()
    if options.table is not None:
        options.table.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
