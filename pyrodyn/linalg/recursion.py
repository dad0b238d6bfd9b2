r"""A linear system run forwards, with some latents held at zero: paths from given shocks, and moments.

.. math:: x_t = G_t (A x_{t-1} + u_t), \qquad G_t = \mathrm{diag}(1 - \mathrm{held}_t), \qquad x_0 = 0 .

A chain whose noise is singular, as that of a latent that is held, has no precision for `pyrodyn.linalg.chain`. So these
are loops over bins, compiled, and on the CPU; nothing differentiates them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyrodyn.linalg.matrix import broadcast_shapes


def follow(dynamics: Tensor, shocks: Tensor, held: Tensor) -> Tensor:
    """Paths (*batch, trial, time, latent).

    Parameters
    ----------
    dynamics : Tensor, (*batch, latent, latent)
    shocks : Tensor, (*batch, trial, time, latent)
        :math:`u_t`: what arrives from outside, the first bin's own state included.
    held : Tensor of bool, (time, latent)
    """
    from pyrodyn.linalg import _recursion_kernels

    batch = broadcast_shapes(dynamics.shape[:-2], shocks.shape[:-3])
    matrices = _stacked(dynamics.expand(*batch, *dynamics.shape[-2:]), 2)
    given = _stacked(shocks.expand(*batch, *shocks.shape[-3:]), 3)
    found = np.zeros_like(given)
    _recursion_kernels.follow(matrices, given, held.numpy(force=True), found)
    return torch.from_numpy(found).reshape(*batch, *shocks.shape[-3:])


def spread(dynamics: Tensor, noise: Tensor, initial_covariance: Tensor, held: Tensor) -> Tensor:
    r"""Covariances (*batch, time, latent, latent) of the state in every bin, where shocks have covariance Q.

    .. math:: P_1 = G_1 \Sigma_1 G_1, \qquad P_t = G_t (A P_{t-1} A^\top + Q) G_t .

    Parameters
    ----------
    dynamics, noise, initial_covariance : Tensor, (*batch, latent, latent)
    held : Tensor of bool, (time, latent)
    """
    from pyrodyn.linalg import _recursion_kernels

    parts = dynamics, noise, initial_covariance
    batch = broadcast_shapes(*(part.shape[:-2] for part in parts))
    given = [_stacked(part.expand(*batch, *part.shape[-2:]), 2) for part in parts]
    found = np.zeros((len(given[0]), *held.shape, held.shape[-1]))
    _recursion_kernels.spread(*given, held.numpy(force=True), found)
    return torch.from_numpy(found).reshape(*batch, *found.shape[1:])


def _stacked(values: Tensor, event_dim: int) -> np.ndarray:
    return np.ascontiguousarray(values.reshape(-1, *values.shape[-event_dim:]).numpy(force=True), dtype=np.float64)
