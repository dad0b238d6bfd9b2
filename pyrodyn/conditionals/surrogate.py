r"""A quadratic in place of a log likelihood of the dynamics, and the proposals that it makes.

A path that is drawn holds the dynamics to what it shows, so that edges come and go slowly given paths. With the path
integrated out under its reference, the log likelihood of all dynamics,

.. math:: \log Z(a) \approx \log Z(a_0) + g^\top (a - a_0) - \tfrac12 (a - a_0)^\top H (a - a_0),

is nearly quadratic; together with a spike-and-slab prior the quadratic is a target whose conditionals, edges included,
are drawn exactly. A there-and-back run over all regions leaves it invariant and reversible, and so serves as one
proposal for the whole network, to be accepted by the ratio of the true density to the surrogate's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodyn.conditionals.regression import SourceSets
from pyrodyn.distributions import NetworkPrior

DIFFERENCE = 1e-4  # of an entry of the dynamics
BATCH_NUMBERS = 1_000_000  # (draw, trial, time, latent) entries in one batched gradient

Gradient = Callable[[Tensor, Tensor], Tensor]


class Quadratic(NamedTuple):
    """A log likelihood about ``centre``; each (group, ...)."""

    centre: Tensor  # (group, entry)
    slope: Tensor  # (group, entry)
    information: Tensor  # (group, entry, entry)

    @classmethod
    def about(cls, centre: Tensor, gradient: Gradient, batch: int) -> Quadratic:
        """By central differences of an exact gradient: (some, entry) points of (some) groups to (some, entry)."""
        groups, size = centre.shape
        steps = DIFFERENCE * torch.cat([torch.eye(size), -torch.eye(size)]).to(centre)
        points = (centre.unsqueeze(1) + steps).flatten(0, 1)
        owner = torch.arange(groups).repeat_interleave(2 * size)
        slopes = torch.cat(
            [gradient(p, o) for p, o in zip(points.split(batch), owner.split(batch), strict=True)]
        ).reshape(groups, 2, size, size)
        information = (slopes[:, 1] - slopes[:, 0]) / (2.0 * DIFFERENCE)
        information = torch.nan_to_num(0.5 * (information + information.mT))
        values, vectors = torch.linalg.eigh(information)
        information = (vectors * values.clamp(min=0.0).unsqueeze(-2)) @ vectors.mT
        return cls(centre, slopes.mean((1, 2)), information)

    def log_prob(self, vector: Tensor) -> Tensor:
        """Up to a constant, for (chain, entry), the chains of a group together."""
        apart = vector.unflatten(0, (len(self.centre), -1)) - self.centre.unsqueeze(1)
        return (apart * (self.slope.unsqueeze(1) - 0.5 * apart @ self.information)).sum(-1).flatten()


class NetworkProposal:
    """There-and-back Gibbs runs over the regions under a `Quadratic` and the prior."""

    def __init__(self, prior: NetworkPrior) -> None:
        layout = prior.layout
        self.prior, self.blocks = prior, []
        row_region = layout.group[layout.rows]
        for r in range(layout.num_regions):
            entries = (row_region == r).nonzero().squeeze(-1)
            which = [i for i, (target, _) in enumerate(layout.edges) if target == r]
            edge = layout.edge[entries]
            columns = [(edge == i).nonzero().squeeze(-1) for i in which]
            sets = SourceSets(columns, (edge < 0).nonzero().squeeze(-1), prior.probability[which])
            self.blocks.append((entries, sets, which))
        common = (row_region < 0).nonzero().squeeze(-1)
        if len(common):
            self.blocks.append((common, SourceSets([], torch.arange(len(common)), prior.probability[:0]), []))

    def draw(self, quadratic: Quadratic, vector: Tensor) -> Tensor:
        """Another network (chain, entry)."""
        vector, chains = vector.clone(), len(vector) // len(quadratic.centre)
        centre, slope, information = (part.repeat_interleave(chains, 0) for part in quadratic)
        present = self.prior.present(vector)
        order = torch.randperm(len(self.blocks)).tolist()
        weight = self.prior.sd_entry.reciprocal().square()
        for block in [*order, *reversed(order)]:
            entries, sets, which = self.blocks[block]
            gram = information[:, entries[:, None], entries]
            pull = slope[:, entries] - (information[:, entries] @ (vector - centre).unsqueeze(-1)).squeeze(-1)
            pull = pull + (gram @ vector[:, entries].unsqueeze(-1)).squeeze(-1)
            coefficients, present[:, which] = sets.draw(
                gram,
                pull.unsqueeze(-1),
                self.prior.mean_entry[entries].unsqueeze(-1),
                weight[entries].expand(len(vector), -1),
                present[:, which],
            )
            vector[:, entries] = coefficients.squeeze(-1)
        return vector
