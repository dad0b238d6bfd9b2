"""A posterior read as a system of regions: which latents and units are whose, and what is noise of whom."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr

from pyrodyn.errors import CouplingError
from pyrodyn.linalg import square_roots
from pyrodyn.linalg.stationary import spectral_radius, stationary_covariance
from pyrodyn.posterior import FitWarning

GLOBAL = "global"
SHARED_INNOVATIONS = "shared innovations"
TOLERANCE = 1e-6  # of the process noise, between regions, before it counts as unexplained


@dataclass(frozen=True, eq=False)
class System:
    """The draws of a linear state model of several regions.

    Attributes
    ----------
    regions : list of str
        In order of their first latent, without the shared group.
    global_name : str
        The group of latents that all regions share; may have none.
    latents, units : dict from a name to ndarray of int
        Positions; ``latents`` has the shared group as well.
    unit : ndarray, (unit,)
        Labels.
    dynamics, process_noise, shared_noise : ndarray, (chain, draw, latent, latent)
        A, Q and :math:`\\Gamma\\Gamma^\\top`. In draws that are not stable, A is zero: results are blotted out by
        `blot`.
    covariance : ndarray, (chain, draw, latent, latent)
        The stationary one.
    loading : ndarray, (chain, draw, unit, latent)
    stable : ndarray of bool, (chain, draw)
    bin_width : float, seconds
    """

    regions: list[str]
    global_name: str
    latents: dict[str, np.ndarray]
    units: dict[str, np.ndarray]
    unit: np.ndarray
    dynamics: np.ndarray
    process_noise: np.ndarray
    shared_noise: np.ndarray
    covariance: np.ndarray
    loading: np.ndarray
    stable: np.ndarray
    bin_width: float

    @property
    def region_latents(self) -> list[np.ndarray]:
        return [self.latents[name] for name in self.regions]

    def block(self, matrix: np.ndarray, target: str, source: str) -> np.ndarray:
        return matrix[..., self.latents[target][:, None], self.latents[source]]

    def readout(self, region: str) -> np.ndarray:
        """Loading of a region's units on its own latents, (chain, draw, unit of the region, latent of the region)."""
        return self.loading[..., self.units[region][:, None], self.latents[region]]

    def blot(self, values: np.ndarray) -> np.ndarray:
        """Values (chain, draw, ...) with NaN in the draws that are not stable."""
        if self.stable.all():
            return values
        return np.where(self.stable[(...,) + (None,) * (values.ndim - 2)], values, np.nan)


class Places(NamedTuple):
    """Whose the latents and the units of a posterior are; see `System`."""

    regions: list[str]
    global_name: str
    latents: dict[str, np.ndarray]
    units: dict[str, np.ndarray]


def read_places(posterior: xr.DataTree) -> Places:
    """Whose the latents and the units are; see `coupling_graph` for what is raised."""
    draws = posterior["posterior"].to_dataset()
    global_name = str(draws.attrs.get("global_name", posterior.attrs.get("global_name", GLOBAL)))
    of_latent = _region_of_latents(draws)
    of_unit = _region_of_units(posterior, draws)
    latents = {name: np.flatnonzero(of_latent == name) for name in dict.fromkeys(of_latent.tolist())}
    regions = [name for name in latents if name != global_name]
    if len(regions) < 2:
        raise CouplingError(
            f"posterior: its latents belong to {', '.join(map(repr, regions)) or 'no region'}, and a graph needs two "
            "regions or more; name the units' regions in the recording"
        )
    units = {name: np.flatnonzero(of_unit == name) for name in regions}
    silent = [name for name in regions if not len(units[name])]
    if silent:
        raise CouplingError(
            f"posterior: region {', '.join(map(repr, silent))} has latents but no units; the units are of "
            f"{', '.join(map(repr, dict.fromkeys(of_unit.tolist())))}: give latents and units the same names of regions"
        )
    return Places(regions, global_name, latents, units)


def dynamics_of(posterior: xr.DataTree) -> xr.DataArray:
    """The dynamics of a posterior that has what `coupling_graph` needs; see there for what is raised."""
    if not isinstance(posterior, xr.DataTree) or "posterior" not in posterior.children:
        raise CouplingError(
            f"posterior: got {type(posterior).__name__} without a group 'posterior'; pass what fit or load returned"
        )
    draws = posterior["posterior"].to_dataset()
    lacking = [name for name in ("dynamics", "process_noise", "loading") if name not in draws]
    if lacking:
        raise CouplingError(
            f"posterior: has no {', '.join(map(repr, lacking))} among {', '.join(map(repr, draws.data_vars))}; "
            "coupling is read from linear dynamics (latent, latent_from): fit models.MultiRegionLDS"
        )
    return draws["dynamics"]


def read_system(posterior: xr.DataTree) -> System:
    """Regions and draws of a posterior; see `coupling_graph` for what it needs and what is raised."""
    held = dynamics_of(posterior)
    if "mode" in held.dims:
        raise CouplingError(
            f"posterior: its dynamics are those of {held.sizes['mode']} modes, each with a graph of its own; pass one "
            "of them, posterior.isel(mode=0)"
        )
    draws = posterior["posterior"].to_dataset()
    places = read_places(posterior)
    dynamics, noise = (_square(draws, name) for name in ("dynamics", "process_noise"))
    shared = np.zeros_like(noise)
    if "innovation_loading" in draws:
        shared_loading = draws["innovation_loading"].transpose("chain", "draw", "latent", ...).values.astype(float)
        shared = shared_loading @ np.swapaxes(shared_loading, -1, -2)
    _check_noise(noise - shared, places.latents)
    stable = spectral_radius(torch.from_numpy(dynamics)).numpy() < 1.0
    stable &= np.isfinite(dynamics).all((-2, -1))
    if not stable.all():
        _complain(stable)
        dynamics = np.where(stable[..., None, None], dynamics, 0.0)
    return System(
        *places,
        draws["unit"].values,
        dynamics,
        noise,
        shared,
        stationary_covariance(torch.from_numpy(dynamics), torch.from_numpy(noise)).numpy(),
        draws["loading"].transpose("chain", "draw", "unit", "latent").values.astype(float),
        stable,
        _bin_width(posterior),
    )


def aligned_dynamics(posterior: xr.DataTree) -> xr.DataArray:
    r"""Draws of the dynamics between latents of unit covariance, in one set of coordinates.

    .. math:: R_r^\top \Sigma_r^{-1/2} A_{rs} \Sigma_s^{1/2} R_s

    with rotations :math:`R_r` that bring the loading :math:`C_r \Sigma_r^{1/2} R_r` of every draw as near as possible
    to that of the last one, whose columns are its principal axes (orthogonal Procrustes). An average of draws then
    means something whatever coordinates each draw came in.

    Parameters
    ----------
    posterior : xarray.DataTree

    Returns
    -------
    xarray.DataArray, (chain, draw, latent, latent_from)
        With the coordinates ``latent_region`` (latent) and ``latent_from_region`` (latent_from). NaN in draws that are
        not stable.

    References
    ----------
    Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika, 1966.
    """
    system = read_system(posterior)
    lead, size = system.dynamics.shape[:2], system.dynamics.shape[-1]
    forward, backward = np.zeros_like(system.dynamics), np.zeros_like(system.dynamics)
    last = tuple(np.argwhere(system.stable)[-1])
    of_latent = np.empty(size, dtype=object)
    for name, own in system.latents.items():
        of_latent[own] = name
        root, inverse = roots(system.block(system.covariance, name, name))
        shown = slice(None) if name == system.global_name else system.units[name]
        scaled = system.loading[..., shown, :][..., own] @ root
        axes, lengths, _ = np.linalg.svd(scaled[last], full_matrices=False)
        reference = np.zeros_like(scaled[last])
        reference[:, : axes.shape[1]] = axes * lengths
        reference *= np.where(reference.sum(0) < 0.0, -1.0, 1.0)
        left, _, right = np.linalg.svd(np.swapaxes(scaled, -1, -2) @ reference)
        turn = left @ right
        forward[..., own[:, None], own] = root @ turn
        backward[..., own[:, None], own] = np.swapaxes(turn, -1, -2) @ inverse
    order = np.concatenate([system.latents[name] for name in (*system.regions, *_shared(system))])
    values = (backward @ system.dynamics @ forward)[..., order[:, None], order]
    names = of_latent[order].astype(str)
    return xr.DataArray(
        system.blot(values),
        dims=("chain", "draw", "latent", "latent_from"),
        coords={
            "chain": posterior["posterior"]["chain"].values
            if "chain" in posterior["posterior"]
            else np.arange(lead[0]),
            "draw": posterior["posterior"]["draw"].values if "draw" in posterior["posterior"] else np.arange(lead[1]),
            "latent_region": ("latent", names),
            "latent_from_region": ("latent_from", names),
        },
        name="dynamics",
    )


def roots(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric square root and its inverse, (..., latent, latent)."""
    root, inverse = square_roots(torch.from_numpy(covariance))
    return root.numpy(), inverse.numpy()


def known_regions(what: str, asked: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names of regions that are not there."""
    for name in asked:
        if name not in known:
            raise CouplingError(f"{what}: there is no region {name!r}; the graph has {', '.join(map(repr, known))}")


def _shared(system: System) -> tuple[str, ...]:
    return (system.global_name,) if system.global_name in system.latents else ()


def _region_of_latents(draws: xr.Dataset) -> np.ndarray:
    if "latent_region" in draws.coords:
        return draws["latent_region"].values.astype(str)
    labels = draws["latent"].values.tolist() if "latent" in draws.coords else []
    if not labels or not all(isinstance(label, str) and ":" in label for label in labels):
        raise CouplingError(
            "posterior: does not say whose its latents are; expected the coordinate 'latent_region' (latent), or "
            "labels such as 'V1:0', as models.MultiRegionLDS writes them"
        )
    return np.array([str(label).rpartition(":")[0] for label in labels])


def _region_of_units(posterior: xr.DataTree, draws: xr.Dataset) -> np.ndarray:
    places = [draws] + ([posterior["constant_data"].to_dataset()] if "constant_data" in posterior.children else [])
    for place in places:
        for name in ("unit_region", "region"):
            if name in place.variables and place[name].dims == ("unit",):
                found = place[name]
                if place is not draws and "unit" in place.coords and "unit" in draws.coords:
                    found = found.sel(unit=draws["unit"].values)
                return found.values.astype(str)
    raise CouplingError(
        "posterior: does not say in which region its units lie; expected the coordinate 'region' (unit): name the "
        "regions in the recording, as in Recording.from_arrays(..., region=[...])"
    )


def _square(draws: xr.Dataset, name: str) -> np.ndarray:
    return draws[name].transpose("chain", "draw", "latent", "latent_from").values.astype(float)


def _check_noise(own: np.ndarray, latents: dict[str, np.ndarray]) -> None:
    between = np.ones(own.shape[-2:], dtype=bool)
    for positions in latents.values():
        between[positions[:, None], positions] = False
    largest = np.abs(own[..., between]).max(initial=0.0)
    if largest > TOLERANCE * np.abs(own).max():
        raise CouplingError(
            f"posterior: process_noise has a covariance of {largest:.2g} between regions that innovation_loading does "
            "not account for; expected a block-diagonal own part plus innovation_loading times its transpose"
        )


def _complain(stable: np.ndarray) -> None:
    wild = int((~stable).sum())
    if wild == stable.size:
        raise CouplingError(
            f"posterior: the dynamics of none of its {stable.size} draws are stable, so no stationary covariance "
            "exists against which coupling could be measured; expected a spectral radius below one: fit again, for "
            "longer"
        )
    warnings.warn(
        f"the dynamics of {wild} of {stable.size} draws are not stable; the graph is NaN there and summaries leave "
        "them out",
        FitWarning,
        stacklevel=4,
    )


def _bin_width(posterior: xr.DataTree) -> float:
    places = [posterior.attrs]
    if "constant_data" in posterior.children:
        places.insert(0, posterior["constant_data"].attrs)
    for attributes in places:
        if "bin_width" in attributes:
            return float(attributes["bin_width"])
    raise CouplingError(
        "posterior: its attributes lack 'bin_width' in seconds, without which lags and frequencies have no units; "
        "expected it in constant_data, where fit puts it"
    )
