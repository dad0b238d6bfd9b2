r"""A path given parameters and observations, drawn anew: exactly for a Gaussian readout, by a Markov move otherwise.

Write :math:`p(x \mid y, \theta) \propto N(x; m, \Sigma) \, e^{r(x)}`, the Gaussian made of the prior of the path and a
quadratic *reference* for each log likelihood, and r what the reference leaves over. Hamiltonian dynamics with mass
:math:`\Sigma^{-1}` turn :math:`x - m` and the velocity into each other under the Gaussian, exactly, by any angle; r
only kicks the velocity. So a few kicks carry a path of any length to an almost independent one.

The reference is fixed while the chain runs, and so is no part of the target: a poor one costs acceptance, not truth.

Reference: Shahbaba, Lan, Johnson & Neal, Stat. Comput. 24:339 (2014), on splitting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyrodyn.conditionals.metropolis import acceptance_of
from pyrodyn.conditioning import gaussian_potential, path_evidence
from pyrodyn.distributions import GaussMarkov
from pyrodyn.program import trial_plate
from pyrodyn.readouts import AffineReadout, Gaussian
from pyrodyn.readouts.likelihood import PathLikelihood, outer
from pyrodyn.recording import Recording

KICKS = 2  # to a trajectory
# What an observation of a climb may lie beyond its mean, in sds of its noise; a single spike always may.
FARTHEST, SPIKE = 8.0, 1.0
LEAST_CURVATURE = 1e-6
SPREAD = 3  # pairs of paths over which a reference is averaged


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

    def levelled(self, mask: Tensor | None) -> Reference:
        """With the mean curvature of every unit in all bins in which it is seen, ``mask`` (trial, time, unit).

        If that is in all, the potential has one precision, and all trials share its factor.
        """
        if mask is None:
            return self._replace(curvature=self.curvature.mean((1, 2), keepdim=True))
        total = self.curvature.sum((1, 2), keepdim=True)
        return self._replace(curvature=torch.where(mask, total / mask.sum((0, 1)).clamp(min=1), 0.0))

    def potential(self, readout: AffineReadout) -> tuple[Tensor, Tensor]:
        """As a Gaussian potential on the path, precision and linear part."""
        pull = self.score + self.curvature * (self.centre - readout.offset)
        return outer(readout, self.curvature), pull @ readout.loading


class Leftover:
    """What a quadratic `Reference` leaves over of the log likelihood of a path, up to a constant.

    The quadratic is one in the path, whose few latents stand for many units: it is taken there.

    Parameters
    ----------
    readout : AffineReadout
    observations : Tensor, (chain or 1, trial, time, unit)
    precision, linear : Tensor
        The reference as a potential on the path.
    """

    def __init__(self, readout: AffineReadout, observations: Tensor, precision: Tensor, linear: Tensor) -> None:
        self.likelihood, self.precision, self.linear = PathLikelihood(readout, observations), precision, linear

    def value(self, path: Tensor) -> Tensor:
        """In every bin, (chain, trial, time)."""
        return self.likelihood.bins(path) - (path * (self.linear - 0.5 * self._pulled(path))).sum(-1)

    def __call__(self, path: Tensor) -> tuple[Tensor, Tensor]:
        """`value`, and its derivative in the path (chain, trial, time, latent)."""
        value, force = self.likelihood.slope(path)
        pulled = self._pulled(path)
        return value - (path * (self.linear - 0.5 * pulled)).sum(-1), force - self.linear + pulled

    def _pulled(self, path: Tensor) -> Tensor:
        return (self.precision @ path.unsqueeze(-1)).squeeze(-1)


def _averaged(
    readout: AffineReadout, centre: Tensor, spread: list[Tensor], observations: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores and curvatures of the log likelihood, averaged over predictors on both sides of a centre."""
    scores, curvatures = [], []
    for place, own, seen in readout.pieces(observations):
        middle, apart = centre[..., place, :], [part[..., place, :] for part in spread]
        sides = [middle + sign * part for part in apart for sign in (-1.0, 1.0)] or [middle]
        score, curvature = own.expand_bins(sides[0], seen)[1:]
        for side in sides[1:]:
            _, more, curved = own.expand_bins(side, seen)
            score, curvature = score + more, curvature + curved
        scores.append(score / len(sides))
        curvatures.append(curvature / len(sides))
    return torch.cat(scores, -2), torch.cat(curvatures, -2)


def gaussian_path(prior: GaussMarkov, readout: AffineReadout, observations: Tensor) -> Tensor:
    """A draw of the path under a Gaussian readout, independent of any earlier one."""
    near = prior.condition(*gaussian_potential(readout, observations))
    return near.draw(torch.randn(near.batch_shape + near.event_shape))


def turned_path(
    prior: GaussMarkov, readout: AffineReadout, observations: Tensor, path: Tensor, reference: Reference
) -> tuple[Tensor, Tensor]:
    """One Hamiltonian trajectory from ``path``, accepted or not in every trial by itself.

    Returns the path (chain, trial, time, latent) and the acceptance probability (chain, trial).
    """
    potential = reference.potential(readout)
    moved, acceptance = turn(prior.condition(*potential), Leftover(readout, observations, *potential), path)
    return moved, acceptance.squeeze(-1)


def turn(
    near: GaussMarkov,
    rest: Callable[[Tensor], tuple[Tensor, Tensor]],
    path: Tensor,
    block: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One Hamiltonian trajectory under ``near`` times exp of what it leaves over.

    Parameters
    ----------
    near : GaussMarkov
        Batch (chain, trial).
    rest : callable
        Of a path (chain, trial, time, latent): what ``near`` leaves over, in every bin (chain, trial, time), and its
        derivative in the path.
    path : Tensor, (chain, trial, time, latent)
    block : Tensor of int, (time,), optional
        Bins of one number are accepted or not together; those of -1 stay where they are and part the others. By default
        a trial is one block.

    Returns
    -------
    path : Tensor, (chain, trial, time, latent)
    acceptance : Tensor, (chain, trial, block)
    """
    if block is None:
        block = torch.zeros(path.shape[-2], dtype=torch.long)
    still = block < 0
    if bool(still.any()):
        near = parted(near, path, still)
    mean = near.mean
    angle = float(0.5 * math.pi * (0.8 + 0.4 * torch.rand(())) / KICKS)
    cosine, sine = math.cos(angle), math.sin(angle)
    velocity = torch.where(still.unsqueeze(-1), 0.0, near.draw(torch.randn_like(path)) - mean)
    place = path - mean

    def kick(size: float, place: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, force = rest(mean + place)
        force = torch.where(still.unsqueeze(-1), 0.0, force)
        moved = velocity + size * near._solve(force)
        return value, moved, 0.5 * size * (force * (velocity + moved)).sum(-1)

    before, velocity, work = kick(0.5 * angle, place, velocity)
    after = before
    for step in range(KICKS):
        place, velocity = cosine * place + sine * velocity, cosine * velocity - sine * place
        after, velocity, done = kick((0.5 if step == KICKS - 1 else 1.0) * angle, place, velocity)
        work = work + done
    change = after - before - work
    blocks = change.new_zeros(*change.shape[:-1], int(block.max()) + 1)
    change = blocks.index_add(-1, block.clamp(min=0), torch.where(still, 0.0, change))
    acceptance = acceptance_of(change)
    accepted = (torch.rand_like(acceptance) < acceptance)[..., block.clamp(min=0)] & ~still
    return torch.where(accepted.unsqueeze(-1), mean + place, path), acceptance


def parted(chain: GaussMarkov, path: Tensor, still: Tensor) -> GaussMarkov:
    """The chain given the bins of ``path`` that stay ``still`` (time,): there it is at its place, and falls apart."""
    upper, here = chain.upper, still.unsqueeze(-1)
    # What the neighbours on either side know of a bin that stays.
    ahead = (upper @ path[..., 1:, :].unsqueeze(-1)).squeeze(-1) * here[1:]
    behind = (upper.mT @ path[..., :-1, :].unsqueeze(-1)).squeeze(-1) * here[:-1]
    none = torch.zeros_like(ahead[..., :1, :])
    linear = chain.linear - torch.cat([ahead, none], -2) - torch.cat([none, behind], -2)
    eye = torch.eye(path.shape[-1], dtype=path.dtype)
    either = (still[:-1] | still[1:])[:, None, None]
    return GaussMarkov(
        torch.where(here.unsqueeze(-1), eye, chain.diagonal),
        torch.where(either, 0.0, upper),
        torch.where(here, path, linear),
    )


def settled(
    prior: GaussMarkov, readout: AffineReadout, observations: Tensor, reference: Reference | None, rounds: int
) -> Reference:
    """The reference about the mean path that it gives itself, scores and curvatures averaged over the path's spread.

    From predictors that do not move with the path, if there is none to start from.
    """
    if reference is None:
        still = readout.offset.expand(*readout.batch_shape, *readout.event_shape)
        reference = Reference.about(readout, still, observations)
    for _ in range(rounds):
        near = prior.condition(*reference.potential(readout))
        mean = readout.predict(near.mean)
        # A full step under exp() can overshoot from afar.
        centre = reference.centre + (mean - reference.centre).clamp(-2.0, 2.0)
        spread = [readout.predict(near.draw(torch.randn_like(near.mean))) - mean for _ in range(SPREAD)]
        reference = Reference(centre, *_averaged(readout, centre, spread, observations))
    return reference


@dataclass(frozen=True)
class Levelled:
    """A program with its path integrated out under pseudo-observations, as if they were Gaussian.

    Their noise is the same in all bins, so that all trials share one factorisation and a gradient costs a twentieth of
    that under a `Reference`, whose curvature changes from bin to bin. Where the centre is the path's mean, the slope in
    the parameters is nearly the same.
    """

    model: Any
    values: Tensor  # (trial, time, unit)
    noise: Tensor  # (unit)

    def __call__(self, recording: Recording) -> Tensor:
        prior, readout = factors(self.model, self.model.sample_globals(recording), recording)
        evidence = path_evidence(prior, _as_gaussian(readout, self.noise), self.values)
        with trial_plate(recording):
            pyro.factor("observations", evidence)
        return evidence


def levelled(
    model: Any, parameters: Any, recording: Recording, centre: Tensor | None, rounds: int
) -> tuple[Levelled, Tensor]:
    """Pseudo-observations about the mean path that they give themselves, and its predictor (trial, time, unit).

    Scores and curvatures are averaged over the path's spread. Without a ``centre`` to start from, predictors do not
    move with the path at first.
    """
    prior, readout = factors(model, parameters, recording)
    observations, mask = recording.values, recording.mask
    seen = observations[..., 0].numel() if mask is None else mask.sum((0, 1)).clamp(min=1)
    if centre is None:
        centre = readout.offset.expand(*readout.batch_shape, *readout.event_shape)

    def about(centre: Tensor, spread: list[Tensor]) -> Levelled:
        score, curvature = _averaged(readout, centre, spread, observations)
        level = (curvature.reshape(observations.shape).sum((0, 1)) / seen).clamp(min=LEAST_CURVATURE)
        # A burst of a unit that is nearly silent would be an observation hundreds of nats away. A single spike is kept
        # whole: without it the mean of such a unit would not be at its offset.
        most = (FARTHEST * level.sqrt()).clamp(min=SPIKE)
        return Levelled(model, (centre + score.clamp(-most, most) / level).reshape(observations.shape), level.rsqrt())

    found = about(centre, [])
    for _ in range(rounds):
        near = prior.condition(*gaussian_potential(_as_gaussian(readout, found.noise), found.values))
        mean = readout.predict(near.mean)
        centre = centre + (mean - centre).clamp(-2.0, 2.0)
        found = about(centre, [readout.predict(near.draw(torch.randn_like(near.mean))) - mean for _ in range(SPREAD)])
    return found, centre


def _as_gaussian(readout: AffineReadout, noise: Tensor) -> AffineReadout:
    """The same predictors, seen with Gaussian noise of these sds (unit)."""
    offset = readout.offset.squeeze(-2)
    return AffineReadout(Gaussian(), readout.path, readout.loading, offset, noise.expand_as(offset), readout.observed)


def factors(model: Any, parameters: Any, recording: Recording) -> tuple[GaussMarkov, AffineReadout]:
    """Prior of the path, and the readout: of the latter its parts are wanted, so that its path is one of zeros."""
    prior = model.latent_path(parameters, recording)
    zeros = prior.linear.new_zeros(recording.num_trials, *prior.event_shape)
    return prior, model.readout_law(parameters, zeros, recording)
