"""The generator bin by bin, the controller's law, and what training makes of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import scipy.stats
import torch
import zoo
from pyro import poutine

import pyrodyn as dyn
from pyrodyn import guides, inference, models
from pyrodyn.errors import ModelError
from pyrodyn.guides import Start
from pyrodyn.inference import Training
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.networks import recall
from pyrodyn.program import globals_given, log_joint
from pyrodyn.recording import Recording

MODEL = models.LFADS(2, generator_dim=4, initial_dim=3, input_dim=2, input_degrees=None, controller_dim=3)


def logistic(value: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-value))


def test_the_factors_are_those_of_the_generator_run_bin_by_bin():
    recording = zoo.blank(trials=2, bins=5, inputs=1)
    values = zoo.prior_draws(MODEL, recording, (2,))
    parameters = globals_given(MODEL, values, recording)
    local = zoo.local_draws(MODEL, values, recording)
    shown = MODEL.latents(parameters, local, recording)["path"][1]
    rates = MODEL.expected(parameters, local, recording)
    inputs = (recording.inputs / recording.input_scale).numpy()
    for draw in range(2):
        p = {name: value[draw].squeeze(0).numpy() for name, value in values.items()}
        for trial in range(2):
            state = p["initial_map"] @ local["initial"][draw, trial].numpy() + p["initial_bias"]
            for t in range(5):
                drive = p["bias"] + p["input_weight"] @ inputs[trial, t]
                drive = drive + p["control_weight"] @ local["inferred_input"][draw, trial, t].numpy()
                reset, keep, new = np.split(drive, 3)
                own = np.split(p["recurrent"] @ state, 3)
                keep = logistic(keep + own[1])
                new = np.tanh(new + logistic(reset + own[0]) * (own[2] + p["candidate_bias"]))
                state = keep * state + (1.0 - keep) * new
                factors = p["factor_weight"] @ state
                np.testing.assert_allclose(shown[draw, trial, t], factors, rtol=1e-10)
                expected = np.exp(parameters.loading[draw, 0].numpy() @ factors + p["offset"])
                np.testing.assert_allclose(rates[draw, trial, t], expected, rtol=1e-10)


def test_inferred_inputs_are_correlated_as_they_say():
    recording = zoo.blank(trials=2, bins=6)
    values = zoo.prior_draws(MODEL, recording, ())
    parameters = globals_given(MODEL, values, recording)
    law = MODEL.input_law(parameters, recording)
    keep, sd = values["input_persistence"].squeeze(0).numpy(), values["input_sd"].squeeze(0).numpy()
    apart = np.abs(np.subtract.outer(range(6), range(6)))
    path = law.expand((3,)).sample()
    total = torch.zeros(3, dtype=torch.float64)
    for k in range(2):
        covariance = torch.from_numpy(sd[k] ** 2 * keep[k] ** apart)
        dense = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=torch.float64), covariance)
        total += dense.log_prob(path[..., k])
    torch.testing.assert_close(law.log_prob(path), total, rtol=1e-9, atol=1e-9)


def test_inferred_inputs_may_jump():
    recording = zoo.blank(trials=2, bins=6)
    values = zoo.prior_draws(MODEL, recording, ())
    model = replace(MODEL, input_degrees=3.0)
    law = model.input_law(globals_given(model, values, recording), recording)
    keep, scale = (values[name].squeeze(0).numpy() for name in ("input_persistence", "input_sd"))
    with random_stream(0):
        path = law.expand((40_000,)).sample()
    value, steps = path.numpy(), path[:, 1:].numpy() - keep * path[:, :-1].numpy()
    expected = scipy.stats.t(3.0, scale=scale).logpdf(value[:, 0]).sum(-1)
    of_steps = scipy.stats.t(3.0, scale=scale * np.sqrt(1.0 - keep**2))
    np.testing.assert_allclose(law.log_prob(path), expected + of_steps.logpdf(steps).sum((-2, -1)), rtol=1e-10)
    for t in (0, 4):  # a draw's steps are what its density says they are
        for k in range(2):
            assert scipy.stats.kstest(of_steps.cdf(steps)[:, t, k], "uniform").pvalue > 1e-3


def test_inputs_of_many_degrees_of_freedom_are_gaussian():
    recording = zoo.blank(trials=2, bins=6)
    values = zoo.prior_draws(MODEL, recording, ())
    parameters = globals_given(MODEL, values, recording)
    gaussian, close = (model.input_law(parameters, recording) for model in (MODEL, replace(MODEL, input_degrees=1e8)))
    path = gaussian.expand((3,)).sample()
    torch.testing.assert_close(close.log_prob(path), gaussian.log_prob(path), rtol=1e-6, atol=1e-6)


@cache
def simulated(trials: int = 4) -> Recording:
    return dyn.simulate(MODEL, zoo.blank(trials=trials, bins=6, inputs=1), seed=1)[0]


def traced(particles: int):
    recording = simulated()
    with random_stream(0), numerics(), zoo.pyro.settings.context(module_local_params=True):
        guide = guides.Amortised(guides.MeanField(), hidden_dim=4)(
            MODEL, recording, Start(MODEL.initial_values(recording), None)
        )
        guide(recording)
        with torch.no_grad(), poutine.block(), zoo.pyro.plate("draw", particles, dim=-2):
            trace = poutine.trace(guide).get_trace(recording)
            trace.compute_log_prob()
    sites = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["infer"].get("is_auxiliary") and name not in ("draw", "trial")
    }
    return recording, guide, sites


def test_the_program_scores_the_same_whether_or_not_the_guide_has_run_the_generator():
    recording, _, sites = traced(3)
    values = {name: site["value"] for name, site in sites.items()}
    assert recall._LAST  # the guide left its run
    with torch.no_grad():
        recalled = log_joint(MODEL, values, recording)
        assert not recall._LAST  # and it was taken
        run = log_joint(MODEL, {name: value.clone() for name, value in values.items()}, recording)
    torch.testing.assert_close(recalled, run, rtol=1e-10, atol=1e-10)


def test_the_controllers_law_of_given_inputs_is_that_of_drawn_ones():
    _, _, sites = traced(2)
    drawn = sites["inferred_input"]
    again = drawn["fn"].log_prob(drawn["value"].clone())
    torch.testing.assert_close(again, drawn["log_prob"], rtol=1e-10, atol=1e-10)
    assert again.shape == (2, 4)


def spiral(trials: int = 60, bins: int = 25, units: int = 12) -> tuple[Recording, np.ndarray]:
    """Counts driven by a turning latent that starts elsewhere in every trial; and the rates."""
    rng = np.random.default_rng(4)
    angle = rng.uniform(0.0, 2.0 * np.pi, trials)[:, None] + 0.35 * np.arange(bins)
    path = np.stack([np.cos(angle), np.sin(angle)], -1)
    rates = np.exp(path @ rng.normal(size=(2, units)) * 0.8 - 0.3)
    return Recording.from_arrays(rng.poisson(rates).astype(float), bin_width=0.05), rates


def test_a_short_training_finds_what_turns():
    recording, rates = spiral()
    model = models.LFADS(3, generator_dim=16, initial_dim=4)
    engine = inference.SVI(steps=350, particles=1, learning_rate=0.02, guide=guides.Amortised(hidden_dim=16))
    posterior = dyn.fit(model, recording, engine, seed=0)
    path = posterior["latents"]["mean"]
    assert path.dims == ("trial", "time", "latent") and path.shape == (60, 25, 3)
    found = dyn.predict(posterior, recording, draws=20, seed=0)["expected"].values
    missed = np.square(found - rates).sum() / np.square(rates - rates.mean((0, 1))).sum()
    assert missed < 0.25


def test_an_input_that_nothing_calls_for_stays_at_its_prior():
    """Noise alone: what the controller infers is as wide as the prior and carries nothing."""
    rng = np.random.default_rng(0)
    recording = Recording.from_arrays(rng.poisson(0.7, (40, 15, 8)).astype(float), bin_width=0.05)
    model = models.LFADS(2, generator_dim=8, initial_dim=2, input_dim=1, controller_dim=8)
    engine = inference.SVI(
        steps=250, particles=1, learning_rate=0.02, guide=guides.Amortised(hidden_dim=8),
        training=Training(dropout=0.3, clip=5.0),
    )  # fmt: skip
    posterior = dyn.fit(model, recording, engine, seed=0)
    rates = dyn.predict(posterior, recording, draws=20, seed=0)["expected"].values
    assert float(rates.var((0, 1)).mean()) < 0.02 * 0.7
    assert json_note(posterior, "elbo_is_of").startswith("entries hidden by coordinated dropout")


def json_note(posterior, name: str) -> str:
    import json

    return json.loads(posterior.attrs["notes"])[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be a whole number of at least 1"),
        ({"input_dim": -1}, "input_dim must be a whole number of at least 0"),
        ({"input_degrees": 0.0}, "input_degrees must be a positive number"),
        ({"input_degrees": "2"}, "input_degrees must be a positive number, got '2'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"readout": "Poisson"}, "readout must be one of pyrodyn.readouts"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ModelError, match=message):
        models.LFADS(**({"latent_dim": 2} | options))


def test_unequal_bins_are_refused():
    with pytest.raises(ModelError, match="equally spaced bins"):
        MODEL.check(zoo.blank(irregular=True))
