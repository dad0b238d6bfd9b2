"""Bits per spike against scipy's Poisson law, by hand, and over random splits of the trials."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr
from scipy.stats import poisson

from pyrodyn.recording import Recording
from pyrodyn.scoring import bits_per_spike, bits_per_spike_over_trials


def drawn(seed: int = 0, shape: tuple[int, int, int] = (12, 7, 5)) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    rates = random.gamma(2.0, 0.6, shape)
    return rates, random.poisson(rates).astype(float)


def by_scipy(rates: np.ndarray, counts: np.ndarray, null: np.ndarray) -> float:
    gain = poisson.logpmf(counts, np.maximum(rates, 1e-9)) - poisson.logpmf(counts, np.maximum(null, 1e-9))
    return float(np.nansum(gain) / np.nansum(counts) / math.log(2.0))


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_likelihood_ratio_of_scipy(seed: int) -> None:
    rates, counts = drawn(seed)
    assert bits_per_spike(rates, counts) == pytest.approx(by_scipy(rates, counts, counts.mean((0, 1))), abs=1e-12)
    null = np.linspace(0.5, 2.0, 5)
    assert bits_per_spike(rates, counts, null=null) == pytest.approx(by_scipy(rates, counts, null), abs=1e-12)


def test_a_case_done_by_hand() -> None:
    # One spike in two bins. Null 1/2 a bin: log likelihood -1 - ln 2. Prediction (1, 0): -1, and 1e-9 for the zero.
    counts, rates = np.array([1.0, 0.0]).reshape(1, 2, 1), np.array([1.0, 0.0]).reshape(1, 2, 1)
    assert bits_per_spike(rates, counts) == pytest.approx(1.0, abs=1e-8)


def test_the_null_scores_zero_and_the_truth_more() -> None:
    rates, counts = drawn(shape=(60, 20, 4))
    assert bits_per_spike(np.broadcast_to(counts.mean((0, 1)), counts.shape), counts) == pytest.approx(0.0, abs=1e-13)
    assert bits_per_spike(rates, counts) > 0.05
    assert bits_per_spike(rates[::-1], counts) < 0.0


def test_units_are_pooled() -> None:
    rates, counts = drawn()
    rates[..., 0] *= 30.0
    counts[..., 0] = np.random.default_rng(1).poisson(rates[..., 0])
    null = counts.mean((0, 1))
    each = [bits_per_spike(rates[..., [u]], counts[..., [u]], null=null[[u]]) for u in range(5)]
    weights = counts.sum((0, 1)) / counts.sum()
    assert bits_per_spike(rates, counts) == pytest.approx(np.dot(weights, each), abs=1e-12)
    assert abs(np.mean(each) - np.dot(weights, each)) > 0.01  # the other convention is another number


def test_zero_predictions_count_as_a_billionth_and_stay_as_they_are() -> None:
    rates, counts = drawn()
    rates[0, 0, 0], counts[0, 0, 0] = 0.0, 2.0
    before = rates.copy()
    lifted = np.where(rates == 0.0, 1e-9, rates)
    assert bits_per_spike(rates, counts) == pytest.approx(bits_per_spike(lifted, counts), abs=1e-12)
    np.testing.assert_array_equal(rates, before)


def test_unobserved_entries_are_left_out() -> None:
    rates, counts = drawn()
    hidden = np.random.default_rng(3).random(counts.shape) < 0.3
    holed = np.where(hidden, np.nan, counts)
    assert bits_per_spike(rates, holed) == pytest.approx(by_scipy(rates, holed, np.nanmean(holed, (0, 1))), abs=1e-12)
    # Whatever stands behind a hidden entry counts for nothing.
    assert bits_per_spike(np.where(hidden, np.nan, rates), holed) == bits_per_spike(rates, holed)
    # Whole trials that are hidden equal trials that are not there.
    holed[4:] = np.nan
    assert bits_per_spike(rates, holed) == pytest.approx(bits_per_spike(rates[:4], holed[:4]), abs=1e-12)


def test_recordings_and_labelled_arrays_score_as_plain_ones() -> None:
    rates, counts = drawn()
    lengths = [7, 5, 3] * 4
    recording = Recording.from_arrays([y[:n] for y, n in zip(counts, lengths, strict=True)], bin_width=0.02)
    observed = recording.to_xarray()["observations"]
    expected = xr.DataArray(rates, dims=("trial", "time", "unit"), coords=observed.coords)
    plain = bits_per_spike(rates, observed.values)
    assert bits_per_spike(expected, observed) == plain
    assert bits_per_spike(expected.transpose("unit", "trial", "time"), observed) == pytest.approx(plain, abs=1e-13)
    with pytest.raises(ValueError, match="labels of unit"):
        bits_per_spike(expected.isel(unit=[1, 0, 2, 3, 4]), observed)


def test_trials_make_the_value_and_its_error() -> None:
    rates, counts = drawn()
    found = bits_per_spike_over_trials(rates, counts)
    assert found.value == pytest.approx(bits_per_spike(rates, counts), abs=1e-13)
    assert found.per_trial.mean() == pytest.approx(found.value, abs=1e-13)
    assert found.standard_error == pytest.approx(found.per_trial.std(ddof=1) / math.sqrt(12), abs=1e-14)


def test_standard_error_is_that_of_new_trials() -> None:
    """Over many data sets the value varies as its standard error says."""
    random = np.random.default_rng(0)
    activity = random.gamma(4.0, 0.25, (400, 60, 1, 1))  # trials differ in their number of spikes
    rates = activity * random.gamma(2.0, 0.6, (400, 60, 4, 3))
    counts = random.poisson(rates).astype(float)
    null = rates.mean((0, 1, 2))
    found = [bits_per_spike_over_trials(r, n, null=null) for r, n in zip(rates, counts, strict=True)]
    spread = np.std([f.value for f in found], ddof=1)
    assert np.mean([f.standard_error for f in found]) == pytest.approx(spread, rel=0.1)


def test_paired_difference() -> None:
    rates, counts = drawn(shape=(50, 20, 4))
    blurred = 0.9 * rates + 0.1 * rates.mean((0, 1))
    a, b = bits_per_spike_over_trials(rates, counts), bits_per_spike_over_trials(blurred, counts)
    difference = a - b
    assert difference.value == pytest.approx(bits_per_spike(rates, counts, null=blurred), abs=1e-12)
    assert difference.standard_error == pytest.approx(
        bits_per_spike_over_trials(rates, counts, null=blurred).standard_error, abs=1e-12
    )
    assert difference.standard_error < 0.5 * a.standard_error  # what trials have in common drops out
    with pytest.raises(ValueError, match="same trials and units"):
        a - bits_per_spike_over_trials(rates[1:], counts[1:])


def test_one_trial_has_no_standard_error() -> None:
    rates, counts = drawn(shape=(1, 30, 4))
    assert math.isnan(bits_per_spike_over_trials(rates, counts).standard_error)


RATES, COUNTS = drawn()


@pytest.mark.parametrize(
    ("expected", "observed", "null", "message"),
    [
        (RATES[0], COUNTS[0], None, r"three axes \(trial, time, unit\)"),
        (RATES[1:], COUNTS, None, "same trials, bins and units"),
        (-RATES, COUNTS, None, r"expected holds 420 values .* \(trial, time, unit\)\s*= \(0, 0, 0\)"),
        (np.full_like(RATES, np.nan), COUNTS, None, "expected holds 420"),
        (RATES, COUNTS + 0.5, None, "whole non-negative counts"),
        (RATES, COUNTS - 9.0, None, "whole non-negative counts"),
        (RATES, 0.0 * COUNTS, None, "no spike"),
        (RATES, np.full_like(COUNTS, np.nan), None, "no spike"),
        (RATES, COUNTS, np.ones(4), r"null has shape \(4,\), expected \(unit,\) = \(5,\)"),
        (RATES, COUNTS, np.full(5, -1.0), "null holds 420"),
        (xr.DataArray(RATES, dims=("trial", "bin", "unit")), COUNTS, None, "dims"),
    ],
)
def test_what_cannot_be_scored_is_refused(expected, observed, null, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bits_per_spike(expected, observed, null=null)
