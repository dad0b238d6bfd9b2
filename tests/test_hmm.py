"""The hidden Markov model against sums over every path of modes, and against what was planted."""

import itertools

import numpy as np
import pytest
import torch
import zoo

import pyrodyn as dyn
from pyrodyn import inference, models, readouts
from pyrodyn.distributions.modes import MarkovModes
from pyrodyn.inference.engine import random_stream
from pyrodyn.models.hmm import stationary_distribution
from pyrodyn.program import globals_given

ROWS = [row for row in zoo.MODELS if isinstance(row.model, models.HMM)]
LAWS = [readouts.Gaussian(), readouts.Poisson(), readouts.NegativeBinomial(), readouts.Bernoulli()]


def drawn(row, draws=(3,)):
    return globals_given(row.model, zoo.prior_draws(row.model, row.recording, draws), row.recording)


def short(recording, bins=4):
    return recording.isel(time=slice(0, bins)) if recording.num_bins > bins else recording


def scores_of_paths(row, parameters, recording):
    """Joint log density of the observations and each path of modes, (draw, trial, path), and the paths."""
    paths = torch.tensor(list(itertools.product(range(row.model.num_modes), repeat=recording.num_bins)))
    law = MarkovModes(parameters.initial, parameters.transition, recording.num_bins)
    scores = [
        law.log_prob(path) + row.model._given(parameters, path.unsqueeze(0), recording).log_prob(recording.observations)
        for path in paths
    ]
    return torch.stack(scores, -1), paths


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_the_evidence_is_the_sum_over_every_path(row):
    recording, parameters = short(row.recording), drawn(row)
    scores, _ = scores_of_paths(row, parameters, recording)
    found = row.model.evidence(parameters, recording, recording.observations)
    torch.testing.assert_close(found, scores.logsumexp(-1), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("row", ROWS[:2], ids=[row.name for row in ROWS[:2]])
def test_drawn_modes_occur_as_often_as_the_sum_over_paths_says(row):
    recording, draws = short(row.recording), 4000
    one = zoo.prior_draws(row.model, recording, (1,))
    many = {name: value.expand(draws, *value.shape[1:]) for name, value in one.items()}
    with random_stream(0):
        modes = row.model.draw_local(globals_given(row.model, many, recording), recording)["mode"]
    scores, paths = scores_of_paths(row, globals_given(row.model, one, recording), recording)
    weights = scores.squeeze(0).softmax(-1)  # (trial, path)
    for k in range(row.model.num_modes):
        exact = weights @ (paths == k).to(weights.dtype)
        error = (modes == k).double().mean(0) - exact
        assert float(error.abs().max()) < 5 * 0.5 / draws**0.5


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_slope_and_constant_give_the_likelihood_but_for_what_no_predictor_enters(law):
    generator = torch.Generator().manual_seed(1)
    predictor = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    noise = torch.rand(5, generator=generator, dtype=torch.float64) + 0.5
    value = torch.randint(0, 2, (5,), generator=generator).double()
    slope, constant = law.natural(predictor, noise)
    rest = law.log_prob(predictor, noise, value) - (value * slope - constant)
    torch.testing.assert_close(rest, rest[:1].expand_as(rest))
    assert float(slope.std()) > 0.1


def test_one_mode_is_independent_bins():
    row = ROWS[1]
    model = models.HMM(1, readout=row.model.readout)
    parameters = globals_given(model, zoo.prior_draws(model, row.recording, (3,)), row.recording)
    still = torch.zeros(row.recording.num_trials, row.recording.num_bins, dtype=torch.long)
    expected = model._given(parameters, still, row.recording).log_prob(row.recording.observations)
    found = model.evidence(parameters, row.recording, row.recording.observations)
    torch.testing.assert_close(found, expected)


def test_the_stationary_distribution_is_where_the_chain_ends():
    transition = torch.distributions.Dirichlet(torch.ones(4, 4, dtype=torch.float64)).sample((3,))
    torch.testing.assert_close(stationary_distribution(transition), transition.matrix_power(400)[:, 0])
    stuck = torch.eye(2, dtype=torch.float64)
    assert bool(stationary_distribution(stuck).isfinite().all())


def planted(num_modes=3, units=12, seed=0, level=3.0):
    """Counts of a sticky chain whose modes differ in every unit, and the modes."""
    rng = np.random.default_rng(seed)
    rates = level * np.exp(rng.normal(size=(num_modes, units)))
    modes = np.zeros((4, 120), dtype=int)
    for trial, time in np.ndindex(4, 119):
        stay = rng.random() < 0.95
        modes[trial, time + 1] = modes[trial, time] if stay else rng.integers(num_modes)
    return dyn.Recording.from_arrays(rng.poisson(rates[modes]), bin_width=0.02), modes


@pytest.mark.parametrize("engine", [inference.SVI(draws=50), inference.Laplace(draws=50)])
def test_modes_are_found_and_labelled(engine):
    recording, modes = planted()
    posterior = dyn.fit(models.HMM(3), recording, engine, seed=0)
    found = posterior["latents"]["mode_probability"]
    assert found.dims == ("trial", "time", "mode")
    np.testing.assert_allclose(found.sum("mode"), 1.0)
    labels = found.argmax("mode").values
    accuracy = max(np.mean(np.array(order)[labels] == modes) for order in itertools.permutations(range(3)))
    assert accuracy > 0.97
    assert posterior.attrs["path_treatment"] == "summed out exactly"


def test_counts_of_ten_thousand_a_bin_are_scored():
    recording, _ = planted(level=5000.0)
    posterior = dyn.fit(models.HMM(3), recording, inference.Laplace(draws=20), seed=0)
    assert np.isfinite(posterior["log_likelihood"]["observations"]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_modes": 0}, "num_modes"),
        ({"num_modes": 2.0}, "num_modes"),
        ({"num_modes": 2, "readout": "Poisson"}, "readout"),
        ({"num_modes": 2, "stickiness": -1.0}, "stickiness"),
        ({"num_modes": 2, "spread": 0.0}, "spread"),
    ],
)
def test_options_out_of_range_are_named(change, words):
    with pytest.raises(dyn.errors.ModelError, match=words):
        models.HMM(**change)


def test_recordings_it_cannot_take_are_named():
    few = dyn.Recording.from_arrays(np.ones((1, 3, 2)), bin_width=0.02)
    with pytest.raises(dyn.errors.ModelError, match="num_modes is 4 but the recording has 3 bins"):
        dyn.fit(models.HMM(4), few, inference.Laplace())
    driven = dyn.Recording.from_arrays(np.ones((1, 9, 2)), bin_width=0.02, inputs=np.ones((1, 9, 1)))
    with pytest.raises(dyn.errors.ModelError, match="inputs"):
        dyn.fit(models.HMM(2), driven, inference.Laplace())


def test_parameters_that_overflow_have_no_density_and_leave_the_others_theirs():
    """As on a diverging trajectory of HMC, whose other chains go on."""
    model = models.HMM(2, readouts.Gaussian())
    recording = dyn.Recording.from_arrays(np.random.default_rng(0).normal(size=(2, 6, 3)), bin_width=0.1, counts=False)
    values = {name: torch.stack([value, value]).unsqueeze(1) for name, value in model.initial_values(recording).items()}
    fine = globals_given(model, values, recording)
    wild = fine._replace(predictor=torch.stack([fine.predictor[0], torch.full_like(fine.predictor[1], 1e200)]))
    found, expected = (model.evidence(parameters, recording, recording.values) for parameters in (wild, fine))
    torch.testing.assert_close(found[0], expected[0])
    assert bool((found[1] == -torch.inf).all())
