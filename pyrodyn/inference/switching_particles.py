r"""The evidence of a path whose dynamics switch, by particles: modes summed out exactly, the path by weights.

A Gauss-Markov chain near the posterior proposes states, and now and then the model itself does: where the posterior has
several humps, a chain sits on one of them, and the mixture keeps all weights bounded. Each particle carries the
probabilities of the mode given its own states so far, so that its weight

.. math:: w_t = p(y_t \mid x_t) \, \frac{\sum_k p(z_t = k \mid x_{1:t-1}) \, p(x_t \mid x_{t-1}, z_t = k)}
    {q(x_t \mid x_{t-1})}

is exact, q being the mixture. The estimate of p(y) is unbiased, whatever the chain; one far from the posterior makes
it noisy.

References
----------
Doucet, de Freitas, Murphy & Russell, UAI 2000 (summing out by particles); Chopin & Papaspiliopoulos, *An Introduction
to Sequential Monte Carlo*, Springer 2020, ch. 10 (guided filters); Hesterberg, Technometrics 37:185 (1995) (mixtures).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrodyn.conditionals.modes import settle
from pyrodyn.distributions import GaussMarkov, SwitchingPath
from pyrodyn.inference.particles import resample
from pyrodyn.linalg.matrix import broadcast_shapes, cholesky
from pyrodyn.readouts import AffineReadout

SETTLING = 20  # rounds in which the chain of the proposals is found
FROM_MODEL = 0.2  # share of the states that the model proposes
TINY = torch.finfo(torch.float64).tiny
WIDER = 1.2  # factor of the proposals' standard deviation: weights of one that is too narrow are unbounded


def switching_evidence(
    law: SwitchingPath, readout: AffineReadout, observations: Tensor, *, particles: int = 200
) -> tuple[Tensor, Tensor]:
    """Log p(y | parameters) of every trial by particles, and the bound of a product of path and modes, (*draw, trial).

    Parameters
    ----------
    law : SwitchingPath, batch (*draw, trial) or (*draw, 1)
    readout : AffineReadout, batch (*draw, trial)
    observations : Tensor, (trial, time, unit)
    particles : int
        For every draw and trial.

    Notes
    -----
    Random, from torch's current state: fresh noise at every call, so never to be used inside HMC.
    """
    with torch.no_grad():
        batch = broadcast_shapes(law.batch_shape, readout.batch_shape)
        found = settle(law, readout, observations, tuple(batch), SETTLING)
        return _filter(law, found.chain, readout, observations, particles), found.bound


def _filter(
    law: SwitchingPath, chain: GaussMarkov, readout: AffineReadout, observations: Tensor, particles: int
) -> Tensor:
    mean, covariance, cross = chain.mean, chain.covariance, chain.cross_covariance
    gains = torch.cholesky_solve(cross, cholesky(covariance[..., :-1, :, :])).mT
    later = covariance[..., 1:, :, :] - gains @ cross
    roots = WIDER * torch.cat([cholesky(covariance[..., :1, :, :]), cholesky(0.5 * (later + later.mT))], -3)
    batch, (bins, dim) = mean.shape[:-2], law.event_shape
    steps = _Steps(law)
    log_weight = mean.new_full((*batch, particles), -math.log(particles))
    total, state = mean.new_zeros(batch), mean.new_zeros(*batch, particles, dim)
    modes = law.initial.unsqueeze(-2).expand(*batch, particles, -1)
    for bin_ in range(bins):
        before, centre = state, mean[..., bin_, None, :]
        if bin_:
            centre = centre + (before - mean[..., bin_ - 1, None, :]) @ gains[..., bin_ - 1, :, :].mT
            coming = steps.predicted(bin_, before, modes)
            own = steps.sample(bin_, before, coming)
        else:
            own = steps.sample_start(before)
        root = roots[..., bin_, :, :]
        by_chain = centre + torch.randn_like(before) @ root.mT
        state = torch.where(torch.rand(*batch, particles, 1, dtype=mean.dtype) < FROM_MODEL, own, by_chain)
        if bin_:
            joint = coming + steps.log_density(bin_, before, state)
            moved = joint.logsumexp(-1)
            modes = joint - moved.unsqueeze(-1)
        else:
            moved = steps.log_start(state)
        of_chain = gaussian_log_density(state - centre, root)
        proposed = torch.logaddexp(math.log(FROM_MODEL) + moved, math.log(1.0 - FROM_MODEL) + of_chain)
        predictor = state @ readout.loading.mT + readout.offset
        fit = readout.law.log_prob(predictor, readout.noise, observations[..., bin_, None, :])
        if readout.observed is not None:
            fit = torch.where(readout.observed[:, bin_, None, :], fit, 0.0)
        log_weight = log_weight + moved + fit.sum(-1) - proposed
        step = log_weight.logsumexp(-1)
        total, log_weight = total + step, log_weight - step.unsqueeze(-1)
        (state, modes), log_weight = resample((state, modes), log_weight)
    return total


class _Steps:
    """What each particle's step costs under each mode."""

    def __init__(self, law: SwitchingPath) -> None:
        self.law = law
        inverse, self.log_scale = law._whitening
        self.step = torch.cat([inverse, -(inverse @ law.dynamics)], -1).flatten(-3, -2).mT
        self.root = torch.linalg.solve_triangular(
            inverse, torch.eye(inverse.shape[-1], dtype=inverse.dtype), upper=False
        )
        self.table = law.transition.exp()
        self.drift = (inverse.unsqueeze(-4) @ law.drift.unsqueeze(-1)).squeeze(-1)

    def log_start(self, state: Tensor) -> Tensor:
        """Log p(x_1), (*batch, particle)."""
        apart = state - self.law.start_mean.unsqueeze(-2)
        return gaussian_log_density(apart, cholesky(self.law.start_covariance))

    def sample_start(self, like: Tensor) -> Tensor:
        """First states of the shape of ``like``, (*batch, particle, latent)."""
        root = cholesky(self.law.start_covariance)
        return self.law.start_mean.unsqueeze(-2) + torch.randn_like(like) @ root.mT

    def sample(self, bin_: int, before: Tensor, coming: Tensor) -> Tensor:
        """States after ``before`` (*batch, particle, latent), whose modes have log probabilities ``coming``."""
        uniform = torch.rand(*coming.shape[:-1], 1, dtype=coming.dtype)
        mode = (coming.exp().cumsum(-1) < uniform).sum(-1, keepdim=True).clamp(max=coming.shape[-1] - 1)
        drift = self._drift(bin_)
        lagged = (before @ self.step[..., before.shape[-1] :, :]).unflatten(-1, drift.shape[-2:])
        centres = drift - lagged  # of the whitened state, (*batch, particle, mode, latent)
        white = centres.take_along_dim(mode.unsqueeze(-1), -2).squeeze(-2) + torch.randn_like(before)
        # One product for all modes, and then the mode's own: cheaper than gathering a matrix for every particle.
        moved = white.unsqueeze(-3) @ self.root.mT  # (*batch, mode, particle, latent)
        return moved.take_along_dim(mode.unsqueeze(-3), -3).squeeze(-3)

    def log_density(self, bin_: int, before: Tensor, state: Tensor) -> Tensor:
        """Log p(x_t | x_t-1, z_t), (*batch, particle, mode)."""
        drift = self._drift(bin_)
        white = (torch.cat([state, before], -1) @ self.step).unflatten(-1, drift.shape[-2:]) - drift
        constant = self.log_scale + 0.5 * drift.shape[-1] * math.log(2.0 * math.pi)
        return -0.5 * white.square().sum(-1) - constant.unsqueeze(-2)

    def predicted(self, bin_: int, before: Tensor, modes: Tensor) -> Tensor:
        """Log p(z_t | x_1 ... x_t-1), (*batch, particle, mode), from that of the mode before.

        What state and input add to the logits is the same from all modes, so that normalising the rows of every
        particle's transitions is a product with one matrix, and needs no matrix for each.
        """
        law, share = self.law, modes.exp()
        if law.recurrence is None and law.push is None:
            return (share @ self.table).clamp(min=TINY).log()
        logits = before.new_zeros(())
        if law.recurrence is not None:
            logits = before @ law.recurrence.mT
        if law.push is not None:
            logits = logits + law.push[..., min(bin_ - 1, law.push.shape[-2] - 1), None, :]
        drawn = (logits - logits.amax(-1, keepdim=True)).exp()
        share = share / (drawn @ self.table.mT).clamp(min=TINY)
        return ((share @ self.table) * drawn).clamp(min=TINY).log()

    def _drift(self, bin_: int) -> Tensor:
        return self.drift[..., min(bin_ - 1, self.drift.shape[-3] - 1), None, :, :]


def gaussian_log_density(apart: Tensor, root: Tensor) -> Tensor:
    """Log density (*batch, particle) at a distance ``apart`` (*batch, particle, latent) from the mean."""
    white = torch.linalg.solve_triangular(root.expand(*apart.shape[:-2], -1, -1), apart.mT, upper=False)
    log_scale = root.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    return -0.5 * white.square().sum(-2) - log_scale - 0.5 * apart.shape[-1] * math.log(2.0 * math.pi)
