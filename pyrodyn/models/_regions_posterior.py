"""What a posterior of several regions is labelled with, and its quantities that no symmetry changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrodyn.linalg.stationary import (
    block_strength,
    noise_by_group,
    spectral_radius,
    stationary_covariance,
    variance_shares,
)
from pyrodyn.models._regions import GLOBAL, LEVEL, MultiRegionParameters
from pyrodyn.models._symmetry import rotation
from pyrodyn.program import Labelled
from pyrodyn.recording import Recording

if TYPE_CHECKING:
    from pyrodyn.models.multi_region_lds import MultiRegionLDS


def coordinates(model: MultiRegionLDS, recording: Recording) -> dict[str, Any]:
    layout = model.layout(recording)
    names = [name for name, _, _ in model.regions(recording)]
    common = [GLOBAL] * layout.num_globals + [LEVEL] * layout.level
    found = region_coordinates(names, layout.dims, common)
    sources = [*names, *dict.fromkeys(common)] + ["shared"] * bool(model.shared_innovations)
    return found | {
        "regional_latent": found["latent"][: layout.regional],
        "share_source": sources,
        "condition": list(model.conditions) or ["all"],
    }


def region_coordinates(names: Sequence[str], dims: Sequence[int], common: Sequence[str] = ()) -> dict[str, Any]:
    """Names of latents, and of regions as targets and sources; ``common`` are the latents of no region."""
    owner = [name for name, dim in zip(names, dims, strict=True) for _ in range(dim)] + list(common)
    labels = [f"{name}:{owner[:i].count(name)}" for i, name in enumerate(owner)]
    return {
        "latent": labels,
        "latent_from": labels,
        "latent_region": ("latent", [GLOBAL if name == LEVEL else name for name in owner]),
        "target": list(names),
        "source": list(names),
    }


def attributes(model: MultiRegionLDS, recording: Recording) -> dict[str, Any]:
    prior, layout = model.network_prior(recording), model.layout(recording)
    found = edge_attributes(layout.edges, layout.matrix(prior.sd_entry), layout.places, prior.probability.tolist())
    return {"edge_prior": model.edge_prior} | found


def edge_attributes(
    edges: Sequence[tuple[int, int]], sd: Tensor, places: Sequence[slice], probability: Sequence[float]
) -> dict[str, Any]:
    """Standard deviation of the entries, from that of all entries (latent, latent), and probability of each edge."""
    of_entries, of_edges = ([[1.0] * len(places) for _ in places] for _ in range(2))
    for (target, source), share in zip(edges, probability, strict=True):
        of_entries[target][source] = float(sd[places[target].start, places[source].start])
        of_edges[target][source] = float(share)
    return {
        "edge_prior_sd": json.dumps(of_entries),
        "edge_prior_probability": json.dumps(of_edges),
        "global_name": GLOBAL,
    }


def invariants(model: MultiRegionLDS, parameters: MultiRegionParameters) -> Labelled:
    layout = model.layout_of(parameters)
    with torch.no_grad():
        dynamics, loading = parameters.dynamics, parameters.loading
        noise = model.process_noise(parameters, layout)
        covariance = stationary_covariance(dynamics, noise)
        signal = ((loading @ covariance) * loading).sum(-1).clamp(min=0.0).sqrt()
        moved = dynamics @ covariance
        ahead = loading @ moved
        lagged = (ahead * loading).sum(-1)
        turned = ((ahead - loading @ moved.mT) * loading.roll(-1, -2)).sum(-1)
        noises = noise_by_group(model.own_noise(parameters, layout), layout.origins)
        if parameters.innovation_loading is not None:
            common = parameters.innovation_loading @ parameters.innovation_loading.mT
            noises = torch.cat([noises, common.unsqueeze(-3)], -3)
        shares = variance_shares(dynamics, noises, layout.places)
    found: Labelled = {
        "coupling_strength": (("target", "source"), block_strength(dynamics, covariance, layout.places)),
        "presence": (("target", "source"), layout.presence(dynamics).to(dynamics.dtype)),
        "variance_share": (("target", "share_source"), shares),
        "spectral_radius": ((), spectral_radius(dynamics[..., : layout.regional, : layout.regional])),
        "signal_sd": (("unit",), signal),
        "lag_one_covariance": (("unit",), lagged),
        "lag_one_asymmetry": (("unit",), turned),
        "offset": (("unit",), parameters.offset),
    }
    if layout.num_globals:
        persistence = dynamics.diagonal(dim1=-2, dim2=-1)[..., layout.regional : layout.regional + layout.num_globals]
        found["global_persistence"] = (("global",), persistence.sort(-1, descending=True).values)
    if model.readout.noise_name is not None and parameters.noise is not None:
        found[model.readout.noise_name] = (("unit",), parameters.noise)
    regional = loading[..., : layout.regional]
    start = (loading.square() * parameters.initial_variance.unsqueeze(-2)).sum(-1).sqrt()
    found["initial_signal_sd"] = (("unit",), start)
    if parameters.input_gain is not None:
        found["input_effect"] = (("unit", "input"), regional @ parameters.input_gain)
    if parameters.time_locked is not None:
        effect = (regional @ parameters.time_locked.flatten(-2)).unflatten(-1, parameters.time_locked.shape[-2:])
        found["time_locked_effect"] = (("unit", "condition", "bump"), effect)
    return found


def transformed(
    model: MultiRegionLDS, parameters: MultiRegionParameters, recording: Recording, seed: int
) -> MultiRegionParameters:
    """Turn each region's latents, reflect the common ones, and turn the shared innovations."""
    layout = model.layout(recording)
    generator = torch.Generator().manual_seed(seed)

    signs = 1.0 - 2.0 * torch.randint(2, (layout.size - layout.regional, 1, 1), generator=generator).double()
    turn = torch.block_diag(*(rotation(dim, generator) for dim in layout.dims), *signs).to(recording.scale.device)
    regional = turn[: layout.regional, : layout.regional]
    gain, locked, shared = parameters.input_gain, parameters.time_locked, parameters.innovation_loading
    return parameters._replace(
        dynamics=turn @ parameters.dynamics @ turn.mT,
        innovation_loading=None if shared is None else turn @ shared @ rotation(shared.shape[-1], generator).to(turn),
        loading=parameters.loading @ turn.mT,
        input_gain=None if gain is None else regional @ gain,
        time_locked=None if locked is None else torch.einsum("ij,...jcb->...icb", regional, locked),
    )
