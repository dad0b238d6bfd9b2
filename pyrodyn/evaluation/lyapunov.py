r"""How fast nearby states part."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodyn.integrators import rk4_step
from pyrodyn.linalg.slopes import expanded


class Lyapunov(NamedTuple):
    """Lyapunov exponents.

    Attributes
    ----------
    exponents : Tensor, (*draw, latent)
        Largest first, per unit of time (per bin for a map); means over the starts.
    standard_error : Tensor, (*draw, latent)
        Over the starts, NaN for one.
    """

    exponents: Tensor
    standard_error: Tensor


def lyapunov_exponents(
    flow: Callable[[Tensor], Tensor],
    starts: Tensor,
    *,
    duration: float,
    step: float = 0.01,
    settle: float = 0.0,
    discrete: bool = False,
) -> Lyapunov:
    r"""All Lyapunov exponents along trajectories of a flow or a map.

    A frame of tangent vectors is carried along and made orthonormal again after every step,
    :math:`D\phi(x)\, Q_k = Q_{k+1} R_{k+1}`; the exponents are the means of :math:`\log |\mathrm{diag} R|`.

    Parameters
    ----------
    flow : callable
        Takes and returns (*draw, start, latent), each start by itself; differentiable by autograd.
    starts : Tensor, (*draw, start, latent)
    duration, settle : float
        Time over which the exponents are averaged, and time before it in which the frame finds its directions; in bins
        for a map.
    step : float
        Of the fourth-order Runge-Kutta scheme.
    discrete : bool
        Whether ``flow`` is a map from bin to bin.

    References
    ----------
    Benettin et al., Meccanica 15:9 (1980).
    """

    def ahead(state: Tensor) -> Tensor:
        return flow(state) if discrete else rk4_step(flow, state, step)

    pace = 1.0 if discrete else step
    waits, counted = round(settle / pace), max(1, round(duration / pace))
    dim = starts.shape[-1]
    state = starts.detach()
    frame = torch.eye(dim, dtype=state.dtype).expand(*state.shape[:-1], dim, dim)  # columns are tangents
    total = torch.zeros_like(state)
    for k in range(waits + counted):
        state, slope = expanded(ahead, state)
        frame, stretch = torch.linalg.qr(slope @ frame)
        if k >= waits:
            total = total + stretch.diagonal(dim1=-2, dim2=-1).abs().log()
    rates = total / (counted * pace)
    number = rates.shape[-2]
    error = rates.std(-2) / number**0.5 if number > 1 else torch.full_like(rates[..., 0, :], torch.nan)
    return Lyapunov(rates.mean(-2), error)
