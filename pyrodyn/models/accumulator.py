r"""A decision as a ramp: evidence accumulates as a diffusion with drift, up to a bound or without one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.errors import ModelError
from pyrodyn.models._conditioned import RAREST, early_and_late
from pyrodyn.models._ramps import MAX_DRIFT, STARTS, Ramps, log_softplus
from pyrodyn.program import Labelled, globals_given
from pyrodyn.readouts import Poisson
from pyrodyn.recording import Recording

START = 0.5  # of a ramp without bound: what its positions are measured by


class AccumulatorParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event)."""

    drift: Tensor  # (condition): per second
    diffusion: Tensor  # (): per root of a second
    start: Tensor  # ()
    collapse: Tensor | None  # (): per second
    offset: Tensor  # (unit): log of the gain, the expected count of a bin at position 1


@dataclass(frozen=True)
class Accumulator(Ramps):
    r"""Drift and diffusion of one variable that sets the rates, absorbed where it reaches a bound.

    .. math::
        x_t = x_{t-1} + \beta_c \Delta + \sigma \sqrt{\Delta}\, \epsilon_t, \quad x_0 = s, \qquad
        y_{t,n} \sim \mathrm{Poisson}\big(\Delta\, \mathrm{softplus}(C_n x_t)\big)

    in condition c, with bins of :math:`\Delta` seconds, gains :math:`C_n = e^{d_n} / \Delta` in events a second, and x
    held at 1 from the bin on in which it passes there. Without a bound the start is one half by definition, which is
    then the unit of x.

    A bound may collapse: after t seconds the evidence decides where it passes :math:`b_t = 1 / (1 + \kappa t)`, and x
    is the evidence in units of the bound, so that rates are the same at all decisions, early or late:

    .. math::
        x_t = g_t \Big(\frac{x_{t-1}}{g_{t-1}} + \beta_c \Delta + \sigma \sqrt{\Delta}\, \epsilon_t\Big),
        \qquad g_t = 1 + \kappa t .

    In the same words, urgency grows with time and multiplies the evidence.

    x is summed out on a grid: a hidden Markov chain of positions, as `Ramps` says.

    Parameters
    ----------
    conditions, grid, lower, drift_scale, diffusion
        As in `Ramps`; ``diffusion`` is the middle of the prior of :math:`\sigma`.
    bound : bool
        Whether x is absorbed at 1.
    upper : float
        Upper end of the grid; with a bound it ends there.
    collapse : float
        Middle of the prior of :math:`\kappa`, per second; 0 for a bound that stays.

    References
    ----------
    Latimer, Yates, Meister, Huk & Pillow, Science 349:184 (2015); Zoltowski, Pillow & Linderman, ICML 2020; of urgency
    as a gain: Ditterich, Eur. J. Neurosci. 24:3628 (2006).
    """

    bound: bool = True
    upper: float = 2.0
    collapse: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.upper > 1.0:
            raise ModelError(f"upper must be more than 1, got {self.upper!r}")
        if not self.collapse >= 0 or (self.collapse and not self.bound):
            raise ModelError(
                f"collapse must be 0 or more, and 0 without a bound, got {self.collapse!r} and bound={self.bound!r}"
            )

    @property
    def end(self) -> float:
        return 1.0 if self.bound else self.upper

    @property
    def bounded(self) -> bool:
        return self.bound

    @property
    def num_states(self) -> int:
        return self.grid + self.bound

    def sample_globals(self, recording: Recording) -> AccumulatorParameters:
        zeros = torch.zeros(self.num_conditions, dtype=torch.float64, device=recording.device)
        drift = pyro.sample("drift", dist.Normal(zeros, self.drift_scale).to_event(1))
        one = zeros[:1]
        diffusion = pyro.sample("diffusion", dist.LogNormal(one + math.log(self.diffusion), 0.5).to_event(1))
        start = torch.full_like(diffusion, START)
        if self.bound:
            start = pyro.sample("start", dist.Beta(one + 2.0, one + 2.0).to_event(1))
        collapse = None
        if self.collapse:
            collapse = pyro.sample("collapse", dist.LogNormal(one + math.log(self.collapse), 0.7).to_event(1))
        return AccumulatorParameters(drift, diffusion, start, collapse, Poisson().sample_offset(recording))

    def chain(self, parameters: AccumulatorParameters, recording: Recording) -> tuple[Tensor, Tensor]:
        positions = self.positions[: self.grid].to(recording.device)
        start = parameters.start[..., None, None]  # (*draw, 1, condition or 1, step, position)
        drift = (parameters.drift * recording.bin_width)[..., None, None]
        sd = (parameters.diffusion * math.sqrt(recording.bin_width))[..., None, None]
        before, after = self._gains(parameters, recording)
        # In units of the bound of its own bin.
        initial = self.steps(after[..., :1, :] * (start + drift), after[..., :1, :] * sd)
        before, after = (part[..., 1:, :] if part.shape[-2] > 1 else part for part in (before, after))
        transition = self.steps(after * (positions / before + drift), after * sd)
        if self.bound:
            held = transition.new_full((self.grid + 1,), RAREST)
            held[-1] = 0.0
            transition = torch.cat([transition, held.expand(*transition.shape[:-2], 1, -1)], -2)
        return initial[..., 0, 0, :], transition

    def _gains(self, parameters: AccumulatorParameters, recording: Recording) -> tuple[Tensor, Tensor]:
        """One over the bound before and after every step, the one to the first bin too, (*draw, 1, 1, step, 1)."""
        if parameters.collapse is None:
            one = torch.ones(1, 1, dtype=torch.float64, device=recording.device)
            return one, one
        times = recording.bin_width * torch.arange(recording.num_bins + 1, dtype=torch.float64)
        gains = 1.0 + parameters.collapse[..., None, None] * times.to(recording.device).unsqueeze(-1)
        return gains[..., :-1, :], gains[..., 1:, :]

    def _numbers(self, recording: Recording) -> int:
        transitions = self.num_conditions * recording.num_bins * self.num_states**2 if self.collapse else 0
        return max(super()._numbers(recording), transitions)

    def predictor(self, parameters: AccumulatorParameters, recording: Recording) -> Tensor:
        gain = (parameters.offset.exp() / recording.bin_width).unsqueeze(-2)
        return log_softplus(gain * self.positions.to(gain.device).unsqueeze(-1)) + math.log(recording.bin_width)

    def latents(self, parameters: AccumulatorParameters, local: Mapping[str, Tensor], recording: Recording) -> Labelled:
        return {"position": (("trial", "time"), self.positions.to(recording.device)[local["state"]])}

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        """Of first guesses that start at several positions, the most probable."""
        if recording.observations is None:
            return self._started(recording, START)
        guesses = [self._started(recording, start) for start in (STARTS if self.bound else (START,))]
        scores = [
            float(self.evidence(globals_given(self, guess, recording), recording, recording.values).sum())
            for guess in guesses
        ]
        return guesses[int(np.argmax(scores))]

    def _started(self, recording: Recording, start: float) -> dict[str, Tensor]:
        zeros = torch.zeros(self.num_conditions, dtype=torch.float64)
        values = {
            "drift": zeros,
            "diffusion": zeros[:1] + self.diffusion,
            "offset": zeros.new_zeros(recording.num_units),
        }
        if self.bound:
            values["start"] = zeros[:1] + start
        if self.collapse:
            values["collapse"] = zeros[:1] + self.collapse
        if recording.observations is None:
            return values
        early, late = early_and_late(recording)
        gain, which = early / start, self.which(recording)
        seconds = 0.8 * recording.lengths * recording.bin_width
        reached = (late.sum(-1) / gain.sum() - start) / seconds
        drift = [reached[which == c].mean() if (which == c).any() else 0.0 for c in range(self.num_conditions)]
        return values | {
            "drift": zeros.new_tensor(np.clip(drift, -MAX_DRIFT, MAX_DRIFT)),
            "offset": torch.from_numpy(np.log(gain)),
        }

    def label(self, parameters: AccumulatorParameters) -> Labelled:
        labelled: Labelled = {
            "drift": (("condition",), parameters.drift),
            "diffusion": (("accumulator",), parameters.diffusion),
            "start": (("accumulator",), parameters.start),
            "offset": (("unit",), parameters.offset),
        }
        if parameters.collapse is not None:
            labelled["collapse"] = (("accumulator",), parameters.collapse)
        return labelled

    def coordinates(self, recording: Recording) -> dict[str, np.ndarray]:
        return super().coordinates(recording) | {"accumulator": np.array(["x"])}

    def unlabel(self, values: Mapping[str, Tensor]) -> AccumulatorParameters:
        held: Any = {name: values.get(name) for name in AccumulatorParameters._fields}
        return AccumulatorParameters(**held)

    def invariants(self, parameters: AccumulatorParameters) -> Labelled:
        return self.label(parameters)

    def transformed(self, parameters: AccumulatorParameters, recording: Recording, seed: int) -> AccumulatorParameters:
        """Nothing: the bound, or the start, is the unit of x, and rates that rise with x are its direction."""
        return parameters
