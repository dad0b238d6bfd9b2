"""The neural SDE: its coordinates, its grid, its path, and natural gradients against exact smoothers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import zoo
from pyro import poutine
from torch import Tensor

from pyrodyn import drifts, models, readouts, systems
from pyrodyn.diffusion import grid_of
from pyrodyn.distributions import EulerMaruyama
from pyrodyn.errors import ModelError
from pyrodyn.expectations import gauss_hermite
from pyrodyn.inference import collapse
from pyrodyn.inference._diffusion_fit import DiffusionFit, Schedule
from pyrodyn.inference._profile import Profile
from pyrodyn.inference.engine import numerics, starting_values
from pyrodyn.inference.natural import NaturalGradient
from pyrodyn.models._anchor import anchor
from pyrodyn.program import globals_given
from pyrodyn.recording import Recording
from pyrodyn.smoothing import climb


def small(trials: int = 3, bins: int = 20, readout: str = "gaussian", **more) -> Recording:
    return systems.duffing(
        trials=trials, bins=bins, units=4, seen=None, bin_width=0.1, readout=readout, mean_count=1.0, **more
    ).recording


# ---------------------------------------------------------------------------------------------- grid and path


def test_a_grid_holds_every_bin_and_no_step_is_too_long() -> None:
    times = np.array([0.0, 0.1, 0.2, 0.55, 0.6, 1.3])
    recording = Recording.from_arrays(np.zeros((1, 6, 2)), time=times, counts=False, center=[0, 0], scale=[1, 1])
    assert recording.bin_width == pytest.approx(0.1)
    for per_bin in (1, 3):
        grid = grid_of(recording, per_bin)
        reached = np.concatenate([[0.0], np.cumsum(grid.steps.numpy())])
        np.testing.assert_allclose(reached[grid.bins.numpy()], times)
        assert float(grid.steps.max()) <= 0.1 / per_bin * (1 + 1e-5)
    with pytest.raises(ModelError, match=r"widest gap 0.7 s after time 0.6 s.*cut\s+the recording into trials"):
        grid_of(recording, 1_000_000)


def cubic(state: Tensor) -> Tensor:
    return state - state**3


def test_a_path_is_scored_step_by_step_and_made_from_its_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
    diffusion = torch.tensor([[0.5, 0.0], [0.2, 0.7]], dtype=torch.float64)[None]
    law = EulerMaruyama(cubic, diffusion, steps, initial_sd=1.5)
    noise = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    path = law.transform(noise)
    torch.testing.assert_close(law.noise_of(path), noise)
    expected = torch.distributions.Normal(0.0, 1.5).log_prob(path[:, 0]).sum(-1)
    for k, step in enumerate(steps):
        centre = path[:, k] + cubic(path[:, k]) * step
        each = torch.distributions.MultivariateNormal(centre, scale_tril=diffusion[0] * step.sqrt())
        expected = expected + each.log_prob(path[:, k + 1])
    torch.testing.assert_close(law.log_prob(path), expected)


def test_the_scheme_is_of_order_one_for_constant_noise() -> None:
    """Strong error at a fixed time against a path on a grid 64 times finer, from the same Brownian motion."""
    generator = torch.Generator().manual_seed(0)
    finest, count = 1024, 400
    kicks = torch.randn(count, finest, 1, generator=generator, dtype=torch.float64)
    diffusion = torch.full((1, 1, 1), 0.7, dtype=torch.float64)
    ends, sizes = {}, (16, 32, 64, 1024)
    for number in sizes:
        joined = kicks.unflatten(1, (number, finest // number)).sum(2) / math.sqrt(finest // number)
        noise = torch.cat([torch.ones(count, 1, 1).double(), joined], 1)
        steps = torch.full((number,), 1.0 / number, dtype=torch.float64)
        ends[number] = EulerMaruyama(cubic, diffusion, steps).transform(noise)[:, -1]
    errors = [float((ends[number] - ends[1024]).square().mean().sqrt()) for number in sizes[:-1]]
    slope = np.polyfit(np.log(sizes[:-1]), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.15)


# ---------------------------------------------------------------------------------------------- coordinates


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_coordinates_are_those_of_the_recording_whatever_is_drawn(kind) -> None:
    """A state is read off the noiseless predictor by one map, the same for all draws."""
    recording = small(readout=kind)
    readout = readouts.Gaussian() if kind == "gaussian" else readouts.Poisson()
    model = models.NeuralSDE(2, readout)
    drawn = globals_given(model, zoo.prior_draws(model, recording, (5,)), recording)
    own = anchor(recording, 2, readout)
    state = torch.randn(5, 1, 9, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    predictor = state @ drawn.loading.mT + drawn.offset.unsqueeze(-2)
    read = torch.linalg.pinv(own.loading)
    torch.testing.assert_close(((predictor - own.offset) / own.scale) @ read.mT, state)


def test_any_loading_can_be_brought_into_these_coordinates() -> None:
    recording = small()
    own = anchor(recording, 2, readouts.Gaussian())
    generator = torch.Generator().manual_seed(3)
    loading, offset = (torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (2, 1))
    turn, shift, values = own.moved(loading, offset[:, 0])
    state = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    new = state @ turn.mT + shift
    torch.testing.assert_close(new @ values["loading"].mT + values["offset"], state @ loading.mT + offset[:, 0])
    with poutine.trace() as traced:
        own.sample()
    for name, value in values.items():
        assert bool(traced.trace.nodes[name]["fn"].support.check(value))
        assert not bool(traced.trace.nodes[name]["fn"].support.check(value + 1e-3))


def test_a_linear_start_is_the_same_process_in_other_coordinates() -> None:
    """Predictors of the relative and of this model have the same drift, noise and level."""
    recording = small()
    model = models.NeuralSDE(2, readouts.Gaussian())
    relative = model.linear_relative()
    start = relative.initial_values(recording)
    old = globals_given(relative, start, recording)
    new = globals_given(model, model.values_from_relative(start, recording), recording)
    state = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = state @ old.loading.mT + old.offset
    there = torch.linalg.lstsq(new.loading, (seen - new.offset).mT).solution.mT
    torch.testing.assert_close(there @ new.loading.mT + new.offset, seen)
    rate = model.drift(model.drift_parameters(new), there)
    torch.testing.assert_close(rate @ new.loading.mT, state @ old.drift.mT @ old.loading.mT)
    noise = -(old.drift + old.drift.mT)
    torch.testing.assert_close(
        new.loading @ new.diffusion @ new.diffusion.mT @ new.loading.mT, old.loading @ noise @ old.loading.mT
    )


# ---------------------------------------------------------------------------------------------- natural gradients


SCHEDULE = Schedule(rounds=10, path_steps=2, path_rate=0.7, nodes=3, learning_rate=0.01, tolerance=0.05)


def begun(model: models.NeuralSDE, recording: Recording) -> DiffusionFit:
    """A fit at its start."""
    start = starting_values(model.linear_relative(), recording, 200, "start")
    return DiffusionFit(SCHEDULE, model, recording, start)


def test_the_first_step_is_the_smoother_in_continuous_time_up_to_the_step() -> None:
    """A linear start, one unit step: against the relative with its path integrated out at exact transitions."""
    recording = systems.linear_spiral(trials=3, bins=60).recording
    differences = []
    with numerics():
        for per_bin in (5, 20, 80):
            model = models.NeuralSDE(2, readouts.Gaussian(), drift=drifts.Linear(), steps_per_bin=per_bin)
            fitted, relative = begun(model, recording), model.linear_relative()
            start = starting_values(relative, recording, 200, "start")
            parameters = globals_given(relative, start, recording)
            exact = collapse(relative).path_posterior(parameters, recording)
            seen = exact.mean @ parameters.loading.mT + parameters.offset
            own = fitted.parameters()
            bins = fitted.model.grid(recording).bins
            found = fitted.law.mean[:, bins] @ own.loading[0].mT + own.offset[0]
            inside = slice(5, None)  # the first bins see the priors of the first state, which differ
            differences.append(float((found - seen)[:, inside].abs().max() / seen.std()))
    assert differences[-1] < 1e-3
    assert differences[0] > differences[1] > differences[2]


def test_the_profile_has_the_slope_of_the_bound_with_the_path_at_rest() -> None:
    """Central differences of the bound, every path climbed anew, in each of the globals beside the drift."""
    model = models.NeuralSDE(2, readouts.Poisson(), drift=drifts.MLP(hidden=4))
    recording = small(trials=2, bins=12, readout="poisson")
    rule = gauss_hermite(2, 3)
    with numerics():
        fitted = begun(model, recording)
        for _ in range(3):
            fitted.move_weights()
            fitted.move_path()
        rate = torch.full((2,), 0.7)

        def settle(place: Tensor):
            fitted.place = place
            return climb(fitted.target(), fitted.law, rate, rule, 60)

        place = fitted.place.clone()
        fitted.law = settle(place).law
        profile = fitted.profile()
        assert isinstance(profile, Profile)
        value, slope = profile.gradient(place[profile.index])
        bound = settle(place).value.sum() + fitted.density(place)
        torch.testing.assert_close(value, bound, rtol=1e-8, atol=1e-8)
        for i in range(0, len(profile.index), 3):
            step = torch.zeros_like(place)
            step[profile.index[i]] = 1e-4
            ends = [float(settle(place + s).value.sum() + fitted.density(place + s)) for s in (step, -step)]
            assert float(slope[i]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3, abs=1e-3)


def test_a_recording_with_inputs_is_refused() -> None:
    recording = Recording.from_arrays(np.zeros((1, 4, 3)), bin_width=0.1, inputs=np.ones((1, 4, 1)), counts=False,
                                      center=[0, 0, 0], scale=[1, 1, 1])  # fmt: skip
    with pytest.raises(ModelError, match="NeuralSDE takes no inputs"):
        models.NeuralSDE(2, readouts.Gaussian()).check(recording)
    with pytest.raises(ModelError, match="NaturalGradient is for diffusions"):
        NaturalGradient().run(models.LDS(1), small(), seed=0)
    with pytest.raises(ModelError, match="drift must be one of"):
        models.NeuralSDE(2, drift="linear")
