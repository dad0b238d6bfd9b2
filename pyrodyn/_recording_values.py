"""The door of `Recording`, past the shapes: values that cannot be used are refused by their place, or measured."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from pyrodyn._recording_checks import (
    AXES,
    LARGEST_COUNT,
    Labels,
    listed,
    name_array,
    plain,
    real_array,
    side_array,
)
from pyrodyn.errors import RecordingError

# ------------------------------------------------------------------------------------------------ values


def place(index: Sequence[Any], labels: Sequence[np.ndarray], last: str = "unit") -> str:
    """An entry in words: trial 2, time 0.340 s, unit 'u5'."""
    trial, time, unit = (plain(axis[int(i)]) for axis, i in zip(labels, index, strict=True))
    return f"trial {trial!r}, time {time:.3f} s, {last} {unit!r}"


def check_finite(values: np.ndarray, observed: np.ndarray, labels: Sequence[np.ndarray]) -> None:
    """Refuse NaN and infinite values among the observed entries."""
    bad = np.isnan(values) & observed
    if bad.any():
        raise RecordingError(
            f"observations has {bad.sum()} NaN (first: {place(np.argwhere(bad)[0], labels)}); "
            "pass missing='mask' to treat them as unobserved, or mask=..."
        )
    bad = np.isinf(values) & observed
    if bad.any():
        raise RecordingError(
            f"observations has {bad.sum()} infinite values (first: {place(np.argwhere(bad)[0], labels)}); "
            "repair them, or hide them with mask=..."
        )


def are_counts(values: np.ndarray) -> bool:
    """Whether all values (hidden ones being 0) are non-negative integers."""
    return bool(((values >= 0) & (values == np.floor(values))).all())


def check_counts(values: np.ndarray, labels: Sequence[np.ndarray]) -> None:
    """Refuse values (hidden ones being 0) that no bin can have counted."""
    bad = (values < 0) | (values != np.floor(values))
    if bad.any():
        first = tuple(np.argwhere(bad)[0])
        fault = "negative" if values[first] < 0 else "not an integer"
        raise RecordingError(
            f"observations has {bad.sum()} entries that are not event counts (first: {values[first]:g}, {fault}, at "
            f"{place(first, labels)}); real values, such as smoothed spikes, take a Gaussian readout: pass counts=False"
        )
    bad = values > LARGEST_COUNT
    if bad.any():
        first = tuple(np.argwhere(bad)[0])
        raise RecordingError(
            f"observations has {bad.sum()} counts above {LARGEST_COUNT:g} (first: {values[first]:g} at "
            f"{place(first, labels)}), an overflow; repair them, hide them with mask=..., or pass counts=False"
        )


def channel_vector(name: str, value: Any, num_units: int) -> np.ndarray:
    """A given centre or scale: (unit,), finite, and positive for a scale."""
    array = real_array(name, value)
    if array.shape != (num_units,):
        raise RecordingError(f"{name} has shape {array.shape}, expected (unit,) = ({num_units},)")
    if not np.isfinite(array).all() or (name == "scale" and (array <= 0).any()):
        expected = "finite and positive" if name == "scale" else "finite"
        raise RecordingError(f"{name} must be {expected}, got {listed(array)}")
    return array


def mean_and_sd(values: np.ndarray, observed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sd (1 where constant or never observed) over trial and time, and which channels those are.

    Parameters
    ----------
    values : (trial, time, channel)
    observed : (trial, time, channel) bool, or None when every entry is
    """
    if observed is None:
        mean, sd = values.mean((0, 1)), values.std((0, 1))
    else:
        number = np.maximum(observed.sum((0, 1)), 1)
        mean = np.where(observed, values, 0.0).sum((0, 1)) / number
        sd = np.sqrt(np.where(observed, (values - mean) ** 2, 0.0).sum((0, 1)) / number)
    # The mean of equal numbers is off by rounding, so a constant channel can have a tiny positive sd.
    constant = sd <= 1e-12 * np.abs(mean)
    return mean, np.where(constant, 1.0, sd), constant


def warn_channels(what: str, units: np.ndarray, consequence: str) -> None:
    if len(units):
        plural = "s" if len(units) > 1 else ""
        verb = "are" if len(units) > 1 else "is"
        warnings.warn(f"unit{plural} {listed(units)} {verb} {what}; {consequence}", UserWarning, stacklevel=4)


def measured(
    values: np.ndarray, observed: np.ndarray, counts: bool, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Centre and scale of each channel, with a warning for channels that cannot tell them."""
    never = ~observed.any((0, 1))
    warn_channels("never observed", units[never], "kept with scale 1")
    if counts:
        silent = ~(values > 0).any((0, 1)) & ~never
        warn_channels("silent: no event in any observed bin", units[silent], "kept; drop with sel(unit=...)")
        return np.zeros(len(units)), np.ones(len(units))
    mean, sd, constant = mean_and_sd(values, observed)
    warn_channels("constant", units[constant & ~never], "kept with scale 1; drop with sel(unit=...)")
    return mean, sd


def warn_transposed(shape: tuple[int, int, int], *, flat: bool, units_named: bool, time_named: bool) -> None:
    """Warn where nothing tells time from units: no labels, one trial, and no more bins than units."""
    num_trials, num_bins, num_units = shape
    if units_named or num_trials > 1 or max(num_bins, num_units) == 1:
        return
    remedy = "expected (time, unit): transpose it if units come first; unit or region labels silence this warning"
    if num_bins == num_units and flat:
        warnings.warn(f"observations has as many time bins as units ({num_bins}); {remedy}", UserWarning, stacklevel=3)
    elif num_bins < num_units and not time_named:
        warnings.warn(
            f"observations has fewer time bins ({num_bins}) than units ({num_units}); {remedy}",
            UserWarning,
            stacklevel=3,
        )


def input_data(
    value: Any, names: Labels | None, lengths: np.ndarray, trial: np.ndarray, time: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs (trial, time, input), finite and 0 behind each trial's end; their names; their sd (1 where constant)."""
    values, inside = side_array("inputs", value, lengths, len(time), "input")
    labels = name_array("input_names", names, values.shape[2], "input")
    bad = ~np.isfinite(values) & inside
    if bad.any():
        first = place(np.argwhere(bad)[0], (trial, time, labels), "input")
        raise RecordingError(
            f"inputs has {bad.sum()} NaN or infinite values (first: {first}); fill them in: they cannot be missing"
        )
    values = np.where(inside, values, 0.0)
    return values, labels, mean_and_sd(values, np.broadcast_to(inside, values.shape))[1]


def behaviour_data(
    value: Any, names: Labels | None, lengths: np.ndarray, num_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Behaviour (trial, time, behaviour), NaN behind each trial's end, and its names."""
    values, inside = side_array("behaviour", value, lengths, num_bins, "behaviour")
    return np.where(inside, values, np.nan), name_array("behaviour_names", names, values.shape[2], "behaviour")


# ------------------------------------------------------------------------------------------------ datasets


def arguments(dataset: xr.Dataset) -> dict[str, Any]:
    """The arguments of `Recording.from_arrays` that a dataset holds, with the axes in order."""
    main = "observations" if "observations" in dataset else "mask"
    if main not in dataset or set(dataset[main].dims) != set(AXES):
        found = {str(name): variable.dims for name, variable in dataset.data_vars.items()}
        raise RecordingError(
            f"dataset needs a variable 'observations' with dims (trial, time, unit), got {found}; "
            "rename dims with dataset.rename(...)"
        )

    def values(name: str, *dims: str) -> Any:
        if name not in dataset:
            return None
        order = [dim for dim in dims if dim in dataset[name].dims]
        if len(order) < dataset[name].ndim:
            raise RecordingError(f"dataset variable {name} has dims {dataset[name].dims}, expected {dims}")
        return dataset[name].transpose(*order).values

    found = {name: values(name, "unit") for name in ("unit", "region", "heldout", "center", "scale")}
    found |= {name: values(name, "trial") for name in ("trial", "condition", "split")}
    found |= {name: values(name, "trial", "time", axis) for name, axis in (("mask", "unit"), ("inputs", "input"))}
    found |= {"behaviour": values("behaviour", "trial", "time", "behaviour")}
    found |= {"input_names": values("input", "input"), "behaviour_names": values("behaviour_name", "behaviour")}
    found |= {"time": values("time", "time"), "lengths": values("length", "trial")}
    found |= {"session": dataset.attrs.get("session"), "counts": dataset.attrs.get("counts")}
    # The attribute does not settle a disagreement with `time`: bins left out make the step wider than the bin.
    alone = found["time"] is None or len(found["time"]) == 1
    found["bin_width"] = dataset.attrs.get("bin_width") if alone else None
    if main == "mask":
        return found | {"observations": np.zeros([dataset.sizes[axis] for axis in AXES])}
    observations = values("observations", *AXES)
    if found["mask"] is None and found["lengths"] is None and observations.dtype.kind == "f":
        present = ~np.isnan(observations).all(2)
        ends = observations.shape[1] - np.argmax(present[:, ::-1], axis=1)
        found["lengths"] = np.where(present.any(1), ends, 0)
    return found | {"observations": observations}
