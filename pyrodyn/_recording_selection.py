"""Which trials, times and units a selection of a `Recording` means, and which part of a split each trial falls in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pyrodyn._recording_checks import TIME_TOLERANCE, listed, plain, positive
from pyrodyn.errors import RecordingError


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        value = value.cpu().numpy()
    if isinstance(value, str) or np.ndim(value) == 0:
        return [plain(value)]
    return [plain(item) for item in value]


def _boolean(name: str, value: Any, size: int) -> np.ndarray | None:
    items = _as_list(value)
    if not items or np.ndim(value) == 0 or not all(isinstance(item, bool) for item in items):
        return None
    if len(items) != size:
        raise RecordingError(f"{name} is a boolean array of {len(items)}, expected one for each of {size}")
    return np.flatnonzero(items)


def by_label(name: str, value: Any, labels: np.ndarray) -> np.ndarray:
    """Positions of `value` (a label, several, or a boolean array) among the labels of an axis, in the order asked."""
    if isinstance(value, slice):
        raise RecordingError(f"{name} takes labels or a boolean array, not a slice; use isel for positions")
    chosen = _boolean(name, value, len(labels))
    if chosen is not None:
        return chosen
    where: dict[Any, list[int]] = {}
    for position, label in enumerate(labels.tolist()):
        where.setdefault(label, []).append(position)
    asked = _as_list(value)
    unknown = [label for label in asked if label not in where]
    if unknown:
        raise RecordingError(f"{name} {listed(unknown)} not found; this recording has {listed(list(where))}")
    return np.array([position for label in asked for position in where[label]], dtype=np.int64)


def by_time(value: Any, times: np.ndarray, bin_width: float) -> np.ndarray:
    """Positions of times (a slice in seconds, both ends included; times; or a boolean array)."""
    slack = TIME_TOLERANCE * bin_width
    if isinstance(value, slice):
        if value.step is not None:
            raise RecordingError("time takes a slice without a step; use isel(time=slice(start, stop, step))")
        start = -np.inf if value.start is None else value.start - slack
        stop = np.inf if value.stop is None else value.stop + slack
        return np.flatnonzero((times >= start) & (times <= stop))
    chosen = _boolean("time", value, len(times))
    if chosen is not None:
        return chosen
    positions = []
    for asked in _as_list(value):
        nearest = int(np.argmin(np.abs(times - asked)))
        if not abs(times[nearest] - asked) <= slack:
            raise RecordingError(
                f"time {asked} s not found; bins run from {times[0]:g} to {times[-1]:g} s, the nearest is "
                f"{times[nearest]:g} s; use a slice for a window"
            )
        positions.append(nearest)
    return np.array(positions, dtype=np.int64)


def by_position(axis: str, value: Any, size: int) -> np.ndarray:
    """Positions (an integer, several, a slice or a boolean array) as non-negative integers."""
    if isinstance(value, slice):
        return np.arange(size)[value]
    chosen = _boolean(axis, value, size)
    if chosen is not None:
        return chosen
    items = _as_list(value)
    for item in items:
        if not isinstance(item, int) or isinstance(item, bool) or not -size <= item < size:
            raise RecordingError(
                f"isel {axis} position {item!r} is not an integer in [{-size}, {size}); use sel for labels"
            )
    return np.array(items, dtype=np.int64) % size


def as_index(axis: str, positions: np.ndarray, size: int) -> slice | np.ndarray:
    """Positions ready for indexing: not empty, not repeated, and a slice (which copies nothing) where they are one."""
    if len(positions) == 0:
        raise RecordingError(f"the selection leaves no {axis}; this recording has {size}")
    steps = np.diff(positions)
    if axis == "time" and (steps <= 0).any():
        raise RecordingError("the times selected must be strictly increasing; sort them and drop repeated ones")
    unique, number = np.unique(positions, return_counts=True)
    if len(unique) < len(positions):
        raise RecordingError(f"the selection repeats {axis} position {unique[number > 1][0]}; labels must stay unique")
    if (steps == 1).all():
        return slice(int(positions[0]), int(positions[-1]) + 1)
    return positions


def split_names(fractions: Mapping[str, float], num_trials: int) -> np.ndarray:
    """Names of the parts of a split, in numbers by the largest remainder, each spread evenly over (trial,)."""
    shares = np.array([positive(f"fractions[{name!r}]", share) for name, share in fractions.items()])
    if abs(shares.sum() - 1.0) > 1e-6:
        raise RecordingError(f"fractions sum to {shares.sum():g}, expected 1: {dict(fractions)}")
    exact = shares * num_trials
    sizes = np.floor(exact + 1e-9).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: num_trials - sizes.sum()]] += 1
    for name, size in zip(fractions, sizes, strict=True):
        if size == 0:
            raise RecordingError(f"fractions leave {name!r} empty: {fractions[name]:g} of {num_trials} trials")
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    return np.repeat(np.array(list(fractions), dtype=str), sizes)[np.argsort(places, kind="stable")]
