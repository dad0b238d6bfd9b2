"""Where a linear model starts: a subspace and its dynamics from lagged covariances, without iteration."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from pyrodyn.readouts import PerRegion, Readout
from pyrodyn.recording import Recording

MAX_PERSISTENCE = 0.99  # largest singular value of the first guess of the dynamics; 1 would mean no process noise


class LinearStart(NamedTuple):
    """A first guess in coordinates where the stationary covariance of the latent is the identity."""

    dynamics: Tensor  # (latent, latent)
    loading: Tensor  # (unit, latent), in units of the readout's signal scale
    residual: Tensor  # (unit,), share of each unit's linearised variance left to noise
    pivots: tuple[int, ...]  # the units whose loadings span the latent space best


_STARTS: WeakKeyDictionary[Recording, dict[tuple[int, Readout | PerRegion], LinearStart]] = WeakKeyDictionary()
_STATIC: WeakKeyDictionary[Recording, dict[tuple[int, Readout | PerRegion], LinearStart]] = WeakKeyDictionary()


def linear_start(recording: Recording, latent_dim: int, readout: Readout | PerRegion) -> LinearStart:
    """Subspace, dynamics and pivot units from covariances at lags 0 and 1.

    White observation noise enters the covariance at lag 0 alone, so the subspace is read from lag 1: its symmetric part
    has the loadings' span as its leading eigenvectors. Computed once for a recording.

    Reference: subspace identification after Buesing, Macke & Sahani, NIPS 2012.
    """
    recording = recording.whole
    known = _STARTS.setdefault(recording, {})
    if (latent_dim, readout) not in known:
        known[latent_dim, readout] = _estimate(recording, latent_dim, readout)
    return known[latent_dim, readout]


def static_start(recording: Recording, latent_dim: int, readout: Readout | PerRegion) -> LinearStart:
    """Subspace and pivot units from the covariance within bins, with equal noise in all units and no dynamics.

    Reference: Tipping & Bishop, J. R. Stat. Soc. B 61:611 (1999), the maximum of the likelihood in closed form.
    """
    recording = recording.whole
    known = _STATIC.setdefault(recording, {})
    if (latent_dim, readout) not in known:
        known[latent_dim, readout] = _principal(recording, latent_dim, readout)
    return known[latent_dim, readout]


def _principal(recording: Recording, latent_dim: int, readout: Readout | PerRegion) -> LinearStart:
    if recording.observations is None:
        return _blank(recording, latent_dim)
    values, seen = _centred(recording, readout)
    power, basis = np.linalg.eigh(_covariance(values, seen, 0))
    power, basis = power[::-1].clip(1e-9), basis[:, ::-1]
    noise = power[latent_dim:].mean() if latent_dim < len(power) else 0.1 * power[-1]
    loading = basis[:, :latent_dim] * (power[:latent_dim] - noise).clip(1e-3 * power[0]) ** 0.5
    residual = np.full(len(power), noise / power.mean()).clip(0.02, 1.0)
    dynamics = torch.zeros(latent_dim, latent_dim, dtype=torch.float64)
    loading = np.ascontiguousarray(loading)
    return LinearStart(dynamics, torch.from_numpy(loading), torch.from_numpy(residual), _pivots(loading))


def _blank(recording: Recording, latent_dim: int) -> LinearStart:
    loading = torch.eye(recording.num_units, latent_dim, dtype=torch.float64)
    dynamics = 0.5 * torch.eye(latent_dim, dtype=torch.float64)
    ones = torch.ones(recording.num_units, dtype=torch.float64)
    return LinearStart(dynamics, loading, ones, tuple(range(latent_dim)))


def _centred(recording: Recording, readout: Readout | PerRegion) -> tuple[np.ndarray, np.ndarray]:
    """Linearised observations about each unit's mean, zero where hidden, and the mask."""
    values = readout.linearise(recording).cpu().numpy()
    seen = np.ones(values.shape, bool) if recording.mask is None else recording.mask.cpu().numpy()
    values = np.where(seen, values, 0.0)
    return np.where(seen, values - values.sum((0, 1)) / np.maximum(seen.sum((0, 1)), 1), 0.0), seen


def _pivots(loading: np.ndarray) -> tuple[int, ...]:
    """The units whose loadings span the latent space best."""
    _, _, order = scipy.linalg.qr(loading.T, pivoting=True, mode="economic")
    return tuple(int(unit) for unit in order[: loading.shape[1]])


def _estimate(recording: Recording, latent_dim: int, readout: Readout | PerRegion) -> LinearStart:
    if recording.observations is None or recording.num_bins < 2:
        return _blank(recording, latent_dim)
    values, seen = _centred(recording, readout)
    same, lagged = _covariance(values, seen, 0), _covariance(values, seen, 1)

    power, basis = np.linalg.eigh(0.5 * (lagged + lagged.T))
    basis = basis[:, ::-1][:, :latent_dim]
    power = np.maximum(power[::-1][:latent_dim], 1e-3 * max(power.max(), 1e-6))
    variance = np.diagonal(same).clip(1e-12)
    signal = ((basis * power) * basis).sum(1)
    noise = np.maximum(variance - signal, 0.05 * variance)
    stationary = basis.T @ (same - np.diag(noise)) @ basis
    stationary_power, axes = np.linalg.eigh(0.5 * (stationary + stationary.T))
    stationary_power = np.maximum(stationary_power, 0.5 * power.min())
    root, inverse = (axes * stationary_power**0.5) @ axes.T, (axes * stationary_power**-0.5) @ axes.T
    left, gains, right = np.linalg.svd(inverse @ basis.T @ lagged @ basis @ inverse)
    dynamics = (left * gains.clip(0.05, MAX_PERSISTENCE)) @ right
    loading = basis @ root
    residual = (noise / variance).clip(0.02, 1.0)
    return LinearStart(
        torch.from_numpy(dynamics), torch.from_numpy(loading), torch.from_numpy(residual), _pivots(loading)
    )


def _covariance(values: np.ndarray, seen: np.ndarray, lag: int) -> np.ndarray:
    """E[y_(t+lag) y_t'] over pairs of bins in which both units were observed, (unit, unit)."""
    bins = values.shape[1]
    units = values.shape[2]
    later, earlier = values[:, lag:].reshape(-1, units), values[:, : bins - lag].reshape(-1, units)
    if seen.all():
        return later.T @ earlier / len(later)
    pairs = seen[:, lag:].reshape(-1, units).T.astype(float) @ seen[:, : bins - lag].reshape(-1, units).astype(float)
    return later.T @ earlier / np.maximum(pairs, 1.0)
