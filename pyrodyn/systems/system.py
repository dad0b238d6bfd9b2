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


def number(
    name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> float:
    """A finite number above one bound, at least another, and at most a third."""
    given = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(given) and given > above and least <= given <= most):
        bounds = {"above": above, "at least": least, "at most": most}
        said = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
        raise ValueError(f"{name} must be a finite number{' ' * bool(said)}{said}, got {value!r}")
    return given


def one_of(name: str, value: Any, names: tuple[str, ...]) -> str:
    """One of the names."""
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}, got {value!r}")
    return value
