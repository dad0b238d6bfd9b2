"""What a Duffing recording says of its noise: with all else known, and beside a drift that has to be learned.

Run `python benchmarks/duffing_noise.py --fit 2 --table docs/tables/duffing_noise.md`, in about four minutes of one
core. It tells whether noise that `neural_sde_duffing.py` finds too large is the best there is, or was not looked for
well enough: the bound at what was found stands beside the bound with the noise at the truth and all else learned anew.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from neural_sde_duffing import informed_target

import pyrodyn as dyn
from pyrodyn import drifts, models, readouts
from pyrodyn.expectations import gauss_hermite
from pyrodyn.inference._diffusion_fit import DiffusionFit, Schedule
from pyrodyn.inference.engine import numerics, random_stream, starting_values
from pyrodyn.smoothing import bound, settled
from pyrodyn.systems import System, duffing

TRUTH = 0.2
GRID = np.array([0.17, 0.18, 0.19, 0.2, 0.21, 0.22, 0.23, 0.24])
SEEDS = (0, 1, 2)
HELD_ROUNDS = 12  # in which the noise is held


def informed(system: System) -> tuple[float, float, float]:
    """Noise of the largest bound with all else known, its sd by the curvature there, and nats lost at the truth."""
    rule, law, values = gauss_hermite(2, 3), None, []
    for sigma in GRID:
        target = informed_target(system, float(sigma))
        law = settled(target, rule, 60 if law is None else 25, law)
        values.append(float(bound(target, law, rule).sum()))
    # The bound is nearly a parabola in log sigma about its top.
    place = np.log(GRID)
    second, first, _ = np.polyfit(place - place.mean(), values, 2)
    top = place.mean() - first / (2.0 * second)
    best, sd = float(np.exp(top)), float(np.exp(top) / np.sqrt(-2.0 * second))
    return best, sd, float(-second * (np.log(TRUTH) - top) ** 2)


def learned(system: System, seed: int) -> list[tuple[str, float, list[float]]]:
    """Bounds in nats and noise in true coordinates: as found, with the noise held at the truth, and released again."""
    model = models.NeuralSDE(2, readouts.Gaussian(), drifts.GaussianProcess())
    back = torch.linalg.pinv(torch.from_numpy(system.truth["loading"].values))
    rows = []
    with random_stream(seed), numerics():
        start = starting_values(model.linear_relative(), system.recording, 200, "start")
        fit = DiffusionFit(Schedule(40, 3, 0.7, 3, 0.01, 0.05), model, system.recording, start)
        fit.train(None)

        def look(name: str) -> torch.Tensor:
            fit.settle(10)
            fit.move_weights()
            fit.settle(5)
            value = float(bound(fit.target(), fit.law, fit.rule).sum() - fit.weights.divergence(fit.prior_sd()))
            parameters = fit.parameters()
            turn = back @ parameters.loading.reshape(-1, 2)
            root = turn @ parameters.diffusion.reshape(2, 2)
            rows.append((name, value, (root @ root.mT).diagonal().sqrt().tolist()))
            print(rows[-1], flush=True)
            return turn

        turn = torch.linalg.inv(look("found"))
        root = torch.linalg.cholesky(TRUTH**2 * turn @ turn.mT)
        values = fit.density.constrain(fit.place) | {
            "diffusion_scale": root.diagonal().clone(),
            "diffusion_mixing": root[1:, 0] / root[1, 1],
        }
        fit.place = fit.density.unconstrain(values)
        for _ in range(HELD_ROUNDS):
            for _ in range(3):
                statistics = fit.move_weights()
                fit.move_path()
            fit.move_prior(statistics)
        look("noise held at the truth, path and drift learned anew")
        fit.round, fit.bounds = 0, np.full_like(fit.bounds, np.nan)
        fit.train(None)
        look("noise released again")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, nargs="*", default=[], help="seeds whose drift is learned, too")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", dyn.FitWarning)
    rows, more = [], []
    for seed in SEEDS:
        best, sd, lost = informed(duffing(seed=seed))
        rows.append(f"| {seed} | {best:.3f} ± {sd:.3f} | {lost:.2f} |")
        print(rows[-1], flush=True)
    for seed in options.fit:
        for name, value, sigma in learned(duffing(seed=seed), seed):
            more.append(f"| {seed} | {name} | {value:.1f} | {sigma[0]:.3f}, {sigma[1]:.3f} |")
    if options.table:
        fitted = "".join(f" --fit {' '.join(map(str, options.fit))}" if options.fit else "")
        lines = [
            "# What a Duffing recording says of its noise",
            "",
            f"Made by `python benchmarks/duffing_noise.py{fitted} --table docs/tables/duffing_noise.md`.",
            "",
            f"The recordings of neural_sde_duffing.md; the noise that made them is {TRUTH:g} in both directions.",
            "",
            "With drift, loading, offset and observation noise known: the noise of the largest bound, and what that "
            "bound loses at the truth.",
            "",
            "| seed | noise | nats lost at the truth |",
            "| --- | --- | --- |",
            *rows,
            "",
            "With all of them learned, from one and the same start:",
            "",
            "| seed | noise | bound, nats | noise in true coordinates |",
            "| --- | --- | --- | --- |",
            *more,
        ]
        options.table.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
