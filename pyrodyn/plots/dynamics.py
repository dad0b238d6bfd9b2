"""Pictures of what latents do: rates beside spikes, trajectories by condition, inputs, flows, and forecasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure

from pyrodyn.evaluation import fixed_points
from pyrodyn.evaluation.fixed_points import HasFlow
from pyrodyn.fitting import predict
from pyrodyn.inference.engine import numerics
from pyrodyn.plots.panels import (
    BAND,
    COLOURS,
    GREY,
    chosen_trials,
    colour_of,
    draw_colour_bar,
    draw_data,
    draw_flow,
    grid_about,
    new_figure,
    of_trial,
    plane_of,
    some,
    styled,
    variable_of,
)
from pyrodyn.posterior import model_of, parameters_of, recording_of, thinned
from pyrodyn.recording import Recording

FLOWS = 50  # draws whose flows are compared
LEGEND_LIMIT = 8  # conditions that are named


@styled
def raster(posterior: xr.DataTree, *, trial: int | str | None = None, draws: int = 50) -> Figure:
    """The spikes of one trial beside the rates inferred from them.

    Parameters
    ----------
    posterior : xarray.DataTree
    trial : label of a trial, optional
        By default the first.
    draws : int
        Of the posterior, for the rates.

    Returns
    -------
    matplotlib.figure.Figure
        Left, the observations (unit, time), units grouped by region. Right, the same units' expected observations: for
        counts in spikes a second, otherwise as on the left in standard deviations from each unit's mean.

    Raises
    ------
    ValueError
        Where the trial does not exist.
    """
    recording = recording_of(posterior)
    (chosen,) = chosen_trials(recording.trial.tolist(), None if trial is None else [trial], 1)
    expected = predict(posterior, recording.sel(trial=[chosen]), draws=draws)["expected"].isel(trial=0)
    data = posterior["constant_data"].to_dataset()
    expected = expected.isel(time=slice(0, int(data["length"].sel(trial=chosen))))
    names = list(dict.fromkeys(data["region"].values.tolist()))
    order = np.argsort([names.index(name) for name in data["region"].values.tolist()], kind="stable")
    values = expected.transpose("unit", "time").values[order]
    figure = new_figure(8.0, 3.4)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    draw_colour_bar(left, draw_data(left, posterior, chosen, named=True), posterior)
    left.set_title(f"observed, trial {chosen}")
    if recording.counts:
        options: dict[str, Any] = {"cmap": "viridis", "vmin": 0.0}
        values, label = values / recording.bin_width, "spikes/s"
    else:
        options = {"cmap": "RdBu_r", "vmin": -3, "vmax": 3}
        values = (values - data["center"].values[order, None]) / data["scale"].values[order, None]
        label = "sd from the mean"
    edges = np.append(expected["time"].values, expected["time"].values[-1] + recording.bin_width)
    image = right.pcolormesh(edges, np.arange(len(order) + 1), values, rasterized=True, **options)
    figure.colorbar(image, cax=right.inset_axes((1.01, 0.0, 0.02, 1.0)), label=label)
    right.set_title("expected")
    for axes in (left, right):
        axes.set_xlabel("time (s)")
    return figure


@styled
def trajectories(posterior: xr.DataTree) -> Figure:
    """Paths in the plane of their first two principal components, one colour a condition.

    Returns
    -------
    matplotlib.figure.Figure
        Thin: the mean path of every trial. Bold: the mean over the trials of a condition, in bins that none of them
        misses, with a dot where it starts. Two latents are drawn as they are.

    Raises
    ------
    ValueError
        Where the posterior holds no paths, or of one latent.
    """
    path = variable_of(posterior, "latents", "mean")
    if path.sizes["latent"] < 2:
        raise ValueError("posterior: has one latent; trajectories need two, and plots.latents shows one")
    data = posterior["constant_data"].to_dataset()
    lengths, conditions = data["length"].values, data["condition"].values
    inside = np.arange(path.sizes["time"]) < lengths[:, None]
    centre, plane, labels = plane_of(path.values[inside], path)
    points = (path.values - centre) @ plane
    figure = new_figure(4.6, 4.2)
    axes = figure.subplots()
    names = list(dict.fromkeys(conditions.tolist()))
    for k, name in enumerate(names):
        own = np.flatnonzero(conditions == name)
        for trial in own:
            axes.plot(*points[trial, : lengths[trial]].T, color=colour_of(k), linewidth=0.5, alpha=0.35)
        mean = points[own, : lengths[own].min()].mean(0)
        axes.plot(*mean.T, color=colour_of(k), linewidth=2.0, label=name)
        axes.plot(*mean[0], "o", color=colour_of(k), markersize=4.5)
    if 1 < len(names) <= LEGEND_LIMIT:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="condition")
    axes.set(xlabel=labels[0], ylabel=labels[1], aspect="equal", title="mean paths of trials, dots where they start")
    return figure


@styled
def inferred_inputs(posterior: xr.DataTree, *, trials: Sequence[int | str] | None = None) -> Figure:
    """Inputs that a model such as `models.LFADS` had to infer where its dynamics alone did not do.

    Parameters
    ----------
    posterior : xarray.DataTree
        With ``inferred_inputs`` (trial, time, inferred_input) in its group ``latents``.
    trials : labels of trials, optional
        Those of the panels on the right; by default the first three.

    Returns
    -------
    matplotlib.figure.Figure
        Left, the size (Euclidean norm) of the mean input in every trial and bin. Right, the mean of every input and
        1.645 standard deviations on either side, one panel a trial.

    Raises
    ------
    ValueError
        Where the posterior has no inferred inputs, or a trial does not exist.
    """
    mean, sd = (variable_of(posterior, "latents", f"inferred_inputs{end}") for end in ("", "_sd"))
    chosen = chosen_trials(mean["trial"].values.tolist(), trials, 3)
    data = posterior["constant_data"].to_dataset()
    inside = np.arange(mean.sizes["time"]) < data["length"].values[:, None]
    size = np.where(inside, np.linalg.norm(mean.values, axis=-1), np.nan)
    width = data.attrs["bin_width"]
    figure = new_figure(8.0, 0.9 + 1.1 * len(chosen))
    grid = figure.add_gridspec(len(chosen), 2, width_ratios=(1.2, 1.0))
    left = figure.add_subplot(grid[:, 0])
    edges = np.append(mean["time"].values, mean["time"].values[-1] + width)
    image = left.pcolormesh(edges, np.arange(len(size) + 1), size, cmap="Greys", vmin=0.0, rasterized=True)
    left.set(ylim=(len(size), 0), ylabel="trial, in the order of the recording", xlabel="time (s)")
    left.set_title("size of the inferred input")
    figure.colorbar(image, ax=left, location="left", shrink=0.6)
    place = None
    for row, trial in enumerate(chosen):
        place = figure.add_subplot(grid[row, 1], sharex=place, sharey=place)
        for k, label in enumerate(mean["inferred_input"].values):
            level, spread = (of_trial(posterior, part, trial).isel(inferred_input=k) for part in (mean, sd))
            times = level["time"].values + 0.5 * width
            place.plot(times, level.values, color=colour_of(k), label=str(label))
            lower, upper = level.values - BAND * spread.values, level.values + BAND * spread.values
            place.fill_between(times, lower, upper, color=colour_of(k), alpha=0.2, linewidth=0)
        place.set_title(f"trial {trial}")
        place.tick_params(labelbottom=row == len(chosen) - 1)
    assert place is not None
    place.set_xlabel("time (s)")
    if 1 < mean.sizes["inferred_input"] <= LEGEND_LIMIT:
        figure.legend(*place.get_legend_handles_labels(), loc="outside upper right", ncols=4, title="input")
    return figure


@styled
def flow_field(posterior: xr.DataTree, *, model: Any = None) -> Figure:
    """Where a learned flow takes the state, with its fixed points and the paths that taught it.

    Parameters
    ----------
    posterior : xarray.DataTree
        Of a model with a flow, such as `models.NeuralODE` or `models.NeuralSDE`.
    model : optional
        Needed only for a model that is not in `pyrodyn.models`.

    Returns
    -------
    matplotlib.figure.Figure
        Arrows: the mean flow over 50 draws, faint where draws do not agree on its direction; the longest as long as the
        arrows lie apart. Grey: mean paths of the trials. Circles: fixed points of the mean flow that lie in the
        picture, filled where most draws find them stable, with those of the draws as dots. More than two latents are
        seen in the plane of the paths' first two principal components, through their mean; fixed points may lie off
        it.

    Raises
    ------
    ValueError
        Where the model has no flow, or one latent.
    """
    model = model_of(posterior) if model is None else model
    if not isinstance(model, HasFlow):
        raise ValueError(f"posterior: {type(model).__name__} declares no flow; plots.mode_flows shows those of modes")
    path = variable_of(posterior, "latents", "mean")
    if path.sizes["latent"] < 2:
        raise ValueError("posterior: has one latent; a flow field needs two")
    lengths = posterior["constant_data"].to_dataset()["length"].values
    inside = np.arange(path.sizes["time"]) < lengths[:, None]
    centre, plane, labels = plane_of(path.values[inside], path)
    points = (path.values - centre) @ plane
    sides, grid = grid_about(points[inside])
    states = torch.from_numpy(centre + grid @ plane.T)
    known: Any = model
    with torch.no_grad(), numerics():
        sizes = posterior["posterior"].sizes
        count = len(thinned(sizes["chain"] * sizes["draw"], FLOWS))
        moved = model.flow(parameters_of(posterior, known, FLOWS))(states.expand(count, -1, -1))
        flow = (moved - states if model.discrete_time else moved).numpy() @ plane
    found = fixed_points(posterior, draws=FLOWS, model=model)
    figure = new_figure(4.8, 4.4)
    axes = figure.subplots()
    for trial, own in enumerate(points):
        axes.plot(*own[: lengths[trial]].T, color=GREY, linewidth=0.6, alpha=0.5, zorder=0)
    draw_flow(axes, sides, flow)
    for k in range(found.sizes["fixed_point"]):
        drawn = (found["draws"].values[:, k] - centre) @ plane
        axes.plot(*drawn.T, ".", color=COLOURS[1], markersize=2.0, alpha=0.5)
        stable = bool(np.nanmean(found["stable"].values[:, k]) > 0.5) if found["presence"][k] > 0 else False
        place = (found["location"].values[k] - centre) @ plane
        axes.plot(*place, "o", color=COLOURS[1], markersize=7.0, markerfacecolor=COLOURS[1] if stable else "white")
    axes.set(xlabel=labels[0], ylabel=labels[1], title="mean flow and its fixed points, filled if stable")
    return figure


@styled
def forecast(
    posterior: xr.DataTree,
    recording: Recording,
    *,
    start: float,
    units: Sequence[int | str] | None = None,
    trial: int | str | None = None,
    draws: int = 100,
) -> Figure:
    """Expected observations from a time on, predicted from what came before alone.

    Parameters
    ----------
    posterior : xarray.DataTree
    recording : Recording
        With the posterior's units; all bins from ``start`` on are hidden before it is predicted.
    start : float
        Seconds.
    units : labels of units, optional
        By default the three whose forecasts vary most.
    trial : label of a trial, optional
        By default the first.
    draws : int

    Returns
    -------
    matplotlib.figure.Figure
        A panel a unit: observations, the mean of what is expected, and two bands of it, one standard deviation on
        either side and the 90% interval, which widen as the forecast goes on. Counts are rates in spikes a second.

    Raises
    ------
    ValueError
        Where ``start`` leaves nothing to forecast or to forecast from, or a trial or unit does not exist.
    """
    (chosen,) = chosen_trials(recording.trial.tolist(), None if trial is None else [trial], 1)
    ahead = recording.time >= start
    if not ahead.any() or ahead.all():
        raise ValueError(
            f"start: {start!r} s leaves {'no bin to forecast' if not ahead.any() else 'no bin to forecast from'}; "
            f"bins begin at {recording.time[0]:g} to {recording.time[-1]:g} s"
        )
    whole = recording.sel(trial=[chosen])
    found = predict(posterior, whole.hide(time=recording.time[ahead]), draws=draws).isel(trial=0)
    lively = np.argsort(-found["expected"].values[ahead].var(0), kind="stable")[:3]
    shown = recording.unit[lively].tolist() if units is None else list(units)
    for label in shown:
        if label not in recording.unit:
            raise ValueError(f"units: {label!r} is not in the recording, which has {some(recording.unit.tolist())}")
    factor = 1.0 / recording.bin_width if recording.counts else 1.0
    observed = factor * whole.to_xarray()["observations"].isel(trial=0)
    times = recording.time + 0.5 * recording.bin_width
    figure = new_figure(6.5, 1.3 * len(shown) + 0.6)
    panels = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for panel, unit in zip(panels, shown, strict=True):
        level, spread, lower, upper = (
            factor * found[f"expected{end}"].sel(unit=unit).values for end in ("", "_sd", "_lower", "_upper")
        )
        panel.plot(times, observed.sel(unit=unit).values, ".", color=GREY, markersize=3, label="observed")
        panel.plot(times, level, color=COLOURS[0], label="expected")
        panel.fill_between(times, lower, upper, color=COLOURS[0], alpha=0.15, linewidth=0, label="90%")
        panel.fill_between(
            times, level - spread, level + spread, color=COLOURS[0], alpha=0.25, linewidth=0, label="one sd"
        )
        panel.axvline(start, color="black", linewidth=0.8, linestyle="--")
        panel.set_title(f"unit {unit}, trial {chosen}")
    panels[len(shown) // 2].set_ylabel("rate (spikes/s)" if recording.counts else "signal (units of the recording)")
    panels[-1].set_xlabel("time (s)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return figure
