r"""A loading matrix in a gauge that fixes the rotation of the latent space.

A latent path seen through :math:`C x` is the same data as :math:`(C O)(O^\top x)` for any rotation O. Requiring that
the rows of d chosen *pivot* units form a lower triangular matrix with a positive diagonal leaves one member of each
family. If the entries of C are iid N(0, 1), then by Bartlett's decomposition the gauged matrix has iid N(0, 1) entries
below and outside the pivot rows and :math:`\chi_{d-i+1}` on the diagonal, whichever pivots are taken: the prior on
anything that a rotation leaves alone does not depend on the choice.

Reference: Bartlett, Proc. R. Soc. Edinb. 53:260 (1933); gauge after Geweke & Zhou, Rev. Financ. Stud. 9:557 (1996).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to
from torch.distributions.constraints import Constraint


class _GaugedConstraint(Constraint):
    """(unit, latent) matrices whose pivot rows are lower triangular with a positive diagonal."""

    is_discrete = False
    event_dim = 2

    def __init__(self, pivots: tuple[int, ...], num_units: int) -> None:
        self.pivots, self.num_units = pivots, num_units

    def check(self, value: Tensor) -> Tensor:
        rows = value[..., list(self.pivots), :]
        width = rows.shape[-1]
        above = rows[..., :width, :].triu(1)
        positive = rows.diagonal(dim1=-2, dim2=-1) > 0
        return (above == 0).all(-1).all(-1) & positive.all(-1)


class _FillLoading(Transform):
    """Unconstrained vector <-> gauged matrix; logarithms on the diagonal, zeros above it."""

    domain = constraints.real_vector
    bijective = True

    def __init__(self, constraint: _GaugedConstraint, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.codomain, self.target = constraint, constraint
        dim = len(constraint.pivots)
        self.shape = torch.Size((constraint.num_units, dim))
        self._free, self._diagonal = _layout(constraint.pivots, constraint.num_units)

    def with_cache(self, cache_size: int = 1) -> _FillLoading:
        return _FillLoading(self.target, cache_size=cache_size)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _FillLoading)
            and other.target.pivots == self.target.pivots
            and other.target.num_units == self.target.num_units
        )

    def _call(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., : len(self._diagonal)].exp(), x[..., len(self._diagonal) :]], -1)
        index = torch.cat([self._diagonal, self._free]).to(x.device)
        flat = torch.zeros(x.shape[:-1] + (self.shape.numel(),), dtype=x.dtype, device=x.device)
        return flat.index_copy(-1, index, x).reshape(x.shape[:-1] + self.shape)

    def _inverse(self, y: Tensor) -> Tensor:
        flat = y.flatten(-2)
        return torch.cat([flat[..., self._diagonal.to(y.device)].log(), flat[..., self._free.to(y.device)]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., : len(self._diagonal)].sum(-1)

    def forward_shape(self, shape):
        return shape[:-1] + self.shape

    def inverse_shape(self, shape):
        return shape[:-2] + torch.Size((len(self._diagonal) + len(self._free),))


@lru_cache(maxsize=64)
def _layout(pivots: tuple[int, ...], num_units: int) -> tuple[Tensor, Tensor]:
    """Positions in the flattened matrix: free entries, and the diagonal of the pivot rows."""
    dim = len(pivots)
    free = torch.ones(num_units, dim, dtype=torch.bool)
    for i, unit in enumerate(pivots):
        free[unit, i:] = False
    diagonal = torch.tensor([unit * dim + i for i, unit in enumerate(pivots)])
    return free.flatten().nonzero().squeeze(-1), diagonal


@biject_to.register(_GaugedConstraint)
@transform_to.register(_GaugedConstraint)
def _fill(constraint: _GaugedConstraint) -> _FillLoading:
    return _FillLoading(constraint)


class GaugedLoading(TorchDistribution):
    r"""The law of an iid N(0, 1) loading matrix (unit, latent) after its rotation is fixed.

    Parameters
    ----------
    num_units, latent_dim : int
    pivots : sequence of int
        One distinct unit for each latent; row ``pivots[i]`` is zero right of column i and positive in it. There may be
        fewer pivots than latents only where there are fewer units than latents.
    degrees : float, optional
        Of freedom of the first pivot's diagonal entry, ``latent_dim`` by default. With as many units as latents, L L'
        is then Wishart with these degrees of freedom and the identity as scale.

    Notes
    -----
    Event shape (unit, latent). With more latents than units the last columns carry no loading and stay zero.
    """

    arg_constraints = {}
    has_rsample = False

    def __init__(
        self,
        num_units: int,
        latent_dim: int,
        pivots: tuple[int, ...],
        batch_shape=(),
        degrees: float | None = None,
        validate_args=None,
    ):
        if len(pivots) != latent_dim or len(set(pivots)) != latent_dim or not all(0 <= p < num_units for p in pivots):
            raise ValueError(
                f"pivots must be {latent_dim} distinct units (one for each latent) among {num_units}, got {pivots}"
            )
        self.num_units, self.latent_dim, self.pivots = num_units, latent_dim, tuple(int(p) for p in pivots)
        self.degrees = float(latent_dim if degrees is None else degrees)
        if not self.degrees > latent_dim - 1:
            raise ValueError(f"degrees must be more than latent_dim - 1 = {latent_dim - 1}, got {degrees!r}")
        self._constraint = _GaugedConstraint(self.pivots, num_units)
        super().__init__(torch.Size(batch_shape), torch.Size((num_units, latent_dim)), validate_args=False)

    @property
    def support(self) -> Constraint:
        return self._constraint

    def expand(self, batch_shape, _instance=None) -> GaugedLoading:
        return GaugedLoading(self.num_units, self.latent_dim, self.pivots, batch_shape, self.degrees)

    @property
    def _degrees(self) -> Tensor:
        return self.degrees - torch.arange(self.latent_dim, dtype=torch.float64)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        shape = torch.Size(sample_shape) + self.batch_shape
        free, diagonal = _layout(self.pivots, self.num_units)
        flat = torch.zeros(*shape, self.num_units * self.latent_dim, dtype=torch.float64)
        flat[..., free] = torch.randn(*shape, len(free), dtype=torch.float64)
        chi_squared = torch.distributions.Chi2(self._degrees).sample(shape)
        flat[..., diagonal] = chi_squared.sqrt()
        return flat.reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        free, diagonal = _layout(self.pivots, self.num_units)
        flat = value.flatten(-2)
        free, diagonal, degrees = free.to(value.device), diagonal.to(value.device), self._degrees.to(value.device)
        normal = -0.5 * flat[..., free].square().sum(-1) - 0.5 * len(free) * math.log(2.0 * math.pi)
        roots = flat[..., diagonal]
        chi = (degrees - 1.0) * roots.log() - 0.5 * roots.square()
        constant = (0.5 * degrees - 1.0) * math.log(2.0) + torch.lgamma(0.5 * degrees)
        return normal + (chi - constant).sum(-1)


def gauge_fix(loading: Tensor, pivots: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rotate ``loading`` (*batch, unit, latent) into the gauge; returns it and the rotation O, ``loading @ O``."""
    rows = loading[..., list(pivots), :]
    basis, triangle = torch.linalg.qr(rows.mT)
    rotation = basis * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    turned = loading @ rotation
    exact = turned.clone()
    for i, unit in enumerate(pivots):  # what rounding left above the diagonal
        exact[..., unit, i + 1 :] = 0.0
    return exact, rotation
