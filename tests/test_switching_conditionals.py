"""Moves of a switching path's parameters given path and modes, against closed forms and importance sampling."""

from __future__ import annotations

import _switching
import numpy as np
import pytest
import scipy.stats
import torch

from pyrodyn.conditionals.modes import settle, settle_from
from pyrodyn.conditionals.steps import StepSums, bartlett, draw_coefficients, draw_precision, draw_scale, step_sums
from pyrodyn.conditionals.transitions import StateLogits, draw_dirichlet, elliptical_slice, transition_counts
from pyrodyn.distributions import SwitchingPath
from pyrodyn.readouts import AffineReadout, Gaussian
from pyrodyn.systems import nascar

MANY = 4000


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("lags", [1, 2])
def test_sums_are_those_of_the_steps_one_by_one(lags):
    path, inputs = normal(0, 2, 3, 6, 2), normal(1, 3, 6, 1)
    weight = torch.rand(2, 3, 6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sums = step_sums(path, weight, lags, inputs)
    for c in range(2):
        for k in range(4):
            gram = cross = square = count = 0.0
            for i in range(3):
                for t in range(lags, 6):
                    past = [path[c, i, t - 1 - lag] for lag in range(lags)]
                    z = torch.cat([*past, torch.ones(1, dtype=torch.float64), inputs[i, t]])
                    w = weight[c, i, t, k]
                    gram, cross = gram + w * z.outer(z), cross + w * z.outer(path[c, i, t])
                    square, count = square + w * path[c, i, t].outer(path[c, i, t]), count + w
            for found, expected in zip(sums, (count, gram, cross, square), strict=True):
                torch.testing.assert_close(found[c, k], expected)


def test_expected_sums_are_means_over_paths():
    law = _switching.law(1, modes=3, bins=6)
    weight = torch.softmax(normal(0, 1, 1, 6, 3), -1)
    chain = law.given_modes(weight[0]).expand((1, 1))
    torch.manual_seed(0)
    paths = chain.sample((40_000,))[:, 0]
    drawn = step_sums(paths, weight.expand(len(paths), -1, -1, -1), 1)
    found = step_sums(chain.mean, weight, 1, law=chain)
    for of_law, of_paths in zip(found, drawn, strict=True):
        error = of_paths.std(0) / len(paths) ** 0.5
        assert float(((of_law[0] - of_paths.mean(0)).abs() / (error + 1e-12)).max()) < 4.5


@pytest.mark.parametrize("seed", range(3))
def test_modes_and_path_settle_about_as_high_as_from_the_true_modes(seed):
    """Nearly: on a race track rounds from modes that are all as probable end six hundred nats below."""
    system = nascar(bins=400, seed=seed)
    truth, variance = system.truth, system.truth.attrs
    eye = torch.eye(2, dtype=torch.float64)
    part = {name: torch.from_numpy(truth[name].values) for name in truth.data_vars if truth[name].dtype == float}
    law = SwitchingPath(
        torch.full((4,), -np.log(4.0), dtype=torch.float64),
        torch.log_softmax(part["recurrence_bias"].expand(4, -1), -1),
        part["dynamics"],
        part["bias"].unsqueeze(0),
        variance["process_variance"] * eye.expand(4, 2, 2),
        torch.zeros(2, dtype=torch.float64),
        4.0 * eye,
        num_bins=400,
        recurrence=part["recurrence"],
    )
    noise = torch.full((10,), variance["noise_variance"] ** 0.5, dtype=torch.float64)
    still = torch.zeros(1, 400, 2, dtype=torch.float64)
    readout = AffineReadout(Gaussian(), still, part["loading"], part["offset"], noise, None)
    values, true = system.recording.values, torch.from_numpy(truth["mode"].values)
    known = settle_from(law, readout, values, torch.nn.functional.one_hot(true, 4).double(), 15)
    blind = settle_from(law, readout, values, torch.full((1, 400, 4), 0.25, dtype=torch.float64), 15)
    found = settle(law, readout, values, (1,), 15)
    assert float(known.bound - blind.bound) > 500.0
    assert float(known.bound - found.bound) < 0.1 * float(known.bound - blind.bound)
    assert float((found.weight.argmax(-1) == true).double().mean()) > 0.98


def problem(chains: int) -> tuple[StepSums, torch.Tensor]:
    """Sums of 9 steps in the plane in two modes, one of them never visited; the same in all chains."""
    path, weight = normal(3, 1, 1, 10, 2).cumsum(2), torch.zeros(1, 1, 10, 2, dtype=torch.float64)
    weight[..., 0] = 1.0
    sums = step_sums(path, weight, 1)
    root = normal(4, 1, 2, 2, 2)
    precision = root @ root.mT + torch.eye(2)
    return StepSums(*(part.expand(chains, *part.shape[1:]) for part in sums)), precision.expand(chains, -1, -1, -1)


def test_coefficients_have_the_mean_and_covariance_of_the_dense_posterior():
    sums, precision = problem(MANY)
    mean, sd = normal(5, 3, 2), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    torch.manual_seed(1)
    drawn = draw_coefficients(sums, precision, mean, sd).flatten(-2)
    prior = torch.diag(sd.square().reciprocal().repeat_interleave(2))
    for k in range(2):
        hessian = torch.kron(sums.gram[0, k], precision[0, k]) + prior
        pull = (sums.cross[0, k] @ precision[0, k]).flatten() + prior @ mean.flatten()
        covariance = torch.linalg.inv(hessian)
        white = torch.linalg.solve_triangular(
            torch.linalg.cholesky(covariance), (drawn[:, k] - covariance @ pull).mT, upper=False
        )
        assert all(scipy.stats.kstest(row.numpy(), "norm").pvalue > 1e-3 for row in white)
        torch.testing.assert_close(white.corrcoef(), torch.eye(6, dtype=torch.float64), rtol=0, atol=4.0 / MANY**0.5)


def test_precisions_are_wishart_about_what_the_coefficients_leave_over():
    sums, _ = problem(MANY)
    coefficients = normal(6, 1, 2, 3, 2).expand(MANY, -1, -1, -1)
    scale = torch.full((MANY,), 0.7, dtype=torch.float64)
    torch.manual_seed(2)
    drawn = draw_precision(sums, coefficients, scale, 4.0)
    for k in range(2):
        rest = 0.7 * np.eye(2) + sums.residual(coefficients)[0, k].numpy()
        law = scipy.stats.wishart(4.0 + float(sums.count[0, k]), np.linalg.inv(rest))
        reference = law.rvs(MANY, random_state=np.random.default_rng(0))
        for statistic in (lambda w: w[:, 0, 0], lambda w: w[:, 0, 1], np.linalg.det):
            assert scipy.stats.ks_2samp(statistic(drawn[:, k].numpy()), statistic(reference)).pvalue > 1e-3
    # psi given the precisions of all modes: Bayes' theorem on a grid.
    held = drawn[:1]
    found = draw_scale(held.expand(MANY, -1, -1, -1), 2 * 4.0, 0.5, 5.0)
    grid = np.linspace(1e-4, 6.0, 4000)
    log_density = scipy.stats.gamma(0.5, scale=0.2).logpdf(grid)
    for matrix in held[0].numpy():
        log_density += [scipy.stats.wishart(4.0, np.eye(2) / psi).logpdf(matrix) for psi in grid]
    density = np.exp(log_density - log_density.max())
    below = np.cumsum(density) / density.sum()
    assert scipy.stats.kstest(np.interp(found.numpy(), grid, below), "uniform").pvalue > 1e-3


def test_bartlett_takes_degrees_of_each_element():
    torch.manual_seed(3)
    root = bartlett(torch.tensor([3.0, 30.0], dtype=torch.float64).expand(MANY, 2), 2)
    mean = (root @ root.mT).mean(0)
    torch.testing.assert_close(mean / torch.tensor([3.0, 30.0])[:, None, None], torch.eye(2).expand(2, 2, 2).double(),
                               rtol=0, atol=0.06)  # fmt: skip


def test_transitions_are_counted_up_to_the_end_of_a_trial():
    modes = torch.tensor([[[0, 0, 1, 2, 2], [1, 0, 2, 1, 1]]])
    inside = torch.tensor([[True] * 5, [True, True, True, False, False]])
    expected = torch.tensor([[[1, 1, 1], [1, 0, 1], [0, 0, 1]]], dtype=torch.float64)
    torch.testing.assert_close(transition_counts(modes, 3, inside), expected)
    torch.manual_seed(0)
    drawn = draw_dirichlet((1.0 + expected).expand(MANY, -1, -1, -1))
    torch.testing.assert_close(
        drawn.mean(0)[0], ((1.0 + expected) / (1.0 + expected).sum(-1, keepdim=True))[0], rtol=0, atol=0.01
    )


def logits(chains: int, steps: int = 14, modes: int = 3, seed: int = 7) -> StateLogits:
    generator = torch.Generator().manual_seed(seed)
    path = torch.randint(modes, (steps + 1,), generator=generator)
    features = normal(seed + 1, 1, steps, 2)
    basis = torch.linalg.qr(torch.eye(modes, dtype=torch.float64) - 1.0 / modes)[0][:, : modes - 1]
    return StateLogits(
        path[:-1].expand(chains, -1), path[1:].expand(chains, -1), torch.arange(steps) < steps - 1,
        features.expand(chains, -1, -1), basis, 1.0 + 2.0 * torch.eye(modes, dtype=torch.float64),
        torch.tensor([[0.5, 2.0]], dtype=torch.float64).expand(chains, -1),
    )  # fmt: skip


def test_logits_follow_their_gradient_and_hessian():
    law = logits(1)
    vector = 0.5 * normal(9, 1, 9 + 4)
    slope, root = law._expansion(vector)
    leaf = vector[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(law.log_posterior(leaf[None])[0], leaf)
    torch.testing.assert_close(slope[0], expected)
    hessian = torch.autograd.functional.hessian(lambda v: law.log_posterior(v[None])[0], vector[0])
    torch.testing.assert_close(root[0] @ root[0].mT, -hessian)
    centre, _ = law.approximation()
    assert float(law._expansion(centre)[0].abs().max()) < 1e-6


def test_draws_of_logits_agree_with_importance_sampling():
    chains = 1500
    law, wide = logits(chains, 10), logits(200_000, 10)
    generator = torch.Generator().manual_seed(1)
    table = torch._standard_gamma(wide.concentration.expand(200_000, -1, -1), generator=generator).log()
    weights = normal(11, 200_000, 2, 2) / torch.tensor([0.5, 2.0]).sqrt()
    prior = wide.pack(table, weights)
    share = torch.softmax(wide._fit(wide._logits(prior)), 0)
    assert float(1.0 / share.square().sum()) > 2000
    torch.manual_seed(4)
    state = prior[:chains].clone()
    for _ in range(20):
        state = law.draw(state)
    for statistic in (lambda v: v[:, :9].unflatten(-1, (3, 3)).softmax(-1).flatten(1), lambda v: v[:, 9:]):
        reference, drawn = statistic(prior), statistic(state)
        mean = share @ reference
        sd = (share @ (reference - mean).square()).sqrt()
        torch.testing.assert_close((drawn.mean(0) - mean) / sd, torch.zeros_like(mean), rtol=0, atol=0.12)
        torch.testing.assert_close(drawn.std(0) / sd, torch.ones_like(mean), rtol=0, atol=0.12)


def test_an_elliptical_slice_leaves_its_law_alone():
    torch.manual_seed(5)
    centre, rest = torch.tensor([1.0, -1.0], dtype=torch.float64), lambda v: -v.abs().sum(-1)
    state = torch.zeros(MANY, 2, dtype=torch.float64)
    for _ in range(15):
        state = elliptical_slice(state, centre.expand(MANY, 2), torch.randn(MANY, 2, dtype=torch.float64), rest)
    grid = np.linspace(-6.0, 6.0, 4001)
    for i in range(2):
        below = np.cumsum(np.exp(-0.5 * (grid - float(centre[i])) ** 2 - abs(grid)))
        place = np.interp(state[:, i].numpy(), grid, below / below[-1])
        assert scipy.stats.kstest(place, "uniform").pvalue > 1e-3
