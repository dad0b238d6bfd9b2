r"""The steps of a path under switching linear dynamics, given its modes: conjugate regressions, one for each mode.

With :math:`\zeta_t` the regressors of a step (earlier bins, a constant, inputs), in mode k

.. math:: x_t = W_k^\top \zeta_t + \epsilon_t, \qquad \epsilon_t \sim N(0, \Lambda_k^{-1}), \qquad
    W_{k,ij} \sim N(m_{ij}, s_i^2), \qquad \Lambda_k \sim \mathrm{Wishart}(\nu, I / \psi).

Each of W and :math:`\Lambda` is drawn given the other; all modes and chains at once.

Reference: Gelman et al., *Bayesian Data Analysis*, 3rd ed. 2013, section 14.2 and appendix A.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrodyn.distributions import GaugedLoading, GaussMarkov
from pyrodyn.linalg.matrix import cholesky


class StepSums(NamedTuple):
    """Second moments of the steps that belong to each mode, (chain, mode, ...)."""

    count: Tensor  # (chain, mode)
    gram: Tensor  # (chain, mode, regressor, regressor)
    cross: Tensor  # (chain, mode, regressor, latent)
    square: Tensor  # (chain, mode, latent, latent)

    def of(self, rows: Tensor, place: slice) -> StepSums:
        """Those of the steps of some latents, regressed on ``rows`` (regressor,) alone."""
        gram = self.gram[..., rows, :][..., rows]
        return StepSums(self.count, gram, self.cross[..., rows, place], self.square[..., place, place])

    def residual(self, coefficients: Tensor) -> Tensor:
        """Sum of outer products of what W (chain, mode, regressor, latent) leaves over, (chain, mode, latent,
        latent)."""
        fitted = coefficients.mT @ self.cross
        return self.square - fitted - fitted.mT + coefficients.mT @ self.gram @ coefficients


def step_sums(
    path: Tensor, weight: Tensor, lags: int, inputs: Tensor | None = None, law: GaussMarkov | None = None
) -> StepSums:
    """Sums over the steps of all trials.

    Parameters
    ----------
    path : Tensor, (chain, trial, time, latent)
    weight : Tensor, (chain, trial, time, mode)
        One for the mode of the bin and zero for the others, or probabilities; zero for bins that do not count.
    lags : int
    inputs : Tensor, (trial, time, input), optional
    law : GaussMarkov, optional
        With it sums are expected ones: ``path`` is its mean. For one lag alone.
    """
    regressors = step_regressors(path, lags, inputs)
    both = torch.cat([regressors, path[..., lags:, :]], -1).flatten(1, 2)
    of_modes = weight[..., lags:, :].flatten(1, 2)
    total = (both.unsqueeze(1) * of_modes.mT.unsqueeze(-1)).mT @ both.unsqueeze(1)
    count, wide, dim = of_modes.sum(-2), regressors.shape[-1], path.shape[-1]
    if law is not None:

        def spread(blocks: Tensor) -> Tensor:
            return (of_modes.mT @ blocks.flatten(1, 2).flatten(-2)).unflatten(-1, (dim, dim))

        between = spread(law.cross_covariance)
        total[..., :dim, :dim] += spread(law.covariance[..., :-1, :, :])
        total[..., wide:, wide:] += spread(law.covariance[..., 1:, :, :])
        total[..., :dim, wide:] += between
        total[..., wide:, :dim] += between.mT
    return StepSums(count, total[..., :wide, :wide], total[..., :wide, wide:], total[..., wide:, wide:])


def step_regressors(path: Tensor, lags: int, inputs: Tensor | None = None) -> Tensor:
    """What enters every step after the first ``lags`` bins, (chain, trial, time - lags, regressor)."""
    bins = path.shape[-2]
    parts = [path[..., lags - 1 - lag : bins - 1 - lag, :] for lag in range(lags)]
    parts.append(torch.ones_like(parts[0][..., :1]))
    if inputs is not None:
        parts.append(inputs[:, lags:].expand(*path.shape[:-2], -1, -1))
    return torch.cat(parts, -1)


def draw_coefficients(sums: StepSums, precision: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """W (chain, mode, regressor, latent) given the precision (chain, mode, latent, latent) of its noise.

    ``mean`` (regressor, latent) and ``sd`` (regressor,) are those of the prior.
    """
    centre, root = coefficient_posterior(sums, precision, mean, sd)
    noise = torch.randn(*centre.shape[:2], root.shape[-1], 1, dtype=centre.dtype)
    apart = torch.linalg.solve_triangular(root.mT, noise, upper=True)
    return centre + apart.squeeze(-1).unflatten(-1, centre.shape[-2:])


def coefficient_posterior(sums: StepSums, precision: Tensor, mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of W (chain, mode, regressor, latent), and root of the precision of its flattened entries."""
    wide, dim = sums.cross.shape[-2:]
    weight = sd.square().reciprocal()
    hessian = (sums.gram[..., :, None, :, None] * precision[..., None, :, None, :]).flatten(-4, -3).flatten(-2)
    root = cholesky(hessian + torch.diag(weight.repeat_interleave(dim)))
    pull = (sums.cross @ precision + weight.unsqueeze(-1) * mean).flatten(-2).unsqueeze(-1)
    return torch.cholesky_solve(pull, root).squeeze(-1).unflatten(-1, (wide, dim)), root


def draw_precision(sums: StepSums, coefficients: Tensor, scale: Tensor, degrees: float) -> Tensor:
    r""":math:`\Lambda` (chain, mode, latent, latent) given W, with the prior's ``scale`` :math:`\psi` (chain,)."""
    dim = sums.cross.shape[-1]
    eye = torch.eye(dim, dtype=scale.dtype)
    total = scale[:, None, None, None] * eye + sums.residual(coefficients)
    drawn = bartlett(degrees + sums.count, dim)
    root = torch.linalg.solve_triangular(cholesky(total).mT, drawn, upper=True)
    return root @ root.mT


def bartlett(degrees: Tensor, dim: int) -> Tensor:
    """Roots (*batch, dim, dim), lower triangular, of Wishart matrices with ``degrees`` (*batch) and identity scale."""
    below = GaugedLoading(dim, dim, tuple(range(dim))).sample(degrees.shape)
    freedom = degrees.unsqueeze(-1) - torch.arange(dim, dtype=degrees.dtype)
    diagonal = (2.0 * torch._standard_gamma(0.5 * freedom)).sqrt()
    return below.tril(-1) + torch.diag_embed(diagonal)


def draw_scale(precision: Tensor, freedom: float, shape: float, rate: float) -> Tensor:
    r""":math:`\psi \sim \mathrm{Gamma}` (shape, rate) given the precisions of all modes, (chain,).

    ``freedom`` is the number of latents times their degrees of freedom, of one mode.
    """
    total = precision.diagonal(dim1=-2, dim2=-1).sum((-2, -1))
    gamma = torch._standard_gamma(torch.full_like(total, shape + 0.5 * precision.shape[1] * freedom))
    return gamma / (rate + 0.5 * total)
