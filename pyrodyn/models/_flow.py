"""What the models of learned flows have in common: coordinates, readout, drift, labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodyn.drifts import Drift, DriftParameters, GaussianProcess
from pyrodyn.errors import ModelError
from pyrodyn.linalg.slopes import expanded
from pyrodyn.models._anchor import anchor
from pyrodyn.models._symmetry import signed_permutation
from pyrodyn.models.linear_sde import TYPICAL_BINS
from pyrodyn.program import Labelled, LatentModel
from pyrodyn.readouts import AffineReadout, Poisson, Readout
from pyrodyn.recording import Recording

INITIAL_SD = 1.5  # of the state in the first bin, in units of the linear guess's standard deviation


class FlowParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event); those of the drift as in `DriftParameters`."""

    drift_weights: Tensor  # (feature, latent), a second
    length_scale: Tensor | None
    amplitude: Tensor | None
    hidden_weights: Tensor | None
    hidden_biases: Tensor | None
    deep_weights: Tensor | None
    deep_biases: Tensor | None
    diffusion: Tensor | None  # (latent, latent), lower triangular, per root of a second; None without noise
    loading: Tensor  # (unit, latent)
    offset: Tensor  # (unit)
    noise: Tensor | None  # (unit): the readout's own parameter

    @property
    def drift(self) -> DriftParameters:
        """What of the parameters belongs to the drift."""
        return DriftParameters(self.drift_weights, *self[1 : len(DriftParameters._fields)])


@dataclass(frozen=True)
class FlowModel(LatentModel):
    """A latent that follows a learned drift, read out by an affine map."""

    latent_dim: int
    readout: Readout = field(default_factory=Poisson)
    drift: Drift = field(default_factory=GaussianProcess)
    time_constant: float | None = None

    discrete_time = False  # of `flow`

    def __post_init__(self) -> None:
        if not isinstance(self.latent_dim, int) or self.latent_dim < 1:
            raise ModelError(f"latent_dim must be a whole number of at least 1, got {self.latent_dim!r}")
        if not isinstance(self.readout, Readout):
            raise ModelError(f"readout must be one of pyrodyn.readouts, such as Poisson(), got {self.readout!r}")
        if not isinstance(self.drift, Drift):
            raise ModelError(f"drift must be one of pyrodyn.drifts, such as GaussianProcess(), got {self.drift!r}")
        if self.time_constant is not None and not self.time_constant > 0:
            raise ModelError(f"time_constant must be positive (seconds), got {self.time_constant!r}")
        self.drift.check(self.latent_dim)

    def check(self, recording: Recording) -> None:
        if self.latent_dim > recording.num_units:
            raise ModelError(
                f"latent_dim is {self.latent_dim} but the recording has {recording.num_units} units; a loading "
                "(unit, latent) of full rank needs latent_dim <= units: lower latent_dim"
            )
        if recording.num_inputs:
            raise ModelError(
                f"{type(self).__name__} takes no inputs, but the recording has {recording.num_inputs}; leave them out "
                "of Recording.from_arrays, or use LinearSDE"
            )
        self.readout.check(recording)

    def pace(self, recording: Recording) -> float:
        """Seconds in which a latent typically changes: the unit of the drift's priors."""
        return TYPICAL_BINS * recording.bin_width if self.time_constant is None else self.time_constant

    def sample_flow(self, recording: Recording, diffusion: Tensor | None) -> FlowParameters:
        """Place the priors of all but the noise of the path."""
        drift = self.drift.sample(self.latent_dim, self.pace(recording))
        loading, offset = anchor(recording, self.latent_dim, self.readout).sample()
        noise = self.readout.sample_noise(recording)
        return FlowParameters(*drift, diffusion, loading, offset, noise)

    def flow(self, parameters: FlowParameters) -> Callable[[Tensor], Tensor]:
        """The drift as a function of states (*draw, point, latent)."""
        return self.drift.field(parameters.drift)

    def readout_at(self, parameters: FlowParameters, path: Tensor, recording: Recording) -> AffineReadout:
        """The readout of a path (*draw, trial, time, latent) at the bins."""
        return AffineReadout(
            self.readout, path, parameters.loading, parameters.offset, parameters.noise, recording.mask
        )

    def label(self, parameters: FlowParameters) -> Labelled:
        labelled = self.drift.label(parameters.drift)
        if parameters.diffusion is not None:
            labelled["diffusion"] = (("latent", "latent_from"), parameters.diffusion)
        labelled |= {"loading": (("unit", "latent"), parameters.loading), "offset": (("unit",), parameters.offset)}
        if parameters.noise is not None and self.readout.noise_name is not None:
            labelled[self.readout.noise_name] = (("unit",), parameters.noise)
        return labelled

    def unlabel(self, values: Mapping[str, Tensor]) -> FlowParameters:
        noise = None if self.readout.noise_name is None else values[self.readout.noise_name]
        return FlowParameters(
            *self.drift.unlabel(values), values.get("diffusion"), values["loading"], values["offset"], noise
        )

    def invariants(self, parameters: FlowParameters) -> Labelled:
        origin = torch.zeros(*parameters.loading.shape[:-2], self.latent_dim, dtype=torch.float64)
        with torch.no_grad():
            held = FlowParameters._make(None if part is None else part.detach() for part in parameters)
            rate, slope = expanded(self.flow(held), origin)
            modes = torch.linalg.eigvals(slope)
            # Conjugate pairs come in one order in all draws.
            modes = modes.gather(-1, (modes.real + 1e-9 * modes.imag).argsort(dim=-1, descending=True))
        found: Labelled = {
            "drift_at_origin": (("unit",), (held.loading @ rate.unsqueeze(-1)).squeeze(-1)),
            "growth_at_origin": (("latent",), modes.real),
            "angular_velocity_at_origin": (("latent",), modes.imag.abs()),
            "signal_size": (("unit",), parameters.loading.square().sum(-1).sqrt()),
            "offset": (("unit",), parameters.offset),
        }
        if parameters.diffusion is not None:
            found["roughness"] = (("unit",), (parameters.loading @ parameters.diffusion).square().sum(-1))
        for name in ("length_scale", "amplitude"):
            value = getattr(parameters, name)
            if value is not None:
                found[name] = ((), value)
        if parameters.noise is not None and self.readout.noise_name is not None:
            found[self.readout.noise_name] = (("unit",), parameters.noise)
        return found

    def symmetry(self, seed: int) -> Tensor:
        """A signed permutation of the latents, (latent, latent): of all affine maps those that leave the priors alone.

        Nothing else is free: boxes and anchored coordinates are turned by no other map into themselves.
        """
        return signed_permutation(self.latent_dim, torch.Generator().manual_seed(seed))

    def transformed(self, parameters: FlowParameters, recording: Recording, seed: int) -> FlowParameters:
        del recording
        turn = self.symmetry(seed)
        diffusion = parameters.diffusion
        if diffusion is not None:
            moved = turn @ diffusion
            diffusion = torch.linalg.cholesky(moved @ moved.mT)
        drift = self.drift.turned(parameters.drift, turn)
        loading = parameters.loading @ turn.mT
        return FlowParameters(*drift, diffusion, loading, parameters.offset, parameters.noise)
