"""Steps and ramps: against sums over every path, sums over step times, simulated diffusions, and finer grids."""

import itertools

import numpy as np
import pytest
import scipy.stats as st
import torch
import zoo

import pyrodyn as dyn
from pyrodyn import inference, models
from pyrodyn.distributions.modes import ConditionedModes
from pyrodyn.inference.engine import random_stream
from pyrodyn.program import globals_given

NAMES = ("against", "none", "for")
DRIFTS = (-0.5, 0.0, 1.0)  # per second


def drawn(row, recording, draws=(2,)):
    return globals_given(row.model, zoo.prior_draws(row.model, recording, draws), recording)


def trial_of(counts, bin_width=0.05):
    return dyn.Recording.from_arrays(np.asarray(counts, float)[None, :, None], bin_width=bin_width, counts=True)


def ramps(trials=150, bins=80, seed=0, gain=40.0, bin_width=0.01):
    """Counts of a cell that ramps to a bound, made without the model."""
    rng = np.random.default_rng(seed)
    which = rng.integers(len(NAMES), size=trials)
    x, path = np.full(trials, 0.5), np.zeros((trials, bins))
    for t in range(bins):
        moved = x + np.array(DRIFTS)[which] * bin_width + np.sqrt(0.1 * bin_width) * rng.normal(size=trials)
        x = np.where(x >= 1, 1.0, np.minimum(moved, 1.0))
        path[:, t] = x
    counts = rng.poisson(np.logaddexp(0.0, gain * path) * bin_width)
    condition = [NAMES[i] for i in which]
    return dyn.Recording.from_arrays(
        counts[..., None].astype(float), bin_width=bin_width, condition=condition, counts=True
    ), path


def steps(trials=150, bins=80, seed=0, bin_width=0.01):
    """Counts of a cell that steps from 20 to 35 or 8 Hz at a gamma-like time."""
    rng = np.random.default_rng(seed)
    which = rng.integers(len(NAMES), size=trials)
    time = rng.geometric(2 / 40, trials) + rng.geometric(2 / 40, trials)
    up = rng.random(trials) < np.array([0.1, 0.5, 0.9])[which]
    rates = np.where(np.arange(bins) < time[:, None], 20.0, np.where(up, 35.0, 8.0)[:, None])
    counts = rng.poisson(rates * bin_width)
    condition = [NAMES[i] for i in which]
    return dyn.Recording.from_arrays(
        counts[..., None].astype(float), bin_width=bin_width, condition=condition, counts=True
    ), up


@pytest.mark.parametrize("name", ["Stepping-conditions-ragged", "Stepping-geometric-missing"])
def test_the_evidence_is_the_sum_over_every_path(name):
    row = zoo.row(name)
    recording = row.recording.isel(time=slice(0, 5))
    parameters = drawn(row, recording)
    law = row.model.law(parameters, recording)
    paths = torch.tensor(list(itertools.product(range(row.model.phases + 2), repeat=recording.num_bins)))
    scores = torch.stack([
        law.log_prob(path)
        + row.model._given(parameters, path.expand(recording.num_trials, -1), recording).log_prob(recording.values)
        for path in paths
    ])  # fmt: skip
    torch.testing.assert_close(
        row.model.evidence(parameters, recording, recording.values), scores.logsumexp(0), rtol=1e-10, atol=1e-9
    )


@pytest.mark.parametrize("phases", [1, 3])
def test_the_evidence_is_the_sum_over_step_times_and_directions(phases):
    counts, width = np.array([1, 0, 2, 3, 1, 4, 0]), 0.05
    model = models.Stepping(phases=phases)
    values = {"delay": 0.2, "up_probability": 0.7}
    sites = {name: torch.tensor([[value]], dtype=torch.float64) for name, value in values.items()}
    sites |= {
        "offset": torch.tensor([[0.1]], dtype=torch.float64),
        "change": torch.tensor([[[0.8], [-1.2]]], dtype=torch.float64),
    }
    recording = trial_of(counts, width)
    found = model.evidence(globals_given(model, sites, recording), recording, recording.values)
    success = phases * width / (0.2 + phases * width)
    bins, total = np.arange(len(counts)), 0.0
    for step in range(phases, 400):
        for change, share in ((0.8, 0.7), (-1.2, 0.3)):
            rates = np.exp(0.1 + np.where(bins >= step, change, 0.0))
            total += (
                share * st.nbinom.pmf(step - phases, phases, success) * np.exp(st.poisson.logpmf(counts, rates).sum())
            )
    assert found.item() == pytest.approx(np.log(total), abs=1e-9)
    mean = sum(step * st.nbinom.pmf(step - phases, phases, success) for step in range(phases, 4000)) * width
    assert globals_given(model, sites, recording).step_time.item() == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("kind", ["conditions-ragged", "no-bound-missing", "collapsing-missing"])
def test_the_evidence_of_a_ramp_is_a_dense_forward_pass(kind):
    row = zoo.row(f"Accumulator-{kind}")
    recording = row.recording
    parameters = drawn(row, recording, ())
    model, found = row.model, row.model.evidence(drawn(row, recording, ()), recording, recording.values)
    bound, collapse = model.bound, 0.0 if parameters.collapse is None else parameters.collapse.item()
    gains = 1.0 + collapse * recording.bin_width * np.arange(recording.num_bins + 1)
    grid = model.positions.numpy()[: model.grid]
    sd = parameters.diffusion.item() * np.sqrt(recording.bin_width)
    which = model.which(recording)
    for i in range(recording.num_trials):
        drift = parameters.drift.reshape(-1)[which[i]].item() * recording.bin_width

        def step(x, t, drift=drift):
            mean, spread = gains[t + 1] * (x / gains[t] + drift), gains[t + 1] * sd
            weight = st.norm.pdf(grid, mean, spread)
            beyond = st.norm.sf(1.0, mean, spread) if bound else 0.0
            inside = weight / weight.sum() * (1.0 - beyond)
            return np.append(inside, beyond) if bound else inside

        gain = np.exp(parameters.offset.numpy().reshape(-1)) / recording.bin_width
        rates = np.logaddexp(0.0, gain * model.positions.numpy()[:, None]) * recording.bin_width
        belief, total = step(parameters.start.item(), 0), 0.0
        for t in range(recording.num_bins):
            if t:
                after = np.array([step(x, t) for x in grid] + ([np.eye(model.grid + 1)[-1]] if bound else []))
                belief = belief @ after
            seen = np.ones(recording.num_units) if recording.mask is None else recording.mask[i, t].numpy()
            belief = belief * np.exp((seen * st.poisson.logpmf(recording.values[i, t].numpy(), rates)).sum(-1))
            total += np.log(belief.sum())
            belief = belief / belief.sum()
        assert found.reshape(-1)[i].item() == pytest.approx(total, abs=1e-8)


def ramp_sites(bound=True):
    sites = {
        "drift": torch.tensor([DRIFTS], dtype=torch.float64),
        "diffusion": torch.tensor([[0.3]], dtype=torch.float64),
        "offset": torch.tensor([[-0.9]], dtype=torch.float64),
    }
    return {name: value.double() for name, value in sites.items()} | (
        {"start": torch.tensor([[0.5]], dtype=torch.float64)} if bound else {}
    )


@pytest.mark.parametrize("collapse", [0.0, 2.0])
def test_the_evidence_of_a_ramp_is_the_mean_over_simulated_diffusions(collapse):
    counts, width, paths = np.array([0, 1, 2, 2, 4, 3, 4, 4]), 0.05, 400_000
    model = models.Accumulator(grid=200, collapse=collapse)
    sites = ramp_sites() | {
        "drift": torch.tensor([[0.8]], dtype=torch.float64),
        "offset": torch.tensor([[1.0]], dtype=torch.float64),
    }
    if collapse:
        sites["collapse"] = torch.tensor([[collapse]], dtype=torch.float64)
    recording = trial_of(counts, width)
    found = model.evidence(globals_given(model, sites, recording), recording, recording.values).item()
    rng = np.random.default_rng(0)
    evidence, likelihood, decided = np.full(paths, 0.5), np.zeros(paths), np.zeros(paths, bool)
    for t, count in enumerate(counts):
        evidence += 0.8 * width + 0.3 * np.sqrt(width) * rng.normal(size=paths)
        bound = 1.0 / (1.0 + collapse * (t + 1) * width)
        decided |= evidence >= bound
        x = np.where(decided, 1.0, evidence / bound)
        likelihood += st.poisson.logpmf(count, np.logaddexp(0.0, np.e / width * x) * width)
    weight = np.exp(likelihood - likelihood.max())
    error = weight.std() / weight.mean() / np.sqrt(paths)
    assert error < 0.004
    assert abs(found - np.log(weight.mean()) - likelihood.max()) < 4 * error


@pytest.mark.parametrize("bound", [True, False])
def test_a_grid_twice_as_fine_changes_next_to_nothing(bound):
    recording, _ = ramps(trials=40)
    sizes = (100, 200, 400)
    coarse, finer, finest = (
        model.evidence(globals_given(model, ramp_sites(bound), recording), recording, recording.values).sum().item()
        for model in (models.Accumulator(NAMES, bound=bound, grid=size) for size in sizes)
    )
    assert abs(coarse - finest) < 1e-4  # nats of 40 trials together
    assert abs(finer - finest) < 1e-5


def test_where_the_grid_ends_below_does_not_matter():
    recording, _ = ramps(trials=40)
    near, far = (
        model.evidence(globals_given(model, ramp_sites(), recording), recording, recording.values).sum().item()
        for model in (models.Accumulator(NAMES, grid=100), models.Accumulator(NAMES, grid=200, lower=-2.0))
    )
    assert abs(near - far) < 1e-3


def test_drawn_paths_occur_as_often_as_their_posterior_says():
    row = zoo.row("Stepping-geometric-missing")
    recording, draws = row.recording.isel(time=slice(0, 4)), 3000
    one = zoo.prior_draws(row.model, recording, (1,))
    many = {name: value.expand(draws, *value.shape[1:]) for name, value in one.items()}
    with random_stream(0):
        state = row.model.draw_local(globals_given(row.model, many, recording), recording)["state"]
    parameters = globals_given(row.model, one, recording)
    paths = torch.tensor(list(itertools.product(range(3), repeat=4)))
    law = row.model.law(parameters, recording)
    scores = torch.stack([
        law.log_prob(path)
        + row.model._given(parameters, path.expand(recording.num_trials, -1), recording).log_prob(recording.values)
        for path in paths
    ], -1).squeeze(0)  # fmt: skip
    weights = scores.softmax(-1)
    for k in range(3):
        error = (state == k).double().mean(0) - weights @ (paths == k).to(weights.dtype)
        assert float(error.abs().max()) < 5 * 0.5 / draws**0.5


@pytest.mark.parametrize("few", [0, 10])
@pytest.mark.parametrize("steps", [1, 5])
def test_draws_and_conditions_are_those_of_chains_taken_alone(steps, few, monkeypatch):
    monkeypatch.setattr("pyrodyn.distributions.modes.FEW", few)  # both ways through the filter
    generator = torch.Generator().manual_seed(0)
    start, links = (torch.randn(2, 1, 3, *shape, generator=generator).double() for shape in ((4,), (steps, 4, 4)))
    which = torch.tensor([2, 0, 2, 1])
    seen = torch.randn(4, 6, 4, generator=generator).double()
    law = ConditionedModes(start, links, which, 6)
    paths = torch.tensor(list(itertools.product(range(4), repeat=6)))
    observed = torch.stack([seen[i, torch.arange(6), paths].sum(-1) for i in range(4)], -1)  # (path, trial)
    scores = law.log_prob(paths[:, None, None]) + observed[:, None]
    torch.testing.assert_close(law.log_normaliser(seen), scores.logsumexp(0))


def laplace(model, recording):
    return dyn.fit(model, recording, inference.Laplace(draws=300), seed=0)


# Importance weights of 300 draws have a k-hat of about .6; the standard error is .05, and the gap at least 10 nats.
@pytest.mark.filterwarnings("ignore:.*k-hat exceeds:pyrodyn.comparison.table.ComparisonWarning")
def test_steps_and_ramps_are_told_apart_and_their_parameters_recovered():
    recording, path = ramps()
    fits = {
        "step": laplace(models.Stepping(NAMES), recording),
        "ramp": laplace(models.Accumulator(NAMES, grid=60), recording),
    }
    table = dyn.compare(fits, method=dyn.comparison.Evidence())
    assert str(table["model"].values[0]) == "ramp"
    found = fits["ramp"]
    drift = found["posterior"]["drift"]
    z = (drift.mean(("chain", "draw")) - np.array(DRIFTS)) / drift.std(("chain", "draw"))
    assert bool((abs(z) < 4).all())
    assert np.corrcoef(found["latents"]["position"].values.ravel(), path.ravel())[0, 1] > 0.8
    recording, up = steps()
    fits = {
        "step": laplace(models.Stepping(NAMES), recording),
        "ramp": laplace(models.Accumulator(NAMES, grid=60), recording),
    }
    table = dyn.compare(fits, method=dyn.comparison.Evidence())
    assert str(table["model"].values[0]) == "step"
    last = fits["step"]["latents"]["phase_probability"].isel(time=-1)
    assert np.mean((last.sel(phase="up") > last.sel(phase="down")).values == up) > 0.75


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (models.Stepping, {"phases": 0}, "phases"),
        (models.Stepping, {"step_time": 0.0}, "step_time"),
        (models.Stepping, {"conditions": "ab"}, "conditions"),
        (models.Accumulator, {"conditions": ("a", "a")}, "conditions"),
        (models.Accumulator, {"grid": 3}, "grid"),
        (models.Accumulator, {"lower": 0.2}, "lower"),
        (models.Accumulator, {"upper": 0.9}, "upper"),
        (models.Accumulator, {"collapse": 1.0, "bound": False}, "collapse"),
        (models.Race, {"accumulators": 1}, "accumulators"),
        (models.Race, {"accumulators": 3}, "set grid to 26 or less"),
        (models.Accumulator, {"diffusion": -1.0}, "diffusion"),
    ],
)
def test_options_out_of_range_are_named(kind, change, words):
    with pytest.raises(dyn.errors.ModelError, match=words):
        kind(**change)


def test_recordings_they_cannot_take_are_named():
    recording, _ = ramps(trials=6, bins=10)
    with pytest.raises(dyn.errors.ModelError, match="set grid to 50 or more"):
        models.Accumulator(NAMES, grid=20).check(recording)
    with pytest.raises(dyn.errors.ModelError, match="of conditions"):
        models.Stepping(("for",)).check(recording)
    driven = dyn.Recording.from_arrays(np.ones((1, 9, 2)), bin_width=0.02, inputs=np.ones((1, 9, 1)))
    with pytest.raises(dyn.errors.ModelError, match="inputs"):
        models.Stepping().check(driven)
    halves = dyn.Recording.from_arrays(np.arange(18).reshape(1, 9, 2) + 0.5, bin_width=0.02)
    with pytest.raises(dyn.errors.ReadoutError, match="counts"):
        models.Accumulator().check(halves)
