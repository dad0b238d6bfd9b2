"""The law of a switching path against the sum over all paths of its modes."""

from __future__ import annotations

import _switching
import numpy as np
import pytest
import scipy.stats
import torch
from torch.autograd import gradcheck

from pyrodyn.distributions import GaussMarkov, SwitchingPath

KINDS = {
    "plain": {},
    "recurrent": {"recurrent": True},
    "inputs": {"inputs": True},
    "recurrent-inputs-lags": {"recurrent": True, "inputs": True, "lags": 3},
}


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def kind(request) -> dict:
    return request.param


def test_density_and_probabilities_are_the_sum_over_all_mode_paths(kind):
    law = _switching.law(1, **kind)
    path = law.sample()[0]
    sequences, weights = _switching.enumerate_modes(law, path)
    assert len(sequences) == 256
    torch.testing.assert_close(law.log_prob(path)[0], torch.logsumexp(weights, 0), rtol=1e-11, atol=1e-11)
    expected = _switching.marginals(sequences, weights, 2)
    torch.testing.assert_close(law.mode_probabilities(path)[0], expected, rtol=1e-10, atol=1e-11)


def test_modes_are_drawn_from_their_posterior():
    law = _switching.law(1, bins=5, recurrent=True)
    path = law.sample()
    sequences, weights = _switching.enumerate_modes(law, path[0])
    torch.manual_seed(0)
    drawn = law.expand((4000,)).sample_modes(path.expand(4000, -1, -1))
    counts = np.array([(drawn == torch.tensor(sequence)).all(-1).sum() for sequence in sequences])
    expected = 4000 * torch.softmax(weights, 0).numpy()
    rare = expected < 5.0
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def test_draws_together_equal_draws_one_by_one(kind):
    trials = 4
    law = _switching.law(2, lead=(2, 3), trials=trials, **kind)
    path = law.expand((2, 3, trials)).sample()
    together = law.log_prob(path)
    assert together.shape == (2, 3, trials)
    names = ("initial", "transition", "dynamics", "drift", "process_noise", "start_mean", "start_covariance")
    for i in range(2):
        for j in range(3):
            push, recurrence = (None if p is None else p[i, j] for p in (law.push, law.recurrence))
            alone = SwitchingPath(
                *(getattr(law, name)[i, j] for name in names), num_bins=8, recurrence=recurrence, push=push
            )
            torch.testing.assert_close(alone.log_prob(path[i, j]), together[i, j], rtol=1e-12, atol=1e-12)
            if law.lags == 1:
                weight = alone.mode_probabilities(path[i, j])
                torch.testing.assert_close(
                    alone.given_modes(weight).mean, law.given_modes(law.mode_probabilities(path)).mean[i, j]
                )


def test_gradients_are_those_of_finite_differences(kind):
    law = _switching.law(3, bins=5, **kind)
    path = law.sample()
    names = [n for n in ("initial", "transition", "dynamics", "drift", "recurrence") if getattr(law, n) is not None]
    fixed = {n: getattr(law, n) for n in ("process_noise", "start_mean", "start_covariance", "push")}

    def density(path, *parts):
        held = fixed | dict(zip(names, parts, strict=True))
        return SwitchingPath(num_bins=5, **held).log_prob(path)

    leaves = [part.detach().requires_grad_() for part in (path, *(getattr(law, n) for n in names))]
    assert gradcheck(density, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


def test_bins_behind_the_end_of_a_trial_count_for_nothing():
    inside = torch.arange(8) < torch.tensor([8, 5, 1]).unsqueeze(-1)
    law = _switching.law(4, recurrent=True, inside=inside)
    path = law.expand((3,)).sample()
    found = law.log_prob(path)
    moved = torch.where(inside.unsqueeze(-1), path, 7.0)
    torch.testing.assert_close(law.log_prob(moved), found, rtol=1e-12, atol=1e-12)
    short = _switching.law(4, bins=5, recurrent=True)
    torch.testing.assert_close(short.log_prob(path[1:2, :5]), found[1:2], rtol=1e-12, atol=1e-12)


def test_the_path_given_modes_is_the_gaussian_of_these_steps():
    for inputs in (False, True):
        law = _switching.law(5, modes=3, inputs=inputs)
        path, modes = law.sample_jointly((50,))
        weight = torch.nn.functional.one_hot(modes, 3).double()
        expected = (law.likelihood(path) * weight).sum((-2, -1)) + law.log_start(path)
        torch.testing.assert_close(law.given_modes(weight).log_prob(path), expected, rtol=1e-9, atol=1e-9)


def test_the_expected_likelihood_is_exact_on_points_that_carry_two_moments():
    law = _switching.law(6, modes=3, bins=5)
    weight = torch.softmax(torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0)).double(), -1)
    chain = law.given_modes(weight)
    precision = torch.block_diag(*chain.diagonal[0])
    for t in range(4):
        precision[2 * t : 2 * t + 2, 2 * t + 2 : 2 * t + 4] = chain.upper[0, t]
        precision[2 * t + 2 : 2 * t + 4, 2 * t : 2 * t + 2] = chain.upper[0, t].mT
    root = torch.linalg.cholesky(torch.linalg.inv(precision)) * 10**0.5
    points = chain.mean + torch.cat([root.mT, -root.mT]).reshape(20, 1, 5, 2).squeeze(1)
    torch.testing.assert_close(law.expected_likelihood(chain)[0], law.likelihood(points).mean(0))


def test_the_averaged_mode_has_the_moments_of_a_mode_drawn_at_random():
    """States at plus and minus each column of a root of the start's covariance have its two moments."""
    law = _switching.law(3, modes=3, latent=2, inputs=True, trials=2, bins=4)
    one = law.averaged()
    root = torch.linalg.cholesky(law.start_covariance[0])
    states = torch.cat([root.mT, -root.mT]) * 2**0.5
    means = torch.stack([states @ law.dynamics[0, k].mT for k in range(3)])  # (mode, state, latent)
    torch.testing.assert_close(one.dynamics[0, 0], law.dynamics[0].mean(0))
    torch.testing.assert_close(one.drift[..., 0, :], law.drift.mean(-2))
    apart = (means - means.mean(0)).flatten(0, 1)
    pushed = law.drift - law.drift.mean(-2, keepdim=True)
    expected = law.process_noise[0].mean(0) + apart.mT @ apart / len(apart)
    for i in range(2):
        own = pushed[i].flatten(0, 1)
        torch.testing.assert_close(one.process_noise[i, 0], expected + own.mT @ own / len(own))


def test_the_blurred_likelihood_is_a_gaussian_with_the_path_integrated_out_step_by_step():
    law = _switching.law(4, modes=3, bins=5)
    chain = law.given_modes(torch.softmax(torch.randn(1, 5, 3, dtype=torch.float64), -1))
    found = law.blurred_likelihood(chain)[0]
    for t in range(1, 5):
        joint = torch.cat(
            [
                torch.cat([chain.covariance[0, t - 1], chain.cross_covariance[0, t - 1]], -1),
                torch.cat([chain.cross_covariance[0, t - 1].mT, chain.covariance[0, t]], -1),
            ]
        )
        for k in range(3):
            step = torch.cat([-law.dynamics[0, k], torch.eye(2)], -1)
            mean = step @ chain.mean[0, t - 1 : t + 1].flatten() - law.drift[0, 0, k]
            covariance = law.process_noise[0, k] + step @ joint @ step.mT
            expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(torch.zeros(2))
            torch.testing.assert_close(found[t, k], expected)
    assert float(found[0].abs().max()) == 0.0


def test_draws_follow_the_law(kind):
    law = _switching.law(7, modes=3, bins=40, **kind)
    torch.manual_seed(1)
    path, modes = law.sample_jointly((300,))
    assert path.shape == (300, 1, 40, 2) and modes.shape == (300, 1, 40)
    white = law._residual(path, law._whitening[0]).take_along_dim(modes[..., law.lags :, None, None], -2)
    assert scipy.stats.kstest(white.flatten().numpy(), "norm").pvalue > 1e-3
    rows = law.transitions(path).exp().expand(300, 1, 39, 3, 3)
    chance = rows.take_along_dim(modes[..., :-1, None, None], -2).squeeze(-2)
    taken = torch.nn.functional.one_hot(modes[..., 1:], 3)
    score = (taken - chance).sum((0, 1, 2)) / (chance * (1.0 - chance)).sum((0, 1, 2)).sqrt()
    assert float(score.abs().max()) < 3.5
    first = torch.bincount(modes[..., 0].flatten(), minlength=3)
    assert scipy.stats.chisquare(first, 300 * law.initial[0].exp()).pvalue > 1e-3


def test_one_mode_is_a_linear_system():
    law = _switching.law(8, modes=1, bins=30)
    chain = GaussMarkov.from_dynamics(
        law.dynamics.squeeze(-3), law.process_noise.squeeze(-3), num_bins=30, initial_covariance=law.start_covariance,
        initial_mean=law.start_mean, drift=law.drift.squeeze(-2).expand(1, 29, 2),
    )  # fmt: skip
    path = law.sample((4,))
    torch.testing.assert_close(law.log_prob(path), chain.log_prob(path), rtol=1e-12, atol=1e-10)


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="at least the number of lags, 3, got 2"):
        _switching.law(bins=2, lags=3)
    with pytest.raises(ValueError, match="one lag alone, got 2"):
        _switching.law(lags=2).given_modes(torch.ones(1, 8, 2).double())
