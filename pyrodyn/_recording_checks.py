"""The door of `Recording`: arrays and labels are converted once, and whatever cannot be used is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyrodyn.errors import RecordingError

AXES = ("trial", "time", "unit")
LARGEST_COUNT = 1e9
Labels = Sequence[Any] | np.ndarray
# Times written in decimal (0.033, 0.067, 0.100) or float32 are still regular; a tenth of a per cent of a bin is not.
TIME_TOLERANCE = 1e-3


# ---------------------------------------------------------------------------------------------------------- arrays


def real_array(name: str, value: Any) -> np.ndarray:
    """A fresh float64 array of `value`, which must be real numbers of any dtype."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    if isinstance(value, xr.DataArray):
        raise RecordingError(f"{name} is an xarray.DataArray; its dims would be lost: use Recording.from_xarray")
    if np.ma.isMaskedArray(value):
        raise RecordingError(f"{name} is a masked array; pass {name}.data and mask=~{name}.mask")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise RecordingError(f"{name} is not a rectangular array ({error}); pass a list of 2-d arrays") from error
    if array.dtype.kind not in "biuf":
        raise RecordingError(
            f"{name} has dtype {array.dtype}, expected real numbers; convert it first, e.g. {name}.astype(float), "
            "or pass a list of (time, unit) arrays for trials of different lengths"
        )
    return np.array(array, dtype=np.float64)


def is_ragged(value: Any) -> bool:
    """Whether `value` is a list of one 2-d array per trial."""
    if not isinstance(value, list | tuple) or len(value) == 0:
        return False
    try:
        return all(np.ndim(trial) >= 2 for trial in value)
    except ValueError:  # a trial whose rows differ in length: real_array says which
        return True


def padded(name: str, trials: Sequence[Any], last_axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Trials (time_i, last_axis) as (trial, time, last_axis), NaN behind each trial's end, and their lengths."""
    arrays = [real_array(f"{name}[{i}]", trial) for i, trial in enumerate(trials)]
    width = arrays[0].shape[-1]
    for i, array in enumerate(arrays):
        if array.ndim != 2 or array.shape[1] != width:
            raise RecordingError(
                f"{name}[{i}] has shape {array.shape}, expected (time, {last_axis}) = (any, {width}) as in {name}[0]"
            )
        if len(array) == 0:
            raise RecordingError(f"{name}[{i}] has no time bins; leave the trial out")
    lengths = np.array([len(array) for array in arrays])
    result = np.full((len(arrays), int(lengths.max()), width), np.nan)
    for row, array in zip(result, arrays, strict=True):
        row[: len(array)] = array
    return result, lengths


def observation_array(value: Any) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Observations as (trial, time, unit), the lengths of ragged trials, and whether a single 2-d array was given."""
    if is_ragged(value):
        array, lengths = padded("observations", value, "unit")
        flat = False
    else:
        array, lengths = real_array("observations", value), None
        flat = array.ndim == 2
        array = array[None] if flat else array
    if array.ndim != 3:
        raise RecordingError(
            f"observations has {array.ndim} dimensions with shape {array.shape}, expected (trial, time, unit), "
            "or (time, unit) for one trial"
        )
    for axis, size in zip(AXES, array.shape, strict=True):
        if size == 0:
            raise RecordingError(f"observations has no {axis}: shape {array.shape} as (trial, time, unit)")
    return array, lengths, flat


def side_array(
    name: str, value: Any, lengths: np.ndarray, num_bins: int, last_axis: str
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs or behaviour as (trial, time, last_axis), and where they lie before each trial's end, (trial, time, 1)."""
    inside = (np.arange(num_bins) < lengths[:, None])[:, :, None]
    if is_ragged(value) and np.ndim(value[0]) == 2:
        array, given = padded(name, value, last_axis)
        if not np.array_equal(given, lengths):
            found, expected = listed(given), listed(lengths)
            raise RecordingError(f"{name} has trials of {found} bins, expected those of observations: {expected}")
        # `lengths` may leave the end of the time axis to no trial at all.
        behind = num_bins - array.shape[1]
        return np.pad(array, ((0, 0), (0, behind), (0, 0)), constant_values=np.nan), inside
    array = real_array(name, value)
    array = array[None] if array.ndim == 2 and len(lengths) == 1 else array
    if array.ndim != 3 or array.shape[:2] != (len(lengths), num_bins):
        raise RecordingError(
            f"{name} has shape {array.shape}, expected (trial, time, {last_axis}) = ({len(lengths)}, {num_bins}, any)"
        )
    return array, inside


def mask_array(value: Any, shape: tuple[int, ...], lengths: np.ndarray, *, name: str = "mask") -> np.ndarray:
    """A boolean mask broadcast to (trial, time, unit)."""
    num_trials, num_bins, num_units = shape
    if isinstance(value, list | tuple) and len(value) == num_trials and np.ndim(value[0]) >= 1:
        value = [np.asarray(trial) for trial in value]
        full = np.zeros(shape, dtype=bool)
        for i, trial in enumerate(value):
            trial = mask_dtype(f"{name}[{i}]", trial)
            trial = trial[:, None] if trial.ndim == 1 else trial
            if trial.shape[0] not in (num_bins, lengths[i]) or trial.shape[1:] not in ((1,), (num_units,)):
                raise RecordingError(
                    f"{name}[{i}] has shape {trial.shape}, expected (time, unit) = ({lengths[i]}, {num_units})"
                )
            full[i, : len(trial)] = trial
        return full
    array = mask_dtype(name, np.asarray(value.cpu() if isinstance(value, torch.Tensor) else value))
    if array.shape == shape:
        return array.copy()
    if array.shape == shape[:2]:
        return np.repeat(array[:, :, None], num_units, axis=2)
    if num_trials == 1 and array.shape == shape[1:]:
        return array[None].copy()
    raise RecordingError(
        f"{name} has shape {array.shape}, expected (trial, time, unit) = {tuple(shape)} or (trial, time) = {shape[:2]}"
    )


def mask_dtype(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype != bool:
        raise RecordingError(f"{name} has dtype {array.dtype}, expected bool; use .astype(bool)")
    return array


# ------------------------------------------------------------------------------------------------ labels and times


def plain(label: Any) -> Any:
    """A label as a Python scalar, so that messages read 'u5' and not np.str_('u5')."""
    return label.item() if isinstance(label, np.generic) else label


def listed(labels: Labels, most: int = 12) -> str:
    """The first labels of a list, for messages."""
    shown = ", ".join(repr(plain(label)) for label in list(labels)[:most])
    return shown + (f", ... ({len(labels)} in all)" if len(labels) > most else "")


def check_length(name: str, size: int, axis: str, sizes: Mapping[str, int]) -> None:
    """Refuse labels that do not fit their axis, and say so when they fit another one."""
    if size == sizes[axis]:
        return
    message = f"{name} has {size} entries, but observations has {sizes[axis]} along its {axis} axis"
    other = next((a for a in AXES if a != axis and sizes.get(a) == size), None)
    if other is not None:
        places = (AXES.index(axis), AXES.index(other))
        message += (
            f"; its {other} axis has {size}, so observations looks transposed: it must be (trial, time, unit), "
            f"e.g. np.swapaxes(observations, {places[0]}, {places[1]})"
        )
    shape = ", ".join(str(sizes[a]) for a in AXES if a in sizes)
    raise RecordingError(f"{message} [observations: (trial, time, unit) = ({shape})]")


def label_array(name: str, value: Any, axis: str, sizes: Mapping[str, int], *, kind: str) -> np.ndarray:
    """Labels of one axis: kind "id" (unique integers or strings), "name" (strings) or "flag" (booleans)."""
    if isinstance(value, str):
        raise RecordingError(f"{name} is the single string {value!r}, expected one label for each {axis}")
    value = value.cpu().numpy() if isinstance(value, torch.Tensor) else value
    labels = [plain(label) for label in value]
    check_length(name, len(labels), axis, sizes)
    if kind == "flag":
        if not all(isinstance(label, bool) for label in labels):
            raise RecordingError(f"{name} must be boolean, got {listed(labels)}; use np.asarray({name}, dtype=bool)")
        return np.array(labels, dtype=bool)
    if kind == "name":
        for i, label in enumerate(labels):
            if label is None or label != label:
                raise RecordingError(f"{name}[{i}] is {label}, expected a name for every {axis}")
        return np.array([str(label) for label in labels])
    labels = [int(v) if isinstance(v, float) and v.is_integer() else v for v in labels]
    strings = all(isinstance(label, str) for label in labels)
    if not strings and not all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
        raise RecordingError(f"{name} labels must be all integers or all strings, got {listed(labels)}")
    seen: set[Any] = set()
    for label in labels:
        if label in seen:
            raise RecordingError(f"{name} labels must be unique, but {label!r} occurs {labels.count(label)} times")
        seen.add(label)
    return np.array(labels) if strings else np.array(labels, dtype=np.int64)


def name_array(argument: str, names: Labels | None, size: int, axis: str) -> np.ndarray:
    """Unique names of inputs or behaviours; default input0, input1, ..."""
    if names is None:
        return np.array([f"{axis}{i}" for i in range(size)], dtype=str)
    array = label_array(argument, [str(name) for name in names], axis, {axis: len(names)}, kind="id")
    if len(array) != size:
        raise RecordingError(f"{argument} has {len(array)} names, but there are {size} along the {axis} axis")
    return array


def length_array(lengths: Any, num_trials: int, num_bins: int) -> np.ndarray:
    """Number of bins of each trial, from 1 to the length of the time axis."""
    array = np.asarray(lengths)
    if array.shape != (num_trials,) or array.dtype.kind not in "iu":
        raise RecordingError(
            f"lengths has shape {array.shape} and dtype {array.dtype}, expected (trial,) = ({num_trials},) integers"
        )
    wrong = np.flatnonzero((array < 1) | (array > num_bins))
    if len(wrong):
        raise RecordingError(
            f"lengths[{wrong[0]}] is {array[wrong[0]]}, expected 1 to {num_bins}, the size of the time axis; "
            "leave trials without bins out"
        )
    return array.astype(np.int64)


def positive(name: str, value: Any) -> float:
    """A positive finite number."""
    if isinstance(value, bool) or not np.isscalar(value) or not isinstance(value, int | float | np.number):
        raise RecordingError(f"{name} must be a positive number, got {value!r}")
    number = float(value)  # pyright: ignore[reportArgumentType]
    if not (np.isfinite(number) and number > 0):
        raise RecordingError(f"{name} must be positive and finite, got {value!r}")
    return number


def time_axis(time: Any, bin_width: Any, sizes: Mapping[str, int]) -> tuple[np.ndarray, float]:
    """Times of the bins and the bin width, both in seconds, from either or both."""
    num_bins = sizes["time"]
    width = None if bin_width is None else positive("bin_width", bin_width)
    if time is None:
        if width is None:
            raise RecordingError(
                "bin_width or time is required: the width of a bin, or the times of the bins, in seconds"
            )
        return np.arange(num_bins) * width, width
    times = real_array("time", time)
    if times.ndim != 1:
        raise RecordingError(
            f"time has shape {times.shape}, expected (time,) = ({num_bins},) seconds, shared by all trials"
        )
    check_length("time", len(times), "time", sizes)
    if not np.isfinite(times).all():
        first = int(np.flatnonzero(~np.isfinite(times))[0])
        raise RecordingError(f"time[{first}] is {times[first]}; every bin needs a finite time in seconds")
    steps = np.diff(times)
    if (steps <= 0).any():
        i = int(np.flatnonzero(steps <= 0)[0])
        fault = "duplicates" if steps[i] == 0 else "comes before"
        raise RecordingError(
            f"time must be strictly increasing, but time[{i + 1}] = {times[i + 1]:g} s {fault} time[{i}] = "
            f"{times[i]:g} s; sort the bins (np.argsort) and drop or merge repeated ones"
        )
    if num_bins == 1:
        if width is None:
            raise RecordingError("bin_width is required with a single time bin; time alone does not give it")
        return times, width
    step = float(np.median(steps))
    if width is None:
        return times, step
    if abs(step - width) > TIME_TOLERANCE * width:
        raise RecordingError(
            f"bin_width = {width:g} s disagrees with time, whose median step is {step:g} s; "
            "give both in seconds, or only one of them"
        )
    return times, width


def equally_spaced(times: np.ndarray) -> bool:
    """Whether all steps between times are the same."""
    steps = np.diff(times)
    return len(steps) == 0 or bool(np.ptp(steps) <= TIME_TOLERANCE * float(np.median(steps)))
