r"""Loadings, offsets and noise of every unit given the path: as many small regressions, all at once.

The proposal is the Gaussian that one Newton step from the present coefficients gives, corrected by the ratio of the two
ways; for a Gaussian readout it is the conditional itself and always accepted.

Reference: Gamerman, Stat. Comput. 7:57 (1997).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrodyn.conditionals.metropolis import acceptance_of
from pyrodyn.linalg.matrix import cholesky
from pyrodyn.readouts import Law

NOISE_STEPS = 4  # of the random walk of a unit's noise in a sweep: it mixes slower than all else
GOAL = 0.44  # its acceptance


@dataclass(frozen=True)
class UnitMoves:
    """Moves for all that belongs to units, each of which reads out some of the latents.

    Attributes
    ----------
    law : Law
        Of all units.
    windows : list of (Tensor of int, slice)
        Units, and the latents that they read out.
    offset_prior : Normal, (unit)
    noisy : Tensor of int
        Units whose law has a parameter of its own.
    noise_prior : distribution of it, or None
    mask : Tensor of bool, (trial, time, unit), or None
    """

    law: Law
    windows: list[tuple[Tensor, slice]]
    offset_prior: Any
    noisy: Tensor
    noise_prior: Any
    mask: Tensor | None

    def draw(self, state: dict[str, Tensor], values: Tensor, variance: Tensor, adapt: bool) -> None:
        """Loadings, offsets and noise of all units, (chain, ...), anew.

        ``values`` are (chain or 1, trial, time, unit), ``variance`` (chain or 1, unit) that of a unit's loadings a
        priori. With ``adapt`` the walks of the noise learn their steps.
        """
        path, values = state["path"].flatten(1, 2), values.flatten(1, 2)
        seen = None if self.mask is None else self.mask.flatten(0, 1)
        loading, offset, rates = state["loading"].clone(), state["offset"].clone(), []
        for units, place in self.windows:
            design = torch.cat([path[..., place], torch.ones_like(path[..., :1])], -1)
            held = torch.cat([loading[:, units, place], offset[:, units, None]], -1)
            mean = torch.zeros_like(held[:1])
            mean[..., -1] = self.offset_prior.mean[units]
            weight = variance[:, units].reciprocal().unsqueeze(-1)
            last = self.offset_prior.variance[units].reciprocal().expand(len(weight), -1).unsqueeze(-1)
            precision = torch.cat([weight.expand(-1, -1, held.shape[-1] - 1), last], -1)
            noise = state["noise"][:, None, units] if "noise" in state else None
            held, rate = draw_coefficients(
                self.law.of_units(units), noise, values[..., units], None if seen is None else seen[:, units], design,
                held, mean, precision,
            )  # fmt: skip
            loading[:, units, place], offset[:, units] = held[..., :-1], held[..., -1]
            rates.append(rate)
        state["loading"], state["offset"], state["unit_acceptance"] = loading, offset, torch.cat(rates, -1)
        if "noise" not in state:
            return
        own = self.noisy
        law, noise = self.law.of_units(own), state["noise"][:, own]
        predictor = path @ loading[:, own].mT + offset[:, own].unsqueeze(1)
        values, seen = values[..., own], None if seen is None else seen[:, own]
        for _ in range(NOISE_STEPS):
            noise, rate = draw_noise(law, self.noise_prior, noise, values, seen, predictor, state["noise_step"])
            if adapt:
                state["noise_step"] = state["noise_step"] * (0.3 * (rate - GOAL)).exp()
        state["noise"] = state["noise"].index_copy(1, own, noise)


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
    acceptance = acceptance_of(change)
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
    acceptance = acceptance_of(score(proposed) - score(noise))
    return torch.where(torch.rand_like(acceptance) < acceptance, proposed, noise), acceptance
