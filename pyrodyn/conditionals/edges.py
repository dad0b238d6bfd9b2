r"""One edge comes or goes, and all other dynamics follow.

What the rows of one region are says much of what another's can be, so that an edge on which other rows lean hardly
leaves while they stay. Under a quadratic of the log likelihood of all dynamics with information H, and a prior of
precision W, all other entries (o) follow the block b of an edge (e) by

.. math:: D b, \qquad D = -P_{oo}^{-1} P_{oe}, \qquad P = H + W.

Apart from D b they are independent of b, whose precision is :math:`P_{ee} + P_{eo} D`. A move along D, from zero or to
zero, is a shear: its Jacobian is one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyrodyn.conditionals.surrogate import Step
from pyrodyn.distributions import NetworkPrior
from pyrodyn.linalg.matrix import cholesky

_LOG_ROOT = 0.5 * math.log(2.0 * math.pi)


class _Laws(NamedTuple):
    """Of every edge that may be absent, seen from one network; each (chain, edge, ...)."""

    present: Tensor
    log_odds: Tensor  # of the edge's being there
    log_choice: Tensor  # log probability that this edge is the one proposed
    mean: Tensor  # (..., number) of a block that comes
    root: Tensor  # (..., number, number), Cholesky factor of its precision
    along: Tensor  # (..., number, entry): how all entries go along with a number of the block

    def of(self, edge: Tensor) -> _Laws:
        """The laws (chain, ...) of one edge in each chain."""
        return _Laws(*(part[torch.arange(len(edge)), edge] for part in self))


class EdgeToggle:
    """Proposals that take up or drop one edge, the other entries going along.

    Edges are chosen by their odds x of being the other way, weighed by x / (1 + x): informed, and no edge takes all.

    Reference: Zanella, J. Am. Stat. Assoc. 115:852 (2020), on locally balanced choices.
    """

    def __init__(self, prior: NetworkPrior) -> None:
        self.prior, layout = prior, prior.layout
        self.which = torch.tensor(prior.uncertain, dtype=torch.long)
        blocks = [(layout.edge == i).nonzero().squeeze(-1) for i in prior.uncertain]
        # Blocks differ in size; what a smaller one lacks is a number apart, of unit precision.
        self.entries = torch.zeros(len(blocks), max(map(len, blocks), default=0), dtype=torch.long)
        self.inside = torch.zeros_like(self.entries, dtype=torch.bool)
        for i, block in enumerate(blocks):
            self.entries[i, : len(block)], self.inside[i, : len(block)] = block, True

    def step(self, vector: Tensor, slope: Tensor, information: Tensor, prior: NetworkPrior) -> tuple[Tensor, Step]:
        """Networks (chain, entry) with one edge more or less, from the slope (chain, entry) where they are."""
        laws = self._laws(vector, slope, information, prior)
        edge = torch.multinomial(laws.log_choice.exp(), 1).squeeze(-1)
        law = laws.of(edge)
        noise = torch.linalg.solve_triangular(law.root.mT, torch.randn_like(law.mean).unsqueeze(-1), upper=True)
        comes = law.mean + noise.squeeze(-1)
        change = torch.where(law.present[:, None], -self._block(vector, edge), comes) * self.inside[edge]
        moved = vector + (change.unsqueeze(-2) @ law.along).squeeze(-2)
        gone = (self.prior.layout.edge == self.which[edge, None]) & law.present[:, None]
        return torch.where(gone, 0.0, moved), Step(self._log_density(law, comes, edge), edge)

    def log_density(
        self, vector: Tensor, slope: Tensor, information: Tensor, prior: NetworkPrior, target: Tensor, step: Step
    ) -> Tensor:
        """Log density of a toggle of the same edge that leads from ``vector`` to ``target``, (chain)."""
        edge = step.source
        assert isinstance(edge, Tensor)
        law = self._laws(vector, slope, information, prior).of(edge)
        return self._log_density(law, self._block(target, edge), edge)

    def log_odds(self, vector: Tensor, slope: Tensor, information: Tensor, prior: NetworkPrior) -> Tensor:
        """Log odds (chain, edge) that an edge is there, the other edges being as they are and all entries following."""
        return self._laws(vector, slope, information, prior).log_odds

    def _block(self, vector: Tensor, edge: Tensor) -> Tensor:
        return vector.gather(-1, self.entries[edge])

    def _log_density(self, law: _Laws, block: Tensor, edge: Tensor) -> Tensor:
        """Of a block that comes; one that goes goes to zero."""
        inside = self.inside[edge]
        white = (law.root.mT @ ((block - law.mean) * inside).unsqueeze(-1)).squeeze(-1)
        each = torch.where(inside, law.root.diagonal(dim1=-2, dim2=-1).log() - _LOG_ROOT, 0.0)
        return law.log_choice + torch.where(law.present, 0.0, each.sum(-1) - 0.5 * white.square().sum(-1))

    def _laws(self, vector: Tensor, slope: Tensor, information: Tensor, prior: NetworkPrior) -> _Laws:
        entries, inside = self.entries, self.inside
        weight = prior.weight.expand(len(vector), -1)
        whole = information + torch.diag_embed(weight)
        held = vector != 0.0
        among = held.unsqueeze(-1) & held.unsqueeze(-2)
        root = cholesky(torch.where(among, whole, 0.0) + torch.diag_embed((~held).to(whole.dtype)))
        covariance = torch.where(among, torch.cholesky_inverse(root), 0.0)
        present = self.prior.present(vector)[:, self.which]
        there = present[..., None, None]

        # How the others follow is read off the covariance of all where the block is among them, else off its precision.
        own = torch.zeros(*entries.shape, vector.shape[-1], dtype=whole.dtype)
        own = own.scatter(-1, entries.unsqueeze(-1), inside.to(whole.dtype).unsqueeze(-1))
        follow = own - whole[:, entries] @ covariance.unsqueeze(1)
        along = torch.where(there, covariance[:, entries], follow)
        square = self._square(torch.where(there, along, follow @ whole.unsqueeze(1)))
        inverse = torch.cholesky_inverse(cholesky(square))
        along = torch.where(there, inverse @ (along * inside.unsqueeze(-1)), along) * inside.unsqueeze(-1)
        root = cholesky(torch.where(there, inverse, square))

        pull = slope - weight * (vector - self.prior.mean_entry)
        linear = along @ pull[:, None, :, None]
        white = torch.linalg.solve_triangular(root, linear, upper=False)
        mean = torch.linalg.solve_triangular(root.mT, white, upper=True).squeeze(-1)
        prior_odds = torch.logit(prior.probability[..., self.which]).expand(len(vector), -1)
        volume = 0.5 * torch.where(inside, weight[:, entries].log(), 0.0).sum(-1)
        volume = volume - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        comes = prior_odds + volume + 0.5 * white.square().sum((-2, -1))
        block = (vector[:, entries] * inside).unsqueeze(-1)
        goes = -(linear * block).sum((-2, -1)) - 0.5 * (root.mT @ block).square().sum((-2, -1)) - comes
        odds = torch.nan_to_num(torch.where(present, goes, comes), -torch.inf).clamp(-1e3, 1e3)
        log_odds = torch.where(present, -odds, odds)
        return _Laws(present, log_odds, torch.log_softmax(logsigmoid(odds), -1), mean, root, along)

    def _square(self, rows: Tensor) -> Tensor:
        """The columns of each block out of its rows (chain, edge, number, entry)."""
        inside = self.inside
        columns = self.entries.unsqueeze(-2).expand(len(rows), -1, rows.shape[-2], -1)
        both = inside.unsqueeze(-1) & inside.unsqueeze(-2)
        return torch.where(both, rows.gather(-1, columns), 0.0) + torch.diag_embed((~inside).to(rows.dtype))
