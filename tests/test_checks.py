"""Statistics against plain loops, and replicated data against what they were replicated from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from _toy import Toy, toy_recording

import pyrodyn as dyn
from pyrodyn import inference, models, plots, readouts, statistics
from pyrodyn.errors import ModelError, RecordingError

rng = np.random.default_rng(4)
VALUES = rng.poisson(2.0, (3, 7, 12, 4)).astype(float)
VALUES[:, 1, 8:] = np.nan
VALUES[:, :, 3, 2] = np.nan
CONDITION = np.array(["a", "b", "a", "a", "b", "b", "b"])


def seen(*arrays: np.ndarray) -> list[np.ndarray]:
    keep = np.isfinite(arrays).all(0)
    return [array[keep] for array in arrays]


@pytest.mark.parametrize("draw", range(3))
def test_statistics_are_what_loops_say(draw):
    y = VALUES[draw]
    for u in range(4):
        assert statistics.rate(VALUES)[draw, u] == pytest.approx(seen(y[..., u].ravel())[0].mean())
        windows = [y[i, t : t + 4, u].sum() for i in range(7) for t in (0, 4, 8)]
        (whole,) = seen(np.array(windows))
        found = statistics.dispersion(VALUES, 4, counts=True)[draw, u]
        assert found == pytest.approx(whole.var(ddof=1) / whole.mean())
        assert statistics.dispersion(VALUES, 4, counts=False)[draw, u] == pytest.approx(whole.var(ddof=1))
        for v in range(4):
            expected = np.corrcoef(*seen(y[..., u].ravel(), y[..., v].ravel()))[0, 1]
            assert statistics.correlation(VALUES)[draw, u, v] == pytest.approx(expected)
        centre = np.nanmean(y[..., u])
        for lag in (1, 3):
            early, late = seen(y[:, :-lag, u].ravel() - centre, y[:, lag:, u].ravel() - centre)
            expected = (early * late).mean() / np.nanvar(y[..., u])
            assert statistics.autocorrelation(VALUES, 3)[draw, u, lag - 1] == pytest.approx(expected)
    means = statistics.psth(VALUES, CONDITION)[draw]
    assert means.shape == (2, 12)
    assert means[1, 9] == pytest.approx(np.nanmean(y[[1, 4, 5, 6], 9]))
    own = np.stack([np.nanmean(y[c == CONDITION, :, 0], 0) for c in "ab"])
    assert statistics.locking(VALUES, CONDITION)[draw, 0] == pytest.approx(own.std())


def test_a_model_makes_data_like_those_it_made():
    recording = toy_recording("Poisson", 24, 20, 5)
    toy = Toy(readouts.Poisson())
    fitted = dyn.fit(toy, recording, inference.Laplace(draws=300), seed=0)
    found = dyn.check(fitted, draws=150, model=toy, lags=5)
    assert found.sizes == {"replicate": 150, "unit": 5, "other_unit": 5, "lag": 5, "condition": 1, "time": 20,
                           "statistic": 6}  # fmt: skip
    assert (found["extreme"] < 0.15).all()
    assert ((found["rate_p"] > 0.02) & (found["rate_p"] < 0.98)).all()
    counts = recording.to_xarray()["observations"].values
    np.testing.assert_allclose(found["rate"], counts.mean((0, 1)) / 0.1)
    np.testing.assert_allclose(found["psth"][0], counts.mean((0, 2)) / 0.1)
    assert found["rate"].attrs["units"] == "events/s"
    drawn = found["dispersion_replicated"].values
    place = (drawn > found["dispersion"].values).mean(0) + 0.5 * (drawn == found["dispersion"].values).mean(0)
    np.testing.assert_allclose(found["dispersion_p"], place)
    assert len(plots.checks(found).axes) == 6


def test_what_a_model_cannot_make_is_seen():
    """Counts more regular than any Poisson readout makes them; a silence locked to time; a latent without memory."""
    recording = toy_recording("Poisson", 24, 20, 5)
    values = recording.to_xarray()["observations"].values.copy()
    regular = recording.with_observations(3.0 + (np.random.default_rng(0).random(values.shape) < 0.5))
    locked = recording.with_observations(np.where((np.arange(20) == 7)[:, None], 0.0, values))
    forgetful = Toy(readouts.Poisson(), persistence=0.0)
    cases = [(Toy(readouts.Poisson()), regular, "dispersion"), (Toy(readouts.Poisson()), locked, "psth")]
    for model, data, name in [*cases, (forgetful, recording, "autocorrelation")]:
        fitted = dyn.fit(model, data, inference.Laplace(draws=300), seed=0)
        found = dyn.check(fitted, draws=100, model=model, lags=3)
        if name == "psth":
            assert float(found["psth_p"][0, 7]) > 0.99
        else:
            assert float(found["extreme"].sel(statistic=name)) > 0.5, name


def test_new_trials_and_the_same_trials_again():
    recording = toy_recording("Poisson", 24, 20, 5)
    toy = Toy(readouts.Poisson())
    fitted = dyn.fit(toy, recording, inference.Laplace(draws=300), seed=0)
    counts = recording.to_xarray()["observations"].values
    following = {}
    for fresh in (True, False):
        drawn = dyn.posterior_predictive(fitted, draws=40, new_paths=fresh, model=toy)
        assert drawn.dims == ("replicate", "trial", "time", "unit") and drawn.shape == (40, *counts.shape)
        following[fresh] = np.corrcoef(drawn.values.mean(0).ravel(), counts.ravel())[0, 1]
    assert following[False] > 0.5 > 0.2 > abs(following[True])
    assert drawn.identical(dyn.posterior_predictive(fitted, draws=40, new_paths=False, model=toy))
    assert not drawn.identical(dyn.posterior_predictive(fitted, draws=40, new_paths=False, model=toy, seed=1))


def test_the_prior_predictive_is_the_simulator():
    """Mean and variance over many draws are the prior's, in closed form."""
    like = toy_recording("Gaussian", 3, 4)
    drawn = dyn.prior_predictive(Toy(), like, draws=4000).values
    # y = level + gain x + noise, level ~ N(0, 1), log gain ~ N(0, .5), x stationary with variance one
    expected = 1.0 + np.exp(2 * 0.5**2) + 0.7**2
    assert abs(drawn.mean()) < 0.1 and drawn.var(0).mean() == pytest.approx(expected, rel=0.1)
    found = dyn.check(Toy(), like, draws=100)
    assert found["rate_replicated"].shape == (100, 2) and "units" not in found["rate"].attrs


@pytest.mark.parametrize("name", ["LDS-Poisson-ragged-missing", "MultiRegionLDS-Gaussian-missing"])
def test_models_of_the_zoo_are_checked_where_entries_are_hidden(name):
    row = zoo.row(name)
    found = dyn.check(zoo.fitted(name, "Laplace"), draws=5, lags=2)
    hidden = ~row.recording.mask.numpy()
    drawn = dyn.posterior_predictive(zoo.fitted(name, "Laplace"), draws=5)
    assert np.array_equal(np.isnan(drawn.values), np.broadcast_to(hidden, drawn.shape))
    assert set(np.unique(found["unit"])) == set(row.recording.unit)
    prior = dyn.prior_predictive(row.model, row.like(), draws=5)
    assert np.array_equal(np.isnan(prior.values), np.isnan(drawn.values))


def test_bad_questions_are_named():
    recording = toy_recording("Poisson", 24, 20, 5)
    model = models.LDS(1)
    with pytest.raises(ModelError, match="needs a recording"):
        dyn.check(model)
    with pytest.raises(RecordingError, match="no observations to check"):
        dyn.check(model, recording.blank())
    for window in (0.01, 5.0):
        with pytest.raises(RecordingError, match=r"window must lie between one bin \(0.1 s\) and a trial \(2 s\)"):
            dyn.check(model, recording, window=window)
    assert dyn.check(model, recording, window=0.5, draws=5).attrs["window_seconds"] == pytest.approx(0.5)
    assert torch.get_default_dtype() == torch.float32
