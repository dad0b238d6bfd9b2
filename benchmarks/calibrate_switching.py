"""Modes found again: a point on a race track, rotations seen through spikes, and how many modes there are.

Run from the root of the repository: ``python benchmarks/calibrate_switching.py --table docs/tables/switching.md``, or
with some of ``quick track short spikes longer number``. Every fit starts by itself and never sees the truth; modes are
matched to the true ones afterwards, for the counts alone.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

import pyrodyn as dyn
from pyrodyn import comparison, inference, models, readouts
from pyrodyn.posterior import parameters_of
from pyrodyn.scoring import bits_per_spike
from pyrodyn.systems import System, nascar, switching_rotations

SEEDS = range(5)
SIMULATED = 2000  # bins, of which the first are left out as the way onto the track
TRACK = models.SwitchingLDS(4, 2, recurrent=True, readout=readouts.Gaussian())
ROTATIONS = models.SwitchingLDS(5, 2)
GIBBS = inference.Gibbs(draws=50, warmup=50, chains=2)
QUICK = inference.Gibbs(draws=10, warmup=10, chains=1)
NUMBERS, LENGTHS = (3, 4, 5, 6), (500, 2500)  # of modes, and of bins in each trial that is to tell how many
CLEAR = 2.0  # standard errors
LONGER = [inference.Gibbs(draws=100, warmup=200, chains=2), inference.Gibbs(draws=200, warmup=600, chains=2)]
FOLDED = inference.Gibbs(draws=13, warmup=87, chains=2)


def fitted(model: Any, recording: dyn.Recording, engine: Any) -> tuple[xr.DataTree, float]:
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)  # so short a run is said to be short
        return dyn.fit(model, recording, engine, seed=0), time.process_time() - start


def matched(found: np.ndarray, truth: np.ndarray, modes: int) -> tuple[np.ndarray, float]:
    """For every found mode the true one, and the share of bins that then agree."""
    shared = np.array([[np.sum((found == a) & (truth == b)) for b in range(modes)] for a in range(modes)])
    of_found = linear_sum_assignment(-shared)[1]
    return of_found, float(shared[np.arange(modes), of_found].sum() / found.size)


def clustered(latents: np.ndarray, truth: np.ndarray) -> float:
    """What k-means of true positions and velocities gets right: it has the path, and no dynamics."""
    speed = np.diff(latents, axis=1, append=latents[:, -1:])
    features = np.concatenate([latents / latents.std((0, 1)), speed / speed.std((0, 1))], -1).reshape(-1, 4)
    found = KMeans(4, n_init=10, random_state=0).fit_predict(features)  # pyright: ignore[reportArgumentType]
    return matched(found, truth.ravel(), 4)[1]


def track(bins: int, seed: int, engine: inference.Gibbs = GIBBS) -> str:
    system = nascar(bins=bins, seed=seed)
    posterior, seconds = fitted(TRACK, system.recording, engine)
    truth = system.truth["mode"].values
    found = posterior["latents"]["mode_probability"].values.argmax(-1)
    of_found, accuracy = matched(found, truth, 4)
    angle = np.abs(np.angle(np.linalg.eigvals(posterior["posterior"]["dynamics"].values))).mean((0, 1)).max(-1)
    phases = [angle[list(of_found).index(k)] / (np.pi / (24, 48)[k]) - 1.0 for k in (0, 1)]
    apart = occupancy(posterior, system, of_found)
    floor = clustered(system.truth["latents"].values, truth)
    return (
        f"| {bins} | {seed} | {accuracy:.3f} | {floor:.3f} | {phases[0]:+.1%}, {phases[1]:+.1%} | {apart:.2f} "
        f"| {seconds:.1f} |"
    )


def occupancy(posterior: xr.DataTree, system: System, of_found: np.ndarray) -> float:
    """Total variation between shares of time in modes: true ones, and those of paths that draws simulate."""
    parameters = parameters_of(posterior, TRACK, 10)
    like = nascar(bins=SIMULATED, seed=0).recording
    with torch.no_grad():
        torch.manual_seed(0)
        modes = TRACK.latent_path(parameters, like).sample_jointly()[1].numpy()[..., SIMULATED // 10 :]
    share = np.bincount(of_found[modes.ravel()], minlength=4) / modes.size
    true = np.bincount(system.truth["mode"].values.ravel(), minlength=4) / system.truth["mode"].size
    return float(0.5 * np.abs(share - true).sum())


def spikes(seed: int) -> str:
    system = switching_rotations(seed=seed)
    recording = system.recording
    hidden = np.random.default_rng(seed).random(recording.values.shape) < 0.05
    seen = recording.hide(mask=hidden)
    counts = np.where(hidden, recording.values.numpy(), np.nan)
    posterior, seconds = fitted(ROTATIONS, seen, GIBBS)
    accuracy = matched(posterior["latents"]["mode_probability"].values.argmax(-1), system.truth["mode"].values, 5)[1]
    linear, _ = fitted(models.LDS(2), seen, inference.Laplace(draws=100))
    rates, true = [rates_of(fit, seen) for fit in (posterior, linear)], system.truth["rates"].values
    scores = [bits_per_spike(rate, counts) for rate in (*rates, true)]

    def gained(of: np.ndarray) -> np.ndarray:
        """Bits by which the switching rates tell hidden counts better, each as a part of all spikes."""
        apart = of * np.log(rates[0] / rates[1]) - (rates[0] - rates[1])
        return apart[hidden] / np.log(2.0) / of[hidden].sum()

    seen_gain, mean_gain = gained(recording.values.numpy()), gained(true)
    error = seen_gain.std() * seen_gain.size**0.5
    shown = " | ".join(f"{score:.4f}" for score in scores)
    return (
        f"| {seed} | {accuracy:.3f} | {shown} | {seen_gain.sum():+.4f} ± {error:.4f} | {mean_gain.sum():+.4f} "
        f"| {seconds:.1f} |"
    )


def number(bins: int, seed: int) -> str:
    """What two folds of trials say of the number of modes: differences to the best, and their standard errors."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = dyn.select(
            lambda num_modes: replace(TRACK, num_modes=num_modes), {"num_modes": NUMBERS},
            nascar(bins=bins, trials=4, seed=seed).recording, FOLDED, method=comparison.KFold(2),
        )  # fmt: skip
    rows = [table.sel(model=f"num_modes={k}") for k in NUMBERS]
    shown = " | ".join(f"{float(row['difference']):.1f} ({float(row['dse']):.1f})" for row in rows)
    least = comparison.fewest(table, "num_modes", CLEAR)
    seconds = time.perf_counter() - began
    return f"| {bins} | {seed} | {shown} | {int(table['num_modes'][0])} | {least} | {seconds:.0f} |"


def rates_of(posterior: xr.DataTree, recording: dyn.Recording) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        return dyn.predict(posterior, recording, draws=50)["expected"].values


HEADS = {
    "quick": (
        f"## A race track in a hurry\n\nAs below, with one short chain: `{QUICK!r}`.\n\n"
        "| bins | seed | accuracy | k-means of the true path | phase errors | occupancy | s |\n"
        "|---|---|---|---|---|---|---|"
    ),
    "track": (
        "## A race track\n\n`systems.nascar`: two bends, two straights, 10 channels. "
        f"`{TRACK!r}`.\nPhase errors are of the two bends' eigenvalues; occupancy is the total variation between "
        "true shares of modes and those that the fit simulates.\n\n"
        "| bins | seed | accuracy | k-means of the true path | phase errors | occupancy | s |\n"
        "|---|---|---|---|---|---|---|"
    ),
    "spikes": (
        "## Rotations seen through spikes\n\n`systems.switching_rotations`: 5 modes, 100 Poisson units, 1000 bins, one "
        f"entry in twenty hidden. `{ROTATIONS!r}`.\nBits per spike are of the hidden entries; the difference to "
        "the LDS with a standard error over entries, and as it is on average over counts from the true rates.\n\n"
        "| seed | accuracy | switching | LDS(2) | true rates | difference | on average | s |\n"
        "|---|---|---|---|---|---|---|---|"
    ),
    "longer": (
        "## Longer chains\n\nThe race track of 1000 bins, by sweeps of warm-up and of draws.\n\n"
        "| sweeps | bins | seed | accuracy | k-means of the true path | phase errors | occupancy | s |\n"
        "|---|---|---|---|---|---|---|---|"
    ),
    "number": (
        "## How many modes has the race track?\n\nFour trials, two folds, paths and modes integrated out "
        f"by particles; `{FOLDED!r}`.\nDifferences of the elpd to the best number (nats), with standard errors over "
        f"trials; *least* is the least number that is not worse than the best by {CLEAR:g} standard errors.\n\n"
        "| bins a trial | seed | " + " | ".join(f"{k} modes" for k in NUMBERS) + " | best | least | s |\n"
        "|---|---|---|---|---|---|---|---|---|"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["quick", "short", "track", "spikes", "longer", "number"])
    parser.add_argument("--table", type=Path, help="write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [f"# Switching dynamics found again\n\nMade by `python benchmarks/calibrate_switching.py`; {GIBBS!r}.\n"]
    if "quick" in options.parts:
        fitted(TRACK, nascar(bins=200, seed=0).recording, QUICK)  # compiles
        lines.append(HEADS["quick"])
        for seed in SEEDS:
            lines.append(track(1000, seed, QUICK))
            print(lines[-1], flush=True)
        lines.append("")
    sizes = [bins for bins, name in ((1000, "short"), (10_000, "track")) if name in options.parts]
    if sizes:
        lines.append(HEADS["track"])
        for bins in sizes:
            for seed in SEEDS:
                lines.append(track(bins, seed))
                print(lines[-1], flush=True)
        lines.append("")
    if "longer" in options.parts:
        lines.append(HEADS["longer"])
        for seed in SEEDS:
            for engine in (GIBBS, *LONGER):
                lines.append(f"| {engine.warmup} + {engine.draws} {track(1000, seed, engine)}")
                print(lines[-1], flush=True)
        lines.append("")
    for name, rows in (("spikes", [spikes]), ("number", [partial(number, bins) for bins in LENGTHS])):
        if name in options.parts:
            lines.append(HEADS[name])
            for row, seed in product(rows, SEEDS):
                lines.append(row(seed))
                print(lines[-1], flush=True)
            lines.append("")
    if options.table:
        options.table.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
