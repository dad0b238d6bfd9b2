"""Blocked Gibbs sampling of switching linear dynamics: what each move needs of the model, and in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyrodyn.conditionals.modes import settle
from pyrodyn.conditionals.steps import draw_coefficients, draw_precision, draw_scale, step_sums
from pyrodyn.conditionals.transitions import StateLogits, draw_dirichlet, transition_counts
from pyrodyn.conditionals.units import draw_coefficients as draw_units
from pyrodyn.conditionals.units import draw_noise
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.models._switching import RECURRENCE, SCALE, ModeSteps, permuted, rotated
from pyrodyn.models._switching_orbit import log_step_prior, reshape_latents, shift_latents
from pyrodyn.models._switching_path import draw_path
from pyrodyn.models._switching_start import inside_of
from pyrodyn.program import globals_given
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

if TYPE_CHECKING:
    from pyrodyn.models.switching_lds import SwitchingLDS

State = dict[str, Tensor]
SETTLING = 15  # rounds in which path and modes find each other, parameters held, before the chains start
NOISE_STEPS = 4  # of the random walk of a unit's noise in a sweep: it mixes slower than all else
_EVENT_DIMS = {
    "initial": 1,
    "transition": 2,
    "dynamics": 3,
    "bias": 2,
    "process_noise": 3,
    "input_gain": 3,
    "loading": 2,
    "offset": 1,
    "noise": 1,
}


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
        self.inside = inside_of(recording)
        self.inputs = recording.inputs if self.prior.num_inputs else None
        self.input_scale = recording.input_scale if self.prior.num_inputs else torch.ones(0, dtype=torch.float64)
        self.regressor_sd = self.prior.regressor_sd(self.input_scale)
        with poutine.block(), torch.no_grad():
            trace = poutine.trace(model.sample_globals).get_trace(recording)
        nodes: Any = trace.nodes
        self.offset_prior = nodes["offset"]["fn"].base_dist
        self.event_dims = {n: len(site["fn"].event_shape) for n, site in nodes.items() if site["type"] == "sample"}
        name = model.readout.noise_name
        self.noise_prior = None if name is None else nodes[name]["fn"].base_dist

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
        held: State = {}
        for name, dims in _EVENT_DIMS.items():
            value = getattr(parameters, name)
            if value is not None:
                event = value.shape[value.dim() - dims :]
                held[name] = value.reshape(-1, *event).expand(groups, *event).clone()
        held["process_scale"] = grouped["process_scale"].clone()
        # Each row of the table is one of gamma variables; their sum, which nothing else knows, starts at its mean.
        held["table"] = held.pop("transition").log() + self.prior.counts.sum(-1, keepdim=True).log()
        if self.prior.recurrent and self.prior.switches:
            held["recurrence_variance"] = grouped["recurrence_variance"].clone()
            spread = grouped["recurrence_variance"].sqrt()[:, None, None]
            parts = [grouped["slopes"]] + ([grouped["input_slopes"]] if self.prior.num_inputs else [])
            held["slopes"] = spread * torch.cat(parts, -1)
        weight, path = self._settle(held, groups)
        state = {name: value.repeat_interleave(chains, 0) for name, value in held.items()}
        state |= {"aim": weight, "centre": path, "aim_loading": held["loading"].clone()}
        state["path"] = path.repeat_interleave(chains, 0)
        state["modes"] = weight.argmax(-1).repeat_interleave(chains, 0)
        state["stretch_step"] = torch.full((groups * chains,), 0.05, dtype=torch.float64)
        if "noise" in state:
            state["noise_step"] = torch.full_like(state["noise"], 0.1)
        draw_path(self, state)
        self._draw_modes(state)
        return state

    def _settle(self, held: State, groups: int) -> tuple[Tensor, Tensor]:
        """Probabilities of modes and mean path (group, trial, time, ...) given the parameters."""
        law = self.prior.path(self.steps(held), self.recording)
        zeros = torch.zeros(self.recording.num_trials, *law.event_shape, dtype=torch.float64)
        found = settle(law, self.readout(held, zeros), self.values, (groups, self.recording.num_trials), SETTLING)
        return found.weight, found.chain.mean

    def sites(self, state: State) -> dict[str, Tensor]:
        """The values (chain, *event) of the program's sites, in the model's gauge."""
        weights, turn = gauge_fix(state["loading"] / self.loading_scale, self.model.pivots(self.recording))
        steps = permuted(rotated(self.steps(state), turn.unsqueeze(1)), self._order(state).unsqueeze(1))
        steps = steps.map(lambda part: part.squeeze(1))
        found = self.prior.sites(steps, state["process_scale"], state.get("recurrence_variance"), self.input_scale)
        found |= {"weights": weights, "offset": state["offset"]}
        if "noise" in state:
            found[str(self.model.readout.noise_name)] = state["noise"]
        return found

    def local(self, state: State) -> dict[str, Tensor]:
        """The paths (chain, trial, time, latent), in the model's gauge."""
        _, turn = gauge_fix(state["loading"], self.model.pivots(self.recording))
        return {"latent": state["path"] @ turn.unsqueeze(1)}

    def _order(self, state: State) -> Tensor:
        """Which mode of each chain takes which number, (chain, mode): as they overlap most with the aim."""
        modes, chains = self.prior.modes, len(state["modes"])
        chosen = torch.nn.functional.one_hot(state["modes"], modes).to(torch.float64) * self.inside.unsqueeze(-1)
        aim = state["aim"].repeat_interleave(chains // len(state["aim"]), 0)
        overlap = torch.einsum("ibtj,ibtk->ijk", aim, chosen)
        return torch.stack([torch.from_numpy(linear_sum_assignment(-each.numpy())[1]) for each in overlap])

    # ------------------------------------------------------------------------------------------ parts of the state

    def steps(self, state: State) -> ModeSteps:
        """Parameters of the steps, (chain, 1, ...)."""

        def of_trials(name: str) -> Tensor | None:
            return state[name].unsqueeze(1) if name in state else None

        recurrence = mode_gain = None
        if "slopes" in state:
            whole = self.prior.contrasts @ state["slopes"]
            recurrence = whole[..., : self.prior.latent_dim].unsqueeze(1)
            if self.prior.num_inputs:
                mode_gain = (whole[..., self.prior.latent_dim :] / self.input_scale).unsqueeze(1)
        parts: Any = {name: of_trials(name) for name in ("dynamics", "bias", "process_noise", "input_gain", "initial")}
        transition = torch.softmax(state["table"].unsqueeze(1), -1)
        return ModeSteps(**parts, transition=transition, recurrence=recurrence, mode_gain=mode_gain)

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
        self._draw_modes(state)
        self._draw_steps(state)
        self._draw_transitions(state)
        shift_latents(self, state)
        reshape_latents(self, state, adapt)
        self._draw_units(state, adapt)
        if adapt:  # where the Gaussian about the path is expanded, until the posterior must stay as it is
            groups = len(state["centre"])
            mean = state["path"].unflatten(0, (groups, -1)).mean(1)
            state["centre"] = state["centre"] + 0.1 * (mean - state["centre"])
        return state

    def _draw_modes(self, state: State) -> None:
        law = self.prior.path(self.steps(state), self.recording, self.inside)
        state["modes"] = law.sample_modes(state["path"])

    def _draw_steps(self, state: State) -> None:
        prior, dim = self.prior, self.prior.latent_dim
        weight = torch.nn.functional.one_hot(state["modes"], prior.modes) * self.inside.unsqueeze(-1)
        sums = step_sums(state["path"], weight.to(torch.float64), 1, self.inputs)
        precision = torch.linalg.inv(state["process_noise"])
        held = self._coefficients(state)
        drawn = draw_coefficients(sums, precision, prior.regressor_mean, self.regressor_sd)
        # The prior of the dynamics is not quite normal; where the two differ, a draw may be refused.
        ahead, here = (log_step_prior(prior, part[..., :dim, :].mT) for part in (drawn, held))
        normal_ahead, normal_here = (self._log_normal(part[..., :dim, :].mT) for part in (drawn, held))
        change = torch.nan_to_num(ahead - normal_ahead - here + normal_here, nan=-torch.inf)
        acceptance = change.clamp(max=0.0).exp()
        accepted = (torch.rand_like(acceptance) < acceptance)[..., None, None]
        state["step_acceptance"] = acceptance
        self._keep_coefficients(state, torch.where(accepted, drawn, held))
        precision = draw_precision(sums, self._coefficients(state), state["process_scale"], prior.degrees)
        state["process_noise"] = torch.linalg.inv(precision)
        state["process_scale"] = draw_scale(precision, prior.degrees, *SCALE)

    def _coefficients(self, state: State) -> Tensor:
        """All coefficients of a step, (chain, mode, regressor, latent)."""
        parts = [state["dynamics"].mT, state["bias"].unsqueeze(-2)]
        return torch.cat(parts + ([state["input_gain"].mT] if "input_gain" in state else []), -2)

    def _keep_coefficients(self, state: State, drawn: Tensor) -> None:
        dim = self.prior.latent_dim
        state["dynamics"], state["bias"] = drawn[..., :dim, :].mT, drawn[..., dim, :]
        if "input_gain" in state:
            state["input_gain"] = drawn[..., dim + 1 :, :].mT

    def _log_normal(self, dynamics: Tensor) -> Tensor:
        return -0.5 * ((dynamics - self.prior.mean) / self.prior.sd).square().sum((-2, -1))

    def _draw_transitions(self, state: State) -> None:
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
        features = state["path"][..., :-1, :]
        if self.inputs is not None:
            driven = (self.inputs[:, 1:] / self.input_scale).expand(len(features), -1, -1, -1)
            features = torch.cat([features, driven], -1)
        features = features.flatten(1, 2)
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
        held, state["unit_acceptance"] = draw_units(law, _noise(state), values, seen, design, held, mean, precision)
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
