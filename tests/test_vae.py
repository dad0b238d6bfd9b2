"""Autoencoders: against probabilistic PCA in closed form, a dense Gaussian process, and the exact integral."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import scipy.stats
import torch
import zoo
from torch.distributions import MultivariateNormal

import pyrodyn as dyn
from pyrodyn import guides, inference, models, readouts
from pyrodyn.distributions import GaussianProcess, GaussMarkov
from pyrodyn.errors import CollapseError, ModelError
from pyrodyn.inference import LocalInference, Training, collapse
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.models.vae import VAEParameters
from pyrodyn.program import globals_given
from pyrodyn.recording import Recording

LINEAR = models.VAE(2, hidden=(), readout=readouts.Gaussian())


@cache
def points(number: int = 600, units: int = 6) -> Recording:
    """Draws of probabilistic PCA: single bins."""
    rng = np.random.default_rng(3)
    loading = rng.normal(size=(units, 2))
    values = rng.normal(size=(number, 2)) @ loading.T + 0.6 * rng.normal(size=(number, units)) + rng.normal(size=units)
    return Recording.from_arrays(
        values[:, None], bin_width=1.0, counts=False, center=np.zeros(units), scale=np.ones(units)
    )


def probabilistic_pca(recording: Recording, dim: int) -> tuple[float, np.ndarray, np.ndarray, float]:
    """The largest log likelihood in closed form, and where it is reached."""
    values = recording.values.reshape(-1, recording.num_units).numpy()
    mean = values.mean(0)
    covariance = np.cov(values.T, bias=True)
    power, basis = np.linalg.eigh(covariance)
    power, basis = power[::-1], basis[:, ::-1]
    noise = power[dim:].mean()
    units = len(power)
    log_likelihood = (
        -0.5
        * len(values)
        * (units * math.log(2 * math.pi) + np.log(power[:dim]).sum() + (units - dim) * math.log(noise) + units)
    )
    return log_likelihood, basis[:, :dim] * (power[:dim] - noise) ** 0.5, mean, noise


def test_the_integral_of_the_linear_model_is_probabilistic_pca():
    recording = points()
    best, loading, mean, noise = probabilistic_pca(recording, 2)
    parameters = VAEParameters(
        None, None, None, None, None, None, None,
        torch.from_numpy(loading.copy()), torch.from_numpy(mean), torch.full((6,), math.sqrt(noise)).double(),
    )  # fmt: skip
    found = collapse(LINEAR).marginal(parameters, recording).log_prob(recording.observations).sum()
    assert float(found) == pytest.approx(best, rel=1e-10)
    dense = scipy.stats.multivariate_normal(mean, loading @ loading.T + noise * np.eye(6))
    assert float(found) == pytest.approx(dense.logpdf(recording.values[:, 0].numpy()).sum(), rel=1e-10)


def test_an_encoder_reaches_probabilistic_pca_within_half_a_percent():
    """The bound at the fitted weights, the exact integral there, and the best there is, in closed form."""
    recording = points()
    engine = inference.SVI(
        steps=400, learning_rate=0.03, particles=1, draws=20, guide=guides.Amortised(hidden_dim=8),
        training=Training(schedule=inference.Cosine(warm_up=20), hold=200),
    )  # fmt: skip
    draws = engine.run(LINEAR, recording, seed=0)
    values = {name: value[0] for name, value in draws.samples.items()}
    parameters = globals_given(LINEAR, {name: value.unsqueeze(1) for name, value in values.items()}, recording)
    exact = float(collapse(LINEAR).marginal(parameters, recording).log_prob(recording.observations).sum())
    best, *_ = probabilistic_pca(recording, 2)
    density = inference.LogDensity(collapse(LINEAR), recording)
    with torch.no_grad():
        vector = density.unconstrain({name: value.unsqueeze(1) for name, value in values.items()})
        prior = float(density(vector)) - exact
    bound = draws.notes["elbo"] - prior  # the trials' part
    assert bound < exact + 3.0  # up to the noise of one draw a step
    assert abs(bound - exact) < 0.005 * abs(exact)
    assert abs(exact - best) < 0.005 * abs(best)


def test_more_draws_tighten_the_bound_up_to_the_evidence():
    recording = points(60)
    parameters = globals_given(LINEAR, zoo.prior_draws(LINEAR, recording, (2,)), recording)
    exact = collapse(LINEAR).marginal(parameters, recording).log_prob(recording.observations)
    with random_stream(0), numerics():
        found = LocalInference(few=0, steps=150).infer(LINEAR, parameters, recording)
        mean, tight = found.log_evidence(100)
    assert bool((tight >= mean - 1e-9).all())
    assert bool((mean.mean(1) < exact.mean(1)).all())
    torch.testing.assert_close(tight.mean(1), exact.mean(1), rtol=0, atol=0.2)


# ------------------------------------------------------------------------------------------ laws over time


def irregular(bins: int = 7) -> Recording:
    rng = np.random.default_rng(0)
    time = np.cumsum(0.2 + rng.random(bins))
    return Recording.from_arrays(rng.normal(size=(3, bins, 4)), time=time, condition=["a", "b", "a"], counts=False)


@pytest.mark.parametrize("time", [models.MarkovPrior(), models.SmoothPrior(), models.StaticPrior()])
@pytest.mark.parametrize("conditions", [(), ("a", "b")])
@pytest.mark.parametrize("regular", [True, False])
def test_paths_are_the_gaussian_process_that_they_claim_to_be(time, conditions, regular):
    model = models.VAE(2, hidden=(), time=time, conditions=conditions, readout=readouts.Gaussian())
    recording = irregular()
    if regular:
        recording = Recording.from_arrays(recording.values, bin_width=0.5, condition=["a", "b", "a"], counts=False)
    values = zoo.prior_draws(model, recording, (2,))
    parameters = globals_given(model, values, recording)
    law = model.latent_path(parameters, recording)
    assert isinstance(law, GaussianProcess if isinstance(time, models.SmoothPrior) else GaussMarkov)
    path = law.expand((2, 3)).sample()
    found = law.log_prob(path)
    apart = np.abs(recording.time[:, None] - recording.time)
    for s in range(2):
        for i in range(3):
            total = 0.0
            for k in range(2):
                if isinstance(time, models.StaticPrior):
                    correlation = np.eye(7)
                else:
                    ratio = apart / float(parameters.time_constant[s, 0, k])
                    smooth = isinstance(time, models.SmoothPrior)
                    correlation = np.exp(-0.5 * ratio**2) + 1e-6 * np.eye(7) if smooth else np.exp(-ratio)
                which = "ab".index(str(recording.condition[i]))
                mean = float(parameters.condition_mean[s, 0, which, k]) if conditions else 0.0
                sd = float(parameters.condition_sd[s, 0, which, k]) if conditions else 1.0
                dense = MultivariateNormal(
                    torch.full((7,), mean, dtype=torch.float64), torch.from_numpy(sd**2 * correlation)
                )
                total += float(dense.log_prob(path[s, i, :, k]))
            assert float(found[s, i]) == pytest.approx(total, rel=1e-8)


def test_a_process_times_potentials_is_the_dense_product():
    law = GaussianProcess(
        torch.randn(3, 5, 2, dtype=torch.float64),
        torch.stack([torch.from_numpy(np.exp(-0.5 * np.subtract.outer(range(5), range(5)) ** 2 / c)) for c in (1, 4)])
        + 1e-6 * torch.eye(5, dtype=torch.float64),
    )
    precision = torch.rand(3, 5, 2, dtype=torch.float64)
    precision[0, 2] = 0.0
    linear = torch.randn(3, 5, 2, dtype=torch.float64)
    found = law.condition(precision, linear)
    for i in range(3):
        for k in range(2):
            prior = torch.linalg.inv(law.covariance[k])
            covariance = torch.linalg.inv(prior + torch.diag(precision[i, :, k]))
            mean = covariance @ (prior @ law.mean[i, :, k] + linear[i, :, k])
            torch.testing.assert_close(found.mean[i, :, k], mean, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found.covariance[i, k], covariance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.variance[1, :, 0], found.covariance[1, 0].diagonal())
    noise = torch.randn(3, 5, 2, dtype=torch.float64)
    path = law.transform(noise)
    dense = MultivariateNormal(torch.zeros(5, dtype=torch.float64), law.covariance)
    torch.testing.assert_close(law.log_prob(path), dense.log_prob((path - law.mean).mT).sum(-1), rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------------------------------ decoders


def test_a_network_is_never_integrated_out():
    """The last layer has as many units as there are latents: shapes alone would not tell."""
    model = models.VAE(2, hidden=(2,), readout=readouts.Gaussian())
    with pytest.raises(CollapseError, match="NetworkReadout is not affine in the path"):
        collapse(model).check(points())


def test_the_decoder_is_the_network_it_says():
    model = models.VAE(2, hidden=(3, 4))
    recording = zoo.blank(trials=2, bins=3)
    parameters = globals_given(model, zoo.prior_draws(model, recording, (5,)), recording)
    path = torch.randn(5, 2, 3, 2, dtype=torch.float64)
    found = model.readout_law(parameters, path, recording).mean
    for s, i, t in np.ndindex(5, 2, 3):
        p = [None if value is None else value[s, 0].numpy() for value in parameters]
        hidden = np.tanh(p[5] @ np.tanh(p[3] @ path[s, i, t].numpy() + p[4]) + p[6])
        np.testing.assert_allclose(found[s, i, t], np.exp(p[7] @ hidden + p[8]), rtol=1e-10)


def test_conditions_that_the_model_does_not_know_are_named():
    model = models.VAE(2, conditions=("a", "c"), readout=readouts.Gaussian())
    with pytest.raises(ModelError, match=r"conditions \['b'\].*knows \['a', 'c'\]"):
        model.check(irregular())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": (3, 3, 3)}, "at most two layers"),
        ({"conditions": ("a",)}, "at least two different names"),
        ({"time": None}, "time must be StaticPrior"),
        ({"latent_dim": 0}, "latent_dim must be"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ModelError, match=message):
        models.VAE(**({"latent_dim": 2} | options))


def test_the_linear_static_start_is_probabilistic_pca():
    recording = points()
    values = LINEAR.initial_values(recording)
    loading = values["weights"] / math.sqrt(2.0)
    _, exact, _, _ = probabilistic_pca(recording, 2)
    np.testing.assert_allclose(loading @ loading.mT, exact @ exact.T, rtol=1e-8, atol=1e-8)


def test_a_posterior_of_the_network_is_read_trial_by_trial():
    """What the encoder says of one trial does not depend on the others."""
    model = models.VAE(2, hidden=(5,), time=models.MarkovPrior())
    like = zoo.blank(trials=6, bins=8)
    recording = dyn.simulate(model, like, seed=0, values={"offset": torch.full((4,), 0.5)})[0]
    with random_stream(0), numerics():
        guide = guides.Amortised(hidden_dim=4)(model, recording, guides.Start(model.initial_values(recording), None))
        parameters = globals_given(model, model.initial_values(recording), recording)
        law = guide.recognition.law(parameters, recording)
        alone = guide.recognition.law(parameters, recording.isel(trial=[4]))
    torch.testing.assert_close(alone.mean[0], law.mean[4], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(alone.covariance[0], law.covariance[4], rtol=1e-10, atol=1e-12)
