"""A posterior of several regions without a fit: systems drawn at random, and maps of their latent coordinates."""

from __future__ import annotations

import numpy as np
import xarray as xr

BIN = 0.02
DIMS = {"V1": 3, "LM": 2, "PM": 1}
UNITS = {"V1": 5, "LM": 4, "PM": 3}


def of_regions(dims: dict[str, int] = DIMS, shared: int = 1) -> np.ndarray:
    sizes = {**dims, "global": shared}
    return np.repeat(list(sizes), list(sizes.values()))


def random_posterior(
    seed: int = 0,
    chains: int = 2,
    draws: int = 15,
    dims: dict[str, int] = DIMS,
    shared: int = 1,
    innovations: int = 1,
    absent: tuple[tuple[str, str], ...] = (),
    spread: float = 0.15,
) -> xr.DataTree:
    """Stable random systems that scatter about one; ``absent`` edges (source, target) are zero.

    Innovations reach the regions only; the rows of the global have no region columns.
    """
    rng = np.random.default_rng(seed)
    region = of_regions(dims, shared)
    size, unit_region = len(region), np.repeat(list(dims), [UNITS.get(name, 3) for name in dims])
    lead = (chains, draws)

    def about(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) + spread * rng.normal(size=(*lead, *shape))

    is_shared = region == "global"
    dynamics = about(size, size)
    dynamics[..., is_shared[:, None] & ~is_shared] = 0.0
    for source, target in absent:
        dynamics[..., (region == target)[:, None] & (region == source)] = 0.0
    dynamics *= (0.9 / np.abs(np.linalg.eigvals(dynamics)).max(-1))[..., None, None]
    factor = about(size, size)
    own = factor @ np.swapaxes(factor, -1, -2) / size + 0.2 * np.eye(size)
    own = own * (region[:, None] == region)
    gamma = about(size, innovations) * (~is_shared)[:, None]
    loading = about(len(unit_region), size) + 0.5
    loading[..., (unit_region[:, None] != region) & ~is_shared] = 0.0
    counter = {name: iter(range(size)) for name in {*dims, "global"}}
    values = {
        "dynamics": (("chain", "draw", "latent", "latent_from"), dynamics),
        "process_noise": (("chain", "draw", "latent", "latent_from"), own + gamma @ np.swapaxes(gamma, -1, -2)),
        "innovation_loading": (("chain", "draw", "latent", "shared"), gamma),
        "loading": (("chain", "draw", "unit", "latent"), loading),
    }
    coords = {
        "chain": np.arange(chains),
        "draw": np.arange(draws),
        "latent": [f"{name}:{next(counter[name])}" for name in region],
        "latent_region": ("latent", region),
        "unit": [f"u{i}" for i in range(len(unit_region))],
        "region": ("unit", unit_region),
    }
    constant = xr.Dataset(coords={"unit": coords["unit"]}, attrs={"bin_width": BIN})
    return xr.DataTree.from_dict({"posterior": xr.Dataset(values, coords=coords), "constant_data": constant})


def changed(posterior: xr.DataTree, **variables: np.ndarray) -> xr.DataTree:
    """The posterior with other values of some variables."""
    dataset = posterior["posterior"].to_dataset()
    for name, values in variables.items():
        dataset[name] = dataset[name].copy(data=values)
    return with_posterior(posterior, dataset)


def with_posterior(posterior: xr.DataTree, dataset: xr.Dataset) -> xr.DataTree:
    groups = {name: child.to_dataset() for name, child in posterior.children.items()} | {"posterior": dataset}
    built = xr.DataTree.from_dict(groups)
    built.attrs = dict(posterior.attrs)
    return built


def with_presence(posterior: xr.DataTree, probability: dict[tuple[str, str], float], seed: int = 0) -> xr.DataTree:
    """The posterior with draws of presence (target, source), other edges present, the blocks of absent ones zero."""
    rng = np.random.default_rng(seed)
    dataset = posterior["posterior"].to_dataset()
    region = dataset["latent_region"].values
    names = [name for name in dict.fromkeys(region.tolist()) if name != "global"]
    lead = (dataset.sizes["chain"], dataset.sizes["draw"])
    presence = np.ones((*lead, len(names), len(names)), dtype=int)
    dynamics = dataset["dynamics"].values.copy()
    for (source, target), p in probability.items():
        there = rng.uniform(size=lead) < p
        presence[..., names.index(target), names.index(source)] = there
        dynamics[..., (region == target)[:, None] & (region == source)] *= there[..., None]
    dims = ("chain", "draw", "target", "source")
    dataset = dataset.assign(presence=(dims, presence)).assign_coords(target=names, source=names)
    dynamics *= (0.9 / np.abs(np.linalg.eigvals(dynamics)).max(-1))[..., None, None]
    return changed(with_posterior(posterior, dataset), dynamics=dynamics)


def mapped(posterior: xr.DataTree, seed: int = 1) -> xr.DataTree:
    """Every draw in other latent coordinates: maps of condition up to four, drawn for each region and the global."""
    rng = np.random.default_rng(seed)
    held = posterior["posterior"].to_dataset()
    region = held["latent_region"].values
    shape = held["dynamics"].shape
    maps, back = np.zeros(shape), np.zeros(shape)
    for name in dict.fromkeys(region.tolist()):
        own = np.flatnonzero(region == name)
        left, _, right = np.linalg.svd(rng.normal(size=(*shape[:2], len(own), len(own))))
        scales = rng.uniform(0.5, 2.0, size=(*shape[:2], 1, len(own)))
        maps[..., own[:, None], own] = left * scales @ right
        back[..., own[:, None], own] = np.swapaxes(left / scales @ right, -1, -2)
    turned = {
        "dynamics": maps @ held["dynamics"].values @ back,
        "process_noise": maps @ held["process_noise"].values @ np.swapaxes(maps, -1, -2),
        "loading": held["loading"].values @ back,
    }
    if "innovation_loading" in held:
        turned["innovation_loading"] = maps @ held["innovation_loading"].values
    return changed(posterior, **turned)
