r"""Statistics of a recording that a model should reproduce: rates, dispersion, correlations, autocorrelation, PSTH; how
long modes last.

Those of observations take (draw, trial, time, unit) with NaN where unobserved, and work on all draws at once. Dwell
times are of paths of modes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def _unseen() -> Iterator[None]:
    """Means of entries of which none was seen are NaN, without a word."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def rate(values: np.ndarray) -> np.ndarray:
    """Mean of every unit, (draw, unit)."""
    with _unseen():
        return np.nanmean(values, (1, 2))


def dispersion(values: np.ndarray, window: int, counts: bool) -> np.ndarray:
    r"""Fano factor of the counts in windows of bins, over windows and trials; of real values, their variance.

    .. math:: F_n = \mathrm{Var}(s_n) / \mathrm{E}(s_n), \qquad s_n = \text{sum over a window}

    (draw, unit). Windows that were not observed whole are left out.
    """
    draws, trials, bins, units = values.shape
    number = bins // window
    sums = values[:, :, : number * window].reshape(draws, trials * number, window, units).sum(2)
    with _unseen():
        spread = np.nanvar(sums, 1, ddof=1)
        return spread / np.nanmean(sums, 1) if counts else spread


def correlation(values: np.ndarray) -> np.ndarray:
    """Pearson correlations of units in the same bin, over bins and trials, (draw, unit, unit); entries in pairs."""
    draws, _, _, units = values.shape
    flat = values.reshape(draws, -1, units)
    with _unseen():
        return _correlated(flat, flat)


def autocorrelation(values: np.ndarray, lags: int) -> np.ndarray:
    """Correlation of every unit with itself 1, ..., ``lags`` bins later in the same trial, (draw, unit, lag)."""
    bins = values.shape[2]
    with _unseen():
        centred = values - np.nanmean(values, (1, 2), keepdims=True)
        variance = np.nanmean(centred**2, (1, 2))
        found = [
            np.nanmean(centred[:, :, lag:] * centred[:, :, : bins - lag], (1, 2)) / variance
            for lag in range(1, lags + 1)
        ]
    return np.stack(found, -1)


def psth(values: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """Mean over the trials of every condition and all units, (draw, condition, time)."""
    with _unseen():
        return np.stack([np.nanmean(values[:, condition == c], (1, 3)) for c in np.unique(condition)], 1)


def locking(values: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """Standard deviation over time and conditions of every unit's PSTH, (draw, unit)."""
    with _unseen():
        means = np.stack([np.nanmean(values[:, condition == c], 1) for c in np.unique(condition)], 1)
        return np.nanstd(means, (1, 2))


def _correlated(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlations (draw, unit, unit) of (draw, sample, unit) over the samples that both were seen in."""
    seen_one, seen_other = np.isfinite(one).astype(float), np.isfinite(other).astype(float)
    # About each unit's own mean, so that nothing is lost to cancellation.
    one = np.nan_to_num(one - np.nanmean(one, 1, keepdims=True))
    other = np.nan_to_num(other - np.nanmean(other, 1, keepdims=True))

    def sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.swapaxes(a, 1, 2) @ b

    count = sums(seen_one, seen_other)
    mean_one, mean_other = sums(one, seen_other) / count, sums(seen_one, other) / count
    product = sums(one, other) / count - mean_one * mean_other
    variance_one = sums(one**2, seen_other) / count - mean_one**2
    variance_other = sums(seen_one, other**2) / count - mean_other**2
    return product / np.sqrt(variance_one * variance_other)


def dwells(modes: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Visits to modes in paths (trial, time) of trials with such lengths.

    Returns mode, duration in bins, and whether the visit ended before the trial did, each (visit,).
    """
    found = []
    for path, length in zip(modes, lengths, strict=True):
        starts = np.flatnonzero(np.diff(path[:length], prepend=-1))
        ends = np.append(starts[1:], length)
        found.append((path[starts], ends - starts, ends < length))
    visited, bins, ended = (np.concatenate(part) for part in zip(*found, strict=True))
    return visited, bins, ended


def survival(bins: np.ndarray, ended: np.ndarray, longest: int) -> np.ndarray:
    r"""Share of visits that last longer than 0, 1, ..., ``longest`` bins, where some were cut short.

    .. math:: S(n) = \prod_{m \le n} (1 - d_m / r_m),

    with :math:`d_m` of the :math:`r_m` visits that last m bins or more ending there.

    Reference: Kaplan & Meier, J. Am. Stat. Assoc. 53:457 (1958).
    """
    ending = np.bincount(bins[ended].clip(max=longest + 1), minlength=longest + 2)[: longest + 1]
    lasting = np.bincount(bins.clip(max=longest + 1), minlength=longest + 2)[::-1].cumsum()[::-1][: longest + 1]
    return np.cumprod(1.0 - ending / np.maximum(lasting, 1))
