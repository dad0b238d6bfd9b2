"""Noisy networks: one step as the equations say, a low rank as the matrix it stands for, and two engines that agree."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import zoo

import pyrodyn as dyn
from pyrodyn import guides, inference, models, networks, readouts
from pyrodyn.errors import ModelError
from pyrodyn.program import globals_given
from pyrodyn.recording import Recording


def test_the_density_of_a_path_is_that_of_its_steps():
    model = models.LatentRNN(3, networks.Leaky(), readouts.Gaussian())
    recording = zoo.blank(trials=2, bins=6, counts=False, inputs=2, irregular=True)
    values = zoo.prior_draws(model, recording, (2,))
    parameters = globals_given(model, values, recording)
    path = zoo.local_draws(model, values, recording)["latent"]
    found = model.latent_path(parameters, recording).log_prob(path)
    inputs, steps = (recording.inputs / recording.input_scale).numpy(), np.diff(recording.time)
    for draw in range(2):
        p = {name: value[draw].squeeze(0).numpy() for name, value in values.items()}
        for trial in range(2):
            x = path[draw, trial].numpy()
            total = normal(x[0], p["initial_mean"], p["initial_sd"])
            for t in range(1, 6):
                share = 1.0 - np.exp(-steps[t - 1] / p["time_constant"])
                target = p["recurrent"] @ np.tanh(x[t - 1]) + p["bias"] + p["input_weight"] @ inputs[trial, t]
                sd = p["process_sd"] * np.sqrt(1.0 - (1.0 - share) ** 2)
                total += normal(x[t], (1.0 - share) * x[t - 1] + share * target, sd)
            assert float(found[draw, trial]) == pytest.approx(total, rel=1e-10)


def normal(value: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> float:
    return float((-0.5 * ((value - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2.0 * np.pi)).sum())


def test_a_network_of_low_rank_is_the_network_with_that_matrix():
    recording = zoo.blank(counts=False)
    low = models.LatentRNN(4, networks.LowRank(rank=2), readouts.Gaussian())
    values = zoo.prior_draws(low, recording, (3,))
    parameters = globals_given(low, values, recording)
    full = models.LatentRNN(4, networks.Leaky(), readouts.Gaussian())
    dense = parameters._replace(recurrent=parameters.recurrent @ parameters.recurrent_right.mT, recurrent_right=None)
    path = zoo.local_draws(low, values, recording)["latent"]
    found, expected = (m.latent_path(p, recording).log_prob(path) for m, p in ((low, parameters), (full, dense)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    matrix = dense.recurrent
    assert int((torch.linalg.svdvals(matrix)[0, 0] > 1e-10).sum()) == 2


def test_the_prior_of_a_low_rank_is_as_large_as_that_of_the_full_matrix():
    recording = zoo.blank(counts=False)
    sizes = []
    for cell in (networks.Leaky(), networks.LowRank(rank=2)):
        model = models.LatentRNN(5, cell, readouts.Gaussian())
        parameters = globals_given(model, zoo.prior_draws(model, recording, (4000,)), recording)
        sizes.append(float(cell.matrix(parameters.cell).square().mean()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.06)  # of 4000 draws of 25 entries each, the sd is below 2%


@cache
def turning(trials: int = 12, bins: int = 15, units: int = 6) -> Recording:
    rng = np.random.default_rng(4)
    angle = rng.uniform(0.0, 2.0 * np.pi, trials)[:, None] + 0.4 * np.arange(bins)
    rates = np.exp(np.stack([np.cos(angle), np.sin(angle)], -1) @ rng.normal(size=(2, units)) + 0.5)
    return Recording.from_arrays(rng.poisson(rates).astype(float), bin_width=0.05)


def test_structured_and_amortised_guides_find_the_same_rates():
    """One has parameters for every bin, the other a network for all trials; the weights are points in both."""
    model, recording = models.LatentRNN(2, networks.Leaky()), turning()
    found = []
    for guide in (guides.Structured(guides.PointEstimate()), guides.Amortised(hidden_dim=12)):
        engine = inference.SVI(steps=250, particles=1, learning_rate=0.05, guide=guide, draws=50)
        posterior = dyn.fit(model, recording, engine, seed=0)
        found.append(np.log(dyn.predict(posterior, recording, draws=40)["expected"].values))
    assert np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be a whole number of at least 1"),
        ({"cell": "gru"}, "cell must be one of pyrodyn.networks"),
        ({"readout": "Poisson"}, "readout must be one of pyrodyn.readouts"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ModelError, match=message):
        models.LatentRNN(**({"latent_dim": 2} | options))


def test_what_a_cell_cannot_do_is_refused():
    with pytest.raises(ModelError, match="Gated steps from bin to bin"):
        models.LatentRNN(2).check(zoo.blank(irregular=True))
    with pytest.raises(ModelError, match="rank is 3 but there are 2 latents"):
        models.LatentRNN(2, networks.LowRank(rank=3)).check(zoo.blank())
