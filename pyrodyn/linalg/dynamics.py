r"""The precision of a linear chain that does not change with time, from its dynamics and covariances.

Of :math:`x_1 \sim N(0, \Sigma_1),\ x_t = A x_{t-1} + \epsilon_t,\ \epsilon_t \sim N(0, Q)` the blocks are

.. math:: J_{1,1} = \Sigma_1^{-1} + A^\top Q^{-1} A, \quad J_{t,t} = Q^{-1} + A^\top Q^{-1} A, \quad J_{T,T} = Q^{-1},
    \quad J_{t,t+1} = -A^\top Q^{-1} .

These are a few small matrices: as operations of torch they cost more than a chain of a thousand bins. On the CPU they
are one compiled function, and their gradient another.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrodyn.linalg.chain import _compiled_for
from pyrodyn.linalg.matrix import broadcast_shapes, precision_of


def dynamics_blocks(
    dynamics: Tensor, process_noise: Tensor, initial_covariance: Tensor, num_bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Blocks of the precision of a linear chain, and its log normaliser where no drift and no mean is added.

    Parameters
    ----------
    dynamics, process_noise, initial_covariance : Tensor, (*batch, latent, latent)
        A, Q and :math:`\Sigma_1`; batches broadcast.
    num_bins : int

    Returns
    -------
    blocks : Tensor, (*batch, 3, latent, latent)
        Diagonal blocks of the first bin, of those between, and of the last; of one bin, the first is
        :math:`\Sigma_1^{-1}`.
    upper : Tensor, (*batch, 1, latent, latent)
    normaliser : Tensor, (*batch)

    Differentiable once. An element whose covariances are not positive definite becomes NaN.
    """
    batch = broadcast_shapes(dynamics.shape[:-2], process_noise.shape[:-2], initial_covariance.shape[:-2])
    dim, later = dynamics.shape[-1], num_bins - 1
    constant = num_bins * dim * math.log(2.0 * math.pi)
    parts = dynamics, process_noise, initial_covariance
    if _compiled_for(*parts) is not None:
        shape = batch + dynamics.shape[-2:]
        wide = (part if part.shape == shape else part.expand(shape) for part in parts)
        blocks, upper, log_det = _Blocks.apply(*wide, later)
        return blocks, upper, 0.5 * (constant + log_det)
    noise_precision, noise_log_det = precision_of(process_noise)
    initial_precision, initial_log_det = precision_of(initial_covariance)
    pushed = (dynamics.mT @ noise_precision).expand(*batch, dim, dim)  # A' Q^-1
    ahead = pushed @ dynamics
    first = initial_precision + ahead if later else initial_precision
    three = (first, noise_precision + ahead, noise_precision)
    blocks = torch.cat([matrix.expand(*batch, dim, dim).unsqueeze(-3) for matrix in three], -3)
    normaliser = 0.5 * (constant + initial_log_det + later * noise_log_det)
    return blocks, -pushed.unsqueeze(-3), normaliser.expand(batch)


class _Blocks(torch.autograd.Function):
    """Blocks, upper block, and the log determinant of the covariance of the whole chain."""

    @staticmethod
    def forward(ctx, dynamics: Tensor, process_noise: Tensor, initial_covariance: Tensor, later: int):
        from pyrodyn.linalg import _dynamics_kernels

        batch, dim = dynamics.shape[:-2], dynamics.shape[-1]
        given = [_stack(part, dim) for part in (dynamics, process_noise, initial_covariance)]
        count = len(given[0])
        blocks, upper, log_det = np.empty((count, 3, dim, dim)), np.empty((count, 1, dim, dim)), np.empty(count)
        initial_precision = np.empty((count, dim, dim))
        _dynamics_kernels.evaluate(*given, later, blocks, upper, log_det, initial_precision)
        # Copies: what is handed out may be changed in place, and the gradient needs it as it was.
        ctx.arrays = given[0].copy(), blocks[:, 2].copy(), initial_precision
        ctx.later = later
        return (
            torch.from_numpy(blocks).reshape(*batch, 3, dim, dim),
            torch.from_numpy(upper).reshape(*batch, 1, dim, dim),
            torch.from_numpy(log_det).reshape(batch),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_blocks: Tensor, grad_upper: Tensor, grad_log_det: Tensor):
        from pyrodyn.linalg import _dynamics_kernels

        count, dim, _ = ctx.arrays[0].shape
        batch = grad_log_det.shape
        weights = (
            np.ascontiguousarray(grad_blocks.reshape(count, 3, dim, dim).numpy(force=True)),
            np.ascontiguousarray(grad_upper.reshape(count, 1, dim, dim).numpy(force=True)),
            np.ascontiguousarray(grad_log_det.reshape(count).numpy(force=True)),
        )
        found = np.empty((3, count, dim, dim))
        _dynamics_kernels.differentiate(*ctx.arrays, ctx.later, *weights, found)
        return *(torch.from_numpy(part).reshape(*batch, dim, dim) for part in found), None


def _stack(matrices: Tensor, dim: int) -> np.ndarray:
    return np.ascontiguousarray(matrices.reshape(-1, dim, dim).numpy(force=True))
