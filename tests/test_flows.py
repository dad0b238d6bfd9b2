"""Synthetic flows and networks: their equations against other integrators, their noise against its law."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch
import xarray as xr
from scipy.stats import kstest

from pyrodyn import systems
from pyrodyn.systems import arneodo, chaotic_rnn, duffing, linear_spiral, lorenz, pulsed_rnn, rossler, van_der_pol

FLOWS = ("lorenz", "arneodo", "rossler", "duffing", "van_der_pol", "spiral")
MADE = {
    "lorenz": lambda **more: lorenz(trials=6, bins=9, units=3, **more),
    "arneodo": lambda **more: arneodo(trials=6, bins=9, units=3, **more),
    "rossler": lambda **more: rossler(trials=6, bins=9, units=3, **more),
    "duffing": lambda **more: duffing(trials=3, bins=20, seen=7, **more),
    "van_der_pol": lambda **more: van_der_pol(trials=8, bins=60, peak_count=4.0, **more),
    "linear_spiral": lambda **more: linear_spiral(trials=3, bins=20, readout="poisson", **more),
    "chaotic_rnn": lambda **more: chaotic_rnn(units=6, conditions=3, repeats=5, bins=20, **more),
    "pulsed_rnn": lambda **more: pulsed_rnn(units=6, conditions=3, repeats=5, bins=20, **more),
}
every = pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())


@pytest.mark.parametrize("name", FLOWS)
def test_fixed_points_are_zeros_of_the_field_and_its_jacobian_is_its_slope(name) -> None:
    field = systems.field(name)
    assert np.abs(field(field.fixed_points)).max() < 1e-10
    state = np.random.default_rng(0).normal(size=(2, 3, field.dim))
    slopes = field.jacobian(state)
    for axis in range(field.dim):
        step = 1e-6 * np.eye(field.dim)[axis]
        np.testing.assert_allclose(
            slopes[..., axis], (field(state + step) - field(state - step)) / 2e-6, rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(field(torch.from_numpy(state)), torch.from_numpy(field(state)))


@pytest.mark.parametrize("make", [lorenz, arneodo, rossler])
def test_windows_follow_the_flow(make) -> None:
    """Against an adaptive integrator of order eight, over whole windows of an unstable flow."""
    truth = make(trials=2, bins=70, units=2, seed=3).truth
    field = systems.field_of(truth)
    for path in truth["latents"].values:
        solved = scipy.integrate.solve_ivp(
            lambda _, x: field(x),
            (0.0, truth["time"].values[-1]),
            path[0],
            "DOP853",
            truth["time"].values,
            rtol=1e-11,
            atol=1e-11,
        )
        np.testing.assert_allclose(path, solved.y.T, rtol=0, atol=1e-6 * np.abs(path).max())


def test_windows_lie_all_over_the_attractor() -> None:
    """Starts are as spread as time, by the means of a long trajectory: <xy> = beta <z> holds for any invariant law."""
    latents = lorenz(trials=1500, bins=40, units=1).truth["latents"].values
    x, y, z = np.moveaxis(latents, -1, 0)
    error = (x * y - 2.667 * z).mean(1).std() / np.sqrt(len(latents))
    assert abs((x * y - 2.667 * z).mean()) < 4.0 * error
    assert abs((x[:, 0] > 0).mean() - 0.5) < 4.0 * 0.5 / np.sqrt(len(latents))  # both wings, by symmetry
    assert kstest(x[:, 0], x[:, -1]).pvalue > 1e-3


def test_log_rates_are_standardised_and_affine_in_the_latents() -> None:
    truth = arneodo(trials=50, units=7, log_rate_mean=-1.0, log_rate_sd=0.5).truth
    log_rates = np.log(truth["rates"].values)
    np.testing.assert_allclose(log_rates.mean((0, 1)), -1.0)
    np.testing.assert_allclose(log_rates.std((0, 1)), 0.5)
    built = truth["latents"].values @ truth["loading"].values.T + truth["offset"].values
    np.testing.assert_allclose(built, log_rates)


def test_the_spiral_has_the_moments_of_its_equation() -> None:
    """Mean and covariance of a linear stochastic equation in closed form; the scheme's own error is below the noise."""
    truth = linear_spiral(trials=3000, bins=40, units=1, substeps=20).truth
    paths = truth["latents"].values
    generator = systems.field_of(truth).jacobian(np.zeros(2))
    turn = scipy.linalg.expm(generator * truth.attrs["bin_width"] * 39)
    moved = paths[:, -1] - paths[:, 0] @ turn.T
    # dS/dt = A S + S A' + I, with A + A' = -2 decay I: S = (1 - exp(-2 decay t)) / (2 decay) I.
    variance = (1.0 - np.exp(-6.0 * 39 * 0.005)) / 6.0
    assert np.abs(moved.mean(0)).max() < 4.0 * np.sqrt(variance / 3000)
    np.testing.assert_allclose(np.cov(moved.T), variance * np.eye(2), atol=5.0 * variance * np.sqrt(2.0 / 3000))


def test_steps_of_a_stochastic_flow_are_normal_about_the_drift() -> None:
    for make in (duffing, van_der_pol):
        truth = make(trials=20, bins=200, seen=None, substeps=1).truth
        paths, width = truth["latents"].values, truth.attrs["bin_width"]
        steps = np.diff(paths, axis=1) - width * systems.field_of(truth)(paths[:, :-1])
        standard = steps / (truth.attrs["sigma"] * np.sqrt(width))
        assert kstest(standard.ravel(), "norm").pvalue > 1e-3
        assert np.abs(np.corrcoef(standard.reshape(-1, 2).T)[0, 1]) < 4.0 / np.sqrt(20 * 199)


def test_duffing_trials_start_in_either_well_and_are_seen_as_often_as_asked() -> None:
    system = duffing()
    assert np.sign(system.truth["latents"].values[:, 0, 0]).tolist() == [1.0, -1.0, 1.0, -1.0]
    assert system.recording.mask.all(-1).sum(1).tolist() == [300] * 4
    assert not duffing(start="right").truth["latents"].values[:, 0].std(0).any()
    residual = (system.recording.values - torch.from_numpy(system.truth["rates"].values))[system.recording.mask]
    assert float(residual.var()) == pytest.approx(0.1, rel=0.05)


def test_the_chaotic_network_is_the_published_one() -> None:
    truth = chaotic_rnn(conditions=2, repeats=5).truth
    assert truth["weights"].values[0, 0] == pytest.approx(0.06239899, abs=1e-8)
    paths, weights = truth["latents"].values, truth["weights"].values
    moved = 0.6 * paths[:, :-1] + 0.4 * 1.5 * np.tanh(paths[:, :-1]) @ weights.T
    np.testing.assert_allclose(paths[:, 1:], moved, atol=1e-12)
    assert (np.ptp(paths.reshape(2, 5, -1), axis=1) == 0).all()  # repeats share the state, not the spikes
    rates = truth["rates"].values
    np.testing.assert_allclose(rates.max(1), 0.3)
    np.testing.assert_allclose(rates.min(1), 0.0, atol=1e-15)


def test_a_pulse_enters_once_where_the_truth_says() -> None:
    system = pulsed_rnn(conditions=20, repeats=5, quiet=0.3)
    truth = system.truth
    when = truth["pulse_bin"].values
    assert (when < 0).sum() == 30 and when[when >= 0].min() >= 25 and when.max() < 75
    drive = truth["pulse"].values[..., 0]
    assert (drive[when < 0] == 0).all()
    assert (drive[when >= 0].argmax(1) == when[when >= 0]).all() and (drive.sum(1)[when >= 0] == 20).all()
    paths, weights = truth["latents"].values, truth["weights"].values
    moved = 0.6 * paths[:, :-1] + 0.4 * (1.5 * np.tanh(paths[:, :-1]) @ weights.T)
    np.testing.assert_allclose(paths[:, 1:], moved + 0.4 * drive[:, 1:, None] * truth["entry"].values, atol=1e-12)
    assert (system.recording.split == "train").sum() == 80


@every
def test_systems_follow_the_seed_and_survive_netcdf(make, tmp_path) -> None:
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert first.recording.digest() == again.recording.digest() != other.recording.digest()
    assert first.truth.identical(again.truth)
    first.truth.to_netcdf(tmp_path / "truth.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "truth.nc", engine="h5netcdf") as read:
        assert set(read.data_vars) == set(first.truth.data_vars)
        if "field" in first.truth.attrs:
            field = systems.field_of(read)
            assert dict(field.parameters) == dict(systems.field_of(first.truth).parameters)
    assert first.truth["rates"].dims == ("trial", "time", "unit")
    assert first.truth["rates"].shape == tuple(first.recording.values.shape)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lorenz, {"bins": 0}, "bins must be a whole number of at least 1, got 0"),
        (lorenz, {"sigma": float("nan")}, "sigma must be a finite number, got nan"),
        (lorenz, {"log_rate_sd": 0.0}, "log_rate_sd must be a finite number above 0, got 0.0"),
        (duffing, {"start": "left"}, "start must be one of 'both', 'right', got 'left'"),
        (duffing, {"seen": 1001}, "seen is 1001, but a trial has 1000 bins"),
        (duffing, {"beta": -1.0}, "alpha / beta must be positive"),
        (linear_spiral, {"readout": "place"}, "readout must be one of 'gaussian', 'poisson', got 'place'"),
        (chaotic_rnn, {"bin_width": 0.06}, "bin_width must be below 0.05 s, twice the time constant, got 0.06"),
        (pulsed_rnn, {"quiet": 1.5}, "quiet must be a finite number at least 0 and at most 1, got 1.5"),
    ],
)
def test_options_out_of_range_are_named(make, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_field_is_asked_for_by_name() -> None:
    with pytest.raises(ValueError, match="name must be one of 'lorenz', .* got 'henon'"):
        systems.field("henon")
    with pytest.raises(ValueError, match="lorenz has the parameters sigma, rho, beta, got gamma"):
        systems.field("lorenz", gamma=1.0)
    with pytest.raises(ValueError, match="was not made by a flow"):
        systems.field_of(chaotic_rnn(units=3, conditions=1, repeats=5, bins=5).truth)
