r"""Loadings, offsets and noise of every unit given the path: as many small regressions, all at once.

The proposal is the Gaussian that one Newton step from the present coefficients gives, corrected by the ratio of the two
ways; for a Gaussian readout it is the conditional itself and always accepted.

Reference: Gamerman, Stat. Comput. 7:57 (1997).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrodyn.linalg.matrix import cholesky
from pyrodyn.readouts import Law


def draw_coefficients(
    law: Law,
    noise: Tensor | None,
    values: Tensor,
    seen: Tensor | None,
    regressors: Tensor,
    coefficients: Tensor,
    mean: Tensor,
    precision: Tensor,
) -> tuple[Tensor, Tensor]:
    """Regression coefficients of every unit anew.

    Parameters
    ----------
    law : Law
    noise : Tensor, (chain, 1, unit), or None
    values : Tensor, (chain or 1, bin, unit)
    seen : Tensor of bool, (bin, unit), or None
    regressors : Tensor, (chain, bin, regressor)
    coefficients : Tensor, (chain, unit, regressor)
    mean, precision : Tensor, (chain or 1, unit, regressor)
        Of the normal prior.

    Returns
    -------
    coefficients : Tensor, (chain, unit, regressor)
    acceptance : Tensor, (chain, unit)
    """
    upper = torch.triu_indices(regressors.shape[-1], regressors.shape[-1])
    pairs = regressors[..., upper[0]] * regressors[..., upper[1]]

    def expand(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log posterior, and the Gaussian about one Newton step: its mean and the root of its precision."""
        predictor = regressors @ at.mT
        fit, score, curvature = law.expand_log(predictor, noise, values)
        if seen is not None:
            fit, score, curvature = (torch.where(seen, part, 0.0) for part in (fit, score, curvature))
        apart = at - mean
        value = fit.sum(-2) - 0.5 * (precision * apart.square()).sum(-1)
        slope = score.mT @ regressors - precision * apart
        packed = curvature.mT @ pairs
        hessian = packed.new_empty(*packed.shape[:-1], *(2 * regressors.shape[-1:]))
        hessian[..., upper[0], upper[1]] = packed
        hessian[..., upper[1], upper[0]] = packed
        root = cholesky(hessian + torch.diag_embed(precision))
        return value, at + torch.cholesky_solve(slope.unsqueeze(-1), root).squeeze(-1), root

    def density(at: Tensor, centre: Tensor, root: Tensor) -> Tensor:
        white = (root.mT @ (at - centre).unsqueeze(-1)).squeeze(-1)
        return root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * white.square().sum(-1)

    value, centre, root = expand(coefficients)
    noise_ = torch.randn_like(coefficients).unsqueeze(-1)
    proposed = centre + torch.linalg.solve_triangular(root.mT, noise_, upper=True).squeeze(-1)
    if law.is_gaussian:
        return proposed, torch.ones_like(value)
    ahead, back, back_root = expand(proposed)
    change = ahead - value + density(coefficients, back, back_root) - density(proposed, centre, root)
    acceptance = torch.nan_to_num(change, -torch.inf, torch.inf, -torch.inf).clamp(max=0.0).exp()
    accepted = torch.rand_like(acceptance) < acceptance
    return torch.where(accepted.unsqueeze(-1), proposed, coefficients), acceptance


def draw_noise(
    law: Law, prior: Any, noise: Tensor, values: Tensor, seen: Tensor | None, predictor: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """The law's own parameter (chain, unit) by a random walk of its logarithm; returns it and the acceptance."""

    def score(at: Tensor) -> Tensor:
        fit = law.log_prob(predictor, at.unsqueeze(-2), values)
        fit = fit if seen is None else torch.where(seen, fit, 0.0)
        return fit.sum(-2) + prior.log_prob(at) + at.log()

    proposed = noise * (step * torch.randn_like(noise)).exp()
    acceptance = torch.nan_to_num(score(proposed) - score(noise), -torch.inf).clamp(max=0.0).exp()
    return torch.where(torch.rand_like(acceptance) < acceptance, proposed, noise), acceptance
