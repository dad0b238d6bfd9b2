"""The pictures; see the package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from pyrodyn.fitting import predict
from pyrodyn.plots.panels import (
    COLOURS,
    GREY,
    chosen_trials,
    colour_of,
    draw_calibration,
    draw_circle,
    draw_colour_bar,
    draw_data,
    draw_eigenvalues,
    draw_path,
    draw_paths,
    new_figure,
    some,
    styled,
    variable_of,
)
from pyrodyn.posterior import recording_of
from pyrodyn.recording import Recording

LEGEND_LIMIT = 6  # entries; more would hide the data
TRACES = 4  # panels in a picture of chains
SMOOTHING = 25  # steps over which the loss is averaged


@styled
def latents(posterior: xr.DataTree, *, trials: Sequence[int | str] | None = None) -> Figure:
    """Latent paths with 90% bands beneath the observations of the same trials.

    Parameters
    ----------
    posterior : xarray.DataTree
        From `fit` or `load`, with the group ``latents`` (trial, time, latent).
    trials : labels of trials, optional
        One column for each; by default the first three.

    Returns
    -------
    matplotlib.figure.Figure
        Above, the observations (unit, time), units grouped by region: events per bin, or standard deviations from each
        unit's mean. Below, the mean of every latent and 1.645 standard deviations on either side.

    Raises
    ------
    ValueError
        Where a trial does not exist, or the posterior holds no paths.
    """
    paths = variable_of(posterior, "latents", "mean")
    chosen = chosen_trials(paths["trial"].values.tolist(), trials, 3)
    figure = new_figure(2.0 + 2.6 * len(chosen) if len(chosen) > 1 else 7.0, 5.0)
    axes = figure.subplots(2, len(chosen), sharex="col", sharey="row", squeeze=False, height_ratios=(1.3, 1.0))
    image = None
    for column, trial in enumerate(chosen):
        image = draw_data(axes[0, column], posterior, trial, named=column == 0)
        axes[0, column].set_title(f"trial {trial}")
        draw_paths(axes[1, column], posterior, trial)
        axes[1, column].set_xlabel("time (s)")
    axes[1, 0].set_ylabel("latent (prior sd)")
    if 1 < paths.sizes["latent"] <= LEGEND_LIMIT:
        axes[1, -1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="latent")
    draw_colour_bar(axes[0, -1], image, posterior)
    return figure


@styled
def eigenvalues(posterior: xr.DataTree) -> Figure:
    """Eigenvalues of the dynamics in the complex plane, one faint point for each of every draw, and the unit circle.

    Inside the circle the latent is stable. The nearer to it, the slower a mode decays; the angle is its frequency, in
    turns a bin.

    Raises
    ------
    ValueError
        Where the posterior has no variable ``dynamics``.
    """
    figure = new_figure(4.2, 4.2)
    axes = figure.subplots()
    draw_circle(axes)
    values = draw_eigenvalues(axes, posterior, COLOURS[0])
    axes.set_title(f"eigenvalues of the dynamics, {values.shape[0]} draws")
    return figure


@styled
def trace(posterior: xr.DataTree) -> Figure:
    """The course of the fit: the loss over steps, or the draws of each chain.

    With a loss in ``sample_stats`` (SVI), one panel: the loss, and its running mean over 25 steps. Otherwise, a panel
    for ``lp`` and for each of the first invariants, one line a chain; chains that have mixed lie over each other.
    Chains that started at one point, a superchain, have one colour.
    """
    stats = posterior["sample_stats"].to_dataset()
    if "loss" in stats:
        return _loss(stats["loss"].values)
    series = {"log density": stats["lp"].values} if "lp" in stats else {}
    for name, variable in posterior["invariants"].to_dataset().data_vars.items():
        flat = variable.values.reshape(*variable.shape[:2], -1)
        series |= {f"{name} [{i}]".replace("_", " "): flat[..., i] for i in range(flat.shape[-1])}
    shown = dict(list(series.items())[:TRACES])
    figure = new_figure(7.0, 1.3 * len(shown) + 0.5)
    axes = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    chains = posterior["posterior"].sizes["chain"]
    groups = json.loads(posterior.attrs["notes"]).get("superchains", chains)
    opacity = 0.85 if chains <= LEGEND_LIMIT else 0.4
    for place, (label, values) in zip(axes, shown.items(), strict=True):
        for chain, line in enumerate(values):
            colour = colour_of(chain * groups // chains)
            place.plot(line, color=colour, linewidth=0.7, alpha=opacity, label=f"chain {chain}")
        place.set_title(label)
    if 1 < len(next(iter(shown.values()))) <= LEGEND_LIMIT:
        axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes[-1].set_xlabel("draw")
    return figure


@styled
def rates(
    posterior: xr.DataTree,
    prediction: xr.Dataset | None = None,
    *,
    recording: Recording | None = None,
    units: Sequence[int | str] | None = None,
    trial: int | str | None = None,
) -> Figure:
    """Predicted against observed: a calibration plot, and the time courses of some units in one trial.

    Parameters
    ----------
    posterior : xarray.DataTree
    prediction : xarray.Dataset, optional
        From `predict`; may be a selection of its trials and units. By default the recording that was fitted is
        predicted, each trial's latents from its own observations: a check of the fit, not of a forecast.
    recording : Recording, optional
        What was observed, with the prediction's trials and units; by default the recording that was fitted.
    units : labels of units, optional
        By default the three whose predictions vary most.
    trial : label of a trial, optional
        By default the first.

    Returns
    -------
    matplotlib.figure.Figure
        Left, observed entries sorted by prediction into twelve groups of one size: mean observation and its standard
        error against mean prediction. On the diagonal, predictions are right on average. Right, the observations, the
        prediction and the 90% interval of the expected observation. Counts are shown as rates in spikes a second.

    Raises
    ------
    ValueError
        Where the recording lacks a trial or unit of the prediction, or these do not include one that was asked for.
    """
    data = (recording_of(posterior) if recording is None else recording).to_xarray()
    prediction = predict(posterior, recording_of(posterior)) if prediction is None else prediction
    for dim in ("trial", "unit"):
        lacking = [label for label in prediction[dim].values.tolist() if label not in data[dim].values.tolist()]
        if lacking:
            raise ValueError(
                f"recording: lacks {dim} {some(lacking)} of the prediction; pass the recording that was predicted"
            )
    factor = 1.0 / data.attrs["bin_width"] if data.attrs["counts"] else 1.0
    word, unit_of = ("rate", "spikes/s") if data.attrs["counts"] else ("signal", "units of the recording")
    observed = factor * data["observations"].sel(trial=prediction["trial"], unit=prediction["unit"])
    bands = {name: factor * prediction[f"expected{name}"] for name in ("", "_lower", "_upper")}
    lively = np.argsort(-bands[""].var(("trial", "time")).values, kind="stable")[:3]
    shown = prediction["unit"].values[lively].tolist() if units is None else list(units)
    trial = prediction["trial"].values[0].item() if trial is None else trial
    for name, dim, wanted in (("units", "unit", shown), ("trial", "trial", [trial])):
        known = prediction[dim].values.tolist()
        for label in wanted:
            if label not in known:
                raise ValueError(f"{name}: {label!r} is not in the prediction, which has {some(known)}")

    figure = new_figure(8.0, 3.6)
    grid = figure.add_gridspec(len(shown), 2, width_ratios=(1.0, 1.7))
    draw_calibration(figure.add_subplot(grid[:, 0]), bands[""].values, observed.values, word, unit_of)
    times = prediction["time"].values + 0.5 * data.attrs["bin_width"]
    place = None
    for row, unit in enumerate(shown):
        place = figure.add_subplot(grid[row, 1], sharex=place)
        at = {"trial": trial, "unit": unit}
        place.plot(times, observed.sel(at).values, ".", color=GREY, markersize=3, label="observed")
        place.plot(times, bands[""].sel(at).values, color=COLOURS[0], label="predicted")
        place.fill_between(
            times, bands["_lower"].sel(at).values, bands["_upper"].sel(at).values, color=COLOURS[0], alpha=0.25,
            linewidth=0, label=f"90% of the expected {word}",
        )  # fmt: skip
        place.set_title(f"unit {unit}, trial {trial}")
        place.tick_params(labelbottom=row == len(shown) - 1)
        if row == len(shown) // 2:
            place.set_ylabel(f"{word} ({unit_of})")
    assert place is not None
    place.set_xlabel("time (s)")
    figure.legend(*place.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


@styled
def summary(posteriors: Mapping[str, xr.DataTree]) -> Figure:
    """One page: the first trial, its latents under every posterior, and the eigenvalues under every posterior.

    Parameters
    ----------
    posteriors : mapping of a name, such as the engine's, to a posterior of the same model and recording
    """
    if not posteriors:
        raise ValueError("posteriors: got none; pass for example {'SVI': posterior}")
    first = next(iter(posteriors.values()))
    paths = variable_of(first, "latents", "mean")
    trial = paths["trial"].values[0].item()
    dim = min(paths.sizes["latent"], 4)
    figure = new_figure(9.0, 5.6)
    # One grid for all, because axes of one grid column have one width: times stand above each other.
    grid = figure.add_gridspec(1 + dim, 2, width_ratios=(2.1, 1.0), height_ratios=(1.3 * dim, *[1.0] * dim))
    data = figure.add_subplot(grid[0, 0])
    image = draw_data(data, first, trial, named=True)
    data.set_title(f"data: {first['constant_data'].attrs['session']}, trial {trial}")
    data.tick_params(labelbottom=False)
    draw_colour_bar(data, image, first)
    row = data
    for latent in range(dim):
        row = figure.add_subplot(grid[1 + latent, 0], sharex=data)
        for colour, (name, posterior) in enumerate(posteriors.items()):
            # The first is drawn wide, so that it is seen where the others cover it.
            draw_path(row, posterior, trial, latent, colour_of(colour), name, width=0.8 if colour else 2.4)
        row.set_ylabel(f"latent {latent}")
        row.tick_params(labelbottom=latent == dim - 1)
        if latent == 0:
            row.set_title("latents: posterior mean and 90% band")
            row.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(posteriors), borderpad=0.1)
    row.set_xlabel("time (s)")
    circle, moduli = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1:, 1])
    draw_circle(circle)
    drawn = {}
    for colour, (name, posterior) in enumerate(posteriors.items()):
        drawn[name] = np.abs(draw_eigenvalues(circle, posterior, colour_of(colour), 4 if colour else 16))
    circle.set_title("eigenvalues of the dynamics")
    lowest = min(float(values.min()) for values in drawn.values())
    for colour, (name, values) in enumerate(drawn.items()):
        moduli.hist(
            values.ravel(), bins=np.linspace(lowest, 1.0, 40).tolist(), density=True, histtype="step",
            color=colour_of(colour), label=name,
        )  # fmt: skip
    moduli.set(xlabel="modulus of the eigenvalues", ylabel="posterior density", title="all eigenvalues, all draws")
    return figure


def _loss(loss: np.ndarray) -> Figure:
    figure = new_figure(6.0, 3.0)
    axes = figure.subplots()
    steps = np.arange(1, len(loss) + 1)
    axes.plot(steps, loss, color=COLOURS[0], alpha=0.3, linewidth=0.6, label="each step")
    width = min(SMOOTHING, len(loss))
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color=COLOURS[0], label=f"mean of {width} steps")
    # The first steps may lie thousands of nats above the rest, and would hide it.
    low, high = np.quantile(loss[len(loss) // 50 :], (0.0, 1.0))
    axes.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
    axes.set(xlabel="step", ylabel="loss: minus the ELBO (nats)", title="loss of the variational fit")
    axes.legend(loc="upper right")
    return figure


@styled
def calibration(found: xr.Dataset, quantities: Sequence[str] | None = None) -> Figure:
    """Where the truth lies among the draws: how far each quantity's distribution of places is from uniform.

    Parameters
    ----------
    found : xarray.Dataset
        From `pyrodyn.calibrate`.
    quantities : names, optional
        All by default.

    Returns
    -------
    matplotlib.figure.Figure
        One panel a quantity: the share of replicates below a place, less the place. A calibrated engine stays in the
        grey band, all along, in 95% of such pictures. A curve above zero on the left and below on the right: intervals
        too narrow; all above: draws too high.
    """
    names = [str(name) for name in (found["quantity"].values if quantities is None else quantities)]
    count = found.sizes["replicate"]
    grid = np.linspace(0.0, 1.0, 101)
    width = np.sqrt(grid * (1.0 - grid) / count) * _band(count, grid)
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(1.9 * columns, 1.3 * rows + 0.4)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        place = np.sort(found["place"].sel(quantity=name).values)
        panel.fill_between(grid, -width, width, color=GREY, alpha=0.3, linewidth=0)
        flagged = bool(found["flagged"].sel(quantity=name))
        below = np.searchsorted(place, grid, side="right") / count
        panel.plot(grid, below - grid, color=COLOURS[1 if flagged else 0], linewidth=1.0)
        panel.set_title(name.replace("_", " "))
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    figure.supxlabel("place of the truth among the draws")
    figure.supylabel("share below, less place")
    return figure


def _band(count: int, grid: np.ndarray, simulations: int = 2000) -> float:
    """Pointwise sds within which 95% of empirical distributions of ``count`` uniform numbers stay all along."""
    uniform = np.sort(np.random.default_rng(0).uniform(size=(simulations, count)), axis=1)
    inner = grid[1:-1]
    below = np.stack([np.searchsorted(row, inner, side="right") for row in uniform]) / count
    return float(np.quantile(np.max(np.abs(below - inner) / np.sqrt(inner * (1.0 - inner) / count), axis=1), 0.95))
