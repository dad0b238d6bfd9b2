"""Moves of Gibbs sampling that all models of switching steps share: modes, steps and transitions, given the path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrodyn.conditionals.metropolis import acceptance_of
from pyrodyn.conditionals.steps import draw_coefficients, draw_precision, draw_scale, step_sums
from pyrodyn.conditionals.transitions import StateLogits, draw_dirichlet, transition_counts
from pyrodyn.models._modes import numbering
from pyrodyn.models._switching import RECURRENCE, SCALE, StepPrior
from pyrodyn.models._switching_checks import inside_of
from pyrodyn.models._switching_steps import ModeSteps, permuted
from pyrodyn.recording import Recording

State = dict[str, Tensor]
_EVENT_DIMS = {"initial": 1, "transition": 2, "dynamics": 3, "bias": 2, "process_noise": 3, "input_gain": 3}


class StepMoves:
    """Moves for what `ModeSteps` holds, each (chain, ...), and for the modes.

    Modes are numbered as they overlap most with an aim, the probabilities of modes from which the chains started.
    """

    def __init__(self, prior: StepPrior, recording: Recording) -> None:
        self.prior, self.recording = prior, recording
        self.inside = inside_of(recording)
        self.inputs = recording.inputs if prior.num_inputs else None
        self.input_scale = recording.input_scale if prior.num_inputs else torch.ones(0, dtype=torch.float64)
        self.regressions = prior.regressions(self.input_scale)

    def start(self, steps: ModeSteps, sites: dict[str, Tensor], groups: int) -> State:
        """The state (group, ...) at parameters (group, 1, *event), made from ``sites`` (group, *event)."""
        held: State = {}
        for name, dims in _EVENT_DIMS.items():
            value = getattr(steps, name)
            if value is not None:
                held[name] = flat(value, dims, groups)
        held["process_scale"] = sites["process_scale"].clone()
        # Each row of the table is one of gamma variables; their sum, which nothing else knows, starts at its mean.
        tiny = torch.finfo(torch.float64).tiny
        held["table"] = held.pop("transition").clamp(min=tiny).log() + self.prior.counts.sum(-1, keepdim=True).log()
        if self.prior.recurrent and self.prior.switches:
            held["recurrence_variance"] = sites["recurrence_variance"].clone()
            spread = sites["recurrence_variance"].sqrt()[:, None, None]
            inputs = [sites["input_slopes"]] if self.prior.num_inputs else []
            held["slopes"] = spread * torch.cat([sites["slopes"], *inputs, sites["borders"]], -1)
        return held

    def steps(self, state: State) -> ModeSteps:
        """Parameters of the steps, (chain, 1, ...)."""

        def of_trials(name: str) -> Tensor | None:
            return state[name].unsqueeze(1) if name in state else None

        recurrence = border = mode_gain = None
        if "slopes" in state:
            recurrence, border, mode_gain = self.prior.pushes(state["slopes"].unsqueeze(1), self.input_scale)
        parts: Any = {name: of_trials(name) for name in ("dynamics", "bias", "process_noise", "input_gain", "initial")}
        transition = torch.softmax(state["table"].unsqueeze(1), -1)
        return ModeSteps(
            **parts, transition=transition, recurrence=recurrence, recurrence_bias=border, mode_gain=mode_gain
        )

    def sites(self, state: State, steps: ModeSteps) -> dict[str, Tensor]:
        """The prior's sites (chain, *event) for steps (chain, 1, *event), their modes numbered by the aim."""
        numbered = permuted(steps, self.order(state).unsqueeze(1)).map(lambda part: part.squeeze(1))
        return self.prior.sites(numbered, state["process_scale"], state.get("recurrence_variance"), self.input_scale)

    def order(self, state: State) -> Tensor:
        """Which mode of each chain takes which number, (chain, mode)."""
        modes, chains = self.prior.modes, len(state["modes"])
        chosen = torch.nn.functional.one_hot(state["modes"], modes).to(torch.float64) * self.inside.unsqueeze(-1)
        aim = state["aim"].repeat_interleave(chains // len(state["aim"]), 0)
        overlap = torch.einsum("ibtj,ibtk->ijk", aim, chosen)
        return numbering(-overlap)

    # ------------------------------------------------------------------------------------------ moves

    def draw_modes(self, state: State, path: Tensor) -> None:
        """Modes given the path, all of a trial at once."""
        state["modes"] = self.prior.path(self.steps(state), self.recording, self.inside).sample_modes(path)

    def draw_steps(self, state: State, path: Tensor) -> None:
        """Dynamics, biases, gains and process noise of all modes given the path (chain, trial, time, latent)."""
        prior, wide = self.prior, self.prior.lags * self.prior.latent_dim
        weight = torch.nn.functional.one_hot(state["modes"], prior.modes) * self.inside.unsqueeze(-1)
        sums = step_sums(path, weight.to(torch.float64), prior.lags, self.inputs)
        precision = torch.linalg.inv(state["process_noise"])
        parts = [state["dynamics"].mT, state["bias"].unsqueeze(-2)]
        held = torch.cat(parts + ([state["input_gain"].mT] if "input_gain" in state else []), -2)
        drawn = torch.zeros_like(held)
        for place, rows, mean, sd, _ in self.regressions:
            drawn[..., rows, place] = draw_coefficients(sums.of(rows, place), precision[..., place, place], mean, sd)
        # The prior of the dynamics is not quite normal; where the two differ, a draw may be refused.
        ahead, here = (
            prior.log_dynamics(part[..., :wide, :].mT) - prior.log_normal(part[..., :wide, :].mT)
            for part in (drawn, held)
        )
        acceptance = acceptance_of(ahead - here)
        accepted = (torch.rand_like(acceptance) < acceptance)[..., None, None]
        state["step_acceptance"] = acceptance
        held = torch.where(accepted, drawn, held)
        state["dynamics"], state["bias"] = held[..., :wide, :].mT, held[..., wide, :]
        if "input_gain" in state:
            state["input_gain"] = held[..., wide + 1 :, :].mT
        parts = [
            draw_precision(sums.of(rows, place), held[..., rows, place], state["process_scale"], degrees)
            for place, rows, _, _, degrees in self.regressions
        ]
        state["process_noise"] = prior.blocks.diagonal([torch.linalg.inv(part) for part in parts])
        state["process_scale"] = draw_scale(prior.blocks.diagonal(parts), prior.freedom, *SCALE)

    def draw_transitions(self, state: State, path: Tensor) -> None:
        """Transition probabilities given modes and path."""
        prior = self.prior
        if not prior.switches:
            return
        modes = state["modes"]
        first = torch.nn.functional.one_hot(modes[..., 0], prior.modes).sum(1)
        state["initial"] = draw_dirichlet(1.0 + first.to(torch.float64))
        if "slopes" not in state:
            rows = prior.counts + transition_counts(modes, prior.modes, self.inside)
            state["table"] = draw_dirichlet(rows).log()
            return
        features = push_features(path, self.inputs, self.input_scale)
        precision = state["recurrence_variance"].reciprocal().unsqueeze(-1).expand(-1, features.shape[-1])
        logits = StateLogits(
            modes[..., :-1].flatten(1), modes[..., 1:].flatten(1), self.inside[:, 1:].flatten(), features,
            prior.contrasts, prior.counts, precision,
        )  # fmt: skip
        table, slopes = logits.unpack(logits.draw(logits.pack(state["table"], state["slopes"])))
        state["table"], state["slopes"] = table, slopes
        shape, rate = RECURRENCE
        rate = rate + 0.5 * slopes.square().sum((-2, -1))
        gamma = torch._standard_gamma(torch.full_like(rate, shape + 0.5 * slopes[0].numel()))
        state["recurrence_variance"] = rate / gamma


def push_features(path: Tensor, inputs: Tensor | None, input_scale: Tensor) -> Tensor:
    """What the logits of modes depend on, (chain, step, feature): the state before, the inputs then, and a one."""
    parts = [path[..., :-1, :]]
    if inputs is not None:
        parts.append((inputs[:, 1:] / input_scale).expand(len(path), -1, -1, -1))
    return torch.cat([*parts, torch.ones_like(parts[0][..., :1])], -1).flatten(1, 2)


def flat(value: Tensor, dims: int, groups: int) -> Tensor:
    """A parameter (group or 1, 1, *event) or (*event) as (group, *event), ``dims`` of them being the event's."""
    event = value.shape[value.dim() - dims :]
    return value.reshape(-1, *event).expand(groups, *event).clone()
