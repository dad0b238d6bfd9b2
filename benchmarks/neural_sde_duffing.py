"""What a neural SDE finds of a noisy Duffing oscillator of which three bins in ten are seen.

Run `python benchmarks/neural_sde_duffing.py --table docs/tables/neural_sde_duffing.md`. For every seed a
Gaussian-process drift is fitted by `inference.NaturalGradient`, and compared with the truth in the true coordinates:
every draw is brought there by its own loading. Beside it, the smoother that knows drift, noise and readout.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyrodyn as dyn
from pyrodyn import drifts, inference, models, readouts
from pyrodyn.diffusion import grid_of
from pyrodyn.evaluation import find_fixed_points
from pyrodyn.expectations import Diffusion, gauss_hermite
from pyrodyn.posterior import parameters_of
from pyrodyn.readouts import AffineReadout
from pyrodyn.smoothing import Target, settled
from pyrodyn.systems import System, duffing
from pyrodyn.systems.fields import field

DRAWS = 100
CELLS = 12  # in each dimension, over the range of the true paths; those visited in a thousandth of the bins count


def informed_target(system: System, sigma: float) -> Target:
    """Inference of the path with everything known but the path, at some size of the noise."""
    truth, recording = system.truth, system.recording
    flow = field("duffing", alpha=2.0, beta=1.0, gamma=0.1)
    loading, offset = (torch.from_numpy(truth[name].values) for name in ("loading", "offset"))
    noise = torch.full((1, recording.num_units), float(truth.attrs["noise_variance"]) ** 0.5, dtype=torch.float64)

    def drift(state: torch.Tensor) -> torch.Tensor:
        x, v = state.unbind(-1)
        return torch.stack([v, 2.0 * x - x**3 - 0.1 * v], -1)

    probe = torch.randn(5, 2, dtype=torch.float64)
    np.testing.assert_allclose(drift(probe), flow(probe.numpy()))
    grid = grid_of(recording, 1)
    eye = torch.eye(2, dtype=torch.float64)[None, None]
    diffusion = Diffusion(drift, eye, None, eye / sigma**2, grid.steps, 1.5)
    return Target(
        diffusion,
        lambda path: AffineReadout(readouts.Gaussian(), path, loading[None], offset[None], noise, recording.mask),
        recording.observations,
        grid.bins,
    )


def informed_rmse(system: System) -> float:
    """Error of the path that is smoothed with everything known but the path."""
    truth = system.truth
    target = informed_target(system, float(truth.attrs["sigma"]))
    law = settled(target, gauss_hermite(2, 3), 60)
    return float((law.mean[..., target.bins, :] - torch.from_numpy(truth["latents"].values)).square().mean().sqrt())


def measure(seed: int, steps_per_bin: int, rounds: int) -> dict[str, Any]:
    """Everything that the table shows of one seed."""
    system = duffing(seed=seed)
    truth, recording = system.truth, system.recording
    model = models.NeuralSDE(2, readouts.Gaussian(), drifts.GaussianProcess(), steps_per_bin=steps_per_bin)
    began = time.perf_counter()
    tree = dyn.fit(model, recording, inference.NaturalGradient(rounds=rounds, draws=DRAWS), seed=seed)
    seconds = time.perf_counter() - began
    fitted = parameters_of(tree, model, DRAWS)
    loading, offset = (torch.from_numpy(truth[name].values) for name in ("loading", "offset"))
    back = torch.linalg.pinv(loading)
    turn = back @ fitted.loading.squeeze(1)  # (draw, latent, latent): to the true coordinates
    shift = (fitted.offset.squeeze(1) - offset) @ back.mT
    true = torch.from_numpy(truth["latents"].values)
    mean, sd = (torch.from_numpy(tree["latents"][name].values) for name in ("mean", "sd"))
    paths = mean @ turn.mean(0).mT + shift.mean(0)
    own = torch.linalg.solve(turn.mean(0), (true - shift.mean(0)).mT).mT  # the truth in the fit's coordinates
    inside = (own - mean).abs() <= 1.645 * sd
    flow = model.flow(fitted)

    def true_flow(state: torch.Tensor) -> torch.Tensor:
        """The drift of every draw (draw, point, latent) at true states."""
        return flow(torch.linalg.solve(turn, (state - shift[:, None]).mT).mT) @ turn.mT

    states = true.reshape(-1, 2)
    edges = [np.linspace(float(s.min()), float(s.max()), CELLS + 1) for s in states.unbind(-1)]
    counts = np.histogram2d(*states.numpy().T, bins=edges)[0]
    middles = np.stack(np.meshgrid(*[(e[1:] + e[:-1]) / 2 for e in edges], indexing="ij"), -1)
    visited = torch.from_numpy(middles[counts >= 1e-3 * len(states)])
    wanted = torch.from_numpy(field("duffing", alpha=2.0, beta=1.0, gamma=0.1)(visited.numpy()))
    found = true_flow(visited.expand(DRAWS, -1, -1))
    error, spread = found.mean(0) - wanted, found.std(0)
    starts = states[:: max(1, len(states) // 60)]
    points = find_fixed_points(lambda s: true_flow(s.expand(DRAWS, *s.shape[-2:])).mean(0, keepdim=True), starts[None])
    places = points.states[0][points.distinct((0,))]
    wells = torch.tensor([[2.0**0.5, 0.0], [-(2.0**0.5), 0.0]], dtype=torch.float64)
    noise = torch.einsum("sij,sjk->sik", turn, fitted.diffusion.squeeze(1))
    sigma = (noise @ noise.mT).mean(0)
    return {
        "seconds": seconds,
        "elbo": json.loads(tree.attrs["notes"])["elbo"],
        "rmse": float((paths - true).square().mean().sqrt()),
        "informed": informed_rmse(system),
        "drift": float(error.square().mean().sqrt() / wanted.square().mean().sqrt()),
        "drift_z": float((error / spread).square().mean().sqrt()),
        "coverage": float(inside.double().mean()),
        "wells": [float((places - well).norm(dim=-1).min()) if len(places) else float("nan") for well in wells],
        "sigma": sigma.diagonal().sqrt().tolist(),
    }


HEAD = (
    "| seed, steps a bin | seconds | path RMSE | informed smoother | ratio (bar 1.15) | drift RMSE over rms (bar .25) "
    "| drift error over its own sd | wells missed by (bar .1) | noise, true .2 (bar 15%) | 90% bands cover (85 to 95%) "
    "| bound, nats |"
)


def line(name: str, found: dict[str, Any]) -> str:
    """One row of the table."""
    wells, sigma = (", ".join(f"{value:.3f}" for value in found[key]) for key in ("wells", "sigma"))
    ratio = found["rmse"] / found["informed"]
    return (
        f"| {name} | {found['seconds']:.0f} | {found['rmse']:.4f} | {found['informed']:.4f} | "
        f"{ratio:.2f} | {found['drift']:.3f} | {found['drift_z']:.2f} | {wells} | {sigma} | "
        f"{100 * found['coverage']:.1f}% | {found['elbo']:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--halve", action="store_true", help="repeat the first seed with steps half as long")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    text = [
        "# A noisy Duffing oscillator seen in three bins of ten",
        "",
        f"Made by `python benchmarks/neural_sde_duffing.py --seeds {options.seeds}{' --halve' * options.halve} --table "
        "docs/tables/neural_sde_duffing.md`.",
        "",
        "Four trials of 1,000 bins, ten units with noise of variance .1. Errors are in true coordinates; "
        "the informed smoother knows drift, noise and readout. Seconds are of a busy machine.",
        "",
        HEAD,
        "|" + " --- |" * (HEAD.count("|") - 1),
    ]
    for seed, steps in [*((seed, 1) for seed in range(options.seeds)), *([(0, 2)] if options.halve else [])]:
        text.append(line(f"{seed}, {steps}", measure(seed, steps, options.rounds)))
        print(text[-1], flush=True)
    if options.table:
        options.table.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
