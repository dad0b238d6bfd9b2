"""What every synthetic system returns, and the checks of its options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import xarray as xr

from pyrodyn.recording import Recording


@dataclass(frozen=True, eq=False)
class System:
    """A synthetic recording and the truth behind it.

    Attributes
    ----------
    recording : Recording
        What a model may see.
    truth : xarray.Dataset
        Parameters, latents and rates, with the recording's labels for trial, time and unit. It can be written to
        netCDF; its attributes hold the options and the seed.
    """

    recording: Recording
    truth: xr.Dataset


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def number(name: str, value: Any, *, above: float | None = None, least: float | None = None, most: float = math.inf):
    """A finite number above (or at least) a bound, and at most another."""
    low = least if above is None else above
    good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if good:
        value = float(value)
        good = value <= most and (low is None or value > low or (above is None and value == low))
    if not good:
        bounds = [f"above {above:g}" if above is not None else "" if least is None else f"at least {least:g}"]
        bounds += [f"at most {most:g}"] if most < math.inf else []
        raise ValueError(f"{name} must be a number {' and '.join(filter(None, bounds))}, got {value!r}")
    return value


def one_of(name: str, value: Any, names: tuple[str, ...]) -> str:
    """One of the names."""
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}, got {value!r}")
    return value
