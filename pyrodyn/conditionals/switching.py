r"""The path of switching dynamics given modes and parameters: exactly where it is Gaussian, block by block where not.

What is not Gaussian, counts and transitions that depend on the state, is expanded about a path that Newton's method
finds from a centre that the chain's present place does not enter; what is left over kicks Hamiltonian dynamics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrodyn.conditionals.modes import settle_from
from pyrodyn.conditionals.paths import gaussian_path, turn
from pyrodyn.distributions import SwitchingPath
from pyrodyn.readouts import AffineReadout
from pyrodyn.readouts.likelihood import outer

NEWTON = 3  # expansions about the path, the last of which the move is made with
FARTHEST = 2.0  # that a predictor or a logit moves in one of them: exp() overshoots from afar
BLOCK = 100  # bins that are accepted together: of longer ones, too many are refused
TURNS = 25  # of path and modes, before they are taken for draws
SETTLING = 5  # rounds in which they find each other before: many counts hold a path where one round does not take it

# Value (chain, trial, time), slope (..., latent), curvature (..., latent, latent) of a log density.
Expansion = tuple[Tensor, Tensor, Any]


def draw_path(
    law: SwitchingPath,
    readout: AffineReadout,
    observations: Tensor,
    path: Tensor,
    modes: Tensor,
    centre: Tensor,
    inside: Tensor | None = None,
    seen: Expansion | None = None,
) -> tuple[Tensor, Tensor]:
    """The path anew, given modes, observations and parameters.

    Parameters
    ----------
    law : SwitchingPath, batch (chain, trial) or (chain, 1)
    readout : AffineReadout
        Of its parts those of the parameters matter, not its path.
    observations : Tensor, (chain or 1, trial, time, unit)
    path : Tensor, (chain, trial, time, latent)
        Where it is now.
    modes : Tensor of int, (chain, trial, time)
    centre : Tensor, (chain, trial, time, latent)
        Where the search for the expansion starts: anything but what depends on ``path``.
    inside : Tensor of bool, (trial, time), optional
        Bins before a trial's end: transitions behind it count for nothing.
    seen : Expansion, optional
        `seen_from` the centre. With it there is no search, and the move is made with the expansion about the centre: of
        use where that is a good one, and does not change from move to move.

    Returns
    -------
    path : Tensor, (chain, trial, time, latent)
    acceptance : Tensor, (chain, trial)
    """
    weight = torch.nn.functional.one_hot(modes, law.num_modes).to(torch.float64)
    chain = law.given_modes(weight)
    if readout.law.is_gaussian and law.recurrence is None:
        return gaussian_path(chain, readout, observations), torch.ones(path.shape[:-2], dtype=torch.float64)
    followed = _following(law, modes, inside)
    rounds = NEWTON if seen is None else 1
    near, precision, linear = chain, centre, centre
    for step in range(rounds):
        _, slope, precision = _sum(seen or seen_from(centre, readout, observations), followed(centre))
        linear = slope + (precision @ centre.unsqueeze(-1)).squeeze(-1)
        near = chain.condition(precision, linear)
        if step < rounds - 1:
            change = near.mean - centre
            farthest = (change @ readout.loading.mT).abs().amax(-1, keepdim=True)
            centre = centre + change * (FARTHEST / farthest.clamp(min=FARTHEST))

    def rest(at: Tensor) -> tuple[Tensor, Tensor]:
        fit, score, _ = readout.expand_bins(readout.predict(at), observations)
        value, slope, _ = _sum((fit, score @ readout.loading, None), followed(at))
        pulled = (precision @ at.unsqueeze(-1)).squeeze(-1)
        return value - (at * (linear - 0.5 * pulled)).sum(-1), slope - linear + pulled

    moved, rate = turn(near, rest, path, _blocks(path.shape[-2]))
    return moved, rate.mean(-1)


def draw_path_and_modes(
    law: SwitchingPath, readout: AffineReadout, observations: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Path (draw, trial, time, latent) and modes (draw, trial, time) given the parameters of every draw.

    They are drawn in turn, from where a few rounds of variational inference take the path of ``readout`` and the
    probabilities ``weight`` (draw or 1, trial, time, mode): in the limit of many turns exactly, wherever they start.
    Where the steps of two modes lie many standard deviations of their noise apart, path and mode hold each other, and
    few turns keep what they started from.
    """
    found = settle_from(law, readout, observations, weight, SETTLING)
    centre = path = found.chain.mean
    modes, seen = found.weight.argmax(-1), seen_from(centre, readout, observations)
    for _ in range(TURNS):
        path, _ = draw_path(law, readout, observations, path, modes, centre, seen=seen)
        modes = law.sample_modes(path)
    return path, modes


def seen_from(path: Tensor, readout: AffineReadout, observations: Tensor) -> Expansion:
    """The log likelihood of the observations about a path."""
    fit, score, curvature = readout.expand_bins(readout.predict(path), observations)
    return fit, score @ readout.loading, outer(readout, curvature)


def _blocks(bins: int) -> Tensor | None:
    """The block of every bin, -1 where one ends: at another place each time, so that no bin stays for long."""
    if bins <= 1.5 * BLOCK:
        return None
    place = torch.arange(bins) + int(torch.randint(BLOCK, ()))
    return torch.where(place % BLOCK == 0, -1, place // BLOCK)


def _following(law: SwitchingPath, modes: Tensor, inside: Tensor | None) -> Callable[[Tensor], Expansion | None]:
    """The log probability of the modes about a path, where they depend on it."""
    slopes = law.recurrence
    if slopes is None:
        return lambda path: None
    before, after = modes[..., :-1], modes[..., 1:]
    table = law.transition.squeeze(-3)  # (chain, mode, mode): of all trials
    rows = torch.gather(table, 1, before.flatten(1).unsqueeze(-1).expand(-1, -1, law.num_modes))
    base = rows.unflatten(1, before.shape[1:])
    base = base if law.push is None else base + law.push
    counted = torch.ones(after.shape[1:]) if inside is None else inside[:, 1:]
    counted, taken = counted.to(torch.float64), torch.nn.functional.one_hot(after, law.num_modes)

    def expand(path: Tensor) -> Expansion:
        logit = base + path[..., :-1, :] @ slopes.mT
        share = torch.softmax(logit, -1)
        chosen = ((logit * taken).sum(-1) - torch.logsumexp(logit, -1)) * counted
        slope, mean = ((taken - share) @ slopes) * counted.unsqueeze(-1), share @ slopes
        pairs = (slopes.unsqueeze(-1) * slopes.unsqueeze(-2)).flatten(-2)
        spread = (share @ pairs).unflatten(-1, 2 * path.shape[-1:]) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        bend = spread * counted[..., None, None]
        # The state of the last bin is followed by no mode.
        last = (torch.zeros_like(part[:, :, :1]) for part in (chosen, slope, bend))
        value, slope, bend = (torch.cat(pair, 2) for pair in zip((chosen, slope, bend), last, strict=True))
        return value, slope, bend

    return expand


def _sum(seen: Expansion, followed: Expansion | None) -> Expansion:
    """Both expansions; a curvature that is not wanted stays None."""
    if followed is None:
        return seen
    value, slope, bend = seen
    return value + followed[0], slope + followed[1], None if bend is None else bend + followed[2]
