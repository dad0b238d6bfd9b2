"""Normal laws on an affine subspace, for arrays of which a linear part is held."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Normal, Transform, biject_to, constraints, transform_to
from torch.distributions.constraints import Constraint

from pyrodyn.linalg.matrix import broadcast_shapes

CLOSE = 1e-6  # of a value to the subspace, in units of the largest entry


class _SubspaceConstraint(Constraint):
    """Arrays (unit, *rest) that are ``origin`` plus a combination of the columns of ``basis`` (unit, free)."""

    is_discrete = False

    def __init__(self, origin: Tensor, basis: Tensor, inverse: Tensor) -> None:
        self.origin, self.basis, self.inverse = origin, basis, inverse
        self.event_dim = origin.dim()

    def check(self, value: Tensor) -> Tensor:
        back = biject_to(self)(biject_to(self).inv(value))
        far = (back - value).abs().flatten(-self.event_dim).amax(-1)
        return far <= CLOSE * value.abs().flatten(-self.event_dim).amax(-1).clamp(min=1.0)


class _Span(Transform):
    """Coordinates (free, *rest) <-> arrays (unit, *rest); volumes are measured in the coordinates."""

    bijective = True

    def __init__(self, target: _SubspaceConstraint, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.target = target
        self.domain = constraints.independent(constraints.real, target.event_dim)
        self.codomain = target

    def with_cache(self, cache_size: int = 1) -> _Span:
        return _Span(self.target, cache_size=cache_size)

    def _call(self, x: Tensor) -> Tensor:
        return self.target.origin + self._times(self.target.basis, x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._times(self.target.inverse, y - self.target.origin)

    def _times(self, matrix: Tensor, array: Tensor) -> Tensor:
        return array @ matrix.mT if self.target.event_dim == 1 else matrix @ array

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[: x.dim() - self.target.event_dim])

    def forward_shape(self, shape):
        return self._with_rows(shape, len(self.target.basis))

    def inverse_shape(self, shape):
        return self._with_rows(shape, len(self.target.inverse))

    def _with_rows(self, shape, rows: int) -> torch.Size:
        lead = len(shape) - self.target.event_dim
        return torch.Size((*shape[:lead], rows, *shape[lead + 1 :]))


@biject_to.register(_SubspaceConstraint)
@transform_to.register(_SubspaceConstraint)
def _span(constraint: _SubspaceConstraint) -> _Span:
    return _Span(constraint)


class SubspaceNormal(TorchDistribution):
    r"""The law of :math:`a + B z`, with iid normal entries of z.

    Parameters
    ----------
    origin : Tensor, (unit) or (unit, latent)
        a.
    basis : Tensor, (unit, free)
        B.
    inverse : Tensor, (free, unit)
        :math:`B^+`, with :math:`B^+ B = I`: what of a value is free.
    sd : float
        Of the entries of z.

    Notes
    -----
    Event shape that of ``origin``. The density is that of z.
    """

    arg_constraints = {}
    has_rsample = True

    def __init__(self, origin: Tensor, basis: Tensor, inverse: Tensor, sd: float, batch_shape=()) -> None:
        self._constraint = _SubspaceConstraint(origin, basis, inverse)
        self.sd = sd
        super().__init__(torch.Size(batch_shape), origin.shape, validate_args=False)

    @property
    def support(self) -> Constraint:
        return self._constraint

    def expand(self, batch_shape, _instance=None) -> SubspaceNormal:
        held = self._constraint
        batch = broadcast_shapes(self.batch_shape, torch.Size(batch_shape))
        return SubspaceNormal(held.origin, held.basis, held.inverse, self.sd, batch)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        to_value: Any = _span(self._constraint)
        origin = self._constraint.origin
        shape = to_value.inverse_shape(self._extended_shape(sample_shape))
        return to_value(self.sd * torch.randn(shape, dtype=origin.dtype, device=origin.device))

    def log_prob(self, value: Tensor) -> Tensor:
        free: Any = _span(self._constraint).inv(value)
        return Normal(0.0, self.sd).log_prob(free).flatten(-self._constraint.event_dim).sum(-1)
