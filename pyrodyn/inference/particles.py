r"""The error of a Laplace evidence, measured by particles and taken away.

The Laplace approximation of a path replaces each factor :math:`p(y_t \mid x_t)` by its second-order expansion
:math:`g_t(x_t)` at the mode, and its evidence is exactly that of the chain :math:`q(x) \propto p(x) \prod_t g_t(x_t)`.
So

.. math:: p(y) = \hat p(y)\; E_q\Big[\prod_t \frac{p(y_t \mid x_t)}{g_t(x_t)}\Big],

and the expectation is a particle filter's: draw :math:`x_t \mid x_{t-1}` from q, weight, resample when the weights are
uneven. The estimate of p(y) is unbiased. Weights over whole paths would have infinite variance already for short
recordings.

References
----------
Chopin & Papaspiliopoulos, *An Introduction to Sequential Monte Carlo*, Springer 2020, ch. 10 (guided filters).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyrodyn.conditioning import laplace_evidence, laplace_path
from pyrodyn.distributions import GaussMarkov
from pyrodyn.linalg.matrix import cholesky
from pyrodyn.readouts import AffineReadout


def particle_evidence(
    prior: GaussMarkov, readout: AffineReadout, observations: Tensor, *, particles: int = 200
) -> tuple[Tensor, Tensor]:
    """Log p(y | parameters) of every trial, and its Laplace approximation, both (*draw, trial).

    Parameters
    ----------
    prior : GaussMarkov, batch (*draw, trial) or (*draw, 1)
    readout : AffineReadout, batch (*draw, trial)
    observations : Tensor, (trial, time, unit)
    particles : int
        For every draw and trial.

    Notes
    -----
    Random, from torch's current state: fresh noise at every call, so never to be used inside HMC.
    """
    with torch.no_grad():
        law = laplace_path(prior, readout, observations)
        correction = _filter(law, _excess(law, readout, observations), particles)
        laplace = laplace_evidence(prior, readout, observations)
    return laplace + correction, laplace


def _excess(law: GaussMarkov, readout: AffineReadout, observations: Tensor) -> Callable[[int, Tensor], Tensor]:
    """log p(y_t | x_t) - log g_t(x_t) of states (*batch, particle, latent) at bin t, (*batch, particle)."""
    at_mode = readout.predict(law.mean)
    base = readout.law.log_prob(at_mode, readout.noise, observations)
    slope, curvature = readout.score(at_mode, observations), readout.curvature(at_mode, observations)

    def excess(bin_: int, state: Tensor) -> Tensor:
        predictor = state @ readout.loading.mT + readout.offset
        moved = predictor - at_mode[..., bin_, None, :]
        exact = readout.law.log_prob(predictor, readout.noise, observations[:, bin_, None, :])
        expansion = (
            base[..., bin_, None, :]
            + slope[..., bin_, None, :] * moved
            - 0.5 * curvature[..., bin_, None, :] * moved.square()
        )
        difference = exact - expansion
        if readout.observed is not None:
            difference = torch.where(readout.observed[:, bin_, None, :], difference, 0.0)
        return difference.sum(-1)

    return excess


def _filter(law: GaussMarkov, excess: Callable[[int, Tensor], Tensor], particles: int) -> Tensor:
    """log E_q of the product of exp(excess) along the chain; sequential, because resampling is."""
    mean, covariance, cross = law.mean, law.covariance, law.cross_covariance
    gains = torch.cholesky_solve(cross, cholesky(covariance[..., :-1, :, :])).mT
    later = covariance[..., 1:, :, :] - gains @ cross
    roots = torch.cat([cholesky(covariance[..., :1, :, :]), cholesky(0.5 * (later + later.mT))], -3)
    batch, (bins, dim) = law.batch_shape, law.event_shape
    log_weight = mean.new_full((*batch, particles), -math.log(particles))
    total, deviation = mean.new_zeros(batch), mean.new_zeros(*batch, particles, dim)
    for bin_ in range(bins):
        noise = torch.randn(*batch, particles, dim, dtype=mean.dtype)
        carried = deviation @ gains[..., bin_ - 1, :, :].mT if bin_ else 0.0
        deviation = carried + noise @ roots[..., bin_, :, :].mT
        log_weight = log_weight + excess(bin_, mean[..., bin_, None, :] + deviation)
        step = log_weight.logsumexp(-1)
        total = total + step
        log_weight = log_weight - step.unsqueeze(-1)
        (deviation,), log_weight = resample((deviation,), log_weight)
    return total


def resample(particles: tuple[Tensor, ...], log_weight: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Particles (*batch, particle, number) drawn anew by their weights (*batch, particle) where these are uneven."""
    count = log_weight.shape[-1]
    poor = (-(2.0 * log_weight).logsumexp(-1)).exp() < 0.5 * count
    if not bool(poor.any()):
        return particles, log_weight
    chosen = _systematic(log_weight.exp()).unsqueeze(-1)
    drawn = tuple(
        torch.where(poor[..., None, None], held.gather(-2, chosen.expand(*chosen.shape[:-1], held.shape[-1])), held)
        for held in particles
    )
    return drawn, torch.where(poor.unsqueeze(-1), -math.log(count), log_weight)


def _systematic(weight: Tensor) -> Tensor:
    """Systematic resampling: positions (*batch, particle) for weights that sum to one."""
    count = weight.shape[-1]
    comb = (torch.arange(count) + torch.rand(*weight.shape[:-1], 1, dtype=weight.dtype)) / count
    return torch.searchsorted(weight.cumsum(-1).contiguous(), comb.contiguous()).clamp(max=count - 1)
