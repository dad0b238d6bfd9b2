"""Do deep models invent structure where there is none? Rates inferred from Poisson noise of constant rates.

Run `python benchmarks/noise_only.py --table docs/tables/noise_only.md`, in a few minutes of one core.
"""

from __future__ import annotations

import argparse
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _tables import write

import pyrodyn as dyn
from pyrodyn import guides, inference, models
from pyrodyn.guides import LowRank

TRIALS, HELD_OUT, BINS, UNITS = 200, 50, 50, 30
MEANS = (0.1, 0.5)  # counts a bin, least and most
PERIOD, DEPTH = 25, 0.6  # bins, and amplitude in log rates, of the wave that is there in the control


def counts_of(depth: float, seed: int) -> tuple[dyn.Recording, np.ndarray]:
    """Counts, and their rates (trial, time, unit): constant, or with a wave of another phase in every trial."""
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0.0, 2.0 * np.pi, (TRIALS + HELD_OUT, 1)) + 2.0 * np.pi * np.arange(BINS) / PERIOD
    log_rates = depth * np.sin(phase)[..., None] * rng.choice([-1.0, 1.0], UNITS)
    rates = np.linspace(*MEANS, UNITS) * np.exp(log_rates)
    return dyn.Recording.from_arrays(rng.poisson(rates).astype(float), bin_width=0.02, counts=True), rates


def share(expected: np.ndarray) -> tuple[float, float]:
    """Variance of a unit's inferred rate over trials and bins beside that of its counts: mean and most over units."""
    ratio = expected.var((0, 1)) / np.linspace(*MEANS, UNITS)
    return float(ratio.mean()), float(ratio.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", dyn.FitWarning)
    amortised = inference.SVI(
        steps=options.steps, learning_rate=0.01, particles=1, draws=50, guide=guides.Amortised(hidden_dim=32)
    )
    fits: dict[str, tuple[Any, Any]] = {
        "LFADS, autonomous": (models.LFADS(8, generator_dim=32, initial_dim=16), amortised),
        "LFADS, one inferred input": (
            models.LFADS(8, generator_dim=32, initial_dim=16, input_dim=1, controller_dim=16),
            amortised,
        ),
        "LatentRNN": (models.LatentRNN(8), amortised),
        "LDS, 4 latents": (models.LDS(4), inference.SVI(steps=100, particles=1, draws=20, guide=LowRank())),
    }
    rows = []
    for seed, (data, depth) in product(range(options.seeds), (("noise", 0.0), ("wave", DEPTH))):
        recording, rates = counts_of(depth, seed)
        train, test = (recording.isel(trial=part) for part in (slice(0, TRIALS), slice(TRIALS, None)))
        for name, (model, engine) in fits.items():
            began = time.process_time()
            posterior = dyn.fit(model, train, engine, seed=seed)
            seconds = time.process_time() - began
            expected = dyn.predict(posterior, test, draws=20)["expected"].values
            mean, most = share(expected)
            true, _ = share(rates[TRIALS:])
            rows.append(
                f"| {seed} | {data} | {name} | {seconds:.0f} | {100 * mean:.2f}% | {100 * most:.2f}% "
                f"| {100 * true:.2f}% |"
            )
            print(rows[-1], flush=True)
    if options.table:
        write(
            options.table,
            "Rates inferred from noise",
            f"Made by `python benchmarks/noise_only.py --steps {options.steps} --seeds {options.seeds} --table "
            "docs/tables/noise_only.md`.",
            f"Independent Poisson counts of {UNITS} units with constant rates of {MEANS[0]} to {MEANS[1]} a bin: "
            f"{TRIALS} trials of {BINS} bins to fit, {HELD_OUT} others to infer rates in. Variance of a unit's "
            "inferred rate over trials and bins, as a share of the Poisson variance of its counts at rest; the truth "
            f"is zero, the bar 2%. The control, which has to be seen: log rates with a wave of {PERIOD} bins, of an "
            f"amplitude of {DEPTH} and with another phase in every trial.",
            head=["seed", "data", "model", "CPU seconds", "mean over units", "largest", "mean of the truth"],
            rows=rows,
        )


if __name__ == "__main__":
    main()
