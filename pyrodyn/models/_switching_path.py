r"""The path of switching dynamics given modes and parameters: exactly where it is Gaussian, block by block where not.

What is not Gaussian, counts and transitions that depend on the state, is expanded about a path that Newton's method
finds from a centre that the chain's present place does not enter; what is left over kicks Hamiltonian dynamics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrodyn.conditionals.paths import gaussian_path, turn
from pyrodyn.conditioning import outer
from pyrodyn.distributions import GaussMarkov
from pyrodyn.models._switching_moves import State
from pyrodyn.readouts import AffineReadout

if TYPE_CHECKING:
    from pyrodyn.models._switching_sweep import SwitchingSweep

NEWTON = 3  # expansions about the path, the last of which the move is made with
FARTHEST = 2.0  # that a predictor or a logit moves in one of them: exp() overshoots from afar
BLOCK = 100  # bins that are accepted together: of longer ones, too many are refused

Expansion = tuple[Tensor, Tensor, Tensor]  # value (chain, trial, time), slope (..., latent), curvature (..., latent^2)


def draw_path(sweep: SwitchingSweep, state: State) -> None:
    law = sweep.prior.path(sweep.moves.steps(state), sweep.recording)
    weight = torch.nn.functional.one_hot(state["modes"], sweep.prior.modes).to(torch.float64)
    chain = law.given_modes(weight)
    zeros = torch.zeros(*chain.batch_shape, *chain.event_shape, dtype=torch.float64)
    readout = sweep.readout(state, zeros)
    if sweep.model.readout.is_gaussian and "slopes" not in state:
        state["path"] = gaussian_path(chain, readout, sweep.seen(state))
        return
    expand = _expansion(sweep, state, readout, law.push)
    centre = state["centre"].repeat_interleave(len(zeros) // len(state["centre"]), 0)
    near, precision, linear = _settled(chain, expand, centre, readout)

    def rest(at: Tensor) -> tuple[Tensor, Tensor]:
        value, slope, _ = expand(at)
        pulled = (precision @ at.unsqueeze(-1)).squeeze(-1)
        return value - (at * (linear - 0.5 * pulled)).sum(-1), slope - linear + pulled

    state["path"], rate = turn(near, rest, state["path"], _blocks(sweep.recording.num_bins))
    state["path_acceptance"] = rate.mean(-1)


def _blocks(bins: int) -> Tensor | None:
    """The block of every bin, -1 where one ends: at another place each time, so that no bin stays for long."""
    if bins <= 1.5 * BLOCK:
        return None
    place = torch.arange(bins) + int(torch.randint(BLOCK, ()))
    return torch.where(place % BLOCK == 0, -1, place // BLOCK)


def _expansion(
    sweep: SwitchingSweep, state: State, readout: AffineReadout, push: Tensor | None
) -> Callable[[Tensor], Expansion]:
    """The log likelihood of observations and of modes as a function of the path, bin by bin."""
    observations = sweep.seen(state)
    if "slopes" in state:
        dim, modes = sweep.prior.latent_dim, sweep.prior.modes
        slopes = (sweep.prior.contrasts @ state["slopes"][..., :dim]).unsqueeze(1)
        before, after = state["modes"][..., :-1], state["modes"][..., 1:]
        rows = torch.gather(state["table"], 1, before.flatten(1).unsqueeze(-1).expand(-1, -1, modes))
        base = rows.unflatten(1, before.shape[1:])
        base = base if push is None else base + push
        counted = sweep.moves.inside[:, 1:].to(torch.float64)
        taken = torch.nn.functional.one_hot(after, modes)

    def expand(path: Tensor) -> Expansion:
        fit, score, curvature = readout.expand_bins(readout.predict(path), observations)
        slope, bend = score @ readout.loading, outer(readout, curvature)
        if "slopes" not in state:
            return fit, slope, bend
        logit = base + path[..., :-1, :] @ slopes.mT
        share = torch.softmax(logit, -1)
        chosen = (logit * taken).sum(-1) - torch.logsumexp(logit, -1)
        own = ((taken - share) @ slopes) * counted.unsqueeze(-1)
        mean = share @ slopes
        pairs = (slopes.unsqueeze(-1) * slopes.unsqueeze(-2)).flatten(-2)
        spread = (share @ pairs).unflatten(-1, bend.shape[-2:]) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        none = torch.zeros_like(slope[..., :1, :])
        more = torch.cat([spread * counted[..., None, None], torch.zeros_like(spread[..., :1, :, :])], -3)
        value = fit + torch.cat([chosen * counted, torch.zeros_like(fit[..., :1])], -1)
        return value, slope + torch.cat([own, none], -2), bend + more

    return expand


def _settled(
    chain: GaussMarkov, expand: Callable[[Tensor], Expansion], path: Tensor, readout: AffineReadout
) -> tuple[GaussMarkov, Tensor, Tensor]:
    """The path's Gaussian under the expansion about a path near the mode, and the expansion's potential."""
    near, precision, linear = chain, path, path
    for step in range(NEWTON):
        _, slope, precision = expand(path)
        linear = slope + (precision @ path.unsqueeze(-1)).squeeze(-1)
        near = chain.condition(precision, linear)
        if step < NEWTON - 1:
            change = near.mean - path
            farthest = (change @ readout.loading.mT).abs().amax(-1, keepdim=True)
            path = path + change * (FARTHEST / farthest.clamp(min=FARTHEST))
    return near, precision, linear
