"""Coupled regions: options against recordings, exactness of Gibbs sampling, and graphs found again."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import scipy.stats
import torch

import pyrodyn as dyn
from pyrodyn import inference, models, plots, readouts
from pyrodyn.conditionals.paths import factors, levelled
from pyrodyn.errors import ModelError
from pyrodyn.inference import _starts, gibbs
from pyrodyn.inference._starts import starts
from pyrodyn.inference.collapse import collapse
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.inference.gibbs import FEWEST, Run
from pyrodyn.inference.mode import Rescaled, ascend
from pyrodyn.models._regions import BUMPS, COURSES, INITIAL, SIGNAL
from pyrodyn.models._regions_network import _evidence, _potential
from pyrodyn.models._regions_rows import _persistence, draw_courses
from pyrodyn.models._regions_scales import apart_from_courses, draw_variances
from pyrodyn.program import globals_given
from pyrodyn.systems import coupled_regions


def recording(values=None, region=("A", "A", "A", "B", "B", "B"), trials: int = 3, bins: int = 20, **options):
    if values is None:
        values = np.random.default_rng(0).poisson(0.5, (trials, bins, len(region)))
    return dyn.Recording.from_arrays(values, bin_width=0.05, region=list(region), **options)


# ------------------------------------------------------------------------------------------ what cannot be fitted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": {"A": 1, "C": 1}}, r"latent_dim names \['C'\].*no units.*\['A', 'B'\]"),
        ({"latent_dim": {"A": 1}}, r"units in \['B'\].*recording.sel\(region"),
        ({"latent_dim": {"A": 4, "B": 1}}, r"'A' has 3 units and latent_dim asks for 4"),
        ({"latent_dim": 0}, "1 or more"),
        ({"latent_dim": 1, "shared_courses": -1}, "shared_courses must be a whole number of 0 or more, got -1"),
        ({"latent_dim": 1, "time_bumps": 2.5}, "time_bumps must be a whole number of 0 or more, got 2.5"),
        ({"latent_dim": {"A": "x"}}, "whole number"),
        ({"latent_dim": 1, "edges": [("A", "C")]}, r"edges names \['C'\].*graph.subgraph\(recording.regions\)"),
        ({"latent_dim": 1, "edges": ["AB", ("A",)]}, r"must be \(source, target\)"),
        ({"latent_dim": 1, "edges": [("A", "B", "much")]}, r"must be \(source, target\).*'much'"),
        ({"latent_dim": 1, "edges": [("A", "A")]}, "own dynamics are always there"),
        ({"latent_dim": 1, "edges": [("A", "B", 0.0)]}, "leave out an edge"),
        ({"latent_dim": 1, "edges": [("A", "B"), ("A", "B", 0.2)]}, "twice"),
        ({"latent_dim": 1, "edges": nx.Graph([("A", "B")])}, "DiGraph"),
        ({"latent_dim": 1, "edge_probability": 1.5}, "edge_probability"),
        ({"latent_dim": 1, "time_bumps": 1}, "time_bumps"),
        ({"latent_dim": 1, "persistence": 1.0}, "persistence"),
        ({"latent_dim": 1, "coupling_scale": 0.0}, "coupling_scale"),
        ({"latent_dim": 1, "readout": "Poisson"}, "readouts"),
        ({"latent_dim": 1, "conditions": ("left",)}, r"conditions \['all'\]"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_a_remedy(options, message):
    with pytest.raises(ModelError, match=message):
        models.MultiRegionLDS(**options).check(recording())


def test_recordings_that_cannot_be_fitted_are_refused():
    model = models.MultiRegionLDS(1)
    with pytest.raises(ModelError, match=r"two regions or more.*models.LDS"):
        model.check(recording(region=("A",) * 6))
    with pytest.raises(ModelError, match="a name this model uses itself"):
        model.check(recording(region=("global",) * 3 + ("B",) * 3))
    with pytest.raises(ModelError, match="one bin holds no dynamics"):
        model.check(recording(np.ones((4, 1, 6))))
    silent = np.ones((3, 20, 6))
    silent[..., 3:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mute = recording(silent, counts=True)
    with pytest.raises(ModelError, match=r"'B' is silent.*sel\(region=\['A'\]\)"):
        model.check(mute)
    with pytest.raises(ModelError, match=r"'A' is never observed.*sel\(region=\['B'\]\)"):
        model.check(recording().hide(region="A"))
    still = np.random.default_rng(0).normal(size=(3, 20, 6))
    still[..., 3:] = [0.0, 2.0, -1e9]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        constant = recording(still, counts=False)
    gaussian = models.MultiRegionLDS(1, readout=readouts.Gaussian())
    with pytest.raises(ModelError, match=r"'B' is silent.*none of its 3 units ever changes"):
        gaussian.check(constant)
    still[0, 0, 3] = np.nan  # what is hidden says nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        constant = recording(still, counts=False, missing="mask")
    with pytest.raises(ModelError, match=r"'B' is silent"):
        gaussian.check(constant)
    with pytest.raises(ModelError, match="irregular"):
        model.check(
            dyn.Recording.from_arrays(
                np.ones((1, 4, 2)), time=[0.0, 0.1, 0.3, 0.4], bin_width=0.1, region=["A", "B"], counts=True
            )
        )


def test_a_graph_of_edges_is_a_prior():
    graph = nx.DiGraph()
    graph.add_edge("A", "B", probability=0.2)
    model = models.MultiRegionLDS({"A": 1, "B": 1}, edges=graph)
    assert model.edges is not None and model.edges[0] == ("A", "B", 0.2, 1.0)
    assert model == models.MultiRegionLDS({"A": 1, "B": 1}, edges=[("A", "B", 0.2)])
    seen = recording()
    with random_stream(0), numerics(), torch.no_grad():
        parameters = model.sample_globals(seen)
    blocks = model.layout(seen)
    assert not bool(parameters.dynamics[blocks.places[0], blocks.places[1]].any())  # B does not drive A


def test_the_weight_of_an_edge_can_be_its_prior_scale():
    graph = nx.DiGraph()
    graph.add_edge("A", "B", probability=1.0, scale=3.0)
    graph.add_edge("B", "A", probability=1.0)
    like = recording().blank()
    scaled, plain = (
        models.MultiRegionLDS(2, edges=edges, edge_probability=1.0) for edges in (graph, list(graph.edges))
    )
    assert scaled.edges == (("A", "B", 1.0, 3.0), ("B", "A", 1.0, 1.0))
    wide, layout = scaled.network_prior(like).sd_entry, scaled.layout(like)
    ratio = layout.matrix(wide / plain.network_prior(like).sd_entry)
    a, b = layout.places
    torch.testing.assert_close(ratio[b, a], torch.full((2, 2), 3.0, dtype=torch.float64))
    torch.testing.assert_close(ratio[a, b], torch.ones(2, 2, dtype=torch.float64))
    # A connectome's two uses leave each other alone, and the file of a posterior gives the same model back.
    assert scaled == replace(scaled, edges=json.loads(json.dumps(scaled.edges)))
    variants = dyn.hypotheses(scaled, recording())
    assert ("A", "B", 1.0, 3.0) in variants["feedback loop"].edges
    switching = models.MultiRegionSwitchingLDS(2, 2, edges=graph).blocks(recording()).scale
    torch.testing.assert_close(switching[b, a] / switching[a, b], torch.full((2, 2), 3.0, dtype=torch.float64))
    for strange in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ModelError, match=r"prior scale of edge 'A' -> 'B' must be positive"):
            models.MultiRegionLDS(1, edges=[("A", "B", 0.5, strange)])
    with pytest.raises(ModelError, match=r"each of edges must be"):
        models.MultiRegionLDS(1, edges=[("A", "B", 0.5, 1.0, 2.0)])


def test_gibbs_wants_a_model_with_conditionals():
    with pytest.raises(ModelError, match=r"LDS declares none.*HMC"):
        dyn.fit(models.LDS(1), recording(), inference.Gibbs())
    with pytest.raises(ModelError, match="thin"):
        inference.Gibbs(thin=0)


# ------------------------------------------------------------------------------------------ exactness


@pytest.mark.long
def test_gibbs_agrees_with_hmc_where_all_edges_are_there():
    model = models.MultiRegionLDS(
        1, edge_probability=1.0, readout=readouts.Gaussian(), time_bumps=0, trial_level=False, shared_innovations=0
    )
    like = recording(np.zeros((4, 40, 6)), counts=False, center=np.zeros(6), scale=np.ones(6)).blank()
    seen, _ = dyn.simulate(model, like, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        gibbs = dyn.fit(model, seen, inference.Gibbs(draws=300, warmup=100, thin=2, chains=8), seed=0)
        hmc = dyn.fit(model, seen, inference.HMC(draws=50, warmup=150, chains=32), seed=0)
    for name in ("coupling_strength", "variance_share", "spectral_radius", "signal_sd", "noise_sd"):
        ours, theirs = (p["invariants"][name].stack(sample=("chain", "draw")) for p in (gibbs, hmc))
        apart = abs(ours.mean("sample") - theirs.mean("sample")) / theirs.std("sample")
        assert float(apart.max()) < 0.35, name
        # Of 80% of the draws: near the border of stability a draw in a thousand decides a standard deviation.
        wide = [part.quantile(0.9, "sample") - part.quantile(0.1, "sample") for part in (ours, theirs)]
        spread = wide[0] / wide[1]
        assert float(spread.min()) > 0.7 and float(spread.max()) < 1.4, name


@pytest.mark.long
@pytest.mark.parametrize("readout", [readouts.Gaussian(), readouts.Poisson()])
def test_ranks_of_truths_are_uniform(readout):
    """A short simulation-based calibration; the long one is a benchmark."""
    model = models.MultiRegionLDS(1, readout=readout, time_bumps=3, trial_level=False)
    counts = not readout.is_gaussian
    like = recording(np.ones((2, 25, 6)), counts=counts, center=np.zeros(6), scale=np.ones(6)).blank()
    # Chains half as long hold too few of the truths in their intervals.
    engine = inference.Gibbs(draws=50, warmup=100, thin=6, chains=2)
    found = dyn.calibrate(model, like, engine, replicates=60, seed=4)
    assert not bool(found["flagged"].any()), found["quantity"].values[found["flagged"].values]
    names = found["quantity"].values.astype(str)
    edges = found.isel(quantity=[i for i, name in enumerate(names) if name in ("presence[1]", "presence[2]")])
    assert abs(float(edges["mean"].mean() - edges["truth"].mean())) < 0.15


@pytest.mark.parametrize("readout", [readouts.Poisson(), readouts.Gaussian()])
def test_the_evidence_of_the_dynamics_and_its_slope_are_those_of_autograd(readout):
    data = coupled_regions(regions=2, units=4, trials=3, bins=15, seed=1).recording
    model = models.MultiRegionLDS(2, readout=readout, time_bumps=3)
    with random_stream(0), numerics():
        sweep = model.conditionals(data)
        state = sweep.start(model.initial_values(data), 2)
        parameters = sweep.parameters(state)
        potential = _potential(sweep, state, factors(model, parameters, data)[1])
    vector = sweep.layout.vector(state["dynamics"]).requires_grad_()
    moved = parameters._replace(dynamics=sweep.layout.matrix(vector).unsqueeze(1))
    prior = model.latent_path(moved, data)
    expected = (prior.condition(*potential).log_normaliser - prior.log_normaliser).sum(-1)
    (expected_slope,) = torch.autograd.grad(expected.sum(), vector)
    with torch.no_grad():
        moved = parameters._replace(dynamics=sweep.layout.matrix(vector).unsqueeze(1))
        prior = model.latent_path(moved, data)
        value, slope = _evidence(sweep, moved, prior, prior.condition(*potential))
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(slope, expected_slope, rtol=1e-8, atol=1e-8)


def test_pseudo_observations_of_gaussian_data_are_the_data():
    data = recording(np.random.default_rng(0).normal(size=(3, 20, 6)))
    model = models.MultiRegionLDS(1, readout=readouts.Gaussian(), time_bumps=0)
    values = model.initial_values(data)
    with random_stream(0), torch.no_grad():
        program, _ = levelled(model, globals_given(model, values, data), data, None, 2)
        torch.testing.assert_close(program.values, data.values)
        torch.testing.assert_close(program.noise, values["noise_sd"])
        found = LogDensity(program, data)
        exact = LogDensity(inference.collapse(model), data)
        held = {name: value for name, value in values.items() if name != "noise_sd"}
        moved = held | {"network": 0.9 * values["network"]}
        gain = found(found.unconstrain(moved | {"noise_sd": values["noise_sd"]})) - found(found.unconstrain(values))
        expected = exact(exact.unconstrain(moved | {"noise_sd": values["noise_sd"]})) - exact(exact.unconstrain(values))
    torch.testing.assert_close(gain, expected)


def test_one_start_is_without_edges_that_may_be_absent(monkeypatch):
    monkeypatch.setattr(_starts, "climb", lambda model, recording, values: values)
    seen = recording()
    model = models.MultiRegionLDS(1, edges=[("A", "B", 1.0), ("B", "A", 0.5)], time_bumps=0)
    layout = model.layout(seen)
    with random_stream(0), numerics():
        start, *full = starts(model, seen, True)
    presence = layout.presence(layout.matrix(start["network"]))
    assert presence.tolist() == [[True, False], [True, True]]
    assert len(full) == 2
    for values in full:
        assert layout.presence(layout.matrix(values["network"])).all()
        assert values.keys() == start.keys() == model.initial_values(seen).keys()
    assert len(starts(model, seen, False)) == 1
    assert models.MultiRegionLDS(1, edge_probability=1.0).simpler(seen) is None
    assert models.MultiRegionLDS(1, edge_prior="horseshoe").simpler(seen) is None


@pytest.mark.parametrize(("gain", "taken"), [(5.0, 0), (15.0, 1)])
def test_a_start_with_all_edges_has_to_be_better_by_a_margin(gain, taken, monkeypatch):
    seen, model = recording(), models.MultiRegionLDS(1)
    inner, widened, filled = model.simpler(seen)
    both = [change(inner.initial_values(seen)) for change in (widened, filled)]
    masses = iter(2 * (-100.0, -100.0 + gain))
    monkeypatch.setattr(Run, "scout", lambda run, density, total: next(masses))
    monkeypatch.setattr(gibbs, "starts", lambda model, recording, several: both if several else both[:1])
    engine = inference.Gibbs(draws=1, warmup=FEWEST, chains=2)
    with random_stream(0), numerics(), torch.no_grad():
        _, values = engine._scouted(model, seen, model.conditionals(seen))
    layout = model.layout(seen)
    assert bool(layout.presence(layout.matrix(values["network"])).all()) == bool(taken)


def test_starts_that_are_as_good_share_the_chains_and_go_on_after_a_kill(monkeypatch):
    like = coupled_regions(regions=2, units=5, trials=3, bins=15, mean_count=0.5, seed=0).recording
    model, engine = models.MultiRegionLDS(1), inference.Gibbs(draws=1, warmup=FEWEST, chains=4)
    guess = model.initial_values(like)
    found = [guess, guess | {"offset": guess["offset"] + 1.0}]
    monkeypatch.setattr(Run, "scout", lambda run, density, total: 0.0)
    monkeypatch.setattr(gibbs, "starts", lambda model, recording, several: found)
    with random_stream(0), numerics(), torch.no_grad():
        run, _ = engine._scouted(model, like, model.conditionals(like))
        apart = run.state["offset"] - guess["offset"]
        torch.testing.assert_close(apart, torch.tensor([0.0, 0.0, 1.0, 1.0]).unsqueeze(-1).expand_as(apart))
        one, other = run.sweep.reference(run.state).centre[[0, 2]]
        assert not torch.allclose(one, other)  # each with a reference of its own
        held = run._state()
        again = Run(engine, model.conditionals(like), {})
        again._restore(held)
        assert run.groups == again.groups == 2
        again._step()
        torch.set_rng_state(torch.from_numpy(held["random"]))
        run._step()
    assert again.state.keys() == run.state.keys()
    for name, value in run.state.items():
        assert torch.equal(value, again.state[name]), name


def test_chains_of_two_starts_get_one_sign_of_what_is_common():
    like = coupled_regions(regions=2, units=5, trials=3, bins=15, mean_count=0.5, seed=0).recording
    model = models.MultiRegionLDS(1)
    with random_stream(0), numerics(), torch.no_grad():
        sweep = model.conditionals(like)
        state = sweep.start(model.initial_values(like), 4)
        layout = sweep.layout
        sign = torch.cat([torch.ones(layout.regional), -torch.ones(layout.size - layout.regional)])
        pairs = sign.unsqueeze(-1) * sign
        entries = layout.vector(pairs)
        other = dict(state)
        sweep._turn(other, sign.diag().expand(4, -1, -1))
        other["aim_common"] = state["aim_common"] * pairs
        other["information"] = state["information"] * entries.unsqueeze(-1) * entries
        assert not torch.equal(other["path"], state["path"])
        joined = sweep.join(state, other)
    for name, value in state.items():
        if value.dim():
            first, second = joined[name].unflatten(0, (2, -1))
            torch.testing.assert_close(first, value[: len(first)], rtol=0.0, atol=0.0)
            torch.testing.assert_close(second, first)


def test_the_entropy_of_a_state_is_that_of_the_dynamics_that_are_there():
    seen, model = recording(), models.MultiRegionLDS(2, time_bumps=0)
    with random_stream(0), numerics(), torch.no_grad():
        sweep = model.conditionals(seen)
        state = sweep.sweep(sweep.start(model.initial_values(seen), 6), 0.0)
        found = sweep.entropy(state)
    vector = sweep.layout.vector(state["dynamics"])
    assert len({int((chain != 0.0).sum()) for chain in vector}) > 1  # chains with other edges
    for chain, information, value in zip(vector, state["information"], found, strict=True):
        there = (chain != 0.0).nonzero().squeeze(-1)
        precision = (information + sweep.law.weight.flatten().diag())[there[:, None], there]
        law = torch.distributions.MultivariateNormal(torch.zeros(len(there)).double(), precision_matrix=precision)
        torch.testing.assert_close(value, law.entropy())


def test_courses_and_their_weights_are_drawn_from_their_conditionals():
    """Drawn anew given time-locked inputs that come from the prior, their joint law stays the prior."""
    seen, model = recording(), models.MultiRegionLDS(1, time_bumps=3, shared_courses=2)
    chains = 40_000
    with random_stream(3), numerics(), torch.no_grad():
        sweep = model.conditionals(seen)
        variance, common = 0.05 + torch.rand(chains, 2), 0.05 + torch.rand(chains, 1)
        state = {
            "course": torch.randn(chains, 2, 3),
            "course_variance": common,
            "course_weight": common.sqrt().unsqueeze(-1) * torch.randn(chains, 2, 2),
            "bump_variance": variance,
        }
        own = variance.sqrt().unsqueeze(-1) * torch.randn(chains, 2, 3)
        state["time_locked"] = own + state["course_weight"] @ state["course"]
        draw_courses(sweep, state)
        heights = apart_from_courses(state) / variance.sqrt().unsqueeze(-1)
    parts = {
        "course": state["course"],
        "weight": state["course_weight"] / common.sqrt().unsqueeze(-1),
        "height": heights,
    }
    for name, part in parts.items():
        flat = part.flatten(1)
        apart = (flat.mT @ flat / chains - torch.eye(flat.shape[1])).abs().max()
        assert float(apart) < 5.0 * math.sqrt(2.0 / chains), name
    across = parts["course"].flatten(1).mT @ parts["height"].flatten(1) / chains
    assert float(across.abs().max()) < 5.0 / math.sqrt(chains)


def test_variances_are_drawn_from_their_conditionals():
    """Drawn anew given what comes from the prior, each keeps its prior."""
    seen, model, chains = recording(), models.MultiRegionLDS(1, time_bumps=3, shared_courses=2, trial_level=False), 4000
    laws = {"signal_variance": SIGNAL, "initial_variance": INITIAL, "bump_variance": BUMPS, "course_variance": COURSES}
    sizes = {"signal_variance": 2, "initial_variance": 3, "bump_variance": 2, "course_variance": 1}
    with random_stream(3), numerics(), torch.no_grad():
        sweep = model.conditionals(seen)
        state = {
            name: rate / torch._standard_gamma(torch.full((chains, sizes[name]), shape))
            for name, (shape, rate) in laws.items()
        }
        sd = {name: value.sqrt().unsqueeze(-1) for name, value in state.items()}
        state["course"] = torch.randn(chains, 2, 3)
        state["course_weight"] = sd["course_variance"] * torch.randn(chains, 2, 2)
        own = sd["bump_variance"] * torch.randn(chains, 2, 3)
        state["time_locked"] = own + state["course_weight"] @ state["course"]
        state["path"] = (sd["initial_variance"] * torch.randn(chains, 3, seen.num_trials)).mT.unsqueeze(2)
        state["loading"] = torch.zeros(chains, seen.num_units, sweep.layout.size)
        for r, (_, _, units) in enumerate(sweep.regions):
            state["loading"][:, units, r] = (
                sd["signal_variance"][:, r] * sweep.scale[units] * torch.randn(chains, len(units))
            )
        draw_variances(sweep, state)
    for name, (shape, rate) in laws.items():
        for drawn in state[name].T:
            assert scipy.stats.kstest(drawn.numpy(), scipy.stats.invgamma(shape, scale=rate).cdf).pvalue > 1e-3, name


def test_a_climb_in_coordinates_of_unit_curvature_gets_further():
    data = coupled_regions(regions=2, units=8, trials=5, bins=100, mean_count=0.5, seed=3).recording
    model = models.MultiRegionLDS(2, time_bumps=0)
    values = model.initial_values(data)
    with random_stream(0), numerics():
        program, _ = levelled(model, globals_given(model, values, data), data, None, 2)
        density = LogDensity(program, data)
        start = density.unconstrain(values)
        rescaled = Rescaled(density, start).ascend(start, 25, "", 1e-13)
    plain, _ = ascend(density, start, 25, "", 1e-13)
    assert float(density(rescaled)) > float(density(plain)) + 10.0


def test_gibbs_draws_stand_for_the_program():
    """Sites handed out rebuild the state they came from, in the model's gauge."""
    system = coupled_regions(regions=2, units=5, trials=3, bins=40, mean_count=0.5, seed=1)
    model = models.MultiRegionLDS(2, time_bumps=3)
    with random_stream(0), numerics(), torch.no_grad():
        sweep = model.conditionals(system.recording)
        state = sweep.start(model.initial_values(system.recording), 3)
        for i in range(4):
            state = sweep.sweep(state, i / 8)
        sites = sweep.sites(state)
        path = sweep.local(state)["latent"]
        parameters = globals_given(model, {name: value.unsqueeze(1) for name, value in sites.items()}, system.recording)
    predictor = path @ parameters.loading.mT + parameters.offset.unsqueeze(-2)
    expected = state["path"] @ state["loading"].unsqueeze(1).mT + state["offset"][:, None, None]
    torch.testing.assert_close(predictor, expected)
    moved = parameters.loading @ parameters.dynamics @ parameters.loading.mT
    torch.testing.assert_close(moved.squeeze(1), state["loading"] @ state["dynamics"] @ state["loading"].mT)
    drift = model.drift(parameters, system.recording) @ parameters.loading.mT
    whole = model.drift(sweep.parameters(state), system.recording) @ state["loading"].unsqueeze(1).mT
    torch.testing.assert_close(drift, whole)


def test_a_persistence_like_that_of_the_global_latent_is_not_taken_for_it():
    """The global latent's own prior, however the regions' is set."""
    seen = recording()
    for persistence in (0.7, 0.95):
        sweep = models.MultiRegionLDS(1, persistence=persistence).conditionals(seen)
        still = torch.zeros(4000, 3, 20, dtype=torch.float64)  # says nothing of the persistence
        with random_stream(1), numerics():
            drawn = _persistence(sweep, still)
        assert abs(float(drawn.mean()) - 0.95) < 0.005 and abs(float(drawn.std()) - 0.05) < 0.005


def test_every_chain_keeps_a_path_however_many_there_are():
    seen = recording()
    draws = inference.Gibbs(draws=2, warmup=0, chains=120).run(models.MultiRegionLDS(1), seen, seed=0)
    assert draws.local["latent"].shape[:2] == (120, 1)


# ------------------------------------------------------------------------------------------ graphs


@pytest.mark.parametrize("engine", [inference.Gibbs(draws=10, warmup=10, chains=2), inference.Laplace(draws=40)])
@pytest.mark.parametrize("edges", [(), (("A", "B"),)])
def test_regions_without_edges_are_uncoupled_and_can_be_asked_about(edges, engine):
    """A graph in parts, and one without any edge: nothing is found between the parts, and no question fails."""
    seen = recording(region=("A", "A", "B", "B", "C", "C"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        posterior = dyn.fit(models.MultiRegionLDS(1, edges=edges, time_bumps=0), seen, engine, seed=0)
    graph = dyn.coupling_graph(posterior)
    possible = np.zeros((3, 3), dtype=bool)
    if edges:
        possible[1, 0] = True
    none = ~possible & ~np.eye(3, dtype=bool)
    assert not graph["strength"].values[..., none].any() and not graph["granger"].values[..., none].any()
    assert not graph["probability"].values[none].any()
    assert 0.0 <= float(graph["probability"][1, 0]) <= 1.0
    assert set(dyn.to_networkx(graph).edges) <= {("A", "B")} and dyn.to_networkx(graph).number_of_nodes() == 3
    metrics = dyn.graph_metrics(graph)
    np.testing.assert_allclose(metrics["driver_rank"].sum("region"), 1.0)
    if not edges:
        np.testing.assert_allclose(metrics["receiver_rank"], 1.0 / 3.0)
        assert bool(metrics["reciprocity"].isnull().all())
    assert len(dyn.edges_into(graph, "C")) == 2 and dyn.compare_edges(graph, ("A", "C"), ("C", "A")) == 0.0
    for figure in (plots.plot_coupling_graph, plots.plot_strengths, plots.plot_impulse_responses):
        assert figure(graph).axes
    assert plots.plot_block_dynamics(posterior).axes


def test_a_graph_is_found_again_with_its_direction():
    system = coupled_regions(regions=3, units=15, trials=8, bins=150, mean_count=0.6, coupling=0.35, seed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        posterior = dyn.fit(
            models.MultiRegionLDS(2, time_bumps=4),
            system.recording,
            inference.Gibbs(draws=40, warmup=40, chains=2),
            seed=0,
        )
    graph = dyn.coupling_graph(posterior)
    assert graph["probability"].attrs["estimator"].startswith("share of the draws")
    there = system.truth["adjacency"].values
    off = ~np.eye(3, dtype=bool)
    probability = graph["probability"].values
    assert probability[there].min() > probability[off & ~there].max(initial=0.0)
    odds = graph["log_odds"].values
    assert np.isnan(np.diag(odds)).all() and np.isfinite(odds[off]).all()
    assert odds[there].min() > max(0.0, odds[off & ~there].max(initial=0.0))
    told = posterior["sample_stats"]["edge_log_odds"]
    assert told.dims == ("chain", "draw", "target", "source") and told["target"].values.tolist() == ["R1", "R2", "R3"]
    edges = dyn.to_networkx(graph).edges(data="log_odds")
    assert {(s, t): o for s, t, o in edges} == {
        (s, t): pytest.approx(float(graph["log_odds"].sel(source=s, target=t))) for s, t, _ in edges
    }
    np.testing.assert_allclose(graph["variance_share"].sum("origin"), 1.0, atol=1e-6)
    strength = posterior["invariants"]["coupling_strength"].values
    np.testing.assert_allclose(graph["strength"].values[..., off], strength[..., off], rtol=1e-6, atol=1e-9)
    assert set(posterior["posterior"]["latent_region"].values.tolist()) == {"R1", "R2", "R3", "global"}


def test_a_unit_of_rare_bursts_does_not_take_a_latent_at_the_start():
    """Its pseudo-observations lay hundreds of nats away: loadings of fifty, and predictions of 1e11 events."""
    like = coupled_regions(regions=2, units=6, trials=20, bins=25, mean_count=0.5, seed=0).recording
    rng, counts = np.random.default_rng(0), like.values.numpy().copy()
    for unit, share in ((2, 0.012), (8, 0.008)):
        counts[..., unit] = np.where(rng.random(counts.shape[:2]) < share, rng.poisson(4.0, counts.shape[:2]), 0)
    recording = dyn.Recording.from_arrays(counts, bin_width=0.02, region=like.region, counts=True)
    model = models.MultiRegionLDS(2, time_bumps=3)
    with numerics():
        (values,) = starts(model, recording, several=False)
        assert float(globals_given(model, values, recording).loading.abs().max()) < 1.0


def test_what_was_first_asked_without_gradients_serves_them_later():
    recording = coupled_regions(regions=2, units=4, trials=2, bins=20, mean_count=2.0, seed=0).recording
    model = models.MultiRegionLDS(1)
    with torch.inference_mode():
        model.regions(recording)
    with numerics():
        density = LogDensity(collapse(model), recording)
        _, slope = density.gradient(density.unconstrain(model.initial_values(recording)))
    assert bool(torch.isfinite(slope).all())
