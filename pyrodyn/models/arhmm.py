r"""The autoregressive hidden Markov model: observations are themselves the path of switching linear dynamics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrodyn.distributions import GivenModes, SwitchingPath
from pyrodyn.errors import ModelError
from pyrodyn.models._switching import Renumbered, StepPrior
from pyrodyn.models._switching_blocks import Blocks
from pyrodyn.models._switching_checks import check_modes, check_options, inside_of
from pyrodyn.models._switching_moves import State, StepMoves
from pyrodyn.models._switching_start import initial_sites, observed_start
from pyrodyn.models._switching_steps import ModeSteps, mode_summaries, permuted, step_labels
from pyrodyn.program import OBSERVATION_DIMS, IntegratedModel, Labelled, globals_given
from pyrodyn.recording import Recording

MOST_COEFFICIENTS = 2000  # of one mode: more have to be reduced first, or read out of a path of fewer dimensions


@dataclass(frozen=True)
class ARHMM(Renumbered, IntegratedModel):
    r"""Autoregressive hidden Markov model of real-valued observations.

    With :math:`\tilde y` the observations in units of `Recording.scale` about `Recording.center`,

    .. math::
        z_t \mid z_{t-1}, y_{t-1} &\sim \mathrm{softmax}\big(\log P_{z_{t-1}} + R \tilde y_{t-1} + r + W u_t\big), \\
        \tilde y_t &= \sum_{l=1}^{L} A^{(l)}_{z_t} \tilde y_{t-l} + b_{z_t} + B_{z_t} u_t + \epsilon_t, \qquad
        \epsilon_t \sim N(0, Q_{z_t}),

    the first L bins of a trial being standard normal. R, r and W are there with ``recurrent`` alone. Priors are those
    of `pyrodyn.models._switching.StepPrior`. Modes are summed out by the forward algorithm, exactly.

    Parameters
    ----------
    num_modes : int
    lags : int
        L.
    recurrent : bool
        Whether the last observations, and the inputs, enter the transitions.
    stickiness, concentration, persistence, dynamics_scale, bias_scale, max_radius : float
        As in `SwitchingLDS`.

    Notes
    -----
    Every unit must be observed in all bins up to a trial's end. Noise of the measurement counts as noise of the
    dynamics; where there is much of it, or units are many or missing, `SwitchingLDS` is the better model.

    References
    ----------
    Hamilton, Econometrica 57:357 (1989); Wiltschko et al., Neuron 88:1121 (2015), of behaviour.
    """

    num_modes: int
    lags: int = 1
    recurrent: bool = False
    stickiness: float = 10.0
    concentration: float = 1.0
    persistence: float = 0.85
    dynamics_scale: float = 0.25
    bias_scale: float = 0.5
    max_radius: float = 1.05

    def __post_init__(self) -> None:
        check_options(self)
        if isinstance(self.lags, bool) or not isinstance(self.lags, int) or self.lags < 1:
            raise ModelError(f"lags must be a whole number of at least 1, got {self.lags!r}")

    @property
    def treatment(self) -> str:
        return "summed out exactly"

    def check(self, recording: Recording) -> None:
        check_modes(self, recording, self.lags)
        units = recording.num_units
        if units * (units * self.lags + 1 + recording.num_inputs) > MOST_COEFFICIENTS:
            raise ModelError(
                f"ARHMM would have {units * units * self.lags} autoregressive coefficients in each mode for {units} "
                f"units and lags={self.lags}; reduce the units to a few components first, or use models.SwitchingLDS"
            )
        if recording.mask is not None:
            hidden = ~recording.mask & inside_of(recording).unsqueeze(-1)
            if bool(hidden.any()):
                trial, time, unit = (int(i) for i in hidden.nonzero()[0])
                raise ModelError(
                    f"ARHMM needs every unit in every bin before a trial's end, but {int(hidden.sum())} entries are "
                    f"hidden (first: trial {recording.trial[trial]}, time {recording.time[time]:.4g} s, unit "
                    f"{recording.unit[unit].item()!r}); use models.SwitchingLDS, whose path needs no unit in particular"
                )

    # ------------------------------------------------------------------------------------------ the program

    def step_prior(self, recording: Recording) -> StepPrior:
        """Prior of the steps of the observations."""
        return StepPrior(
            self.num_modes, Blocks.undivided(recording.num_units), self.lags, recording.num_inputs, self.concentration,
            self.stickiness, self.persistence, self.dynamics_scale, self.bias_scale, self.max_radius, self.recurrent,
        )  # fmt: skip

    def sample_globals(self, recording: Recording) -> ModeSteps:
        return self.step_prior(recording).sample(recording)

    def law(self, parameters: ModeSteps, recording: Recording) -> SwitchingPath:
        """Law of the standardised observations."""
        return self.step_prior(recording).path(parameters, recording, inside_of(recording).to(recording.device))

    def trials(self, parameters: ModeSteps, recording: Recording) -> Tensor:
        law = Standardised(self.law(parameters, recording), recording)
        values = pyro.sample("observations", law, obs=recording.observations, infer=OBSERVATION_DIMS)
        # Observations first, then the modes given them: the same joint law, and each factor is known.
        pyro.sample("mode", GivenModes(law.path.mode_potentials(law.standardise(values))))
        return values

    def evidence(self, parameters: ModeSteps, recording: Recording, observations: Tensor) -> Tensor:
        return Standardised(self.law(parameters, recording), recording).log_prob(observations)

    def draw_local(self, parameters: ModeSteps, recording: Recording) -> dict[str, Tensor]:
        law = Standardised(self.law(parameters, recording), recording)
        if recording.observations is None:
            path, modes = law.path.expand((*law.batch_shape[:-1], recording.num_trials)).sample_jointly()
            return {"mode": modes, "standardised": path}
        return {"mode": law.path.sample_modes(law.standardise(recording.observations))}

    def latents(self, parameters: ModeSteps, local: Mapping[str, Tensor], recording: Recording) -> Labelled:
        return {"mode_path": (("trial", "time"), local["mode"])}

    def expected(self, parameters: ModeSteps, local: Mapping[str, Tensor], recording: Recording) -> Tensor:
        """One step ahead of what was observed before, in the bin's mode."""
        law = Standardised(self.law(parameters, recording), recording)
        if recording.observations is None:
            past, modes = local["standardised"], local["mode"]
        else:
            past, modes = law.standardise(recording.observations), local["mode"]
        chosen = modes[..., self.lags :, None, None]
        ahead = law.path.step_means(past).take_along_dim(chosen, -2).squeeze(-2)
        none = ahead.new_zeros(*ahead.shape[:-2], self.lags, ahead.shape[-1])
        return recording.center + recording.scale * torch.cat([none, ahead], -2)

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        prior = self.step_prior(recording)
        if recording.observations is None:
            values = torch.zeros(recording.num_trials, recording.num_bins, recording.num_units, dtype=torch.float64)
        else:
            values = (recording.observations - recording.center) / recording.scale
        fit = observed_start(prior, values.cpu(), recording)
        found = initial_sites(prior, fit, recording, torch.eye(recording.num_units, dtype=torch.float64))
        return {name: value.to(recording.device) for name, value in found.items()}

    def conditionals(self, recording: Recording, observations: Tensor | None = None) -> ObservedSweep:
        """What `inference.Gibbs` draws from."""
        return ObservedSweep(self, recording, observations)

    # ------------------------------------------------------------------------------------------ the posterior

    def coordinates(self, recording: Recording) -> dict[str, Any]:
        modes = np.arange(self.num_modes)
        return {"mode": modes, "mode_to": modes, "lag": np.arange(1, self.lags + 1), "unit_from": recording.unit}

    def label(self, parameters: ModeSteps) -> Labelled:
        labelled = step_labels(parameters, "unit")
        by_lag = parameters.dynamics.unflatten(-1, (self.lags, -1)).movedim(-2, -3)
        return labelled | {"dynamics": (("mode", "lag", "unit", "unit_from"), by_lag)}

    def unlabel(self, values: Mapping[str, Tensor]) -> ModeSteps:
        held: Any = {name: values.get(name) for name in ModeSteps._fields}
        return ModeSteps(**held | {"dynamics": values["dynamics"].movedim(-3, -2).flatten(-2)})

    def invariants(self, parameters: ModeSteps) -> Labelled:
        units = parameters.bias.shape[-1]
        return mode_summaries(parameters, torch.eye(units, dtype=torch.float64, device=parameters.bias.device))

    def transformed(self, parameters: ModeSteps, recording: Recording, seed: int) -> ModeSteps:
        """Number the modes anew at random."""
        order = torch.randperm(self.num_modes, generator=torch.Generator().manual_seed(seed))
        return permuted(parameters, order)


class Standardised(TorchDistribution):
    """Observations whose standardised values are a switching path: event (time, unit)."""

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)

    def __init__(self, path: SwitchingPath, recording: Recording) -> None:
        self.path, self.recording = path, recording
        super().__init__(path.batch_shape, path.event_shape, validate_args=False)

    def standardise(self, values: Tensor) -> Tensor:
        return (values - self.recording.center) / self.recording.scale

    def log_prob(self, value: Tensor) -> Tensor:
        inside: Tensor = inside_of(self.recording).to(value.device)
        return self.path.log_prob(self.standardise(value)) - inside.sum(-1) * self.recording.scale.log().sum()

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        return self.recording.center + self.recording.scale * self.path.sample(sample_shape)

    def expand(self, batch_shape, _instance=None) -> Standardised:
        return Standardised(self.path.expand(batch_shape), self.recording)


class ObservedSweep:
    """Moves of blocked Gibbs sampling for an `ARHMM`, whose path is observed."""

    def __init__(self, model: ARHMM, recording: Recording, observations: Tensor | None = None) -> None:
        self.model, self.recording = model, recording
        self.moves = StepMoves(model.step_prior(recording), recording)
        values = recording.values.unsqueeze(0) if observations is None else observations
        self.path = (values - recording.center) / recording.scale  # (group, trial, time, unit)

    def start(self, values: dict[str, Tensor], chains: int) -> State:
        """Chains at ``values`` (*event) or (group, *event)."""
        grouped = values if values["process_scale"].dim() else {n: v.unsqueeze(0) for n, v in values.items()}
        groups = len(grouped["process_scale"])
        self.path = self.path.expand(groups, *self.path.shape[1:])
        steps = globals_given(self.model, {name: value.unsqueeze(1) for name, value in grouped.items()}, self.recording)
        held = self.moves.start(steps, grouped, groups)
        law = self.moves.prior.path(self.moves.steps(held), self.recording, self.moves.inside)
        weight = law.mode_probabilities(self.path)
        state = {name: value.repeat_interleave(chains, 0) for name, value in held.items()} | {"aim": weight}
        self.moves.draw_modes(state, self._path(state))
        return state

    def sweep(self, state: State, share: float) -> State:
        """Every unknown anew."""
        del share  # nothing adapts
        state = dict(state)
        path = self._path(state)
        for move in (self.moves.draw_modes, self.moves.draw_steps, self.moves.draw_transitions):
            move(state, path)
        return state

    def sites(self, state: State) -> dict[str, Tensor]:
        """The values (chain, *event) of the program's sites."""
        return self.moves.sites(state, self.moves.steps(state))

    def local(self, state: State) -> dict[str, Tensor]:
        """The modes (chain, trial, time), numbered as in `sites`."""
        back = self.moves.order(state).argsort(-1)
        return {"mode": back.gather(1, state["modes"].flatten(1)).reshape(state["modes"].shape)}

    def _path(self, state: State) -> Tensor:
        return self.path.repeat_interleave(len(state["bias"]) // len(self.path), 0)
