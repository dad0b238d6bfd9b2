r"""What is expected of a diffusion and of observations when a path has a Gauss-Markov law.

Expectations under a normal state are taken by Gauss-Hermite quadrature, which is exact for a linear drift and Gaussian
observations. `pyrodyn.smoothing` climbs their sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrodyn.conditioning import gaussian_potential
from pyrodyn.distributions import GaussMarkov
from pyrodyn.linalg.matrix import cholesky
from pyrodyn.readouts import AffineReadout
from pyrodyn.readouts.likelihood import outer

MOST_NODES = 200  # of a product rule in all dimensions; above, a rule of 2 x dim nodes and degree three
OBSERVATION_NODES = 9  # of the rule along a predictor
CHUNK_NUMBERS = 8_000_000  # (trial, point, node, feature) entries held at once: 64 MB
TRIAL_AXES = (-3, -4, -4)  # of mean, covariance and cross


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
    squared = outer_product(moved, moved) + covariance[..., 1:, :, :] + spread - cross - cross.mT
    mixed = outer_product(moved, middle) + (cross.mT - spread) @ slope
    pushed = (rule.weights * ((rate @ precision) * rate).sum(-1)).sum(-1)
    if diffusion.spread is not None:
        uncertain = ((psi @ diffusion.spread(diffusion.precision)) * psi).sum(-1)
        pushed = pushed + (rule.weights * uncertain.unflatten(-1, size)).sum(-1)
    terms = (
        -0.5 * (precision * squared).sum((-2, -1)) / steps + (precision * mixed).sum((-2, -1)) - 0.5 * steps * pushed
    )
    return terms.sum(-1)


def outer_product(left: Tensor, right: Tensor) -> Tensor:
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
