"""Switching dynamics of coupled regions: one mode is a coupled linear system, blocks stay blocks, a graph per mode."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
import zoo
from _switching import over_paths, prior_draws, sweeps_leave_the_prior_alone

import pyrodyn as dyn
from pyrodyn import plots
from pyrodyn.errors import CouplingError, ModelError
from pyrodyn.inference import collapse
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.inference.switching_particles import switching_evidence
from pyrodyn.models import MultiRegionLDS, MultiRegionSwitchingLDS
from pyrodyn.models._switching_orbit import reshape_latents, shift_latents
from pyrodyn.program import global_laws, globals_given
from pyrodyn.readouts import Gaussian, Poisson

ONE_EDGE = "MultiRegionSwitchingLDS-counts-and-channels-one-edge-missing"
MIXED = {"V1": Gaussian(), "V2": Poisson()}


def mixed(trials: int = 2, bins: int = 9, **options):
    """Two channels of V1 about units of V2 that count."""
    return dyn.Recording.from_arrays(
        np.zeros((trials, bins, 4)),
        bin_width=0.05,
        counts=False,
        center=[0.2, -1.0, 5.0, 0.2],
        scale=[1.0, 0.5, 4.0, 1.0],
        region=["V2", "V1", "V1", "V2"],
        **options,
    ).blank()


# ----------------------------------------------------------------------------------------- the posterior as a whole

JOINT = {
    "edges-one-way": MultiRegionSwitchingLDS(2, {"V1": 2, "V2": 1}, edges=[("V1", "V2")], readout=MIXED),
    "recurrent": MultiRegionSwitchingLDS(2, {"V2": 2, "V1": 1}, recurrent=True, readout=MIXED),
}


@pytest.mark.parametrize("name", JOINT)
def test_sweeps_with_data_drawn_anew_leave_the_prior_alone(name):
    mask = np.random.default_rng(1).random((2, 9, 4)) > 0.2
    rng = np.random.default_rng(2)
    like = mixed(mask=mask, lengths=[9, 6], inputs=2.0 * rng.normal(size=(2, 9, 1)))
    sweeps_leave_the_prior_alone(JOINT[name], like)


@pytest.mark.parametrize("name", JOINT)
def test_maps_of_the_latents_leave_the_joint_prior_alone(name):
    """They see no data, so that they can be made often: a wrong power of a determinant shows."""
    model, groups = JOINT[name], 1500
    inputs = 2.0 * np.random.default_rng(2).normal(size=(2, 9, 1))
    like = mixed(inputs=inputs)
    with torch.no_grad(), numerics():
        values = prior_draws(model, like, groups, 1)
        parameters = globals_given(model, values, like)
        with random_stream(2):
            path = model.latent_path(parameters, like).expand((groups, 2)).sample()
        sweep = model.conditionals(like.with_observations(torch.zeros(2, 9, 4)))
        sites = {n: v.squeeze(1) for n, v in values.items()}
        with random_stream(3):
            state = sweep.moves.start(parameters.steps, sites, groups)
            state |= {"path": path, "loading": parameters.loading.squeeze(1), "offset": parameters.offset.squeeze(1)}
            # Rows of the table are known up to a factor in the sites: the sum of gamma variables of a chain.
            total = sweep.prior.counts.sum(-1)
            state["table"] = state["table"] + (torch._standard_gamma(total.expand(groups, -1)) / total).log()[..., None]
            state["stretch_step"] = torch.full((groups,), 0.25, dtype=torch.float64)
            before = dict(state)
            for _ in range(12):
                reshape_latents(sweep, state, adapt=False)
                shift_latents(sweep, state)

    def statistics(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        found = {}
        for view in sweep.views:
            place, loading = view.place, state["loading"][:, view.units]
            found |= {
                f"loading {place}": loading[..., place].square().sum((-2, -1)),
                f"noise {place}": torch.linalg.slogdet(state["process_noise"][:, 0, place, place])[1],
                f"bias {place}": state["bias"][:, 1, place].square().sum(-1),
                f"gain {place}": state["input_gain"][:, 0, place].square().sum((-2, -1)),
                f"into {place}": state["dynamics"][:, 1, place].square().sum((-2, -1)),
                f"start {place}": state["path"][:, 0, 0, place].square().sum(-1),
                f"later {place}": state["path"][:, 1, 8, place].square().sum(-1),
                f"offset {place}": state["offset"][:, view.units[0]],
            }
            if "slopes" in state:
                found[f"slopes {place}"] = state["slopes"][..., place].square().sum((-2, -1))
                found["table"] = state["table"][:, 0, 0]
        return {key: value.numpy() for key, value in found.items()}

    moved, held = statistics(state), statistics(before)
    assert float((state["loading"] != before["loading"]).any(-1).any(-1).double().mean()) > 0.9
    p = {key: scipy.stats.ks_2samp(moved[key], held[key]).pvalue for key in moved}
    assert min(p.values()) > 1e-3, p


# ------------------------------------------------------------------------------------------------------- one mode


@pytest.mark.parametrize("dims", [{"V1": 1, "V2": 1}, {"V1": 2, "V2": 1}])
def test_one_mode_is_a_coupled_linear_system(dims):
    """With noise of any size where a region has one latent, and of one size where it has several.

    `MultiRegionLDS` has innovations of unit covariance: its latents are those of the switching model divided by the
    root of the process noise.
    """
    switching = MultiRegionSwitchingLDS(1, dims, readout=Gaussian())
    linear = MultiRegionLDS(
        dims, global_dim=0, shared_innovations=0, trial_level=False, time_bumps=0, readout=Gaussian()
    )
    like = zoo.blank(3, 12, 5, counts=False, inputs=2)
    with torch.no_grad(), numerics():
        ours = globals_given(switching, prior_draws(switching, like, 4, 2), like)
        ours = ours._replace(bias=torch.zeros_like(ours.bias))
        root = ours.process_noise.squeeze(-3).diagonal(dim1=-2, dim2=-1).sqrt()
        if max(dims.values()) > 1:
            root = torch.full_like(root, 0.4)
            ours = ours._replace(process_noise=root.square().diag_embed().unsqueeze(-3))
        theirs = globals_given(linear, prior_draws(linear, like, 4, 3), like)._replace(
            dynamics=ours.dynamics.squeeze(-3) / root.unsqueeze(-1) * root.unsqueeze(-2),
            initial_variance=root.square().reciprocal(),
            loading=ours.loading * root.unsqueeze(-2),
            offset=ours.offset,
            noise=ours.noise,
            input_gain=ours.input_gain.squeeze(-3) / root.unsqueeze(-1),
        )
        with random_stream(1):
            path = switching.latent_path(ours, like).expand((4, 3)).sample()
            seen = like.with_observations(switching.readout_law(ours, path, like).sample()[0])
        found = over_paths(switching, ours, seen, [(0,) * 12])
        expected = collapse(linear).marginal(theirs, seen).log_prob(seen.observations)
        # The likelihood of paths, too, but for the volume that the latents are divided by.
        volume = 12 * root.squeeze(1).log().sum(-1, keepdim=True)
        ahead = linear.latent_path(theirs, like).log_prob(path / root.unsqueeze(-2)) - volume
    np.testing.assert_allclose(found, expected, rtol=1e-11)
    torch.testing.assert_close(switching.latent_path(ours, like).log_prob(path), ahead, rtol=1e-11, atol=1e-9)


# ---------------------------------------------------------------------------------------------- all paths of the modes


def small():
    """A trial of seven bins, two regions, two modes with opposite edges: model, recording, values, parameters."""
    model = MultiRegionSwitchingLDS(2, 1, stickiness=3.0, readout=Gaussian())
    like = zoo.blank(1, 7, 4, counts=False)
    with torch.no_grad(), numerics():
        values = prior_draws(model, like, 1, 5)
        values["process_scale"] = torch.full_like(values["process_scale"], 0.4)
        values["bias"] = torch.tensor([[-0.2, 0.1], [0.2, 0.1]]).double().expand_as(values["bias"])
        values["free_dynamics"] = torch.tensor([[0.6, 0.5, 0.0, 0.6], [0.6, 0.0, 0.5, 0.6]]).double()[None, None]
        parameters = globals_given(model, values, like)
        with random_stream(7):
            path = model.latent_path(parameters, like).sample()
            recording = like.with_observations(model.readout_law(parameters, path, like).sample()[0])
    return model, recording, values, parameters


def test_modes_and_evidence_are_those_of_all_mode_paths():
    model, recording, values, parameters = small()
    sequences = list(itertools.product(range(2), repeat=7))
    whole = over_paths(model, parameters, recording, sequences)[0, 0]
    # P(mode 0 in bin t) as the share of the paths that have it there.
    held = [over_paths(model, parameters, recording, [s for s in sequences if s[t] == 0]) for t in range(7)]
    expected = torch.from_numpy(np.exp(np.stack(held) - whole)).squeeze()
    assert float(expected.min()) > 0.02 and float((expected - 0.5).abs().max()) > 0.3  # not a trivial case
    many = 3000
    with torch.no_grad(), numerics(), random_stream(13):
        sweep = model.conditionals(recording)
        state = sweep.start({n: v[0, 0] for n, v in values.items()}, many)
        for _ in range(40):
            sweep.draw_path(state)
            sweep.moves.draw_modes(state, state["path"])
        share = (state["modes"][:, 0] == 0).double().mean(0)
        law, zeros = model.latent_path(parameters, recording), torch.zeros(1, 7, 2).double()
        readout = model.readout_law(parameters, zeros, recording)
        found = torch.stack([switching_evidence(law, readout, recording.values)[0] for _ in range(40)]).flatten()
    error = (expected * (1.0 - expected) / many).sqrt()
    assert float(((share - expected) / error).abs().max()) < 4.0
    ratio = (found - whole).exp()  # unbiased for p(y)
    assert abs(float(ratio.mean()) - 1.0) < 3.5 * float(ratio.std()) / 40**0.5
    assert float(found.std()) < 0.2


# ------------------------------------------------------------------------------------------------------- the blocks


def test_the_priors_of_blocks_are_those_declared():
    model = MultiRegionSwitchingLDS(2, {"V1": 2, "V2": 1}, edges=[("V1", "V2")], coupling_scale=0.4, dynamics_scale=0.3)
    like = zoo.blank(counts=True)
    prior = model.step_prior(like)
    expected = np.array([[0.3 / 2**0.5] * 2 + [0.0], [0.3 / 2**0.5] * 2 + [0.0], [0.4 / 2**0.5] * 2 + [0.3]])
    np.testing.assert_allclose(prior.sd, expected)
    law = global_laws(model, like)["free_dynamics"].base_dist
    np.testing.assert_allclose(law.stddev[0], expected[expected > 0.0])
    np.testing.assert_allclose(law.mean[1], [0.85, 0.0, 0.0, 0.85, 0.0, 0.0, 0.85])
    dense = torch.arange(1.0, 19.0).double().reshape(2, 3, 3) * (prior.sd > 0.0)
    torch.testing.assert_close(prior.from_entries(prior.entries(dense)), dense)


@pytest.mark.parametrize("engine", [name for name, one in zoo.ENGINES.items() if zoo.applies(one, zoo.row(ONE_EDGE))])
def test_blocks_that_are_not_there_stay_so_under_every_engine(engine):
    draws = zoo.fitted(ONE_EDGE, engine)["posterior"].to_dataset()
    one, other = ("V1:0", "V2:0")  # the edge runs from V2 to V1
    there, absent = (draws["dynamics"].sel(latent=a, latent_from=b) for a, b in ((one, other), (other, one)))
    assert (there != 0.0).all() and (absent == 0.0).all()
    assert (draws["process_noise"].sel(latent=one, latent_from=other) == 0.0).all()
    own = draws["region"].values[:, None] == draws["latent_region"].values
    loading = draws["loading"].transpose("unit", "latent", ...).values
    assert (loading[own] != 0.0).any() and (loading[~own] == 0.0).all()


# ------------------------------------------------------------------------------------------------------- its graphs


def test_every_mode_has_a_graph_that_exports_and_pictures_take():
    posterior = zoo.fitted("MultiRegionSwitchingLDS-Poisson-recurrent-inputs", "SVI")
    graph = dyn.coupling_graph(posterior)
    assert graph.sizes["mode"] == 2 and list(graph["target"].values) == ["V1", "V2"]
    assert graph["probability"].dims == ("mode", "target", "source")
    assert "Savage-Dickey" in graph["probability"].attrs["estimator"]
    assert not np.allclose(graph["strength"].sel(mode=0), graph["strength"].sel(mode=1))
    sorted_ = np.sort(graph["strength"].transpose("chain", "draw", "mode", ...).values, 2)[:, :, ::-1]
    np.testing.assert_allclose(posterior["invariants"]["coupling_strength"].values, sorted_, rtol=1e-8)
    for mode in range(2):
        alone, picked = dyn.coupling_graph(posterior.isel(mode=mode)), graph.sel(mode=mode)
        np.testing.assert_array_equal(picked["strength"], alone["strength"])
        np.testing.assert_array_equal(picked["probability"], alone["probability"])
        net = dyn.to_networkx(picked)
        assert set(net.edges) == {("V1", "V2"), ("V2", "V1")}
        assert net["V1"]["V2"]["mean"] == pytest.approx(float(picked["strength"].sel(target="V2", source="V1").mean()))
        for plot in (plots.plot_coupling_graph, plots.plot_strengths, plots.plot_impulse_responses):
            assert plot(picked).axes
        assert plots.plot_block_dynamics(posterior.isel(mode=mode)).axes
    with pytest.raises(CouplingError, match=r"holds 2 graphs, one for each mode.*graph.isel\(mode=0\)"):
        dyn.to_networkx(graph)
    with pytest.raises(CouplingError, match=r"those of 2 modes.*posterior.isel\(mode=0\)"):
        plots.plot_block_dynamics(posterior)


def test_gibbs_keeps_all_edges_and_the_graph_does_not_take_that_for_certainty():
    graph = dyn.coupling_graph(zoo.fitted("MultiRegionSwitchingLDS-Poisson-recurrent-inputs", "Gibbs"))
    assert "presence" not in graph
    off = graph["probability"].values[:, ~np.eye(2, dtype=bool)]
    assert ((off > 0.0) & (off < 1.0)).all()


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_modes": 0}, "num_modes must be a whole number of at least 1, got 0"),
        ({"num_modes": 30}, "num_modes is 30 but the recording has 24 steps"),
        ({"latent_dim": {"V1": 1}}, r"units in \['V2'\].*recording.sel\(region"),
        ({"latent_dim": 3}, "'V1' has 2 units and latent_dim asks for 3"),
        ({"edges": [("V1", "V3")]}, r"edges names \['V3'\]"),
        ({"edge_probability": 0.0}, "edge_probability must lie in"),
        ({"max_radius": 1.05}, "max_radius must be at most 1, got 1.05"),
        ({"coupling_scale": 0.0}, "coupling_scale must be positive, got 0.0"),
        ({"readout": "poisson"}, "readout must be one of pyrodyn.readouts"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ModelError, match=said):
        MultiRegionSwitchingLDS(**({"num_modes": 2, "latent_dim": 1} | options)).check(zoo.blank(counts=True))


def test_a_recording_of_one_region_is_sent_elsewhere():
    like = zoo.blank(counts=True).sel(region="V1")
    with pytest.raises(ModelError, match=r"MultiRegionSwitchingLDS needs two regions.*models.SwitchingLDS"):
        MultiRegionSwitchingLDS(2, 1).check(like)
