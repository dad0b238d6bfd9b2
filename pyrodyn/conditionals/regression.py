r"""Rows of coupled dynamics given a path: conjugate regressions, with the set of sources drawn exactly.

For the latents of one target region, with unit noise,

.. math:: x_t = W z_{t} + \epsilon_t, \qquad w_j \sim N(m_j, s_j^2),

the probability of a set of sources is known up to a constant with W integrated out. All sets are scored where a target
has at most `ENUMERATED` possible sources; with more, each source is taken in and out in turn.

Reference: George & McCulloch, Statistica Sinica 7:339 (1997).
"""

from __future__ import annotations

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
    probability : Tensor, (source,)
    """

    def __init__(self, columns: list[Tensor], always: Tensor, probability: Tensor) -> None:
        self.always, self.probability, self.count = always, probability, len(columns)
        self.free = torch.cat([*columns, torch.zeros(0, dtype=torch.long)])
        owner = [torch.full((len(held),), i) for i, held in enumerate(columns)]
        self.owner = torch.cat([*owner, torch.zeros(0, dtype=torch.long)])
        self.sets = torch.tensor(list(product((False, True), repeat=min(self.count, ENUMERATED))))

    def draw(
        self, gram: Tensor, cross: Tensor, mean: Tensor, precision: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Coefficients and sources anew.

        Parameters
        ----------
        gram : Tensor, (chain, regressor, regressor)
            Z'Z.
        cross : Tensor, (chain, regressor, latent)
            Z'X.
        mean : Tensor, (regressor, latent)
            Of the prior; zero for what belongs to a source.
        precision : Tensor, (chain, regressor)
            Of the prior, the same for all latents of the target.
        present : Tensor of bool, (chain, source)
            The sources now.

        Returns
        -------
        coefficients : Tensor, (chain, regressor, latent), exactly zero for absent sources
        present : Tensor of bool, (chain, source)
        """
        whole = gram + torch.diag_embed(precision)
        pull = cross + precision.unsqueeze(-1) * mean
        a, e = self.always, self.free
        root = cholesky(whole[:, a[:, None], a])
        side = torch.linalg.solve_triangular(root, whole[:, a[:, None], e], upper=False)
        own = torch.linalg.solve_triangular(root, pull[:, a], upper=False)
        coefficients = torch.zeros_like(pull)
        if self.count:
            schur = whole[:, e[:, None], e] - side.mT @ side
            rest = pull[:, e] - side.mT @ own
            present = self._sources(schur, rest, precision[:, e], present)
            inside = present[:, self.owner]
            held, linear = _restrict(schur, rest, inside)
            free = _normal(cholesky(held), linear)
            coefficients[:, e] = torch.where(inside.unsqueeze(-1), free, 0.0)
            own = own - side @ coefficients[:, e]
        noise = torch.randn_like(own)
        coefficients[:, a] = torch.linalg.solve_triangular(root.mT, own + noise, upper=True)
        return coefficients, present

    def _sources(self, schur: Tensor, rest: Tensor, precision: Tensor, present: Tensor) -> Tensor:
        """Which sources, (chain, source), given sufficient statistics from which all else is integrated out."""
        if self.count <= ENUMERATED:
            sets = self.sets.to(present.device).expand(len(present), -1, -1)
            return self._choose(schur, rest, precision, sets)
        for source in torch.randperm(self.count).tolist():
            pair = present.unsqueeze(1).repeat(1, 2, 1)
            pair[:, 0, source], pair[:, 1, source] = False, True
            present = self._choose(schur, rest, precision, pair)
        return present

    def _choose(self, schur: Tensor, rest: Tensor, precision: Tensor, sets: Tensor) -> Tensor:
        """One of several sets (chain, set, source), by its posterior probability."""
        inside = sets[..., self.owner]
        held, linear = _restrict(schur.unsqueeze(1), rest.unsqueeze(1), inside)
        root = cholesky(held)
        white = torch.linalg.solve_triangular(root, linear, upper=False)
        latents = rest.shape[-1]
        volume = torch.where(inside, precision.log().unsqueeze(1), 0.0).sum(-1)
        score = 0.5 * latents * volume - latents * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        score = score + 0.5 * white.square().sum((-2, -1))
        prior = torch.where(sets, self.probability.log(), torch.log1p(-self.probability)).sum(-1)
        weight = torch.softmax(torch.nan_to_num(score + prior, -torch.inf), -1)
        chosen = torch.multinomial(weight, 1).squeeze(-1)
        return sets[torch.arange(len(sets)), chosen]


def _restrict(matrix: Tensor, linear: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns outside become those of the identity, so that sets of any size share one shape."""
    both = inside.unsqueeze(-1) & inside.unsqueeze(-2)
    held = torch.where(both, matrix, 0.0) + torch.diag_embed((~inside).to(matrix.dtype))
    return held, torch.where(inside.unsqueeze(-1), linear, 0.0)


def _normal(root: Tensor, linear: Tensor) -> Tensor:
    """A draw from the Gaussian of precision ``root root'`` and linear part ``linear``."""
    white = torch.linalg.solve_triangular(root, linear, upper=False)
    return torch.linalg.solve_triangular(root.mT, white + torch.randn_like(white), upper=True)
