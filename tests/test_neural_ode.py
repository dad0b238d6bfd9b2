"""The neural ODE: its start by pieces, first states by shooting, and paths under its flow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo

import pyrodyn as dyn
from pyrodyn import drifts, inference, integrators, models, readouts, systems
from pyrodyn.errors import ModelError, SolverError
from pyrodyn.evaluation import rate_r2
from pyrodyn.inference.engine import numerics, random_stream, starting_values
from pyrodyn.inference.flow_start import Pieces
from pyrodyn.program import globals_given, log_terms
from pyrodyn.recording import Recording
from pyrodyn.shooting import shoot


def spiral(trials: int = 6, bins: int = 24, **more) -> systems.System:
    """A damped turn, seen almost without noise of the state."""
    return systems.duffing(trials=trials, bins=bins, units=5, seen=None, bin_width=0.1, sigma=1e-3, **more)


def linear_parameters(model: models.NeuralODE, recording: Recording):
    """Globals whose drift is affine: its path has a closed form."""
    with numerics():
        values = model.initial_values(recording)
    return globals_given(model, {name: v[None, None] for name, v in values.items()}, recording)


def test_a_linear_flow_is_the_matrix_exponential_at_unequal_times() -> None:
    times = np.array([0.0, 0.1, 0.25, 0.3, 0.7])
    rng = np.random.default_rng(0)
    recording = Recording.from_arrays(rng.normal(size=(4, 5, 6)), time=times, counts=False)
    model = models.NeuralODE(2, readouts.Gaussian(), drifts.Linear(), integrator=integrators.FixedStep(0.02))
    parameters = linear_parameters(model, recording)
    initial = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = model.path(parameters, initial, recording)
    level, slope = parameters.drift.weights[0, 0, 0], parameters.drift.weights[0, 0, 1:].mT
    rest = -torch.linalg.solve(slope, level)
    for k, t in enumerate(times):
        expected = rest + (initial - rest) @ torch.linalg.matrix_exp(slope * t).mT
        torch.testing.assert_close(path[..., k, :], expected, rtol=1e-7, atol=1e-7)


def test_shooting_finds_the_normal_law_of_first_states_where_it_is_normal() -> None:
    """A linear flow under a Gaussian readout: against the dense regression on the first state."""
    recording = spiral(trials=3).recording
    model = models.NeuralODE(2, readouts.Gaussian(), drifts.Linear())
    parameters = linear_parameters(model, recording)
    law = shoot(
        lambda state: model.path(parameters, state, recording),
        lambda path: model.readout_at(parameters, path, recording),
        recording.observations,
        torch.zeros(1, 3, 2, dtype=torch.float64),
        model.initial_sd,
    )
    origin = model.path(parameters, torch.zeros(1, 3, 2, dtype=torch.float64), recording)
    columns = [model.path(parameters, unit.expand(1, 3, 2), recording) - origin for unit in torch.eye(2).double()]
    loading, noise = parameters.loading[0, 0], parameters.noise[0, 0]
    design = torch.stack(columns, -1)[0].movedim(-1, -2) @ loading.mT / noise  # (trial, time, first state, unit)
    design = design.movedim(-2, -1).flatten(1, 2)
    rest = recording.values - origin[0] @ loading.mT - parameters.offset[0, 0]
    precision = design.mT @ design + torch.eye(2).double() / model.initial_sd**2
    mean = torch.linalg.solve(precision, design.mT @ (rest / noise).flatten(1, 2).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(law.mean[0], mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((law.root @ law.root.mT)[0], precision, rtol=1e-5, atol=1e-4)


def test_one_piece_is_the_model_and_two_pieces_know_nothing_of_another() -> None:
    row = zoo.row("NeuralODE-Poisson-irregular-missing")
    recording, model = row.recording, row.model
    values = zoo.prior_draws(model, recording, (2,))
    states = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = log_terms(model, values | {"initial_state": states[..., 0, :]}, recording)
    single = log_terms(Pieces(model, (0,)), values | {"initial_state": states[..., :1, :]}, recording)
    for found, expected in zip(single, whole, strict=True):
        torch.testing.assert_close(found, expected)
    apart = log_terms(Pieces(model, (0, 4)), values | {"initial_state": states}, recording)[1]
    parts = [
        log_terms(model, values | {"initial_state": states[..., k, :]}, recording.isel(time=span))[1]
        for k, span in enumerate((range(4), range(4, 9)))
    ]
    torch.testing.assert_close(apart, parts[0] + parts[1])


def test_the_start_finds_a_relaxation_oscillator() -> None:
    """In sample, where a path can but follow from its first state; a tenth of what a linear flow leaves over."""
    system = systems.van_der_pol(trials=5, bins=50, units=5, sigma=1e-3, readout="gaussian", noise_variance=0.02)
    scores = {}
    with random_stream(0), numerics():
        for flow in (drifts.Linear(), drifts.MLP(hidden=12)):
            model = models.NeuralODE(2, readouts.Gaussian(), flow)
            values = starting_values(model, system.recording, 60, "start")
            first = values.pop("initial_state")
            parameters = globals_given(model, values, system.recording)
            rates = model.readout_at(parameters, model.path(parameters, first, system.recording), system.recording).mean
            scores[type(flow).__name__] = rate_r2(system.truth["rates"].values, rates.numpy())
    assert 1.0 - scores["MLP"] < 0.1 * (1.0 - scores["Linear"]), scores


@pytest.mark.parametrize("hidden", [2, 60], ids=["full rank", "low rank"])
def test_the_variational_law_of_a_flow_starts_narrow(hidden: int) -> None:
    recording = spiral(trials=2, bins=8).recording
    engine = inference.SVI(steps=1, particles=1, draws=50, learning_rate=1e-6)
    model = models.NeuralODE(2, readouts.Gaussian(), drifts.MLP(hidden=hidden))
    posterior = dyn.fit(model, recording, engine, seed=0)
    assert 1e-4 < float(posterior["posterior"]["offset"].std("draw").max()) < 0.02


def test_batches_of_trials_bring_a_recognition_network() -> None:
    recording = spiral(trials=4, bins=8).recording
    training = inference.Training(batch=2)
    posterior = dyn.fit(
        models.NeuralODE(2, readouts.Gaussian(), drifts.MLP(hidden=2)), recording,
        inference.SVI(steps=2, particles=1, draws=2, training=training), seed=0,
    )  # fmt: skip
    assert "recognition network" in str(posterior.attrs)


def test_a_path_that_runs_off_is_reported_by_trial_and_time() -> None:
    recording = spiral().recording
    model = models.NeuralODE(2, readouts.Gaussian(), drifts.Linear())
    parameters = linear_parameters(model, recording)
    wild = parameters._replace(drift_weights=1e8 * torch.ones_like(parameters.drift_weights))
    initial = torch.zeros(1, 6, 2, dtype=torch.float64)
    with pytest.raises(SolverError, match=r"ran off to infinity in trial .* at time .* s.*FixedStep\(bins=0.25\)"):
        model.latents(wild, {"initial_state": initial}, recording)
    with pytest.raises(ModelError, match="integrator must be FixedStep or Adaptive"):
        models.NeuralODE(2, integrator="rk4")  # pyright: ignore[reportArgumentType]


def test_fixed_steps_and_adaptive_ones_give_one_density() -> None:
    row = zoo.row("NeuralODE-Gaussian-short-steps-one-latent")
    recording = row.recording
    values = zoo.prior_draws(row.model, recording, (2,))
    values |= zoo.local_draws(row.model, values, recording)
    adaptive = models.NeuralODE(1, readouts.Gaussian(), drifts.Linear(), integrator=integrators.Adaptive())
    fixed = log_terms(row.model, values, recording)[1]
    torch.testing.assert_close(log_terms(adaptive, values, recording)[1], fixed, rtol=1e-4, atol=1e-4)


def test_prediction_of_hidden_units_follows_from_the_others() -> None:
    row = zoo.row("NeuralODE-Gaussian-short-steps-one-latent")
    tree = zoo.fitted(row.name, "SVI")
    hidden = row.recording.hide(unit=row.recording.unit[:1])
    predicted = dyn.predict(tree, hidden, draws=3)
    assert np.isfinite(predicted["expected"]).all()
    assert not np.allclose(predicted["path"], dyn.predict(tree, row.recording, draws=3)["path"])
