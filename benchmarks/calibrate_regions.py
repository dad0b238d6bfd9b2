"""Simulation-based calibration of coupled regions under Gibbs sampling: ranks, coverage, and what P(present) is worth.

Run `python benchmarks/calibrate_regions.py`. The exit code is 1 where a quantity of the exact posterior is flagged.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import xarray as xr

import pyrodyn as dyn
from pyrodyn import inference, models, readouts
from pyrodyn.recording import Recording

UNITS = 4  # of each region
REGIONS = ("A", "B", "C")
BINS = 10  # of the predicted probability, in the calibration error
KINDS = ("coupling_strength", "variance_share", "presence", "log_likelihood", "spectral_radius", "global_persistence")


def like(trials: int, bins: int, counts: bool) -> Recording:
    """Shape and units of measurement."""
    size = UNITS * len(REGIONS)
    return Recording.from_arrays(
        np.ones((trials, bins, size)),
        bin_width=0.05,
        counts=counts,
        center=np.zeros(size),
        scale=np.ones(size),
        region=np.repeat(REGIONS, UNITS),
    ).blank()


def of_pairs(found: xr.Dataset, name: str) -> xr.Dataset:
    """A matrix (target, source) of quantities, without its diagonal."""
    size = len(REGIONS)
    chosen = [f"{name}[{i}]" for i in range(size * size) if i // size != i % size]
    return found.sel(quantity=chosen)


def calibration_error(probability: np.ndarray, truth: np.ndarray) -> float:
    """Mean distance between predicted and observed frequency, over bins of the prediction."""
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    total = 0.0
    for b in range(BINS):
        held = place == b
        if held.any():
            total += held.mean() * abs(probability[held].mean() - truth[held].mean())
    return float(total)


def rows(found: xr.Dataset) -> list[str]:
    """Least p-values and the range of coverage, by kind of quantity."""
    names = np.array([str(q).split("[")[0] for q in found["quantity"].values])
    written = []
    for kind in dict.fromkeys(names):
        chosen = found.isel(quantity=names == kind)
        half, ninety = chosen["coverage"].sel(level=0.5), chosen["coverage"].sel(level=0.9)
        written.append(
            f"| {kind} | {chosen.sizes['quantity']} | {float(chosen['ks_p'].min()):.3f} "
            f"| {float(chosen['chi_square_p'].min()):.3f} | {float(half.min()):.2f}-{float(half.max()):.2f} "
            f"| {float(ninety.min()):.2f}-{float(ninety.max()):.2f} | {int(chosen['flagged'].sum())} |"
        )
    return written


def summary(found: xr.Dataset) -> str:
    """What the edges' probabilities and the intervals of edges that are there are worth."""
    presence, strength = of_pairs(found, "presence"), of_pairs(found, "coupling_strength")
    probability, truth = presence["mean"].values.ravel(), presence["truth"].values.ravel()
    there = truth > 0.5
    inside = np.abs(strength["place"].values.ravel()[there] - 0.5) < 0.45
    sure = probability > 0.9
    return (
        f"P(present): calibration error {calibration_error(probability, truth):.3f} over {len(truth)} blocks; "
        f"{int((sure & ~there).sum())} of {int((~there).sum())} absent blocks above .9, "
        f"{int((sure & there).sum())} of {int(there.sum())} present ones. 90% intervals of the strength hold "
        f"{100 * inside.mean():.0f}% of {int(there.sum())} present blocks."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--counts", type=int, default=64, help="replicates with a Poisson readout")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/tables/calibration_regions.md"))
    options = parser.parse_args()
    lines = ["# Calibration of coupled regions", "", "Made by `python benchmarks/calibrate_regions.py`.", ""]
    flagged = 0
    for name, readout, replicates, shape in (
        ("Gaussian readout", readouts.Gaussian(), options.replicates, (1, 200)),
        ("Poisson readout", readouts.Poisson(), options.counts, (4, 50)),
    ):
        if not replicates:
            continue
        model = models.MultiRegionLDS(2, readout=readout, time_bumps=4)
        engine = inference.Gibbs(draws=100, warmup=80, thin=3, chains=2)
        began = time.perf_counter()
        recording = like(*shape, counts=isinstance(readout, readouts.Poisson))
        found = dyn.calibrate(model, recording, engine, replicates=replicates, seed=options.seed)
        flagged += int(found["flagged"].sum())
        lines += [
            f"## {name}: {found.attrs['shape']}, {len(REGIONS)} regions of 2 latents, {replicates} replicates",
            "",
            f"`{engine}`, {time.perf_counter() - began:.0f} s. {summary(found)}",
            "",
            "| quantity | entries | least KS p | least chi-square p | 50% coverage | 90% coverage | flagged |",
            "|---|---|---|---|---|---|---|",
            *rows(found),
            "",
        ]
        print("\n".join(lines[-6 - len(rows(found)) :]), flush=True)
    options.out.write_text("\n".join(lines))
    return int(flagged > 0)


if __name__ == "__main__":
    sys.exit(main())
