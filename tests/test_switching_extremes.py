"""Models with modes where recordings are not as one would wish, and chains that number their modes differently."""

from __future__ import annotations

import warnings

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
import xarray as xr
from pyro import poutine

import pyrodyn as dyn
from pyrodyn import inference, models, readouts
from pyrodyn.diagnostics import diagnose
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.linalg.taming import lagged_radius
from pyrodyn.models._switching_model import SwitchingParameters
from pyrodyn.models._switching_steps import permuted
from pyrodyn.program import globals_given

SHORT = inference.Gibbs(draws=20, warmup=20, chains=2)


def fitted(model, recording: dyn.Recording, engine=SHORT) -> xr.DataTree:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)  # so short a run is said to be short
        return dyn.fit(model, recording, engine, seed=0)


def spirals(bins: int = 240, visited: int = 2) -> dyn.Recording:
    """One trial in the plane that turns one way about one point, then the other way about another, by turns."""
    rng = np.random.default_rng(0)
    angle = np.array([0.5, -0.3])
    turns = np.array([[[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]] for a in angle]) * 0.95
    centres = np.array([[1.5, 0.0], [-1.5, 0.0]])
    state, values = centres[0].copy(), np.empty((1, bins, 2))
    for t in range(bins):
        mode = t // 20 % visited
        state = centres[mode] + turns[mode] @ (state - centres[mode]) + 0.3 * rng.normal(size=2)
        values[0, t] = state
    return dyn.Recording.from_arrays(values, bin_width=0.05, counts=False, center=np.zeros(2), scale=np.ones(2))


def r_hat(values: dict[str, torch.Tensor]) -> float:
    """The largest of all entries, of values (chain, draw, *event)."""
    found = {
        name: (("chain", "draw", *(f"{name}_{i}" for i in range(v.dim() - 2))), v.numpy()) for name, v in values.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(diagnose(xr.Dataset(found), xr.Dataset(), None).values["max_r_hat"])


def test_chains_that_start_in_permuted_modes_agree_on_what_no_numbering_changes():
    model, recording, chains, draws = models.ARHMM(2), spirals(), 2, 400
    with torch.no_grad(), numerics(), random_stream(0):
        start = model.initial_values(recording)
        groups = []
        for flip in (False, True):
            values = model.step_prior(recording).numbered(
                {n: v[None, None] for n, v in start.items()}, torch.tensor([[[1, 0] if flip else [0, 1]]])
            )
            sweep = model.conditionals(recording)
            state = sweep.start({name: value[0, 0] for name, value in values.items()}, chains)
            kept = []
            for number in range(draws + 50):
                state = sweep.sweep(state, 1.0)
                if number >= 50:
                    kept.append(sweep.sites(state))
            groups.append({name: torch.stack([one[name] for one in kept], 1) for name in kept[0]})
        drawn = {name: torch.cat([group[name] for group in groups]) for name in groups[0]}  # (chain, draw, *event)
        flat = {name: value.flatten(0, 1).unsqueeze(1) for name, value in drawn.items()}
        lead = (2 * chains, draws)
        invariants = model.invariants(globals_given(model, flat, recording))
        shown = {n: v.reshape(*lead, *v.shape[v.dim() - len(dims) :]) for n, (dims, v) in invariants.items()}
        alike = model.nearest_copy(flat, {n: v[:1] for n, v in flat.items()}, recording)
        aligned = {name: value.squeeze(1).unflatten(0, lead) for name, value in alike.items()}
    assert r_hat({"bias": drawn["bias"]}) > 1.5  # of ranks that do not overlap at all it is 1.8
    assert r_hat(shown) < 1.01
    assert r_hat(aligned) < 1.01


def test_a_mode_that_is_never_visited_keeps_its_prior():
    model, recording, many = models.ARHMM(3), spirals(40, visited=1), 600
    with torch.no_grad(), numerics(), random_stream(1), pyro.plate("draw", 2 * many, dim=-2):
        trace = poutine.trace(model.sample_globals).get_trace(recording)
    values = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name != "draw"}
    with torch.no_grad(), numerics(), random_stream(2):
        sweep = model.conditionals(recording)
        state = sweep.start({name: value[:many].squeeze(1) for name, value in values.items()}, 1)
        state["modes"] = torch.zeros_like(state["modes"])
        path = sweep.path.expand(many, -1, -1, -1)
        scale = state["process_scale"].clone()
        for _ in range(5):
            sweep.moves.draw_steps(state, path)
            state["process_scale"] = scale  # which the mode that is visited informs
        sweep.moves.draw_transitions(state, path)
        fresh = globals_given(model, {name: value[many:] for name, value in values.items()}, recording)
        for k in (1, 2):
            pairs = {
                "radius": (lagged_radius(state["dynamics"][:, k]), lagged_radius(fresh.dynamics[:, 0, k])),
                "bias": (state["bias"][:, k, 0], fresh.bias[:, 0, k, 0]),
                "noise": (state["process_noise"][:, k, 0, 0], fresh.process_noise[:, 0, k, 0, 0]),
                "stay": (state["table"][:, k].softmax(-1)[:, k], fresh.transition[:, 0, k, k]),
            }
            for name, (found, expected) in pairs.items():
                assert scipy.stats.ks_2samp(found.numpy(), expected.numpy()).pvalue > 1e-3, name
        visited = (state["dynamics"][:, 0, 0, 0], fresh.dynamics[:, 0, 0, 0, 0])
        assert scipy.stats.ks_2samp(*(part.numpy() for part in visited)).pvalue < 1e-6  # the data do tell of this one


@pytest.mark.parametrize(
    "model",
    [models.SwitchingLDS(6, 2, readout=readouts.Gaussian()), models.ARHMM(6, recurrent=True)],
    ids=["SwitchingLDS", "ARHMM"],
)
def test_more_modes_than_the_recording_has_do_no_harm(model):
    posterior = fitted(model, spirals(60, visited=1))
    for variable in posterior["posterior"].to_dataset().data_vars.values():
        assert bool(np.isfinite(variable).all())
    share = posterior["latents"]["mode_probability"].values
    assert share.sum(-1) == pytest.approx(1.0)


def test_counts_up_to_ten_thousand_a_bin():
    rng = np.random.default_rng(0)
    level = np.where(np.arange(80) // 20 % 2 == 0, 1.0, -1.0)[:, None] * np.array([1.0, -0.7, 0.4])
    rates = np.exp(np.log([9000.0, 3000.0, 40.0]) + 0.1 * level)
    counts = rng.poisson(rates)[None]
    assert 9_500 < counts.max() < 10_500
    recording = dyn.Recording.from_arrays(counts, bin_width=0.05)
    posterior = fitted(models.SwitchingLDS(2, 1), recording)
    # The stored paths, each with the loading and offset that it was drawn with.
    paths = posterior["latents"]["draws"].values[:, 0]
    chosen = np.linspace(0, 39, len(paths)).round().astype(int)
    loading, offset = (
        posterior["posterior"][name].values.reshape(40, *shape)[chosen]
        for name, shape in (("loading", (3, 1)), ("offset", (3,)))
    )
    expected = np.exp(paths @ loading.swapaxes(-1, -2) + offset[:, None]).mean(0)
    apart = (expected - rates) / np.sqrt(rates)
    assert np.sqrt(np.square(apart).mean()) < 1.0  # nearer than one count tells by itself


def test_many_counts_hold_the_path_of_every_draw_where_its_own_parameters_take_it():
    model, rng, bins, shift = models.SwitchingLDS(2, 2), np.random.default_rng(0), 120, np.array([1.0, 1.0])
    turns = np.array([[[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]] for a in (0.5, -0.3)]) * 0.97
    loading, modes = 0.3 * rng.normal(size=(6, 2)), np.arange(bins) // 25 % 2
    path = np.array([[3.0, 0.0]] + [[0.0, 0.0]] * (bins - 1))
    for t in range(1, bins):
        path[t] = turns[modes[t]] @ path[t - 1] + 0.1 * rng.normal(size=2)
    rates = np.exp(np.log(9000.0) + path @ loading.T)
    recording = dyn.Recording.from_arrays(rng.poisson(rates)[None].astype(float), bin_width=0.05)

    def both(first, second) -> torch.Tensor:
        return torch.from_numpy(np.stack([first, second])).unsqueeze(1)

    # The second draw is the same system in latents half as large that lie elsewhere.
    moved = np.stack([shift - turn @ shift for turn in turns])
    offset = np.full(6, np.log(9000.0))
    stay, noise = np.array([[0.96, 0.04], [0.04, 0.96]]), np.stack([0.01 * np.eye(2)] * 2)
    parameters = SwitchingParameters(
        both([0.5, 0.5], [0.5, 0.5]), both(stay, stay), both(turns, turns), both(np.zeros((2, 2)), moved),
        both(noise, 0.25 * noise), None, None, None, None, both(loading, 2.0 * loading),
        both(offset, offset - 2.0 * loading @ shift), None,
    )  # fmt: skip
    with torch.no_grad(), numerics(), random_stream(0):
        found = model.draw_local(parameters, recording)
    log_rates = found["latent"] @ parameters.loading.mT + parameters.offset.unsqueeze(-2)
    apart = (log_rates.exp().squeeze(1).numpy() - rates) / np.sqrt(rates)
    assert (np.sqrt(np.square(apart).mean((1, 2))) < 1.0).all()  # nearer than one count tells by itself
    assert ((found["mode"].squeeze(1).numpy() == modes).mean(-1) > 0.9).all()


def test_renumbered_steps_make_the_same_path_likely():
    model, recording = models.ARHMM(3, recurrent=True), spirals()
    with torch.no_grad(), numerics():
        values = {name: value.unsqueeze(0) for name, value in model.initial_values(recording).items()}
        steps = globals_given(model, values, recording)
        other = permuted(steps, torch.tensor([2, 0, 1]))
        found = [model.evidence(one, recording, recording.values) for one in (steps, other)]
    torch.testing.assert_close(*found)
