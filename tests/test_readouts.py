"""Readouts against scipy, autograd and quadrature."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
import zoo
from pyro import poutine
from torch import Tensor
from torch.autograd import gradcheck

from pyrodyn.errors import ReadoutError
from pyrodyn.inference.engine import numerics
from pyrodyn.readouts import AffineReadout, Bernoulli, Gaussian, NegativeBinomial, Poisson, Readout
from pyrodyn.recording import Recording

LAWS = [pytest.param(law, id=type(law).__name__) for law in zoo.READOUTS]
PREDICTORS = torch.tensor([-12.0, -3.0, -0.4, 0.0, 0.7, 2.5, 6.0], dtype=torch.float64)


def noise_of(law: Readout, size: int) -> Tensor | None:
    return None if law.noise_name is None else torch.linspace(0.4, 3.0, size, dtype=torch.float64)


def values_of(law: Readout) -> Tensor:
    """Some of the support."""
    if isinstance(law, Gaussian):
        return torch.tensor([-4.0, 0.3, 25.0], dtype=torch.float64)
    return torch.tensor([0.0, 1.0] if isinstance(law, Bernoulli) else [0.0, 1.0, 7.0, 300.0], dtype=torch.float64)


def scipy_log_prob(law: Readout, predictor: float, noise: float, value: float) -> float:
    if isinstance(law, Gaussian):
        return float(scipy.stats.norm(predictor, noise).logpdf(value))
    if isinstance(law, Poisson):
        return float(scipy.stats.poisson(math.exp(predictor)).logpmf(value))
    if isinstance(law, NegativeBinomial):
        mean = math.exp(predictor)
        return float(scipy.stats.nbinom(noise, noise / (noise + mean)).logpmf(value))
    return float(scipy.stats.bernoulli.logpmf(value, 1.0 / (1.0 + math.exp(-predictor))))


# ---------------------------------------------------------------------------------------------- elementwise


@pytest.mark.parametrize("law", LAWS)
def test_log_probability_equals_scipy(law):
    for noise in (0.3, 1.0, 40.0):
        for value in values_of(law):
            found = law.log_prob(PREDICTORS, torch.tensor(noise, dtype=torch.float64), value)
            expected = [scipy_log_prob(law, float(p), noise, float(value)) for p in PREDICTORS]
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_score_and_curvature_are_the_derivatives(law):
    for value in values_of(law):
        predictor = PREDICTORS.clone().requires_grad_()
        noise = noise_of(law, len(PREDICTORS))
        (slope,) = torch.autograd.grad(law.log_prob(predictor, noise, value).sum(), predictor, create_graph=True)
        torch.testing.assert_close(law.score(predictor, noise, value), slope, rtol=1e-10, atol=1e-12)
        (bend,) = torch.autograd.grad(slope.sum(), predictor)
        found = law.curvature(predictor, noise, value)
        torch.testing.assert_close(found, -bend, rtol=1e-10, atol=1e-12)
        assert bool((found >= 0).all())  # log-concave, as the Laplace approximation needs


@pytest.mark.parametrize("law", [Poisson(), NegativeBinomial(), Bernoulli()], ids=lambda law: type(law).__name__)
@pytest.mark.parametrize("predictor", [-2.0, 0.5, 3.0])
def test_masses_sum_to_one_with_the_mean_and_variance_promised(law, predictor):
    counts = torch.arange(2 if isinstance(law, Bernoulli) else 3000, dtype=torch.float64)
    noise = None if law.noise_name is None else torch.tensor(1.7, dtype=torch.float64)
    at = torch.tensor(predictor, dtype=torch.float64)
    mass = law.log_prob(at, noise, counts).exp()
    mean = (counts * mass).sum()
    assert abs(float(mass.sum()) - 1.0) < 1e-10
    torch.testing.assert_close(mean, law.mean(at, noise), rtol=1e-10, atol=0)
    variance = float(((counts - mean).square() * mass).sum())
    mu = float(mean)
    expected = {Poisson: mu, NegativeBinomial: mu + mu**2 / 1.7, Bernoulli: mu * (1.0 - mu)}[type(law)]
    assert variance == pytest.approx(expected, rel=1e-9)


def test_negative_binomial_becomes_poisson():
    value = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    at = torch.tensor(0.7, dtype=torch.float64)
    found = NegativeBinomial().log_prob(at, torch.tensor(1e8, dtype=torch.float64), value)
    torch.testing.assert_close(found, Poisson().log_prob(at, None, value), rtol=0, atol=1e-6)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("predictor", "variance"), [(-3.0, 0.01), (0.2, 0.3), (1.0, 1.0), (-0.5, 2.0)])
def test_marginal_mean_equals_the_integral(law, predictor, variance):
    noise = None if law.noise_name is None else torch.tensor(1.3, dtype=torch.float64)
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    at = torch.from_numpy(predictor + math.sqrt(variance) * nodes)
    expected = float((torch.from_numpy(weights) * law.mean(at, noise)).sum() / weights.sum())
    found = law.marginal_mean(*(torch.tensor(v, dtype=torch.float64) for v in (predictor, variance)), noise)
    assert float(found) == pytest.approx(expected, abs=1e-10 if not isinstance(law, Bernoulli) else 1e-5)


@pytest.mark.parametrize("law", LAWS)
def test_samples_follow_the_law(law):
    torch.manual_seed(0)
    noise = noise_of(law, 3)
    predictor = torch.tensor([-1.0, 0.3, 1.2], dtype=torch.float64).expand(20000, 3)
    drawn = law.sample(predictor, noise)
    assert drawn.shape == predictor.shape and drawn.dtype == torch.float64
    mean = law.mean(predictor[0], noise)
    variance = {
        "Gaussian": lambda: noise.square(),
        "Poisson": lambda: mean,
        "NegativeBinomial": lambda: mean + mean.square() / noise,
        "Bernoulli": lambda: mean * (1.0 - mean),
    }[type(law).__name__]()
    error = (drawn.mean(0) - mean) / (variance / len(drawn)).sqrt()
    assert float(error.abs().max()) < 4.0
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.15, atol=0)


@pytest.mark.parametrize("law", [Poisson(), NegativeBinomial(), Bernoulli()], ids=lambda law: type(law).__name__)
def test_extreme_predictors_stay_finite(law):
    predictor = torch.tensor([-800.0, -50.0, 50.0, 800.0], dtype=torch.float64).requires_grad_()
    noise = noise_of(law, 4)
    for value in (0.0, 1.0):
        at = torch.tensor(value, dtype=torch.float64)
        found = law.log_prob(predictor, noise, at)
        (slope,) = torch.autograd.grad(found.sum(), predictor)
        for part in (
            found,
            slope,
            law.score(predictor, noise, at),
            law.curvature(predictor, noise, at),
            law.mean(predictor, noise),
        ):
            assert bool(torch.isfinite(part).all())


# ---------------------------------------------------------------------------------------------- over a path


def affine(law: Readout, observed: Tensor | None = None, draws: tuple[int, ...] = (), seed: int = 0, **sizes):
    """A readout of random paths, and observations in its support."""
    trials, bins, units, dim = (sizes.get(k, d) for k, d in (("trials", 2), ("bins", 4), ("units", 3), ("dim", 2)))
    generator = torch.Generator().manual_seed(seed)
    lead = (*draws, 1) if draws else ()

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    path = normal(*draws, trials, bins, dim).requires_grad_()
    loading, offset = normal(*lead, units, dim).requires_grad_(), normal(*lead, units).requires_grad_()
    noise = None if law.noise_name is None else (0.5 + normal(*lead, units).square()).requires_grad_()
    torch.manual_seed(seed)
    values = law.sample(normal(trials, bins, units), None if noise is None else noise.detach().reshape(-1, units)[0])
    return AffineReadout(law, path, loading, offset, noise, observed), values, (path, loading, offset, noise)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("draws", [(), (5,), (2, 3)])
def test_a_path_is_read_out_unit_by_unit(law, draws):
    readout, values, (path, loading, offset, noise) = affine(law, draws=draws)
    assert readout.batch_shape == (*draws, 2) and readout.event_shape == (4, 3)
    found = readout.log_prob(values)
    assert found.shape == (*draws, 2)
    path, loading, offset = (part.detach() for part in (path, loading, offset))
    for index in np.ndindex(*draws, 2):
        draw, trial = ((*index[:-1], 0) if draws else ()), index[-1]
        total = 0.0
        for t in range(4):
            for n in range(3):
                predictor = loading[draw][n] @ path[index][t] + offset[draw][n]
                own = None if noise is None else noise.detach()[draw][n]
                total += float(law.log_prob(predictor, own, values[trial, t, n]))
        assert float(found[index].detach()) == pytest.approx(total, rel=1e-12)
    assert readout.mean.shape == readout.sample().shape == (*draws, 2, 4, 3)


@pytest.mark.parametrize("law", LAWS)
def test_hidden_entries_count_for_nothing_even_where_they_are_nan(law):
    observed = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(4)) < 0.6
    observed[0, 1] = False
    readout, values, leaves = affine(law, observed)
    full, _, _ = affine(law)
    expected = (law.log_prob(full.predictor, full.noise, values) * observed).sum((-2, -1))
    leaves = tuple(leaf for leaf in leaves if leaf is not None)
    for hidden in (0.0, 3.0, torch.nan, -torch.inf):
        data = torch.where(observed, values, hidden)
        found = readout.log_prob(data)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        slopes = torch.autograd.grad(found.sum(), leaves, retain_graph=True)
        assert all(bool(torch.isfinite(slope).all()) for slope in slopes)
        assert bool((slopes[0][~observed.any(-1)] == 0).all()) and bool((slopes[0][observed.any(-1)] != 0).any())
        for part in (readout.score(readout.predictor, data), readout.curvature(readout.predictor, data)):
            assert bool((part[~observed] == 0).all()) and bool((part[observed] != 0).any())


@pytest.mark.parametrize("law", LAWS)
def test_hidden_bins_equal_deleted_bins(law):
    observed = torch.ones(2, 4, 3, dtype=torch.bool)
    observed[:, [1, 3]] = False
    readout, values, (path, loading, offset, noise) = affine(law, observed)
    short = AffineReadout(law, path[:, [0, 2]], loading, offset, noise)
    torch.testing.assert_close(readout.log_prob(values), short.log_prob(values[:, [0, 2]]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_gradients(law):
    observed = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(4)) < 0.8
    _, values, leaves = affine(law, draws=(2,))

    def density(path, loading, offset, *noise):
        return AffineReadout(law, path, loading, offset, noise[0] if noise else None, observed).log_prob(values)

    assert gradcheck(density, tuple(leaf for leaf in leaves if leaf is not None))


@pytest.mark.parametrize("law", LAWS)
def test_expand_and_samples_keep_the_shapes(law):
    readout, values, _ = affine(law)
    wide = readout.expand((5, 2))
    assert wide.batch_shape == (5, 2) and wide.log_prob(values).shape == (5, 2)
    torch.testing.assert_close(wide.log_prob(values), readout.log_prob(values).expand(5, 2), rtol=1e-12, atol=0)
    assert readout.sample(torch.Size([7])).shape == (7, 2, 4, 3)


# ---------------------------------------------------------------------------------------------- sites, starts, checks


def recorded(law: Readout, values: np.ndarray | None = None, **options) -> Recording:
    rng = np.random.default_rng(0)
    if values is None:
        values = {
            "Gaussian": lambda: 30.0 + 5.0 * rng.normal(size=(40, 25, 3)),
            "Poisson": lambda: rng.poisson([0.5, 2.0, 6.0], size=(40, 25, 3)),
            "NegativeBinomial": lambda: rng.negative_binomial(2, 0.4, size=(40, 25, 3)),
            "Bernoulli": lambda: rng.random((40, 25, 3)) < [0.1, 0.5, 0.8],
        }[type(law).__name__]()
    return Recording.from_arrays(np.asarray(values, float), bin_width=0.02, unit=["a", "b", "c"], **options)


@pytest.mark.parametrize("law", LAWS)
def test_sites_are_sampled_and_initial_values_match_the_data(law):
    recording = recorded(law)

    def sites():
        law.sample_offset(recording)
        law.sample_noise(recording)

    with numerics():
        pyro.set_rng_seed(0)
        trace = poutine.trace(sites).get_trace()
    names = {"offset"} | ({law.noise_name} if law.noise_name else set())
    start = law.initial_values(recording)
    assert set(trace.nodes) - {"_INPUT", "_RETURN"} == names == set(start)
    for name in names:
        node = trace.nodes[name]
        assert node["value"].shape == start[name].shape == (3,) and node["value"].dtype == torch.float64
        assert node["infer"]["event_dims"] == ("unit",)
        assert bool(torch.isfinite(node["fn"].log_prob(start[name])))
    # Without a latent the start gives each unit its own mean.
    expected = law.mean(start["offset"], start.get(law.noise_name))
    torch.testing.assert_close(expected, recording.observations.mean((0, 1)), rtol=2e-2, atol=5e-3)
    assert law.linearise(recording).mean((0, 1)).abs().max() < 0.05


@pytest.mark.parametrize("law", LAWS)
def test_starts_of_silent_saturated_or_hidden_units_are_finite(law):
    values = np.zeros((2, 5, 3))
    values[..., 1] = 1.0
    recording = Recording.from_arrays(
        values, bin_width=0.02, center=np.zeros(3), scale=np.ones(3), mask=np.arange(3) * np.ones((2, 5, 1)) < 2
    )
    for value in (*law.initial_values(recording).values(), law.linearise(recording)):
        assert bool(torch.isfinite(value).all())


@pytest.mark.parametrize(
    ("law", "bad", "words"),
    [
        (Poisson(), 1.5, "non-negative whole counts"),
        (Poisson(), -1.0, "non-negative whole counts"),
        (NegativeBinomial(), 0.25, "non-negative whole counts"),
        (Bernoulli(), 2.0, "zeros and ones"),
    ],
)
def test_values_outside_the_support_are_named_with_trial_time_and_unit(law, bad, words):
    values = np.zeros((2, 5, 3))
    values[..., 0] = 1.0
    values[1, 3, 2] = bad
    recording = recorded(law, values, trial=["t1", "t2"], counts=False, center=np.zeros(3), scale=np.ones(3))
    with pytest.raises(ReadoutError) as caught:
        law.check(recording)
    message = str(caught.value)
    for part in (type(law).__name__, words, "1 other value", str(bad), "trial t2", "time 0.06 s", "unit 'c'", "use "):
        assert part in message, (part, message)
    law.check(recording.hide(trial="t2", time=[0.06], unit="c"))  # hidden, it is nobody's business
    law.check(recording.blank())
    Gaussian().check(recording)
