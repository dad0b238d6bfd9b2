"""What a posterior of several regions is labelled with, and its quantities that no symmetry changes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

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
    owner = [names[r] for r in layout.group[: layout.regional].tolist()] + common
    labels = [f"{name}:{owner[:i].count(name)}" for i, name in enumerate(owner)]
    sources = [*names, *dict.fromkeys(common)] + ["shared"] * bool(model.shared_innovations)
    return {
        "latent": labels,
        "latent_from": labels,
        "latent_region": ("latent", [GLOBAL if name == LEVEL else name for name in owner]),
        "regional_latent": labels[: layout.regional],
        "target": names,
        "source": names,
        "share_source": sources,
        "condition": list(model.conditions) or ["all"],
    }


def attributes(model: MultiRegionLDS, recording: Recording) -> dict[str, Any]:
    prior, layout = model.network_prior(recording), model.layout(recording)
    sd = [[1.0] * layout.num_regions for _ in range(layout.num_regions)]
    probability = [[1.0] * layout.num_regions for _ in range(layout.num_regions)]
    matrix = layout.matrix(prior.sd_entry)
    for i, (target, source) in enumerate(layout.edges):
        sd[target][source] = float(matrix[layout.places[target].start, layout.places[source].start])
        probability[target][source] = float(prior.probability[i])
    return {
        "edge_prior": model.edge_prior,
        "edge_prior_sd": json.dumps(sd),
        "edge_prior_probability": json.dumps(probability),
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
