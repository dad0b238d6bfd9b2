"""Blocked Gibbs sampling of switching linear dynamics: what each move needs of the model, and in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrodyn.conditionals.modes import settle
from pyrodyn.conditionals.units import draw_coefficients, draw_noise
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.models._switching import rotated
from pyrodyn.models._switching_moves import State, StepMoves, flat
from pyrodyn.models._switching_orbit import reshape_latents, shift_latents
from pyrodyn.models._switching_path import draw_path
from pyrodyn.program import global_laws, globals_given
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

if TYPE_CHECKING:
    from pyrodyn.models.switching_lds import SwitchingLDS

SETTLING = 15  # rounds in which path and modes find each other, parameters held, before the chains start
NOISE_STEPS = 4  # of the random walk of a unit's noise in a sweep: it mixes slower than all else
FOLLOWING = 0.1  # share by which the centre of the path's expansion follows the chains in a sweep of the warm-up


class SwitchingSweep:
    """Moves for the unknowns of a `SwitchingLDS`, each (chain, ...).

    Loadings are iid normal while the chain runs, their rotation free, and are turned into the model's gauge when handed
    out: the two have the same law. So are modes numbered: as they overlap most with where the chains started.
    """

    def __init__(self, model: SwitchingLDS, recording: Recording, observations: Tensor | None = None) -> None:
        self.model, self.recording = model, recording
        # Groups of chains may see different data: (group, trial, time, unit).
        self.values = recording.values.unsqueeze(0) if observations is None else observations
        self.prior = model.step_prior(recording)
        self.loading_scale = model.loading_scale(recording)  # (unit, 1)
        self.moves = StepMoves(self.prior, recording)
        laws = global_laws(model, recording)
        self.offset_prior = laws["offset"].base_dist
        self.event_dims = {name: len(law.event_shape) for name, law in laws.items()}
        name = model.readout.noise_name
        self.noise_prior = None if name is None else laws[name].base_dist

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
            state["noise_step"] = torch.full_like(state["noise"], 0.1)
        draw_path(self, state)
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
        weights, turn = gauge_fix(state["loading"] / self.loading_scale, self.model.pivots(self.recording))
        found = self.moves.sites(state, rotated(self.moves.steps(state), turn.unsqueeze(1)))
        found |= {"weights": weights, "offset": state["offset"]}
        if "noise" in state:
            found[str(self.model.readout.noise_name)] = state["noise"]
        return found

    def local(self, state: State) -> dict[str, Tensor]:
        """The paths (chain, trial, time, latent), in the model's gauge."""
        _, turn = gauge_fix(state["loading"], self.model.pivots(self.recording))
        return {"latent": state["path"] @ turn.unsqueeze(1)}

    # ------------------------------------------------------------------------------------------ parts of the state

    def seen(self, state: State) -> Tensor:
        """The observations of every chain, (chain or 1, trial, time, unit)."""
        groups = len(self.values)
        return self.values if groups == 1 else self.values.repeat_interleave(len(state["loading"]) // groups, 0)

    def readout(self, state: State, path: Tensor) -> AffineReadout:
        """Law of the observations given a path (chain, trial, time, latent)."""
        return AffineReadout(
            self.model.readout, path, state["loading"].unsqueeze(1), state["offset"].unsqueeze(1), _noise(state),
            self.recording.mask,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ one sweep

    def sweep(self, state: State, share: float) -> State:
        """Every unknown anew; ``share`` of the warm-up that is done, 1 after it: then the posterior stays as it is."""
        state, adapt = dict(state), share < 1.0
        draw_path(self, state)
        for move in (self.moves.draw_modes, self.moves.draw_steps, self.moves.draw_transitions):
            move(state, state["path"])
        shift_latents(self, state)
        reshape_latents(self, state, adapt)
        self._draw_units(state, adapt)
        if adapt:  # where the Gaussian about the path is expanded, until the posterior must stay as it is
            groups = len(state["centre"])
            mean = state["path"].unflatten(0, (groups, -1)).mean(1)
            state["centre"] = state["centre"] + FOLLOWING * (mean - state["centre"])
        return state

    def _draw_units(self, state: State, adapt: bool) -> None:
        law, mask, dim = self.model.readout, self.recording.mask, self.prior.latent_dim
        seen = None if mask is None else mask.flatten(0, 1)
        values, path = self.seen(state).flatten(1, 2), state["path"].flatten(1, 2)
        design = torch.cat([path, torch.ones_like(path[..., :1])], -1)
        held = torch.cat([state["loading"], state["offset"].unsqueeze(-1)], -1)
        mean = torch.zeros_like(held[:1])
        mean[..., -1] = self.offset_prior.mean
        weight = self.loading_scale.square().reciprocal().expand(-1, dim)
        precision = torch.cat([weight, self.offset_prior.variance.reciprocal().unsqueeze(-1)], -1).unsqueeze(0)
        held, state["unit_acceptance"] = draw_coefficients(
            law, _noise(state), values, seen, design, held, mean, precision
        )
        state["loading"], state["offset"] = held[..., :-1], held[..., -1]
        if "noise" not in state:
            return
        predictor = path @ state["loading"].mT + state["offset"].unsqueeze(1)
        for _ in range(NOISE_STEPS):
            state["noise"], rate = draw_noise(
                law, self.noise_prior, state["noise"], values, seen, predictor, state["noise_step"]
            )
            if adapt:
                state["noise_step"] = state["noise_step"] * (0.3 * (rate - 0.44)).exp()


def _noise(state: State) -> Tensor | None:
    return state["noise"].unsqueeze(1) if "noise" in state else None
