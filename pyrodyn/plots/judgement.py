"""Pictures of comparisons and of checks; see the package."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyrodyn.plots.panels import COLOURS, GREY, new_figure, styled

SCORES = {"elpd": "elpd (nats)", "log_evidence": "log evidence (nats)", "bits_per_spike": "bits per spike"}
INTERVAL = (0.05, 0.95)
PAIRS = 4000  # of units in a picture of correlations


@styled
def comparison(found: xr.Dataset) -> Figure:
    """How much worse every model is than the best one, with the standard error of the difference.

    Parameters
    ----------
    found : xarray.Dataset
        From `pyrodyn.compare` or `pyrodyn.select`.

    Returns
    -------
    matplotlib.figure.Figure
        A row a model, best first: thick bars are one standard error of the difference over terms, thin ones two. A ring
        marks a model with terms whose importance weights cannot be trusted. On the right, the weight by stacking, or
        the probability.

    Raises
    ------
    ValueError
        For a comparison of several methods, or of scores that are not comparable.
    """
    name = next((name for name in SCORES if name in found), None)
    if name is None or "model" not in found.dims or "criterion" in found.dims:
        raise ValueError("found must be a comparison by one method, from pyrodyn.compare(..., method=...)")
    if bool(np.isnan(found["difference"]).any()):
        raise ValueError("found: the scores are not comparable, see found.attrs['warnings']; there is no difference")
    labels = [str(label) for label in found["model"].values]
    figure = new_figure(5.2, 1.0 + 0.3 * len(labels))
    axes = figure.subplots()
    axes.axvline(0.0, color="black", linewidth=0.8)
    place, right = axes.get_yaxis_transform(), found.get("weight_stacking", found.get("probability"))
    for height, label in enumerate(labels):
        row = found.sel(model=label)
        gap, error = float(row["difference"]), float(row["dse"])
        doubtful = float(row["bad_k_share"]) > 0.0
        for size, width in ((2.0, 1.0), (1.0, 2.6)):
            axes.plot([gap - size * error, gap + size * error], [height, height], color=COLOURS[0], linewidth=width)
        axes.plot(gap, height, "o", color="white" if doubtful else COLOURS[0], markeredgecolor=COLOURS[0], markersize=5)
        if right is not None:
            axes.text(1.02, height, f"{float(right.sel(model=label)):.2f}", transform=place, va="center", fontsize=7.0)
    if right is not None:
        title = "weight" if "weight_stacking" in found else "probability"
        axes.text(1.02, -0.75, title, transform=place, va="center", fontsize=7.0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"{SCORES[name]} less that of the best model, with 1 and 2 SE")
    estimators = list(dict.fromkeys(str(estimator) for estimator in found["estimator"].values))
    axes.set_title(estimators[0] + (" and others" if len(estimators) > 1 else ""))
    return figure


@styled
def checks(found: xr.Dataset) -> Figure:
    """Statistics of the data beside those of replicated data.

    Parameters
    ----------
    found : xarray.Dataset
        From `pyrodyn.check`.

    Returns
    -------
    matplotlib.figure.Figure
        Rate, dispersion and locking of every unit, and the correlation of every pair: data against the mean of the
        replicates, with their 90% interval. Autocorrelation (mean over units) and PSTH (mean over units): data as a
        line, replicates as a 90% band. Titles give the share of p-values outside .01 to .99.
    """
    figure = new_figure(7.2, 4.6)
    axes = figure.subplots(2, 3)
    rate = "rate (events/s)" if found.attrs["counts"] else "mean"
    spread = f"{'Fano factor' if found.attrs['counts'] else 'variance'} in {found.attrs['window_seconds']:.3g} s"
    _scatter(axes[0, 0], found, "rate", rate)
    _scatter(axes[0, 1], found, "dispersion", spread)
    _scatter(axes[0, 2], found, "locking", "sd of the PSTH")
    _scatter(axes[1, 0], found, "correlation", "correlation of pairs")
    bin_width = float(np.diff(found["time"].values[:2])[0]) if found.sizes["time"] > 1 else 1.0
    lags = found["lag"].values * bin_width
    pooled = found[["autocorrelation", "autocorrelation_replicated"]].mean("unit", skipna=True)
    _band(axes[1, 1], lags, pooled["autocorrelation"].values, pooled["autocorrelation_replicated"].values, COLOURS[0])
    axes[1, 1].set(xlabel="lag (s)", ylabel="autocorrelation")
    for i in range(min(found.sizes["condition"], len(COLOURS))):
        data, drawn = (found[name].isel(condition=i).values for name in ("psth", "psth_replicated"))
        _band(axes[1, 2], found["time"].values + 0.5 * bin_width, data, drawn, COLOURS[i])
    axes[1, 2].set(xlabel="time (s)", ylabel=f"mean {rate}")
    for panel, name in ((axes[1, 1], "autocorrelation"), (axes[1, 2], "psth")):
        _title(panel, found, name)
    return figure


def _scatter(axes: Axes, found: xr.Dataset, name: str, label: str) -> None:
    data, drawn = found[name].values, found[f"{name}_replicated"].values
    if data.ndim == 2:
        below = np.flatnonzero(np.tri(*data.shape, k=-1, dtype=bool))
        some = below[:: 1 + len(below) // PAIRS]
        data, drawn = data.ravel()[some], drawn.reshape(len(drawn), -1)[:, some]
    known = np.isfinite(data) & np.isfinite(drawn).all(0)
    if known.any():
        data, drawn = data[known], drawn[:, known]
        lower, upper = np.quantile(drawn, INTERVAL, axis=0)
        middle = drawn.mean(0)
        bars = np.abs(np.stack([middle - lower, upper - middle]))
        axes.errorbar(data, middle, bars, fmt="o", color=COLOURS[0], markersize=2.0, elinewidth=0.6, alpha=0.6)
        ends = (min(data.min(), lower.min()), max(data.max(), upper.max()))
        axes.plot(ends, ends, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    axes.set_box_aspect(1)
    axes.set(xlabel=f"{label}, data", ylabel="replicated")
    _title(axes, found, name)


def _band(axes: Axes, x: np.ndarray, data: np.ndarray, drawn: np.ndarray, colour: str) -> None:
    lower, upper = np.quantile(drawn, INTERVAL, axis=0)
    axes.fill_between(x, lower, upper, color=colour, alpha=0.25, linewidth=0)
    axes.plot(x, data, color=colour, linewidth=1.2)


def _title(axes: Axes, found: xr.Dataset, name: str) -> None:
    share = float(found["extreme"].sel(statistic=name))
    axes.set_title("" if np.isnan(share) else f"{100 * share:.2g}% extreme")
