"""What the engines that move by gradients are worth on coupled regions: strengths of edges, beside the exact sampler.

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
from pathlib import Path

import numpy as np
import xarray as xr

import pyrodyn as dyn
from pyrodyn import guides, inference, models, readouts
from pyrodyn.comparison.terms import Candidate, evidence_error, smoothed
from pyrodyn.posterior import thinned

UNITS = 4  # of each region
WEIGHTED = 200  # draws whose evidence is corrected
PARTICLES = 200
GUIDES = {"SVI, full rank": None, "SVI, structured": guides.Structured()}


def blank(regions: str, trials: int, bins: int, counts: bool) -> dyn.Recording:
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


def strengths(posterior: xr.DataTree) -> np.ndarray:
    """Draws (sample, edge)."""
    values = posterior["invariants"]["coupling_strength"].values
    return values[..., ~np.eye(values.shape[-1], dtype=bool)].reshape(-1, values.shape[-1] * (values.shape[-1] - 1))


def true_strengths(truth: xr.Dataset, bin_width: float) -> np.ndarray:
    tree = xr.DataTree.from_dict({"posterior": truth.drop_vars("path").expand_dims(("chain", "draw"))})
    tree.attrs["bin_width"] = bin_width
    values = dyn.coupling_graph(tree)["strength"].values[0, 0]
    return values[~np.eye(len(values), dtype=bool)]


def agreement(seeds: int) -> list[str]:
    lines = [
        "| readout | engine | distance of means in sd: median | largest | ratio of sds: least | median | largest "
        "| seconds a fit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, shape, counts in (("Gaussian, 1 x 200 bins", (1, 200), False), ("Poisson, 4 x 50 bins", (4, 50), True)):
        model, apart, ratio = model_of(counts), {}, {}
        spent = dict.fromkeys(GUIDES, 0.0)
        for seed in range(seeds):
            recording, _ = dyn.simulate(model, blank("AB", *shape, counts), seed=seed)
            reference = strengths(dyn.fit(model, recording, inference.HMC(draws=60, warmup=150, chains=32), seed=0))
            for engine, guide in GUIDES.items():
                began = time.perf_counter()
                found = strengths(dyn.fit(model, recording, inference.SVI(guide=guide, draws=2000), seed=0))
                spent[engine] += (time.perf_counter() - began) / seeds
                apart.setdefault(engine, []).append(abs(found.mean(0) - reference.mean(0)) / reference.std(0))
                ratio.setdefault(engine, []).append(found.std(0) / reference.std(0))
        for engine in GUIDES:
            far, wide = np.concatenate(apart[engine]), np.concatenate(ratio[engine])
            lines.append(
                f"| {name} | {engine} | {np.median(far):.2f} | {far.max():.2f} | {wide.min():.2f} "
                f"| {np.median(wide):.2f} | {wide.max():.2f} | {spent[engine]:.0f} |"
            )
            print(lines[-1], flush=True)
    return lines


def coverage(replicates: int) -> list[str]:
    """Intervals of the strengths of all edges, replicate by replicate."""
    model, like = model_of(True), blank("ABC", 4, 50, True)
    engines = {
        "Gibbs": inference.Gibbs(draws=150, warmup=100, chains=4),
        "HMC, path by Laplace": inference.HMC(draws=40, warmup=100, chains=16),
        "Laplace": inference.Laplace(draws=500),
        "SVI, structured": inference.SVI(guide=guides.Structured()),
    }
    places: dict[str, list[np.ndarray]] = {}
    spent: dict[str, float] = {}
    efficiency = []
    for seed in range(replicates):
        recording, truth = dyn.simulate(model, like, seed=seed)
        true = true_strengths(truth, recording.bin_width)
        for name, engine in engines.items():
            began = time.perf_counter()
            posterior = dyn.fit(model, recording, engine, seed=seed)
            drawn = strengths(posterior)
            places.setdefault(name, []).append((drawn < true).mean(0))
            if name.startswith("HMC"):
                weight, chosen = corrected_weights(posterior, model, recording, seed)
                places.setdefault("the same, weighted by particles", []).append(weight @ (drawn[chosen] < true))
                efficiency.append(1.0 / (len(weight) * np.square(weight).sum()))
            spent[name] = spent.get(name, 0.0) + (time.perf_counter() - began) / replicates
        if seed % 8 == 7:
            print(seed + 1, {name: round(inside(found, 0.9)[0], 2) for name, found in places.items()}, flush=True)
    lines = ["| engine | in 50% intervals | in 90% intervals | seconds a fit |", "|---|---|---|---|"]
    for name, found in places.items():
        cells = [f"{100 * share:.0f} ± {100 * error:.0f}%" for share, error in (inside(found, p) for p in (0.5, 0.9))]
        seconds = f"{spent[name]:.0f}" if name in spent else "-"
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds} |")
    return [*lines, "", f"Weighted draws are worth {100 * np.median(efficiency):.0f}% as many, in the median."]


def inside(places: list[np.ndarray], probability: float) -> tuple[float, float]:
    """Share of the truths in central intervals, with the standard error over replicates."""
    held = (np.abs(np.array(places) - 0.5) < 0.5 * probability).mean(1)
    return float(held.mean()), float(held.std(ddof=1) / len(held) ** 0.5)


def corrected_weights(
    posterior: xr.DataTree, model: models.MultiRegionLDS, recording: dyn.Recording, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed weights of some draws, and which these are."""
    sizes = posterior["posterior"].sizes
    chosen = thinned(sizes["chain"] * sizes["draw"], WEIGHTED)
    candidate = Candidate("HMC", model, posterior, recording)
    errors = evidence_error(model, candidate.globals_at, chosen, recording, PARTICLES, seed).sum(-1)
    logs = smoothed(errors[:, None])[0][:, 0]
    weight = np.exp(logs - logs.max())
    return weight / weight.sum(), chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--replicates", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("docs/tables/region_engines.md"))
    options = parser.parse_args()
    warnings.simplefilter("ignore", dyn.FitWarning)
    lines = ["# Engines on coupled regions", "", "Made by `python benchmarks/calibrate_region_engines.py`.", ""]
    for title, make in (
        (f"Agreement with HMC: two regions of 1 latent, {options.seeds} systems", lambda: agreement(options.seeds)),
        (
            f"Coverage with counts: three regions of 1 latent, {UNITS} units each, 4 trials x 50 bins, "
            f"{options.replicates} replicates",
            lambda: coverage(options.replicates),
        ),
    ):
        lines += [f"## {title}", "", *make(), ""]
        options.out.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
