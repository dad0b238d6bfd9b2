r"""What sessions of coupled regions share, and the dynamics of each, as one random variable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyrodyn.distributions.network import NetworkLayout, NetworkPrior, log_stability, sample_stable

SESSIONS_SEEN = 2.0  # that the prior of an edge's rate counts for
SIZE_SD = 0.5  # of an edge's typical size about the prior's, in log units
SPREAD_SCALE = 0.3  # of a session's size about the typical one, in log units


class Pool(NamedTuple):
    """What sessions share, each (*draw, *event), and each session's sizes and dynamics."""

    rate: Tensor  # (edge): the share of sessions in which an edge is there
    log_size: Tensor  # (edge): of the root mean square of a block's norm, over sessions
    log_spread: Tensor  # (): of sessions' log sizes about it
    own_log_size: dict[str, Tensor]  # (edge of the session)
    network: dict[str, Tensor]  # (entry)


class PoolPrior(TorchDistribution):
    """Joint law of a `Pool`, as one vector, restricted to sessions that are all stable.

    It is one site because the restriction is joint, as in `HorseshoeNetwork`; `sample` is exact, by rejection.

    Parameters
    ----------
    networks : mapping of session to NetworkPrior
    edges : mapping of session to sequence of (source, target)
        By the names of regions, in the order of the session's layout.
    """

    arg_constraints = {}
    has_rsample = False

    def __init__(
        self, networks: Mapping[str, NetworkPrior], edges: Mapping[str, tuple[tuple[str, str], ...]], batch_shape=()
    ) -> None:
        self.networks, self.edges_of = dict(networks), dict(edges)
        super().__init__(torch.Size(batch_shape), torch.Size((sum(self._sizes),)), validate_args=False)

    def expand(self, batch_shape, _instance=None) -> PoolPrior:
        return PoolPrior(self.networks, self.edges_of, batch_shape)

    @cached_property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """Every (source, target) that may exist in some session."""
        return tuple(dict.fromkeys(edge for held in self.edges_of.values() for edge in held))

    @cached_property
    def places(self) -> dict[str, Tensor]:
        """Of every session, where its edges stand among all."""
        number = {edge: i for i, edge in enumerate(self.edges)}
        return {
            name: torch.tensor([number[edge] for edge in held], dtype=torch.long)
            for name, held in self.edges_of.items()
        }

    @cached_property
    def probability(self) -> Tensor:
        """Prior probability of every edge, (edge,)."""
        found = torch.ones(len(self.edges), dtype=torch.float64)
        for name, place in self.places.items():
            found[place] = self.networks[name].probability
        return found

    @cached_property
    def certain(self) -> Tensor:
        return self.probability == 1.0

    @cached_property
    def prior_size(self) -> dict[str, Tensor]:
        """Root mean square of the norm of every block under a session's own prior, (edge of the session,)."""
        return {name: _norms(law.layout, law.sd_entry) for name, law in self.networks.items()}

    @cached_property
    def mean_log_size(self) -> Tensor:
        """Centre of the prior of every edge's log size, over sessions, (edge,)."""
        total, count = torch.zeros(2, len(self.edges), dtype=torch.float64)
        for name, place in self.places.items():
            total = total.index_add(0, place, self.prior_size[name].log())
            count = count.index_add(0, place, torch.ones(len(place), dtype=torch.float64))
        return total / count

    @property
    def _sizes(self) -> list[int]:
        own = [size for law in self.networks.values() for size in (len(law.layout.edges), len(law.layout.edge))]
        return [len(self.edges), len(self.edges), 1, *own]

    def split(self, value: Tensor) -> Pool:
        """The parts of a vector."""
        rate, log_size, log_spread, *own = value.split(self._sizes, -1)
        names = list(self.networks)
        return Pool(
            rate,
            log_size,
            log_spread.squeeze(-1),
            dict(zip(names, own[::2], strict=True)),
            dict(zip(names, own[1::2], strict=True)),
        )

    def given(self, name: str, rate: Tensor, own_log_size: Tensor) -> NetworkPrior:
        """Law of a session's dynamics given all else, for ``rate`` (*batch, edge) and (*batch, edge of the session)."""
        law, layout = self.networks[name], self.networks[name].layout
        larger = torch.cat([own_log_size - self.prior_size[name].log(), torch.zeros_like(rate[..., :1])], -1)
        owner = torch.where(layout.edge < 0, len(layout.edges), layout.edge)
        sd = law.sd_entry * larger[..., owner].exp()
        probability = torch.where(self.certain, 1.0, rate)[..., self.places[name]]
        return NetworkPrior(layout, law.mean_entry.expand_as(sd), sd, probability)

    def log_prob(self, value: Tensor) -> Tensor:
        pool = self.split(value)
        free = ~self.certain
        share = self.probability[free]
        beta = torch.distributions.Beta(SESSIONS_SEEN * share, SESSIONS_SEEN * (1.0 - share))
        total = beta.log_prob(pool.rate[..., free]).sum(-1)
        total = total + torch.distributions.Normal(self.mean_log_size, SIZE_SD).log_prob(pool.log_size).sum(-1)
        total = total + log_spread_prior(pool.log_spread)
        spread = pool.log_spread.exp().unsqueeze(-1)
        for name, place in self.places.items():
            own = pool.own_log_size[name]
            total = total + torch.distributions.Normal(pool.log_size[..., place], spread).log_prob(own).sum(-1)
            total = total + self.given(name, pool.rate, own).log_prob(pool.network[name])
        return total

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        def draw(lead: tuple[int, ...]) -> Tensor:
            def normal(*shape: int) -> Tensor:
                return torch.randn(*lead, *shape, dtype=torch.float64)

            share = self.probability.clamp(max=1.0 - 1e-12)
            rate = torch.distributions.Beta(SESSIONS_SEEN * share, SESSIONS_SEEN * (1.0 - share)).sample(lead)
            rate = torch.where(self.certain, 1.0, rate)
            log_size = self.mean_log_size + SIZE_SD * normal(len(self.edges))
            log_spread = (SPREAD_SCALE * normal(1)).abs().log()
            parts = [rate, log_size, log_spread]
            for name, place in self.places.items():
                own = log_size[..., place] + log_spread.exp() * normal(len(place))
                law = self.given(name, rate, own)
                there = torch.rand(*lead, len(place), dtype=torch.float64) < law.probability
                there = torch.cat([there, there.new_ones(*lead, 1)], -1)  # entry -1: always there
                entries = law.mean_entry + law.sd_entry * normal(len(law.layout.edge))
                parts += [own, torch.where(there[..., law.layout.edge], entries, 0.0)]
            return torch.cat(parts, -1)

        def log_kept(value: Tensor) -> Tensor:
            networks = self.split(value).network
            each = [log_stability(law.layout.matrix(networks[n]), law.layout) for n, law in self.networks.items()]
            return torch.stack(each).sum(0)

        return sample_stable(torch.Size(sample_shape) + self.batch_shape, draw, log_kept)


def log_spread_prior(log_spread: Tensor) -> Tensor:
    """Log density of the logarithm of a half-normal spread."""
    ratio = log_spread.exp() / SPREAD_SCALE
    return 0.5 * math.log(2.0 / math.pi) - 0.5 * ratio.square() + ratio.log()


def _norms(layout: NetworkLayout, sd: Tensor) -> Tensor:
    """Root mean square of the norm of every edge's block, (edge,)."""
    held = layout.edge >= 0
    found = torch.zeros(len(layout.edges), dtype=torch.float64)
    return found.index_add(0, layout.edge[held], sd[held].square()).sqrt()
