"""Batches, schedules, dropout, clipping and early stopping: each against what it claims to leave unchanged or to do."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

import pyrodyn as dyn
from pyrodyn import guides, inference, models, networks, readouts
from pyrodyn.errors import ModelError
from pyrodyn.guides import Start
from pyrodyn.inference import Constant, Cosine, EarlyStopping, Training, collapse
from pyrodyn.inference.engine import numerics, random_stream, stream_seed
from pyrodyn.inference.loop import Run
from pyrodyn.inference.svi import network_training
from pyrodyn.inference.training import Portion, Weighted, dropped, ramp
from pyrodyn.models._anchor import anchor
from pyrodyn.program import Program, globals_given, log_terms
from pyrodyn.recording import Recording

MODEL = models.LDS(1, readouts.Gaussian())
NETWORK = models.LatentRNN(3, networks.Leaky())


@cache
def recording(trials: int = 10, bins: int = 8, units: int = 3, missing: float = 0.0) -> Recording:
    rng = np.random.default_rng(0)
    mask = rng.random((trials, bins, units)) >= missing
    like = Recording.from_arrays(
        np.zeros((trials, bins, units)), bin_width=0.1, counts=False, center=np.zeros(units), scale=np.ones(units),
        mask=mask,
    ).blank()  # fmt: skip
    values = {"mixing": torch.tensor([[1.5]]), "weights": torch.tensor([[1.4], [-0.9], [1.1]])[:units]}
    return dyn.simulate(MODEL, like, seed=0, values=values | {"noise_sd": torch.full((units,), 0.6)})[0]


def counts(trials: int = 24, bins: int = 8, units: int = 3) -> Recording:
    like = Recording.from_arrays(np.ones((trials, bins, units)), bin_width=0.1, counts=True).blank()
    return dyn.simulate(NETWORK, like, seed=0, values={"offset": torch.zeros(units)})[0]


def run_of(
    program: Program, data: Recording, guide, training: Training, steps: int = 20, rate: float = 0.01, **options
):
    base = getattr(program, "model", program)
    with random_stream(0), numerics(), pyro.settings.context(module_local_params=True):
        built = guide(program, data, Start(base.initial_values(data), None))
        built(data)
        run = Run(program, built, data, training, steps=steps, rate=0.01, particles=1, seed=3)
    return run


def inside(action):
    with random_stream(1), numerics(), pyro.settings.context(module_local_params=True):
        return action()


# ---------------------------------------------------------------------------------------------- batches


def test_every_round_of_batches_shows_every_trial_once_in_a_new_order():
    portion = Portion(Training(batch=3), recording(), lambda stream: stream_seed(0, stream))
    rounds = [[tuple(portion.at(3 * r + i).trial) for i in range(3)] for r in range(2)]
    for batches in rounds:
        assert all(len(batch) == 3 for batch in batches)
        assert len({trial for batch in batches for trial in batch}) == 9  # one of ten waits for another round
    assert rounds[0] != rounds[1]
    assert tuple(portion.at(1).trial) == rounds[0][1]  # a step can be asked for again, as after a failure
    other = Portion(Training(batch=3), recording(), lambda stream: stream_seed(1, stream))
    assert [tuple(other.at(i).trial) for i in range(3)] != rounds[0]


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_the_mean_over_batches_is_the_whole_bound(missing):
    """With a point for a guide the bound has no noise, so the two are equal to rounding."""
    program, data = collapse(MODEL), recording(missing=missing)
    whole = inside(lambda: run_of(program, data, guides.PointEstimate(), Training())._loss())
    run = run_of(program, data, guides.PointEstimate(), Training(batch=2))
    losses = []
    for run.step in range(5):
        losses.append(float(inside(run._loss).detach()))
    assert np.std(losses) > 0.1
    assert np.mean(losses) == pytest.approx(float(whole.detach()), rel=1e-12)


@pytest.mark.parametrize("training", [Training(batch=1), Training(dropout=0.5), Training(stopping=EarlyStopping())])
def test_coordinates_that_models_read_off_the_data_stay_those_of_all_trials(training):
    """A loading is triangular on pivot units, or lies in a subspace, that single trials would choose differently."""
    values = np.random.default_rng(0).normal(size=(10, 8, 6))
    data = Recording.from_arrays(values, bin_width=0.1, counts=False)
    model = models.LDS(2, readouts.Gaussian())

    def read_off(part: Recording) -> tuple[tuple[int, ...], torch.Tensor]:
        return model.pivots(part), anchor(part, 2, model.readout).loading

    pivots, loading = read_off(data)
    alone = [read_off(data.isel(trial=[i])) for i in range(data.num_trials)]
    assert any(own[0] != pivots for own in alone) and not any(torch.allclose(own[1], loading) for own in alone)
    portion = Portion(training, data, lambda stream: stream_seed(0, stream))
    parts = [portion.at(step) for step in range(4)]
    if portion.held_out is not None:
        parts.append(portion.held_out)
    with random_stream(0):
        parts += [half for part in parts for half in dropped(part, 0.4)[:2]]
    for part in parts:
        own = read_off(part)
        assert own[0] == pivots and torch.equal(own[1], loading)


def test_batches_find_the_posterior_that_all_trials_find():
    data = recording(trials=24)
    found = {}
    for batch in (None, 6):
        engine = inference.SVI(steps=400, particles=2, draws=2000, training=Training(batch=batch))
        draws = engine.run(MODEL, data, seed=0)
        found[batch] = torch.cat([draws.samples["mixing"].reshape(-1, 1), draws.samples["offset"][0]], -1)
    sd = found[None].std(0)
    assert bool(((found[6].mean(0) - found[None].mean(0)).abs() < 0.3 * sd).all())
    assert bool(((found[6].std(0) / sd - 1.0).abs() < 0.3).all())


@pytest.mark.parametrize("training", [Training(batch=2), Training(dropout=0.5), Training(stopping=EarlyStopping())])
def test_guides_with_parameters_of_single_trials_are_refused(training):
    for options in ({"guide": guides.MeanField(), "collapse": False}, {"guide": guides.Structured()}):
        with pytest.raises(ModelError, match="without parameters of single trials.*use guides.Amortised"):
            inference.SVI(steps=2, draws=4, training=training, **options).run(MODEL, recording(), seed=0)


# ---------------------------------------------------------------------------------------------- weights of terms


def test_terms_are_weighted_by_what_they_belong_to():
    data = recording()
    with random_stream(0), numerics(), torch.no_grad():
        trace = poutine.trace(MODEL).get_trace(data)
        values = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name != "trial"}
        shared, of_trials = log_terms(MODEL, values, data)
        globals_ = {name: value for name, value in values.items() if name != "latent"}
        path = MODEL.latent_path(globals_given(MODEL, globals_, data), data).log_prob(values["latent"]).sum()
        with Weighted(3.0, 0.5, 0.25, 2.0):
            weighted = poutine.trace(poutine.replay(MODEL, trace)).get_trace(data)
        weighted.compute_log_prob()
        total = sum(site["log_prob_sum"] for site in weighted.nodes.values() if "log_prob_sum" in site)
    observed = of_trials.sum() - path
    expected = 0.25 * shared + 3.0 * (0.5 * path + 2.0 * observed)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_ramps_and_schedules():
    assert [ramp(step, 3) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert ramp(0, 0) == 1.0
    cosine = Cosine(final=0.1, warm_up=4)
    assert cosine.factor(0, 100) == pytest.approx(0.2)
    assert cosine.factor(50, 100) == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine.factor(100, 100) == pytest.approx(0.1)
    assert [Constant(warm_up=1).factor(step, 10) for step in range(3)] == [0.5, 1.0, 1.0]


def test_the_default_schedule_is_the_cosine_that_small_models_had():
    for step in (0, 7, 99):
        share = 0.5 * (1.0 + math.cos(math.pi * step / 100))
        assert Training().schedule.factor(step, 100) == pytest.approx(0.01 + 0.99 * share, rel=1e-15)


# ---------------------------------------------------------------------------------------------- dropout


def test_dropout_scores_what_the_guide_does_not_see():
    data = recording(missing=0.3)
    with random_stream(0):
        seen, scored, factor = dropped(data, 0.4)
    assert not bool((seen.mask & scored.mask).any())
    assert torch.equal(seen.mask | scored.mask, data.mask)
    assert factor == pytest.approx(float(data.mask.sum() / scored.mask.sum()))
    assert float(scored.mask.sum() / data.mask.sum()) == pytest.approx(0.4, abs=0.1)
    assert torch.equal(seen.values, torch.where(seen.mask, data.values, 0.0))


# ---------------------------------------------------------------------------------------------- clipping


def test_a_gradient_far_above_its_usual_size_is_scaled_down():
    run = run_of(collapse(MODEL), recording(), guides.PointEstimate(), Training(clip=2.0))
    sizes = [1.0, 1.0, 1.0, 50.0, 1.0]
    norms = []
    for size in sizes:
        for parameter in run.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        next(iter(run.parameters.values())).grad[0] = size
        run._clip(2.0)
        norms.append(max(float(p.grad.abs().max()) for p in run.parameters.values()))
    assert norms == pytest.approx([1.0, 1.0, 1.0, 2.0, 1.0])


# ---------------------------------------------------------------------------------------------- early stopping


def test_the_held_out_bound_is_the_evidence_of_the_held_out_trials():
    """Under a point, with the path integrated out, the bound is the evidence itself."""
    data = recording()
    run = run_of(collapse(MODEL), data, guides.PointEstimate(), Training(stopping=EarlyStopping(share=0.3)))
    assert len(run.portion.positions) == 3 and run.portion.rest.num_trials == 7
    assert not set(run.portion.rest.trial) & set(data.trial[run.portion.positions])
    bound = inside(lambda: run._held_out_bound(run.portion.held_out))
    _, of_trials = log_terms(collapse(MODEL), MODEL.initial_values(data), data)
    assert bound == pytest.approx(float(of_trials[run.portion.positions].mean()), rel=1e-10)


def test_training_stops_where_held_out_trials_get_no_better_and_returns_to_the_best(monkeypatch):
    bounds = iter([1.0, 3.0, 2.0, 2.5, 0.0, 9.0])
    monkeypatch.setattr(Run, "_held_out_bound", lambda run, held_out: next(bounds))
    stopping = EarlyStopping(every=4, patience=3)
    run = run_of(collapse(MODEL), recording(), guides.PointEstimate(), Training(stopping=stopping), steps=100)
    kept = {}
    look = Run._look

    def watch(self) -> None:
        look(self)
        if self.step == 8:
            kept.update({name: parameter.detach().clone() for name, parameter in self.parameters.items()})

    monkeypatch.setattr(Run, "_look", watch)
    inside(lambda: run.train(None))
    assert run.step == 20 and run.best_bound == 3.0
    assert all(torch.equal(parameter, kept[name]) for name, parameter in run.parameters.items())
    assert np.flatnonzero(np.isfinite(run.history["held_out_bound"])).tolist() == [3, 7, 11, 15, 19]
    assert np.isfinite(run.history["loss"]).all() and len(run.history["loss"]) == 20


def test_what_was_held_out_is_told():
    draws = inference.SVI(steps=30, draws=10, training=Training(stopping=EarlyStopping(share=0.2, every=5))).run(
        MODEL, recording(), seed=0
    )
    assert len(draws.notes["held_out_trials"]) == 2
    assert math.isfinite(draws.notes["held_out_bound"])
    assert draws.notes["globals"] == "full-rank Gaussian"


# ---------------------------------------------------------------------------------------------- digits and defaults


def test_single_precision_changes_the_bound_of_a_network_in_the_last_digits_only():
    data = counts()
    losses = {}
    for single in (False, True):
        run = run_of(NETWORK, data, guides.Amortised(hidden_dim=4), Training(single_precision=single))
        losses[single] = inside(lambda run=run: (run._advance(), run.losses[0])[1])
        assert all(parameter.dtype == torch.float64 for parameter in run.parameters.values())
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_networks_are_trained_by_the_size_of_the_data():
    few, many = network_training(NETWORK, counts(8), 1000), network_training(NETWORK, counts(150), 1000)
    assert few.batch is None and few.stopping is None
    assert many.batch == 64 and many.stopping is not None and many.dropout == 0.0
    assert many.latent_warm_up == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"clip": -1.0}, "clip must be positive"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ModelError, match=message):
        Training(**options)


def test_holding_back_every_trial_is_refused():
    with pytest.raises(ModelError, match="would hold back 1 of 1 trials"):
        Portion(Training(stopping=EarlyStopping()), recording(trials=1), lambda stream: 0)
