"""Moves of Gibbs sampling, each against the distribution it is to leave alone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from pyrodyn import readouts
from pyrodyn.conditionals.paths import Leftover, Reference, parted, settled, turn, turned_path
from pyrodyn.conditionals.regression import SourceLaw, SourceSets
from pyrodyn.conditionals.units import draw_coefficients, draw_noise
from pyrodyn.conditioning import path_evidence
from pyrodyn.distributions import GaussMarkov
from pyrodyn.inference.engine import random_stream
from pyrodyn.linalg.chain import ChainFactor
from pyrodyn.readouts import AffineReadout


def regression(sources: int, seed: int = 0):
    """A target of two latents with ``sources`` possible sources of two and one regressors each."""
    with random_stream(seed):
        sizes = [1 + i % 2 for i in range(sources)]
        ends = np.cumsum([2, *sizes])
        columns = [torch.arange(a, b) for a, b in itertools.pairwise(ends)]
        design = torch.randn(30, int(ends[-1]), dtype=torch.float64)
        weights = 0.3 * torch.randn(int(ends[-1]), 2, dtype=torch.float64)
        target = design @ weights + torch.randn(30, 2, dtype=torch.float64)
    sets = SourceSets(columns, torch.arange(2))
    mean = torch.zeros(int(ends[-1]), 2, dtype=torch.float64)
    mean[0, 0] = mean[1, 1] = 0.5
    sd = torch.full((int(ends[-1]),), 0.4, dtype=torch.float64)
    return design, target, sets, mean, sd


def probabilities(sources: int) -> torch.Tensor:
    return torch.full((sources,), 0.3, dtype=torch.float64)


def log_evidence(design, target, columns, mean, sd) -> float:
    """Of a regression on some columns, by the dense covariance of the target."""
    total = 0.0
    for latent in range(target.shape[1]):
        chosen = design[:, columns]
        covariance = torch.eye(len(design)) + (chosen * sd[columns].square()) @ chosen.mT
        total += multivariate_normal.logpdf(target[:, latent], chosen @ mean[columns, latent], covariance)
    return total


def test_sets_of_sources_have_the_probabilities_of_dense_evidences():
    design, target, sets, mean, sd = regression(3)
    gram, cross = (design.mT @ design)[None], (design.mT @ target)[None]
    law = SourceLaw(sets, gram, cross, mean, sd.reciprocal().square()[None], probabilities(3))
    candidates = sets.candidates(torch.zeros(1, 3, dtype=torch.bool), None)
    found = law.log_probabilities(candidates)[0].exp()
    scores = []
    for chosen in candidates[0]:
        columns = torch.cat([sets.always, sets.free[chosen[sets.owner]]])
        prior = sum(math.log(0.3 if there else 0.7) for there in chosen.tolist())
        scores.append(log_evidence(design, target, columns, mean, sd) + prior)
    expected = np.exp(np.array(scores) - np.logaddexp.reduce(scores))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert expected.max() < 0.99  # or the test would see little


def test_densities_of_sets_and_coefficients_are_the_joint_up_to_a_constant():
    design, target, sets, mean, sd = regression(3)
    precision = sd.reciprocal().square()[None].expand(50, -1)
    gram, cross = (design.mT @ design).expand(50, -1, -1), (design.mT @ target).expand(50, -1, -1)
    law = SourceLaw(sets, gram, cross, mean, precision, probabilities(3))
    with random_stream(1):
        candidates = sets.candidates(torch.zeros(50, 3, dtype=torch.bool), None)
        present = law.choose(candidates)
        coefficients = law.coefficients(present)
    assert len(torch.unique(present, dim=0)) > 3
    at = (candidates == present.unsqueeze(1)).all(-1).to(torch.uint8).argmax(-1)
    density = law.log_density(coefficients, present) + law.log_probabilities(candidates)[torch.arange(50), at]
    inside = torch.cat([torch.ones(50, 2, dtype=torch.bool), present[:, sets.owner]], -1).unsqueeze(-1)
    slab = torch.distributions.Normal(mean, sd.unsqueeze(-1)).log_prob(coefficients)
    prior = torch.where(inside, slab, 0.0).sum((1, 2))
    prior = prior + torch.tensor([math.log(0.7), math.log(0.3)], dtype=torch.float64)[present.long()].sum(-1)
    fit = -0.5 * (target - design @ coefficients).square().sum((1, 2))
    constant = prior + fit - density
    torch.testing.assert_close(constant, constant[:1].expand(50), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sources", [2, 10])  # all sets at once, and one source after the other
def test_drawn_sources_come_as_often_as_they_should(sources, monkeypatch):
    design, target, sets, mean, sd = regression(sources)
    chains = 400
    gram, cross = (design.mT @ design).expand(chains, -1, -1), (design.mT @ target).expand(chains, -1, -1)
    precision = sd.reciprocal().square().expand(chains, -1)
    scores = {}
    for chosen in itertools.product((False, True), repeat=sources):
        held = torch.tensor(chosen)
        columns = torch.cat([sets.always, sets.free[held[sets.owner]]])
        scores[chosen] = log_evidence(design, target, columns, mean, sd) + sum(
            math.log(0.3 if there else 0.7) for there in chosen
        )
    weights = np.exp(np.array(list(scores.values())) - np.logaddexp.reduce(list(scores.values())))
    expected = (np.array(list(scores)) * weights[:, None]).sum(0)
    present, total = torch.zeros(chains, sources, dtype=torch.bool), torch.zeros(sources, dtype=torch.float64)
    with random_stream(2):
        for sweep in range(30):
            coefficients, present = SourceLaw(sets, gram, cross, mean, precision, probabilities(sources)).draw(present)
            if sweep >= 10:
                total += present.double().mean(0)
    np.testing.assert_allclose(total / 20, expected, atol=0.04)
    absent = ~present[:, sets.owner]
    assert not bool(coefficients[:, sets.free][absent].any())


# ---------------------------------------------------------------------------------------------------- paths


def small_path(readout: readouts.Readout, value: float):
    """Two bins of one latent, strongly coupled, seen by one unit."""
    prior = GaussMarkov.from_dynamics(
        torch.tensor([[0.9]]), torch.tensor([[0.5]]), num_bins=2, initial_covariance=torch.tensor([[1.0]])
    )
    observations = torch.tensor([[[value], [0.0]]], dtype=torch.float64)
    noise = None if readout.noise_name is None else torch.tensor([1.5])
    zeros = torch.zeros(1, 2, 1, dtype=torch.float64)
    return prior, AffineReadout(readout, zeros, torch.tensor([[1.2]]), torch.tensor([0.4]), noise), observations


@pytest.mark.parametrize(
    ("law", "value"), [(readouts.Poisson(), 6.0), (readouts.Bernoulli(), 1.0), (readouts.NegativeBinomial(), 4.0)]
)
def test_the_turned_path_has_the_moments_of_a_grid(law, value):
    prior, readout, observations = small_path(law, value)
    axis = torch.linspace(-8.0, 8.0, 401, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2, 1)
    weight = prior.log_potential(grid) + readout.log_likelihood(readout.predict(grid), observations)
    weight = torch.softmax(weight.flatten(), 0)
    mean = (weight[:, None] * grid[:, 0, :, 0]).sum(0)
    square = (weight[:, None] * grid[:, 0, :, 0].square()).sum(0)
    with random_stream(0):
        # A poor reference, so that there is something to accept or refuse.
        reference = Reference.about(readout, torch.full((1, 1, 2, 1), 0.2, dtype=torch.float64), observations)
        path = torch.zeros(3000, 1, 2, 1, dtype=torch.float64)
        rates = []
        for _ in range(25):
            path, rate = turned_path(prior, readout, observations, path, reference)
            rates.append(float(rate.mean()))
    assert min(rates) < 0.999
    sd = (square - mean.square()).sqrt()
    found = path[:, 0, :, 0]
    assert bool(((found.mean(0) - mean).abs() < 0.08 * sd).all())
    assert bool(((found.std(0) / sd - 1.0).abs() < 0.08).all())


def test_under_a_gaussian_readout_the_reference_is_the_likelihood():
    prior, readout, observations = small_path(readouts.Gaussian(), 2.0)
    reference = settled(prior, readout, observations, None, 2)
    near = prior.condition(*reference.potential(readout))
    with random_stream(1):
        path = torch.randn(7, 1, 2, 1, dtype=torch.float64)
    rest, slope = Leftover(readout, observations, *reference.potential(readout))(path)
    torch.testing.assert_close(rest, rest[:1].expand(7, 1, 2))
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0.0)
    at_offset = readout.log_likelihood(readout.offset.expand(1, 2, 1), observations)
    torch.testing.assert_close(
        near.log_normaliser - prior.log_normaliser + at_offset, path_evidence(prior, readout, observations)
    )


@pytest.mark.parametrize("level", [False, True])
def test_what_a_reference_leaves_over_is_the_likelihood_less_its_quadratic_whatever_the_pieces(monkeypatch, level):
    with random_stream(3):
        path, loading = torch.randn(2, 3, 11, 2, dtype=torch.float64), torch.randn(2, 1, 5, 2, dtype=torch.float64)
        seen = torch.rand(3, 11, 5) < 0.8
        observations = torch.poisson(torch.ones(3, 11, 5, dtype=torch.float64))
        centre = torch.randn(2, 3, 11, 5, dtype=torch.float64)
    readout = AffineReadout(readouts.Poisson(), path, loading, torch.zeros(2, 1, 5, dtype=torch.float64), None, seen)
    reference = Reference.about(readout, centre, observations)
    if level:
        reference = reference.levelled(seen)
        one = reference.curvature[0, :, :, 2]
        assert float(one[seen[..., 2]].std()) < 1e-12 and not bool(one[~seen[..., 2]].any())
    monkeypatch.setattr("pyrodyn.readouts.observations.PIECE", 100)
    rest = Leftover(readout, observations, *reference.potential(readout))
    assert len(rest.likelihood.pieces) > 3

    def by_units(at: torch.Tensor) -> torch.Tensor:
        predictor = readout.predict(at)
        apart = predictor - centre
        quadratic = apart * (reference.score - 0.5 * reference.curvature * apart)
        return readout.log_likelihood(predictor, observations) - quadratic.sum((-2, -1))

    there = path.flip(-2).requires_grad_()
    expected = by_units(there)
    torch.testing.assert_close(
        rest.value(there).sum(-1) - rest.value(path).sum(-1), expected - by_units(path), rtol=1e-9, atol=1e-9
    )
    (slope,) = torch.autograd.grad(expected.sum(), there)
    value, force = rest(there.detach())
    torch.testing.assert_close(value, rest.value(there.detach()))
    torch.testing.assert_close(force, slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["compiled", "parallel"])
def test_a_path_and_its_noise_are_inverse_and_have_the_covariance(kind):
    with random_stream(5):
        prior = GaussMarkov.from_dynamics(
            0.4 * torch.randn(3, 1, 2, 2), torch.eye(2), num_bins=5, initial_covariance=torch.eye(2)
        ).condition(torch.eye(2).expand(4, 5, 2, 2), torch.randn(4, 5, 2))
        noise = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    if kind == "parallel":
        prior.__dict__["_factor"] = ChainFactor(prior.diagonal.expand(3, 4, 5, 2, 2), prior.upper.expand(3, 4, 4, 2, 2))
    path = prior.draw(noise)
    torch.testing.assert_close(prior.noise_of(path), noise)
    unit = torch.eye(10, dtype=torch.float64).reshape(10, 1, 1, 5, 2).expand(10, 3, 4, 5, 2)
    root = torch.stack([(prior.draw(column) - prior.mean).flatten(-2) for column in unit], -1)
    dense = root @ root.mT
    for t in range(5):
        block = dense[..., 2 * t : 2 * t + 2, 2 * t : 2 * t + 2]
        torch.testing.assert_close(block, prior.covariance[..., t, :, :])


# ---------------------------------------------------------------------------------------------------- units


def test_coefficients_of_a_poisson_unit_have_the_moments_of_a_grid():
    with random_stream(2):
        design = torch.cat([torch.randn(1, 12, 1), torch.ones(1, 12, 1)], -1).double()
        counts = torch.poisson((0.7 * design[..., :1] - 0.3).exp())
        mean, precision = torch.tensor([[[0.0, -0.5]]]).double(), torch.tensor([[[4.0, 1.0]]]).double()
        held = torch.zeros(4000, 1, 2, dtype=torch.float64)
        for _ in range(20):
            held, rate = draw_coefficients(
                readouts.Poisson(), None, counts, None, design.expand(4000, -1, -1), held, mean, precision
            )
    axis = torch.linspace(-4.0, 4.0, 301, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    predictor = grid @ design[0].mT
    weight = (counts[0, :, 0] * predictor - predictor.exp()).sum(-1) - 0.5 * (
        precision[0] * (grid - mean[0]).square()
    ).sum(-1)
    weight = torch.softmax(weight, 0)
    centre = (weight[:, None] * grid).sum(0)
    sd = ((weight[:, None] * grid.square()).sum(0) - centre.square()).sqrt()
    assert float(rate.mean()) < 0.999
    assert bool(((held[:, 0].mean(0) - centre).abs() < 0.08 * sd).all())
    assert bool(((held[:, 0].std(0) / sd - 1.0).abs() < 0.08).all())


def test_gaussian_coefficients_come_from_their_conditional():
    with random_stream(3):
        design = torch.randn(1, 9, 2, dtype=torch.float64)
        values = torch.randn(1, 9, 1, dtype=torch.float64)
        seen = torch.tensor([True] * 7 + [False] * 2)[:, None]
        noise = torch.full((1, 1, 1), 0.7, dtype=torch.float64)
        mean, precision = torch.zeros(1, 1, 2).double(), torch.ones(1, 1, 2).double()
        held = torch.zeros(20000, 1, 2, dtype=torch.float64)
        drawn, rate = draw_coefficients(
            readouts.Gaussian(), noise, values, seen, design.expand(20000, -1, -1), held, mean, precision
        )
    assert bool((rate == 1.0).all())
    kept = design[0, :7]
    hessian = kept.mT @ kept / 0.49 + torch.eye(2, dtype=torch.float64)
    centre = torch.linalg.solve(hessian, kept.mT @ values[0, :7, 0] / 0.49)
    torch.testing.assert_close(drawn[:, 0].mean(0), centre, atol=0.02, rtol=0.0)
    torch.testing.assert_close(drawn[:, 0].mT.cov(), torch.linalg.inv(hessian), atol=0.02, rtol=0.05)


def test_the_noise_walks_to_its_posterior():
    prior = torch.distributions.LogNormal(torch.zeros(1).double(), 1.0)
    with random_stream(4):
        values = torch.randn(1, 15, 1, dtype=torch.float64) * 0.8
        noise = torch.ones(3000, 1, dtype=torch.float64)
        step = torch.full_like(noise, 0.4)
        for _ in range(60):
            noise, _ = draw_noise(
                readouts.Gaussian(), prior, noise, values, None, torch.zeros(3000, 15, 1).double(), step
            )
    axis = torch.linspace(0.05, 6.0, 4000, dtype=torch.float64)
    score = -15 * axis.log() - 0.5 * values.square().sum() / axis.square() + prior.log_prob(axis)
    weight = torch.softmax(score, 0)
    centre = float((weight * axis).sum())
    sd = float((weight * axis.square()).sum() - centre**2) ** 0.5
    assert abs(float(noise.mean()) - centre) < 0.08 * sd


def chain_of(bins: int, lead: tuple[int, ...] = (1, 1)) -> GaussMarkov:
    with random_stream(6):
        return GaussMarkov.from_dynamics(
            0.5 * torch.randn(*lead, 2, 2), torch.eye(2), num_bins=bins, initial_covariance=torch.eye(2)
        ).condition(torch.eye(2).expand(1, bins, 2, 2), torch.randn(*lead, bins, 2))


def test_a_chain_parted_at_bins_is_the_dense_conditional():
    chain = chain_of(9)
    with random_stream(7):
        path = torch.randn(1, 1, 9, 2, dtype=torch.float64)
    still = torch.tensor([False, False, True, False, False, False, True, True, False])
    found = parted(chain, path, still)
    unit = torch.eye(18, dtype=torch.float64).reshape(18, 1, 1, 9, 2)
    precision = -torch.stack([(chain.force(column) - chain.linear).flatten() for column in unit])
    held = still.repeat_interleave(2)
    rest = torch.linalg.inv(precision[~held][:, ~held])
    pull = chain.linear.flatten()[~held] - precision[~held][:, held] @ path.flatten()[held]
    torch.testing.assert_close(found.mean.flatten()[~held], rest @ pull)
    torch.testing.assert_close(found.mean.flatten()[held], path.flatten()[held])
    variance = found.variance.flatten()[~held]
    torch.testing.assert_close(variance, rest.diagonal())


def test_a_path_moved_block_by_block_keeps_its_law():
    many, bins = 3000, 7
    near, more = chain_of(bins), torch.tensor([[0.6, 0.2], [0.2, 0.4]], dtype=torch.float64)
    target = near.condition(more.expand(1, bins, 2, 2), torch.zeros(1, 1, bins, 2))

    def rest(path):
        force = -path @ more
        return 0.5 * (path * force).sum(-1), force

    with random_stream(8):
        path = torch.zeros(many, 1, bins, 2, dtype=torch.float64)
        for round_ in range(24):
            place = (torch.arange(bins) + round_) % 4
            block = torch.where(place == 0, -1, (torch.arange(bins) + round_ % 4) // 4)
            path, acceptance = turn(near.expand((many, 1)), rest, path, block)
    assert acceptance.shape[:2] == (many, 1) and 0.8 < float(acceptance.mean()) < 1.0
    score = (path.mean(0) - target.mean) / (target.variance / many).sqrt()
    assert float(score.abs().max()) < 4.0
    ratio = path.var(0) / target.variance[0]
    assert float((ratio - 1.0).abs().max()) < 4.0 * (2.0 / many) ** 0.5
