"""What one draw's blocks say of each edge, in numbers that no change of latent coordinates alters."""

from __future__ import annotations

import numpy as np
import torch

from pyrodyn.coupling.system import System, roots
from pyrodyn.linalg import stationary
from pyrodyn.linalg.stationary import noise_by_group


def variance_shares(system: System) -> np.ndarray:
    """Share of each region's variance that comes from the noise of each origin, (chain, draw, target, origin).

    Origins: the regions, the shared latents, the shared innovations; see `pyrodyn.linalg.stationary.variance_shares`.
    """
    shared = torch.from_numpy(system.shared_noise)
    none = torch.empty(0, dtype=torch.long)
    places = [torch.from_numpy(own) for own in system.region_latents]
    common = system.latents.get(system.global_name)
    own = noise_by_group(
        torch.from_numpy(system.process_noise) - shared,
        [*places, none if common is None else torch.from_numpy(common)],
    )
    noises = torch.cat([own, shared.unsqueeze(-3)], -3)
    return stationary.variance_shares(torch.from_numpy(system.dynamics), noises, places).numpy()


def blocks(system: System) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    r"""Strength, singular values and communication subspace of every block.

    .. math::
        B_{rs} = \Sigma_r^{-1/2} A_{rs} \Sigma_s^{1/2} = \sum_k \sigma_k u_k v_k^\top, \qquad
        \mathrm{strength} = \lVert B_{rs} \rVert_F = \Big(\sum_k \sigma_k^2\Big)^{1/2}

    The singular vectors are shown in the readout, where they are patterns over units: channel k listens to the source's
    pattern :math:`C_s \Sigma_s^{1/2} v_k` and writes the target's pattern :math:`C_r \Sigma_r^{1/2} u_k`, each for one
    standard deviation. The sign is the one that makes the source's pattern sum to a positive number.

    Returns
    -------
    strength : ndarray, (chain, draw, target, source)
    singular_values : ndarray, (chain, draw, target, source, rank)
        Falling; NaN beyond the rank that two regions' dimensions allow.
    source_pattern : ndarray, (chain, draw, target, rank, unit)
        At a unit of region s: the pattern of the edge from s into the target.
    target_pattern : ndarray, (chain, draw, source, rank, unit)
        At a unit of region r: the pattern of the edge from the source into r.

    References
    ----------
    Semedo, Zandvakili, Machens, Yu & Kohn, "Cortical areas interact through a communication subspace", Neuron, 2019.
    """
    lead, count = system.dynamics.shape[:2], len(system.regions)
    rank = max(len(own) for own in system.region_latents)
    strength = stationary.block_strength(
        torch.from_numpy(system.dynamics),
        torch.from_numpy(system.covariance),
        [torch.from_numpy(own) for own in system.region_latents],
    ).numpy()
    values = np.full((*lead, count, count, rank), np.nan)
    shape = (*lead, count, rank, len(system.unit))
    source_pattern, target_pattern = np.full(shape, np.nan), np.full(shape, np.nan)
    scales = [roots(system.block(system.covariance, name, name)) for name in system.regions]
    readouts = [system.readout(name) @ root for name, (root, _) in zip(system.regions, scales, strict=True)]
    for r, target in enumerate(system.regions):
        for s, source in enumerate(system.regions):
            block = scales[r][1] @ system.block(system.dynamics, target, source) @ scales[s][0]
            left, found, right = np.linalg.svd(block, full_matrices=False)
            size = found.shape[-1]
            values[..., r, s, :size] = found
            sent = readouts[s] @ np.swapaxes(right, -1, -2)
            sign = np.where(sent.sum(-2, keepdims=True) < 0.0, -1.0, 1.0)
            sent, received = sent * sign, readouts[r] @ left * sign
            # An empty channel has no direction: an absent edge's would be noise of the decomposition.
            empty = found[..., None, :] == 0.0
            sent, received = np.where(empty, np.nan, sent), np.where(empty, np.nan, received)
            source_pattern[..., r, :size, system.units[source]] = np.moveaxis(sent, -2, 0)
            target_pattern[..., s, :size, system.units[target]] = np.moveaxis(received, -2, 0)
    return strength, values, source_pattern, target_pattern


def impulse_responses(system: System, lags: int) -> tuple[np.ndarray, np.ndarray]:
    r"""Response of a target's mean readout to a kick of the source's, direct and through all paths.

    The kick moves the source's latent as it moves, on average, when the mean of its units' linear predictors goes up by
    one standard deviation; the response is that of the mean of the target's units:

    .. math::
        g_s = \frac{\Sigma_s c_s}{\sqrt{c_s^\top \Sigma_s c_s}}, \qquad
        h_{rs}(k) = c_r^\top (A^k)_{rs} g_s, \qquad c_r = C_r^\top 1 / n_r .

    For the direct response, every block of A but the two regions' own and the edge from s into r is set to zero.

    Parameters
    ----------
    system : System
    lags : int
        Bins.

    Returns
    -------
    direct, total : ndarray, (chain, draw, target, source, lag)
        Lags 1, 2, ... bins; in units of the linear predictor (log rate for Poisson). NaN where the source's mean
        readout never moves.
    """
    lead, count = system.dynamics.shape[:2], len(system.regions)
    means = [system.readout(name).mean(-2)[..., None] for name in system.regions]  # (chain, draw, latent, 1)
    direct = np.empty((*lead, count, count, lags))
    total = np.empty((*lead, count, count, lags))
    for s, source in enumerate(system.regions):
        moved = system.block(system.covariance, source, source) @ means[s]
        with np.errstate(invalid="ignore"):
            kick = moved / np.sqrt((means[s] * moved).sum(-2, keepdims=True))
        state = np.zeros((*lead, system.dynamics.shape[-1], 1))
        state[..., system.latents[source], :] = kick
        alone = {name: np.zeros_like(mean) for name, mean in zip(system.regions, means, strict=True)}
        alone[source] = kick
        for lag in range(lags):
            state = system.dynamics @ state
            before = alone[source]
            for r, target in enumerate(system.regions):
                ahead = system.block(system.dynamics, target, target) @ alone[target]
                if target != source:
                    ahead = ahead + system.block(system.dynamics, target, source) @ before
                alone[target] = ahead
                direct[..., r, s, lag] = (means[r] * ahead).sum((-2, -1))
                total[..., r, s, lag] = (means[r] * state[..., system.latents[target], :]).sum((-2, -1))
    return direct, total
