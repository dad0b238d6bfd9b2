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

from pyrodyn.conditionals.regression import ENUMERATED, SourceLaw, SourceSets
from pyrodyn.distributions import NetworkPrior

DIFFERENCE = 1e-4  # of an entry of the dynamics
BATCH_NUMBERS = 1_000_000  # (draw, trial, time, latent) entries in one batched gradient

Gradient = Callable[[Tensor, Tensor], Tensor]


class Quadratic(NamedTuple):
    """A log likelihood of the dynamics about ``centre``; each (chain, ...)."""

    centre: Tensor  # (chain, entry)
    slope: Tensor  # (chain, entry)
    information: Tensor  # (chain, entry, entry)

    @classmethod
    def about(cls, centre: Tensor, gradient: Gradient, batch: int) -> Quadratic:
        """By differences of an exact gradient, which maps points (some, entry) of (some) chains to slopes."""
        chains, size = centre.shape
        steps = DIFFERENCE * torch.cat([torch.zeros(1, size), torch.eye(size)]).to(centre)
        points = (centre.unsqueeze(1) + steps).flatten(0, 1)
        owner = torch.arange(chains).repeat_interleave(size + 1)
        slopes = torch.cat([gradient(p, o) for p, o in zip(points.split(batch), owner.split(batch), strict=True)])
        base, moved = slopes.unflatten(0, (chains, size + 1)).split([1, size], 1)
        information = torch.nan_to_num((base - moved) / DIFFERENCE)
        values, vectors = torch.linalg.eigh(0.5 * (information + information.mT))
        return cls(centre, base.squeeze(1), (vectors * values.clamp(min=0.0).unsqueeze(-2)) @ vectors.mT)


class NetworkProposal:
    """There-and-back Gibbs runs over the regions under a `Quadratic` and the prior.

    The prior comes with every call: its scales and probabilities may differ between chains.
    """

    def __init__(self, prior: NetworkPrior) -> None:
        layout = prior.layout
        self.prior, self.blocks = prior, []
        row_region = layout.group[layout.rows]
        for r in range(layout.num_regions):
            entries = (row_region == r).nonzero().squeeze(-1)
            which = [i for i in prior.uncertain if layout.edges[i][0] == r]
            edge = layout.edge[entries]
            columns = [(edge == i).nonzero().squeeze(-1) for i in which]
            always = ~torch.isin(edge, torch.tensor(which, dtype=edge.dtype))
            sets = SourceSets(columns, always.nonzero().squeeze(-1))
            self.blocks.append((entries, sets, which))
        common = (row_region < 0).nonzero().squeeze(-1)
        if len(common):
            self.blocks.append((common, SourceSets([], torch.arange(len(common))), []))

    def draw(self, quadratic: Quadratic, vector: Tensor, prior: NetworkPrior) -> Tensor:
        """Another network (chain, entry)."""
        vector, (centre, slope, information) = vector.clone(), quadratic
        present = self.prior.present(vector)
        order = torch.randperm(len(self.blocks)).tolist()
        for block in [*order, *reversed(order[:-1])]:
            entries, sets, which = self.blocks[block]
            gram = information[:, entries[:, None], entries]
            pull = slope[:, entries] - (information[:, entries] @ (vector - centre).unsqueeze(-1)).squeeze(-1)
            pull = pull + (gram @ vector[:, entries].unsqueeze(-1)).squeeze(-1)
            coefficients, present[:, which] = sets.draw(
                gram,
                pull.unsqueeze(-1),
                self.prior.mean_entry[entries].unsqueeze(-1),
                prior.weight[:, entries].expand(len(vector), -1),
                prior.probability[..., which],
                present[:, which],
            )
            vector[:, entries] = coefficients.squeeze(-1)
        return vector

    def step(
        self, block: int, vector: Tensor, slope: Tensor, information: Tensor, prior: NetworkPrior
    ) -> tuple[Tensor, Step]:
        """Networks (chain, entry) with one region's rows anew, from the slope where they are."""
        entries, sets, which = self.blocks[block]
        present = self.prior.present(vector)[:, which]
        source = int(torch.randint(sets.count, ())) if sets.count > ENUMERATED else None
        law = self._law(block, vector, slope, information, prior)
        log_density = torch.zeros(len(vector), dtype=vector.dtype)
        if sets.count:
            candidates = sets.candidates(present, source)
            present = law.choose(candidates)
            log_density = _of_set(law.log_probabilities(candidates), candidates, present)
        coefficients = law.coefficients(present)
        log_density = log_density + law.log_density(coefficients, present)
        moved = vector.clone()
        moved[:, entries] = coefficients.squeeze(-1)
        return moved, Step(log_density, source)

    def log_density(
        self,
        block: int,
        vector: Tensor,
        slope: Tensor,
        information: Tensor,
        prior: NetworkPrior,
        target: Tensor,
        step: Step,
    ) -> Tensor:
        """Log density of a step of the same kind from ``vector`` to ``target``, (chain)."""
        entries, sets, which = self.blocks[block]
        law = self._law(block, vector, slope, information, prior)
        present = self.prior.present(target)[:, which]
        found = law.log_density(target[:, entries].unsqueeze(-1), present)
        if sets.count:
            candidates = sets.candidates(present, step.source)
            found = found + _of_set(law.log_probabilities(candidates), candidates, present)
        return found

    def _law(self, block: int, vector: Tensor, slope: Tensor, information: Tensor, prior: NetworkPrior) -> SourceLaw:
        entries, sets, which = self.blocks[block]
        gram = information[:, entries[:, None], entries]
        pull = slope[:, entries].unsqueeze(-1) + gram @ vector[:, entries].unsqueeze(-1)
        mean = self.prior.mean_entry[entries].unsqueeze(-1)
        weight = prior.weight[:, entries].expand(len(vector), -1)
        return SourceLaw(sets, gram, pull, mean, weight, prior.probability[..., which])


class Step(NamedTuple):
    """How a region's rows were proposed."""

    log_density: Tensor  # (chain)
    source: int | None  # the one source in question, where there are too many for all sets


def _of_set(log_probabilities: Tensor, candidates: Tensor, present: Tensor) -> Tensor:
    """The entry of the set that is there, (chain)."""
    at = (candidates == present.unsqueeze(1)).all(-1).to(torch.uint8).argmax(-1)
    return log_probabilities.gather(-1, at.unsqueeze(-1)).squeeze(-1)
