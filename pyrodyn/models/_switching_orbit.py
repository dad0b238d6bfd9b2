r"""Moves along what observations cannot tell: the latents' coordinates, and all that is written in them, together.

Under :math:`x \mapsto G x + s` with everything else following, the likelihood stays as it is, and only the priors know
one place of the orbit from another. Without such moves path and loading would hold each other where they are. The
measure along the orbit is that of Liu & Sabatti, Biometrika 87:353 (2000).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrodyn.conditionals.metropolis import acceptance_of
from pyrodyn.linalg.matrix import cholesky
from pyrodyn.models._switching_moves import State

if TYPE_CHECKING:
    from pyrodyn.models._switching_sweep import SwitchingSweep

STRETCHES = 10  # proposals of a sweep: they need no pass over the data
GOAL = 0.3  # acceptance of a stretch


def reshape_latents(sweep: SwitchingSweep, state: State, adapt: bool) -> None:
    """Random linear maps of every region's latents, near the identity."""
    prior, dim = sweep.prior, sweep.prior.latent_dim
    chains = len(state["path"])
    first = state["path"][:, :, 0]
    second = first.mT @ first  # of the bins whose prior the map changes
    total = torch.eye(dim, dtype=torch.float64).repeat(chains, 1, 1)
    held = {name: state[name] for name in _MOVED if name in state}
    value = _log_prior(sweep, held, state, second)
    within, grows, rates = prior.blocks.within, _growth(sweep, state), []
    for _ in range(STRETCHES):
        step = state["stretch_step"][:, None, None] * torch.randn(chains, dim, dim, dtype=torch.float64) * within
        change, log_det = torch.linalg.matrix_exp(step), step.diagonal(dim1=-2, dim2=-1)
        ahead, ahead_second = _mapped(held, change, dim), change @ second @ change.mT
        gained = _log_prior(sweep, ahead, state, ahead_second)
        acceptance = acceptance_of(gained - value + log_det @ grows)
        accepted = torch.rand(chains, dtype=torch.float64) < acceptance

        def chosen(new: Tensor, old: Tensor, accepted: Tensor = accepted) -> Tensor:
            return torch.where(accepted.reshape(-1, *(1,) * (old.dim() - 1)), new, old)

        held = {name: chosen(ahead[name], old) for name, old in held.items()}
        second, value = chosen(ahead_second, second), chosen(gained, value)
        total = chosen(change @ total, total)
        rates.append(acceptance)
    rate = torch.stack(rates).mean(0)
    if adapt:
        state["stretch_step"] = (state["stretch_step"] * (0.5 * (rate - GOAL)).exp()).clamp(1e-4, 1.0)
    state["stretch_acceptance"] = rate
    state["path"] = state["path"] @ total.mT.unsqueeze(1)
    state |= held


_MOVED = ("dynamics", "bias", "process_noise", "input_gain", "loading", "slopes")


def _growth(sweep: SwitchingSweep, state: State) -> Tensor:
    """Powers of every region's :math:`|\\det G_r|` by which the measure grows, written at each of its latents."""
    prior, trials = sweep.prior, state["path"].shape[1]
    modes, blocks = prior.modes, prior.blocks
    grows = torch.empty(prior.latent_dim, dtype=torch.float64)
    for r, (place, dim, view) in enumerate(zip(blocks.places, blocks.dims, sweep.views, strict=True)):
        # First bins, biases and inputs' gains of all modes, and their process noise.
        power = trials + modes * (1 + prior.num_inputs) + modes * (dim + 1)
        # Less loadings and slopes of logits; blocks into the region grow by its map, and those out of it shrink.
        power -= len(view.units) + (modes - 1) * ("slopes" in state)
        power += modes * sum(blocks.dims[source] for target, source in blocks.edges if target == r)
        grows[place] = power - modes * sum(blocks.dims[target] for target, source in blocks.edges if source == r)
    return grows


def _mapped(held: State, change: Tensor, dim: int) -> State:
    """All that is written in latents ``G x``."""
    inverse, of_modes = torch.linalg.inv(change), change.unsqueeze(1)
    noise = of_modes @ held["process_noise"] @ of_modes.mT
    found = {
        "dynamics": of_modes @ held["dynamics"] @ inverse.unsqueeze(1),
        "bias": held["bias"] @ change.mT,
        "process_noise": 0.5 * (noise + noise.mT),
        "loading": held["loading"] @ inverse,
    }
    if "input_gain" in held:
        found["input_gain"] = of_modes @ held["input_gain"]
    if "slopes" in held:
        slopes = held["slopes"]
        found["slopes"] = torch.cat([slopes[..., :dim] @ inverse, slopes[..., dim:]], -1)
    return found


def _log_prior(sweep: SwitchingSweep, held: State, state: State, second: Tensor) -> Tensor:
    """Log prior (chain,) of what a map of the latents moves, and of the first bins with second moments ``second``."""
    prior = sweep.prior
    found = prior.log_dynamics(held["dynamics"]).sum(-1)
    found = found - 0.5 * second.diagonal(dim1=-2, dim2=-1).sum(-1)
    found = found - 0.5 * (held["bias"] / prior.bias_scale).square().sum((-2, -1))
    if "input_gain" in held:
        found = found - 0.5 * (held["input_gain"] * sweep.moves.input_scale / prior.bias_scale).square().sum(
            (-3, -2, -1)
        )
    found = found - 0.5 * (held["loading"] / sweep.loading_scale).square().sum((-2, -1))
    precision = torch.linalg.inv(held["process_noise"])
    trace = precision.diagonal(dim1=-2, dim2=-1).sum((-2, -1))
    found = found - 0.5 * state["process_scale"] * trace
    for place, _, _, _, degrees in sweep.moves.regressions:
        log_det = torch.linalg.slogdet(held["process_noise"][..., place, place])[1]
        found = found - 0.5 * (degrees + place.stop - place.start + 1.0) * log_det.sum(-1)
    if "slopes" in held:
        found = found - 0.5 * held["slopes"].square().sum((-2, -1)) / state["recurrence_variance"]
    return found


def shift_latents(sweep: SwitchingSweep, state: State) -> None:
    """A shift s of the latents, from its conditional, which is normal."""
    prior, dim = sweep.prior, sweep.prior.latent_dim
    eye = torch.eye(dim, dtype=torch.float64)
    first, loading = state["path"][:, :, 0], state["loading"]
    pulled = eye - state["dynamics"]  # b + (I - A) s
    weight = sweep.offset_prior.variance.reciprocal()
    flat = pulled.flatten(1, 2)
    hessian = first.shape[1] * eye + flat.mT @ flat / prior.bias_scale**2 + (loading.mT * weight) @ loading
    apart = (state["offset"] - sweep.offset_prior.mean) * weight
    slope = (
        (apart.unsqueeze(-2) @ loading).squeeze(-2)
        - first.sum(1)
        - (state["bias"].flatten(1).unsqueeze(-2) @ flat).squeeze(-2) / prior.bias_scale**2
    )
    if "slopes" in state:  # the borders between modes go along
        slopes, weight = state["slopes"][..., :dim], state["recurrence_variance"].reciprocal().unsqueeze(-1)
        hessian = hessian + weight.unsqueeze(-1) * slopes.mT @ slopes
        slope = slope + weight * (slopes.mT @ state["slopes"][..., -1:]).squeeze(-1)
    root = cholesky(hessian)
    noise = torch.linalg.solve_triangular(root.mT, torch.randn_like(slope).unsqueeze(-1), upper=True).squeeze(-1)
    shift = torch.cholesky_solve(slope.unsqueeze(-1), root).squeeze(-1) + noise
    if "slopes" in state:
        slopes = state["slopes"]
        border = slopes[..., -1:] - slopes[..., :dim] @ shift.unsqueeze(-1)
        state["slopes"] = torch.cat([slopes[..., :-1], border], -1)
    state["path"] = state["path"] + shift[:, None, None]
    state["bias"] = state["bias"] + (pulled @ shift[:, None, :, None]).squeeze(-1)
    state["offset"] = state["offset"] - (loading @ shift.unsqueeze(-1)).squeeze(-1)
