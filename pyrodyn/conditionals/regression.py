r"""Rows of coupled dynamics given a path: conjugate regressions, with the set of sources drawn exactly.

For the latents of one target region, with unit noise,

.. math:: x_t = W z_{t} + \epsilon_t, \qquad w_j \sim N(m_j, s_j^2),

the probability of a set of sources is known up to a constant with W integrated out. All sets are scored where a target
has at most `ENUMERATED` possible sources; with more, each source is taken in and out in turn.

Reference: George & McCulloch, Statistica Sinica 7:339 (1997).
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from pyrodyn.linalg.matrix import cholesky

ENUMERATED = 8


class SourceSets:
    """The sets of sources of one target.

    Parameters
    ----------
    columns : list of Tensor
        For each possible source, which regressors belong to it.
    always : Tensor
        Regressors that are always in.
    """

    def __init__(self, columns: list[Tensor], always: Tensor) -> None:
        self.always, self.count = always, len(columns)
        self.free = torch.cat([*columns, torch.zeros(0, dtype=torch.long)])
        owner = [torch.full((len(held),), i) for i, held in enumerate(columns)]
        self.owner = torch.cat([*owner, torch.zeros(0, dtype=torch.long)])
        self.sets = torch.tensor(list(product((False, True), repeat=min(self.count, ENUMERATED))))

    def candidates(self, present: Tensor, source: int | None) -> Tensor:
        """Sets to choose from, (chain, set, source): all of them, or ``present`` without and with one source."""
        if source is None:
            return self.sets.to(present.device).expand(len(present), -1, -1)
        pair = present.unsqueeze(1).repeat(1, 2, 1)
        pair[:, 0, source], pair[:, 1, source] = False, True
        return pair


class SourceLaw:
    """The joint law of sources and coefficients of one target, for given sufficient statistics; see `SourceSets`.

    Parameters
    ----------
    sets : SourceSets
    gram : Tensor, (chain, regressor, regressor)
        Z'Z.
    cross : Tensor, (chain, regressor, latent)
        Z'X.
    mean : Tensor, (regressor, latent) or (chain, regressor, latent)
        Of the prior; zero for what belongs to a source.
    precision : Tensor, (chain, regressor)
        Of the prior, the same for all latents of the target.
    probability : Tensor, (source) or (chain, source)
        Of the prior.
    """

    def __init__(
        self, sets: SourceSets, gram: Tensor, cross: Tensor, mean: Tensor, precision: Tensor, probability: Tensor
    ) -> None:
        self.sets, self.shape = sets, cross.shape
        self.probability = probability.expand(len(cross), -1).unsqueeze(1)
        whole = gram + torch.diag_embed(precision)
        pull = cross + precision.unsqueeze(-1) * mean
        a, e = sets.always, sets.free
        # What is always there is integrated out of the question which sources are.
        self.root = cholesky(whole[:, a[:, None], a])
        self.side = torch.linalg.solve_triangular(self.root, whole[:, a[:, None], e], upper=False)
        self.own = torch.linalg.solve_triangular(self.root, pull[:, a], upper=False)
        self.schur = whole[:, e[:, None], e] - self.side.mT @ self.side
        self.rest = pull[:, e] - self.side.mT @ self.own
        self.precision = precision[:, e]

    def draw(self, present: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients (chain, regressor, latent), exactly zero for absent sources, and sources (chain, source).

        All sets are asked, or one source after the other, beginning with those that are ``present``.
        """
        if self.sets.count > ENUMERATED:
            for source in torch.randperm(self.sets.count).tolist():
                present = self.choose(self.sets.candidates(present, source))
        elif self.sets.count:
            present = self.choose(self.sets.candidates(present, None))
        return self.coefficients(present), present

    def choose(self, candidates: Tensor) -> Tensor:
        """One of several sets (chain, set, source), by its probability."""
        chosen = torch.multinomial(self.log_probabilities(candidates).exp(), 1).squeeze(-1)
        return candidates[torch.arange(len(candidates)), chosen]

    def log_probabilities(self, candidates: Tensor) -> Tensor:
        """Of each set among the candidates, (chain, set)."""
        inside = candidates[..., self.sets.owner]
        held, linear = _restrict(self.schur.unsqueeze(1), self.rest.unsqueeze(1), inside)
        root = cholesky(held)
        white = torch.linalg.solve_triangular(root, linear, upper=False)
        latents = self.shape[-1]
        volume = torch.where(inside, self.precision.log().unsqueeze(1), 0.0).sum(-1)
        score = 0.5 * latents * volume - latents * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        score = score + 0.5 * white.square().sum((-2, -1))
        prior = torch.where(candidates, self.probability.log(), torch.log1p(-self.probability)).sum(-1)
        return torch.log_softmax(torch.nan_to_num(score + prior, -torch.inf), -1)

    def coefficients(self, present: Tensor) -> Tensor:
        """Coefficients (chain, regressor, latent) given the sources."""
        found = self.own.new_zeros(self.shape)
        own = self.own
        if self.sets.count:
            inside = present[:, self.sets.owner]
            held, linear = _restrict(self.schur, self.rest, inside)
            root = cholesky(held)
            white = torch.linalg.solve_triangular(root, linear, upper=False)
            free = torch.linalg.solve_triangular(root.mT, white + torch.randn_like(white), upper=True)
            found[:, self.sets.free] = torch.where(inside.unsqueeze(-1), free, 0.0)
            own = own - self.side @ found[:, self.sets.free]
        found[:, self.sets.always] = torch.linalg.solve_triangular(
            self.root.mT, own + torch.randn_like(own), upper=True
        )
        return found

    def log_density(self, coefficients: Tensor, present: Tensor) -> Tensor:
        """Of coefficients given the sources, (chain)."""
        a, e = self.sets.always, self.sets.free
        latents = self.shape[-1]
        own = self.own - self.side @ coefficients[:, e]
        white = self.root.mT @ coefficients[:, a] - own
        total = latents * (self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - len(a) * _LOG_ROOT)
        total = total - 0.5 * white.square().sum((-2, -1))
        if self.sets.count:
            inside = present[:, self.sets.owner]
            held, linear = _restrict(self.schur, self.rest, inside)
            root = cholesky(held)
            white = root.mT @ coefficients[:, e] - torch.linalg.solve_triangular(root, linear, upper=False)
            volume = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - inside.to(root.dtype).sum(-1) * _LOG_ROOT
            total = total + latents * volume - 0.5 * white.square().sum((-2, -1))
        return total


_LOG_ROOT = 0.5 * math.log(2.0 * math.pi)


def _restrict(matrix: Tensor, linear: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns outside become those of the identity, so that sets of any size share one shape."""
    both = inside.unsqueeze(-1) & inside.unsqueeze(-2)
    held = torch.where(both, matrix, 0.0) + torch.diag_embed((~inside).to(matrix.dtype))
    return held, torch.where(inside.unsqueeze(-1), linear, 0.0)
