"""Gauss-Markov laws of nonlinear paths: expectations by other routes, gradients, exactness where it holds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from pyrodyn import drifts, readouts
from pyrodyn.conditioning import path_evidence, path_given
from pyrodyn.distributions import EulerMaruyama, GaussMarkov, varying_chain
from pyrodyn.expectations import (
    Diffusion,
    Moments,
    expected_log_likelihood,
    expected_start,
    expected_steps,
    gauss_hermite,
    moments_of,
    step_volume,
)
from pyrodyn.inference._weights import Weights, weight_statistics
from pyrodyn.readouts import AffineReadout
from pyrodyn.smoothing import Target, climb, expand, natural_gradient

RNG = torch.Generator()
STEPS = torch.tensor([0.1, 0.05, 0.2, 0.1], dtype=torch.float64)
NOISE = torch.tensor([[0.6, 0.1], [0.1, 0.4]], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=RNG.manual_seed(seed), dtype=torch.float64)


def law(trials: int = 2, points: int = 5, dim: int = 2, seed: int = 0, tight: float = 1.0) -> GaussMarkov:
    """Some Gauss-Markov law."""
    chain = varying_chain(
        torch.eye(dim) + 0.1 * normal(trials, points - 1, dim, dim, seed=seed),
        0.2 * torch.eye(dim, dtype=torch.float64).expand(trials, points - 1, dim, dim),
        initial_covariance=0.5 * torch.eye(dim, dtype=torch.float64),
        initial_mean=normal(trials, dim, seed=seed + 1),
        drift=0.3 * normal(trials, points - 1, dim, seed=seed + 2),
    )
    return GaussMarkov(tight * chain.diagonal, tight * chain.upper, tight * chain.linear)


def cubic(state: Tensor) -> Tensor:
    """Features 1, x, and the cubes: integrated exactly by three nodes, squares included only with four."""
    return torch.cat([torch.ones_like(state[..., :1]), state, state**3], -1)


def diffusion(seed: int = 5, weights: Weights | None = None) -> Diffusion:
    mean = 0.5 * normal(1, 5, 2, seed=seed) if weights is None else weights.mean.unsqueeze(0)
    spread = None if weights is None else weights.spread
    return Diffusion(cubic, mean, spread, torch.linalg.inv(NOISE)[None], STEPS, 1.5)


# ---------------------------------------------------------------------------------------------- expectations


@pytest.mark.parametrize(("dim", "count", "degree"), [(1, 4, 7), (2, 3, 5), (3, 3, 5), (7, 3, 3)])
def test_nodes_integrate_polynomials(dim, count, degree) -> None:
    """Moments of a standard normal: products of double factorials of even powers."""
    rule = gauss_hermite(dim, count)
    assert float(rule.weights.sum()) == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        powers = rng.multinomial(rng.integers(0, degree + 1), np.ones(dim) / dim)
        expected = math.prod(0.0 if p % 2 else math.prod(range(p - 1, 0, -2)) for p in powers.tolist())
        found = (rule.weights * rule.nodes.pow(torch.from_numpy(powers)).prod(-1)).sum()
        assert float(found) == pytest.approx(expected, abs=1e-10)


def test_the_expected_log_density_of_a_path_is_its_average_over_draws() -> None:
    """Paths and weights drawn, and scored by `EulerMaruyama`."""
    root = 0.2 * normal(2, 5, 5, seed=8)
    weights = Weights(
        0.5 * normal(5, 2, seed=7), torch.linalg.qr(normal(2, 2))[0], root @ root.mT + 0.01 * torch.eye(5)
    )
    own, q = diffusion(weights=weights), law(trials=1, tight=20.0)
    found = expected_steps(own, moments_of(q), gauss_hermite(2, 4)) + step_volume(own)
    found = found + expected_start(own, moments_of(q))
    torch.manual_seed(0)
    count = 40_000
    path, drawn = q.sample(torch.Size((count,))), weights.sample(count)
    flow = EulerMaruyama(
        lambda state: cubic(state) @ drawn.unsqueeze(1), torch.linalg.cholesky(NOISE), STEPS, initial_sd=1.5
    )
    scores = flow.log_prob(path)[:, 0]
    assert abs(float(scores.mean() - found)) < 4.0 * float(scores.std()) / count**0.5


def test_expected_log_likelihoods_in_closed_form() -> None:
    """A Poisson count of rate exp(eta), eta normal; a Gaussian of known variance."""
    mean, covariance = 0.3 * normal(1, 2, 3, 2), 0.2 * torch.eye(2, dtype=torch.float64).expand(1, 2, 3, 2, 2)
    loading, offset, noise = normal(1, 4, 2, seed=2), normal(1, 4, seed=3) - 1.0, torch.full((1, 4), 0.7).double()
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 1, 2] = False
    eta = mean @ loading.mT + offset
    spread = 0.2 * loading.square().sum(-1)
    counts = torch.poisson(eta[0].exp(), generator=RNG.manual_seed(0))
    count = AffineReadout(readouts.Poisson(), mean, loading, offset, None, mask)
    terms = expected_log_likelihood(count, covariance, counts)
    expected = counts * eta - (eta + 0.5 * spread.unsqueeze(-2)).exp() - torch.lgamma(counts + 1.0)
    torch.testing.assert_close(terms.value, torch.where(mask, expected, 0.0).sum((-2, -1)), rtol=1e-9, atol=1e-9)
    rates = torch.where(mask, (eta + 0.5 * spread.unsqueeze(-2)).exp(), 0.0)
    torch.testing.assert_close(
        terms.precision, torch.einsum("...tu,...ui,...uj->...tij", rates, loading, loading), rtol=1e-6, atol=1e-8
    )
    real = AffineReadout(readouts.Gaussian(), mean, loading, offset, noise, mask)
    terms = expected_log_likelihood(real, covariance, counts)
    each = -0.5 * ((counts - eta).square() + spread.unsqueeze(-2)) / 0.49 - 0.5 * math.log(2.0 * math.pi * 0.49)
    torch.testing.assert_close(terms.value, torch.where(mask, each, 0.0).sum((-2, -1)))


def test_natural_gradients_are_slopes_in_mean_parameters() -> None:
    own, rule = diffusion(), gauss_hermite(2, 4)
    q, other = law(), law(seed=20)
    start = moments_of(q)

    def value(moments: Moments) -> Tensor:
        return expected_steps(own, moments, rule)

    found, slope, _ = natural_gradient(value, start, size=1)
    torch.testing.assert_close(found, value(start))

    def mixed(share: float) -> Moments:
        """Moments whose mean parameters lie between those of the two laws."""
        parts = []
        for moments in (start, moments_of(other)):
            mean, covariance, cross = moments
            outer = mean.unsqueeze(-1) * mean.unsqueeze(-2)
            parts.append((mean, covariance + outer, cross + mean[:, :-1].unsqueeze(-1) * mean[:, 1:].unsqueeze(-2)))
        mean, square, product = (a + share * (b - a) for a, b in zip(*parts, strict=True))
        return Moments(
            mean,
            square - mean.unsqueeze(-1) * mean.unsqueeze(-2),
            product - mean[:, :-1].unsqueeze(-1) * mean[:, 1:].unsqueeze(-2),
        )

    step = 1e-5
    expected = (value(mixed(step)) - value(mixed(-step))) / (2.0 * step)
    along = (slope.inner(mixed(step)) - slope.inner(mixed(-step))) / (2.0 * step)
    torch.testing.assert_close(along, expected, rtol=1e-6, atol=1e-6)


def test_trials_in_parts_are_trials_together(monkeypatch) -> None:
    own, rule, q = diffusion(), gauss_hermite(2, 3), law(trials=5)
    whole = natural_gradient(lambda m: expected_steps(own, m, rule), moments_of(q), size=1)
    parts = natural_gradient(lambda m: expected_steps(own, m, rule), moments_of(q), size=5_000_000)
    for a, b in zip((whole[0], *whole[1]), (parts[0], *parts[1]), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------- where it is exact


@pytest.mark.parametrize("gaps", [False, True])
def test_one_unit_step_of_a_linear_diffusion_is_the_kalman_smoother(gaps) -> None:
    """From any law; the bound is then the evidence. For two draws of the parameters at once."""
    drift = drifts.Linear()
    weights = 0.5 * normal(2, 1, 3, 2)
    parameters = drifts.DriftParameters(weights)
    precision = torch.linalg.inv(NOISE) * torch.tensor([1.0, 2.0])[:, None, None, None]
    loading, offset = normal(2, 1, 3, 2, seed=3), normal(2, 1, 3, seed=4)
    noise = 0.3 + normal(2, 1, 3, seed=5).abs()
    observations = normal(3, 3, 3, seed=6)
    mask = (normal(3, 3, 3, seed=7) > -0.5) if gaps else None
    bins = torch.tensor([0, 2, 4])

    def readout(path: Tensor) -> AffineReadout:
        return AffineReadout(readouts.Gaussian(), path, loading, offset, noise, mask)

    target = Target(
        Diffusion(lambda x: drift.features(parameters, x), weights, None, precision, STEPS, 1.5),
        readout,
        observations,
        bins,
    )
    start = GaussMarkov(law(trials=3).diagonal.expand(2, 3, 5, 2, 2), law(trials=3).upper, law(trials=3).linear)
    rate = torch.ones(2, 3, dtype=torch.float64)
    done = climb(target, start, rate, gauss_hermite(2, 2), steps=1)

    slope, level = weights[:, :, 1:].mT, weights[:, :, 0]
    prior = varying_chain(
        torch.eye(2) + slope.unsqueeze(-3) * STEPS[:, None, None],
        torch.linalg.inv(precision).unsqueeze(-3) * STEPS[:, None, None],
        initial_covariance=2.25 * torch.eye(2, dtype=torch.float64),
        drift=level.unsqueeze(-2) * STEPS[:, None],
    )
    # The bins alone are seen: the others' rows of the loading are hidden.
    seen = torch.zeros(3, 5, 3, dtype=torch.bool)
    seen[:, bins] = True if mask is None else mask
    values = torch.zeros(3, 5, 3, dtype=torch.float64)
    values[:, bins] = observations
    whole = AffineReadout(readouts.Gaussian(), torch.zeros(2, 3, 5, 2), loading, offset, noise, seen)
    exact = path_given(prior, whole, values)
    torch.testing.assert_close(done.law.mean, exact.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(done.law.covariance, exact.covariance, rtol=0, atol=1e-8)
    torch.testing.assert_close(done.law.cross_covariance, exact.cross_covariance, rtol=0, atol=1e-8)
    torch.testing.assert_close(done.value, path_evidence(prior, whole, values), rtol=0, atol=1e-8)


def test_the_bound_lies_just_below_the_evidence_of_a_double_well() -> None:
    """One dimension, evidence and marginals by summing over a fine grid of states."""
    steps = torch.full((6,), 0.15, dtype=torch.float64)
    counts = torch.tensor([[9.0, 6.0, 7.0, 5.0, 8.0, 9.0, 7.0]], dtype=torch.float64)[..., None]
    weights = torch.tensor([[[0.0], [1.0], [-1.0]]], dtype=torch.float64)

    def features(state: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(state), state, state**3], -1)

    def readout(path: Tensor) -> AffineReadout:
        return AffineReadout(readouts.Poisson(), path, torch.ones(1, 1, 1).double(), torch.ones(1, 1).double(), None)

    precision = torch.full((1, 1, 1), 1.0 / 0.3, dtype=torch.float64)
    target = Target(Diffusion(features, weights, None, precision, steps, 1.0), readout, counts, torch.arange(7))
    flat = GaussMarkov(torch.ones(1, 7, 1, 1).double(), torch.zeros(1, 6, 1, 1).double(), torch.zeros(1, 7, 1).double())
    values = [climb(target, flat, torch.full((1,), 0.5).double(), gauss_hermite(1, 12), k).value for k in (0, 1, 4, 40)]
    assert all(float(b) >= float(a) for a, b in itertools.pairwise(values))
    done = climb(target, flat, torch.full((1,), 0.5).double(), gauss_hermite(1, 12), 40)
    slope = expand(target, done.law, gauss_hermite(1, 12)).toward
    torch.testing.assert_close(slope.linear, done.law.linear, atol=1e-4, rtol=1e-4)  # at rest

    grid = np.linspace(-3.5, 3.5, 1401)
    width = grid[1] - grid[0]
    forward = norm.logpdf(grid)
    jump = norm.logpdf(grid[None], grid[:, None] + 0.15 * (grid - grid**3)[:, None], math.sqrt(0.3 * 0.15))
    jump = np.exp(jump) * width
    seen = [np.exp(c * (1.0 + grid) - np.exp(1.0 + grid) - math.lgamma(c + 1.0)) for c in counts[0, :, 0].tolist()]
    alpha = [np.exp(forward) * width * seen[0]]
    for like in seen[1:]:
        alpha.append((alpha[-1] @ jump) * like)
    beta = [np.ones_like(grid)]
    for like in reversed(seen[1:]):
        beta.append(jump @ (like * beta[-1]))
    evidence = math.log(alpha[-1].sum())
    assert evidence - 0.05 < float(done.value) < evidence
    for t, (a, b) in enumerate(zip(alpha, reversed(beta), strict=True)):
        marginal = a * b / (a * b).sum()
        mean = (marginal * grid).sum()
        sd = math.sqrt((marginal * (grid - mean) ** 2).sum())
        assert float(done.law.mean[0, t]) == pytest.approx(mean, abs=0.1 * sd)
        assert float(done.law.variance[0, t].sqrt()) == pytest.approx(sd, rel=0.1)


# ---------------------------------------------------------------------------------------------- weights


def test_weights_given_a_known_path_are_a_bayesian_regression() -> None:
    """A law without spread is a path; the posterior of vec W by one dense system."""
    path = normal(3, 5, 2, seed=4)
    still = Moments(path, torch.zeros(3, 5, 2, 2).double() + 1e-16 * torch.eye(2), torch.zeros(3, 4, 2, 2).double())
    sd = torch.tensor([1.0, 0.5, 2.0, 0.3, 0.8], dtype=torch.float64)
    statistics = weight_statistics(cubic, 5, still, STEPS, gauss_hermite(2, 3))
    precision = torch.linalg.inv(NOISE).contiguous()
    found = statistics.regress(precision, sd)
    psi = cubic(path[:, :-1]).reshape(-1, 5)
    moved = (path[:, 1:] - path[:, :-1]).reshape(-1, 2)
    steps = STEPS.repeat(3)
    # vec stacks latents: moved_ki = steps_k psi_k . W_i + noise of covariance NOISE steps_k.
    gram = torch.kron(precision, ((psi * steps[:, None]).mT @ psi).contiguous()) + torch.kron(
        torch.eye(2), torch.diag(sd**-2)
    )
    pull = (psi.mT @ moved @ precision).mT.reshape(-1)
    covariance = torch.linalg.inv(gram)
    torch.testing.assert_close(found.mean.mT.reshape(-1), covariance @ pull, rtol=1e-8, atol=1e-8)
    for i, j in itertools.product(range(2), repeat=2):
        unit = torch.zeros(2, 2, dtype=torch.float64)
        unit[i, j] = 0.5
        unit = unit + unit.mT
        blocks = covariance.reshape(2, 5, 2, 5)
        torch.testing.assert_close(found.spread(unit), 0.5 * (blocks[i, :, j] + blocks[j, :, i]), rtol=1e-8, atol=1e-10)
    prior = torch.distributions.Normal(torch.zeros(10).double(), sd.repeat(2))
    dense = torch.distributions.MultivariateNormal(covariance @ pull, covariance)
    q = torch.distributions.MultivariateNormal(torch.zeros(10).double(), torch.diag(prior.variance))
    torch.testing.assert_close(found.divergence(sd), torch.distributions.kl_divergence(dense, q))
    # Its evidence, up to what the prior does not enter, by the identity log p(y) = log p(y, w) - log p(w | y).
    other = 2.0 * sd

    def log_joint(scale: Tensor) -> Tensor:
        law = statistics.regress(precision, scale)
        w = law.mean
        fit = -0.5 * ((moved - steps[:, None] * (psi @ w)) @ precision * (moved - steps[:, None] * (psi @ w))).sum(-1)
        gram = torch.kron(precision, ((psi * steps[:, None]).mT @ psi).contiguous()) + torch.kron(
            torch.eye(2), torch.diag(scale**-2)
        )
        prior = torch.distributions.Normal(torch.zeros(5, 1).double(), scale[:, None]).log_prob(w).sum()
        return (fit / steps).sum() + prior - 0.5 * torch.linalg.slogdet(gram)[1]

    expected = log_joint(other) - log_joint(sd)
    torch.testing.assert_close(
        statistics.log_evidence(precision, other) - statistics.log_evidence(precision, sd), expected
    )
