"""Linear dynamics in continuous time against Gaussian processes written out in full."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import zoo
from scipy.stats import multivariate_normal

import pyrodyn as dyn
from pyrodyn import models, readouts
from pyrodyn.distributions import GaussMarkov, varying_chain
from pyrodyn.errors import ModelError
from pyrodyn.inference import collapse
from pyrodyn.models.linear_sde import LinearSDEParameters
from pyrodyn.recording import Recording


def irregular(trials: int = 2, bins: int = 12, units: int = 3, seed: int = 0, **more) -> Recording:
    rng = np.random.default_rng(seed)
    return Recording.from_arrays(
        rng.normal(size=(trials, bins, units)), time=np.sort(rng.uniform(0.0, 3.0, bins)), counts=False, **more
    )


def kernel(drift: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Cov(x(t), x(s)) = exp(A (t - s)) for t >= s, all times against all, (time x latent, time x latent)."""
    dim = len(drift)
    found = np.empty((len(times), dim, len(times), dim))
    for i, t in enumerate(times):
        for j, s in enumerate(times):
            moved = scipy.linalg.expm(drift * abs(t - s))
            found[i, :, j] = moved if t >= s else moved.T
    return found.reshape(len(times) * dim, -1)


def parameters_of(model, recording, seed) -> LinearSDEParameters:
    drawn = dyn.program.globals_given(model, zoo.prior_draws(model, recording, (1,), seed=seed), recording)
    return LinearSDEParameters(*(None if part is None else part[0, 0] for part in drawn))


def dense(parameters: LinearSDEParameters, recording: Recording, trial: int, push=None):
    """Posterior mean and covariance of the path, and log evidence, by conditioning one big Gaussian."""
    loading, bins = parameters.loading.numpy(), recording.num_bins
    dim = loading.shape[1]
    prior = kernel(parameters.drift.numpy(), recording.time)
    mean = np.zeros(bins * dim) if push is None else push
    seen = np.ones((bins, len(loading)), bool) if recording.mask is None else recording.mask[trial].numpy()
    design = np.kron(np.eye(bins), loading)[seen.ravel()]
    noise = np.diag(np.tile(parameters.noise.numpy() ** 2, bins)[seen.ravel()])
    values = recording.values[trial].numpy()[seen]
    expected = design @ mean + np.tile(parameters.offset.numpy(), bins)[seen.ravel()]
    total = design @ prior @ design.T + noise
    gain = np.linalg.solve(total, design @ prior).T
    evidence = multivariate_normal(expected, total).logpdf(values)
    return mean + gain @ (values - expected), prior - gain @ design @ prior, evidence


@pytest.mark.parametrize("latents", [1, 2, 3])
@pytest.mark.parametrize("gaps", [False, True])
def test_irregular_times_and_asynchronous_gaps_equal_a_dense_gaussian_process(latents, gaps) -> None:
    mask = np.random.default_rng(5).random((2, 12, 3)) < 0.6 if gaps else None
    recording = irregular(mask=mask)
    model = models.LinearSDE(latents, readouts.Gaussian(), time_constant=0.4)
    parameters = parameters_of(model, recording, seed=latents)
    law = collapse(model).path_posterior(parameters, recording)
    evidence = dyn.conditioning.path_evidence(*collapse(model).factors(parameters, recording), recording.values)
    for trial in range(2):
        mean, covariance, expected = dense(parameters, recording, trial)
        np.testing.assert_allclose(law.mean[trial].ravel().numpy(), mean, atol=1e-8)
        blocks = covariance.reshape(12, latents, 12, latents)
        for t in range(12):
            np.testing.assert_allclose(law.covariance[trial, t].numpy(), blocks[t, :, t], atol=1e-8)
            if t:
                np.testing.assert_allclose(law.cross_covariance[trial, t - 1].numpy(), blocks[t - 1, :, t], atol=1e-8)
        assert float(evidence[trial]) == pytest.approx(expected, abs=1e-8)


def test_one_latent_is_an_ornstein_uhlenbeck_process() -> None:
    """Its kernel is exp(-|t - s| / tau): an independent form of the one above."""
    recording = irregular(units=1, trials=1)
    model = models.LinearSDE(1, readouts.Gaussian())
    part = torch.ones(1, dtype=torch.float64)
    parameters = LinearSDEParameters(-torch.ones(1, 1).double() / 0.3, part[:, None], 0 * part, 0.5 * part, None)
    evidence = dyn.conditioning.path_evidence(*collapse(model).factors(parameters, recording), recording.values)
    total = np.exp(-np.abs(recording.time[:, None] - recording.time) / 0.3) + 0.25 * np.eye(12)
    expected = multivariate_normal(np.zeros(12), total).logpdf(recording.values[0, :, 0].numpy())
    assert float(evidence) == pytest.approx(expected, abs=1e-8)


def test_equal_and_unequal_steps_agree_where_they_meet() -> None:
    """The same recording, once on its grid with hidden bins and once with these bins left out."""
    rng = np.random.default_rng(0)
    kept = np.sort(rng.choice(30, 12, replace=False))
    mask = np.isin(np.arange(30), kept)
    inputs = np.where(np.isin(np.arange(30), kept)[:, None], rng.normal(size=(30, 1)), 0.0)[None]
    # An input is held since the bin before: repeat each one over the bins that will be left out.
    place = np.searchsorted(kept, np.arange(30)).clip(max=11)
    inputs = inputs[:, kept][:, place]
    values = rng.normal(size=(1, 30, 3))
    options = {"counts": False, "center": np.zeros(3), "scale": np.ones(3)}
    whole = Recording.from_arrays(values, bin_width=0.1, mask=mask[None], inputs=inputs, **options)
    part = whole.isel(time=kept)
    assert whole.regular and not part.regular
    model = models.LinearSDE(2, readouts.Gaussian())
    parameters = parameters_of(model, whole, seed=3)
    laws = [collapse(model).path_posterior(parameters, recording) for recording in (whole, part)]
    scores = [dyn.conditioning.path_evidence(*collapse(model).factors(parameters, r), r.values) for r in (whole, part)]
    torch.testing.assert_close(laws[0].mean[:, kept], laws[1].mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(laws[0].covariance[:, kept], laws[1].covariance.expand(1, 12, 2, 2), rtol=0, atol=1e-9)
    torch.testing.assert_close(*scores, rtol=0, atol=1e-8)


def test_a_held_input_moves_the_path_as_the_equation_says() -> None:
    """Against fine Euler steps of dm/dt = A m + B u."""
    recording = irregular(inputs=np.random.default_rng(3).normal(size=(2, 12, 2)))
    model = models.LinearSDE(2, readouts.Gaussian(), time_constant=0.5)
    parameters = parameters_of(model, recording, seed=1)
    mean = model.latent_path(parameters, recording).mean.numpy()
    drift, gain = parameters.drift.numpy(), parameters.input_gain.numpy()
    for trial in range(2):
        state, drive = np.zeros(2), recording.inputs[trial].numpy()
        for t, step in enumerate(np.diff(recording.time)):
            for _ in range(4000):
                middle = state + 0.5 * step / 4000 * (drift @ state + gain @ drive[t + 1])
                state = state + step / 4000 * (drift @ middle + gain @ drive[t + 1])
            np.testing.assert_allclose(mean[trial, t + 1], state, atol=1e-6)


def test_every_draw_is_stationary_with_unit_covariance() -> None:
    model, recording = models.LinearSDE(3, readouts.Gaussian()), irregular(units=4)
    drawn = dyn.program.globals_given(model, zoo.prior_draws(model, recording, (50,)), recording)
    noise = -(drawn.drift + drawn.drift.mT)
    assert float(torch.linalg.eigvalsh(noise).min()) > 0.0
    assert float(torch.linalg.eigvals(drawn.drift).real.max()) < 0.0
    one = drawn.drift[0, 0].numpy()
    np.testing.assert_allclose(scipy.linalg.solve_continuous_lyapunov(one, -noise[0, 0].numpy()), np.eye(3), atol=1e-8)
    rates = zoo.prior_draws(models.LinearSDE(1, readouts.Gaussian()), recording, (4000,), seed=2)["relaxation"]
    assert float(rates.square().mean()) == pytest.approx(1.0, abs=0.1)  # the mean relaxation rate, times tau


def test_varying_steps_that_do_not_vary_are_a_steady_chain() -> None:
    rng = torch.Generator().manual_seed(0)
    moved = 0.4 * torch.randn(2, 1, 3, 3, generator=rng, dtype=torch.float64)
    noise = torch.eye(3, dtype=torch.float64) + 0.1
    mean, drift = torch.randn(2, 1, 3, generator=rng).double(), torch.randn(2, 4, 6, 3, generator=rng).double()
    steady = GaussMarkov.from_dynamics(
        moved, noise, num_bins=7, initial_covariance=2.0 * noise, initial_mean=mean, drift=drift
    )
    varying = varying_chain(
        moved.unsqueeze(-3).expand(2, 1, 6, 3, 3),
        noise.expand(6, 3, 3),
        initial_covariance=2.0 * noise,
        initial_mean=mean,
        drift=drift,
    )
    path = torch.randn(2, 4, 7, 3, generator=rng).double()
    assert varying.batch_shape == steady.batch_shape == (2, 4)
    torch.testing.assert_close(varying.log_prob(path), steady.log_prob(path), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(varying.mean, steady.mean)
    built = GaussMarkov(varying.diagonal, varying.upper, varying.linear).log_normaliser
    torch.testing.assert_close(varying.log_normaliser, built, rtol=1e-11, atol=1e-11)


def test_the_start_keeps_what_the_moments_say() -> None:
    """Cayley's transform and back: eigenvalues of the first guess in discrete time, up to third order in the step."""
    recording = dyn.systems.linear_spiral(trials=20, bins=150, bin_width=0.02).recording
    model = models.LinearSDE(2, readouts.Gaussian())
    start = dyn.program.globals_given(model, model.initial_values(recording), recording)
    values = torch.linalg.eigvals(start.drift)
    assert (values.imag.abs() - 4.0 * math.pi).abs().max() < 2.0 and values.real.max() < 0.0


def test_options_and_recordings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="time_constant must be positive"):
        models.LinearSDE(2, time_constant=0.0)
    with pytest.raises(ModelError, match="lower latent_dim"):
        models.LinearSDE(4).check(irregular())
