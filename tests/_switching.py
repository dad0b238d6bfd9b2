"""Small switching systems, and the sum over all paths of modes that judges them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyrodyn.distributions import SwitchingPath


def law(
    seed: int = 0,
    *,
    lead: tuple[int, ...] = (),
    modes: int = 2,
    bins: int = 8,
    latent: int = 2,
    lags: int = 1,
    recurrent: bool = False,
    inputs: bool = False,
    trials: int = 1,
    inside: Tensor | None = None,
) -> SwitchingPath:
    """A law with batch (*lead, 1) that keeps the broadcast rule; with ``inputs``, (*lead, trial)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, lead: tuple[int, ...] = (*lead, 1)) -> Tensor:
        return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)

    def covariance(*shape: int) -> Tensor:
        root = 0.4 * normal(*shape, latent, latent)
        return root @ root.mT + 0.3 * torch.eye(latent, dtype=torch.float64)

    return SwitchingPath(
        torch.log_softmax(normal(modes), -1),
        torch.log_softmax(normal(modes, modes), -1),
        0.5 * normal(modes, latent, lags * latent),
        normal(bins - 1, modes, latent, lead=(*lead, trials)) if inputs else normal(1, modes, latent),
        covariance(modes),
        normal(latent),
        covariance(),
        num_bins=bins,
        recurrence=normal(modes, latent) if recurrent else None,
        push=normal(bins - 1, modes, lead=(*lead, trials)) if inputs else None,
        inside=inside,
    )


def enumerate_modes(found: SwitchingPath, path: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    """Every path of modes and its log density together with the ``path`` (time, latent); a law without draws."""
    bins = len(path)
    lags = found.lags
    start = MultivariateNormal(found.start_mean.squeeze(0), found.start_covariance.squeeze(0))
    whole = found.drift.squeeze(0).expand(bins - 1, -1, -1)
    sequences = list(itertools.product(range(found.num_modes), repeat=bins))
    weights = []
    for modes in sequences:
        weight = found.initial[0, modes[0]] + start.log_prob(path[:lags]).sum()
        for t in range(1, bins):
            logit = found.transition[0, modes[t - 1]]
            if found.recurrence is not None:
                logit = logit + found.recurrence[0] @ path[t - 1]
            if found.push is not None:
                logit = logit + found.push[0, t - 1]
            weight = weight + torch.log_softmax(logit, 0)[modes[t]]
            if t >= lags:
                past = torch.cat([path[t - 1 - lag] for lag in range(lags)])
                mean = found.dynamics[0, modes[t]] @ past + whole[t - 1, modes[t]]
                weight = weight + MultivariateNormal(mean, found.process_noise[0, modes[t]]).log_prob(path[t])
        weights.append(weight)
    return sequences, torch.stack(weights)


def marginals(sequences: list[tuple[int, ...]], weights: Tensor, modes: int) -> Tensor:
    """Probabilities (time, mode) of the modes from all their paths."""
    chosen = torch.nn.functional.one_hot(torch.tensor(sequences), modes).to(weights.dtype)
    return torch.einsum("p,ptk->tk", torch.softmax(weights, 0), chosen)
