"""The mode of a log density and its curvature there: an engine of its own, and where the others start."""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from pyrodyn.errors import NonFiniteError
from pyrodyn.inference.density import LogDensity
from pyrodyn.progress import progress

STEP = 1e-4  # of the central differences, in unconstrained coordinates, whose posterior sds are of order .01 to 1


def ascend(
    density: LogDensity, start: Tensor, max_steps: int, label: str, tolerance: float = 1e-13
) -> tuple[Tensor, bool]:
    """Climb to the mode by L-BFGS from ``start`` (dimension,); returns the vector and whether it converged.

    It stops where a step gains less than ``tolerance`` of the log density's size.
    """
    with progress(max_steps, label) as bar:

        def loss(vector: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = density.gradient(torch.from_numpy(vector.copy()))
            return -float(value), -slope.numpy()

        if not math.isfinite(loss(start.numpy())[0]):
            raise NonFiniteError(
                f"{label}: the log density is not finite at the initial values (step 0); check the recording with "
                "model.check(recording) and the scale of the priors"
            )
        found = scipy.optimize.minimize(
            loss,
            start.numpy(),
            method="L-BFGS-B",
            jac=True,
            callback=lambda _: bar.update() and None,
            options={"maxiter": max_steps, "maxfun": 4 * max_steps, "maxcor": 30, "ftol": tolerance, "gtol": 1e-5},
        )
    return torch.from_numpy(found.x), bool(found.success)


def negative_hessian(density: LogDensity, vector: Tensor, label: str, chunk: int = 32) -> Tensor:
    """Minus the Hessian of the log density by central differences of its gradient, (dimension, dimension)."""
    size = len(vector)
    columns = []
    with progress(size, label) as bar:
        for part in (STEP * torch.eye(size, dtype=vector.dtype)).split(chunk):
            _, slopes = density.gradient(torch.cat([vector + part, vector - part]))
            ahead, behind = slopes.chunk(2)
            columns.append((behind - ahead) / (2.0 * STEP))
            bar.update(len(part))
    hessian = torch.cat(columns)
    return 0.5 * (hessian + hessian.mT)


def covariance_root(hessian: Tensor, least_curvature: float) -> tuple[Tensor, int]:
    """Lower Cholesky factor of the inverse Hessian, and how many directions were too flat and were lifted."""
    curvature, axes = torch.linalg.eigh(hessian)
    flat = int((curvature < least_curvature).sum())
    scaled = axes / curvature.clamp(min=least_curvature).sqrt()
    # R from the QR of the transpose is a triangular root of scaled @ scaled.mT, without forming the product.
    upper = torch.linalg.qr(scaled.mT)[1]
    return upper.mT * upper.diagonal().sign(), flat
