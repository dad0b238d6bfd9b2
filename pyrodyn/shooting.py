r"""Initial states of flows without noise, given what was seen of their paths.

The path of a deterministic flow is a function of its first state. The mode of

.. math:: \log p(y \mid x(\cdot\,; x_1)) - |x_1|^2 / 2 s^2

is climbed by Gauss-Newton steps with a damping of its own for every draw and trial (Levenberg-Marquardt); the curvature
there makes the normal law of :math:`x_1`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodyn.linalg.matrix import cholesky
from pyrodyn.readouts import AffineReadout

STEP = 1e-5  # of the central differences in the first state, whose coordinates have unit size
MAX_STEPS = 50
FIRST_DAMPING = 1e-2  # of the curvature's trace
SMALL = 1e-6  # gain of the log density at which a climb has ended


class Shot(NamedTuple):
    """A normal law of first states.

    Attributes
    ----------
    mean : Tensor, (*draw, trial, latent)
    root : Tensor, (*draw, trial, latent, latent)
        Lower Cholesky factor of the precision.
    """

    mean: Tensor
    root: Tensor

    def sample(self) -> Tensor:
        """One draw, (*draw, trial, latent)."""
        noise = torch.randn_like(self.mean).unsqueeze(-1)
        return self.mean + torch.linalg.solve_triangular(self.root.mT, noise, upper=True).squeeze(-1)


def shoot(
    solve: Callable[[Tensor], Tensor],
    readout: Callable[[Tensor], AffineReadout],
    observations: Tensor,
    start: Tensor,
    initial_sd: float,
) -> Shot:
    """The law of the first states given observations.

    Parameters
    ----------
    solve : callable
        First states (*batch, trial, latent) to paths (*batch, trial, time, latent); batches broadcast.
    readout : callable
        Paths to their readout.
    observations : Tensor, (trial, time, unit)
    start : Tensor, (*draw, trial, latent)
    initial_sd : float
        s.
    """
    dim = start.shape[-1]
    eye = torch.eye(dim, dtype=start.dtype, device=start.device)

    def value(state: Tensor) -> Tensor:
        fit = readout(solve(state)).log_prob(observations)
        found = fit - 0.5 * state.square().sum(-1) / initial_sd**2
        return torch.where(torch.isfinite(found), found, -torch.inf)

    def expand(state: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and curvature, the second without what bends in the flow itself."""
        shifts = STEP * torch.cat([eye, -eye])
        ahead, behind = solve(state + shifts.reshape(2 * dim, *(1,) * (state.dim() - 1), dim)).chunk(2)
        slopes = ((ahead - behind) / (2.0 * STEP)).nan_to_num(0.0, 0.0, 0.0)  # (latent, *draw, trial, time, latent)
        seen = readout(solve(state))
        predictor = seen.predictor
        moved = slopes @ seen.loading.mT  # of the predictor
        score, curvature = seen.score(predictor, observations), seen.curvature(predictor, observations)
        slope = (moved * score).sum((-2, -1)).movedim(0, -1) - state / initial_sd**2
        normal = torch.einsum("i...tu,j...tu,...tu->...ij", moved, moved, curvature) + eye / initial_sd**2
        return slope, normal

    state, best = start, value(start)
    slope, normal = expand(state)
    damping = FIRST_DAMPING * normal.diagonal(dim1=-2, dim2=-1).mean(-1)
    open_ = torch.ones_like(best, dtype=torch.bool)
    for _ in range(MAX_STEPS):
        step = torch.linalg.solve(normal + damping[..., None, None] * eye, slope.unsqueeze(-1)).squeeze(-1)
        ahead = torch.where(open_.unsqueeze(-1), state + step, state)
        found = value(ahead)
        won = found > best
        gain = torch.where(won, found - best, 0.0)
        state, best = torch.where(won.unsqueeze(-1), ahead, state), torch.where(won, found, best)
        damping = torch.where(won, 0.2 * damping, 6.0 * damping)
        stuck = ~won & (damping > 1e8)
        open_ = open_ & ~(won & (gain < SMALL)) & ~stuck
        if not bool(open_.any()):
            break
        if bool(won.any()):
            slope, normal = expand(state)
    return Shot(state, cholesky(normal))
