r"""Recurrent cells: options that place the priors of a network's weights and bind them to a recording.

The weights of a cell are sites named as the fields of `CellWeights`; a bound cell is a `Recurrence` and so makes the
path of a noisy network, `pyrodyn.distributions.NonlinearMarkov`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.distributions import GaugedLoading
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.errors import ModelError
from pyrodyn.linalg.matrix import broadcast_shapes
from pyrodyn.networks.layers import prior_sd, product, sample_weight, start_weight
from pyrodyn.networks.precision import lowered
from pyrodyn.networks.scans import gated_scan, leaky_scan
from pyrodyn.recording import Recording


class CellWeights(NamedTuple):
    """Weights of a cell, each (*draw, 1, *event) or (*event); None where the cell has none of the kind."""

    recurrent: Tensor  # (latent, latent), (gate x latent, latent), or the left factor (latent, rank)
    recurrent_right: Tensor | None  # (latent, rank)
    bias: Tensor  # (latent) or (gate x latent)
    candidate_bias: Tensor | None  # (latent)
    time_constant: Tensor | None  # (): seconds
    input_weight: Tensor | None  # (latent, input) or (gate x latent, input)


class Cell(ABC):
    """A kind of recurrent network."""

    gates: int = 1  # rows of weights for every latent

    @abstractmethod
    def check(self, latent_dim: int, recording: Recording) -> None:
        """Raise `ModelError` where the cell does not suit the recording."""

    @abstractmethod
    def sample(self, latent_dim: int, recording: Recording) -> CellWeights:
        """Place the priors."""

    @abstractmethod
    def initial_values(self, latent_dim: int, recording: Recording) -> dict[str, Tensor]:
        """Where the sites start."""

    @abstractmethod
    def bind(self, weights: CellWeights, inputs: Tensor | None, steps: Tensor) -> BoundCell:
        """The transition into every bin but the first.

        Parameters
        ----------
        weights : CellWeights
        inputs : Tensor, (trial, time - 1, input), or None
        steps : Tensor, (time - 1)
            Seconds from the bin before.
        """

    @abstractmethod
    def noise_scale(self, weights: CellWeights, steps: Tensor) -> Tensor:
        """What the noise of a step is in units of the process noise, (*draw, 1, time - 1 or 1, 1)."""

    @abstractmethod
    def activity(self, path: Tensor) -> Tensor:
        """What of a state (..., latent) acts on the other units and is read out."""

    @abstractmethod
    def dims(self) -> dict[str, tuple[str, ...]]:
        """Names of the axes of each weight that the cell has."""

    @abstractmethod
    def permuted(self, weights: CellWeights, order: Tensor, sign: Tensor) -> CellWeights:
        """The weights after units are put in another order (latent) and multiplied by a sign (latent)."""

    @abstractmethod
    def matrix(self, weights: CellWeights) -> Tensor:
        """The matrix (*draw, 1, latent, latent) by which units drive units."""

    def _inputs(self, latent_dim: int, recording: Recording) -> Tensor | None:
        if not recording.num_inputs:
            return None
        rows = self.gates * latent_dim
        sd = prior_sd(recording.num_inputs)
        return sample_weight("input_weight", (rows, recording.num_inputs), sd, recording) / recording.input_scale


@dataclass(frozen=True)
class Leaky(Cell):
    r"""Rate units: :math:`\tau \dot x = -x + J \tanh(x) + B u + b`, stepped exactly for a target that holds for a bin.

    .. math:: F(x_{t-1}) = x_{t-1} + \alpha_t (J \tanh x_{t-1} + B u_t + b - x_{t-1}), \quad
        \alpha_t = 1 - e^{-(t_t - t_{t-1}) / \tau}.

    So bins may be spaced unequally. The noise of a step is :math:`\sigma (1 - (1 - \alpha_t)^2)^{1/2}`: with J of zero
    the process is stationary with standard deviation sigma, whatever the spacing.

    Parameters
    ----------
    gain : float
        Prior standard deviation g of the entries of J, times the root of the number of units. Above one, and without
        noise, a large network is chaotic.

    References
    ----------
    Sompolinsky, Crisanti & Sommers, Phys. Rev. Lett. 61:259 (1988).
    """

    gain: float = 1.5

    def __post_init__(self) -> None:
        if not self.gain > 0:
            raise ModelError(f"gain must be positive, got {self.gain!r}")

    def check(self, latent_dim: int, recording: Recording) -> None:
        del latent_dim, recording  # any will do

    def sample(self, latent_dim: int, recording: Recording) -> CellWeights:
        left, right = self._recurrent(latent_dim, recording)
        bias = sample_weight("bias", (latent_dim,), 0.3, recording)
        typical = torch.full((), math.log(5.0 * recording.bin_width), dtype=torch.float64, device=recording.device)
        constant = pyro.sample("time_constant", dist.LogNormal(typical, 1.0))
        return CellWeights(left, right, bias, None, constant, self._inputs(latent_dim, recording))

    def _recurrent(self, latent_dim: int, recording: Recording) -> tuple[Tensor, Tensor | None]:
        sd = self.gain * prior_sd(latent_dim)
        return sample_weight("recurrent", (latent_dim, latent_dim), sd, recording), None

    def initial_values(self, latent_dim: int, recording: Recording) -> dict[str, Tensor]:
        values = {
            "recurrent": start_weight((latent_dim, latent_dim), self.gain * prior_sd(latent_dim), 0),
            "bias": torch.zeros(latent_dim, dtype=torch.float64),
            "time_constant": torch.tensor(5.0 * recording.bin_width, dtype=torch.float64),
        }
        return values | _start_inputs(latent_dim, recording)

    def bind(self, weights: CellWeights, inputs: Tensor | None, steps: Tensor) -> BoundLeaky:
        drive = driven(weights, inputs, len(steps))
        return BoundLeaky(self.matrix(weights), drive, self._leak(weights, steps))

    def _leak(self, weights: CellWeights, steps: Tensor) -> Tensor:
        assert weights.time_constant is not None
        return -torch.expm1(-steps[:, None] / weights.time_constant[..., None, None])

    def noise_scale(self, weights: CellWeights, steps: Tensor) -> Tensor:
        kept = 1.0 - self._leak(weights, steps)
        return (1.0 - kept.square()).sqrt()

    def activity(self, path: Tensor) -> Tensor:
        return torch.tanh(path)

    def dims(self) -> dict[str, tuple[str, ...]]:
        return {
            "recurrent": ("latent", "latent_from"),
            "bias": ("latent",),
            "time_constant": (),
            "input_weight": ("latent", "input"),
        }

    def permuted(self, weights: CellWeights, order: Tensor, sign: Tensor) -> CellWeights:
        turned = sign[:, None] * weights.recurrent[..., order, :][..., order] * sign
        return self._turned(weights._replace(recurrent=turned), order, sign)

    @staticmethod
    def _turned(weights: CellWeights, order: Tensor, sign: Tensor) -> CellWeights:
        gain = weights.input_weight
        return weights._replace(
            bias=sign * weights.bias[..., order],
            input_weight=None if gain is None else sign[:, None] * gain[..., order, :],
        )

    def matrix(self, weights: CellWeights) -> Tensor:
        return weights.recurrent


@dataclass(frozen=True)
class LowRank(Leaky):
    r"""Rate units whose J has a given rank: :math:`J = M N^\top / \sqrt{R}`, M and N being (latent, rank).

    The rows of N have variance 1 / latent and those of M the variance :math:`g^2`, so that J is as large a priori as
    that of `Leaky`. N is lower triangular in its first ``rank`` units, which fixes the rotation between M and N and
    changes the prior of nothing else (see `pyrodyn.distributions.GaugedLoading`).

    Parameters
    ----------
    rank : int
    gain : float

    References
    ----------
    Mastrogiuseppe & Ostojic, Neuron 99:609 (2018); Valente, Pillow & Ostojic, NeurIPS 2022.
    """

    rank: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ModelError(f"rank must be a whole number of at least 1, got {self.rank!r}")

    def check(self, latent_dim: int, recording: Recording) -> None:
        del recording
        if self.rank > latent_dim:
            raise ModelError(f"rank is {self.rank} but there are {latent_dim} latents; lower rank or raise latent_dim")

    @property
    def _pivots(self) -> tuple[int, ...]:
        return tuple(range(self.rank))

    def _recurrent(self, latent_dim: int, recording: Recording) -> tuple[Tensor, Tensor | None]:
        left = sample_weight("recurrent", (latent_dim, self.rank), self.gain * prior_sd(self.rank), recording)
        right = pyro.sample("recurrent_right", GaugedLoading(latent_dim, self.rank, self._pivots))
        return left, right * prior_sd(latent_dim)

    def initial_values(self, latent_dim: int, recording: Recording) -> dict[str, Tensor]:
        sd = self.gain * prior_sd(self.rank)
        right, _ = gauge_fix(start_weight((latent_dim, self.rank), 1.0, 1), self._pivots)
        left = start_weight((latent_dim, self.rank), sd, 0)
        return super().initial_values(latent_dim, recording) | {"recurrent": left, "recurrent_right": right}

    def dims(self) -> dict[str, tuple[str, ...]]:
        return super().dims() | {"recurrent": ("latent", "rank"), "recurrent_right": ("latent", "rank")}

    def permuted(self, weights: CellWeights, order: Tensor, sign: Tensor) -> CellWeights:
        assert weights.recurrent_right is not None
        left, right = (sign[:, None] * part[..., order, :] for part in (weights.recurrent, weights.recurrent_right))
        right, rotation = gauge_fix(right, self._pivots)
        return self._turned(weights._replace(recurrent=left @ rotation, recurrent_right=right), order, sign)

    def matrix(self, weights: CellWeights) -> Tensor:
        assert weights.recurrent_right is not None
        return weights.recurrent @ weights.recurrent_right.mT


@dataclass(frozen=True)
class Gated(Cell):
    r"""A gated recurrent unit: every unit learns when to keep its state and when to replace it.

    .. math::
        (r, z) &= \sigma(W^{rz} x_{t-1} + V^{rz} u_t + b^{rz}), \\
        n &= \tanh(V^n u_t + b^n + r \odot (W^n x_{t-1} + c)), \qquad F(x_{t-1}) = n + z \odot (x_{t-1} - n).

    Rows of the weights are in the order r, z, n. A step is a bin, so bins must be spaced equally.

    References
    ----------
    Cho et al., EMNLP 2014.
    """

    gates = 3

    def check(self, latent_dim: int, recording: Recording) -> None:
        del latent_dim
        if not recording.regular:
            raise ModelError(
                "the cell Gated steps from bin to bin and needs equally spaced bins, but the recording's time axis is "
                "irregular; use networks.Leaky(), whose steps follow the time, or put the gaps into the mask"
            )

    def sample(self, latent_dim: int, recording: Recording) -> CellWeights:
        rows = self.gates * latent_dim
        return CellWeights(
            sample_weight("recurrent", (rows, latent_dim), prior_sd(latent_dim), recording),
            None,
            sample_weight("bias", (rows,), 1.0, recording),
            sample_weight("candidate_bias", (latent_dim,), 0.3, recording),
            None,
            self._inputs(latent_dim, recording),
        )

    def initial_values(self, latent_dim: int, recording: Recording) -> dict[str, Tensor]:
        bias = torch.zeros(self.gates * latent_dim, dtype=torch.float64)
        bias[latent_dim : 2 * latent_dim] = 1.0  # a state is kept for some bins, so that gradients reach back
        values = {
            "recurrent": start_weight((self.gates * latent_dim, latent_dim), prior_sd(latent_dim), 0),
            "bias": bias,
            "candidate_bias": torch.zeros(latent_dim, dtype=torch.float64),
        }
        return values | _start_inputs(self.gates * latent_dim, recording)

    def bind(self, weights: CellWeights, inputs: Tensor | None, steps: Tensor) -> BoundGated:
        assert weights.candidate_bias is not None
        return BoundGated(weights.recurrent, weights.candidate_bias, driven(weights, inputs, len(steps)))

    def noise_scale(self, weights: CellWeights, steps: Tensor) -> Tensor:
        del weights
        return steps.new_ones(1, 1)

    def activity(self, path: Tensor) -> Tensor:
        return path

    def dims(self) -> dict[str, tuple[str, ...]]:
        return {
            "recurrent": ("gated_latent", "latent"),
            "bias": ("gated_latent",),
            "candidate_bias": ("latent",),
            "input_weight": ("gated_latent", "input"),
        }

    def permuted(self, weights: CellWeights, order: Tensor, sign: Tensor) -> CellWeights:
        latent_dim = len(order)
        rows = torch.cat([order + gate * latent_dim for gate in range(self.gates)])
        signs = torch.cat([torch.ones_like(sign), torch.ones_like(sign), sign])  # a gate has no sign, a candidate does
        gain = weights.input_weight
        assert weights.candidate_bias is not None
        return weights._replace(
            recurrent=signs[:, None] * weights.recurrent[..., rows, :][..., order] * sign,
            bias=signs * weights.bias[..., rows],
            candidate_bias=sign * weights.candidate_bias[..., order],
            input_weight=None if gain is None else signs[:, None] * gain[..., rows, :],
        )

    def matrix(self, weights: CellWeights) -> Tensor:
        return weights.recurrent[..., 2 * weights.recurrent.shape[-1] :, :]


class BoundCell(ABC):
    """A cell with its weights and inputs: a `Recurrence`."""

    def __init__(self, weight: Tensor, drive: Tensor) -> None:
        self.weight, self.drive = weight, drive
        self.batch_shape = broadcast_shapes(weight.shape[:-2], drive.shape[:-2])

    @abstractmethod
    def advance(self, states: Tensor) -> Tensor:
        """See `Recurrence`."""

    def scan(self, initial: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        """See `Recurrence`. The states are in the digits that networks work in."""
        drive, gain, shift = (
            None if part is None else part.movedim(-2, 0) for part in lowered(self.drive, gain, shift)
        )
        weight, initial = lowered(self.weight.squeeze(-3) if self.weight.dim() > 2 else self.weight, initial)
        return self._scan(drive, initial, weight, gain, shift).movedim(0, -2)

    @abstractmethod
    def _scan(self, drive, initial, weight, gain, shift) -> Tensor: ...


class BoundLeaky(BoundCell):
    """`Leaky` or `LowRank`; ``leak`` is (*draw, 1, time - 1, 1)."""

    def __init__(self, weight: Tensor, drive: Tensor, leak: Tensor) -> None:
        super().__init__(weight, drive)
        self.leak = leak

    def advance(self, states: Tensor) -> Tensor:
        return torch.lerp(states, product(torch.tanh(states), self.weight) + self.drive, self.leak)

    def _scan(self, drive, initial, weight, gain, shift) -> Tensor:
        (leak,) = lowered(self.leak.movedim(-2, 0))
        return leaky_scan(drive, initial, weight, leak, gain, shift)


class BoundGated(BoundCell):
    """`Gated`."""

    def __init__(self, weight: Tensor, bias: Tensor, drive: Tensor) -> None:
        super().__init__(weight, drive)
        self.bias = bias

    def advance(self, states: Tensor) -> Tensor:
        own, (reset, update, candidate) = product(states, self.weight).chunk(3, -1), self.drive.chunk(3, -1)
        inner = own[2] + self.bias.unsqueeze(-2)
        new = torch.tanh(candidate + torch.sigmoid(reset + own[0]) * inner)
        return torch.lerp(new, states, torch.sigmoid(update + own[1]))

    def _scan(self, drive, initial, weight, gain, shift) -> Tensor:
        (bias,) = lowered(self.bias)
        return gated_scan(drive, initial, weight, bias, gain, shift)


def driven(weights: CellWeights, inputs: Tensor | None, bins: int) -> Tensor:
    """Bias and inputs, (*draw, trial or 1, time - 1, row)."""
    bias = weights.bias.unsqueeze(-2)
    if weights.input_weight is None or inputs is None:
        return bias.expand(*bias.shape[:-2], bins, bias.shape[-1])
    return product(inputs, weights.input_weight) + bias


def _start_inputs(rows: int, recording: Recording) -> dict[str, Tensor]:
    if not recording.num_inputs:
        return {}
    inputs = recording.num_inputs
    return {"input_weight": start_weight((rows, inputs), 0.3 * prior_sd(inputs), 2)}
