r"""Coupled linear regions read out by Poisson units: moments in closed form, a sampler, and the truth as a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import scipy.linalg
import xarray as xr

from pyrodyn.recording import Recording
from pyrodyn.systems.system import System


@dataclass(frozen=True, eq=False)
class Regions:
    r"""A linear system of regions: :math:`x_t = \sum_l A_l x_{t-l} + b_t + \epsilon_t,\ \epsilon_t \sim N(0, Q)`.

    Attributes
    ----------
    names : names of the regions, the first dimension of `adjacency`
    owner : (latent,) index of the region of each latent; -1 for the global one
    adjacency : (target, source) bool
    dynamics : (lag, latent, latent), A_1, A_2, ..., acting on column vectors
    noise : sources of noise by name, each its covariance (latent, latent); Q is their sum
    drift : (time, latent), b, the same in every trial, from the second bin on
    extra : further variables of the truth
    """

    names: list[str]
    owner: np.ndarray
    adjacency: np.ndarray
    dynamics: np.ndarray
    noise: dict[str, np.ndarray]
    drift: np.ndarray | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def process_noise(self) -> np.ndarray:
        return np.sum(list(self.noise.values()), 0)

    @cached_property
    def companion(self) -> np.ndarray:
        """Dynamics of the state (x_t, x_t-1, ...), as long as the longest lag."""
        lags, dim, _ = self.dynamics.shape
        shift = np.eye((lags - 1) * dim, lags * dim)
        return np.concatenate([np.concatenate(list(self.dynamics), 1), shift])

    def moments(self, noise: np.ndarray) -> np.ndarray:
        """Stationary covariance of the state (x_t, x_t-1, ...) under this process noise (latent, latent)."""
        return stationary(self.companion, self._padded(noise))

    def _padded(self, noise: np.ndarray) -> np.ndarray:
        rest = len(self.companion) - len(noise)
        return np.pad(noise, ((0, rest), (0, rest)))

    @cached_property
    def covariance(self) -> np.ndarray:
        """Stationary covariance (latent, latent) about the drift's mean path."""
        dim = len(self.owner)
        return self.moments(self.process_noise)[:dim, :dim]

    def mean(self, num_bins: int) -> np.ndarray:
        """Mean path (time, latent), from zero in the first bin; a drift goes with a single lag."""
        path = np.zeros((num_bins, len(self.owner)))
        if self.drift is not None:
            for t in range(1, num_bins):
                path[t] = self.dynamics[0] @ path[t - 1] + self.drift[t]
        return path

    def strength(self) -> np.ndarray:
        """Coupling strengths (target, source), 0 without an edge; see `coupled_regions`."""
        size = len(self.names)
        found = np.zeros((size, size))
        parts = [np.flatnonzero(self.owner == r) for r in range(size)]
        roots = [np.linalg.cholesky(self.covariance[np.ix_(part, part)]) for part in parts]
        for r, s in zip(*np.nonzero(self.adjacency), strict=True):
            blocks = self.dynamics[:, parts[r][:, None], parts[s]]
            # Any square root will do: they differ by a rotation, which the Frobenius norm does not see.
            found[r, s] = np.linalg.norm(np.linalg.solve(roots[r], blocks @ roots[s]))
        return found

    def variance_share(self) -> np.ndarray:
        """Share (target, origin) of each region's stationary variance that each source of noise accounts for."""
        found = np.zeros((len(self.names), len(self.noise)))
        for column, noise in enumerate(self.noise.values()):
            covariance = self.moments(noise)
            for r in range(len(self.names)):
                part = np.ix_(*[np.flatnonzero(self.owner == r)] * 2)
                # Where nothing arrives, rounding leaves a zero of either sign.
                found[r, column] = max(0.0, np.trace(np.linalg.solve(self.covariance[part], covariance[part])))
        return found / np.bincount(self.owner[self.owner >= 0])[:, None]

    def sample(self, rng: np.random.Generator, num_trials: int, num_bins: int) -> np.ndarray:
        """Paths (trial, time, latent), in equilibrium from the first bin."""
        dim, lags = len(self.owner), len(self.dynamics)
        steps = rng.standard_normal((lags + num_bins - 1, num_trials, dim))
        past = steps[:lags].swapaxes(0, 1).reshape(num_trials, lags * dim) @ root(self.moments(self.process_noise)).T
        path = steps @ root(self.process_noise).T
        path[:lags] = past.reshape(num_trials, lags, dim).swapaxes(0, 1)[::-1]
        turned = self.dynamics.swapaxes(1, 2)
        for t in range(lags, len(path)):
            # (lag, trial, latent): the last bin first.
            path[t] += (path[t - lags : t][::-1] @ turned).sum(0)
        return path[lags - 1 :].swapaxes(0, 1) + self.mean(num_bins)


def stationary(dynamics: np.ndarray, noise: np.ndarray) -> np.ndarray:
    r"""The solution of :math:`\Sigma = A \Sigma A^\top + Q`."""
    found = np.asarray(scipy.linalg.solve_discrete_lyapunov(dynamics, noise))
    return 0.5 * (found + found.T)


def root(covariance: np.ndarray) -> np.ndarray:
    """A square root of a covariance that may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.clip(values, 0.0, None))


def observe(
    system: Regions,
    rng: np.random.Generator,
    *,
    units: int,
    trials: int,
    bins: int,
    mean_count: float,
    modulation: float,
    bin_width: float,
    options: dict[str, Any],
) -> System:
    """Draw loadings, paths and spikes, and label everything; see `coupled_regions` for the equations."""
    size, dim = len(system.names), len(system.owner)
    mean = system.mean(bins)
    centred = mean - mean.mean(0)
    spread = system.covariance + centred.T @ centred / bins
    host = np.repeat(np.arange(size), units)  # the region of every unit
    loading = np.where(host[:, None] == system.owner, rng.standard_normal((len(host), dim)), 0.0)
    loading *= modulation / np.sqrt(np.einsum("ui,ij,uj->u", loading, spread, loading))[:, None]
    # E exp(c'x_t) over trials is exp(c'm_t + c'Sigma c / 2); then its mean over the bins.
    around = 0.5 * np.einsum("ui,ij,uj->u", loading, system.covariance, loading)
    offset = np.log(mean_count) - around - np.log(np.exp(mean @ loading.T).mean(0))
    latents = system.sample(rng, trials, bins)
    rates = np.exp(latents @ loading.T + offset)
    counts = rng.poisson(rates)

    names = np.array(system.names)
    recording = Recording.from_arrays(
        counts, bin_width=bin_width, region=names[host], counts=True, session=str(options["system"])
    )
    shared = system.owner < 0
    position = [int(np.sum(system.owner[:i] == owner)) + 1 for i, owner in enumerate(system.owner)]
    labels = np.array(
        ["global" if g else f"{system.names[r]}.{i}" for g, r, i in zip(shared, system.owner, position, strict=True)]
    )
    square = ("latent", "latent_from")
    data: dict[str, Any] = {
        "dynamics": (square, system.dynamics[0]),
        "process_noise": (square, system.process_noise),
        "stationary_covariance": (square, system.covariance),
        "loading": (("unit", "latent"), loading),
        "offset": ("unit", offset),
        "adjacency": (("target", "source"), system.adjacency),
        "strength": (("target", "source"), system.strength()),
        "variance_share": (("target", "origin"), system.variance_share()),
        "latents": (("trial", "time", "latent"), latents),
        "rates": (("trial", "time", "unit"), rates, {"units": "events a bin"}),
    }
    if len(system.dynamics) > 1:
        data["dynamics"] = (("lag", *square), system.dynamics)
    if system.drift is not None:
        data["drift"] = (("time", "latent"), system.drift)
    coords = {
        "trial": recording.trial,
        "time": ("time", recording.time, {"units": "s"}),
        "unit": recording.unit,
        "region": ("unit", recording.region),
        "latent": labels,
        "latent_from": labels,
        "latent_region": ("latent", np.where(shared, "global", names[system.owner])),
        "target": names,
        "source": names,
        "origin": np.array(list(system.noise)),
    }
    if len(system.dynamics) > 1:
        coords["lag"] = ("lag", np.arange(1, len(system.dynamics) + 1), {"units": "bins"})
    attrs = {name: int(value) if isinstance(value, bool) else value for name, value in options.items()}
    return System(recording, xr.Dataset(data | system.extra, coords, attrs | {"bin_width": bin_width}))
