"""What the engines that move by gradients are worth on coupled regions: strengths of edges, beside Gibbs sampling.

Run `python benchmarks/calibrate_region_engines.py`. All edges are there, since such an engine cannot sample presence.

- *Agreement*: two regions, strengths under `SVI` against `HMC`, which is exact where the readout is Gaussian.
- *Coverage*: three regions, counts, parameters from the prior. `HMC` and `Laplace` integrate the path out by a Laplace
  approximation; particles say, draw by draw, by how much its evidence is wrong, and draws are weighted accordingly.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from _regions import off_diagonal
from torch import Tensor

import pyrodyn as dyn
from pyrodyn import guides, inference, models, readouts
from pyrodyn.calibration import simulated
from pyrodyn.comparison.terms import evidence_error, smoothed
from pyrodyn.inference import LogDensity, collapse
from pyrodyn.inference.engine import ReplicatingEngine, numerics, random_stream
from pyrodyn.posterior import thinned
from pyrodyn.program import draws_of, globals_given

UNITS = 4  # of each region
PRIOR_SEED, ENGINE_SEED = 0, 1
WEIGHTED, PARTICLES = 100, 200  # draws whose evidence is corrected, each by so many particles
COUNTS = (4, 50)  # trials and bins
ENGINES: dict[str, Any] = {
    "Gibbs": inference.Gibbs(draws=100, warmup=100, chains=4),
    "HMC": inference.HMC(draws=20, warmup=50, chains=8),
    "Laplace": inference.Laplace(draws=400, max_steps=200),
    "SVI": inference.SVI(guide=guides.Structured(), steps=500, draws=400),
}
TOGETHER = {"Gibbs": 64, "HMC": 8}  # replicates in a batch; the others go one by one
LABELS = {"HMC": "HMC, path by Laplace", "SVI": "SVI, structured"}
GUIDES = {"SVI, full rank": None, "SVI, structured": guides.Structured()}


def like(regions: str, trials: int, bins: int, counts: bool) -> dyn.Recording:
    """Shape and units of measurement."""
    size = UNITS * len(regions)
    return dyn.Recording.from_arrays(
        np.ones((trials, bins, size)),
        bin_width=0.05,
        counts=counts,
        center=np.zeros(size),
        scale=np.ones(size),
        region=np.repeat(list(regions), UNITS),
    ).blank()


def model_of(counts: bool) -> models.MultiRegionLDS:
    readout = readouts.Poisson() if counts else readouts.Gaussian()
    return models.MultiRegionLDS(1, edge_probability=1.0, readout=readout, time_bumps=0)


def strengths(model: models.MultiRegionLDS, values: dict[str, Tensor], recording: dyn.Recording) -> np.ndarray:
    """Strengths (draw, edge) from sites (draw, 1, *event)."""
    found = off_diagonal(model.invariants(globals_given(model, values, recording))["coupling_strength"][1].numpy())
    return found.reshape(-1, found.shape[-1])


def of_posterior(posterior: xr.DataTree) -> np.ndarray:
    """Strengths (draw, edge) of a fit."""
    found = off_diagonal(posterior["invariants"]["coupling_strength"].values)
    return found.reshape(-1, found.shape[-1])


def agreement(seeds: int) -> list[str]:
    lines = [
        "| readout | engine | distance of means in sd: median | largest | ratio of sds: least | median | largest "
        "| seconds a fit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, shape, counts in (("Gaussian, 1 x 200 bins", (1, 200), False), ("Poisson, 4 x 50 bins", COUNTS, True)):
        model = model_of(counts)
        apart: dict[str, list[np.ndarray]] = {engine: [] for engine in GUIDES}
        ratio: dict[str, list[np.ndarray]] = {engine: [] for engine in GUIDES}
        spent = dict.fromkeys(GUIDES, 0.0)
        for seed in range(seeds):
            recording, _ = dyn.simulate(model, like("AB", *shape, counts), seed=seed)
            exact = of_posterior(dyn.fit(model, recording, inference.HMC(draws=40, warmup=100, chains=16), seed=0))
            for engine, guide in GUIDES.items():
                began = time.process_time()
                found = of_posterior(dyn.fit(model, recording, inference.SVI(guide=guide, draws=1000), seed=0))
                spent[engine] += (time.process_time() - began) / seeds
                apart[engine].append(abs(found.mean(0) - exact.mean(0)) / exact.std(0))
                ratio[engine].append(found.std(0) / exact.std(0))
        for engine in GUIDES:
            far, wide = np.concatenate(apart[engine]), np.concatenate(ratio[engine])
            lines.append(
                f"| {name} | {engine} | {np.median(far):.2f} | {far.max():.2f} | {wide.min():.2f} "
                f"| {np.median(wide):.2f} | {wide.max():.2f} | {spent[engine]:.0f} |"
            )
            print(lines[-1], flush=True)
    return lines


class Replicates:
    """Parameters from the prior, and what was recorded of them; the same for every engine."""

    def __init__(self, number: int) -> None:
        self.model, self.blank, self.seed = model_of(True), like("ABC", *COUNTS, True), ENGINE_SEED
        self.sites, self.observations = simulated(self.model, self.blank, number, PRIOR_SEED)

    def __len__(self) -> int:
        return len(self.observations)

    def groups(self, size: int) -> list[Replicates]:
        """As many together: those with the largest counts, of up to a billion in a bin, hold up a search for paths."""
        found = []
        for some in self.observations.flatten(1).amax(1).argsort().split(size):
            group = copy(self)
            group.seed = ENGINE_SEED + int(some[0])
            group.sites = {name: value[some] for name, value in self.sites.items()}
            group.observations = self.observations[some]
            found.append(group)
        return found

    @property
    def truth(self) -> np.ndarray:
        """Strengths (replicate, edge)."""
        return strengths(self.model, {n: value[:, 0].unsqueeze(1) for n, value in self.sites.items()}, self.blank)

    def recording(self, index: int) -> dyn.Recording:
        return self.blank.with_observations(self.observations[index, 0])

    def drawn(self, engine: Any) -> dict[str, Tensor]:
        """Sites (replicate, draw, 1, *event), all as one batch where the engine takes replicates."""
        if isinstance(engine, ReplicatingEngine):
            with numerics(), torch.no_grad(), random_stream(self.seed):
                density = LogDensity(collapse(self.model), self.blank, self.observations)
                return density.constrain(engine.replicate(density, density.unconstrain(self.sites)))
        seeds = [self.seed + i for i in range(len(self))]
        fits = [engine.run(self.model, self.recording(i), seed=seed).samples for i, seed in enumerate(seeds)]
        return {name: torch.stack([fit[name].flatten(0, 1).unsqueeze(1) for fit in fits]) for name in fits[0]}

    def places(self, drawn: dict[str, Tensor]) -> np.ndarray:
        """Share (replicate, edge) of draws below the truth."""
        return np.stack([(self._strengths(drawn, i) < self.truth[i]).mean(0) for i in range(len(self))])

    def weighted(self, drawn: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """`places` of some draws, weighted by particles; and the share of them that the weights are worth."""
        chosen = thinned(next(iter(drawn.values())).shape[1], WEIGHTED)
        places, worth = [], []
        for i in range(len(self)):
            recording = self.recording(i)
            parameters = globals_given(self.model, {n: v[i, chosen] for n, v in drawn.items()}, recording)
            errors = evidence_error(
                self.model, lambda some, of=parameters: draws_of(of, some), np.arange(len(chosen)), recording,
                PARTICLES, self.seed + i,
            )  # fmt: skip
            weight = np.exp(smoothed(errors.sum(-1)[:, None])[0][:, 0])
            weight /= weight.sum()
            places.append(weight @ (self._strengths(drawn, i)[chosen] < self.truth[i]))
            worth.append(1.0 / (len(weight) * np.square(weight).sum()))
        return np.stack(places), np.array(worth)

    def _strengths(self, drawn: dict[str, Tensor], index: int) -> np.ndarray:
        return strengths(self.model, {name: value[index] for name, value in drawn.items()}, self.blank)


def coverage(replicates: int, engines: list[str]) -> list[str]:
    """Intervals of the strengths of all edges."""
    lines = ["| engine | in 50% intervals | in 90% intervals | seconds a replicate |", "|---|---|---|---|"]
    worth = ""
    made = Replicates(replicates)
    for name in engines:
        places, weighted, efficiency, spent = [], [], [], np.zeros(2)
        for part in made.groups(TOGETHER.get(name, 1)):
            began = time.process_time()
            drawn = part.drawn(ENGINES[name])
            places.append(part.places(drawn))
            spent[0] += time.process_time() - began
            if name == "HMC":
                began = time.process_time()
                found = part.weighted(drawn)
                weighted.append(found[0])
                efficiency.append(found[1])
                spent[1] += time.process_time() - began
        lines.append(_row(LABELS.get(name, name), np.concatenate(places), spent[0] / replicates))
        print(lines[-1], flush=True)
        if weighted:
            lines.append(_row("the same, weighted by particles", np.concatenate(weighted), spent[1] / replicates))
            print(lines[-1], flush=True)
            worth = f"Weighted draws are worth {100 * np.median(efficiency):.0f}% as many, in the median."
    return [*lines, "", worth] if worth else lines


def _row(name: str, places: np.ndarray, seconds: float) -> str:
    """Share of the truths in central intervals, with the standard error over replicates."""
    cells = []
    for probability in (0.5, 0.9):
        held = (np.abs(places - 0.5) < 0.5 * probability).mean(1)
        cells.append(f"{100 * held.mean():.0f} ± {100 * held.std(ddof=1) / len(held) ** 0.5:.0f}%")
    return f"| {name} | {' | '.join(cells)} | {seconds:.1f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["agreement", "coverage"])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--seeds", type=int, default=6, help="systems of two regions")
    parser.add_argument("--replicates", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("docs/tables/region_engines.md"))
    options = parser.parse_args()
    warnings.simplefilter("ignore", dyn.FitWarning)
    lines = ["# Engines on coupled regions", "", "Made by `python benchmarks/calibrate_region_engines.py`.", ""]
    if "agreement" in options.parts:
        lines += [f"## Agreement with HMC: two regions of 1 latent, {options.seeds} systems", ""]
        lines += [*agreement(options.seeds), ""]
    if "coverage" in options.parts:
        shape = f"{UNITS} units each, {COUNTS[0]} trials x {COUNTS[1]} bins, {options.replicates} replicates"
        lines += [f"## Coverage with counts: three regions of 1 latent, {shape}", ""]
        lines += [*coverage(options.replicates, options.engines), ""]
    options.out.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
