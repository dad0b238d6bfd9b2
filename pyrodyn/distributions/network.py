r"""The dynamics of coupled regions as one random variable: which edges are there, how strong, and all of it stable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to
from torch.distributions.constraints import Constraint

from pyrodyn.errors import ModelError
from pyrodyn.linalg.stationary import spectral_radius
from pyrodyn.linalg.taming import growth, log_slope, shrinkage

SHARPNESS = 200  # the prior falls by 13% at a spectral radius of .99 and by 82% at .999
LEVEL_PERSISTENCE = 0.9999  # of the level of a trial, which hardly moves within it
TRIES = 4000  # rounds of rejection before giving up


@dataclass(frozen=True)
class NetworkLayout:
    """How the free entries of the dynamics of coupled regions stand in one vector.

    The state holds the latents of every region, then the global ones, then, if there is one, the level of the trial.
    The vector holds for each target region its own block, the blocks of its edges, and the block of what is common to
    all regions; and last the persistence of each global latent.

    Parameters
    ----------
    dims : tuple of int
        Latents of each region.
    num_globals : int
    level : bool
    edges : tuple of (int, int)
        Edges (target, source) that may exist.
    """

    dims: tuple[int, ...]
    num_globals: int
    level: bool
    edges: tuple[tuple[int, int], ...]

    @property
    def num_regions(self) -> int:
        return len(self.dims)

    @cached_property
    def regional(self) -> int:
        """Number of latents that belong to a region."""
        return sum(self.dims)

    @cached_property
    def size(self) -> int:
        """Number of latents of the whole state."""
        return self.regional + self.num_globals + self.level

    @cached_property
    def places(self) -> tuple[slice, ...]:
        """Where each region's latents stand in the state."""
        ends = torch.tensor((0, *self.dims)).cumsum(0).tolist()
        return tuple(slice(a, b) for a, b in pairwise(ends))

    @cached_property
    def common(self) -> slice:
        """Where the latents that enter all regions stand."""
        return slice(self.regional, self.size)

    @cached_property
    def origins(self) -> tuple[slice, ...]:
        """Where the latents of every origin of noise stand: the regions, all global latents, the level."""
        ends = (self.regional, self.regional + self.num_globals, self.size)
        return (*self.places, *(slice(a, b) for a, b in pairwise(ends) if a < b))

    @cached_property
    def group(self) -> Tensor:
        """The region of every latent, (latent,); -1 for the global ones, -2 for the level."""
        names = [torch.full((dim,), r) for r, dim in enumerate(self.dims)]
        return torch.cat([*names, torch.full((self.num_globals,), -1), torch.full((int(self.level),), -2)])

    @cached_property
    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and edge of every entry of the vector; edge -1 where an entry is always there."""
        rows, columns, edges = [], [], []
        number = {edge: i for i, edge in enumerate(self.edges)}

        def block(target: slice, source: slice, edge: int) -> None:
            for i in range(target.start, target.stop):
                for j in range(source.start, source.stop):
                    rows.append(i)
                    columns.append(j)
                    edges.append(edge)

        for target, place in enumerate(self.places):
            block(place, place, -1)
            for source in range(self.num_regions):
                if (target, source) in number:
                    block(place, self.places[source], number[target, source])
            block(place, self.common, -1)
        for i in range(self.regional, self.regional + self.num_globals):
            block(slice(i, i + 1), slice(i, i + 1), -1)
        return torch.tensor(rows), torch.tensor(columns), torch.tensor(edges)

    @property
    def rows(self) -> Tensor:
        return self._entries[0]

    @property
    def columns(self) -> Tensor:
        return self._entries[1]

    @property
    def edge(self) -> Tensor:
        return self._entries[2]

    @cached_property
    def coupled(self) -> Tensor:
        """Which entries couple latents of regions, (entry,)."""
        return (self.rows < self.regional) & (self.columns < self.regional)

    @cached_property
    def slow(self) -> Tensor:
        """Which entries are the persistence of a global latent, (entry,)."""
        return self.rows >= self.regional

    def matrix(self, vector: Tensor) -> Tensor:
        """The dynamics (*batch, latent, latent) that a vector (*batch, entry) stands for."""
        flat = vector.new_zeros(*vector.shape[:-1], self.size**2)
        where = (self.rows * self.size + self.columns).to(vector.device)
        flat = flat.index_copy(-1, where, vector)
        if self.level:
            last = torch.full_like(flat[..., -1:], LEVEL_PERSISTENCE)
            flat = torch.cat([flat[..., :-1], last], -1)
        return flat.unflatten(-1, (self.size, self.size))

    def vector(self, matrix: Tensor) -> Tensor:
        """The vector (*batch, entry) of the dynamics (*batch, latent, latent)."""
        return matrix[..., self.rows, self.columns]

    def presence(self, matrix: Tensor) -> Tensor:
        """Which blocks of the dynamics are not zero, (*batch, target, source)."""
        rows = [[(matrix[..., t, s] != 0.0).any(-1).any(-1) for s in self.places] for t in self.places]
        return torch.stack([torch.stack(row, -1) for row in rows], -2)


@lru_cache(maxsize=64)
def network_layout(
    dims: tuple[int, ...], num_globals: int, level: bool, edges: tuple[tuple[int, int], ...]
) -> NetworkLayout:
    """A layout, made once: its places are looked up in every density."""
    return NetworkLayout(dims, num_globals, level, edges)


class StableNetwork(Constraint):
    """Vectors of a `NetworkLayout` whose dynamics are stable."""

    is_discrete = False
    event_dim = 1

    def __init__(self, layout: NetworkLayout) -> None:
        self.layout = layout

    def check(self, value: Tensor) -> Tensor:
        return torch.isfinite(log_stability(self.layout.matrix(value), self.layout))


class _Tame(Transform):
    r"""Any vector to a stable one: the coupled dynamics are scaled down as a whole, by their spectral radius.

    .. math:: A \mapsto A \, (1 + \rho^p)^{-1/p}, \qquad \rho \mapsto \phi(\rho) = \rho (1 + \rho^p)^{-1/p} < 1,

    and each global persistence alone in the same way. The radius is homogeneous, so that the Jacobian of n entries is
    :math:`(\phi / \rho)^{n - 1} \phi'(\rho)`, and the inverse is known.
    """

    domain = constraints.real_vector
    bijective = True

    def __init__(self, constraint: StableNetwork, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.codomain, self.target, self.layout = constraint, constraint, constraint.layout
        self.coupled, self.slow = self.layout.coupled, self.layout.slow

    def with_cache(self, cache_size: int = 1) -> _Tame:
        return _Tame(self.target, cache_size=cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tame) and other.layout == self.layout

    def _radius(self, vector: Tensor) -> Tensor:
        regional = self.layout.regional
        return spectral_radius(self.layout.matrix(vector)[..., :regional, :regional])

    def _scaled(self, vector: Tensor, of_coupled: Tensor, of_slow: Tensor) -> Tensor:
        parts = torch.where(self.coupled.to(vector.device), vector * of_coupled.unsqueeze(-1), vector)
        return torch.where(self.slow.to(vector.device), vector * of_slow, parts)

    def _call(self, x: Tensor) -> Tensor:
        return self._scaled(x, shrinkage(self._radius(x)), shrinkage(x.abs()))

    def _inverse(self, y: Tensor) -> Tensor:
        return self._scaled(y, growth(self._radius(y)), growth(y.abs()))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        radius = self._radius(x)
        slow = torch.where(self.slow.to(x.device), log_slope(x.abs()), 0.0).sum(-1)
        return (int(self.coupled.sum()) - 1) * shrinkage(radius).log() + log_slope(radius) + slow


@biject_to.register(StableNetwork)
@transform_to.register(StableNetwork)
def _tame(constraint: StableNetwork) -> _Tame:
    return _Tame(constraint)


class NetworkPrior(TorchDistribution):
    r"""Spike-and-slab prior of coupled dynamics, jointly restricted to stable ones.

    .. math:: p(a) \propto \prod_{i} N(a_i; m_i, s_i^2)
        \prod_{e} \big[\pi_e N(a_e; 0, s_e^2) + (1 - \pi_e)\,\delta_0(a_e)\big] \; h(\rho(A)), \qquad
        h(\rho) = 1 - \rho^{200}.

    The density is with respect to the measure that has an atom at each absent block. It is not normalised over the
    stable systems, by a constant; `sample` is exact, by rejecting jointly all that is drawn.

    Parameters
    ----------
    layout : NetworkLayout
    mean, sd : Tensor, (entry,)
    probability : Tensor, (edge,)
        Prior probability that each edge is there.

    Notes
    -----
    Its support has a map from all vectors, so that climbs, trajectories and guides never leave the stable systems. An
    engine that moves by gradients never meets an absent edge: under it, all edges are there.
    """

    arg_constraints = {}
    has_rsample = False

    def __init__(self, layout: NetworkLayout, mean: Tensor, sd: Tensor, probability: Tensor, batch_shape=()) -> None:
        self.layout, self.mean_entry, self.sd_entry, self.probability = layout, mean, sd, probability
        super().__init__(torch.Size(batch_shape), mean.shape[-1:], validate_args=False)

    @property
    def support(self) -> Constraint:
        return StableNetwork(self.layout)

    def expand(self, batch_shape, _instance=None) -> NetworkPrior:
        return NetworkPrior(self.layout, self.mean_entry, self.sd_entry, self.probability, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        always = self.layout.edge < 0
        each = -0.5 * ((value - self.mean_entry) / self.sd_entry).square() - self.sd_entry.log() - _LOG_ROOT
        total = each[..., always].sum(-1) + self.log_stability(value)
        if not self.layout.edges:
            return total
        edge = self.layout.edge[~always]
        blocks = each.new_zeros(*each.shape[:-1], len(self.layout.edges)).index_add(-1, edge, each[..., ~always])
        present = self.present(value)
        return total + torch.where(present, self.probability.log() + blocks, torch.log1p(-self.probability)).sum(-1)

    @property
    def weight(self) -> Tensor:
        """Precision of every entry, (batch or 1, entry)."""
        return self.sd_entry.reciprocal().square().reshape(-1, len(self.layout.edge))

    @property
    def uncertain(self) -> list[int]:
        """The edges that may be absent."""
        return (self.probability < 1.0).nonzero().squeeze(-1).tolist()

    def present(self, value: Tensor) -> Tensor:
        """Which edges are there, (*batch, edge)."""
        held = self.layout.edge >= 0
        seen = (value[..., held] != 0.0).to(value.dtype)
        count = value.new_zeros(*value.shape[:-1], len(self.layout.edges))
        return count.index_add(-1, self.layout.edge[held], seen) > 0.0

    def log_stability(self, value: Tensor) -> Tensor:
        """log h of the coupled dynamics, (*batch); minus infinity where they are unstable."""
        return log_stability(self.layout.matrix(value), self.layout)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        def draw(lead: tuple[int, ...]) -> Tensor:
            drawn = self.mean_entry + self.sd_entry * torch.randn(*lead, *self.event_shape, dtype=torch.float64)
            there = torch.rand(*lead, len(self.layout.edges), dtype=torch.float64) < self.probability
            there = torch.cat([there, there.new_ones(*lead, 1)], -1)  # entry -1: always there
            return torch.where(there[..., self.layout.edge], drawn, 0.0)

        return sample_stable(torch.Size(sample_shape) + self.batch_shape, draw, self.log_stability)


def sample_stable(
    shape: torch.Size, draw: Callable[[tuple[int, ...]], Tensor], log_kept: Callable[[Tensor], Tensor]
) -> Tensor:
    """Draws (*shape, entry) of ``draw(lead)``, each kept with a probability and else drawn anew, whole.

    Raises
    ------
    ModelError
        Where next to none is kept.
    """
    found, open_ = None, torch.arange(shape.numel())
    for _ in range(TRIES):
        lead = (max(1, 256 // len(open_)), len(open_))
        drawn = draw(lead)
        if found is None:
            found = drawn.new_zeros(shape.numel(), drawn.shape[-1])
        kept = torch.rand(lead, dtype=torch.float64).log() < log_kept(drawn)
        first, hit = kept.to(torch.uint8).argmax(0), kept.any(0)
        found[open_[hit]] = drawn[first, torch.arange(len(open_))][hit]
        open_ = open_[~hit]
        if not len(open_):
            return found.reshape(*shape, -1)
    raise ModelError(
        f"the prior of the dynamics is hardly ever stable: {len(open_)} of {shape.numel()} draws were not found in "
        f"{TRIES} rounds; lower coupling_scale or persistence"
    )


_LOG_ROOT = 0.5 * math.log(2.0 * math.pi)


def log_stability(dynamics: Tensor, layout: NetworkLayout) -> Tensor:
    """log h of dynamics (*batch, latent, latent): of the regions together, and of every global latent."""
    coupled = dynamics[..., : layout.regional, : layout.regional]
    radius = spectral_radius(coupled)
    if layout.num_globals:
        alone = dynamics.diagonal(dim1=-2, dim2=-1)[..., layout.regional : layout.regional + layout.num_globals]
        radius = torch.cat([radius.unsqueeze(-1), alone.abs()], -1)
    else:
        radius = radius.unsqueeze(-1)
    power = radius.clamp(max=1.0) ** SHARPNESS
    return torch.where(radius < 1.0, torch.log1p(-power.clamp(max=1.0 - 1e-12)), -torch.inf).sum(-1)
