"""Pictures of modes: when they come, how long they last, what follows them, and where each takes the state.

``posterior`` is of any model with modes, such as `models.HMM`, `GainHMM`, `ARHMM` or `SwitchingLDS`, from any engine.
A mode has one colour in all pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from pyrodyn.checks import replicated_latents
from pyrodyn.plots.panels import (
    COLOURS,
    GREY,
    chosen_trials,
    draw_arrow,
    draw_flow,
    grid_about,
    new_figure,
    on_circle,
    plane_of,
    styled,
    variable_of,
)
from pyrodyn.posterior import thinned
from pyrodyn.statistics import dwells, survival

INTERVAL = (0.05, 0.95)
ONE_ROW = 3  # panels, one for each mode, up to which they stand in one row
FLOWS = 50  # draws whose flows are compared
REPLICATES = 50  # simulated recordings
WIDEST = 6.0  # points: an arrow that a mode always leaves by
RAREST = 0.02  # share of the ways out of a mode that is not drawn
NODE_AREA = (160.0, 1100.0)  # points squared: a mode that is never visited, and the commonest
ROW = 0.16  # inches of a trial in a raster


@styled
def mode_raster(
    posterior: xr.DataTree,
    *,
    trials: Sequence[int | str] | None = None,
    window: tuple[float, float] | None = None,
) -> Figure:
    """Modes of every trial over time.

    Parameters
    ----------
    posterior : xarray.DataTree
        With ``mode_probability`` (trial, time, mode) in its group ``latents``.
    trials : labels of trials, optional
        One row for each; by default all.
    window : (first, last), optional
        Seconds; by default all of a trial. Long sessions need it.

    Returns
    -------
    matplotlib.figure.Figure
        Above, a row a trial: the colour is the most probable mode's, full where its probability is one and white where
        all modes are equally probable. Grey lies behind a trial's end. Below, the probability of each mode, mean over
        the trials that last so long.

    Raises
    ------
    ValueError
        Where a trial does not exist, the window is empty, or the posterior has no modes.
    """
    probability = _chosen(posterior, variable_of(posterior, "latents", "mode_probability"), trials, window)
    colours, inside = _colours(probability.sizes["mode"]), _inside(posterior, probability)
    certain, values = probability.max("mode").values, probability.values
    least = 1.0 / values.shape[-1]
    share = np.ones_like(certain) if least == 1.0 else (certain - least) / (1.0 - least)
    image = 1.0 + share[..., None] * (colours[values.argmax(-1)] - 1.0)
    image[~inside] = to_rgb("#E8E8E8")
    figure = new_figure(7.0, 2.2 + min(6.0, ROW * len(image)))
    raster, mean = figure.subplots(2, sharex=True, height_ratios=(max(1.0, min(6.0, ROW * len(image))), 1.0))
    edges = _edges(posterior, probability)
    raster.pcolormesh(edges, np.arange(len(image) + 1), image, rasterized=True)
    raster.set(ylim=(len(image), 0), ylabel="trial")
    labels = probability["trial"].values.tolist()
    if len(labels) <= 12:
        raster.set_yticks(np.arange(len(labels)) + 0.5, labels)
    raster.tick_params(axis="y", length=0)
    seen = inside.sum(0)
    average = np.where(inside[..., None], values, 0.0).sum(0) / np.maximum(seen, 1)[:, None]
    heights = np.concatenate([np.zeros((len(average), 1)), average.cumsum(-1)], -1)
    for k, label in enumerate(probability["mode"].values):
        lower, upper = (np.append(side, side[-1]) for side in (heights[:, k], heights[:, k + 1]))
        mean.fill_between(edges, lower, upper, step="post", color=colours[k], linewidth=0, label=f"{label}")
    mean.set(xlim=(edges[0], edges[-1]), ylim=(0.0, 1.0), xlabel="time (s)", ylabel="probability")
    figure.legend(*mean.get_legend_handles_labels(), loc="outside right center", title="mode")
    return figure


@styled
def mode_flows(
    posterior: xr.DataTree,
    *,
    trials: Sequence[int | str] | None = None,
    window: tuple[float, float] | None = None,
) -> Figure:
    r"""Where the dynamics of each mode take the state, with the stretches of the path that it rules.

    Parameters
    ----------
    posterior : xarray.DataTree
        Of a model whose modes have linear dynamics of one lag, in two latents or more.
    trials, window
        As in `mode_raster`: the path that is drawn.

    Returns
    -------
    matplotlib.figure.Figure
        A panel a mode. Arrows: the posterior mean of the drift :math:`(A_k - I) x + b_k`, inputs at zero, the longest
        of a panel as long as the arrows lie apart; an arrow fades where draws do not agree on its direction. Lines: the
        mean path (under `models.ARHMM` the standardised observations), coloured where the mode is the most probable.
        More than two latents are seen in the plane of the path's first two principal components, through its mean.

    Raises
    ------
    ValueError
        Where modes have no dynamics of their own, more than one lag, or one latent.
    """
    path, dynamics, bias = _system(posterior)
    every = path.values[_inside(posterior, path)]
    centre, plane, names = plane_of(every, path)
    shown = _chosen(posterior, path, trials, window)
    held = _inside(posterior, shown)
    chosen = variable_of(posterior, "latents", "mode_probability")
    modes = chosen.sel(trial=shown["trial"], time=shown["time"]).values.argmax(-1)
    points = (shown.values - centre) @ plane
    sides, grid = grid_about(points[held])
    states = centre + grid @ plane.T
    drift = np.einsum("skij,pj->skpi", dynamics - np.eye(len(centre)), states) + bias[:, :, None]
    flow = drift @ plane  # (draw, mode, point, 2)

    labels = chosen["mode"].values
    colours = _colours(len(labels))
    rows, columns = _layout(len(labels))
    figure = new_figure(2.5 * columns + 0.3, 2.4 * rows + 0.3)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    ends = np.stack([points[:, :-1], points[:, 1:]], -2)
    steps = held[:, 1:]  # a step belongs to the mode of the bin that it ends in
    for k, (panel, label) in enumerate(zip(panels.flat, labels, strict=False)):
        own = steps & (modes[:, 1:] == k)
        panel.add_collection(LineCollection(list(ends[steps & ~own]), colors=GREY, linewidths=0.4, alpha=0.35))
        panel.add_collection(LineCollection(list(ends[own]), colors=[colours[k]], linewidths=1.1, label="path"))
        draw_flow(panel, sides, flow[:, k])
        panel.set_title(f"mode {label}")
    for panel in panels.flat[len(labels) :]:
        panel.set_axis_off()
    figure.supxlabel(names[0], fontsize=8.0)
    figure.supylabel(names[1], fontsize=8.0)
    return figure


@styled
def dwell_times(posterior: xr.DataTree) -> Figure:
    """How long modes last: in the recording, and in trials that the fitted model simulates.

    Returns
    -------
    matplotlib.figure.Figure
        A panel a mode: the share of visits that last longer than a time, by Kaplan and Meier's estimator, since a
        trial's end cuts visits short. Colour: 90% band over paths of modes drawn from the posterior. Grey: 90% band
        over simulated recordings of the same size, one for each of 50 draws; where it leaves the coloured band, modes
        do not last as the model says. Dashed: the geometric law with the mean rate of leaving, a straight line here.

    Raises
    ------
    ValueError
        Where the posterior has no paths of modes.
    """
    drawn = variable_of(posterior, "latents", "mode_path_draws")
    simulated = replicated_latents(posterior, draws=REPLICATES)["mode_path"].values
    labels, lengths, bin_width = _about(posterior)
    colours = _colours(len(labels))
    rows, columns = _layout(len(labels))
    figure = new_figure(2.4 * columns + 0.3, 1.9 * rows + 0.5)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    visits = [[dwells(path, lengths) for path in paths] for paths in (simulated, drawn.values)]
    for k, (panel, label) in enumerate(zip(panels.flat, labels, strict=False)):
        own = [[(bins[mode == k], ended[mode == k]) for mode, bins, ended in paths] for paths in visits]
        panel.set_title(f"mode {label}")
        bins, ended = (np.concatenate(part) for part in zip(*own[1], strict=True))
        if not len(bins):
            panel.annotate("never visited", (0.5, 0.5), xycoords="axes fraction", ha="center", color=GREY)
            continue
        longest = int(bins.max())
        after = np.arange(longest + 1)
        floor = 0.5 / max(1.0, len(bins) / len(own[1]))
        named = ((GREY, "simulated"), (colours[k], "inferred"))
        for paths, (colour, name) in zip(own, named, strict=True):
            curves = np.stack([survival(*visit, longest) for visit in paths if len(visit[0])] or [np.ones(longest + 1)])
            lower, upper = np.quantile(curves, INTERVAL, axis=0).clip(min=floor)
            panel.fill_between(after * bin_width, lower, upper, color=colour, alpha=0.4, linewidth=0, label=name)
        stay = 1.0 - ended.sum() / bins.sum()
        line = np.power(stay, after)
        kept = line >= floor
        panel.plot(after[kept] * bin_width, line[kept], color="black", linestyle="--", linewidth=0.8, label="geometric")
        panel.set(yscale="log", xlim=(0.0, longest * bin_width))
    for panel in panels.flat[len(labels) :]:
        panel.set_axis_off()
    figure.supxlabel("time since the mode began (s)", fontsize=8.0)
    figure.supylabel("share that lasts longer", fontsize=8.0)
    handles = {name: handle for p in panels.flat for handle, name in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=3)
    return figure


@styled
def transition_graph(posterior: xr.DataTree) -> Figure:
    """Which mode follows which, in paths of modes drawn from the posterior.

    Returns
    -------
    matplotlib.figure.Figure
        Area of a node: the share of time. Width of an arrow, and the number on it: the share of the ways out of
        its mode, with all switches of all drawn paths counted. Beneath a mode's name stands how long it lasts.

    Raises
    ------
    ValueError
        Where the posterior has no paths of modes.
    """
    drawn = variable_of(posterior, "latents", "mode_path_draws").values
    labels, lengths, bin_width = _about(posterior)
    size, inside = len(labels), np.arange(drawn.shape[-1]) < lengths[:, None]
    both = np.broadcast_to(inside[:, 1:], drawn[..., 1:].shape)
    counts = np.zeros((size, size))
    np.add.at(counts, (drawn[..., :-1][both], drawn[..., 1:][both]), 1.0)
    time = np.bincount(drawn[np.broadcast_to(inside, drawn.shape)], minlength=size)
    leaving = counts - np.diag(counts.diagonal())
    shares = leaving / np.maximum(leaving.sum(-1, keepdims=True), 1.0)
    area = NODE_AREA[0] + (NODE_AREA[1] - NODE_AREA[0]) * time / time.max()
    colours, place = _colours(size), on_circle(size)
    figure = new_figure(4.8, 4.2)
    axes = figure.subplots()
    for source, target in np.argwhere(shares >= RAREST):
        share = shares[source, target]
        label_at = draw_arrow(
            axes, place[source], place[target], width=WIDEST * share, colour=colours[source], alpha=0.8,
            areas=(area[source], area[target]), label=f"{labels[source]} → {labels[target]}",
        )  # fmt: skip
        axes.annotate(f"{share:.2f}", (label_at[0], label_at[1]), ha="center", va="center", fontsize=6.5, bbox=BEHIND)
    axes.scatter(*place.T, s=area, c=colours, edgecolors="black", linewidths=0.8, zorder=3)
    for k, (x, y) in enumerate(place):
        ways = leaving[k].sum()
        lasts = f"\n{time[k] / ways * bin_width:.2g} s" if ways else ""
        side = "center" if abs(x) < 0.3 else "left" if x > 0.0 else "right"
        axes.annotate(f"mode {labels[k]}{lasts}", (1.22 * x, 1.3 * y), ha=side, va="center")
    axes.set(xlim=(-1.8, 1.8), ylim=(-1.5, 1.5), aspect="equal")
    axes.set_axis_off()
    return figure


BEHIND = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}


def _colours(count: int) -> np.ndarray:
    """One for each mode, (mode, 3): those of all pictures while they last, and hues beyond."""
    if count <= len(COLOURS):
        return np.array([to_rgb(colour) for colour in COLOURS[:count]])
    return colormaps["turbo"](np.linspace(0.05, 0.95, count))[:, :3]


def _layout(count: int) -> tuple[int, int]:
    """Rows and columns of so many panels."""
    columns = count if count <= ONE_ROW else int(np.ceil(np.sqrt(count)))
    return -(-count // columns), columns


def _chosen(
    posterior: xr.DataTree,
    variable: xr.DataArray,
    trials: Sequence[int | str] | None,
    window: tuple[float, float] | None,
) -> xr.DataArray:
    """Some trials of (trial, time, ...), and the bins that begin within the window."""
    chosen = chosen_trials(variable["trial"].values.tolist(), trials, variable.sizes["trial"])
    time = variable["time"].values
    first, last = (time[0], np.inf) if window is None else window
    held = (time >= first) & (time < last)
    if held.sum() < 2:
        raise ValueError(f"window: {window!r} s holds fewer than two bins; bins begin at {time[0]:g} to {time[-1]:g} s")
    return variable.sel(trial=chosen).isel(time=held)


def _inside(posterior: xr.DataTree, variable: xr.DataArray) -> np.ndarray:
    """Which bins lie before a trial's end, (trial, time)."""
    whole = posterior["constant_data"].to_dataset()
    bins = np.searchsorted(whole["time"].values, variable["time"].values)
    return bins < whole["length"].sel(trial=variable["trial"]).values[:, None]


def _about(posterior: xr.DataTree) -> tuple[np.ndarray, np.ndarray, float]:
    """Labels of modes, bins of every trial, and seconds of a bin."""
    data = posterior["constant_data"].to_dataset()
    return posterior["latents"].to_dataset()["mode"].values, data["length"].values, data.attrs["bin_width"]


def _edges(posterior: xr.DataTree, variable: xr.DataArray) -> np.ndarray:
    time = variable["time"].values
    return np.append(time, time[-1] + posterior["constant_data"].attrs["bin_width"])


def _system(posterior: xr.DataTree) -> tuple[xr.DataArray, np.ndarray, np.ndarray]:
    """The path (trial, time, latent), and some draws of the modes' dynamics (draw, mode, ...) and biases."""
    dynamics = variable_of(posterior, "posterior", "dynamics")
    if "mode" not in dynamics.dims:
        raise ValueError("posterior: its dynamics have no modes; plots.eigenvalues shows dynamics without")
    if dynamics.sizes.get("lag", 1) > 1:
        raise ValueError(
            f"posterior: has dynamics of {dynamics.sizes['lag']} lags; a flow is a function of the state with one alone"
        )
    of_draws = thinned(dynamics.sizes["chain"] * dynamics.sizes["draw"], FLOWS)
    bias = variable_of(posterior, "posterior", "bias")
    if bias.sizes[str(bias.dims[-1])] < 2:
        raise ValueError("posterior: has one latent; a flow field needs two")
    square = dynamics.isel(lag=0, drop=True) if "lag" in dynamics.dims else dynamics
    steps, push = (part.values.reshape(-1, *part.shape[2:])[of_draws] for part in (square, bias))
    if "mean" in posterior["latents"].data_vars:
        return variable_of(posterior, "latents", "mean"), steps, push
    data = posterior["constant_data"].to_dataset()
    seen = variable_of(posterior, "observed_data", "observations")
    return (seen - data["center"]) / data["scale"], steps, push
