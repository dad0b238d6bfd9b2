r"""The weights of a drift given the law of a path: a linear regression with normal noise, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodyn.expectations import CHUNK_NUMBERS, Moments, Rule
from pyrodyn.linalg.matrix import cholesky


class Weights(NamedTuple):
    """A normal law of the weights.

    Attributes
    ----------
    mean : Tensor, (feature, latent)
    basis : Tensor, (latent, latent)
        Columns are the directions of the latent in which the covariance is block-diagonal.
    covariance : Tensor, (latent, feature, feature)
        In these directions.
    """

    mean: Tensor
    basis: Tensor
    covariance: Tensor

    @classmethod
    def known(cls, mean: Tensor) -> Weights:
        """Weights without uncertainty."""
        count, dim = mean.shape
        return cls(mean, torch.eye(dim, dtype=mean.dtype), torch.zeros(dim, count, count, dtype=mean.dtype))

    def spread(self, matrix: Tensor) -> Tensor:
        """The sum over latents i, j of matrix_ij Cov(W_i, W_j), (*batch, feature, feature)."""
        share = (self.basis.mT @ matrix @ self.basis).diagonal(dim1=-2, dim2=-1)
        return torch.einsum("...d,dmn->...mn", share, self.covariance)

    def divergence(self, sd: Tensor) -> Tensor:
        """KL(q || p) for prior weights that are independent with standard deviations (feature)."""
        count, dim = self.mean.shape
        scaled = self.covariance / sd / sd[:, None]
        trace = scaled.diagonal(dim1=-2, dim2=-1).sum()
        log_det = 2.0 * cholesky(scaled).diagonal(dim1=-2, dim2=-1).log().sum()
        return 0.5 * (trace + (self.mean / sd[:, None]).square().sum() - count * dim - log_det)

    def sample(self, draws: int) -> Tensor:
        """Draws (draw, feature, latent)."""
        count, dim = self.mean.shape
        noise = torch.randn(draws, dim, count, 1, dtype=self.mean.dtype)
        turned = (torch.linalg.cholesky(self.covariance) @ noise).squeeze(-1).mT
        return self.mean + turned @ self.basis.mT


class WeightStatistics(NamedTuple):
    r"""What the laws of all paths say of the weights.

    Attributes
    ----------
    gram : Tensor, (feature, feature)
        :math:`\sum_k \Delta_k E[\psi_k \psi_k^\top]`
    pull : Tensor, (feature, latent)
        :math:`\sum_k E[\psi_k (x_{k+1} - x_k)^\top]`
    """

    gram: Tensor
    pull: Tensor

    def regress(self, precision: Tensor, sd: Tensor) -> Weights:
        """The law of the weights.

        Parameters
        ----------
        precision : Tensor, (latent, latent)
            Of the noise.
        sd : Tensor, (feature)
            Of the prior.
        """
        share, basis = torch.linalg.eigh(precision)
        root, pulled = self._solved(share, basis, sd)
        covariance = torch.cholesky_inverse(root)
        mean = torch.cholesky_solve(pulled.mT.unsqueeze(-1), root).squeeze(-1).mT
        return Weights(sd[:, None] * mean @ basis.mT, basis, sd[:, None] * covariance * sd)

    def log_evidence(self, precision: Tensor, sd: Tensor) -> Tensor:
        """Log normaliser of the regression, (*draw), up to what the prior does not enter; see `regress`."""
        share, basis = torch.linalg.eigh(precision)
        root, pulled = self._solved(share, basis, sd)
        solved = torch.linalg.solve_triangular(root, pulled.mT.unsqueeze(-1), upper=False)
        return 0.5 * solved.square().sum((-3, -2, -1)) - root.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))

    def _solved(self, share: Tensor, basis: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
        """Roots of the precisions (*draw, latent, feature, feature) and linear parts (*draw, feature, latent).

        In units of the prior's standard deviations: waves of high frequency have tiny ones.
        """
        gram = sd.unsqueeze(-1) * self.gram * sd.unsqueeze(-2)
        eye = torch.eye(len(self.gram), dtype=sd.dtype)
        root = cholesky(gram.unsqueeze(-3) * share[:, None, None] + eye)
        return root, sd.unsqueeze(-1) * (self.pull @ basis) * share


def weight_statistics(
    features: Callable[[Tensor], Tensor], num_features: int, moments: Moments, steps: Tensor, rule: Rule
) -> WeightStatistics:
    """Of the laws of all trials, moments (trial, grid, ...); in parts of whole trials."""
    trials, points, dim = moments.mean.shape
    gram = torch.zeros(num_features, num_features, dtype=torch.float64)
    pull = torch.zeros(num_features, dim, dtype=torch.float64)
    share = max(1, CHUNK_NUMBERS // max(1, points * len(rule.weights) * num_features))
    for start in range(0, trials, share):
        mean, covariance, cross = moments.trials(start, share)
        before, spread = mean[:, :-1], covariance[:, :-1]
        root = cholesky(spread)
        states = before.unsqueeze(-2) + rule.nodes @ root.mT
        psi = features(states.flatten(-3, -2)).unflatten(-2, states.shape[-3:-1])
        weighted = psi * rule.weights[:, None]
        gram = gram + (weighted * steps[:, None, None]).flatten(0, 2).mT @ psi.flatten(0, 2)
        middle = weighted.sum(-2)
        slope = torch.linalg.solve_triangular(root.mT, rule.nodes.mT @ weighted, upper=True)  # (latent, feature)
        moved = mean[:, 1:] - before
        pull = pull + torch.einsum("kbm,kbd->md", middle, moved)
        pull = pull + torch.einsum("kbjm,kbjd->md", slope, cross - spread)
    return WeightStatistics(gram, pull)
