"""The parts that pictures are put together from; each draws into axes that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which colour-blind readers tell apart, by falling contrast.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8C8C8C"
BAND = 1.645  # standard deviations on either side of a normal's mean that hold 90% of it
LABEL_LIMIT = 40  # regions that can be named along an axis
QUANTILE_BINS = 12  # points in a calibration plot
BEND = 0.16  # of an arrow, so that its answer runs beside it
GRID = 13  # arrows along a side of a flow field
FAINTEST = 0.12  # opacity of an arrow on whose direction draws do not agree at all
LABELLED = 0.35  # of an arrow's way, where a label stands

styled = matplotlib.rc_context(
    {
        "font.size": 8.0,
        "axes.titlesize": 8.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "lines.linewidth": 1.2,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
    }
)


def draw_data(axes: Axes, posterior: xr.DataTree, trial: Any, named: bool) -> Any:
    """Heat map (unit, time) of one trial, units grouped by region; returns the image for its colour bar."""
    data = posterior["constant_data"].to_dataset()
    every_trial = variable_of(posterior, "observed_data", "observations")
    observed = of_trial(posterior, every_trial, trial)
    regions = data["region"].values
    names = list(dict.fromkeys(regions.tolist()))
    rank = {name: i for i, name in enumerate(names)}
    order = np.argsort([rank[name] for name in regions.tolist()], kind="stable")
    values = observed.values.T[order]
    if data.attrs["counts"]:
        # One scale for all trials of the recording.
        options: dict[str, Any] = {"cmap": "Greys", "vmin": 0, "vmax": max(1.0, np.nanquantile(every_trial, 0.995))}
    else:
        values = (values - data["center"].values[order, None]) / data["scale"].values[order, None]
        options = {"cmap": "RdBu_r", "vmin": -3, "vmax": 3}
    edges = np.append(observed["time"].values, observed["time"].values[-1] + data.attrs["bin_width"])
    image = axes.pcolormesh(edges, np.arange(len(order) + 1), values, rasterized=True, **options)
    axes.set_facecolor("#E8E8E8")  # unobserved entries
    axes.set_ylim(len(order), 0)
    sizes = np.array([(regions == name).sum() for name in names])
    ends = np.cumsum(sizes)
    if len(names) < len(order):
        for end in ends[:-1]:
            axes.axhline(end, color="black", linewidth=0.5)
    axes.tick_params(axis="y", length=0)
    if named:
        axes.set_ylabel("unit, by region" if len(names) <= LABEL_LIMIT else f"unit ({len(names)} regions)")
        if len(names) <= LABEL_LIMIT:
            axes.set_yticks(ends - 0.5 * sizes, names, fontsize=min(8.0, 160.0 / len(names)))
    return image


def draw_colour_bar(axes: Axes, image: Any, posterior: xr.DataTree) -> None:
    """Beside the axes and not out of their width, so that the times of axes below stay in line."""
    counts = posterior["constant_data"].attrs["counts"]
    place = axes.inset_axes((1.01, 0.0, 0.02, 1.0))
    ticks = MaxNLocator(integer=True) if counts else None
    axes.figure.colorbar(image, cax=place, ticks=ticks, label="events per bin" if counts else "sd from the mean")


def draw_paths(axes: Axes, posterior: xr.DataTree, trial: Any) -> None:
    for latent in range(posterior["latents"].sizes["latent"]):
        draw_path(axes, posterior, trial, latent, colour_of(latent), str(latent))


def draw_path(
    axes: Axes, posterior: xr.DataTree, trial: Any, latent: int, colour: str, label: str, width: float = 1.0
) -> None:
    """Mean and 90% band of one latent at the middles of the bins."""
    mean, sd = (
        of_trial(posterior, variable_of(posterior, "latents", name), trial).isel(latent=latent)
        for name in ("mean", "sd")
    )
    times = mean["time"].values + 0.5 * posterior["constant_data"].attrs["bin_width"]
    axes.plot(times, mean.values, color=colour, linewidth=width, label=label)
    lower, upper = mean.values - BAND * sd.values, mean.values + BAND * sd.values
    axes.fill_between(times, lower, upper, color=colour, alpha=0.2, linewidth=0)


def draw_circle(axes: Axes) -> None:
    angle = np.linspace(0.0, 2.0 * np.pi, 361)
    axes.axhline(0.0, color="#D0D0D0", linewidth=0.6)
    axes.axvline(0.0, color="#D0D0D0", linewidth=0.6)
    axes.plot(np.cos(angle), np.sin(angle), color="black", linewidth=0.8)
    axes.set_aspect("equal")
    axes.set(xlabel="real part", ylabel="imaginary part", xticks=(-1, 0, 1), yticks=(-1, 0, 1))


def draw_eigenvalues(axes: Axes, posterior: xr.DataTree, colour: str, size: float = 6.0) -> np.ndarray:
    """Scatter the eigenvalues of every draw; returns them, (chain x draw, latent)."""
    dynamics = variable_of(posterior, "posterior", "dynamics").values
    values = np.linalg.eigvals(dynamics).reshape(dynamics.shape[0] * dynamics.shape[1], -1)
    alpha = float(np.clip(60.0 / len(values), 0.06, 0.6))
    flat = values.ravel()
    axes.scatter(flat.real, flat.imag, s=size, color=colour, alpha=alpha, linewidths=0, rasterized=True)
    return values


def draw_calibration(axes: Axes, predicted: np.ndarray, observed: np.ndarray, word: str, unit_of: str) -> None:
    seen = np.isfinite(observed)
    x, y = predicted[seen], observed[seen]
    groups = np.array_split(np.argsort(x, kind="stable"), min(QUANTILE_BINS, len(x)))
    centre = np.array([x[group].mean() for group in groups])
    mean = np.array([y[group].mean() for group in groups])
    error = np.array([y[group].std() / np.sqrt(len(group)) for group in groups])
    axes.errorbar(centre, mean, yerr=error, fmt="o", color=COLOURS[0], markersize=3.5, elinewidth=1.0)
    ends = (min(centre.min(), mean.min()), max(centre.max(), mean.max()))
    axes.plot(ends, ends, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    axes.set_box_aspect(1)
    axes.set(xlabel=f"predicted {word} ({unit_of})", ylabel=f"mean observed {word} ({unit_of})")
    axes.set_title("all entries, grouped by prediction")


def on_circle(count: int) -> np.ndarray:
    """Places (node, 2) on the unit circle, clockwise from above; a pair lies side by side."""
    first = np.pi if count == 2 else 0.5 * np.pi
    angle = first - 2.0 * np.pi * np.arange(count) / count
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def draw_arrow(
    axes: Axes,
    start: np.ndarray,
    end: np.ndarray,
    *,
    width: float,
    colour: Any,
    alpha: float,
    areas: tuple[float, float],
    label: str,
) -> np.ndarray:
    """A bent arrow from node to node, whose areas are in points squared; returns a place on it for a label."""
    axes.add_patch(
        FancyArrowPatch(
            tuple(start),
            tuple(end),
            connectionstyle=f"arc3,rad={BEND}",
            arrowstyle="-|>,head_length=.5,head_width=.25",
            mutation_scale=5.0 + 2.0 * width,
            linewidth=width,
            color=colour,
            alpha=alpha,
            shrinkA=0.5 * areas[0] ** 0.5,
            shrinkB=0.5 * areas[1] ** 0.5 + 1.0,
            label=label,
        )
    )
    along = end - start
    bent = 0.5 * (start + end) + BEND * np.array([along[1], -along[0]])
    # Not at the middle, where arrows cross.
    return (1.0 - LABELLED) ** 2 * start + 2.0 * LABELLED * (1.0 - LABELLED) * bent + LABELLED**2 * end


def plane_of(every: np.ndarray, path: xr.DataArray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Centre (latent,), directions (latent, 2), and names of the plane that states (state, latent) are drawn in."""
    dim = str(path.dims[-1])
    if every.shape[-1] == 2:
        return np.zeros(2), np.eye(2), [f"{dim} {label}" for label in path[dim].values]
    centre = every.mean(0)
    directions = np.linalg.svd(every - centre, full_matrices=False)[2][:2].T
    return centre, directions, [f"component {i} of the {dim}s" for i in (1, 2)]


def grid_about(points: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Both sides of a grid about points (point, 2) of a plane, and its corners (corner, 2)."""
    low, high = points.min(0), points.max(0)
    margin = 0.08 * (high - low).max() + 1e-12
    sides = [np.linspace(a - margin, b + margin, GRID) for a, b in zip(low, high, strict=True)]
    return sides, np.stack(np.meshgrid(*sides), -1).reshape(-1, 2)


def draw_flow(axes: Axes, sides: Sequence[np.ndarray], flow: np.ndarray) -> None:
    """Arrows of the mean of flows (draw, corner, 2) on a grid; they fade where draws do not agree on a direction."""
    mean = flow.mean(0)
    agreement = np.linalg.norm(mean, axis=-1) / np.maximum(np.linalg.norm(flow, axis=-1).mean(0), 1e-300)
    longest = np.linalg.norm(mean, axis=-1).max()
    apart = min(side[1] - side[0] for side in sides)
    opacity = FAINTEST + (1.0 - FAINTEST) * agreement
    axes.quiver(
        *np.stack(np.meshgrid(*sides), -1).reshape(-1, 2).T, *mean.T, angles="xy", scale_units="xy",
        scale=max(longest, 1e-300) / apart, width=0.006, color=[(0.0, 0.0, 0.0, a) for a in opacity],
    )  # fmt: skip
    axes.set(xlim=sides[0][[0, -1]], ylim=sides[1][[0, -1]])


def chosen_trials(known: Sequence[Any], trials: Sequence[Any] | None, first: int) -> list[Any]:
    """The trials asked for, by default the first few; refused where one does not exist."""
    chosen = list(known[:first]) if trials is None else list(trials)
    for trial in chosen:
        if trial not in known:
            raise ValueError(f"trials: there is no trial {trial!r}; the posterior has {some(known)}")
    return chosen


def of_trial(posterior: xr.DataTree, variable: xr.DataArray, trial: Any) -> xr.DataArray:
    """One trial up to its end."""
    length = int(posterior["constant_data"].to_dataset()["length"].sel(trial=trial))
    return variable.sel(trial=trial).isel(time=slice(0, length))


def variable_of(posterior: xr.DataTree, group: str, name: str) -> xr.DataArray:
    if group not in posterior.children or name not in posterior[group].data_vars:
        raise ValueError(f"posterior: has no {name!r} in group {group!r}, which this picture shows")
    return posterior[group][name]  # pyright: ignore[reportReturnType]  # a variable, as was just seen


def some(labels: Sequence[Any]) -> str:
    return ", ".join(map(repr, labels[:5])) + (" ..." if len(labels) > 5 else "")


def colour_of(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
