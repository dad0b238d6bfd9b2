"""Replay: against a dense forward-backward pass, with what was planted, and place fields against a closed form."""

import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.stats as st
import torch
import zoo

import pyrodyn as dyn
from pyrodyn import inference, models
from pyrodyn.models.replay import CATEGORIES, DYNAMICS
from pyrodyn.program import globals_given


def dense(model, parameters, recording, trial):
    """Log likelihood and posterior (time, dynamics, position) of one trial, from the sentences of the docstring."""
    places = model.num_positions
    place = model.spacing * np.arange(places)
    sd = parameters.walk.item() * np.sqrt(recording.bin_width)
    walk = st.norm.pdf(place[None], place[:, None], sd)
    uniform = np.full((places, places), 1 / places)
    kernel = {"stationary": np.eye(places), "continuous": walk / walk.sum(1, keepdims=True), "fragmented": uniform}
    links = np.zeros((3 * places, 3 * places))
    for (i, before), (j, after) in itertools.product(enumerate(DYNAMICS), repeat=2):
        stay = parameters.stay.reshape(-1)[i].item()
        chance = stay if i == j else (1 - stay) / 2
        move = uniform if "fragmented" in (before, after) else kernel[after]
        links[i * places : (i + 1) * places, j * places : (j + 1) * places] = chance * move
    rates = np.tile(np.array(model.fields).T, (3, 1)) * recording.bin_width * parameters.unit_gain.numpy().reshape(-1)
    counts = recording.values[trial].numpy()
    seen = np.ones(counts.shape) if recording.mask is None else recording.mask[trial].numpy()
    likelihood = np.exp((seen[:, None] * st.poisson.logpmf(counts[:, None], rates)).sum(-1))
    forward, backward = np.zeros(likelihood.shape), np.ones(likelihood.shape)
    forward[0] = likelihood[0] / (3 * places)
    for t in range(1, len(counts)):
        forward[t] = (forward[t - 1] @ links) * likelihood[t]
    for t in range(len(counts) - 2, -1, -1):
        backward[t] = links @ (backward[t + 1] * likelihood[t + 1])
    both = forward * backward
    return np.log(forward[-1].sum()), (both / both.sum(1, keepdims=True)).reshape(-1, 3, places)


def test_evidence_and_decoding_are_a_dense_forward_backward_pass():
    row = zoo.row("Replay-ragged-missing")
    recording, model = row.recording, row.model
    parameters = globals_given(model, zoo.prior_draws(model, recording, ()), recording)
    evidence = model.evidence(parameters, recording, recording.values)
    decoded = model.decode(parameters, recording)
    for trial in range(recording.num_trials):
        value, states = dense(model, parameters, recording, trial)
        assert evidence.reshape(-1)[trial].item() == pytest.approx(value, abs=1e-8)
        np.testing.assert_allclose(decoded[trial].numpy(), states, atol=1e-8)


def linear_track(places=30, cells=19, spacing=6.0, width=9.0, peak=15.0):
    place = spacing * np.arange(places)
    return 0.1 + peak * np.exp(-0.5 * ((place - np.linspace(0, place[-1], cells)[:, None]) / width) ** 2)


def planted(trials=12, bins=150, gain=10.0, seed=0):
    """Events of one dynamics each: trials in turn stationary, continuous (a sweep of 600 per second), fragmented."""
    rng, fields = np.random.default_rng(seed), linear_track()
    kind = np.arange(trials) % 3
    start = rng.integers(4, 26, trials)
    t = np.arange(bins)
    paths = {0: start[:, None], 1: t[None] * 30 // bins, 2: rng.integers(30, size=(trials, bins))}
    place = np.choose(kind[:, None], [np.broadcast_to(path, (trials, bins)) for path in paths.values()])
    counts = rng.poisson(fields.T[place] * gain * 0.002)
    return dyn.Recording.from_arrays(counts.astype(float), bin_width=0.002, counts=True), kind, place, fields


def test_dynamics_and_places_are_found():
    recording, kind, place, fields = planted()
    model = models.Replay(fields=fields, spacing=6.0)
    posterior = dyn.fit(model, recording, inference.Laplace(draws=20), seed=0)
    share = posterior["latents"]["dynamics_probability"].mean("time").values
    assert np.mean(share.argmax(1) == kind) >= 0.9
    moved = posterior["latents"]["position"].values
    error = np.abs(moved - 6.0 * place)[kind < 2]
    assert np.median(error) < 12.0
    assert abs(np.log(float(posterior["posterior"]["unit_gain"].mean()) / 10.0)) < 0.15


def test_place_fields_are_the_mean_of_a_gamma_posterior():
    counts = np.array([[[2, 0], [4, 1], [1, 3], [9, 9]]])
    recording = dyn.Recording.from_arrays(counts, bin_width=0.5)
    found = models.place_fields(recording, [[0.2, 0.4, 1.5, np.nan]], [0, 1, 2], prior=2.0)
    for unit, (first, second) in enumerate([(6, 1), (1, 3)]):
        mean = (first + second) / 1.5
        for k, (events, seconds) in enumerate([(first, 1.0), (second, 0.5)]):
            assert found[unit, k] == pytest.approx(st.gamma.mean(events + 2.0 * mean, scale=1 / (seconds + 2.0)))


def test_smoothed_place_fields_are_ratios_of_sums_over_a_kernel():
    rng = np.random.default_rng(0)
    places, sd, bins = 12, 1.3, 400
    place = rng.integers(places - 3, size=(1, bins))  # the last three are never visited
    counts = rng.poisson(0.4, size=(1, bins, 3)).astype(float)
    recording = dyn.Recording.from_arrays(counts, bin_width=0.05, counts=True)
    found = models.place_fields(recording, place + 0.5, np.arange(places + 1), prior=0.7, smoothing=sd)
    reach = np.arange(-5, 6)  # where scipy cuts the kernel: four standard deviations
    kernel = np.exp(-0.5 * (reach / sd) ** 2)
    kernel /= kernel.sum()
    for x in range(places):
        weight = np.array([kernel[np.flatnonzero(reach == x - p)].sum() for p in place[0]])
        wanted = (weight @ counts[0] + 0.7 * counts[0].mean(0) / 0.05) / (weight.sum() * 0.05 + 0.7)
        np.testing.assert_allclose(found[:, x], wanted, rtol=1e-10)


def test_one_trial_is_decoded_as_it_is_among_others():
    row = zoo.row("Replay-ragged-missing")
    parameters = globals_given(row.model, zoo.prior_draws(row.model, row.recording, ()), row.recording)
    decoded = row.model.decode(parameters, row.recording)
    for trial in range(row.recording.num_trials):
        alone = row.model.decode(parameters, row.recording.isel(trial=[trial]))
        assert alone.shape == (1, *decoded.shape[1:])
        torch.testing.assert_close(alone[0], decoded[trial])


def test_categories_are_dynamics_or_neighbours_that_are_probable_together():
    named = {
        (0.85, 0.1, 0.05): "stationary",
        (0.5, 0.4, 0.1): "stationary-continuous",
        (0.1, 0.8, 0.1): "continuous",
        (0.1, 0.3, 0.6): "fragmented-continuous",
        (0.05, 0.05, 0.9): "fragmented",
        (0.2, 0.65, 0.15): "stationary-continuous",  # the likelier of two mixtures
        (0.15, 0.65, 0.2): "fragmented-continuous",
    }
    found = models.replay_categories(np.array(list(named)))
    assert [CATEGORIES[k] for k in found] == list(named.values())
    unclear = np.array([[1 / 3, 1 / 3, 1 / 3], [0.5, 0.0, 0.5], [0.4, 0.35, 0.25]])
    assert models.replay_categories(unclear).tolist() == [-1, -1, -1]
    assert models.replay_categories(torch.tensor([[0.4, 0.35, 0.25]]), threshold=0.7).tolist() == [1]
    with pytest.raises(dyn.errors.ModelError, match="probability"):
        models.replay_categories(np.ones((3, 2)))
    with pytest.raises(dyn.errors.ModelError, match="threshold"):
        models.replay_categories(np.ones((2, 3)), threshold=0.5)


@pytest.fixture
def linear_track_script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    return importlib.import_module("replay_linear_track")


# Some units fire in the passes that fields are learned from, and not in those held out.
@pytest.mark.filterwarnings("ignore:.*silent:UserWarning")
def test_held_out_runs_of_a_real_rat_are_decoded(linear_track_script, data_dir):
    script = linear_track_script
    run = script.runs(script.linear_track(data_dir))
    assert len(run.passes) > 40
    alone, together = script.decode_runs(run)
    assert np.median(together) < np.median(alone)  # a place is known better with those before and after it
    assert np.median(together) <= 0.062
    # Guessing one place for all bins would be off by a quarter of the track.
    assert np.median(np.abs(np.concatenate([run.coarse(part)[1] for part in run.passes]) - 0.5)) > 0.2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fields": ()}, "fields"),
        ({"fields": [[1.0, 0.0]]}, "fields"),
        ({"conditions": ("a",)}, "conditions"),
        ({"walk": 0.0}, "walk"),
        ({"stay": 1.0}, "stay"),
    ],
)
def test_options_out_of_range_are_named(change, words):
    with pytest.raises(dyn.errors.ModelError, match=words):
        models.Replay(**({"fields": [[1.0, 2.0]]} | change))


def test_recordings_it_cannot_take_are_named():
    recording = dyn.Recording.from_arrays(np.arange(8.0).reshape(1, 4, 2), bin_width=0.5)
    with pytest.raises(dyn.errors.ModelError, match="fields are those of 1 units"):
        models.Replay(fields=[[1.0, 2.0]]).check(recording)
    with pytest.raises(dyn.errors.ModelError, match="position has shape"):
        models.place_fields(recording, [0.0], [0, 1, 2])
    with pytest.raises(dyn.errors.ModelError, match="edges"):
        models.place_fields(recording, np.zeros((1, 4)), [0, 2, 1])
    with pytest.raises(dyn.errors.ModelError, match="prior"):
        models.place_fields(recording, np.zeros((1, 4)), [0, 1, 2], prior=0.0)
    with pytest.raises(dyn.errors.ModelError, match="smoothing"):
        models.place_fields(recording, np.zeros((1, 4)), [0, 1, 2], smoothing=-1.0)
    with pytest.raises(dyn.errors.ModelError, match="silent"):
        models.place_fields(recording, np.full((1, 4), np.nan), [0, 1, 2])
    assert torch.isfinite(recording.values).all()
