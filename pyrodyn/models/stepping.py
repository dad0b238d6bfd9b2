r"""A decision as one step: the rate jumps once in a trial, at a time and in a direction that vary."""

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

from pyrodyn.errors import ModelError
from pyrodyn.linalg.matrix import broadcast_shapes
from pyrodyn.models._conditioned import RAREST, ConditionedChain, early_and_late
from pyrodyn.program import Labelled
from pyrodyn.readouts import Poisson
from pyrodyn.recording import Recording

PHASES = ("before", "up", "down")


class SteppingParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event)."""

    step_time: Tensor  # (condition): mean, in seconds
    up_probability: Tensor  # (condition)
    offset: Tensor  # (unit): log expected count of a bin before the step
    change: Tensor  # (outcome, unit): of the log rate, after a step up and down


@dataclass(frozen=True)
class Stepping(ConditionedChain):
    r"""One step of the rate in every trial.

    .. math::
        \tau &= g_1 + \dots + g_r, \quad g_i \sim \mathrm{Geometric}(r \Delta / T_c), \qquad
        o \sim \mathrm{Bernoulli}(\pi_c), \\
        y_{t,n} &\sim \mathrm{Poisson}(e^{d_n}) \; (t \le \tau), \qquad
        y_{t,n} \sim \mathrm{Poisson}(e^{d_n + \delta_{o,n}}) \; (t > \tau)

    in condition c, with bins of :math:`\Delta` seconds: the time of the step is negative binomial with mean
    :math:`T_c`, its direction o is up or down. A hidden chain of r phases and two absorbing states has just this law,
    and sums step times and directions out exactly.

    Which direction is called up is a matter of numbering: the model is the same with both exchanged. A fit starts with
    the higher rates as "up".

    Parameters
    ----------
    conditions : tuple of str
        As in `ConditionedChain`; step times and directions depend on them, rates do not.
    phases : int
        The r of the negative binomial: 1 is a geometric law, more makes step times less variable.
    step_time : float
        Seconds at the middle of the prior of a mean step time.
    change_scale : float
        Prior standard deviation of the change of a log rate.

    References
    ----------
    Latimer, Yates, Meister, Huk & Pillow, Science 349:184 (2015).
    """

    phases: int = 2
    step_time: float = 0.3
    change_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.phases, int) or self.phases < 1:
            raise ModelError(f"phases must be a whole number of at least 1, got {self.phases!r}")
        if not self.step_time > 0 or not self.change_scale > 0:
            raise ModelError(
                f"step_time and change_scale must be positive, got {self.step_time!r} and {self.change_scale!r}"
            )

    @property
    def num_states(self) -> int:
        return self.phases + 2

    def coordinates(self, recording: Recording) -> dict[str, np.ndarray]:
        return super().coordinates(recording) | {"phase": np.array(PHASES), "outcome": np.array(PHASES[1:])}

    def sample_globals(self, recording: Recording) -> SteppingParameters:
        zeros = torch.zeros(self.num_conditions, dtype=torch.float64, device=recording.device)
        delay = pyro.sample("delay", dist.LogNormal(zeros + math.log(self.step_time), 0.7).to_event(1))
        up = pyro.sample("up_probability", dist.Beta(zeros + 1.0, zeros + 1.0).to_event(1))
        offset = Poisson().sample_offset(recording)
        change = pyro.sample(
            "change", dist.Normal(zeros.new_zeros(2, recording.num_units), self.change_scale).to_event(2)
        )
        # Each phase lasts one bin at least.
        return SteppingParameters(delay + self.phases * recording.bin_width, up, offset, change)

    def chain(self, parameters: SteppingParameters, recording: Recording) -> tuple[Tensor, Tensor]:
        leave = self.phases * recording.bin_width / parameters.step_time
        stay, size = (-leave).log1p(), self.phases + 2
        up, down = parameters.up_probability.log(), (-parameters.up_probability).log1p()
        lead = broadcast_shapes(leave.shape, up.shape)
        never = leave.new_full(lead, RAREST)
        entries = [[never] * size for _ in range(size)]
        for i in range(self.phases):
            entries[i][i] = stay.expand(lead)
            if i < self.phases - 1:
                entries[i][i + 1] = leave.log().expand(lead)
        entries[self.phases - 1][-2:] = [(leave.log() + side).expand(lead) for side in (up, down)]
        for i in (-1, -2):
            entries[i][i] = torch.zeros_like(never)
        transition = torch.stack([torch.stack(row, -1) for row in entries], -2)
        initial = torch.stack([torch.zeros_like(never)] + [never] * (size - 1), -1)
        return initial, transition.clamp(min=RAREST).unsqueeze(-3)

    def predictor(self, parameters: SteppingParameters, recording: Recording) -> Tensor:
        before = parameters.offset.unsqueeze(-2)
        after = before + parameters.change
        return torch.cat([before.expand(*after.shape[:-2], self.phases, -1), after], -2)

    def latents(self, parameters: SteppingParameters, local: Mapping[str, Tensor], recording: Recording) -> Labelled:
        return {"phase_path": (("trial", "time"), (local["state"] - self.phases + 1).clamp(min=0))}

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        zeros = torch.zeros(self.num_conditions, dtype=torch.float64)
        values = {
            "delay": zeros + self.step_time,
            "up_probability": zeros + 0.5,
            "offset": zeros.new_zeros(recording.num_units),
            "change": zeros.new_tensor([[0.3], [-0.3]]).expand(2, recording.num_units).clone(),
        }
        if recording.observations is None:
            return values
        early, late = early_and_late(recording)
        log_ratio = np.log(late / early)
        which, high = self.which(recording), log_ratio.mean(-1) > np.median(log_ratio.mean(-1))
        sides = [late[side].mean(0) if side.any() else late.mean(0) for side in (high, ~high)]
        # Halfway: the late counts of a single trial are noisy, and trials were told apart by them.
        change = 0.5 * np.log(np.stack(sides) / early).clip(-2 * self.change_scale, 2 * self.change_scale)
        share = [(high[which == c].sum() + 2.0) / ((which == c).sum() + 4.0) for c in range(self.num_conditions)]
        usual = recording.lengths.mean() * recording.bin_width
        return values | {
            "delay": zeros + math.exp(0.5 * (math.log(self.step_time) + math.log(0.4 * usual))),
            "up_probability": zeros.new_tensor(share),
            "offset": torch.from_numpy(np.log(early)),
            "change": torch.from_numpy(change),
        }

    def label(self, parameters: SteppingParameters) -> Labelled:
        return {
            "step_time": (("condition",), parameters.step_time),
            "up_probability": (("condition",), parameters.up_probability),
            "offset": (("unit",), parameters.offset),
            "change": (("outcome", "unit"), parameters.change),
        }

    def unlabel(self, values: Mapping[str, Tensor]) -> SteppingParameters:
        return SteppingParameters(*(values[name] for name in SteppingParameters._fields))

    def invariants(self, parameters: SteppingParameters) -> Labelled:
        up = parameters.up_probability.unsqueeze(-1)
        change = parameters.change
        return {
            "step_time": (("condition",), parameters.step_time),
            "offset": (("unit",), parameters.offset),
            "mean_change": (("condition", "unit"), up * change[..., :1, :] + (1.0 - up) * change[..., 1:, :]),
            "change_difference": (("unit",), (change[..., 0, :] - change[..., 1, :]).abs()),
        }

    def transformed(self, parameters: SteppingParameters, recording: Recording, seed: int) -> SteppingParameters:
        """Call up down."""
        return parameters._replace(up_probability=1.0 - parameters.up_probability, change=parameters.change.flip(-2))

    def log_copies(self, recording: Recording) -> float:
        """Up and down may be exchanged."""
        return math.log(2.0)

    def nearest_copy(
        self, values: Mapping[str, Tensor], reference: Mapping[str, Tensor], recording: Recording
    ) -> dict[str, Tensor]:
        """Whichever of the two directions lies nearer is called up."""
        change, wanted = values["change"], reference["change"]
        far = (change - wanted).square().sum((-2, -1)) > (change.flip(-2) - wanted).square().sum((-2, -1))
        up = values["up_probability"]
        return dict(values) | {
            "change": torch.where(far[..., None, None], change.flip(-2), change),
            "up_probability": torch.where(far[..., None], 1.0 - up, up),
        }
