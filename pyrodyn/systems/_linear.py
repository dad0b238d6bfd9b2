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
    r"""A linear system of regions, with latents :math:`x_t = A x_{t-1} + b_t + \epsilon_t,\ \epsilon_t \sim N(0, Q)`.

    Attributes
    ----------
    names : names of the regions, the first dimension of `adjacency`
    owner : (latent,) index of the region of each latent; -1 for the global one
    adjacency : (target, source) bool
    dynamics : (latent, latent), A, acting on column vectors
    noise : sources of noise by name, each its covariance (latent, latent); Q is their sum
    drift : (time, latent), b, the same in every trial; b_1 is not used
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
    def covariance(self) -> np.ndarray:
        """Stationary covariance (latent, latent) about the drift's mean path."""
        return stationary(self.dynamics, self.process_noise)

    def mean(self, num_bins: int) -> np.ndarray:
        """Mean path (time, latent), from zero in the first bin."""
        path = np.zeros((num_bins, len(self.owner)))
        if self.drift is not None:
            for t in range(1, num_bins):
                path[t] = self.dynamics @ path[t - 1] + self.drift[t]
        return path

    def strength(self) -> np.ndarray:
        """Coupling strengths (target, source), 0 on the diagonal; see `coupled_regions`."""
        size = len(self.names)
        found = np.zeros((size, size))
        parts = [np.flatnonzero(self.owner == r) for r in range(size)]
        roots = [scipy.linalg.cholesky(self.covariance[np.ix_(part, part)], lower=True) for part in parts]
        for r, s in zip(*np.nonzero(self.adjacency), strict=True):
            block = self.dynamics[np.ix_(parts[r], parts[s])]
            # Any square root will do: they differ by a rotation, which the Frobenius norm does not see.
            found[r, s] = np.linalg.norm(scipy.linalg.solve_triangular(roots[r], block @ roots[s], lower=True))
        return found

    def variance_share(self) -> np.ndarray:
        """Share (target, origin) of each region's stationary variance that each source of noise accounts for."""
        found = np.zeros((len(self.names), len(self.noise)))
        for column, noise in enumerate(self.noise.values()):
            covariance = stationary(self.dynamics, noise)
            for r in range(len(self.names)):
                part = np.ix_(self.owner == r, self.owner == r)
                found[r, column] = np.trace(np.linalg.solve(self.covariance[part], covariance[part]))
        return found / np.bincount(self.owner[self.owner >= 0])[:, None]

    def sample(self, rng: np.random.Generator, num_trials: int, num_bins: int) -> np.ndarray:
        """Paths (trial, time, latent), in equilibrium from the first bin."""
        first = rng.standard_normal((num_trials, len(self.owner))) @ _root(self.covariance).T
        steps = rng.standard_normal((num_bins, num_trials, len(self.owner))) @ _root(self.process_noise).T
        steps[0] = first
        turned = self.dynamics.T
        for t in range(1, num_bins):
            steps[t] += steps[t - 1] @ turned
        return steps.swapaxes(0, 1) + self.mean(num_bins)


def stationary(dynamics: np.ndarray, noise: np.ndarray) -> np.ndarray:
    r"""The solution of :math:`\Sigma = A \Sigma A^\top + Q`."""
    found = scipy.linalg.solve_discrete_lyapunov(dynamics, noise)
    return 0.5 * (found + found.T)


def _root(covariance: np.ndarray) -> np.ndarray:
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
        "dynamics": (square, system.dynamics),
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
    attrs = {name: int(value) if isinstance(value, bool) else value for name, value in options.items()}
    return System(recording, xr.Dataset(data | system.extra, coords, attrs | {"bin_width": bin_width}))
