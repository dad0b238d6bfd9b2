"""What models of decisions share: counts that depend on a hidden chain, and a chain that depends on the condition."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyrodyn.distributions.modes import ConditionedModes
from pyrodyn.errors import ModelError
from pyrodyn.linalg.matrix import broadcast_shapes
from pyrodyn.program import OBSERVATION_DIMS, IntegratedModel
from pyrodyn.readouts import AffineReadout, Poisson, mode_log_likelihood
from pyrodyn.recording import Recording

MOST_NUMBERS = 2_000_000  # in an array of potentials: more draws than that wait
RAREST = -200.0  # log probability of what cannot happen: beyond rounding, and inside the range of the fast kernels


@dataclass(frozen=True)
class ConditionedChain(IntegratedModel):
    """Poisson counts of rates that a hidden state sets; its Markov chain depends on the condition of the trial.

    Parameters
    ----------
    conditions : tuple of str
        Names of the conditions, such as coherences of a stimulus; () where all trials are alike.
    """

    conditions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = self.conditions
        if isinstance(given, str) or not all(isinstance(name, str) for name in given) or len(set(given)) != len(given):
            raise ModelError(f"conditions must be different names, such as ('left', 'right'), or (), got {given!r}")
        object.__setattr__(self, "conditions", tuple(given))

    @property
    def treatment(self) -> str:
        return "summed out exactly"

    @property
    @abstractmethod
    def num_states(self) -> int:
        """Of the hidden chain."""

    @abstractmethod
    def chain(self, parameters: Any, recording: Recording) -> tuple[Tensor, Tensor]:
        """Log probabilities of the first state (*draw, 1, condition, state) and of transitions from state to state.

        Transitions are (*draw, 1, condition, step, state, state), with one step that stands for all or as many as the
        recording has.
        """

    @abstractmethod
    def predictor(self, parameters: Any, recording: Recording) -> Tensor:
        """Log expected counts in every state, (*draw, 1, state, unit)."""

    def check(self, recording: Recording) -> None:
        name = type(self).__name__
        unknown = sorted(set(recording.condition.tolist()) - set(self.conditions)) if self.conditions else []
        if unknown:
            raise ModelError(
                f"the recording has trials of conditions {unknown[:5]}, but the model knows {list(self.conditions)}; "
                f"name them all in {name}(conditions=...), or leave these trials out"
            )
        if recording.num_inputs:
            raise ModelError(
                f"{name} takes no inputs, but the recording has {recording.num_inputs}; leave them out of "
                "Recording.from_arrays, and name stimuli by condition"
            )
        if not recording.regular:
            raise ModelError(
                f"{name} steps from bin to bin and needs equally spaced bins, but the recording's time axis is "
                "irregular; rebin it, or put the gaps into the mask"
            )
        Poisson().check(recording)

    def coordinates(self, recording: Recording) -> dict[str, np.ndarray]:
        return {"condition": np.asarray(self.conditions or ("all",))}

    @property
    def num_conditions(self) -> int:
        return max(1, len(self.conditions))

    def which(self, recording: Recording) -> np.ndarray:
        """Position of every trial's condition, (trial,)."""
        if not self.conditions:
            return np.zeros(recording.num_trials, dtype=int)
        return np.array([self.conditions.index(name) for name in recording.condition.tolist()])

    def law(self, parameters: Any, recording: Recording) -> ConditionedModes:
        """Law of the hidden states of all trials."""
        return ConditionedModes(
            *self.chain(parameters, recording), torch.from_numpy(self.which(recording)), recording.num_bins
        )

    def trials(self, parameters: Any, recording: Recording) -> Tensor:
        state = pyro.sample("state", self.law(parameters, recording))
        return pyro.sample(
            "observations",
            self._given(parameters, state, recording),
            obs=recording.observations,
            infer=OBSERVATION_DIMS,
        )

    def evidence(self, parameters: Any, recording: Recording, observations: Tensor) -> Tensor:
        lead = broadcast_shapes(self._lead(parameters), observations.shape[:-3])
        values = observations.expand(*lead, *observations.shape[-3:]).reshape(-1, *observations.shape[-3:])
        found = [
            self.law(some, recording).log_normaliser(self._seen(some, recording, values[chosen]))
            for chosen, some in self._in_batches(parameters, lead, recording)
        ]
        return torch.cat(found).reshape(*lead, recording.num_trials)

    def draw_local(self, parameters: Any, recording: Recording) -> dict[str, Tensor]:
        lead = self._lead(parameters)
        with torch.no_grad():
            drawn = [
                self.law(some, recording).sample_given(self._seen(some, recording, recording.observations))
                for _, some in self._in_batches(parameters, lead, recording)
            ]
        return {"state": torch.cat(drawn).reshape(*lead, recording.num_trials, recording.num_bins)}

    def expected(self, parameters: Any, local: Mapping[str, Tensor], recording: Recording) -> Tensor:
        return self._given(parameters, local["state"], recording).mean

    def _given(self, parameters: Any, state: Tensor, recording: Recording) -> AffineReadout:
        """Law of the observations in states (*draw, trial, time)."""
        predictor = self.predictor(parameters, recording)  # (*draw, 1, state, unit)
        lead = broadcast_shapes(predictor.shape[:-2], state.shape[:-1])
        places = state.expand(*lead, -1).unsqueeze(-1).expand(*lead, -1, recording.num_units)
        chosen = predictor.expand(*lead, *predictor.shape[-2:]).gather(-2, places)
        one = torch.eye(recording.num_units, dtype=predictor.dtype, device=predictor.device)
        return AffineReadout(Poisson(), chosen, one, torch.zeros_like(one[0]), None, recording.mask)

    def _seen(self, parameters: Any, recording: Recording, observations: Tensor | None) -> Tensor:
        """Log likelihood of every bin in every state, (draw, trial, time, state)."""
        predictor = self.predictor(parameters, recording)
        if observations is None:
            return predictor.new_zeros(len(predictor), recording.num_trials, recording.num_bins, self.num_states)
        return mode_log_likelihood(Poisson(), predictor, None, observations, recording.mask)

    def _event_dims(self, parameters: Any) -> dict[str, int]:
        """Of the parameters that there are."""
        return {name: len(dims) for name, (dims, _) in self.label(parameters).items()}

    def _lead(self, parameters: Any) -> torch.Size:
        """The draw dimensions of the parameters."""
        dims = self._event_dims(parameters)
        return broadcast_shapes(*(getattr(parameters, name).shape[: -size - 1] for name, size in dims.items()))

    def _in_batches(self, parameters: Any, lead: torch.Size, recording: Recording) -> Iterator[tuple[slice, Any]]:
        """The parameters of some draws at a time, (draw, 1, *event), and which they are.

        The transitions of a grid of positions are large: those of all draws at once would fill the memory.
        """
        flat = {}
        for name, dims in self._event_dims(parameters).items():
            value = getattr(parameters, name)
            event = value.shape[value.dim() - dims :]
            flat[name] = value.expand(*lead, 1, *event).reshape(-1, 1, *event)
        size = max(1, MOST_NUMBERS // self._numbers(recording))
        for start in range(0, lead.numel(), size):
            chosen = slice(start, start + size)
            yield chosen, parameters._replace(**{name: value[chosen] for name, value in flat.items()})

    def _numbers(self, recording: Recording) -> int:
        """In the largest arrays of one draw: transitions by condition or by trial, and likelihoods by bin."""
        return self.num_states * max(
            self.num_conditions * self.num_states, recording.num_trials * max(recording.num_bins, self.num_states)
        )


def early_and_late(recording: Recording, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Mean counts in the first bins, (unit,), and in the last bins of every trial, (trial, unit)."""
    counts = recording.values.numpy()
    mask = np.ones(counts.shape) if recording.mask is None else recording.mask.numpy().astype(float)
    place = np.arange(recording.num_bins) / recording.lengths[:, None]
    first, last = (
        np.where(part, 1.0, 0.0)[..., None] * mask for part in (place < share, (place >= 1 - share) & (place < 1))
    )
    typical = (counts.sum((0, 1)) + 0.5) / (mask.sum((0, 1)) + 1.0)
    # As if one bin more had been seen, at the common level.
    early = ((first * counts).sum((0, 1)) + typical) / (first.sum((0, 1)) + 1.0)
    return early, ((last * counts).sum(1) + typical) / (last.sum(1) + 1.0)
