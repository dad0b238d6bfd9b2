"""Blocked Gibbs sampling of switching linear dynamics: what each move needs of the model, and in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrodyn.conditionals.modes import settle
from pyrodyn.conditionals.switching import draw_path
from pyrodyn.conditionals.units import UnitMoves
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.models._switching import StepPrior
from pyrodyn.models._switching_blocks import View
from pyrodyn.models._switching_moves import State, StepMoves, flat
from pyrodyn.models._switching_orbit import reshape_latents, shift_latents
from pyrodyn.models._switching_steps import rotated
from pyrodyn.program import global_laws, globals_given
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

if TYPE_CHECKING:
    from pyrodyn.models._switching_model import SwitchingModel

SETTLING = 15  # rounds in which path and modes find each other, parameters held, before the chains start
FOLLOWING = 0.1  # share by which the centre of the path's expansion follows the chains in a sweep of the warm-up


class SwitchingSweep:
    """Moves for the unknowns of a `SwitchingModel`, each (chain, ...).

    Loadings are iid normal while the chain runs, their rotation free, and are turned into the model's gauge when handed
    out: the two have the same law. So are modes numbered: as they overlap most with where the chains started.
    """

    def __init__(self, model: SwitchingModel, recording: Recording, observations: Tensor | None = None) -> None:
        self.model, self.recording = model, recording
        # Groups of chains may see different data: (group, trial, time, unit).
        self.values = recording.values.unsqueeze(0) if observations is None else observations
        self.prior = model.step_prior(recording)
        self.views = model.views(recording)
        self.loading_scale = model.loading_scale(recording)  # (unit, 1)
        self.moves = StepMoves(self.prior, recording)
        laws = global_laws(model, recording)
        self.offset_prior = laws["offset"].base_dist
        self.event_dims = {name: len(law.event_shape) for name, law in laws.items()}
        name = model.readout.noise_name
        self.law, self.noisy = model.readout.bound(recording), model.readout.noisy(recording)
        windows = [(view.units, view.place) for view in self.views]
        noise_prior = None if name is None else laws[name].base_dist
        self.units = UnitMoves(self.law, windows, self.offset_prior, self.noisy, noise_prior, recording.mask)

    # ------------------------------------------------------------------------------------------ start and end

    def start(self, values: dict[str, Tensor], chains: int) -> State:
        """Chains at ``values`` (*event) or (group, *event), path and modes drawn for each."""
        grouped = {
            name: value if value.dim() > self.event_dims[name] else value.unsqueeze(0) for name, value in values.items()
        }
        parameters = globals_given(
            self.model, {name: value.unsqueeze(1) for name, value in grouped.items()}, self.recording
        )
        groups = len(grouped["bias"])
        held = self.moves.start(parameters.steps, grouped, groups)
        for name, dims in (("loading", 2), ("offset", 1), ("noise", 1)):
            if getattr(parameters, name) is not None:
                held[name] = flat(getattr(parameters, name), dims, groups)
        weight, path = self._settle(held, groups)
        state = {name: value.repeat_interleave(chains, 0) for name, value in held.items()}
        state |= {"aim": weight, "centre": path}
        state["path"] = path.repeat_interleave(chains, 0)
        state["modes"] = weight.argmax(-1).repeat_interleave(chains, 0)
        state["stretch_step"] = torch.full((groups * chains,), 0.05, dtype=torch.float64)
        if "noise" in state:
            state["noise_step"] = torch.full_like(state["noise"][:, self.noisy], 0.1)
        self.draw_path(state)
        self.moves.draw_modes(state, state["path"])
        return state

    def _settle(self, held: State, groups: int) -> tuple[Tensor, Tensor]:
        """Probabilities of modes and mean path (group, trial, time, ...) given the parameters."""
        law = self.prior.path(self.moves.steps(held), self.recording)
        zeros = torch.zeros(self.recording.num_trials, *law.event_shape, dtype=torch.float64)
        found = settle(law, self.readout(held, zeros), self.values, (groups, self.recording.num_trials), SETTLING)
        return found.weight, found.chain.mean

    def sites(self, state: State) -> dict[str, Tensor]:
        """The values (chain, *event) of the program's sites, in the model's gauge."""
        weights, turn = gauged(self.prior, self.views, state["loading"] / self.loading_scale)
        found = self.moves.sites(state, rotated(self.moves.steps(state), turn.unsqueeze(1)))
        found |= weights | {"offset": state["offset"]}
        if "noise" in state:
            found[str(self.model.readout.noise_name)] = state["noise"][:, self.noisy]
        return found

    def local(self, state: State) -> dict[str, Tensor]:
        """The paths (chain, trial, time, latent), in the model's gauge."""
        _, turn = gauged(self.prior, self.views, state["loading"] / self.loading_scale)
        return {"latent": state["path"] @ turn.unsqueeze(1)}

    # ------------------------------------------------------------------------------------------ parts of the state

    def seen(self, state: State) -> Tensor:
        """The observations of every chain, (chain or 1, trial, time, unit)."""
        groups = len(self.values)
        return self.values if groups == 1 else self.values.repeat_interleave(len(state["loading"]) // groups, 0)

    def readout(self, state: State, path: Tensor) -> AffineReadout:
        """Law of the observations given a path (chain, trial, time, latent)."""
        return AffineReadout(
            self.law, path, state["loading"].unsqueeze(1), state["offset"].unsqueeze(1),
            state["noise"].unsqueeze(1) if "noise" in state else None, self.recording.mask,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ one sweep

    def draw_path(self, state: State) -> None:
        """The path given all else."""
        law, path = self.prior.path(self.moves.steps(state), self.recording), state["path"]
        centre = state["centre"].repeat_interleave(len(path) // len(state["centre"]), 0)
        state["path"], state["path_acceptance"] = draw_path(
            law, self.readout(state, path), self.seen(state), path, state["modes"], centre, self.moves.inside
        )

    def sweep(self, state: State, share: float) -> State:
        """Every unknown anew; ``share`` of the warm-up that is done, 1 after it: then the posterior stays as it is."""
        state, adapt = dict(state), share < 1.0
        self.draw_path(state)
        for move in (self.moves.draw_modes, self.moves.draw_steps, self.moves.draw_transitions):
            move(state, state["path"])
        shift_latents(self, state)
        reshape_latents(self, state, adapt)
        variance = self.loading_scale.square().squeeze(-1).unsqueeze(0)
        self.units.draw(state, self.seen(state), variance, adapt)
        if adapt:  # where the Gaussian about the path is expanded, until the posterior must stay as it is
            groups = len(state["centre"])
            mean = state["path"].unflatten(0, (groups, -1)).mean(1)
            state["centre"] = state["centre"] + FOLLOWING * (mean - state["centre"])
        return state


def gauged(prior: StepPrior, views: list[View], weights: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Sites of the loadings, whose weights are (*batch, unit, latent), and the turn (*batch, latent, latent) of the
    latents into their gauge."""
    found, turns = {}, []
    for view, suffix in zip(views, prior.blocks.suffixes, strict=True):
        own = weights[..., view.units, :][..., view.place]
        found[f"weights{suffix}"], rotation = gauge_fix(own, view.pivots)
        turns.append(rotation)
    return found, prior.blocks.diagonal(turns)
