"""Pictures of who drives whom; see the package.

``graph`` is always what `pyrodyn.coupling_graph` returned; anything else is a `CouplingError`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pyrodyn.coupling import aligned_dynamics, edge_table, to_networkx
from pyrodyn.coupling.summary import stable_draws
from pyrodyn.errors import CouplingError
from pyrodyn.plots.panels import COLOURS, GREY, draw_arrow, new_figure, on_circle, styled

WIDEST = 6.0  # points: the strongest edge
FAINTEST = 0.06  # opacity below which an edge cannot be seen at all
NODE_AREA = (260.0, 900.0)  # points squared: the smallest and the largest region
UNCERTAIN = 0.5  # a probability of presence below which an edge is drawn in grey
PANEL_LIMIT = 12  # regions whose pairs can be told apart on a page


@styled
def plot_coupling_graph(graph: xr.Dataset) -> Figure:
    """The directed graph of regions, both directions of a pair side by side.

    Parameters
    ----------
    graph : xarray.Dataset

    Returns
    -------
    matplotlib.figure.Figure
        Width of an edge: the mean strength. Opacity: the probability that the edge is there, full where it is unknown.
        Colour: whether the gain, the summed direct response of the target's mean readout, is rather positive or
        negative. Area of a node: its number of units.
    """
    net = to_networkx(graph)
    names = list(net.nodes)
    place = dict(zip(names, on_circle(len(names)), strict=True))
    units = np.array([net.nodes[name]["units"] for name in names], dtype=float)
    area = dict(zip(names, NODE_AREA[0] + (NODE_AREA[1] - NODE_AREA[0]) * units / units.max(), strict=True))
    figure = new_figure(5.6, 4.4)
    axes = figure.subplots()
    strongest = max((data["mean"] for _, _, data in net.edges(data=True)), default=1.0)
    for source, target, data in sorted(net.edges(data=True), key=lambda edge: edge[2].get("p_present", 1.0)):
        draw_arrow(
            axes,
            place[source],
            place[target],
            width=WIDEST * data["mean"] / strongest,
            colour=COLOURS[0] if data.get("p_sign", 1.0) >= 0.5 else COLOURS[1],
            alpha=max(FAINTEST, data.get("p_present", 1.0)),
            areas=(area[source], area[target]),
            label=f"{source} → {target}",
        )
    points = np.array(list(place.values()))
    axes.scatter(points[:, 0], points[:, 1], s=list(area.values()), color="white", edgecolors="black", linewidths=1.0)
    for name, (x, y) in place.items():
        axes.annotate(name, (1.24 * x, 1.24 * y), ha="center", va="center", fontsize=9.0)
        axes.annotate(str(net.nodes[name]["units"]), (x, y), ha="center", va="center", fontsize=7.0)
    axes.set(xlim=(-1.45, 1.45), ylim=(-1.4, 1.4), aspect="equal")
    axes.set_axis_off()
    _graph_legend(figure, strongest, any("p_present" in data for _, _, data in net.edges(data=True)))
    return figure


@styled
def plot_block_dynamics(posterior: xr.DataTree) -> Figure:
    """The posterior mean of the dynamics, latents scaled to unit covariance and grouped by region.

    Parameters
    ----------
    posterior : xarray.DataTree
        From `fit` with a model of several regions.

    Returns
    -------
    matplotlib.figure.Figure
        A row for each target latent, a column for each source latent, lines between regions; coordinates are those of
        `pyrodyn.coupling.aligned_dynamics`. The norm of a block is a strength of the mean, at most the mean strength.

    Raises
    ------
    CouplingError
        Where the posterior has no dynamics of several regions.
    """
    mean = aligned_dynamics(posterior).mean(("chain", "draw"), skipna=True)
    names = mean["latent_region"].values.tolist()
    groups = list(dict.fromkeys(names))
    sizes = np.array([names.count(name) for name in groups])
    ends = np.cumsum(sizes)
    figure = new_figure(4.6, 3.9)
    axes = figure.subplots()
    limit = float(abs(mean).max())
    image = axes.pcolormesh(mean.values, cmap="RdBu_r", vmin=-limit, vmax=limit, rasterized=True)
    for end in ends[:-1]:
        axes.axhline(end, color="black", linewidth=0.7)
        axes.axvline(end, color="black", linewidth=0.7)
    axes.set(
        xlim=(0, len(names)), ylim=(len(names), 0), aspect="equal", xlabel="from latents of", ylabel="to latents of"
    )
    axes.set_xticks(ends - 0.5 * sizes, groups, rotation=90 if len(groups) > 6 else 0)
    axes.set_yticks(ends - 0.5 * sizes, groups)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="posterior mean, in sd of target per sd of source", shrink=0.8)
    return figure


@styled
def plot_strengths(graph: xr.Dataset, hdi_prob: float = 0.9) -> Figure:
    """Strength of every edge with its interval, and the probability that the edge is there.

    Parameters
    ----------
    graph : xarray.Dataset
    hdi_prob : float
        Probability of the highest-density interval, in (0, 1).

    Returns
    -------
    matplotlib.figure.Figure
        A row for each edge, strongest first: mean and interval. Edges that are rather absent are grey. On the right,
        the probability of presence, where it is known.
    """
    table = edge_table(graph, hdi_prob)
    regions = table["target"].values.tolist()
    rows = [
        (source, target, table.sel(source=source, target=target))
        for source in regions
        for target in regions
        if source != target
    ]
    rows.sort(key=lambda row: -float(row[2]["mean"]))
    figure = new_figure(4.8, 0.9 + 0.2 * len(rows))
    axes = figure.subplots()
    axes.axvline(0.0, color="black", linewidth=0.8)
    for height, (_, _, edge) in enumerate(rows):
        present = float(edge["p_present"])
        colour = GREY if present < UNCERTAIN else COLOURS[0]
        axes.plot([float(edge["hdi_low"]), float(edge["hdi_high"])], [height, height], color=colour, linewidth=1.6)
        axes.plot(float(edge["mean"]), height, "o", color=colour, markersize=4.0)
        if np.isfinite(present):
            place: Any = axes.get_yaxis_transform()
            axes.text(1.02, height, f"{present:.2f}", transform=place, va="center", fontsize=7.0, color=colour)
    if bool(np.isfinite(graph["probability"]).any()):
        place = axes.get_yaxis_transform()
        axes.text(1.02, -0.9, "P(present)", transform=place, va="center", fontsize=7.0)
    axes.set_yticks(range(len(rows)), [f"{source} → {target}" for source, target, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"coupling strength: mean and {100 * hdi_prob:g}% interval")
    return figure


@styled
def plot_impulse_responses(graph: xr.Dataset) -> Figure:
    """Response of every region's mean readout to a kick of every other's: of the edge alone, and through all paths.

    Parameters
    ----------
    graph : xarray.Dataset

    Returns
    -------
    matplotlib.figure.Figure
        A row for each target, a column for each source: posterior mean and pointwise 90% band after a kick that raises
        the mean linear predictor of the source's units by one standard deviation, in units of the linear predictor and
        with one scale a row.

    Raises
    ------
    ValueError
        With more than twelve regions, whose panels could not be read.
    """
    edge_table(graph)  # refuses what is no coupling graph
    regions = graph["target"].values.tolist()
    if len(regions) > PANEL_LIMIT:
        raise ValueError(
            f"graph: has {len(regions)} regions; expected at most {PANEL_LIMIT} for a grid that can be read: pass "
            "graph.sel(target=[...], source=[...])"
        )
    figure = new_figure(1.2 + 1.5 * len(regions), 0.9 + 1.1 * len(regions))
    panels = figure.subplots(len(regions), len(regions), sharex=True, sharey="row", squeeze=False)
    milliseconds = 1000.0 * graph["lag"].values
    series = (("impulse_response", "this edge alone", 0), ("impulse_response_total", "all paths", 1))
    stable = stable_draws(graph)
    quantiles = {name: stable[name].quantile((0.05, 0.95), "sample", skipna=False) for name, _, _ in series}
    means = {name: stable[name].mean("sample", skipna=False) for name, _, _ in series}
    for r, target in enumerate(regions):
        for s, source in enumerate(regions):
            panel, at = panels[r, s], {"target": target, "source": source}
            if r == s:
                panel.set_axis_off()
                panel.annotate(target, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", fontsize=10.0)
                continue
            panel.axhline(0.0, color=GREY, linewidth=0.6)
            for name, label, colour in series:
                low, high = quantiles[name].sel(at).values
                panel.fill_between(milliseconds, low, high, color=COLOURS[colour], alpha=0.25, linewidth=0)
                panel.plot(milliseconds, means[name].sel(at).values, color=COLOURS[colour], label=label)
            panel.set_title(f"{source} → {target}", fontsize=7.5, pad=2.0)
    # Where the first panel of a row, or the last of a column, is a name, the next one has the numbers.
    panels[0, 1].tick_params(labelleft=True)
    panels[-2, -1].tick_params(labelbottom=True)
    figure.supxlabel("lag (ms)", fontsize=8.0)
    figure.supylabel("response of the mean linear predictor", fontsize=8.0)
    figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


@styled
def plot_intervention(effect: xr.Dataset) -> Figure:
    """What an intervention changes in every region: expected activity with and without, and the difference.

    Parameters
    ----------
    effect : xarray.Dataset
        From `pyrodyn.intervene`.

    Returns
    -------
    matplotlib.figure.Figure
        A row for each region, means over its units and over trials: posterior median and pointwise 90% band. A region
        is left blank where it is held silent.

    Raises
    ------
    CouplingError
        For anything but what `intervene` returned.
    """
    if not isinstance(effect, xr.Dataset) or "region_expected" not in effect:
        raise CouplingError(
            f"effect: got {type(effect).__name__} without 'region_expected'; pass what intervene returned"
        )
    names = effect["target"].values.tolist()
    figure = new_figure(6.4, 0.9 + 1.1 * len(names))
    panels = figure.subplots(len(names), 2, sharex=True, squeeze=False)
    changed, factual = effect["region_expected"], effect["region_factual"]
    series = (
        ((factual, "as it was", GREY), (changed, "under the intervention", COLOURS[0])),
        ((changed - factual, "difference", COLOURS[1]),),
    )
    for row, name in zip(panels, names, strict=True):
        for panel, curves in zip(row, series, strict=True):
            for values, label, colour in curves:
                drawn = values.sel(target=name)
                low, middle, high = drawn.quantile((0.05, 0.5, 0.95), "path_draw", skipna=False).values
                panel.fill_between(effect["time"], low, high, color=colour, alpha=0.25, linewidth=0)
                panel.plot(effect["time"], middle, color=colour, label=label)
        row[0].set_title(name, fontsize=8.0, pad=2.0)
        row[1].axhline(0.0, color="black", linewidth=0.6)
    handles = [panel.get_legend_handles_labels() for panel in panels[0]]
    figure.legend(*(left + right for left, right in zip(*handles, strict=True)), loc="outside upper right", ncols=3)
    figure.supxlabel("time (s)", fontsize=8.0)
    figure.supylabel(f"mean of the region's units ({effect['expected'].attrs['units']})", fontsize=8.0)
    return figure


def _graph_legend(figure: Figure, strongest: float, probable: bool) -> None:
    widths = [Line2D([], [], color="black", linewidth=WIDEST * share) for share in (1.0, 0.5, 0.25)]
    named: list[tuple[Line2D, str]] = [
        (line, f"strength {strongest * share:.2g}") for line, share in zip(widths, (1.0, 0.5, 0.25), strict=True)
    ]
    named += [
        (Line2D([], [], color=COLOURS[0], linewidth=2.5), "gain > 0"),
        (Line2D([], [], color=COLOURS[1], linewidth=2.5), "gain < 0"),
    ]
    if probable:
        named += [
            (Line2D([], [], color="black", linewidth=2.5, alpha=alpha), f"P(present) = {alpha:g}")
            for alpha in (1.0, 0.5, 0.1)
        ]
    lines, labels = zip(*named, strict=True)
    figure.legend(lines, labels, loc="outside right center", handlelength=2.2, labelspacing=0.7)
