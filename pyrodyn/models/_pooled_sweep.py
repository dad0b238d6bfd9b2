"""Blocked Gibbs sampling of several sessions: each session's own sweep, then what they share."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrodyn.distributions import PoolPrior
from pyrodyn.distributions.pool import SESSIONS_SEEN, SIZE_SD, log_spread_prior
from pyrodyn.models._regions_sweep import RegionSweep, State
from pyrodyn.program import Labelled

STEPS = 5  # of the random walks of sizes and of their spread in a sweep: no likelihood is asked
OWN_STEP, SPREAD_STEP = 0.4, 0.5


class PooledSweep:
    """Moves for the unknowns of a `PooledRegions`; a session's are kept as ``session/name``.

    Given what they share, sessions are independent, and each moves as it would alone. Given the sessions' blocks, what
    they share has small conditionals of its own. The restriction to stable dynamics is one on all of it jointly, and so
    enters the moves of dynamics alone.
    """

    def __init__(self, sweeps: dict[str, RegionSweep], law: PoolPrior) -> None:
        self.sweeps, self.law = sweeps, law

    def start(self, values: dict[str, dict[str, Tensor]], chains: int) -> State:
        """Every session about its own ``values``, the pool where its prior has its centre."""
        law = self.law
        shared = {
            "rate": law.probability.expand(chains, -1).clone(),
            "log_size": law.mean_log_size.expand(chains, -1).clone(),
            "log_spread": torch.full((chains,), -2.0, dtype=torch.float64),
        }
        state: State = dict(shared)
        for name, sweep in self.sweeps.items():
            own = {"edge_rate": shared["rate"], "edge_log_size": shared["log_size"][:, law.places[name]].clone()}
            state |= _joined(name, sweep.start(values[name], chains, own))
        draw_pool(law, state)
        return state

    def sweep(self, state: State, share: float) -> State:
        """Every unknown anew; see `RegionSweep.sweep`."""
        state = dict(state)
        for name, sweep in self.sweeps.items():
            state |= _joined(name, sweep.sweep(_part(name, state) | {"edge_rate": state["rate"]}, share))
        draw_pool(self.law, state)
        return state

    def sites(self, state: State) -> dict[str, Tensor]:
        found = {name: state[name] for name in ("rate", "log_size", "log_spread")}
        for name, sweep in self.sweeps.items():
            own = _part(name, state)
            found |= _joined(name, sweep.sites(own)) | {f"{name}/log_size": own["edge_log_size"]}
        return found

    def details(self, state: State) -> Labelled:
        own = {name: sweep.details(_part(name, state)) for name, sweep in self.sweeps.items()}
        return {f"{name}/{detail}": value for name, found in own.items() for detail, value in found.items()}

    def local(self, state: State) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, sweep in self.sweeps.items():
            found |= _joined(name, sweep.local(_part(name, state)))
        return found


def draw_pool(law: PoolPrior, state: State) -> None:
    """What sessions share, given every session's dynamics."""
    chains, edges = state["rate"].shape
    present = torch.zeros(len(law.places), chains, edges, dtype=torch.bool)
    held, own = torch.zeros_like(present), torch.zeros(present.shape, dtype=torch.float64)
    norm, entries = torch.zeros_like(own), torch.zeros_like(own)
    for k, (name, place) in enumerate(law.places.items()):
        layout = law.networks[name].layout
        vector = layout.vector(state[f"{name}/dynamics"])
        inside = layout.edge >= 0
        square = torch.zeros(chains, len(place), dtype=torch.float64)
        held[k][:, place] = True
        norm[k][:, place] = square.index_add(-1, layout.edge[inside], vector[:, inside].square())
        present[k] = norm[k] > 0.0
        entries[k][:, place] = torch.bincount(layout.edge[inside], minlength=len(place)).double()
        own[k][:, place] = state[f"{name}/edge_log_size"]
    count = present.sum(0)
    share = law.probability.clamp(max=1.0 - 1e-12)
    rate = torch.distributions.Beta(
        SESSIONS_SEEN * share + count, SESSIONS_SEEN * (1.0 - share) + held.sum(0) - count
    ).sample()
    state["rate"] = torch.where(law.certain, 1.0, rate)
    middle, spread = state["log_size"], state["log_spread"]

    def of_blocks(size: Tensor) -> Tensor:
        """Log density of blocks of given norms whose entries have the variance size^2 / entries."""
        return -entries * size - 0.5 * entries * norm * (-2.0 * size).exp()

    for _ in range(STEPS):
        # Sizes where an edge is absent are known by their prior alone: they are left out, and drawn last.
        step = OWN_STEP * torch.randn_like(own)
        gap = ((own + step - middle).square() - (own - middle).square()) / spread.exp().square()[:, None]
        change = of_blocks(own + step) - of_blocks(own) - 0.5 * gap
        own = torch.where(present & (torch.rand_like(own).log() < change), own + step, own)
        weight = (-2.0 * spread).exp()[:, None]
        precision = count * weight + SIZE_SD**-2
        centre = torch.where(present, own, 0.0).sum(0) * weight + law.mean_log_size * SIZE_SD**-2
        middle = centre / precision + torch.randn_like(middle) / precision.sqrt()
        square = torch.where(present, (own - middle).square(), 0.0).sum((0, 2))

        def score(log_spread: Tensor, square: Tensor = square) -> Tensor:
            return log_spread_prior(log_spread) - count.sum(-1) * log_spread - 0.5 * square * (-2.0 * log_spread).exp()

        moved = spread + SPREAD_STEP * torch.randn_like(spread)
        spread = torch.where(torch.rand_like(spread).log() < score(moved) - score(spread), moved, spread)
    drawn = middle + spread.exp()[:, None] * torch.randn_like(own)
    own = torch.where(present, own, drawn)
    state["log_size"], state["log_spread"] = middle, spread
    for k, (name, place) in enumerate(law.places.items()):
        state[f"{name}/edge_log_size"] = own[k][:, place]


def _part(name: str, state: State) -> State:
    """What belongs to one session."""
    return {n.removeprefix(f"{name}/"): v for n, v in state.items() if n.startswith(f"{name}/")}


def _joined(name: str, held: State) -> State:
    return {f"{name}/{n}": v for n, v in held.items()}
