"""What a neural SDE finds of a noisy Duffing oscillator of which three bins in ten are seen.

Run `python benchmarks/neural_sde_duffing.py --table docs/tables/neural_sde_duffing.md`. For every seed a
Gaussian-process drift is fitted by `inference.NaturalGradient`, and compared with the truth in the true coordinates:
every draw is brought there by its own loading. Beside it, the smoother that knows drift, noise and readout.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyrodyn as dyn
from pyrodyn import drifts, inference, models, readouts
from pyrodyn.diffusion import grid_of
from pyrodyn.evaluation import find_fixed_points
from pyrodyn.posterior import parameters_of
from pyrodyn.readouts import AffineReadout
from pyrodyn.smoothing import Diffusion, Target, gauss_hermite, settled
from pyrodyn.systems import System, duffing
from pyrodyn.systems.fields import field

DRAWS = 100
CELLS = 12  # in each dimension, over the range of the true paths; those visited in a thousandth of the bins count


def informed_rmse(system: System) -> float:
    """Error of the path that is smoothed with everything known but the path."""
    truth, recording = system.truth, system.recording
    flow = field("duffing", alpha=2.0, beta=1.0, gamma=0.1)
    loading, offset = (torch.from_numpy(truth[name].values) for name in ("loading", "offset"))
    noise = torch.full((1, recording.num_units), float(truth.attrs["noise_variance"]) ** 0.5, dtype=torch.float64)
    sigma = float(truth.attrs["sigma"])

    def drift(state: torch.Tensor) -> torch.Tensor:
        x, v = state.unbind(-1)
        return torch.stack([v, 2.0 * x - x**3 - 0.1 * v], -1)

    probe = torch.randn(5, 2, dtype=torch.float64)
    np.testing.assert_allclose(drift(probe), flow(probe.numpy()))
    grid = grid_of(recording, 1)
    eye = torch.eye(2, dtype=torch.float64)[None, None]
    diffusion = Diffusion(drift, eye, None, eye / sigma**2, grid.steps, 1.5)
    target = Target(
        diffusion,
        lambda path: AffineReadout(readouts.Gaussian(), path, loading[None], offset[None], noise, recording.mask),
        recording.observations,
        grid.bins,
    )
    law = settled(target, gauss_hermite(2, 3), 60)
    return float((law.mean[..., grid.bins, :] - torch.from_numpy(truth["latents"].values)).square().mean().sqrt())


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
        "elbo": float(tree.attrs["elbo"]) if "elbo" in tree.attrs else float("nan"),
        "rmse": float((paths - true).square().mean().sqrt()),
        "informed": informed_rmse(system),
        "drift": float(error.square().mean().sqrt() / wanted.square().mean().sqrt()),
        "drift_z": float((error / spread).square().mean().sqrt()),
        "coverage": float(inside.double().mean()),
        "wells": [float((places - well).norm(dim=-1).min()) if len(places) else float("nan") for well in wells],
        "sigma": sigma.diagonal().sqrt().tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps-per-bin", type=int, default=1)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        found = measure(seed, options.steps_per_bin, options.rounds)
        rows.append(found)
        print(seed, found, flush=True)


if __name__ == "__main__":
    main()
