r"""A Gaussian trajectory with Markov structure, held by its natural parameters.

.. math:: p(x_{1:T}) = \exp\!\big(-\tfrac12 x^\top J x + h^\top x - \log Z(J, h)\big),

with J block-tridiagonal. Products of such densities with Gaussian potentials add parameters, so conditioning, smoothing
and structured guides are additions, and their cost is one call of the chain kernel.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrodyn.errors import PrecisionError
from pyrodyn.linalg.chain import (
    ChainFactor,
    as_columns,
    factorise,
    from_columns,
    log_normaliser,
    spread_blocks,
    steady_log_normaliser,
)
from pyrodyn.linalg.dynamics import dynamics_blocks
from pyrodyn.linalg.matrix import broadcast_shapes, of_all_trials, precision_of

if TYPE_CHECKING:
    from pyrodyn.linalg.compiled import CompiledFactor


Value = TypeVar("Value")


class _kept(Generic[Value]):
    """A property computed once, but never kept without its graph where gradients may be asked for later."""

    def __init__(self, compute: Callable[[GaussMarkov], Value]) -> None:
        self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, instance: GaussMarkov, owner: type) -> Value:
        if instance is None:
            return self  # type: ignore[return-value]
        if self.name in instance.__dict__:
            return instance.__dict__[self.name]
        value = self.compute(instance)
        if torch.is_grad_enabled() or not instance._has_graph():
            instance.__dict__[self.name] = value
        return value


_HELD = ("diagonal", "upper", "_steady")


class GaussMarkov(TorchDistribution):
    r"""A whole latent trajectory as one random variable.

    Parameters
    ----------
    diagonal : Tensor, (*batch, time, latent, latent)
        Blocks :math:`J_{t,t}` of the precision.
    upper : Tensor, (*batch, time - 1, latent, latent)
        Blocks :math:`J_{t,t+1}`.
    linear : Tensor, (*batch, time, latent)
        :math:`h`. Batches broadcast; a precision of batch size one is factorised once for all.
    normaliser : Tensor, (*batch), optional
        :math:`\log Z` where it is known in closed form.

    Raises
    ------
    PrecisionError
        Where the blocks are not float64.

    Notes
    -----
    Event shape (time, latent). Sampling is reparametrised; every quantity is differentiable.
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self, diagonal: Tensor, upper: Tensor, linear: Tensor, *, normaliser: Tensor | None = None, validate_args=None
    ) -> None:
        if diagonal.dim() < 3 or diagonal.shape[-1] != diagonal.shape[-2]:
            raise ValueError(f"diagonal must be (*batch, time, latent, latent), got {tuple(diagonal.shape)}")
        time, latent = diagonal.shape[-3], diagonal.shape[-1]
        if upper.shape[-3:] != (time - 1, latent, latent):
            raise ValueError(
                f"upper must be (*batch, time - 1, latent, latent) = (..., {time - 1}, {latent}, {latent}) beside "
                f"diagonal {tuple(diagonal.shape)}, got {tuple(upper.shape)}"
            )
        if linear.shape[-2:] != (time, latent):
            raise ValueError(
                f"linear must be (*batch, time, latent) = (..., {time}, {latent}), got {tuple(linear.shape)}"
            )
        if not diagonal.dtype == upper.dtype == linear.dtype == torch.float64:
            raise PrecisionError(
                f"diagonal, upper and linear must be float64, got {diagonal.dtype}, {upper.dtype} and {linear.dtype}: "
                "blocks of a precision that were rounded to fewer digits can be wrong in the first digit of a density; "
                "build them in float64, or use GaussMarkov.from_dynamics, which does so"
            )
        self.__dict__ |= {"diagonal": diagonal, "upper": upper}
        self._steady: tuple[Tensor, Tensor] | None = None
        self._describe(linear, normaliser, broadcast_shapes(diagonal.shape[:-3], upper.shape[:-3]))

    def _describe(self, linear: Tensor, normaliser: Tensor | None, batch: torch.Size) -> None:
        self.linear, self._known_normaliser = linear, normaliser
        batch = broadcast_shapes(batch, linear.shape[:-2])
        super().__init__(batch, linear.shape[-2:], validate_args=False)

    @classmethod
    def _of_blocks(cls, blocks: Tensor, upper: Tensor, linear: Tensor, normaliser: Tensor | None = None) -> GaussMarkov:
        """A chain that is the same in every bin but the first and the last; see `steady_log_normaliser`."""
        chain = cls.__new__(cls)
        chain._steady = blocks, upper
        chain._describe(linear, normaliser, broadcast_shapes(blocks.shape[:-3], upper.shape[:-3]))
        return chain

    @classmethod
    def from_dynamics(
        cls,
        dynamics: Tensor,
        process_noise: Tensor,
        *,
        num_bins: int,
        initial_covariance: Tensor,
        initial_mean: Tensor | None = None,
        drift: Tensor | None = None,
    ) -> GaussMarkov:
        r"""The path of :math:`x_1 \sim N(\mu_1, \Sigma_1),\ x_t = A x_{t-1} + b_t + \epsilon_t,\ \epsilon_t \sim N(0,
        Q)`.

        Parameters
        ----------
        dynamics : Tensor, (*batch, latent, latent)
            A, acting on column vectors.
        process_noise : Tensor, (*batch, latent, latent)
            Q, a covariance.
        num_bins : int
        initial_covariance : Tensor, (*batch, latent, latent)
            Covariance of the state in the first bin, the one that is read out first.
        initial_mean : Tensor, (*batch, latent), optional
            Zero by default.
        drift : Tensor, (*batch, time - 1, latent), optional
            :math:`b_t` for t = 2 ... T.

        All are brought to float64 before anything is computed.
        """
        dynamics, process_noise, initial_covariance = (
            part.to(torch.float64) for part in (dynamics, process_noise, initial_covariance)
        )
        drift = None if drift is None else drift.to(torch.float64)
        initial_mean = None if initial_mean is None else initial_mean.to(torch.float64)
        dim = dynamics.shape[-1]
        later = num_bins - 1
        blocks, upper, normaliser = dynamics_blocks(dynamics, process_noise, initial_covariance, num_bins)
        linear = blocks.new_zeros(num_bins, dim)
        if drift is not None:
            pulled = of_all_trials(drift, blocks[..., 2, :, :])  # the block is symmetric
            normaliser = normaliser + 0.5 * (pulled * drift).sum((-2, -1))
            back = of_all_trials(drift, upper.squeeze(-3).mT)
            none = torch.zeros_like(pulled[..., :1, :]) if later else drift.new_zeros(*drift.shape[:-2], 1, dim)
            linear = torch.cat([none, pulled], -2) + torch.cat([back, none], -2)
        if initial_mean is not None:
            first = (precision_of(initial_covariance)[0] @ initial_mean.unsqueeze(-1)).squeeze(-1)
            normaliser = normaliser + 0.5 * (first * initial_mean).sum(-1)
            rest = first.new_zeros(*first.shape[:-1], later, dim)
            linear = linear + torch.cat([first.unsqueeze(-2), rest], -2)
        return cls._of_blocks(blocks, upper, linear, normaliser)

    def _has_graph(self) -> bool:
        held = (self.linear, *(self._steady or (self.diagonal, self.upper)))
        return any(part.requires_grad for part in held)

    @_kept
    def diagonal(self) -> Tensor:
        """Blocks of the precision (*batch, time, latent, latent)."""
        assert self._steady is not None  # or it would stand in __dict__
        return spread_blocks(*self._steady, self.event_shape[0])[0]

    @_kept
    def upper(self) -> Tensor:
        """Blocks above the diagonal (*batch, time - 1, latent, latent)."""
        assert self._steady is not None
        return spread_blocks(*self._steady, self.event_shape[0])[1]

    @_kept
    def log_normaliser(self) -> Tensor:
        r""":math:`\log Z`, shape (*batch)."""
        if self._known_normaliser is not None:
            return self._known_normaliser.expand(self.batch_shape)
        if self._steady is not None:
            return steady_log_normaliser(*self._steady, self.linear).expand(self.batch_shape)
        return log_normaliser(self.diagonal, self.upper, self.linear).expand(self.batch_shape)

    @_kept
    def _factor(self) -> ChainFactor | CompiledFactor:
        diagonal, upper, _, _ = as_columns(self.diagonal, self.upper, self.linear)
        return factorise(diagonal, upper)

    @_kept
    def mean(self) -> Tensor:
        """Means (*batch, time, latent)."""
        return self._solve(self.linear)

    def _solve(self, linear: Tensor) -> Tensor:
        *_, columns, layout = as_columns(self.diagonal, self.upper, linear)
        batch = broadcast_shapes(self.batch_shape, linear.shape[:-2])
        return from_columns(self._factor.solve(columns), layout).expand(batch + self.event_shape)

    @_kept
    def _marginals(self) -> tuple[Tensor, Tensor]:
        covariance, cross = self._factor.marginals()
        lead = broadcast_shapes(self.diagonal.shape[:-3], self.upper.shape[:-3])
        lead = (1,) * (len(self.batch_shape) - len(lead)) + tuple(lead)
        covariance = covariance.reshape(lead + covariance.shape[-3:])
        cross = cross.reshape(lead + cross.shape[-3:])
        return (
            covariance.expand(self.batch_shape + covariance.shape[-3:]),
            cross.expand(self.batch_shape + cross.shape[-3:]),
        )

    @property
    def covariance(self) -> Tensor:
        """Marginal covariances (*batch, time, latent, latent)."""
        return self._marginals[0]

    @property
    def cross_covariance(self) -> Tensor:
        """Cov(x_t, x_t+1), (*batch, time - 1, latent, latent)."""
        return self._marginals[1]

    @property
    def variance(self) -> Tensor:
        """Marginal variances (*batch, time, latent)."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of paths (*batch, time, latent), all bins at once."""
        return self.log_potential(value) - self.log_normaliser

    def log_potential(self, value: Tensor) -> Tensor:
        """The unnormalised log density ``-x' J x / 2 + h' x`` of paths (*batch, time, latent)."""
        quadratic = (value * (self.linear - 0.5 * self._own(value))).sum((-2, -1))
        return quadratic - (value[..., :-1, :] * self._ahead(value)).sum((-2, -1))

    def force(self, value: Tensor) -> Tensor:
        """Gradient of `log_potential`: ``h - J x``, (*batch, time, latent)."""
        if self._steady is not None:
            behind = value[..., :-1, :] @ self._steady[1].squeeze(-3)
        else:
            behind = (self.upper.mT @ value[..., :-1, :].unsqueeze(-1)).squeeze(-1)
        pull, ahead = self._own(value), self._ahead(value)
        zeros = torch.zeros_like(pull[..., :1, :])
        return self.linear - pull - torch.cat([ahead, zeros], -2) - torch.cat([zeros, behind], -2)

    def _own(self, value: Tensor) -> Tensor:
        """``J_tt x_t`` in every bin; where the blocks are the same, all bins in one product."""
        if self._steady is None or self.event_shape[0] == 1:
            return (self.diagonal @ value.unsqueeze(-1)).squeeze(-1)
        first, middle, last = self._steady[0].mT.unbind(-3)
        between = value[..., 1:-1, :] @ middle
        return torch.cat([value[..., :1, :] @ first, between, value[..., -1:, :] @ last], -2)

    def _ahead(self, value: Tensor) -> Tensor:
        """``J_t,t+1 x_t+1`` in every bin but the last."""
        if self._steady is None:
            return (self.upper @ value[..., 1:, :].unsqueeze(-1)).squeeze(-1)
        return value[..., 1:, :] @ self._steady[1].squeeze(-3).mT

    @property
    def shares_precision(self) -> bool:
        """Whether all trials, the last batch dimension, have one precision."""
        held = self._steady or (self.diagonal, self.upper)
        return all(part.dim() == 3 or part.shape[-4] == 1 for part in held)

    def of_trials(self, trials: Tensor) -> GaussMarkov:
        """The chains of some trials, where these share a precision and differ in the linear part."""
        linear = self.linear[..., trials, :, :]
        if self._steady is not None:
            return GaussMarkov._of_blocks(*self._steady, linear)
        return GaussMarkov(self.diagonal, self.upper, linear)

    def detach(self) -> GaussMarkov:
        """The same chain, cut off from what it was made from."""
        if self._steady is not None:
            blocks, upper = self._steady
            return GaussMarkov._of_blocks(blocks.detach(), upper.detach(), self.linear.detach())
        return GaussMarkov(self.diagonal.detach(), self.upper.detach(), self.linear.detach())

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        shape = self._extended_shape(sample_shape)
        return self.transform(torch.randn(shape, dtype=self.linear.dtype, device=self.linear.device))

    def transform(self, noise: Tensor) -> Tensor:
        """Map iid standard normal ``noise`` (*sample, *batch, time, latent) to paths; the inverse of whitening."""
        wide = GaussMarkov(self.diagonal, self.upper, noise)
        *_, columns, layout = as_columns(wide.diagonal, wide.upper, noise)
        return self.mean + from_columns(self._factor.colour(columns), layout)

    def whiten(self, path: Tensor) -> Tensor:
        """The noise that `transform` maps to ``path``."""
        wide = GaussMarkov(self.diagonal, self.upper, path)
        *_, columns, layout = as_columns(wide.diagonal, wide.upper, path - self.mean)
        return from_columns(self._factor.uncolour(columns), layout)

    def draw(self, noise: Tensor) -> Tensor:
        """Map iid standard normal ``noise`` (*batch, time, latent) to a path, fast and without gradients.

        By another square root than `transform`'s; `noise_of` is the inverse.
        """
        return self.mean + self._through(self._factor.draw, noise)

    def noise_of(self, path: Tensor) -> Tensor:
        """The noise that `draw` maps to ``path``."""
        return self._through(self._factor.noise_of, path - self.mean)

    def _through(self, change: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        *_, columns, layout = as_columns(self.diagonal, self.upper, values)
        return from_columns(change(columns), layout)

    @property
    def log_whitening_jacobian(self) -> Tensor:
        """``log |dx / dnoise|`` of `transform`, (*batch)."""
        lead = broadcast_shapes(self.diagonal.shape[:-3], self.upper.shape[:-3])
        return (-0.5 * self._factor.log_det).reshape(lead).expand(self.batch_shape)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, (*batch)."""
        size = self.event_shape.numel()
        return 0.5 * size * (1.0 + math.log(2.0 * math.pi)) + self.log_whitening_jacobian

    def condition(self, precision: Tensor, linear: Tensor, mask: Tensor | None = None) -> GaussMarkov:
        r"""Multiply by potentials :math:`\exp(-\tfrac12 x_t^\top P_t x_t + g_t^\top x_t)` and renormalise.

        Parameters
        ----------
        precision : Tensor, (*batch, time, latent, latent)
            :math:`P_t`; a time axis of size one is shared by all bins.
        linear : Tensor, (*batch, time, latent)
            :math:`g_t`.
        mask : Tensor, (*batch, time), optional
            True where there is a potential; values elsewhere are ignored, NaN included.
        """
        if mask is not None:
            precision = torch.where(mask[..., None, None], precision, 0.0)
            linear = torch.where(mask[..., None], linear, 0.0)
        if self._steady is not None and precision.shape[-3] == 1:
            blocks, upper = self._steady
            return GaussMarkov._of_blocks(blocks + precision, upper, self.linear + linear)
        return GaussMarkov(self.diagonal + precision, self.upper, self.linear + linear)

    def expand(self, batch_shape, _instance=None) -> GaussMarkov:
        batch_shape = torch.Size(batch_shape)
        # Only the linear part is expanded: the precision goes on being shared.
        expanded = copy.copy(self)
        expanded.__dict__ = {name: value for name, value in self.__dict__.items() if name in _HELD}
        expanded._describe(self.linear.expand(batch_shape + self.event_shape), self._known_normaliser, self.batch_shape)
        if "_factor" in self.__dict__ and self.linear.dim() == expanded.linear.dim():
            expanded.__dict__["_factor"] = self._factor
        return expanded
