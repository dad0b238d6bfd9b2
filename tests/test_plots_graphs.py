"""What the pictures of a graph show are the graph's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from _coupling import DIMS, mapped, random_posterior, with_presence
from _figures import leave_nothing
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch

import pyrodyn as dyn
from pyrodyn import plots
from pyrodyn.errors import CouplingError

REGIONS = list(DIMS)


@pytest.fixture(scope="module")
def posterior() -> xr.DataTree:
    posterior = random_posterior(seed=2, draws=20, spread=0.3)
    return with_presence(posterior, {("V1", "LM"): 0.5, ("PM", "LM"): 0.2, ("PM", "V1"): 0.0})


@pytest.fixture(scope="module")
def graph(posterior: xr.DataTree) -> xr.Dataset:
    return dyn.coupling_graph(posterior)


def test_edges_of_the_drawn_graph(graph: xr.Dataset) -> None:
    figure = plots.plot_coupling_graph(graph)
    arrows = {a.get_label(): a for a in figure.axes[0].patches if isinstance(a, FancyArrowPatch)}
    net = dyn.to_networkx(graph)
    assert set(arrows) == {f"{source} → {target}" for source, target in net.edges} and len(arrows) == 5
    widest = max(data["mean"] for _, _, data in net.edges(data=True))
    for source, target, data in net.edges(data=True):
        arrow = arrows[f"{source} → {target}"]
        assert arrow.get_linewidth() == pytest.approx(6.0 * data["mean"] / widest)
        assert arrow.get_alpha() == pytest.approx(max(0.06, data["p_present"]))
        colour = "#0072B2" if data["p_sign"] >= 0.5 else "#D55E00"
        assert arrow.get_edgecolor()[:3] == pytest.approx(to_rgb(colour))
    middles = [a.get_path().vertices.mean(0) for a in (arrows["V1 → LM"], arrows["LM → V1"])]
    assert np.hypot(*(middles[0] - middles[1])) > 0.05  # both directions are seen
    areas = figure.axes[0].collections[0].get_sizes()
    assert np.all(np.diff(areas) < 0.0)  # units: 5, 4, 3


def test_unknown_presence_is_drawn_in_full() -> None:
    figure = plots.plot_coupling_graph(dyn.coupling_graph(random_posterior(dims={"A": 2, "B": 1})))
    assert [arrow.get_alpha() for arrow in figure.axes[0].patches] == [1.0, 1.0]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert not any("P(present)" in label for label in labels)


def test_block_dynamics_in_any_coordinates(posterior: xr.DataTree, graph: xr.Dataset) -> None:
    shown, other = (
        np.asarray(plots.plot_block_dynamics(tree).axes[0].collections[0].get_array())
        for tree in (posterior, mapped(posterior))
    )
    assert shown.shape == (7, 7)
    np.testing.assert_allclose(other, shown, rtol=1e-8, atol=1e-8)
    assert not shown[6, :6].any()  # regions do not drive the global
    # By Jensen's inequality the norm of the mean is at most the mean of the norms; it is zero for an absent edge.
    for r, rows in enumerate((slice(0, 3), slice(3, 5), slice(5, 6))):
        for s, columns in enumerate((slice(0, 3), slice(3, 5), slice(5, 6))):
            norm, mean = np.linalg.norm(shown[rows, columns]), float(graph["strength"].mean(("chain", "draw"))[r, s])
            assert norm <= mean + 1e-12 and (norm == 0.0) == (mean == 0.0)
    axes = plots.plot_block_dynamics(posterior).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*REGIONS, "global"]
    assert sorted({float(line.get_ydata()[0]) for line in axes.lines[::2]}) == [3.0, 5.0, 6.0]


@pytest.mark.parametrize("prob", [0.5, 0.9])
def test_forest_of_strengths(graph: xr.Dataset, prob: float) -> None:
    axes = plots.plot_strengths(graph, hdi_prob=prob).axes[0]
    zero, *lines = axes.lines
    assert list(zero.get_xdata()) == [0.0, 0.0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    intervals, means = lines[::2], [float(line.get_xdata()[0]) for line in lines[1::2]]
    assert means == sorted(means, reverse=True) and len(names) == 6
    net = dyn.to_networkx(graph, hdi_prob=prob)
    words = [text.get_text() for text in axes.texts][:6]
    for name, interval, mean, word in zip(names, intervals, means, words, strict=True):
        edge = tuple(name.split(" → "))
        if edge == ("PM", "V1"):
            assert mean == 0.0 and word == "0.00"
            continue
        data = net.edges[edge]
        assert (data["hdi_low"], data["hdi_high"], data["mean"]) == pytest.approx((*interval.get_xdata(), mean))
        assert word == f"{data['p_present']:.2f}"
    assert f"{100 * prob:g}% interval" in axes.get_xlabel()


def test_responses_and_their_bands(graph: xr.Dataset) -> None:
    figure = plots.plot_impulse_responses(graph)
    panels = {panel.get_title(loc="left"): panel for panel in figure.axes if panel.get_title(loc="left")}
    assert set(panels) == {f"{a} → {b}" for a in REGIONS for b in REGIONS if a != b}
    for name, panel in panels.items():
        source, target = name.split(" → ")
        _, *lines = panel.lines
        for line, drawn, variable in zip(
            lines, panel.collections, ("impulse_response", "impulse_response_total"), strict=True
        ):
            draws = graph[variable].sel(source=source, target=target).values.reshape(-1, 20)
            assert np.allclose(line.get_ydata(), draws.mean(0))
            assert np.allclose(line.get_xdata(), 20.0 * np.arange(1, 21))  # bins of 20 ms
            low, high = np.quantile(draws, (0.05, 0.95), axis=0)
            vertices = drawn.get_paths()[0].vertices
            for lag in (1, 7):
                edges = vertices[np.isclose(vertices[:, 0], 20.0 * lag), 1]
                assert np.allclose([edges.min(), edges.max()], [low[lag - 1], high[lag - 1]])


def test_nothing_is_left_in_matplotlib(posterior: xr.DataTree, graph: xr.Dataset) -> None:
    leave_nothing(
        lambda: plots.plot_coupling_graph(graph),
        lambda: plots.plot_block_dynamics(posterior),
        lambda: plots.plot_strengths(graph),
        lambda: plots.plot_impulse_responses(graph),
    )


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda p, g: plots.plot_strengths(g, hdi_prob=2.0), "hdi_prob: got 2.0"),
        (lambda p, g: plots.plot_coupling_graph(p), "graph: got DataTree without 'strength'"),
        (lambda p, g: plots.plot_impulse_responses(p), "graph: got DataTree without"),
        (lambda p, g: plots.plot_block_dynamics(g), "posterior: got Dataset without a group 'posterior'"),
    ],
)
def test_errors_name_the_argument(posterior: xr.DataTree, graph: xr.Dataset, draw, message: str) -> None:
    with pytest.raises(CouplingError, match=message):
        draw(posterior, graph)


def test_a_grid_that_could_not_be_read_is_refused() -> None:
    many = dyn.coupling_graph(random_posterior(draws=2, dims={f"R{i}": 1 for i in range(13)}), lags=2)
    with pytest.raises(ValueError, match="graph: has 13 regions; expected at most 12"):
        plots.plot_impulse_responses(many)
