"""The rows of the dynamics of coupled regions given a path: one conjugate regression for every region."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrodyn.conditionals.regression import SourceLaw, SourceSets
from pyrodyn.distributions.network import log_stability
from pyrodyn.models._regions import INNOVATION_SD

if TYPE_CHECKING:
    from pyrodyn.models._regions_sweep import RegionSweep, State


COURSE_STEPS = 3  # of a course and its weights in a sweep: no path is asked


def place_regressors(sweep: RegionSweep) -> None:
    """The regressors of the latents: state, shared innovations, time-locked input, inputs."""
    layout, model = sweep.layout, sweep.model
    size, regional = layout.size, layout.regional
    sweep.shared = slice(size, size + model.shared_innovations)
    bumps = sweep.bumps[0] * sweep.bumps[1] if sweep.bumps else 0
    sweep.locked = slice(sweep.shared.stop, sweep.shared.stop + bumps)
    sweep.driven = slice(sweep.locked.stop, sweep.locked.stop + sweep.recording.num_inputs)
    fixed = []
    if sweep.bumps:
        fixed.append(model.design(sweep.recording, sweep.bumps[1])[:, 1:])
    if sweep.recording.num_inputs and sweep.recording.inputs is not None:
        fixed.append(sweep.recording.inputs[:, 1:])
    sweep.fixed = torch.cat(fixed, -1).flatten(0, 1) if fixed else None
    sweep.fixed_gram = None if sweep.fixed is None else sweep.fixed.mT @ sweep.fixed
    extra = torch.arange(regional, sweep.driven.stop)
    matrix_mean = layout.matrix(sweep.law.mean_entry)
    sweep.targets = []
    for r, place in enumerate(layout.places):
        own = torch.arange(place.start, place.stop)
        which = [i for i in sweep.slab.uncertain if layout.edges[i][0] == r]
        certain = [i for i, (target, _) in enumerate(layout.edges) if target == r and i not in which]
        columns = {i: torch.arange(size)[layout.places[layout.edges[i][1]]] for i in (*which, *certain)}
        always = torch.cat([own, *(columns[i] for i in certain), extra])
        sets = SourceSets([columns[i] for i in which], always)
        mean = torch.zeros(sweep.driven.stop, len(own), dtype=torch.float64)
        mean[:size] = matrix_mean[place].mT
        sd = torch.ones(sweep.driven.stop, dtype=torch.float64)
        sd[sweep.shared] = INNOVATION_SD
        if sweep.recording.num_inputs:
            sd[sweep.driven] = 1.0 / sweep.recording.input_scale
        sweep.targets.append((place, sets, mean, sd, which))


def draw_rows(sweep: RegionSweep, state: State) -> None:
    """Rows of every region with their sources, shared innovations, inputs, and the persistence of global latents."""
    layout, path = sweep.layout, state["path"]
    chains, regional = len(path), layout.regional
    before, after = path[:, :, :-1], path[:, :, 1:]
    coefficients = _coefficients(sweep, state)
    fixed = sweep.fixed
    rest = after[..., :regional] - before @ coefficients[:, None, : layout.size]
    if fixed is not None:
        rest = rest - (fixed @ coefficients[:, sweep.locked.start :]).view_as(rest)
    parts = [before]
    if sweep.model.shared_innovations:
        shared = coefficients[:, sweep.shared]  # (chain, shared, regional)
        drawn = normal_draw(shared @ shared.mT, (rest @ shared.mT.unsqueeze(1)).flatten(1, 2).mT, 1.0)
        parts.append(drawn.mT.unflatten(1, before.shape[1:3]))
    design = torch.cat(parts, -1).flatten(1, 2)
    target = after[..., :regional].flatten(1, 2)
    gram, cross = design.mT @ design, design.mT @ target
    if fixed is not None and sweep.fixed_gram is not None:
        mixed = fixed.mT @ torch.cat([design, target], -1)
        mixed, lower = mixed.split([design.shape[-1], regional], -1)
        own = sweep.fixed_gram.expand(chains, -1, -1)
        gram = torch.cat([torch.cat([gram, mixed.mT], -1), torch.cat([mixed, own], -1)], -2)
        cross = torch.cat([cross, lower], -2)
    new, presence = torch.zeros_like(coefficients), layout.presence(state["dynamics"])
    prior = sweep.prior(state)
    weight = layout.matrix(prior.weight)
    for r, (place, sets, mean, sd, which) in enumerate(sweep.targets):
        precision = sd.reciprocal().square().expand(chains, -1).clone()
        precision[:, : layout.size] = weight[:, place.start]  # the same in every row of a block
        if sweep.bumps:
            precision[:, sweep.locked] = state["bump_variance"][:, r, None].reciprocal()
        if "course" in state:
            mean = mean.repeat(chains, 1, 1)
            mean[:, sweep.locked] = (state["course_weight"][:, place] @ state["course"]).mT
        present = presence[:, r][:, [layout.edges[i][1] for i in which]]
        law = SourceLaw(sets, gram, cross[..., place], mean, precision, prior.probability[..., which])
        new[..., place], _ = law.draw(present)
    dynamics = state["dynamics"].clone()
    dynamics[:, :regional] = new[:, : layout.size].mT
    for i in range(regional, regional + layout.num_globals):
        dynamics[:, i, i] = _persistence(sweep, path[..., i])
    change = log_stability(dynamics, layout) - log_stability(state["dynamics"], layout)
    accepted = torch.rand(chains, dtype=torch.float64).log() < change
    state["stable"] = accepted.double()
    kept = accepted[:, None, None]
    state["dynamics"] = torch.where(kept, dynamics, state["dynamics"])
    _spread(sweep, state, torch.where(kept, new, coefficients))
    coefficients = torch.where(kept, new, coefficients)
    state["residual"] = target - design @ coefficients[:, : design.shape[-1]]
    if fixed is not None:
        state["residual"] -= fixed @ coefficients[:, sweep.locked.start :]


def _coefficients(sweep: RegionSweep, state: State) -> Tensor:
    """Everything that enters the regional latents, (chain, regressor, regional latent)."""
    regional = sweep.layout.regional
    parts = [state["dynamics"][:, :regional].mT]
    if "innovation_loading" in state:
        parts.append(state["innovation_loading"][:, :regional].mT)
    if sweep.bumps:
        parts.append(state["time_locked"].mT)
    if "input_gain" in state:
        parts.append(state["input_gain"].mT)
    return torch.cat(parts, 1)


def _spread(sweep: RegionSweep, state: State, coefficients: Tensor) -> None:
    """The inverse of `_coefficients`, but for the dynamics."""
    if "innovation_loading" in state:
        wide = torch.zeros_like(state["innovation_loading"])
        wide[:, : sweep.layout.regional] = coefficients[:, sweep.shared].mT
        state["innovation_loading"] = wide
    if sweep.bumps:
        state["time_locked"] = coefficients[:, sweep.locked].mT
    if "input_gain" in state:
        state["input_gain"] = coefficients[:, sweep.driven].mT


def draw_courses(sweep: RegionSweep, state: State) -> None:
    """What the time-locked inputs have in common, and how it enters every latent, given these inputs."""
    if "course" not in state:
        return
    locked = state["time_locked"]  # (chain, regional, condition x bump)
    weight = state["bump_variance"][:, sweep.layout.group[: sweep.layout.regional]].reciprocal()
    scale = state["course_variance"].reciprocal()[..., None, None]
    for _ in range(COURSE_STEPS):
        course = state["course"]
        precision = weight[..., None, None] * (course @ course.mT).unsqueeze(1)
        linear = weight.unsqueeze(-1) * (locked @ course.mT)
        state["course_weight"] = normal_draw(precision, linear.unsqueeze(-1), scale).squeeze(-1)
        draw_course_given_weights(sweep, state)


def draw_course_given_weights(sweep: RegionSweep, state: State) -> None:
    """What the time-locked inputs have in common, given these and how it enters them."""
    weight = state["bump_variance"][:, sweep.layout.group[: sweep.layout.regional]].reciprocal()
    enters = state["course_weight"].mT
    heard = enters * weight.unsqueeze(1)
    state["course"] = normal_draw(heard @ enters.mT, heard @ state["time_locked"], 1.0)


def normal_draw(precision: Tensor, linear: Tensor, prior: float | Tensor) -> Tensor:
    """Columns (*batch, entry, column) of a normal law with this potential, times a prior of mean zero."""
    root = torch.linalg.cholesky(precision + prior * torch.eye(precision.shape[-1], dtype=precision.dtype))
    white = torch.linalg.solve_triangular(root, linear, upper=False)
    return torch.linalg.solve_triangular(root.mT, white + torch.randn_like(white), upper=True)


def _persistence(sweep: RegionSweep, path: Tensor) -> Tensor:
    """Persistence of a global latent given its path (chain, trial, time)."""
    before, after = path[..., :-1], path[..., 1:]
    entry = sweep.layout.slow
    mean, weight = sweep.law.mean_entry[entry][0], sweep.law.sd_entry[entry][0].reciprocal().square()
    precision = before.square().sum((-2, -1)) + weight
    centre = ((before * after).sum((-2, -1)) + weight * mean) / precision
    return centre + torch.randn_like(centre) / precision.sqrt()
