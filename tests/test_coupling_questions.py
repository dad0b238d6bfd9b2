"""The graph in networkx and in files, and questions to it, against counting and networkx's own functions."""

from __future__ import annotations

import io
import json
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import xarray as xr
from _coupling import DIMS, changed, random_posterior, with_presence

import pyrodyn as dyn
from pyrodyn import plots
from pyrodyn.coupling.summary import edge_table
from pyrodyn.errors import CouplingError

REGIONS = list(DIMS)
ABSENT = ("V1", "PM")


@pytest.fixture(scope="module")
def graph() -> xr.Dataset:
    """Of three regions, one edge in half of the draws, one in a tenth, one never."""
    posterior = random_posterior(draws=30, absent=(ABSENT,), spread=0.4)
    return dyn.coupling_graph(with_presence(posterior, {("V1", "LM"): 0.5, ("PM", "LM"): 0.1, ABSENT: 0.0}))


def draws_of(graph: xr.Dataset, name: str, source: str, target: str) -> np.ndarray:
    values = graph[name].sel(source=source, target=target)
    return values.values.reshape(-1, *values.shape[2:])


# ---------------------------------------------------------------------------------------------- networkx


@pytest.mark.parametrize("prob", [0.5, 0.9])
def test_edges_in_numbers(graph: xr.Dataset, prob: float) -> None:
    built = dyn.to_networkx(graph, hdi_prob=prob)
    assert set(built.edges) == {(a, b) for a in REGIONS for b in REGIONS if a != b} - {ABSENT}
    for source, target, found in built.edges(data=True):
        strength, response = (draws_of(graph, name, source, target) for name in ("strength", "impulse_response"))
        assert found["mean"] == pytest.approx(strength.mean()) and found["sd"] == pytest.approx(strength.std(ddof=1))
        # The shortest of all intervals between draws that hold the probability.
        ordered = np.sort(strength)
        inside = int(np.floor(prob * len(ordered)))
        starts = np.arange(len(ordered) - inside)
        best = int(np.argmin(ordered[starts + inside] - ordered[starts]))
        assert (found["hdi_low"], found["hdi_high"]) == pytest.approx((ordered[best], ordered[best + inside]))
        there = strength > 0.0
        assert found["p_present"] == pytest.approx(there.mean())
        gain = response.sum(-1)
        assert found["gain"] == pytest.approx(gain.mean())
        assert found["p_sign"] == pytest.approx((gain[there] > 0.0).mean())
        peaks = (np.abs(response[there]).argmax(-1) + 1) * graph.attrs["bin_width"]
        assert found["delay"] == pytest.approx(np.median(peaks))
        share = graph["variance_share"].sel(target=target, origin=source).mean()
        assert found["share"] == pytest.approx(float(share))
        assert all(type(value) is float for value in found.values())
    assert {name: data["units"] for name, data in built.nodes(data=True)} == {"V1": 5, "LM": 4, "PM": 3}
    assert {name: data["latents"] for name, data in built.nodes(data=True)} == DIMS
    assert all(type(data[key]) is int for _, data in built.nodes(data=True) for key in ("units", "latents"))


def test_signs_vary_over_draws(graph: xr.Dataset) -> None:
    """Otherwise the test above could not tell p_sign from a constant."""
    table = edge_table(graph)
    assert bool(((table["p_sign"] > 0.0) & (table["p_sign"] < 1.0)).any())
    never = table.sel(source="V1", target="PM")
    assert float(never["mean"]) == 0.0 and np.isnan(float(never["p_sign"])) and np.isnan(float(never["delay"]))


def test_graphml_comes_back(graph: xr.Dataset, tmp_path: Path) -> None:
    path = dyn.write_graphml(graph, tmp_path / "graph.graphml")
    back, built = nx.read_graphml(path), dyn.to_networkx(graph)
    assert dict(back.nodes(data=True)) == dict(built.nodes(data=True))
    assert {edge[:2]: edge[2] for edge in back.edges(data=True)} == {e[:2]: e[2] for e in built.edges(data=True)}
    assert back.graph["p_present_estimator"] == graph["probability"].attrs["estimator"]
    assert list(tmp_path.iterdir()) == [path]


def test_node_link_json_comes_back(graph: xr.Dataset) -> None:
    text = dyn.node_link_json(graph, hdi_prob=0.8)
    back = nx.node_link_graph(json.loads(text), edges="links")
    built = dyn.to_networkx(graph, hdi_prob=0.8)
    assert nx.utils.graphs_equal(back, built) and back.graph == built.graph
    assert "NaN" not in text


def test_without_presence_its_probability_is_left_out() -> None:
    built = dyn.to_networkx(dyn.coupling_graph(random_posterior()))
    assert built.number_of_edges() == 6
    assert all("p_present" not in data and data["p_sign"] >= 0.0 for _, _, data in built.edges(data=True))


# ---------------------------------------------------------------------------------------------- questions


def test_which_edge_is_stronger(graph: xr.Dataset) -> None:
    one, other = draws_of(graph, "strength", "V1", "LM"), draws_of(graph, "strength", "PM", "LM")
    found = dyn.compare_edges(graph, ("V1", "LM"), ("PM", "LM"))
    assert type(found) is float and found == sum(a > b for a, b in zip(one, other, strict=True)) / len(one)
    reverse = dyn.compare_edges(graph, ("PM", "LM"), ("V1", "LM"))
    assert found + reverse == pytest.approx(1.0 - ((one == 0.0) & (other == 0.0)).mean())
    assert 0.0 < found + reverse < 1.0


def test_edges_into_a_region(graph: xr.Dataset) -> None:
    table = dyn.edges_into(graph, "LM", hdi_prob=0.8)
    built = dyn.to_networkx(graph, hdi_prob=0.8)
    assert set(table.index) == {"V1", "PM"} and table.index.name == "source"
    assert (table["mean"].diff().dropna() <= 0.0).all()
    for source, row in table.iterrows():
        assert row.to_dict() == pytest.approx(built.edges[source, "LM"])


def test_metrics_of_every_draw(graph: xr.Dataset) -> None:
    metrics = dyn.graph_metrics(graph)
    for chain, draw in ((0, 0), (1, 7), (1, 29)):
        here = {"chain": chain, "draw": draw}
        weights = graph["strength"].isel(here).values * (1.0 - np.eye(3))
        net = nx.from_numpy_array(weights.T, create_using=nx.DiGraph)  # networkx: row to column
        for name, expected in (
            ("out_strength", dict(net.out_degree(weight="weight"))),
            ("in_strength", dict(net.in_degree(weight="weight"))),
            ("receiver_rank", nx.pagerank(net, tol=1e-12, max_iter=1000)),
            ("driver_rank", nx.pagerank(net.reverse(), tol=1e-12, max_iter=1000)),
        ):
            np.testing.assert_allclose(metrics[name].isel(here), list(expected.values()), rtol=1e-9, atol=1e-10)
        answered = sum(min(weights[i, j], weights[j, i]) for i in range(3) for j in range(3) if i != j)
        assert float(metrics["reciprocity"].isel(here)) == pytest.approx(answered / weights.sum())
    assert metrics["region"].values.tolist() == REGIONS


def test_loops_are_networkxs_simple_cycles(graph: xr.Dataset) -> None:
    found = dyn.graph_metrics(graph)["loop_probability"]
    presence = graph["presence"].stack(sample=("chain", "draw"), create_index=False).transpose("sample", ...).values
    seen: dict[tuple[str, ...], int] = {}
    for one in presence:
        net = nx.from_numpy_array((one * (1 - np.eye(3))).T, create_using=nx.DiGraph)
        for cycle in nx.simple_cycles(net, length_bound=3):
            start = cycle.index(min(cycle))
            names = tuple(REGIONS[i] for i in (*cycle[start:], *cycle[:start]))
            seen[names] = seen.get(names, 0) + 1
    assert seen
    for label in found["loop"].values.tolist():
        names = tuple(label.split("→")[:-1])
        assert float(found.sel(loop=label)) == pytest.approx(seen.pop(names, 0) / len(presence))
    assert not seen
    assert found.sizes["loop"] == 3 + 2


def test_metrics_without_any_edge() -> None:
    pairs = tuple((a, b) for a in REGIONS for b in REGIONS if a != b)
    metrics = dyn.graph_metrics(dyn.coupling_graph(random_posterior(absent=pairs)))
    assert bool(metrics["reciprocity"].isnull().all()) and "loop_probability" not in metrics
    np.testing.assert_allclose(metrics["receiver_rank"], 1.0 / 3.0)
    assert dyn.to_networkx(dyn.coupling_graph(random_posterior(absent=pairs))).number_of_edges() == 0


def test_two_regions_and_a_stored_graph(tmp_path: Path) -> None:
    graph = dyn.coupling_graph(random_posterior(dims={"A": 2, "B": 2}, shared=0))
    graph.to_netcdf(tmp_path / "graph.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "graph.nc", engine="h5netcdf") as stored:
        assert dyn.node_link_json(stored) == dyn.node_link_json(graph)
    assert dyn.edges_into(graph, "B").index.tolist() == ["A"]


def test_a_region_whose_units_say_nothing() -> None:
    """Its edges have a strength, but a kick of its rates does not exist: gain, sign and delay are left out."""
    posterior = random_posterior()
    loading = posterior["posterior"]["loading"].values.copy()
    loading[..., :5, :] = 0.0
    graph = dyn.coupling_graph(changed(posterior, loading=loading))
    net = dyn.to_networkx(graph)
    assert not {"gain", "p_sign", "delay"} & set(net.edges["V1", "LM"])
    assert net.edges["LM", "V1"]["gain"] == 0.0 and "p_sign" not in net.edges["LM", "V1"]
    assert net.edges["V1", "LM"]["mean"] == dyn.to_networkx(dyn.coupling_graph(posterior)).edges["V1", "LM"]["mean"]
    assert "NaN" not in dyn.node_link_json(graph)
    for figure in (plots.plot_coupling_graph(graph), plots.plot_impulse_responses(graph), plots.plot_strengths(graph)):
        figure.savefig(io.BytesIO())


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda g: dyn.to_networkx(g, hdi_prob=1.0), "hdi_prob: got 1.0; expected a number strictly between 0 and 1"),
        (lambda g: dyn.to_networkx(g, hdi_prob=90), "hdi_prob: got 90"),
        (lambda g: dyn.edges_into(g, "LM", hdi_prob=0.0), "hdi_prob: got 0.0"),
        (lambda g: dyn.edges_into(g, "V9"), "region: there is no region 'V9'; the graph has 'V1', 'LM', 'PM'"),
        (lambda g: dyn.compare_edges(g, ("V1", "V9"), ("LM", "V1")), "first: there is no region 'V9'"),
        (lambda g: dyn.compare_edges(g, ("V1", "LM"), ("LM", "LM")), "second: got .*a region and itself"),
        (lambda g: dyn.compare_edges(g, "V1", ("LM", "PM")), "first: got 'V1'; expected a pair"),
        (lambda g: dyn.graph_metrics(g.drop_vars("strength")), "graph: got Dataset without 'strength'"),
        (lambda g: dyn.to_networkx(g["strength"]), "graph: got DataArray without 'strength'.*coupling_graph"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(graph: xr.Dataset, ask, message: str) -> None:
    with pytest.raises(CouplingError, match=message):
        ask(graph)
