"""Several sessions in one fit: the law of what they share, its moves, and what comes back."""

import json
import warnings
from typing import Any

import networkx as nx
import numpy as np
import pytest
import scipy.stats
import torch
from pyro import poutine

import pyrodyn as dyn
from pyrodyn import inference, models, readouts
from pyrodyn.distributions import PoolPrior, network_layout
from pyrodyn.distributions.network import NetworkPrior
from pyrodyn.errors import ModelError, RecordingError
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.models._pooled_sweep import draw_pool
from pyrodyn.models.pooled_regions import PooledRegions
from pyrodyn.program import log_joint
from pyrodyn.systems import coupled_regions

MODEL = models.MultiRegionLDS(2, time_bumps=0)


def sessions(number=2, trials=4, bins=30, **options):
    systems = [coupled_regions(regions=3, units=6, trials=trials, bins=bins, seed=i, **options) for i in range(number)]
    return {f"s{i}": system.recording for i, system in enumerate(systems)}


def small_pool() -> PoolPrior:
    """Two sessions whose dynamics are so weak that all are stable; edge 1 -> 2 is in one session only, and certain."""
    layouts = {
        "a": network_layout((2, 1), 0, False, ((0, 1), (1, 0))),
        "b": network_layout((1, 2, 1), 0, False, ((0, 1), (1, 0), (2, 1))),
    }
    probability = {
        "a": torch.tensor([0.5, 0.3], dtype=torch.float64),
        "b": torch.tensor([0.5, 0.3, 1.0], dtype=torch.float64),
    }

    def law(name: str) -> NetworkPrior:
        size = len(layouts[name].edge)
        zero = torch.zeros(size, dtype=torch.float64)
        return NetworkPrior(layouts[name], zero, zero + 0.02, probability[name])

    edges = {"a": (("B", "A"), ("A", "B")), "b": (("B", "A"), ("A", "B"), ("B", "C"))}
    return PoolPrior({name: law(name) for name in layouts}, edges)


def summaries(pool) -> torch.Tensor:
    """Numbers of a pool that its moves could get wrong, (draw, number)."""
    presence = [(network[..., :] != 0.0).double().mean(-1, keepdim=True) for network in pool.network.values()]
    own = list(pool.own_log_size.values())
    sizes = [network.square().sum(-1, keepdim=True).log() for network in pool.network.values()]
    spread = pool.log_spread.unsqueeze(-1)
    first = [pool.rate, pool.rate.square(), pool.log_size, pool.log_size.square(), spread, spread.square()]
    return torch.cat([*first, *own, *[v.square() for v in own], *presence, *sizes], -1)


def test_moves_of_the_pool_keep_its_prior():
    """Dynamics drawn given the pool, and the pool given the dynamics, in turn: the prior must stay (Geweke 2004)."""
    law, chains, rounds = small_pool(), 400, 60
    with random_stream(0), torch.no_grad():
        direct = summaries(law.split(law.sample(torch.Size([20_000]))))
        pool = law.split(law.sample(torch.Size([chains])))
        state = {"rate": pool.rate, "log_size": pool.log_size, "log_spread": pool.log_spread}
        state |= {f"{name}/edge_log_size": value for name, value in pool.own_log_size.items()}
        kept = []
        for _ in range(rounds):
            for name, own in law.networks.items():
                given = law.given(name, state["rate"], state[f"{name}/edge_log_size"])
                there = torch.rand(chains, len(own.layout.edges)).double() < given.probability
                there = torch.cat([there, torch.ones(chains, 1, dtype=torch.bool)], -1)[:, own.layout.edge]
                drawn = given.sd_entry * torch.randn(chains, len(own.layout.edge), dtype=torch.float64)
                state[f"{name}/dynamics"] = own.layout.matrix(torch.where(there, drawn, 0.0))
            draw_pool(law, state)
            vectors = [
                part
                for name, own in law.networks.items()
                for part in (state[f"{name}/edge_log_size"], own.layout.vector(state[f"{name}/dynamics"]))
            ]
            whole = torch.cat([state["rate"], state["log_size"], state["log_spread"].unsqueeze(-1), *vectors], -1)
            kept.append(summaries(law.split(whole)))
    of_chains = torch.stack(kept).mean(0)  # chains are independent, and were started in the prior
    gap = of_chains.mean(0) - direct.mean(0)
    error = (of_chains.var(0) / chains + direct.var(0) / len(direct)).sqrt()
    fixed = error == 0.0  # the rate of the edge that is certain
    assert int(fixed.sum()) == 2 and float(gap[fixed].abs().max()) == 0.0
    score = (gap / error)[~fixed]
    assert float(score.abs().max()) < 4.0


def test_the_density_of_the_pool_is_that_of_its_parts():
    law = small_pool()
    with random_stream(1):
        value = law.sample(torch.Size([5]))
    pool = law.split(value)
    for i in range(5):
        total = 0.0
        spread = float(pool.log_spread[i].exp())
        half = torch.distributions.HalfNormal(torch.tensor(0.3, dtype=torch.float64))
        total += float(half.log_prob(torch.tensor(spread, dtype=torch.float64))) + float(pool.log_spread[i])
        for e, share in enumerate((0.5, 0.3)):
            total += float(scipy.stats.beta.logpdf(pool.rate[i, e], 2 * share, 2 * (1 - share)))
        total += float(torch.distributions.Normal(law.mean_log_size, 0.5).log_prob(pool.log_size[i]).sum())
        for name, own in law.networks.items():
            layout, place = own.layout, law.places[name]
            sizes, vector = pool.own_log_size[name][i], pool.network[name][i]
            total += float(torch.distributions.Normal(pool.log_size[i, place], spread).log_prob(sizes).sum())
            sd = torch.full_like(vector, 0.02)
            for e in range(len(place)):
                block = layout.edge == e
                sd[block] = sizes[e].exp() / int(block.sum()) ** 0.5
                rate = float(pool.rate[i, place[e]])
                total += np.log(rate) if bool((vector[block] != 0).any()) else np.log1p(-rate)
            entries = vector != 0.0
            total += float(torch.distributions.Normal(0.0, sd).log_prob(vector)[entries].sum())
            total += float(own.log_stability(vector))
        assert float(law.log_prob(value)[i]) == pytest.approx(total, rel=1e-9)


def test_the_program_counts_the_dynamics_once():
    recordings = sessions()
    pooled = PooledRegions(MODEL)
    with random_stream(2), numerics(), torch.no_grad():
        trace = poutine.trace(pooled).get_trace(recordings)
        trace.compute_log_prob()
    found = sum(site["log_prob"].sum() for site in trace.nodes.values() if site["type"] == "sample")
    values: dict[str, Any] = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    law = pooled.law(recordings)
    pool, expected = law.split(values["pool"]), law.log_prob(values["pool"])
    for name, recording in recordings.items():
        own = {n.removeprefix(f"{name}/"): v for n, v in values.items() if n.startswith(f"{name}/")}
        own = {n: v for n, v in own.items() if n not in ("observations", "trial")} | {"network": pool.network[name]}
        alone = log_joint(MODEL, own, recording) - MODEL.network_prior(recording).log_prob(pool.network[name])
        expected = expected + alone
    assert float(found) == pytest.approx(float(expected), rel=1e-10)


@pytest.fixture(scope="module")
def fitted():
    recordings = sessions(3)
    recordings["s2"] = recordings["s2"].sel(region=["R1", "R2"])  # one session lacks a region
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        return recordings, dyn.fit(MODEL, recordings, inference.Gibbs(draws=12, warmup=12, chains=2), seed=0)


def test_each_session_has_its_posterior_and_all_share_one(fitted, tmp_path):
    recordings, tree = fitted
    assert tree["posterior"]["edge_rate"].dims == ("chain", "draw", "target", "source")
    assert np.isnan(tree["posterior"]["edge_rate"].values[..., range(3), range(3)]).all()
    assert float(tree["posterior"]["edge_size"].min()) > 0.0
    assert json.loads(tree.attrs["sessions"]) == list(recordings)
    for name, recording in recordings.items():
        child = tree[f"sessions/{name}"]
        assert dyn.recording_of(child).digest() == recording.digest()
        assert "lp" not in child["sample_stats"]
        assert np.isfinite(dyn.predict(child, recording, draws=4)["expected"]).all()
    assert dyn.model_of(tree) == MODEL
    assert dyn.load(dyn.save(tree, tmp_path / "pooled.nc")).identical(tree)


def test_the_graph_of_sessions_stands_side_by_side(fitted):
    recordings, tree = fitted
    graph = dyn.coupling_graph(tree)
    assert list(graph["session"].values) == list(recordings)
    alone = dyn.coupling_graph(tree["sessions/s1"])
    np.testing.assert_array_equal(graph["strength"].sel(session="s1"), alone["strength"])
    assert np.isnan(graph["strength"].sel(session="s2", target="R3")).all()
    assert np.isfinite(graph["strength"].sel(session="s2", target="R1", source="R2")).all()
    assert graph["edge_rate"].dims == ("chain", "draw", "target", "source")
    assert graph["log_odds"].dims == ("session", "target", "source")
    np.testing.assert_array_equal(graph["log_odds"].sel(session="s1"), alone["log_odds"])
    assert int(np.isfinite(graph["log_odds"].sel(session="s2")).sum()) == 2


@pytest.mark.long
def test_an_edge_seen_in_other_sessions_is_believed_sooner():
    """Where a session says little by itself, the others' edges raise or lower the probability of its own."""
    system = coupled_regions(regions=3, units=10, trials=9, bins=50, mean_count=0.4, seed=3)
    poor = system.recording.isel(trial=[0, 1], time=slice(0, 25))
    rich = {"rich": system.recording.isel(trial=slice(2, 9)), "rich again": system.recording.isel(trial=slice(3, 9))}
    truth, engine = system.truth["adjacency"], inference.Gibbs(draws=40, warmup=40, chains=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        together = dyn.coupling_graph(dyn.fit(MODEL, rich | {"poor": poor}, engine, seed=0))
        alone = dyn.coupling_graph(dyn.fit(MODEL, poor, engine, seed=0))["probability"]
    together = together["probability"].sel(session="poor")
    off = ~np.eye(3, dtype=bool)
    there, absent = (truth.values.astype(bool) & off), (~truth.values.astype(bool) & off)
    gap = (together - alone).transpose("target", "source").values
    assert gap[there].mean() - gap[absent].mean() > 0.1


def test_what_a_model_says_of_a_region_holds_where_it_was_recorded():
    """A region in one session only, with latents, edges and a readout of its own; its prior probabilities are kept."""
    recordings = sessions(2, trials=3, bins=15)
    recordings["s1"] = recordings["s1"].sel(region=["R2", "R1"])
    connectome = nx.DiGraph()
    connectome.add_edge("R1", "R2", probability=0.3)
    connectome.add_edge("R3", "R2", probability=0.8)
    laws = {"R3": readouts.NegativeBinomial(), "R2": readouts.Poisson(), "R1": readouts.Poisson()}
    model = models.MultiRegionLDS({"R1": 2, "R2": 1, "R3": 1}, edges=connectome, readout=laws, time_bumps=0)
    pooled = PooledRegions(model)
    pooled.check(recordings)
    assert pooled.of(recordings["s0"]) is model
    part = pooled.of(recordings["s1"])
    assert part.latent_dim == (("R1", 2), ("R2", 1)) and part.edges == (("R1", "R2", 0.3, 1.0),)
    assert [name for name, _ in part.readout.parts] == ["R2", "R1"]
    law = pooled.law(recordings)
    assert law.edges == (("R1", "R2"), ("R3", "R2"))
    torch.testing.assert_close(law.probability, torch.tensor([0.3, 0.8], dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        tree = dyn.fit(model, recordings, inference.Gibbs(draws=3, warmup=3, chains=2), seed=0)
    graph = dyn.coupling_graph(tree)
    assert np.isfinite(graph["strength"].sel(session="s0", source="R3", target="R2")).all()
    assert np.isnan(graph["strength"].sel(session="s1", source="R3")).all()
    assert not graph["strength"].sel(session="s1", source="R2", target="R1").any()  # no edge of the connectome
    assert dyn.model_of(tree) == model and dyn.model_of(tree["sessions/s1"]) == part
    assert np.isfinite(dyn.predict(tree["sessions/s1"], recordings["s1"], draws=2)["expected"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": {"R1": 1, "R2": 1, "R3": 1, "V9": 1}}, r"latent_dim names \['V9'\].*no regions of any session"),
        ({"latent_dim": 1, "edges": [("R1", "V9")]}, r"edges names \['V9'\].*'R1', 'R2', 'R3'"),
        ({"latent_dim": {"R1": 1, "R2": 1}}, r"session 's0': the recording has units in \['R3'\]"),
        ({"latent_dim": {"R3": 1}}, r"session 's0': the recording has units in \['R1', 'R2'\]"),
    ],
)
def test_a_region_that_no_session_recorded_is_named(options, message):
    recordings = sessions(2, trials=3, bins=15)
    recordings["s1"] = recordings["s1"].sel(region=["R1", "R2"])
    with pytest.raises(ModelError, match=message):
        PooledRegions(models.MultiRegionLDS(**options)).check(recordings)


def test_what_cannot_be_pooled_is_refused_by_name(fitted):
    recordings, tree = fitted
    with pytest.raises(ModelError, match=r"need inference.Gibbs\(\), got SVI"):
        dyn.fit(MODEL, recordings)
    with pytest.raises(ModelError, match="taken by models.MultiRegionLDS, got LDS"):
        dyn.fit(models.LDS(2), recordings, inference.Gibbs())
    with pytest.raises(ModelError, match="horseshoe"):
        dyn.fit(models.MultiRegionLDS(2, edge_prior="horseshoe"), recordings, inference.Gibbs())
    with pytest.raises(RecordingError, match="without sessions"):
        dyn.fit(MODEL, {}, inference.Gibbs())
    with pytest.raises(RecordingError, match="without '/'"):
        dyn.fit(MODEL, {"a/b": recordings["s0"]}, inference.Gibbs())
    with pytest.raises(RecordingError, match=r"recording\['s0'\] must be a pyrodyn.Recording"):
        dyn.fit(MODEL, {"s0": np.zeros(3)}, inference.Gibbs())  # pyright: ignore[reportArgumentType]
    one = recordings["s0"].sel(region=["R1"])
    with pytest.raises(ModelError, match="session 'x'"):
        dyn.fit(MODEL, {"x": one, "y": recordings["s1"]}, inference.Gibbs())
    with pytest.raises(ModelError, match="posterior of one session"):
        dyn.predict(tree, recordings["s0"])
