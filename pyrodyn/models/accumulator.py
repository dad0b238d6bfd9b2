r"""A decision as a ramp: evidence accumulates as a diffusion with drift, up to a bound or without one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.special import log_ndtr

from pyrodyn.errors import ModelError
from pyrodyn.models._conditioned import RAREST, ConditionedChain, early_and_late
from pyrodyn.program import Labelled, globals_given
from pyrodyn.readouts import Poisson
from pyrodyn.recording import Recording

START = 0.5  # of a ramp without bound: what its positions are measured by
STARTS = (0.3, 0.5, 0.7)  # that the first guess tries
LINEAR = -36.0  # argument below which log softplus is its argument to the last digit
MAX_DRIFT = 1.5  # of the first guess, per second


class AccumulatorParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event)."""

    drift: Tensor  # (condition): per second
    diffusion: Tensor  # (): per root of a second
    start: Tensor  # ()
    offset: Tensor  # (unit): log of the gain, the expected count of a bin at position 1


@dataclass(frozen=True)
class Accumulator(ConditionedChain):
    r"""Drift and diffusion of one variable that sets the rates, absorbed where it reaches a bound.

    .. math::
        x_t = x_{t-1} + \beta_c \Delta + \sigma \sqrt{\Delta}\, \epsilon_t, \quad x_0 = s, \qquad
        y_{t,n} \sim \mathrm{Poisson}\big(\Delta\, \mathrm{softplus}(C_n x_t)\big)

    in condition c, with bins of :math:`\Delta` seconds, gains :math:`C_n = e^{d_n} / \Delta` in events a second, and x
    held at 1 from the bin on in which it passes there. Without a bound the start is one half by definition, which is
    then the unit of x.

    x is summed out on a grid: a hidden Markov chain of positions, with a state of its own at the bound. A step's
    density is taken at the grid's points, a sum that is the integral to 5e-9 once the standard deviation is the
    spacing, and is normalised on what lies inside; the mass beyond the bound is exact. What is left is of the order of
    the spacing squared, where the density ends at the bound. No path goes below the lower end of the grid, where rates
    are next to zero.

    Parameters
    ----------
    conditions : tuple of str
        As in `ConditionedChain`; the drift depends on them.
    bound : bool
        Whether x is absorbed at 1.
    grid : int
        Number of positions.
    lower, upper : float
        Ends of the grid; with a bound it ends there.
    drift_scale : float
        Prior standard deviation of a drift, per second.
    diffusion : float
        Middle of the prior of :math:`\sigma`, per root of a second.

    References
    ----------
    Latimer, Yates, Meister, Huk & Pillow, Science 349:184 (2015); Zoltowski, Pillow & Linderman, ICML 2020.
    """

    bound: bool = True
    grid: int = 100
    lower: float = -0.5
    upper: float = 2.0
    drift_scale: float = 1.0
    diffusion: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.grid, int) or self.grid < 10:
            raise ModelError(f"grid must be a whole number of at least 10, got {self.grid!r}")
        if not self.lower <= 0.0 or not self.upper > 1.0:
            raise ModelError(f"lower must be 0 or less and upper more than 1, got {self.lower!r} and {self.upper!r}")
        if not self.drift_scale > 0 or not self.diffusion > 0:
            raise ModelError(
                f"drift_scale and diffusion must be positive, got {self.drift_scale!r} and {self.diffusion!r}"
            )

    @property
    def spacing(self) -> float:
        """Distance between two positions of the grid."""
        return ((1.0 if self.bound else self.upper) - self.lower) / self.grid

    @property
    def num_states(self) -> int:
        return self.grid + self.bound

    @property
    def positions(self) -> Tensor:
        """Position in every state, (state,): the middles of the grid's cells, and the bound."""
        inside = self.lower + self.spacing * (torch.arange(self.grid, dtype=torch.float64) + 0.5)
        return torch.cat([inside, inside.new_ones(1)]) if self.bound else inside

    def check(self, recording: Recording) -> None:
        super().check(recording)
        step = self.diffusion * math.sqrt(recording.bin_width)
        if self.spacing > step:
            needed = math.ceil(self.grid * self.spacing / step)
            raise ModelError(
                f"grid has positions {self.spacing:.3g} apart, but in a bin of {recording.bin_width:g} s x moves by "
                f"{step:.3g}; expected a spacing no larger: set grid to {needed} or more, or take wider bins"
            )

    def sample_globals(self, recording: Recording) -> AccumulatorParameters:
        zeros = torch.zeros(self.num_conditions, dtype=torch.float64, device=recording.device)
        drift = pyro.sample("drift", dist.Normal(zeros, self.drift_scale).to_event(1))
        one = zeros[:1]
        diffusion = pyro.sample("diffusion", dist.LogNormal(one + math.log(self.diffusion), 0.5).to_event(1))
        start = torch.full_like(diffusion, START)
        if self.bound:
            start = pyro.sample("start", dist.Beta(one + 2.0, one + 2.0).to_event(1))
        return AccumulatorParameters(drift, diffusion, start, Poisson().sample_offset(recording))

    def chain(self, parameters: AccumulatorParameters, recording: Recording) -> tuple[Tensor, Tensor]:
        positions = self.positions[: self.grid].to(recording.device)
        start = parameters.start.unsqueeze(-1)  # (*draw, 1, condition or 1, position)
        drift = (parameters.drift * recording.bin_width).unsqueeze(-1)
        sd = (parameters.diffusion * math.sqrt(recording.bin_width)).unsqueeze(-1)
        initial = self._steps(start + drift, sd)
        transition = self._steps(positions + drift, sd)
        if self.bound:
            held = transition.new_full((self.grid + 1,), RAREST)
            held[-1] = 0.0
            transition = torch.cat([transition, held.expand(*transition.shape[:-2], 1, -1)], -2)
        return initial.squeeze(-2), transition

    def _steps(self, mean: Tensor, sd: Tensor) -> Tensor:
        """Log probabilities of the states after a step with means (*batch, from) and sd (*batch, 1)."""
        mean, sd = mean.unsqueeze(-1), sd.unsqueeze(-1)
        inside = -0.5 * ((self.positions[: self.grid].to(mean.device) - mean) / sd).square()
        inside = inside - inside.logsumexp(-1, keepdim=True)
        if self.bound:
            beyond = (mean - 1.0) / sd
            inside = torch.cat([inside + log_ndtr(-beyond), log_ndtr(beyond)], -1)
        return inside.clamp(min=RAREST)

    def predictor(self, parameters: AccumulatorParameters, recording: Recording) -> Tensor:
        gain = (parameters.offset.exp() / recording.bin_width).unsqueeze(-2)
        driven = gain * self.positions.to(gain.device).unsqueeze(-1)
        # Far below zero the logarithm of softplus is its argument, and softplus itself is 0.
        log_rate = torch.where(driven < LINEAR, driven, softplus(driven.clamp(min=LINEAR)).log())
        return log_rate + math.log(recording.bin_width)

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
        return {
            "drift": (("condition",), parameters.drift),
            "diffusion": (("accumulator",), parameters.diffusion),
            "start": (("accumulator",), parameters.start),
            "offset": (("unit",), parameters.offset),
        }

    def coordinates(self, recording: Recording) -> dict[str, np.ndarray]:
        return super().coordinates(recording) | {"accumulator": np.array(["x"])}

    def unlabel(self, values: Mapping[str, Tensor]) -> AccumulatorParameters:
        return AccumulatorParameters(*(values[name] for name in AccumulatorParameters._fields))

    def invariants(self, parameters: AccumulatorParameters) -> Labelled:
        return self.label(parameters)

    def transformed(self, parameters: AccumulatorParameters, recording: Recording, seed: int) -> AccumulatorParameters:
        """Nothing: the bound, or the start, is the unit of x, and rates that rise with x are its direction."""
        return parameters
