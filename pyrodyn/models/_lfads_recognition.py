"""The recognition network of `LFADS`: an encoder for the initial code, an encoder and a controller for the inputs."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyrodyn.linalg.matrix import broadcast_shapes
from pyrodyn.networks.controlled import Loop, controlled_scan
from pyrodyn.networks.precision import lowered
from pyrodyn.networks.recall import remember
from pyrodyn.networks.recognition import Encoder, GatedLayer, Head
from pyrodyn.recording import Recording

if TYPE_CHECKING:
    from pyrodyn.models.lfads import LFADS, LFADSParameters

INPUT_DIMS: Any = {"event_dims": ("time", "inferred_input")}
INITIAL_DIMS: Any = {"event_dims": ("initial",)}
SMALL = -1.0  # log sd of codes and inputs at the start


class LFADSRecognition(nn.Module):
    """Samples the initial code and the inferred inputs of the trials that it reads."""

    def __init__(self, model: LFADS, recording: Recording, hidden_dim: int) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: a model is not a submodule, and has no parameters to train
        self.encoder = Encoder(recording, hidden_dim)
        self.level = Head(2 * hidden_dim, model.initial_dim)
        self.log_sd = Head(2 * hidden_dim, model.initial_dim, SMALL)
        if model.input_dim:
            self.input_encoder = Encoder(recording, hidden_dim)
            # Its features are what the encoder says of a bin and the factors before it.
            self.controller = GatedLayer(2 * hidden_dim + model.latent_dim, model.controller_dim)
            self.head = Head(model.controller_dim, 2 * model.input_dim)
            with torch.no_grad():
                self.head.bias[model.input_dim :] = SMALL

    def forward(self, parameters: LFADSParameters, recording: Recording) -> dict[str, Tensor]:
        summary = self.encoder(recording).summary
        law = dist.Normal(self.level(summary), self.log_sd(summary).exp()).to_event(1)
        found = {"initial": pyro.sample("initial", law, infer=INITIAL_DIMS)}
        if self._model[0].input_dim:
            inputs = ControlledInputs(self, parameters, found["initial"], recording)
            found["inferred_input"] = pyro.sample("inferred_input", inputs, infer=INPUT_DIMS)
        return found

    def loop(self, parameters: LFADSParameters, code: Tensor, recording: Recording) -> Loop:
        """The loop of generator and controller for the trials of a recording."""
        model, layer = self._model[0], self.controller
        size = layer.input_weight.shape[-1] - model.latent_dim
        encoded = self.input_encoder(recording).states
        weight, bias, recurrent, own, start, head, head_bias = lowered(
            layer.input_weight, layer.bias, layer.recurrent, layer.candidate_bias, layer.initial, self.head.weight,
            self.head.bias,
        )  # fmt: skip
        drive = torch.addmm(bias, encoded.flatten(0, 1), weight[:, :size].mT).unflatten(0, encoded.shape[:2])
        generator_drive = model.drive(parameters, recording)
        assert parameters.control_weight is not None
        return Loop(
            drive,
            weight[:, size:] @ lowered(_flat(parameters.factor_weight))[0],
            recurrent,
            own,
            head,
            head_bias,
            start,
            *lowered(generator_drive.movedim(-2, 0), _flat(parameters.control_weight), _flat(parameters.recurrent),
                     parameters.candidate_bias, model.initial_state(parameters, code)),
        )  # fmt: skip


class ControlledInputs(TorchDistribution):
    """Inputs inferred by the controller while the generator runs: event (time, inferred_input), batch (*draw, trial).

    The law of a bin's input depends on the inputs before it; the density of inputs other than the last draw takes
    another run of the loop.
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, network: LFADSRecognition, parameters: Any, code: Tensor, recording: Recording) -> None:
        self.network, self.given, self.recording = network, (parameters, code), recording
        self.loop = network.loop(parameters, code, recording)
        self.played: tuple[Tensor, Tensor, Tensor] | None = None
        batch = broadcast_shapes(code.shape[:-1], parameters.recurrent.shape[:-2])
        event = torch.Size((recording.num_bins, self.loop.input_weight.shape[-1]))
        super().__init__(batch, event, validate_args=False)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        if sample_shape:
            raise NotImplementedError("the controller's inputs are drawn one at a time; use a plate for more")
        bins, size = self.event_shape
        noise = torch.randn(bins, *self.batch_shape, size, dtype=self.loop.drive.dtype, device=self.loop.drive.device)
        drawn, mean, log_sd, states = controlled_scan(self.loop, noise)
        value = drawn.movedim(0, -2).to(torch.float64)
        self.played = value, mean, log_sd
        parameters, code = self.given
        remember(value, (code, *parameters.of_generator), states.movedim(0, -2))
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self.played is not None and self.played[0] is value:
            _, mean, log_sd = self.played
        else:
            given = value.movedim(-2, 0).to(self.loop.drive.dtype)
            _, mean, log_sd, _ = controlled_scan(self.loop, None, given)
        mean, log_sd = (part.movedim(0, -2).to(torch.float64) for part in (mean, log_sd))
        square = ((value - mean) * torch.exp(-log_sd)).square()
        return (-0.5 * square - log_sd - 0.5 * math.log(2.0 * math.pi)).sum((-2, -1))

    def expand(self, batch_shape, _instance=None) -> ControlledInputs:
        expanded = copy.copy(self)
        expanded._batch_shape = torch.Size(batch_shape)
        expanded.played = None
        return expanded


def _flat(weight: Tensor) -> Tensor:
    """A weight (*draw, 1, ...) without the place of the trial."""
    return weight.squeeze(-3) if weight.dim() > 2 else weight
