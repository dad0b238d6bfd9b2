r"""A path given parameters and observations, drawn anew: exactly for a Gaussian readout, by a Markov move otherwise.

Write :math:`p(x \mid y, \theta) \propto N(x; m, \Sigma) \, e^{r(x)}`, with the Gaussian made of the prior of the path and a
quadratic *reference* for each log likelihood, and r what the reference leaves over. Hamiltonian dynamics with mass
:math:`\Sigma^{-1}` turn :math:`x - m` and the velocity into each other under the Gaussian, exactly, whatever the angle;
r only kicks the velocity. So a few kicks carry a path of any length to an almost independent one.

The reference is fixed while the chain runs, and so is no part of the target: a poor one costs acceptance, not truth.

Reference: Shahbaba, Lan, Johnson & Neal, Stat. Comput. 24:339 (2014), on splitting.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodyn.conditioning import gaussian_potential, outer
from pyrodyn.distributions import GaussMarkov
from pyrodyn.readouts import AffineReadout

KICKS = 2  # to a trajectory
LEAST_CURVATURE = 1e-6


class Reference(NamedTuple):
    """A quadratic in each predictor, (chain or 1, trial, time, unit): its gradient and curvature at ``centre``."""

    centre: Tensor
    score: Tensor
    curvature: Tensor

    @classmethod
    def about(cls, readout: AffineReadout, predictor: Tensor, observations: Tensor) -> Reference:
        """The expansion of the log likelihood about a predictor."""
        _, score, curvature = readout.expand_log(predictor, observations)
        return cls(predictor, score, curvature)

    def potential(self, readout: AffineReadout) -> tuple[Tensor, Tensor]:
        """As a Gaussian potential on the path, precision and linear part."""
        pull = self.score + self.curvature * (self.centre - readout.offset)
        return outer(readout, self.curvature), pull @ readout.loading

    def rest(self, readout: AffineReadout, predictor: Tensor, observations: Tensor) -> tuple[Tensor, Tensor]:
        """What the reference leaves over: value (*batch) and derivative in the predictor (*batch, time, unit)."""
        fit, score, _ = readout.expand_log(predictor, observations)
        apart = predictor - self.centre
        slope = torch.addcmul(self.score, self.curvature, apart, value=-1.0)
        return fit - 0.5 * (apart * (self.score + slope)).sum((-2, -1)), score - slope


def gaussian_path(prior: GaussMarkov, readout: AffineReadout, observations: Tensor) -> Tensor:
    """A draw of the path under a Gaussian readout, independent of any earlier one."""
    near = prior.condition(*gaussian_potential(readout, observations))
    return near.draw(torch.randn(near.batch_shape + near.event_shape))


def nearby_path(
    prior: GaussMarkov, readout: AffineReadout, observations: Tensor, path: Tensor
) -> tuple[Tensor, Reference]:
    """An approximate draw: from the Laplace approximation after one Newton step from ``path``. For warm-up alone."""
    first = Reference.about(readout, readout.predict(path), observations)
    mean = prior.condition(*first.potential(readout)).mean
    # A Newton step under exp() can overshoot from afar; halfway is closer than all the way.
    predictor = readout.predict(path) + (readout.predict(mean) - readout.predict(path)).clamp(-2.0, 2.0)
    reference = Reference.about(readout, predictor, observations)
    near = prior.condition(*reference.potential(readout))
    return near.draw(torch.randn_like(path)), reference


def turned_path(
    prior: GaussMarkov, readout: AffineReadout, observations: Tensor, path: Tensor, reference: Reference
) -> tuple[Tensor, Tensor]:
    """One Hamiltonian trajectory from ``path``, accepted or not in every trial by itself.

    Returns the path (chain, trial, time, latent) and the acceptance probability (chain, trial).
    """
    near = prior.condition(*reference.potential(readout))
    mean = near.mean
    angle = float(0.5 * math.pi * (0.8 + 0.4 * torch.rand(())) / KICKS)
    cosine, sine = math.cos(angle), math.sin(angle)
    velocity = near.draw(torch.randn_like(path)) - mean
    place = path - mean

    def kick(size: float, place: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rest, slope = reference.rest(readout, readout.predict(mean + place), observations)
        force = slope @ readout.loading
        moved = velocity + size * near._solve(force)
        return rest, moved, 0.5 * size * (force * (velocity + moved)).sum((-2, -1))

    before, velocity, work = kick(0.5 * angle, place, velocity)
    after = before
    for step in range(KICKS):
        place, velocity = cosine * place + sine * velocity, cosine * velocity - sine * place
        after, velocity, done = kick((0.5 if step == KICKS - 1 else 1.0) * angle, place, velocity)
        work = work + done
    change = torch.nan_to_num(after - before - work, -torch.inf, torch.inf, -torch.inf)
    acceptance = change.clamp(max=0.0).exp()
    accepted = torch.rand_like(acceptance) < acceptance
    return torch.where(accepted[..., None, None], mean + place, path), acceptance
