"""Does evidence tell cells that step from cells that ramp, and are drifts recovered?

Run `python benchmarks/compare_step_ramp.py`; it writes docs/tables/step_ramp.md, in about seven minutes on one core.
The exit code is 1 unless the bars stated there are met.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

import pyrodyn as dyn
from pyrodyn import inference, models

TABLE = Path(__file__).resolve().parents[1] / "docs" / "tables" / "step_ramp.md"
WIDTH = 0.01  # seconds
CONDITIONS = ("-2", "-1", "0", "+1", "+2")
DRIFTS = np.array([-0.005, -0.0025, 0.0, 0.005, 0.01])  # per bin
RIGHT, CORRELATION = 0.90, 0.95


class Cell(NamedTuple):
    """A cell with the kind it is, and what the two models make of it."""

    kind: str
    ahead: float  # nats by which the right model is better
    trials: int
    drift: np.ndarray  # estimated, per bin
    bound_time: float  # correlation of first passage times with the estimated ones, NaN for steps
    step_error: float  # mean absolute error of step times in bins, NaN for ramps


def ramping(rng: np.random.Generator, trials: int) -> tuple[dyn.Recording, np.ndarray]:
    """Counts, and the bin in which each trial reaches the bound (its length where it does not)."""
    lengths, which = rng.integers(50, 101, trials), rng.integers(5, size=trials)
    gain, x = 40.0 + 3.0 * rng.normal(), np.full(trials, 0.5)
    path = np.zeros((trials, 100))
    for t in range(100):
        moved = x + DRIFTS[which] + np.sqrt(1e-3) * rng.normal(size=trials)
        x = np.where(x >= 1.0, 1.0, np.minimum(moved, 1.0))
        path[:, t] = x
    reached = np.where((path >= 1.0).any(1), (path >= 1.0).argmax(1), 100)
    return recorded(rng, np.logaddexp(0.0, gain * path), lengths, which), np.minimum(reached, lengths)


def stepping(rng: np.random.Generator, trials: int) -> tuple[dyn.Recording, np.ndarray]:
    """Counts, and the bin of each trial's step. Rates and step times differ from cell to cell."""
    lengths, which = rng.integers(50, 101, trials), rng.integers(5, size=trials)
    before, up, down = np.array([20.0, 35.0, 8.0]) * np.exp(0.1 * rng.normal(size=3))
    mean = np.array([45.0, 50.0, 55.0, 45.0, 35.0]) * np.exp(0.1 * rng.normal())
    step = rng.geometric(2.0 / mean[which]) + rng.geometric(2.0 / mean[which])
    side = np.where(rng.random(trials) < np.array([0.1, 0.3, 0.5, 0.75, 0.95])[which], up, down)
    rates = np.where(np.arange(100) < step[:, None], before, side[:, None])
    return recorded(rng, rates, lengths, which), np.minimum(step, lengths)


def recorded(rng: np.random.Generator, rates: np.ndarray, lengths: np.ndarray, which: np.ndarray) -> dyn.Recording:
    counts = rng.poisson(rates * WIDTH)[..., None].astype(float)
    condition = [CONDITIONS[i] for i in which]
    return dyn.Recording.from_arrays(counts, bin_width=WIDTH, lengths=lengths, condition=condition, counts=True)


def judged(kind: str, seed: int, trials: int, grid: int) -> Cell:
    recording, when = (ramping if kind == "ramp" else stepping)(np.random.default_rng(seed), trials)
    engine = inference.Laplace(draws=20)
    step, ramp = models.Stepping(CONDITIONS), models.Accumulator(CONDITIONS, grid=grid)
    fits = {"step": dyn.fit(step, recording, engine, seed=0), "ramp": dyn.fit(ramp, recording, engine, seed=0)}
    evidence = {
        name: json.loads(fits[name].attrs["notes"])["log_evidence"] + model.log_copies(recording)
        for name, model in (("step", step), ("ramp", ramp))
    }
    other = "ramp" if kind == "step" else "step"
    drift = fits["ramp"]["posterior"]["drift"].mean(("chain", "draw")).values * WIDTH
    inside = np.arange(100) < recording.lengths[:, None]
    bound_time = step_error = np.nan
    if kind == "ramp":
        position = fits["ramp"]["latents"]["position"].values
        found = np.where((position > 0.97) & inside, 0, 1).cumprod(1).sum(1)
        bound_time = np.corrcoef(np.minimum(found, recording.lengths), when)[0, 1]
    else:
        before = fits["step"]["latents"]["phase_probability"].sel(phase="before").values
        found = (np.where(inside, before, 0.0) > 0.5).sum(1)  # the median of the step's time
        step_error = float(np.abs(found - when).mean())
    return Cell(kind, evidence[kind] - evidence[other], trials, drift, bound_time, step_error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=50, help="of each kind")
    parser.add_argument("--trials", type=int, default=250)
    parser.add_argument("--grid", type=int, default=60)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore", dyn.FitWarning)
    began = time.perf_counter()
    cells = [
        judged(kind, 1000 * number + seed, chosen.trials, chosen.grid)
        for number, kind in enumerate(("step", "ramp"))
        for seed in range(chosen.cells)
    ]
    seconds = time.perf_counter() - began
    lines, met = [], True
    for kind in ("step", "ramp"):
        ahead = np.array([cell.ahead for cell in cells if cell.kind == kind])
        right = float((ahead > 0).mean())
        least, middle = np.quantile(ahead, [0.1, 0.5])
        lines.append(f"| {kind} | {len(ahead)} | {right:.2f} | {least:.1f} | {middle:.1f} |")
    right = float(np.mean([cell.ahead > 0 for cell in cells]))
    ramps = [cell for cell in cells if cell.kind == "ramp"]
    correlation = float(np.corrcoef(np.ravel([cell.drift for cell in ramps]), np.tile(DRIFTS, len(ramps)))[0, 1])
    bound_time = float(np.mean([cell.bound_time for cell in ramps]))
    step_error = float(np.mean([cell.step_error for cell in cells if cell.kind == "step"]))
    met = right >= RIGHT and correlation >= CORRELATION
    text = f"""# Steps and ramps

`python benchmarks/compare_step_ramp.py --cells {chosen.cells} --trials {chosen.trials} --grid {chosen.grid}`,
{seconds / 60:.1f} minutes on one core. Single cells of about 20 Hz, {chosen.trials} trials of 50 to 100 bins of 10 ms,
five conditions; drifts of ramps are -.005 to .01 a bin, their variance .001 a bin, the gain 40 Hz (sd 3). Steps lead
from 20 to 35 or 8 Hz, each with a scatter of a tenth. Models are compared by Laplace's log evidence; what is latent in
trials is summed out exactly in both.

| cells that | cells | classified rightly | nats ahead, lowest tenth | median |
|---|---|---|---|---|
{chr(10).join(lines)}

| quantity | measured | bar |
|---|---|---|
| classified rightly, all | {right:.2f} | {RIGHT:.2f} |
| correlation of drifts, estimated and true | {correlation:.3f} | {CORRELATION:.2f} |
| correlation of bound times, single trials | {bound_time:.2f} | - |
| error of step times, single trials, mean absolute, bins | {step_error:.1f} | - |
"""
    print(text)
    TABLE.write_text(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
