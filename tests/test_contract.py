"""What every model promises to every engine, held row by row of the table in `tests/zoo.py`."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Collection

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
import zoo
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyrodyn as dyn
from pyrodyn import guides, inference, models, readouts
from pyrodyn.inference import LocalInference, LogDensity, collapse
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.inference.local import LocalDensity
from pyrodyn.program import LatentModel, globals_given, is_random, log_joint, log_terms
from pyrodyn.readouts import Readout

ROWS = [pytest.param(row, id=row.name) for row in zoo.MODELS]
# Every row with its latents integrated out, and with these sampled, where that can be done.
TREATED = [
    pytest.param(row, treatment, id=f"{row.name}-{treatment}")
    for row in zoo.MODELS
    for treatment in ("path", "collapsed")
    if (row.sampled if treatment == "path" else row.integrated)
]


def classes(module, base: type) -> set[str]:
    """Names that a module exports for users to instantiate."""
    found = {name: getattr(module, name) for name in module.__all__}
    return {
        name for name, item in found.items() if isinstance(item, type) and issubclass(item, base) and item is not base
    }


# ---------------------------------------------------------------------------------------------- the table is complete


def test_every_exported_model_has_a_row():
    assert classes(models, LatentModel) == {type(row.model).__name__ for row in zoo.MODELS}
    assert len({row.name for row in zoo.MODELS}) == len(zoo.MODELS)


def test_every_readout_has_a_row_and_a_model_that_uses_it():
    exported = classes(readouts, Readout)
    assert exported == {type(readout).__name__ for readout in zoo.READOUTS}
    used = {type(row.model.readout).__name__ for row in zoo.MODELS if hasattr(row.model, "readout")}
    assert exported | {"PerRegion"} == used


def test_every_engine_and_guide_has_a_row():
    engines = {name for name in inference.__all__ if hasattr(getattr(inference, name), "run")}
    assert engines == {type(engine).__name__ for engine in zoo.ENGINES.values()}
    exported = (getattr(guides, name) for name in guides.__all__)
    factories = {item.__name__ for item in exported if hasattr(item, "__dataclass_fields__")}
    # Points have no density to compare with their draws, and the other two are guides of paths and trials.
    used = {type(guide).__name__ for guide in zoo.GUIDES} | {"Amortised", "LastLayer", "PointEstimate", "Structured"}
    assert factories == used


# ---------------------------------------------------------------------------------------------- the broadcast rule


def one_by_one(values: dict[str, Tensor], draws: tuple[int, ...], local: Collection[str]):
    """The values of every single draw, without draw dimensions: (*event), or (trial, *event) for what is local."""
    for index in itertools.product(*map(range, draws)):
        yield index, {name: v[index] if name in local else v[index].squeeze(0) for name, v in values.items()}


@pytest.mark.parametrize(("row", "treatment"), TREATED)
@pytest.mark.parametrize("draws", [(3,), (2, 3)])
def test_scoring_draws_together_equals_scoring_them_one_by_one(row, draws, treatment):
    recording = row.recording
    program = row.model if treatment == "path" else collapse(row.model)
    values = zoo.prior_draws(row.model, recording, draws)
    local = zoo.local_draws(row.model, values, recording) if treatment == "path" else {}
    assert all(value.shape[: len(draws) + 1] == (*draws, recording.num_trials) for value in local.values())
    values |= local
    together = log_joint(program, values, recording)
    shared, of_trials = log_terms(program, values, recording)
    assert together.shape == shared.shape == draws and of_trials.shape == (*draws, recording.num_trials)
    for index, single in one_by_one(values, draws, local):
        alone = log_joint(program, single, recording)
        assert alone.shape == ()
        torch.testing.assert_close(together[index], alone, rtol=1e-10, atol=1e-10)
    assert len(torch.unique(together)) == together.numel()  # the draws do differ


@pytest.mark.parametrize(("row", "treatment"), TREATED)
def test_unconstrained_density_broadcasts_and_is_the_joint_with_its_jacobian(row, treatment):
    recording = row.recording
    density = LogDensity(row.model if treatment == "path" else collapse(row.model), recording)
    values = zoo.prior_draws(row.model, recording, (2, 3))
    if treatment == "path":
        values |= zoo.local_draws(row.model, values, recording)
    vector = density.unconstrain(values)
    assert vector.shape == (2, 3, density.dimension)
    for name, value in density.constrain(vector).items():
        torch.testing.assert_close(value, values[name], rtol=1e-10, atol=1e-12)
    together = density(vector)
    torch.testing.assert_close(
        together - density.log_jacobian(vector), log_joint(density.program, values, recording), rtol=1e-10, atol=1e-9
    )
    value, slope = density.gradient(vector)
    torch.testing.assert_close(value, together.detach(), rtol=1e-12, atol=1e-12)
    for index in itertools.product(range(2), range(3)):
        torch.testing.assert_close(density(vector[index]), together[index], rtol=1e-10, atol=1e-10)
        alone = density.gradient(vector[index])[1]
        torch.testing.assert_close(alone, slope[index], rtol=1e-7, atol=1e-7 * float(1.0 + slope[index].abs().max()))


# ------------------------------------------------------------------------------------------ sampling and conditioning


@pytest.mark.parametrize("row", ROWS)
def test_a_blank_recording_samples_what_an_observed_one_scores(row):
    blank = row.recording.blank()
    with random_stream(3), torch.no_grad():
        trace = poutine.trace(row.model).get_trace(blank)
    drawn = trace.nodes["observations"]["value"]
    assert drawn.shape == (blank.num_trials, blank.num_bins, blank.num_units)
    local = [name for name, site in trace.nodes.items() if is_random(site) and site["cond_indep_stack"]]
    local.remove("observations")
    assert local and all(trace.nodes[name]["value"].shape[0] == blank.num_trials for name in local)
    recording = blank.with_observations(drawn)
    row.model.check(recording)  # the draws lie in the support
    sites = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name != "trial"}
    conditioned = poutine.trace(poutine.condition(row.model, data=sites)).get_trace(recording)
    assert conditioned.nodes["observations"]["is_observed"]
    # The globals' sites are left out: a new recording may bring another gauge, in which they mean something else.
    for name in (*local, "observations"):
        before, after = trace.nodes[name], conditioned.nodes[name]
        expected = before["fn"].log_prob(before["value"])
        assert expected.shape == (blank.num_trials,) and bool(torch.isfinite(expected).all())
        torch.testing.assert_close(after["fn"].log_prob(after["value"]), expected, rtol=1e-12, atol=1e-12)
    if not row.integrated:
        return
    with random_stream(3), torch.no_grad():
        collapsed = poutine.trace(collapse(row.model)).get_trace(blank).nodes["observations"]["value"]
    assert collapsed.shape == drawn.shape
    row.model.check(blank.with_observations(collapsed))


@pytest.mark.parametrize("row", ROWS)
def test_simulation_follows_its_seed(row):
    like = row.like()
    recording, truth = dyn.simulate(row.model, like, seed=1)
    again, same = dyn.simulate(row.model, like, seed=1)
    other, _ = dyn.simulate(row.model, like, seed=2)
    assert recording.digest() == again.digest() and truth.identical(same)
    assert recording.digest() != other.digest()
    assert list(recording.trial) == list(like.trial) and list(recording.lengths) == list(like.lengths)
    assert (recording.mask is None) == (like.mask is None)
    shown = [name for name in truth.data_vars if truth[name].dims[:2] == ("trial", "time")]
    assert shown and all(truth[name].shape[:2] == (like.num_trials, like.num_bins) for name in shown)
    name, value = next(iter(zoo.prior_draws(row.model, like, ()).items()))
    held, told = dyn.simulate(row.model, like, seed=1, values={name: value.squeeze(0)})
    assert not told.identical(truth) and held.digest() != recording.digest()


# ---------------------------------------------------------------------------------------------- symmetries and labels


def log_likelihood(row, parameters, local, recording) -> Tensor:
    """log p(y | parameters) of every draw and trial; of y and what is latent where that cannot be integrated out."""
    if row.integrated:
        return collapse(row.model).marginal(parameters, recording).log_prob(recording.observations)
    return LocalDensity(row.model, parameters, recording)(local)


@pytest.mark.parametrize("row", ROWS)
def test_the_declared_symmetry_changes_neither_likelihood_nor_invariants(row):
    model, recording = row.model, row.recording
    values = zoo.prior_draws(model, recording, (4,))
    parameters = globals_given(model, values, recording)
    local = {} if row.integrated else zoo.local_draws(model, values, recording)
    likelihood, before = log_likelihood(row, parameters, local, recording), model.invariants(parameters)
    moved = False
    for seed in range(2, 6):
        turned = model.transformed(parameters, recording, seed)
        moved_local = row.moved(model, local, seed) if local else local
        found = log_likelihood(row, turned, moved_local, recording)
        torch.testing.assert_close(found, likelihood, rtol=1e-9, atol=1e-9)
        after = model.invariants(turned)
        assert before.keys() == after.keys()
        for name, (dims, value) in before.items():
            assert after[name][0] == dims
            torch.testing.assert_close(after[name][1], value, rtol=1e-9, atol=1e-9)
        moved |= any(
            not torch.allclose(new, old) for new, old in zip(turned, parameters, strict=True) if new is not None
        )
    assert moved == (row.symmetry != zoo.NONE), f"the symmetry ({row.symmetry}) moved nothing"


@pytest.mark.parametrize("row", ROWS)
def test_invariants_are_not_blind(row):
    """They see a change that is no symmetry; otherwise a diagnostic on them would be worth nothing."""
    model, recording = row.model, row.recording
    parameters = globals_given(model, zoo.prior_draws(model, recording, (1,)), recording)
    before = model.invariants(parameters)
    for name, value in parameters._asdict().items():
        # process_noise follows from the dynamics, and no invariant shows the gain of an input so far.
        if value is None or name == "process_noise":
            continue
        after = model.invariants(parameters._replace(**{name: 1.1 * value}))
        assert any(not torch.allclose(after[key][1], before[key][1]) for key in before), name


@pytest.mark.parametrize("row", ROWS)
def test_labels_name_every_axis_and_can_be_undone(row):
    model, recording = row.model, row.recording
    parameters = globals_given(model, zoo.prior_draws(model, recording, (2,)), recording)
    labelled = model.label(parameters)
    sizes = {"unit": recording.num_units, "input": recording.num_inputs, "trial": recording.num_trials}
    for name, (dims, value) in [*labelled.items(), *model.invariants(parameters).items()]:
        assert value.shape[:2] == (2, 1), name
        assert value.dim() == 2 + len(dims) and len(set(dims)) == len(dims), name
        for dim, size in zip(dims, value.shape[2:], strict=True):
            assert sizes.setdefault(dim, size) == size, (name, dim)
    back = model.unlabel({name: value for name, (_, value) in labelled.items()})
    assert type(back) is type(parameters)
    for name, value in parameters._asdict().items():
        assert (value is None) == (getattr(back, name) is None)
        assert value is None or torch.equal(getattr(back, name), value)


@pytest.mark.parametrize("row", ROWS)
def test_initial_values_are_one_finite_value_for_every_global(row):
    model, recording = row.model, row.recording
    values = model.initial_values(recording)
    trace = poutine.trace(model.sample_globals).get_trace(recording)
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    assert values.keys() == sites.keys()
    for name, site in sites.items():
        assert values[name].shape == site["value"].shape and values[name].dtype == torch.float64
        assert bool(site["fn"].support.check(values[name]).all()), name
    # Better than what the prior gives, or there would be no point in them.
    several = {
        name: torch.cat([batch_of_one(values)[name], drawn])
        for name, drawn in zoo.prior_draws(model, recording, (8,)).items()
    }
    if row.integrated:
        found = log_joint(collapse(model), several, recording)
    else:
        with random_stream(0), numerics():
            posterior = LocalInference(steps=60).infer(model, globals_given(model, several, recording), recording)
            found = posterior.log_evidence(20)[1].sum(-1)
    assert bool(torch.isfinite(found[0]))
    assert float(found[0]) > float(found[1:].median())


@pytest.mark.parametrize("row", ROWS)
def test_the_specification_rebuilds_the_model(row):
    from pyrodyn.program import specification

    tree = xr.DataTree(xr.Dataset(attrs={"model": json.dumps(specification(row.model))}))
    assert dyn.model_of(tree) == row.model


# ---------------------------------------------------------------------------------------------- a plain Pyro program


def batch_of_one(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values (*event) as one draw of them, (1, 1, *event)."""
    return {name: value.unsqueeze(0).unsqueeze(0) for name, value in values.items()}


@pytest.mark.parametrize("row", ROWS)
def test_stock_pyro_runs_it(row):
    recording, blank = row.recording, row.recording.blank()
    pyro.set_rng_seed(0)
    with numerics():
        one = Predictive(row.model, num_samples=2)(blank)
        batched = Predictive(row.model, num_samples=2, parallel=True)(blank)
        assert one["observations"].shape == (2, blank.num_trials, blank.num_bins, blank.num_units)
        assert batched["observations"].shape == one["observations"].shape
        assert batched.keys() == one.keys() and all(batched[name].shape == one[name].shape for name in one)
        program = row.model if row.sampled else collapse(row.model)
        svi = SVI(program, AutoNormal(program), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        assert np.isfinite(svi.step(recording))
        pyro.clear_param_store()
        program = collapse(row.model) if row.integrated else row.model
        start = row.model.initial_values(recording)
        if not row.integrated:
            start |= {
                name: value[0] for name, value in zoo.local_draws(row.model, batch_of_one(start), recording).items()
            }
        density = LogDensity(program, recording)
        start = density.constrain(density.unconstrain(start))
        start = {name: value.clone() for name, value in start.items()}
        kernel = NUTS(program, max_tree_depth=1, init_strategy=pyro.infer.autoguide.init_to_value(values=start))
        chain = MCMC(kernel, num_samples=1, warmup_steps=1, disable_progbar=True)
        chain.run(recording)
    drawn = chain.get_samples()
    assert drawn.keys() == start.keys()
    for name, value in drawn.items():
        assert value.shape == (1, *start[name].shape) and bool(torch.isfinite(value).all())


# ---------------------------------------------------------------------------------------------- every engine, one tree


def layout(tree: xr.DataTree) -> dict:
    """Names, dims and coordinates that must not depend on the engine."""
    found = {}
    for group in ("posterior", "invariants", "unconstrained_posterior", "latents", "observed_data", "constant_data"):
        dataset = tree[group].to_dataset()
        found[group] = {
            str(name): (variable.dims, tuple(sorted(map(str, variable.coords))))
            for name, variable in dataset.data_vars.items()
        }
    return found


@pytest.mark.parametrize("row", ROWS)
def test_every_engine_gives_the_same_tree(row, tmp_path):
    layouts = {}
    for name in zoo.ENGINES:
        if not zoo.applies(zoo.ENGINES[name], row):
            continue
        tree = zoo.fitted(row.name, name)
        layouts[name] = layout(tree)
        posterior = tree["posterior"].to_dataset()
        assert all(np.isfinite(variable).all() for variable in posterior.data_vars.values()), name
        recording = row.recording
        assert list(posterior["unit"].values) == list(recording.unit)
        assert list(posterior["region"].values) == list(recording.region)
        if row.integrated:
            scores = tree["log_likelihood"]["observations"]
            assert scores.dims == ("chain", "draw", "trial")
            assert list(tree["log_likelihood"]["trial"].values) == list(recording.trial)
            assert np.isfinite(scores).all() and np.isfinite(tree["sample_stats"]["lp"]).all()
        latents = tree["latents"].to_dataset()
        shown = [v for name, v in latents.items() if not str(name).endswith("draws")]
        assert shown and all(v.shape[:2] == (recording.num_trials, recording.num_bins) for v in shown)
        assert json.loads(tree.attrs["engine"])["class"] == type(zoo.ENGINES[name]).__name__
        assert json.loads(tree.attrs["notes"])["globals"]  # what became of the weights, in words
    reference = layouts["NUTS"]
    assert all(reference.values())
    for name, found in layouts.items():
        assert found == reference, name


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", ["SVI", "NUTS-path"])
def test_a_saved_posterior_is_equal_and_predicts_equally(row, kind, tmp_path):
    engine = kind if zoo.applies(zoo.ENGINES[kind], row) else kind.removesuffix("-path")
    tree = zoo.fitted(row.name, engine)
    loaded = dyn.load(dyn.save(tree, tmp_path / "fit.nc"))
    assert loaded.identical(tree)
    assert dyn.model_of(loaded) == row.model
    assert dyn.recording_of(loaded).digest() == row.recording.digest()
    before, after = (dyn.predict(t, row.recording, draws=5, seed=3) for t in (tree, loaded))
    assert before.identical(after)
    assert before["expected"].dims == ("trial", "time", "unit")
    assert all(np.isfinite(variable).all() for variable in before.data_vars.values())
    assert bool((before["expected_lower"] <= before["expected_upper"]).all())
    assert not before.identical(dyn.predict(tree, row.recording, draws=5, seed=4))


@pytest.mark.filterwarnings("ignore:predict. expected counts")  # a posterior of so few bins hardly knows the rates
@pytest.mark.parametrize("row", ROWS)
def test_prediction_of_a_trial_depends_on_that_trial_alone(row):
    tree, recording = zoo.fitted(row.name, "Laplace" if row.integrated else "SVI"), row.recording
    whole = dyn.predict(tree, recording, draws=4)
    for i in range(recording.num_trials):
        alone = dyn.predict(tree, recording.isel(trial=[i]), draws=4)
        # Elsewhere drawn, and so dependent on the random numbers of other trials.
        if not (row.integrated and row.sampled):
            continue
        for name in ("path", "path_sd", "expected"):
            np.testing.assert_allclose(alone[name].values[0], whole[name].values[i], rtol=1e-7, atol=1e-8)
    prior = dyn.predict(tree, recording.blank(), draws=4)
    assert prior.sizes == whole.sizes and not prior.identical(whole)


# ---------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("engine", zoo.ENGINES)
def test_draws_follow_the_seed_alone(engine):
    row = next(row for row in zoo.MODELS if zoo.applies(zoo.ENGINES[engine], row))
    first = zoo.fitted(row.name, engine)
    torch.manual_seed(12345)  # what happened before does not matter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        again = dyn.fit(row.model, row.recording, zoo.ENGINES[engine], seed=0)
    state = torch.get_rng_state()
    torch.manual_seed(12345)
    assert torch.equal(state, torch.get_rng_state()), "the fit used up the caller's random numbers"
    other = zoo.fitted(row.name, engine, seed=1)
    groups = [name for name in ("posterior", "latents", "log_likelihood") if name in first.children]
    assert len(groups) == 2 + row.integrated
    for group in groups:
        assert first[group].identical(again[group]), group
        name = "draws" if group == "latents" else next(iter(first[group].data_vars))
        assert not np.array_equal(first[group][name], other[group][name]), (group, name)


@pytest.mark.parametrize("collapse_path", [None, False])
def test_a_chain_depends_on_seed_and_number_alone(collapse_path):
    row = zoo.row("LDS-Gaussian")
    options = {"draws": 4, "warmup": 3, "max_tree_depth": 2, "collapse": collapse_path}
    runs = {chains: inference.NUTS(chains=chains, **options).run(row.model, row.recording, seed=2) for chains in (1, 2)}
    shifted = inference.NUTS(chains=2, **options).run(row.model, row.recording, seed=1)
    for name, value in runs[2].samples.items():
        assert torch.equal(value[:1], runs[1].samples[name]), name
        assert not torch.equal(value[0], value[1]), name
        assert not torch.equal(value[0], shifted.samples[name][1]), name  # seed 2 chain 0 is not seed 1 chain 1
