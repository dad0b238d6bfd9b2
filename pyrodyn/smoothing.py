r"""What observations say of the path of a nonlinear diffusion: the nearest Gauss-Markov law, by natural gradients.

The path of :math:`dx = f(x)\,dt + L\,dW` on a grid is not Gaussian. Among all Gauss-Markov laws q of it the bound

.. math:: \mathcal{L}(q) = E_q[\log p(y \mid x)] + E_q[\log p(x)] + H(q)

is climbed in the natural parameters :math:`\lambda` of q, along the gradient in its mean parameters :math:`\mu`:

.. math:: \lambda \leftarrow (1 - \rho) \lambda + \rho \nabla_\mu E_q[\log p(y, x)] .

With a linear drift and Gaussian observations the gradient does not depend on q, and one step with :math:`\rho = 1` ends
at the smoother. Expectations under a normal state are taken by Gauss-Hermite quadrature, which is exact there.

References: Khan & Lin, AISTATS 2017 (conjugate-computation variational inference); for diffusions Verma, Adam & Solin,
AISTATS 2024, and Hu, Smith & Linderman, "SING: SDE inference via natural gradients" (2025).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodyn.distributions import GaussMarkov
from pyrodyn.expectations import (
    CHUNK_NUMBERS,
    TRIAL_AXES,
    Diffusion,
    Moments,
    ObservationTerms,
    Rule,
    expected_log_likelihood,
    expected_start,
    expected_steps,
    moments_of,
    outer_product,
    step_volume,
)
from pyrodyn.readouts import AffineReadout

FALL = 1e-9  # relative fall of the bound that rounding may cause
FIRST_RATE = 0.5  # of natural steps from afar
NARROW = 0.1  # variance of the paths near zero that careful steps start from
LEAST_RATE = 1e-8  # of a natural step; one that is still no law leaves the path where it was


class Target(NamedTuple):
    """What is expanded: a diffusion, seen at ``bins`` of its grid.

    Attributes
    ----------
    diffusion : Diffusion
    readout : callable
        Of a path at the bins (*draw, trial, time, latent): the readout of it.
    observations : Tensor, (trial, time, unit), or None
    bins : Tensor, (time)
        Positions of the bins in the grid.
    """

    diffusion: Diffusion
    readout: Callable[[Tensor], AffineReadout]
    observations: Tensor | None
    bins: Tensor

    def seen(self, moments: Moments) -> ObservationTerms | None:
        """What the observations say of a path with these moments."""
        if self.observations is None:
            return None
        readout = self.readout(moments.mean[..., self.bins, :])
        return expected_log_likelihood(readout, moments.covariance[..., self.bins, :, :], self.observations)


class Potential(NamedTuple):
    """Natural parameters on a grid: blocks (*draw, trial, grid, latent, latent), those above, and a linear part."""

    diagonal: Tensor
    upper: Tensor
    linear: Tensor

    def __add__(self, other: Potential) -> Potential:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Potential(*(a + b for a, b in zip(self, other, strict=True)))

    def inner(self, moments: Moments) -> Tensor:
        """Expected log potential under a law with these moments, (*draw, trial)."""
        mean, covariance, cross = moments
        square = covariance + outer_product(mean, mean)
        product = cross + outer_product(mean[..., :-1, :], mean[..., 1:, :])
        quadratic = 0.5 * (self.diagonal * square).sum((-3, -2, -1)) + (self.upper * product).sum((-3, -2, -1))
        return (self.linear * mean).sum((-2, -1)) - quadratic


def natural_gradient(
    function: Callable[[Moments], Tensor], moments: Moments, size: int, leaves: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Potential, tuple[Tensor, ...]]:
    """A function of moments (*draw, trial), its gradient in mean parameters, and its gradient in ``leaves``.

    ``size`` is the number of entries that the function holds for every trial: trials are taken in parts.
    """
    trials = moments.mean.shape[-3]
    share = max(1, CHUNK_NUMBERS // max(1, size))
    values, slopes, for_leaves = [], [], [torch.zeros_like(leaf) for leaf in leaves]
    for start in range(0, trials, share):
        part = moments.trials(start, share)
        for piece in part:
            piece.requires_grad_()
        with torch.enable_grad():
            value = function(part)
            found = torch.autograd.grad(value.sum(), (*part, *leaves), allow_unused=True, materialize_grads=True)
        values.append(value.detach())
        slopes.append(found[:3])
        for total, slope in zip(for_leaves, found[3:], strict=True):
            total += slope
    parts = zip(TRIAL_AXES, zip(*slopes, strict=True), strict=True)
    mean, covariance, cross = (torch.cat(pieces, axis) for axis, pieces in parts)
    covariance = covariance + covariance.mT  # twice the gradient in a symmetric matrix
    along = moments.mean.unsqueeze(-1)
    later = (cross.mT @ along[..., :-1, :, :]).squeeze(-1)
    earlier = (cross @ along[..., 1:, :, :]).squeeze(-1)
    none = torch.zeros_like(mean[..., :1, :])
    linear = mean - (covariance @ along).squeeze(-1)
    linear = linear - torch.cat([earlier, none], -2) - torch.cat([none, later], -2)
    return torch.cat(values, -1), Potential(-covariance, -cross, linear), tuple(for_leaves)


def observed_potential(terms: ObservationTerms, like: Potential, bins: Tensor) -> Potential:
    """The observations' part at its places in the grid; differentiable."""
    shape = (*terms.linear.shape[:-2], *like.linear.shape[-2:])
    wide = terms.precision.expand(*terms.linear.shape, shape[-1])
    diagonal = torch.zeros(*shape, shape[-1], dtype=wide.dtype, device=wide.device).index_copy(-3, bins, wide)
    linear = torch.zeros(shape, dtype=wide.dtype, device=wide.device).index_copy(-2, bins, terms.linear)
    return Potential(diagonal, torch.zeros_like(like.upper), linear)


class Expansion(NamedTuple):
    """The bound at a law, and its slopes.

    Attributes
    ----------
    value : Tensor, (*draw, trial)
    toward : Potential
        Where a unit step ends.
    slopes : tuple of Tensor
        Gradients of the sum of ``value`` in the tensors asked for.
    """

    value: Tensor
    toward: Potential
    slopes: tuple[Tensor, ...]


def expand(target: Target, law: GaussMarkov, rule: Rule, leaves: tuple[Tensor, ...] = ()) -> Expansion:
    """The bound at a law, where a unit step would end, and the gradient in ``leaves`` that the target was made from."""
    moments, diffusion = moments_of(law), target.diffusion
    draws = moments.mean.shape[:-3].numel()
    size = draws * moments.mean.shape[-2] * len(rule.weights) * diffusion.weights.shape[-2]
    value, toward, slopes = natural_gradient(partial(_log_path, diffusion, rule), moments, size, leaves)
    value = value + law.entropy()
    if target.observations is not None:
        with torch.set_grad_enabled(bool(leaves)):
            terms = target.seen(moments)
            assert terms is not None
            if terms.value.requires_grad:
                own = torch.autograd.grad(terms.value.sum(), leaves, allow_unused=True, materialize_grads=True)
                slopes = tuple(a + b for a, b in zip(slopes, own, strict=True))
        terms = ObservationTerms(*(part.detach() for part in terms))
        value, toward = value + terms.value, toward + observed_potential(terms, toward, target.bins)
    return Expansion(value, toward, slopes)


def _log_path(diffusion: Diffusion, rule: Rule, moments: Moments) -> Tensor:
    """Expected log density of paths with these moments, (*draw, trial)."""
    return expected_steps(diffusion, moments, rule) + expected_start(diffusion, moments) + step_volume(diffusion)


def bound(target: Target, law: GaussMarkov, rule: Rule) -> Tensor:
    """The bound alone, (*draw, trial)."""
    moments, diffusion = moments_of(law), target.diffusion
    draws = moments.mean.shape[:-3].numel()
    size = draws * moments.mean.shape[-2] * len(rule.weights) * diffusion.weights.shape[-2]
    trials = moments.mean.shape[-3]
    share = max(1, CHUNK_NUMBERS // max(1, size))
    with torch.no_grad():
        parts = [_log_path(diffusion, rule, moments.trials(start, share)) for start in range(0, trials, share)]
        value = torch.cat(parts, -1) + law.entropy()
        seen = target.seen(moments)
    return value if seen is None else value + seen.value


class Climb(NamedTuple):
    """Where a climb of the bound is.

    Attributes
    ----------
    law : GaussMarkov
        Batch (*draw, trial), event (grid, latent).
    value : Tensor, (*draw, trial)
        The bound of each trial at ``law``.
    rate : Tensor, (*draw, trial)
        Of the next natural step.
    """

    law: GaussMarkov
    value: Tensor
    rate: Tensor


def climb(target: Target, law: GaussMarkov, rate: Tensor, rule: Rule, steps: int) -> Climb:
    """Natural-gradient steps; a trial whose bound fell goes back and takes half the step."""
    found = expand(target, law, rule)
    value, toward = found.value, found.toward
    for _ in range(steps):
        ahead = stepped(law, toward, rate)
        found = expand(target, ahead, rule)
        won, rate = judged(value, found.value, rate)
        law = chosen(won, ahead, law)
        value = torch.where(won, found.value, value)
        toward = Potential(*(_where(won, new, old) for new, old in zip(found.toward, toward, strict=True)))
    return Climb(law, value, rate)


def judged(before: Tensor, after: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Which trials may keep their step, (*draw, trial), and the rates of the next."""
    won = after >= before - FALL * before.abs()  # false where it is NaN
    return won, torch.where(won, (1.5 * rate).clamp(max=1.0), 0.5 * rate)


def first_law(target: Target, rule: Rule, shape: torch.Size, steps: int) -> GaussMarkov:
    """A law (*draw, trial, grid, latent) to start from, under the target without its drift's bends.

    Where the observations are Gaussian one unit step ends at the smoother; elsewhere such a step from afar overshoots,
    and ``steps`` careful ones are taken from paths near zero.
    """
    lead, dim, points = shape[:-2], shape[-1], shape[-2]
    eye = torch.eye(dim, dtype=torch.float64)
    law = GaussMarkov(
        (eye / NARROW).expand(*shape, dim),
        torch.zeros(*lead, points - 1, dim, dim, dtype=torch.float64),
        torch.zeros(shape, dtype=torch.float64),
    )
    gaussian = target.observations is None or target.readout(law.mean[..., target.bins, :]).law.is_gaussian
    if gaussian:
        return stepped(law, expand(target, law, rule).toward, torch.ones(lead, dtype=torch.float64))
    return climb(target, law, torch.full(lead, FIRST_RATE, dtype=torch.float64), rule, steps).law


def settled(target: Target, rule: Rule, steps: int, near: GaussMarkov | None = None) -> GaussMarkov:
    """The law of the paths, climbed from the law of another draw ``near``, or from that of a drift of zero."""
    diffusion = target.diffusion
    draws, dim = diffusion.precision.shape[:-3], diffusion.precision.shape[-1]
    trials = 1 if target.observations is None else len(target.observations)
    points = len(diffusion.steps) + 1
    shape = torch.Size((*draws, trials, points, dim))
    if near is None:
        still = diffusion._replace(weights=torch.zeros_like(diffusion.weights), spread=None)
        near = first_law(target._replace(diffusion=still), rule, shape, steps)
    law = GaussMarkov(
        near.diagonal.expand(*shape, dim),
        near.upper.expand(*shape[:-2], points - 1, dim, dim),
        near.linear.expand(shape),
    )
    return climb(target, law, torch.full(shape[:-2], FIRST_RATE, dtype=torch.float64), rule, steps).law


def stepped(law: GaussMarkov, toward: Potential, rate: Tensor) -> GaussMarkov:
    """``(1 - rate) law + rate toward`` in natural parameters (*draw, trial), rates halved until it is a law."""
    held = Potential(law.diagonal, law.upper, law.linear)
    while True:
        parts = (
            torch.lerp(old.expand_as(new), new, rate[(..., *(None,) * (new.dim() - rate.dim()))])
            for old, new in zip(held, toward, strict=True)
        )
        mixed = GaussMarkov(*parts)
        failed = ~torch.isfinite(mixed.log_whitening_jacobian)
        if not bool(failed.any()):
            return mixed
        rate = torch.where(failed, 0.5 * rate, rate)
        if float(rate[failed].max()) < LEAST_RATE:
            return chosen(~failed, mixed, law)


def chosen(which: Tensor, first: GaussMarkov, second: GaussMarkov) -> GaussMarkov:
    """The first law in some trials (*draw, trial), the second in the others."""
    pairs = ((first.diagonal, second.diagonal), (first.upper, second.upper), (first.linear, second.linear))
    return GaussMarkov(*(_where(which, a, b) for a, b in pairs))


def _where(which: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(which[(..., *(None,) * (first.dim() - which.dim()))], first, second)
