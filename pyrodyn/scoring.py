r"""How well predicted rates explain held-out spikes.

.. math::
    \mathrm{bits/spike} = \frac{\mathrm{NLL}(\lambda^{0}; n) - \mathrm{NLL}(\lambda; n)}{\ln 2 \,\sum n}, \qquad
    \mathrm{NLL}(\lambda; n) = \sum_{i,t,u} \lambda_{itu} - n_{itu} \ln \lambda_{itu} + \ln n_{itu}!

with counts n, predictions :math:`\lambda` in events a bin, and null predictions :math:`\lambda^{0}`, by default each
unit's mean count over the evaluated array. Sums run over all observed entries, so that units are pooled: a mean of the
units' own scores is another number, in which silent units weigh as much as busy ones.

Reference: Pei et al., "Neural Latents Benchmark '21", NeurIPS Datasets and Benchmarks 2021 (its co-bps).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["BitsPerSpike", "bits_per_spike", "bits_per_spike_over_trials"]

AXES = ("trial", "time", "unit")
POSSIBLE = "a finite, non-negative number of events a bin"
LEAST_RATE = 1e-9  # events a bin; stands in for a predicted zero, under which any spike would be impossible


@dataclass(frozen=True, eq=False)
class BitsPerSpike:
    r"""A score with its spread over trials; ``a - b`` is the paired difference of two scores of the same trials.

    Attributes
    ----------
    value : float
        Bits per spike.
    standard_error : float
        :math:`\mathrm{sd}(c_i) / \sqrt{I}` over the I trials; NaN for a single trial. Whatever is common to all trials,
        such as fitted parameters, and the null predictions are taken as given.
    per_trial : ndarray, (trial,)
        :math:`c_i = v + (g_i - v s_i) / \bar s`, for value v, gain :math:`g_i` over the null in bits and number of
        spikes :math:`s_i`: the linearised contribution of a trial to a ratio of sums, with mean v.
    spikes : ndarray, (trial,)
        Observed spikes.
    """

    value: float
    standard_error: float
    per_trial: np.ndarray
    spikes: np.ndarray

    def __sub__(self, other: BitsPerSpike) -> BitsPerSpike:
        if not isinstance(other, BitsPerSpike):
            return NotImplemented
        if not np.array_equal(self.spikes, other.spikes):
            raise ValueError(
                "a paired difference needs two scores of the same observations, but these have "
                f"{self.spikes.sum():g} spikes in {len(self.spikes)} trials and {other.spikes.sum():g} spikes in "
                f"{len(other.spikes)} trials (or differ within trials); score both predictions on the same trials and "
                "units"
            )
        return _summarised(self.per_trial - other.per_trial, self.spikes)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.standard_error:.4f} bits/spike"


def bits_per_spike(expected: Any, observed: Any, *, null: Any = None) -> float:
    r"""Bits per spike of predicted counts above a null prediction; the equation stands at the head of this module.

    Parameters
    ----------
    expected : (trial, time, unit)
        Predicted counts in events a **bin**, not in Hz, such as ``expected`` from `predict`. Array or DataArray. Zeros
        count as 1e-9.
    observed : (trial, time, unit)
        Counts; NaN where unobserved, as in ``recording.to_xarray()["observations"]``. These entries are left out.
    null : (unit,) or (trial, time, unit), optional
        The null prediction in events a bin, such as the units' means over training trials; by default each unit's mean
        over the observed entries of ``observed``.

    Returns
    -------
    float
        0 for predictions as good as the null, negative for worse ones.

    Raises
    ------
    ValueError
        Where shapes or labels differ, where counts or predictions are impossible, and where there is no spike.

    References
    ----------
    Pei et al., "Neural Latents Benchmark '21", NeurIPS Datasets and Benchmarks 2021.
    """
    gain, spikes = _gain(expected, observed, null)
    return float(gain.sum() / spikes.sum())


def bits_per_spike_over_trials(expected: Any, observed: Any, *, null: Any = None) -> BitsPerSpike:
    """`bits_per_spike` with its standard error over trials; same parameters and errors.

    Two predictions of the same trials are compared by their paired difference::

        difference = bits_per_spike_over_trials(a, observed) - bits_per_spike_over_trials(b, observed)
        difference.value, difference.standard_error
    """
    gain, spikes = _gain(expected, observed, null)
    value = gain.sum() / spikes.sum()
    return _summarised(value + (gain - value * spikes) / spikes.mean(), spikes)


def _summarised(per_trial: np.ndarray, spikes: np.ndarray) -> BitsPerSpike:
    trials = len(per_trial)
    error = float(per_trial.std(ddof=1)) / math.sqrt(trials) if trials > 1 else math.nan
    return BitsPerSpike(float(per_trial.mean()), error, per_trial, spikes)


def _gain(expected: Any, observed: Any, null: Any) -> tuple[np.ndarray, np.ndarray]:
    """Log likelihood above the null in bits, and spikes, of every trial."""
    _check_labels(expected, observed)
    rates, counts = _array("expected", expected), _array("observed", observed)
    if rates.shape != counts.shape:
        raise ValueError(
            f"expected has shape {rates.shape} and observed {counts.shape}; both must be the same (trial, time, unit): "
            "select the same trials, bins and units in both"
        )
    seen = ~np.isnan(counts)
    _refuse(
        "observed", seen & ((counts < 0) | (counts != np.round(counts))), counts, "whole non-negative counts or NaN"
    )
    _refuse("expected", seen & ~_possible(rates), rates, POSSIBLE)
    counts = np.where(seen, counts, 0.0)
    spikes = counts.sum((1, 2))
    if not spikes.sum() > 0:
        raise ValueError("observed holds no spike, so bits per spike do not exist; select trials or units with spikes")
    base = _null(null, counts, seen)
    rates, base = np.maximum(rates, LEAST_RATE), np.maximum(base, LEAST_RATE)
    # log n! stands in both likelihoods and cancels.
    gain = counts * (np.log(rates) - np.log(base)) - (rates - base)
    return np.where(seen, gain, 0.0).sum((1, 2)) / math.log(2.0), spikes


def _null(null: Any, counts: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The null prediction, broadcast to (trial, time, unit)."""
    if null is None:
        return np.broadcast_to(counts.sum((0, 1)) / np.maximum(seen.sum((0, 1)), 1), counts.shape)
    values = _array("null", null) if np.ndim(null) == 3 else np.asarray(null, dtype=np.float64)
    if values.shape not in (counts.shape, counts.shape[2:]):
        raise ValueError(
            f"null has shape {values.shape}, expected (unit,) = {counts.shape[2:]} or (trial, time, unit) = "
            f"{counts.shape}"
        )
    values = np.broadcast_to(values, counts.shape)
    _refuse("null", seen & ~_possible(values), values, POSSIBLE)
    return values


def _array(name: str, given: Any) -> np.ndarray:
    if isinstance(given, xr.DataArray):
        if set(given.dims) != set(AXES):
            raise ValueError(f"{name} has dims {given.dims}, expected {AXES}; rename or reduce the others")
        given = given.transpose(*AXES)
    values = np.asarray(given, dtype=np.float64)
    if values.ndim != 3:
        raise ValueError(
            f"{name} has shape {values.shape}, expected three axes (trial, time, unit); for one trial give {name}[None]"
        )
    return values


def _check_labels(expected: Any, observed: Any) -> None:
    """Two labelled arrays must speak of the same trials, bins and units in the same order."""
    if not (isinstance(expected, xr.DataArray) and isinstance(observed, xr.DataArray)):
        return
    for axis in AXES:
        if axis in expected.coords and axis in observed.coords:
            ours, theirs = expected[axis].values, observed[axis].values
            if ours.shape != theirs.shape or not np.array_equal(ours, theirs):
                raise ValueError(
                    f"expected and observed differ in their labels of {axis}: {_few(ours)} and {_few(theirs)}; "
                    f"select the same with .sel({axis}=...)"
                )


def _few(labels: np.ndarray) -> str:
    shown = ", ".join(str(label) for label in labels[:4])
    return f"[{shown}, ...] ({len(labels)})" if len(labels) > 4 else f"[{shown}]"


def _possible(rates: np.ndarray) -> np.ndarray:
    return np.isfinite(rates) & (rates >= 0)


def _refuse(name: str, bad: np.ndarray, values: np.ndarray, wanted: str) -> None:
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} holds {int(bad.sum())} values that are not {wanted}; the first is {values[place]} at "
            f"(trial, time, unit) = {place}, counted from 0"
        )
