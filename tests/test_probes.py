"""Probes against closed forms, and told apart: an inference that copies, and posteriors that do not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import xarray as xr
from scipy.stats import nbinom

import pyrodyn as dyn
from pyrodyn import inference, models
from pyrodyn.errors import RecordingError
from pyrodyn.evaluation import cycle_consistency, input_leakage

SHAPE, RATE = 3.0, 5.0  # of the gamma law that rates have, in the conjugate model
AXES = ("trial", "time", "unit")


def gamma_counts(trials: int = 200) -> dyn.Recording:
    rng = np.random.default_rng(0)
    rates = rng.gamma(SHAPE, 1.0 / RATE, (trials, 20, 10))
    return dyn.Recording.from_arrays(rng.poisson(rates).astype(float), bin_width=0.1, counts=True)


def conjugate(recording: dyn.Recording) -> xr.Dataset:
    """The exact posterior mean of rates that are independent: (a + y) / (b + 1), or a / b where nothing was seen."""
    seen = np.ones(recording.values.shape, dtype=bool) if recording.mask is None else recording.mask.numpy()
    counts = recording.values.numpy()
    expected = np.where(seen, (SHAPE + counts) / (RATE + 1.0), SHAPE / RATE)
    return xr.Dataset({"expected": (AXES, expected)})


def copying(recording: dyn.Recording) -> xr.Dataset:
    """Takes counts for rates; of what it has not seen it knows the mean."""
    seen = np.ones(recording.values.shape, dtype=bool) if recording.mask is None else recording.mask.numpy()
    counts = recording.values.numpy()
    mean = (counts.sum((0, 1)) / seen.sum((0, 1))) * np.ones_like(counts)
    return xr.Dataset({"expected": (AXES, np.where(seen, 0.95 * counts + 0.05 * mean, mean))})


def test_leakage_of_a_conjugate_posterior_is_its_sum_over_counts() -> None:
    """Counts are negative binomial; both predictions, and so both scores, are functions of one count."""
    found = input_leakage(conjugate, gamma_counts(), folds=4)
    counts = np.arange(60)
    chance = nbinom.pmf(counts, SHAPE, RATE / (RATE + 1.0))
    mean = SHAPE / RATE
    rate = (SHAPE + counts) / (RATE + 1.0)
    gain = (chance * (counts * np.log(rate / mean) - (rate - mean))).sum() / mean / np.log(2.0)
    assert found.seen.value == pytest.approx(gain, abs=4.0 * found.seen.standard_error)
    assert found.hidden.value == pytest.approx(0.0, abs=4.0 * found.hidden.standard_error + 1e-3)
    assert found.gap.value == pytest.approx(gain, abs=4.0 * found.gap.standard_error + 1e-3)
    assert found.seen.standard_error < 0.01 < gain


def test_a_cycle_through_a_conjugate_posterior_has_the_r2_of_its_moments() -> None:
    r"""m' = (a + y') / (b + 1) with y' ~ Poisson(m); its mean square error about m, over the variance of m."""
    found = cycle_consistency(conjugate, gamma_counts(2000))  # entries enough for a standard error of .01
    gain = 1.0 / (RATE + 1.0)
    mean = SHAPE / RATE
    variance = gain**2 * (mean + mean / RATE)
    error = gain**2 * mean + (1.0 - gain) ** 2 * variance
    assert found.rates == pytest.approx(1.0 - error / variance, abs=0.03)
    # The variance of the counts is 1 + 1/b times their mean.
    assert found.copying == pytest.approx(1.0 / (RATE + 1.0), abs=0.02)
    assert np.isnan(found.latents)


def test_copying_is_what_the_probe_says_that_it_would_be() -> None:
    found = cycle_consistency(copying, gamma_counts())
    assert found.rates == pytest.approx(found.copying, abs=0.06)


@pytest.fixture(scope="module")
def rotation() -> tuple[xr.DataTree, dyn.Recording]:
    """A posterior of two slow latents, and trials that it has not seen."""
    like = dyn.Recording.from_arrays(np.ones((60, 40, 30)), bin_width=0.05, counts=True).blank()
    angle = 0.2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mixing = 12.0 * turn  # contracts by 12 / sqrt(1 + 144)
    simulated, _ = dyn.simulate(
        models.LDS(2), like, seed=3, values={"mixing": mixing, "offset": np.full(30, np.log(0.4))}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        posterior = dyn.fit(
            models.LDS(2), simulated.isel(trial=range(40)), inference.Laplace(draws=10, max_steps=50), seed=0
        )
    return posterior, simulated.isel(trial=range(40, 60))


def test_a_posterior_of_dynamics_passes_both_probes_and_copying_fails_both(rotation) -> None:
    posterior, recording = rotation

    def fitted(part: dyn.Recording) -> xr.Dataset:
        return dyn.predict(posterior, part, draws=10)

    real, false = (input_leakage(probed, recording) for probed in (fitted, copying))
    assert real.hidden.value > 0.05
    assert real.gap.value < 0.03 and real.gap.value < 0.3 * real.hidden.value
    assert false.gap.value > 1.0 and false.hidden.value < 0.01
    real, false = (cycle_consistency(probed, recording) for probed in (fitted, copying))
    assert real.rates > 0.5 and real.latents > 0.5
    assert false.rates < 0.5 * real.rates and real.copying < 0.5 * real.rates


def test_a_latent_that_no_unit_depends_on_is_not_found_again(rotation) -> None:
    posterior, recording = rotation

    def with_a_superfluous_one(part: dyn.Recording) -> xr.Dataset:
        """Reads the counts of the first unit, and has no part in the rates."""
        found = dyn.predict(posterior, part, draws=10)
        own = xr.DataArray(part.values[..., :1].numpy(), dims=("trial", "time", "latent"))
        return found[["expected"]].assign(path=xr.concat([found["path"].drop_vars("latent"), own], "latent"))

    alone = cycle_consistency(lambda part: dyn.predict(posterior, part, draws=10), recording)
    more = cycle_consistency(with_a_superfluous_one, recording)
    assert more.rates == pytest.approx(alone.rates)
    assert more.latents < alone.latents - 0.2


def test_what_cannot_be_probed_is_named() -> None:
    recording = gamma_counts(2)
    values = dyn.Recording.from_arrays(np.random.default_rng(0).normal(size=(2, 5, 3)), bin_width=0.1, counts=False)
    for probe in (input_leakage, cycle_consistency):
        with pytest.raises(RecordingError, match="counts, and the recording holds real values"):
            probe(conjugate, values)
    with pytest.raises(ValueError, match="folds must be at least 2"):
        input_leakage(conjugate, recording, folds=1)
    with pytest.raises(ValueError, match=r"returned expected \(trial, time, unit\) = \(1, 20, 10\)"):
        input_leakage(lambda part: conjugate(part).isel(trial=[0]), recording)
