r"""A quadratic in place of a log likelihood of the dynamics, and the proposals that it makes.

A path that is drawn holds the dynamics to what it shows, so that edges come and go slowly given paths. With the path
integrated out under its reference, the log likelihood of all dynamics,

.. math:: \log Z(a) \approx \log Z(a_0) + g^\top (a - a_0) - \tfrac12 (a - a_0)^\top H (a - a_0),

is nearly quadratic where it is expanded; with a spike-and-slab prior the quadratic's conditionals, edges included, are
drawn exactly. Chains propose with its curvature and the exact slope where they are.
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


class Step(NamedTuple):
    """How a network was proposed."""

    log_density: Tensor  # (chain)
    source: Tensor | int | None = None  # the edge in question, of each chain or of all; None where all sets were


class Rows:
    """Proposals that draw some entries anew, edges among them, from where a network is, under its slope there.

    The prior comes with every call: its scales and probabilities may differ between chains.
    """

    def __init__(self, prior: NetworkPrior, entries: Tensor, which: list[int]) -> None:
        self.prior, self.entries, self.which = prior, entries, which
        edge = prior.layout.edge[entries]
        columns = [(edge == i).nonzero().squeeze(-1) for i in which]
        always = ~torch.isin(edge, torch.tensor(which, dtype=edge.dtype))
        self.sets = SourceSets(columns, always.nonzero().squeeze(-1))

    def step(self, vector: Tensor, slope: Tensor, information: Tensor, prior: NetworkPrior) -> tuple[Tensor, Step]:
        """Networks (chain, entry) with these entries anew, from the slope where they are."""
        present = self.prior.present(vector)[:, self.which]
        source = int(torch.randint(self.sets.count, ())) if self.sets.count > ENUMERATED else None
        law = self._law(vector, slope, information, prior)
        log_density = torch.zeros(len(vector), dtype=vector.dtype)
        if self.sets.count:
            candidates = self.sets.candidates(present, source)
            present = law.choose(candidates)
            log_density = _of_set(law.log_probabilities(candidates), candidates, present)
        coefficients = law.coefficients(present)
        log_density = log_density + law.log_density(coefficients, present)
        moved = vector.clone()
        moved[:, self.entries] = coefficients.squeeze(-1)
        return moved, Step(log_density, source)

    def log_density(
        self, vector: Tensor, slope: Tensor, information: Tensor, prior: NetworkPrior, target: Tensor, step: Step
    ) -> Tensor:
        """Log density of a step of the same kind from ``vector`` to ``target``, (chain)."""
        law = self._law(vector, slope, information, prior)
        present = self.prior.present(target)[:, self.which]
        found = law.log_density(target[:, self.entries].unsqueeze(-1), present)
        if self.sets.count:
            assert step.source is None or isinstance(step.source, int)
            candidates = self.sets.candidates(present, step.source)
            found = found + _of_set(law.log_probabilities(candidates), candidates, present)
        return found

    def _law(self, vector: Tensor, slope: Tensor, information: Tensor, prior: NetworkPrior) -> SourceLaw:
        gram = information[:, self.entries[:, None], self.entries]
        pull = slope[:, self.entries].unsqueeze(-1) + gram @ vector[:, self.entries].unsqueeze(-1)
        return self.law(gram, pull, prior)

    def law(self, gram: Tensor, pull: Tensor, prior: NetworkPrior) -> SourceLaw:
        """Of the entries under a quadratic whose curvature and linear part are given."""
        mean = self.prior.mean_entry[self.entries].unsqueeze(-1)
        weight = prior.weight[:, self.entries].expand(len(gram), -1)
        return SourceLaw(self.sets, gram, pull, mean, weight, prior.probability[..., self.which])


def blocks(prior: NetworkPrior) -> list[Rows]:
    """The rows of each region, and what leaves the common latents, whose scale all regions tell of together."""
    layout = prior.layout
    found = []
    for r in range(layout.num_regions):
        which = [i for i in prior.uncertain if layout.edges[i][0] == r]
        found.append(Rows(prior, (layout.group[layout.rows] == r).nonzero().squeeze(-1), which))
    common = (layout.group[layout.columns] < 0).nonzero().squeeze(-1)
    return [*found, Rows(prior, common, [])] if len(common) else found


def drawn(rows: list[Rows], quadratic: Quadratic, vector: Tensor, prior: NetworkPrior) -> Tensor:
    """Another network (chain, entry), by a there-and-back Gibbs run over all blocks under a quadratic and the prior."""
    vector, (centre, slope, information) = vector.clone(), quadratic
    order = torch.randperm(len(rows)).tolist()
    for block in [rows[i] for i in (*order, *reversed(order[:-1]))]:
        entries = block.entries
        gram = information[:, entries[:, None], entries]
        pull = slope[:, entries] - (information[:, entries] @ (vector - centre).unsqueeze(-1)).squeeze(-1)
        pull = pull + (gram @ vector[:, entries].unsqueeze(-1)).squeeze(-1)
        coefficients, _ = block.law(gram, pull.unsqueeze(-1), prior).draw(block.prior.present(vector)[:, block.which])
        vector[:, entries] = coefficients.squeeze(-1)
    return vector


def _of_set(log_probabilities: Tensor, candidates: Tensor, present: Tensor) -> Tensor:
    """The entry of the set that is there, (chain)."""
    at = (candidates == present.unsqueeze(1)).all(-1).to(torch.uint8).argmax(-1)
    return log_probabilities.gather(-1, at.unsqueeze(-1)).squeeze(-1)
