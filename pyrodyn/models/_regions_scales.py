"""Scales and variances of coupled regions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrodyn.distributions.horseshoe import HorseshoeNetwork, log_half_cauchy
from pyrodyn.models._regions import BUMPS, COURSES, INITIAL, INNOVATION_SD, SIGNAL

if TYPE_CHECKING:
    from pyrodyn.models._regions_sweep import RegionSweep, State

SCALE_STEPS = 8  # of the random walks of a horseshoe's scales in a sweep
LOCAL_STEP, LEVEL_STEP = 2.0, 0.8  # their widths, in the logarithm
RESCALE = 2.0  # of the conditional sd of the logarithm of a region's scale: the width of its proposal


def rescale(sweep: RegionSweep, state: State) -> None:
    """Stretch the latents of a region, or a global one, and all that enters and leaves them, by one factor.

    The likelihood does not see it; without it path and loading would hold each other where they are. The measure is
    that of Liu & Sabatti, Biometrika 87:353 (2000): Lebesgue's, with a Jacobian of one power for every number.
    """
    layout = sweep.layout
    for r, place in enumerate(layout.places):
        _stretch(sweep, state, place, r)
    for i in range(layout.num_globals):
        _stretch(sweep, state, slice(layout.regional + i, layout.regional + i + 1), layout.num_regions)


def _stretch(sweep: RegionSweep, state: State, place: slice, index: int) -> None:
    layout, regional = sweep.layout, sweep.layout.regional
    path, dynamics = state["path"], state["dynamics"]
    chains = len(path)
    of_region = index < layout.num_regions
    spread = state["initial_variance"][:, index]
    if of_region:
        residual = state["residual"][..., place].square().sum((1, 2))
    else:
        i = place.start
        apart = path[:, :, 1:, i] - dynamics[:, None, None, i, i] * path[:, :, :-1, i]
        residual = apart.square().sum((1, 2))
    # Sums of squares over their prior variance of what grows (up) and of what shrinks (down), and their numbers.
    up = residual + (path[:, :, 0, place].square().sum((1, 2)) / spread)
    grown = path[0, ..., place].numel() * torch.ones(chains)
    weight = layout.matrix(sweep.prior(state).weight)
    outside = torch.ones(layout.size, dtype=torch.bool)
    outside[place] = False
    into, out = dynamics[:, place][..., outside], dynamics[:, :regional][..., place]
    if of_region:
        present = into != 0.0
        up = up + (into.square() * weight[:, place][..., outside]).sum((1, 2))
        grown = grown + present.sum((1, 2))
        if "innovation_loading" in state:
            shared = state["innovation_loading"][:, place]
            up, grown = up + shared.square().sum((1, 2)) / INNOVATION_SD**2, grown + shared[0].numel()
        if sweep.bumps:
            locked = apart_from_courses(state)[:, place]
            up = up + locked.square().sum((1, 2)) / state["bump_variance"][:, index]
            grown = grown + locked[0].numel()
        if "course" in state:
            courses = state["course_weight"][:, place]
            up, grown = up + courses.square().sum((1, 2)) / state["course_variance"][:, 0], grown + courses[0].numel()
        if "input_gain" in state:
            gain = state["input_gain"][:, place] * sweep.recording.input_scale
            up, grown = up + gain.square().sum((1, 2)), grown + gain[0].numel()
    rows = outside[:regional]
    leaving = out[:, rows]
    there = leaving != 0.0
    down = (leaving.square() * weight[:, :regional][:, rows][..., place]).sum((1, 2))
    shrunk = there.sum((1, 2)).double()
    if of_region:
        units = sweep.regions[index][2]
        loading = state["loading"][:, units][..., place] / sweep.scale[units].unsqueeze(-1)
        down = down + loading.square().sum((1, 2)) / state["signal_variance"][:, index]
        shrunk = shrunk + loading[0].numel()
    log_factor = RESCALE * (2.0 * (grown + shrunk)).rsqrt() * torch.randn(chains, dtype=torch.float64)
    factor = log_factor.exp()
    change = (
        -0.5 * (factor.square() - 1.0) * up
        - 0.5 * (factor.square().reciprocal() - 1.0) * down
        + log_factor * (grown - shrunk)
    )
    accepted = torch.rand(chains, dtype=torch.float64).log() < change
    factor = torch.where(accepted, factor, 1.0)[:, None, None]
    state["path"] = path.clone()
    state["path"][..., place] *= factor.unsqueeze(-1)
    state["dynamics"] = dynamics.clone()
    state["dynamics"][:, place] *= factor
    state["dynamics"][..., place] /= factor
    state["loading"] = state["loading"].clone()
    state["loading"][..., place] /= factor
    for name in ("innovation_loading", "time_locked", "course_weight", "input_gain"):
        if name in state and of_region:
            state[name] = state[name].clone()
            state[name][:, place] *= factor
    if of_region:
        state["residual"] = state["residual"].clone()
        state["residual"][..., place] *= factor


def apart_from_courses(state: State) -> Tensor:
    """What is each latent's own of the time-locked inputs, (chain, regional latent, condition x bump)."""
    locked = state["time_locked"]
    return locked - state["course_weight"] @ state["course"] if "course" in state else locked


def draw_variances(sweep: RegionSweep, state: State) -> None:
    layout, first = sweep.layout, state["path"][:, :, 0]
    for name, prior, blocks in (
        ("initial_variance", INITIAL, [first[..., p] for p in layout.places]),
        ("signal_variance", SIGNAL, _weights(sweep, state)),
        ("course_variance", COURSES, [state["course_weight"]] if "course" in state else []),
        ("bump_variance", BUMPS, [apart_from_courses(state)[:, p] for p in layout.places] if sweep.bumps else []),
    ):
        if name == "initial_variance":
            blocks = [*blocks, first[..., layout.regional : layout.regional + layout.num_globals]]
        if not blocks:
            continue
        shape = torch.tensor([prior[0] + 0.5 * block[0].numel() for block in blocks], dtype=torch.float64)
        rate = torch.stack([prior[1] + 0.5 * block.square().flatten(1).sum(1) for block in blocks], -1)
        state[name] = rate / torch._standard_gamma(shape.expand_as(rate))


def draw_edge_scales(sweep: RegionSweep, state: State) -> None:
    """Scales of a horseshoe given its blocks, by random walks of their logarithms: no likelihood is asked.

    The restriction to stable dynamics is one on blocks and scales together, and so does not enter.
    """
    law = sweep.law
    if not isinstance(law, HorseshoeNetwork) or not law.layout.edges:
        return
    edge, held = law.layout.edge, law.layout.edge >= 0
    vector = law.layout.vector(state["dynamics"])[:, held] / law.sd_entry[held]
    norm = torch.zeros(len(vector), len(law.layout.edges), dtype=torch.float64)
    norm = norm.index_add(-1, edge[held], vector.square())
    size = torch.bincount(edge[held]).double()

    def score(log_scales: Tensor) -> Tensor:
        """Log density of every edge's block and local scale, (chain, edge)."""
        share = law.log_share(log_scales)
        return log_half_cauchy(log_scales[:, 1:]) - size * share - 0.5 * norm * (-2.0 * share).exp()

    here = state["edge_scales"]
    for _ in range(SCALE_STEPS):
        step = LOCAL_STEP * torch.randn_like(here)
        step[:, 0] = 0.0
        accepted = torch.rand_like(norm).log() < score(here + step) - score(here)
        here = torch.where(torch.nn.functional.pad(accepted, (1, 0)), here + step, here)
        # The level alone; then the level against all local scales, which leaves the blocks' own scales as they are.
        for against in (0.0, -1.0):
            step = torch.full_like(here, against)
            step[:, 0] = 1.0
            step = LEVEL_STEP * torch.randn(len(here), 1, dtype=torch.float64) * step
            change = score(here + step).sum(-1) - score(here).sum(-1)
            change = change + log_half_cauchy((here + step)[:, 0]) - log_half_cauchy(here[:, 0])
            here = torch.where((torch.rand(len(here), dtype=torch.float64).log() < change)[:, None], here + step, here)
    state["edge_scales"] = here


def _weights(sweep: RegionSweep, state: State) -> list[Tensor]:
    """Loadings of every region in units of the readout's scale."""
    return [
        state["loading"][:, units][..., place] / sweep.scale[units].unsqueeze(-1)
        for (_, _, units), place in zip(sweep.regions, sweep.layout.places, strict=True)
    ]
