"""Networks that read a trial and say what its latents may have been: modules whose parameters a guide learns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyrodyn.networks.precision import lowered
from pyrodyn.networks.scans import gated_scan
from pyrodyn.recording import Recording


class Encoded(NamedTuple):
    """What an `Encoder` makes of a recording."""

    states: Tensor  # (time, trial, 2 hidden): the state that came from the past, the one that came from the future
    summary: Tensor  # (trial, 2 hidden): both after the whole trial
    features: Tensor  # (time, trial, feature): what was read


class GatedLayer(nn.Module):
    """A gated recurrent unit with parameters of its own, over time-major values (time, trial, feature)."""

    def __init__(self, features: int, hidden_dim: int) -> None:
        super().__init__()
        bound = hidden_dim**-0.5

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound))

        self.input_weight, self.bias = uniform(3 * hidden_dim, features), uniform(3 * hidden_dim)
        self.recurrent, self.candidate_bias = uniform(3 * hidden_dim, hidden_dim), uniform(hidden_dim)
        self.initial = nn.Parameter(torch.zeros(hidden_dim, dtype=torch.float64))

    def forward(self, values: Tensor) -> Tensor:
        """States (time, trial, hidden)."""
        weight, bias, recurrent, own, initial = lowered(
            self.input_weight, self.bias, self.recurrent, self.candidate_bias, self.initial
        )
        drive = torch.addmm(bias, values.flatten(0, 1), weight.mT).unflatten(0, values.shape[:2])
        return gated_scan(drive, initial.expand(values.shape[1], -1), recurrent, own)


class Encoder(nn.Module):
    """Reads a recording forwards and backwards.

    Features are observations about each unit's mean over the recording that the encoder was made for, in units of its
    standard deviation. Hidden entries count as the mean; what is left of a bin is scaled up by the share of units that
    were seen, as in dropout, and that share is a feature itself. Inputs are features, too.

    Parameters
    ----------
    recording : Recording
    hidden_dim : int
        Units in each direction.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, recording: Recording, hidden_dim: int) -> None:
        super().__init__()
        observed = torch.ones_like(recording.values) if recording.mask is None else recording.mask.double()
        count = observed.sum((0, 1)).clamp(min=1.0)
        centre = recording.values.sum((0, 1)) / count
        variance = (observed * (recording.values - centre).square()).sum((0, 1)) / count
        self.register_buffer("centre", centre)
        self.register_buffer("spread", torch.where(variance > 0.0, variance.sqrt(), 1.0))
        self.num_features = recording.num_units + 1 + recording.num_inputs
        self.ahead = GatedLayer(self.num_features, hidden_dim)
        self.back = GatedLayer(self.num_features, hidden_dim)

    def features(self, recording: Recording) -> Tensor:
        """(time, trial, feature)."""
        values = recording.values.transpose(0, 1)
        values, centre, spread = lowered(values, self.centre, self.spread)
        features = (values - centre) / spread
        if recording.mask is None:
            share = features.new_ones(*features.shape[:2], 1)
        else:
            mask = recording.mask.transpose(0, 1)
            share = mask.to(features.dtype).mean(-1, keepdim=True)
            features = torch.where(mask, features, 0.0) / share.clamp(min=1.0 / recording.num_units)
        parts = [features, share]
        if recording.inputs is not None:
            parts += lowered((recording.inputs / recording.input_scale).transpose(0, 1))
        return torch.cat(parts, -1)

    def forward(self, recording: Recording) -> Encoded:
        values = self.features(recording)
        ahead = self.ahead(values)
        back = self.back(values.flip(0)).flip(0)
        return Encoded(torch.cat([ahead, back], -1), torch.cat([ahead[-1], back[0]], -1), values)


class Head(nn.Module):
    """An affine map from states to numbers, small at the start, its result in float64."""

    def __init__(self, features: int, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * features**-0.5 * torch.randn(size, features, dtype=torch.float64))
        self.bias = nn.Parameter(torch.full((size,), offset, dtype=torch.float64))

    def forward(self, states: Tensor) -> Tensor:
        weight, bias = lowered(self.weight, self.bias)
        return torch.nn.functional.linear(states, weight, bias).to(torch.float64)
