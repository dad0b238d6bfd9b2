r"""The path of a stochastic differential equation on a grid of times, as one random variable."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrodyn.linalg.matrix import broadcast_shapes


class EulerMaruyama(TorchDistribution):
    r"""A path :math:`x_1 \sim N(0, s^2 I), \; x_{k+1} \sim N(x_k + f(x_k) \Delta_k, \; L L^\top \Delta_k)`.

    The scheme is of strong order one half in the step for noise that depends on the state, and of order one for the
    constant noise here (where it coincides with Milstein's).

    Parameters
    ----------
    drift : callable
        f: states (*batch, point, latent) to rates of the same shape.
    diffusion : Tensor, (*batch, latent, latent)
        L, lower triangular.
    steps : Tensor, (grid - 1)
        :math:`\Delta_k` in seconds.
    initial_sd : float
        s.

    Notes
    -----
    Event shape (grid, latent). The density needs the drift at all points at once; a draw needs it one after another,
    and is reparametrised.

    References
    ----------
    Kloeden & Platen, *Numerical Solution of Stochastic Differential Equations*, 1992, chapter 10.
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self, drift: Callable[[Tensor], Tensor], diffusion: Tensor, steps: Tensor, *, initial_sd: float = 1.0
    ) -> None:
        self.drift, self.diffusion, self.steps, self.initial_sd = drift, diffusion, steps, initial_sd
        super().__init__(diffusion.shape[:-2], torch.Size((len(steps) + 1, diffusion.shape[-1])), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of paths (*batch, grid, latent), (*batch)."""
        first = _log_standard(value[..., 0, :] / self.initial_sd).sum(-1) - value.shape[-1] * math.log(self.initial_sd)
        noise = self._noise(value)
        volume = self.diffusion.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1) * len(self.steps)
        scale = 0.5 * value.shape[-1] * self.steps.log().sum()
        return first + _log_standard(noise).sum((-2, -1)) - volume - scale

    def _noise(self, value: Tensor) -> Tensor:
        before = value[..., :-1, :]
        moved = value[..., 1:, :] - before - self.drift(before) * self.steps[:, None]
        kicks = torch.linalg.solve_triangular(self.diffusion, moved.mT, upper=False).mT
        return kicks / self.steps.sqrt()[:, None]

    def noise_of(self, path: Tensor) -> Tensor:
        """The noise that `transform` maps to ``path``."""
        return torch.cat([path[..., :1, :] / self.initial_sd, self._noise(path)], -2)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        shape = self._extended_shape(sample_shape)
        return self.transform(torch.randn(shape, dtype=self.diffusion.dtype, device=self.diffusion.device))

    def transform(self, noise: Tensor) -> Tensor:
        """Map iid standard normal ``noise`` (*sample, *batch, grid, latent) to paths."""
        kicks = noise[..., 1:, :] @ self.diffusion.mT * self.steps.sqrt()[:, None]
        state = self.initial_sd * noise[..., :1, :]
        path = [state]
        for step, kick in zip(self.steps, kicks.unbind(-2), strict=True):
            state = state + self.drift(state) * step + kick.unsqueeze(-2)
            path.append(state)
        return torch.cat(path, -2)

    def expand(self, batch_shape, _instance=None) -> EulerMaruyama:
        expanded = copy.copy(self)
        expanded._batch_shape = broadcast_shapes(self.batch_shape, torch.Size(batch_shape))
        return expanded


def _log_standard(noise: Tensor) -> Tensor:
    return -0.5 * noise.square() - 0.5 * math.log(2.0 * math.pi)
