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

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrodyn.conditioning import gaussian_potential, outer
from pyrodyn.distributions import GaussMarkov
from pyrodyn.linalg.matrix import cholesky
from pyrodyn.readouts import AffineReadout

MOST_NODES = 200  # of a product rule in all dimensions; above, a rule of 2 x dim nodes and degree three
OBSERVATION_NODES = 9  # of the rule along a predictor
CHUNK_NUMBERS = 8_000_000  # (trial, point, node, feature) entries held at once: 64 MB
TRIAL_AXES = (-3, -4, -4)  # of mean, covariance and cross
FALL = 1e-9  # relative fall of the bound that rounding may cause
FIRST_RATE = 0.5  # of natural steps from afar
NARROW = 0.1  # variance of the paths near zero that careful steps start from
LEAST_RATE = 1e-8  # of a natural step; one that is still no law leaves the path where it was


class Rule(NamedTuple):
    """Expectations under a standard normal vector: ``sum(weights * g(nodes))``."""

    nodes: Tensor  # (node, latent)
    weights: Tensor  # (node)


def gauss_hermite(dim: int, count: int) -> Rule:
    """The product rule of ``count`` nodes in each dimension; in many dimensions, one of degree three.

    The product rule is exact for polynomials of degree 2 x count - 1 in every coordinate.
    """
    if count**dim > MOST_NODES:
        # Nodes at the root of the dimension along every axis.
        nodes = math.sqrt(dim) * torch.cat([torch.eye(dim, dtype=torch.float64), -torch.eye(dim, dtype=torch.float64)])
        return Rule(nodes, torch.full((2 * dim,), 0.5 / dim, dtype=torch.float64))
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    weights = weights / weights.sum()
    nodes = torch.tensor(list(itertools.product(points.tolist(), repeat=dim)), dtype=torch.float64)
    mass = torch.tensor(list(itertools.product(weights.tolist(), repeat=dim)), dtype=torch.float64)
    return Rule(nodes, mass.prod(-1))


class Diffusion(NamedTuple):
    r"""A stochastic differential equation whose drift is linear in features, :math:`f(x) = W^\top \psi(x)`.

    Attributes
    ----------
    features : callable
        Of states (*draw, trial, point, latent): (*draw, trial, point, feature).
    weights : Tensor, (*draw, 1, feature, latent)
        W, or its mean.
    spread : callable or None
        Of a matrix P (*draw, 1, latent, latent): :math:`\sum_{ij} P_{ij} \mathrm{Cov}(W_{\cdot i}, W_{\cdot j})`,
        (*draw, 1, feature, feature); None where W is known.
    precision : Tensor, (*draw, 1, latent, latent)
        :math:`(L L^\top)^{-1}`, seconds.
    steps : Tensor, (grid - 1)
        Seconds.
    initial_sd : float
    """

    features: Callable[[Tensor], Tensor]
    weights: Tensor
    spread: Callable[[Tensor], Tensor] | None
    precision: Tensor
    steps: Tensor
    initial_sd: float


class Moments(NamedTuple):
    """Of a Gauss-Markov law: mean (*batch, grid, latent), covariance, and Cov(x_k, x_k+1)."""

    mean: Tensor
    covariance: Tensor
    cross: Tensor

    def trials(self, start: int, count: int) -> Moments:
        """A copy of some trials."""
        stop = min(count, self.mean.shape[-3] - start)
        return Moments(
            *(p.narrow(axis, start, stop).detach().clone() for axis, p in zip(TRIAL_AXES, self, strict=True))
        )


def moments_of(law: GaussMarkov) -> Moments:
    """The moments of a law, detached."""
    return Moments(law.mean.detach(), law.covariance.detach(), law.cross_covariance.detach())


def expected_steps(diffusion: Diffusion, moments: Moments, rule: Rule) -> Tensor:
    r"""The part of the expected log density of a path that is linear in the precision P, (*draw, trial).

    .. math:: -\tfrac12 \sum_k \Delta_k^{-1}\, E\big[r_k^\top P\, r_k\big], \qquad
        r_k = x_{k+1} - x_k - f(x_k) \Delta_k .
    """
    mean, covariance, cross = moments
    before, spread = mean[..., :-1, :], covariance[..., :-1, :, :]
    root = cholesky(spread)
    states = before.unsqueeze(-2) + rule.nodes @ root.mT  # (*draw, trial, grid - 1, node, latent)
    psi = diffusion.features(states.flatten(-3, -2))
    size = states.shape[-3:-1]
    rate = (psi @ diffusion.weights).unflatten(-2, size)
    middle = (rule.weights[:, None] * rate).sum(-2)
    # Stein: Cov(z, f(x)) = Cov(z, x) S^-1 Cov(x, f(x)) for every z that is jointly normal with x.
    tilt = (rule.weights[:, None] * rule.nodes).mT @ rate
    slope = torch.linalg.solve_triangular(root.mT, tilt, upper=True)
    precision, steps = diffusion.precision.unsqueeze(-3), diffusion.steps
    moved = mean[..., 1:, :] - before
    squared = _outer(moved, moved) + covariance[..., 1:, :, :] + spread - cross - cross.mT
    mixed = _outer(moved, middle) + (cross.mT - spread) @ slope
    pushed = (rule.weights * ((rate @ precision) * rate).sum(-1)).sum(-1)
    if diffusion.spread is not None:
        uncertain = ((psi @ diffusion.spread(diffusion.precision)) * psi).sum(-1)
        pushed = pushed + (rule.weights * uncertain.unflatten(-1, size)).sum(-1)
    terms = (
        -0.5 * (precision * squared).sum((-2, -1)) / steps + (precision * mixed).sum((-2, -1)) - 0.5 * steps * pushed
    )
    return terms.sum(-1)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def expected_start(diffusion: Diffusion, moments: Moments) -> Tensor:
    """Expected log density of the first state, (*draw, trial)."""
    mean, covariance = moments.mean[..., 0, :], moments.covariance[..., 0, :, :]
    variance = diffusion.initial_sd**2
    square = mean.square().sum(-1) + covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return -0.5 * (square / variance + mean.shape[-1] * math.log(2.0 * math.pi * variance))


def step_volume(diffusion: Diffusion) -> Tensor:
    """Log normaliser of all steps of a path, (*draw, 1)."""
    dim, steps = diffusion.precision.shape[-1], diffusion.steps
    log_det = torch.linalg.slogdet(diffusion.precision)[1]
    return 0.5 * (len(steps) * (log_det - dim * math.log(2.0 * math.pi)) - dim * steps.log().sum())


class ObservationTerms(NamedTuple):
    """Expected log likelihood (*draw, trial), and its gradient as potentials on the path at the bins."""

    value: Tensor
    precision: Tensor  # (*draw, trial or 1, time or 1, latent, latent)
    linear: Tensor  # (*draw, trial, time, latent)


def expected_log_likelihood(readout: AffineReadout, covariance: Tensor, observations: Tensor) -> ObservationTerms:
    """Of a path with the means that ``readout`` holds and ``covariance`` (*draw, trial, time, latent, latent)."""
    predictor, loading = readout.predictor, readout.loading
    pairs = (loading.unsqueeze(-1) * loading.unsqueeze(-2)).flatten(-2)
    variance = covariance.flatten(-2) @ pairs.mT
    if readout.law.is_gaussian:
        value = readout.log_likelihood(predictor, observations)
        value = value - 0.5 * (readout.curvature(predictor, observations) * variance).sum((-2, -1))
        return ObservationTerms(value, *gaussian_potential(readout, observations))
    value, score, curvature = (torch.zeros((), dtype=predictor.dtype) for _ in range(3))
    rule = gauss_hermite(1, OBSERVATION_NODES)
    sd = variance.clamp(min=1e-30).sqrt()
    for node, weight in zip(rule.nodes[:, 0], rule.weights, strict=True):
        place = predictor + node * sd
        value = value + weight * readout.log_likelihood(place, observations)
        score = score + weight * readout.score(place, observations)
        curvature = curvature + weight * readout.curvature(place, observations)
    target = score + curvature * (predictor - readout.offset)
    return ObservationTerms(value, outer(readout, curvature), target @ loading)


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
        square = covariance + _outer(mean, mean)
        product = cross + _outer(mean[..., :-1, :], mean[..., 1:, :])
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
