"""Laplace's approximation of the posterior of the globals: its mode, and its curvature there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyrodyn.checkpoint import StateStore
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.engine import Draws, numerics, random_stream, starting_values, treat_path, vector_of
from pyrodyn.inference.mode import ascend, covariance_root, negative_hessian
from pyrodyn.program import Program
from pyrodyn.recording import Recording


@dataclass(frozen=True)
class Laplace:
    r"""A Gaussian at the posterior mode of the unconstrained globals.

    .. math:: \hat z = \arg\max \log p(y, z), \qquad q(z) = N\!\big(\hat z, \; [-\nabla^2 \log p(y, \hat z)]^{-1}\big)

    The Hessian is central differences of the exact gradient, all of them in batched calls.

    Parameters
    ----------
    draws : int
        Independent draws from the approximation.
    max_steps : int
        Steps of L-BFGS allowed on the way to the mode.
    tolerance : float
        Gain of a step, as a share of the log density, below which the climb has ended.
    least_curvature : float
        Given to directions that have less at the mode: their sd is its inverse root, 100 by default. One is about as
        wide as priors are.

    Notes
    -----
    The path is always integrated out: a joint mode of path and globals is far from the mass of the posterior.

    References
    ----------
    Tierney & Kadane, J. Am. Stat. Assoc. 81:82 (1986).
    """

    draws: int = 1000
    max_steps: int = 1000
    tolerance: float = 1e-13
    least_curvature: float = 1e-4

    def run(self, program: Program, recording: Recording, *, seed: int, checkpoint: StateStore | None = None) -> Draws:
        with random_stream(seed), numerics():
            state = (checkpoint.read() if checkpoint else None) or {}
            values = starting_values(program, recording, 0, "Laplace")
            treated, treatment = treat_path(program, recording, True, values)
            density = LogDensity(treated, recording)
            if "mode" not in state:
                mode, converged = ascend(
                    density, vector_of(values, density), self.max_steps, "Laplace: mode", self.tolerance
                )
                state = {"mode": mode.numpy(), "converged": np.array(bool(converged))}
                if checkpoint:
                    checkpoint.write(state)
            mode, converged = torch.from_numpy(state["mode"]), bool(state["converged"])
            if "hessian" not in state:
                state["hessian"] = negative_hessian(density, mode, "Laplace: curvature").numpy()
                if checkpoint:
                    checkpoint.write(state)
            return self._draw(density, mode, torch.from_numpy(state["hessian"]), converged, treatment)

    def replicate(self, density: LogDensity, start: Tensor) -> Tensor:
        """Draws (replicate, draw, dimension) about the modes nearest to ``start`` (replicate, dimension).

        The observations of ``density`` are (replicate, 1, trial, time, unit).
        """
        return self.refit(density, start)[0]

    def refit(self, density: LogDensity, start: Tensor) -> tuple[Tensor, Tensor]:
        """`replicate`, and log q (replicate, draw) of the draws in unconstrained coordinates."""
        mode, _ = ascend(density, start.unsqueeze(1), self.max_steps, "Laplace: mode", self.tolerance)
        root, _ = covariance_root(negative_hessian(density, mode, "Laplace: curvature"), self.least_curvature)
        noise = torch.randn(len(start), self.draws, start.shape[-1])
        return mode + noise @ root.mT, -0.5 * noise.square().sum(-1) - _log_volume(root).unsqueeze(-1)

    def _draw(self, density: LogDensity, mode: Tensor, hessian: Tensor, converged: bool, treatment: str) -> Draws:
        warnings = [] if converged else [f"Laplace: the mode was not reached in max_steps={self.max_steps} steps"]
        root, flat = covariance_root(hessian, self.least_curvature)
        if int(flat):
            warnings.append(
                f"Laplace: {int(flat)} of {len(mode)} directions have no curvature at the mode; given sd "
                f"{self.least_curvature**-0.5:g}"
            )
        log_volume = float(_log_volume(root))
        noise = torch.randn(self.draws, len(mode))
        vectors = mode + noise @ root.mT
        values = density.constrain(vectors)
        log_q = -0.5 * noise.square().sum(-1) - log_volume - density.log_jacobian(vectors)
        samples = {site.name: values[site.name].reshape(1, self.draws, *site.shape) for site in density.sites}
        evidence = float(density(mode)) + log_volume
        return Draws(
            samples,
            treatment,
            stats={"log_q": log_q.unsqueeze(0)},
            notes={
                "globals": "a Gaussian at the mode",
                "log_evidence": evidence,
                "log_evidence_estimator": "Laplace over globals",
                "converged": converged,
            },
            warnings=tuple(warnings),
        )


def _log_volume(root: Tensor) -> Tensor:
    """Log of the integral of exp(-|L^-1 z|^2 / 2) for lower triangular L (*batch, dimension, dimension), (*batch)."""
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * root.shape[-1] * math.log(2.0 * math.pi)
