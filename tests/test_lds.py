"""The LDS: its prior, its options, and what it recovers from data whose dynamics are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import zoo
from scipy.optimize import linear_sum_assignment

import pyrodyn as dyn
from pyrodyn import models, readouts
from pyrodyn.conditioning import path_evidence, path_given
from pyrodyn.distributions import GaussMarkov
from pyrodyn.errors import ModelError, ReadoutError
from pyrodyn.inference import LogDensity, collapse
from pyrodyn.inference.engine import numerics
from pyrodyn.inference.mode import ascend
from pyrodyn.models.lds import stationary_dynamics
from pyrodyn.program import globals_given
from pyrodyn.recording import Recording


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(radius: float, period: float) -> np.ndarray:
    angle = 2.0 * math.pi / period
    return radius * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


# ---------------------------------------------------------------------------------------------- the prior


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_every_draw_is_stationary_with_unit_covariance_and_stable(dim):
    for scale in (1e-3, 0.3, 3.0, 100.0, 1e4):
        dynamics, noise = stationary_dynamics(scale * normal(dim, 200, dim, dim))
        eye = torch.eye(dim, dtype=torch.float64).expand(200, dim, dim)
        torch.testing.assert_close(dynamics @ dynamics.mT + noise, eye, rtol=0, atol=1e-10 if scale < 1e3 else 1e-8)
        assert float(torch.linalg.eigvals(dynamics).abs().max()) < 1.0
        assert float(torch.linalg.eigvalsh(noise).min()) > 0.0


@pytest.mark.parametrize("seed", range(4))
def test_every_stable_system_is_reached(seed):
    """Any stable A and Q, in the coordinates where its stationary covariance is I, is a member of the prior."""
    dynamics = normal(seed, 3, 3)
    dynamics = 0.97 * dynamics / torch.linalg.eigvals(dynamics).abs().max()
    root = normal(seed + 10, 3, 3)
    noise = root @ root.T + 0.1 * torch.eye(3, dtype=torch.float64)
    kronecker = torch.eye(9, dtype=torch.float64) - torch.kron(dynamics, dynamics)
    stationary = torch.linalg.solve(kronecker, noise.flatten()).reshape(3, 3)
    power, axes = torch.linalg.eigh(0.5 * (stationary + stationary.T))
    whiten, colour = (axes * power**-0.5) @ axes.T, (axes * power**0.5) @ axes.T
    turned = whiten @ dynamics @ colour
    # (I + M M')^-1/2 M = A has the solution M = (I - A A')^-1/2 A.
    left = torch.linalg.eigh(torch.eye(3, dtype=torch.float64) - turned @ turned.T)
    mixing = (left.eigenvectors * left.eigenvalues**-0.5) @ left.eigenvectors.T @ turned
    found, found_noise = stationary_dynamics(mixing)
    torch.testing.assert_close(found, turned, rtol=0, atol=1e-10)
    torch.testing.assert_close(found_noise, whiten @ noise @ whiten, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.linalg.eigvals(found).abs().sort().values,
                               torch.linalg.eigvals(dynamics).abs().sort().values, rtol=0, atol=1e-10)  # fmt: skip


def test_the_path_is_stationary():
    row = zoo.row("LDS-Gaussian")
    parameters = globals_given(row.model, zoo.prior_draws(row.model, row.recording, (5,)), row.recording)
    covariance = row.model.latent_path(parameters, row.recording).covariance
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(covariance, eye.expand(covariance.shape), rtol=0, atol=1e-8)


def test_inputs_drive_the_path_from_the_next_bin_on():
    """x_t = A x_(t-1) + B u_t: the input of the first bin has no state before it to act on."""
    row = zoo.row("LDS-Poisson-inputs")
    recording = row.recording
    parameters = globals_given(row.model, zoo.prior_draws(row.model, recording, (2,)), recording)
    mean = row.model.latent_path(parameters, recording).mean
    assert mean.shape == (2, recording.num_trials, recording.num_bins, 2)
    for draw in range(2):
        dynamics, gain = parameters.dynamics[draw, 0], parameters.input_gain[draw, 0]
        for trial in range(recording.num_trials):
            state = torch.zeros(2, dtype=torch.float64)
            for t in range(recording.num_bins):
                if t:
                    state = dynamics @ state + gain @ recording.inputs[trial, t]
                torch.testing.assert_close(mean[draw, trial, t], state, rtol=1e-9, atol=1e-9)


def test_units_of_measurement_do_not_matter():
    """A recording in millivolts has the posterior of the same one in volts, but for the Jacobian of the change."""
    values = np.random.default_rng(0).normal(size=(3, 12, 4))
    model = models.LDS(2, readouts.Gaussian())
    volts, millivolts = (Recording.from_arrays(k * values, bin_width=0.1, counts=False) for k in (1.0, 1000.0))
    densities = [LogDensity(collapse(model), recording) for recording in (volts, millivolts)]
    vector = 0.3 * normal(0, 2, densities[0].dimension)
    sites = densities[0].constrain(vector)
    scaled = {name: 1000.0 * value if name in ("offset", "noise_sd") else value for name, value in sites.items()}
    first = densities[0](densities[0].unconstrain(sites))
    second = densities[1](densities[1].unconstrain(scaled))
    # Of values by 1000 in each entry; of the offsets' prior by 1000 in each unit (noise_sd has a logarithmic
    # coordinate).
    expected = first - (values.size + 4) * math.log(1000.0)
    torch.testing.assert_close(second, expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------- options and errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be a whole number of at least 1, got 0"),
        ({"latent_dim": 2.0}, "latent_dim must be a whole number"),
        ({"latent_dim": 2, "readout": "poisson"}, "readout must be one of pyrodyn.readouts.*got 'poisson'"),
        ({"latent_dim": 2, "readout": readouts.Poisson}, "readout must be one of pyrodyn.readouts"),
        ({"latent_dim": 2, "dynamics_scale": 0.0}, "dynamics_scale must be positive"),
        ({"latent_dim": 2, "dynamics_scale": math.nan}, "dynamics_scale must be positive"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        models.LDS(**options)


def test_recordings_that_do_not_fit_are_refused_before_any_work():
    values = np.random.default_rng(0).poisson(1.0, size=(2, 8, 3)).astype(float)
    recording = Recording.from_arrays(values, bin_width=0.1)
    with pytest.raises(ModelError, match="latent_dim is 4 but the recording has 3 units.*lower latent_dim"):
        dyn.fit(models.LDS(4), recording)
    uneven = Recording.from_arrays(values, time=np.array([0, 1, 2, 3, 5, 6, 7, 8]) * 0.1)
    with pytest.raises(ModelError, match="equally spaced bins.*rebin"):
        dyn.fit(models.LDS(1), uneven)
    smooth = Recording.from_arrays(values + 0.5, bin_width=0.1)
    with pytest.raises(ReadoutError, match=r"Poisson takes non-negative whole counts.*readouts\.Gaussian"):
        dyn.fit(models.LDS(1), smooth)


@pytest.mark.parametrize("readout", zoo.READOUTS, ids=lambda law: type(law).__name__)
@pytest.mark.parametrize(("trials", "bins", "units", "dim"), [(1, 1, 1, 1), (2, 1, 3, 2), (1, 2, 2, 2), (3, 5, 3, 3)])
def test_the_smallest_recordings_have_a_finite_density_and_gradient(readout, trials, bins, units, dim):
    values = np.random.default_rng(1).integers(0, 2, size=(trials, bins, units)).astype(float)
    like = {
        "center": np.zeros(units),
        "scale": np.ones(units),
        "unit": [f"u{i}" for i in range(units)],
        "time": np.arange(bins) * 0.1,
    }
    recording = Recording.from_arrays(values, bin_width=0.1, **like)
    model = models.LDS(dim, readout)
    model.check(recording)
    density = LogDensity(collapse(model), recording)
    value, slope = density.gradient(density.unconstrain(model.initial_values(recording)))
    assert math.isfinite(float(value)) and float(slope.abs().max()) > 0


@pytest.mark.parametrize("readout", zoo.READOUTS, ids=lambda law: type(law).__name__)
def test_silent_saturated_and_hidden_units_have_a_finite_start(readout):
    values = np.zeros((3, 8, 4))
    values[..., 1] = 1.0
    values[:, ::2, 2] = 1.0
    mask = np.ones_like(values, bool)
    mask[..., 3] = False
    recording = Recording.from_arrays(values, bin_width=0.1, mask=mask, center=np.zeros(4), scale=np.ones(4))
    model = models.LDS(2, readout)
    density = LogDensity(collapse(model), recording)
    value, slope = density.gradient(density.unconstrain(model.initial_values(recording)))
    assert math.isfinite(float(value)) and float(slope.abs().max()) > 0


# ---------------------------------------------------------------------------------------------- recovery


class Truth:
    """Row R1: two rotations of radius .98 and periods of 20 and 50 bins, 50 units, Gaussian noise of variance .5."""

    def __init__(self, trials: int, bins: int, units: int = 50) -> None:
        rng = np.random.default_rng(1)
        self.dynamics = np.zeros((4, 4))
        self.dynamics[:2, :2], self.dynamics[2:, 2:] = rotation(0.98, 20.0), rotation(0.98, 50.0)
        self.loading, self.noise = rng.normal(size=(units, 4)), 0.02 * np.eye(4)
        self.initial = 0.02 / (1.0 - 0.98**2) * np.eye(4)  # the stationary covariance
        path = np.zeros((trials, bins, 4))
        path[:, 0] = rng.normal(size=(trials, 4)) @ np.sqrt(self.initial)
        for t in range(1, bins):
            path[:, t] = path[:, t - 1] @ self.dynamics.T + math.sqrt(0.02) * rng.normal(size=(trials, 4))
        self.path = path
        values = path @ self.loading.T + math.sqrt(0.5) * rng.normal(size=(trials, bins, units))
        self.recording = Recording.from_arrays(values, bin_width=0.01, counts=False)

    def smoothed(self) -> np.ndarray:
        """The path inferred with the true parameters."""
        prior = GaussMarkov.from_dynamics(
            *(torch.from_numpy(m) for m in (self.dynamics, self.noise)), num_bins=self.path.shape[1],
            initial_covariance=torch.from_numpy(self.initial),
        )  # fmt: skip
        units = len(self.loading)
        offset, noise = (
            torch.zeros(units, dtype=torch.float64),
            torch.full((units,), math.sqrt(0.5), dtype=torch.float64),
        )
        readout = readouts.AffineReadout(
            readouts.Gaussian(),
            torch.zeros(self.path.shape, dtype=torch.float64),
            torch.from_numpy(self.loading),
            offset,
            noise,
        )
        return path_given(prior, readout, self.recording.observations).mean.numpy()


def explained(truth: np.ndarray, found: np.ndarray) -> float:
    """R2 of the true path under the best affine map of the path found."""
    truth, found = truth.reshape(-1, truth.shape[-1]), found.reshape(-1, found.shape[-1])
    design = np.concatenate([found, np.ones((len(found), 1))], 1)
    residual = truth - design @ np.linalg.lstsq(design, truth, rcond=None)[0]
    return 1.0 - float(np.square(residual).sum() / np.square(truth - truth.mean(0)).sum())


def test_eigenvalues_and_latents_of_a_known_system_are_recovered():
    truth = Truth(trials=60, bins=100)
    model = models.LDS(4, readouts.Gaussian())
    with numerics():
        density = LogDensity(collapse(model), truth.recording)
        start = density.unconstrain(model.initial_values(truth.recording))
        mode, _ = ascend(density, start, 80, "test")
        parameters = globals_given(model, density.constrain(mode), truth.recording)
        found = np.linalg.eigvals(parameters.dynamics.numpy())
        path = collapse(model).path_posterior(parameters, truth.recording).mean.numpy()
    expected = np.linalg.eigvals(truth.dynamics)
    distance = np.abs(expected[:, None] - found[None])
    rows, columns = linear_sum_assignment(distance)
    assert distance[rows, columns].max() < 0.02
    assert explained(truth.path, truth.smoothed()) - explained(truth.path, path) < 0.01
    assert explained(truth.path, path) > 0.9


def test_bands_of_the_path_cover_the_truth_of_poisson_data():
    """With the true parameters, so that nothing but the Laplace approximation of the path is on trial."""
    like = zoo.blank(trials=25, bins=80, units=20)
    model = models.LDS(2, readouts.Poisson(), dynamics_scale=1.0)
    values = {
        "mixing": torch.tensor([[4.0, -1.5], [1.5, 4.0]], dtype=torch.float64),
        "offset": torch.full((20,), math.log(0.2), dtype=torch.float64),
    }
    recording, truth = dyn.simulate(model, like, seed=3, values=values)
    assert 0.1 < float(recording.observations.mean()) < 0.5
    parameters = model.unlabel(
        {str(k): torch.from_numpy(v.values) for k, v in truth.drop_vars("path").data_vars.items()}
    )
    law = collapse(model).path_posterior(parameters, recording)
    error = (torch.from_numpy(truth["path"].values) - law.mean) / law.variance.sqrt()
    covered = float((error.abs() < 1.6449).double().mean())
    assert 0.84 < covered < 0.96
    # And the latent was found at all: the bands are narrower than the prior's.
    assert float(law.variance.mean()) < 0.6


def test_more_data_has_more_evidence_for_the_truth_than_for_a_distorted_one():
    truth = Truth(trials=4, bins=60, units=8)
    model = models.LDS(4, readouts.Gaussian())
    parameters = model.unlabel({
        "dynamics": torch.from_numpy(truth.dynamics),
        "process_noise": torch.from_numpy(truth.noise / truth.initial[0, 0]),
        "loading": torch.from_numpy(truth.loading * math.sqrt(truth.initial[0, 0])),
        "offset": torch.zeros(8, dtype=torch.float64),
        "noise_sd": torch.full((8,), math.sqrt(0.5), dtype=torch.float64),
    })  # fmt: skip
    right = path_evidence(*collapse(model).factors(parameters, truth.recording), truth.recording.observations).sum()
    for wrong in (
        parameters._replace(dynamics=parameters.dynamics.mT),  # the rotations run backwards
        parameters._replace(loading=parameters.loading[:, [1, 0, 2, 3]]),
        parameters._replace(noise=1.2 * parameters.noise),
    ):
        found = path_evidence(*collapse(model).factors(wrong, truth.recording), truth.recording.observations).sum()
        assert float(right - found) > 5.0
