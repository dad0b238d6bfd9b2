r"""Linear dynamics in continuous time: exact at any times, however unequal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.distributions import GaugedLoading, GaussMarkov, varying_chain
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.errors import ModelError
from pyrodyn.linalg.matrix import below_diagonal, strictly_lower
from pyrodyn.models._startup import linear_start
from pyrodyn.models._symmetry import rotation
from pyrodyn.program import Labelled, StateSpaceModel
from pyrodyn.readouts import AffineReadout, PerRegion, Poisson, Readout, as_readout
from pyrodyn.recording import Recording

TYPICAL_BINS = 10.0  # relaxation time of a latent, where no other is given
TURNING = 3.0  # prior sd of the angular velocities, in radians per relaxation time


class LinearSDEParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event)."""

    drift: Tensor  # (latent, latent), a second, acting on column vectors
    loading: Tensor  # (unit, latent)
    offset: Tensor  # (unit)
    noise: Tensor | None  # (unit): the readout's own parameter
    input_gain: Tensor | None  # (latent, input), a second


@dataclass(frozen=True)
class LinearSDE(StateSpaceModel):
    r"""Stationary linear stochastic dynamics in continuous time with any readout; with one latent, Ornstein-Uhlenbeck.

    .. math::
        dx = (A x + B u)\,dt + L\,dW, \qquad x(t_1) \sim N(0, I), \qquad \eta_t = C x(t) + d, \qquad
        y_{t,n} \sim p(\cdot \mid \eta_{t,n}) .

    Times may be anything: from one bin to the next, :math:`\Delta` seconds later,

    .. math:: x' = e^{A \Delta} x + A^{-1} (e^{A \Delta} - I) B u' + \epsilon, \qquad
        \epsilon \sim N(0, I - e^{A \Delta} e^{A^\top \Delta}) ,

    without any error of a scheme. An input is held at its new value since the bin before.

    **Prior of the drift.** With W iid normal and S antisymmetric with iid normal entries of sd 3 below its diagonal,

    .. math:: A = \tau^{-1} (-W W^\top / d + S), \qquad L L^\top = -(A + A^\top),

    so that the latent is stationary with unit covariance, every draw is stable, and every stable linear system is
    reached up to a change of latent coordinates. W enters by its gauged form, and the loading and its gauge are
    those of `LDS`.

    Parameters
    ----------
    latent_dim : int
    readout : Readout, or mapping of region to Readout
        `Poisson` by default.
    time_constant : float, optional
        :math:`\tau` in seconds, the inverse of the mean relaxation rate; by default ten bins.

    References
    ----------
    Särkkä & Solin, *Applied Stochastic Differential Equations*, 2019, chapter 6.
    """

    latent_dim: int
    readout: Readout | PerRegion = field(default_factory=Poisson)
    time_constant: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.latent_dim, int) or self.latent_dim < 1:
            raise ModelError(f"latent_dim must be a whole number of at least 1, got {self.latent_dim!r}")
        object.__setattr__(self, "readout", as_readout(self.readout))
        if self.time_constant is not None and not self.time_constant > 0:
            raise ModelError(f"time_constant must be positive (seconds), got {self.time_constant!r}")

    def check(self, recording: Recording) -> None:
        if self.latent_dim > recording.num_units:
            raise ModelError(
                f"latent_dim is {self.latent_dim} but the recording has {recording.num_units} units; a loading "
                "(unit, latent) of full rank needs latent_dim <= units: lower latent_dim"
            )
        self.readout.check(recording)

    def sample_globals(self, recording: Recording) -> LinearSDEParameters:
        dim, units = self.latent_dim, recording.num_units
        zero = torch.zeros((), dtype=torch.float64, device=recording.device)
        relaxation = pyro.sample("relaxation", GaugedLoading(dim, dim, tuple(range(dim))))
        drift = -relaxation @ relaxation.mT / dim
        if dim > 1:
            turns = dist.Normal(zero.expand(dim * (dim - 1) // 2), TURNING).to_event(1)
            turning = strictly_lower(pyro.sample("turning", turns), dim)
            drift = drift + turning - turning.mT
        weights = pyro.sample("weights", GaugedLoading(units, dim, self.pivots(recording)))
        offset = self.readout.sample_offset(recording)
        noise = self.readout.sample_noise(recording)
        pace = self._pace(recording)
        gain = None
        if recording.num_inputs:
            drive = pyro.sample("drive", dist.Normal(zero.expand(dim, recording.num_inputs), 1.0).to_event(2))
            gain = drive / recording.input_scale / pace
        return LinearSDEParameters(drift / pace, self._loading_scale(recording) * weights, offset, noise, gain)

    def latent_path(self, parameters: LinearSDEParameters, recording: Recording) -> GaussMarkov:
        eye = torch.eye(self.latent_dim, dtype=torch.float64, device=recording.device)
        drift, inputs = parameters.drift, recording.inputs
        if recording.regular or recording.num_bins == 1:
            moved = torch.matrix_exp(drift * recording.bin_width)
            push = None
            if parameters.input_gain is not None and inputs is not None:
                push = inputs[:, 1:] @ _held(drift, moved, parameters.input_gain).mT
            return GaussMarkov.from_dynamics(
                moved, eye - moved @ moved.mT, num_bins=recording.num_bins, initial_covariance=eye, drift=push
            )
        steps = torch.from_numpy(recording.time.copy()).to(recording.device).diff()
        # Times on a grid with gaps have few different steps, and an exponential costs more than its use.
        lengths, which = steps.unique(return_inverse=True)
        each = torch.matrix_exp(drift.unsqueeze(-3) * lengths[:, None, None])
        moved = each[..., which, :, :]
        push = None
        if parameters.input_gain is not None and inputs is not None:
            held = _held(drift.unsqueeze(-3), each, parameters.input_gain.unsqueeze(-3))[..., which, :, :]
            push = (held @ inputs[:, 1:].unsqueeze(-1)).squeeze(-1)
        return varying_chain(moved, (eye - each @ each.mT)[..., which, :, :], initial_covariance=eye, drift=push)

    def readout_law(self, parameters: LinearSDEParameters, path: Tensor, recording: Recording) -> AffineReadout:
        law = self.readout.bound(recording)
        return AffineReadout(law, path, parameters.loading, parameters.offset, parameters.noise, recording.mask)

    def pivots(self, recording: Recording) -> tuple[int, ...]:
        """The units whose loading rows fix the rotation; depends on the recording alone."""
        return linear_start(recording, self.latent_dim, self.readout).pivots

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        dim, start = self.latent_dim, linear_start(recording, self.latent_dim, self.readout)
        weights, rotation = gauge_fix(start.loading * dim**0.5, start.pivots)
        dynamics = rotation.mT @ start.dynamics @ rotation
        eye = torch.eye(dim, dtype=torch.float64)
        # Cayley's transform takes contractions to generators of contractions, as the logarithm does to second order.
        drift = 2.0 * torch.linalg.solve(dynamics + eye, dynamics - eye) * self._pace(recording) / recording.bin_width
        relaxation = torch.linalg.cholesky(-0.5 * dim * (drift + drift.mT))
        values = {"relaxation": relaxation, "weights": weights}
        if dim > 1:
            values["turning"] = below_diagonal(0.5 * (drift - drift.mT))
        if recording.observations is not None:
            values |= self.readout.initial_values(recording)
            if "noise_sd" in values:
                values["noise_sd"] = recording.scale * start.residual.to(recording.device).sqrt()
        if recording.num_inputs:
            values["drive"] = torch.zeros(dim, recording.num_inputs, dtype=torch.float64)
        return {name: value.to(recording.device) for name, value in values.items()}

    def label(self, parameters: LinearSDEParameters) -> Labelled:
        labelled = {
            "drift": (("latent", "latent_from"), parameters.drift),
            "loading": (("unit", "latent"), parameters.loading),
            "offset": (("unit",), parameters.offset),
        }
        if self.readout.noise_name is not None:
            labelled[self.readout.noise_name] = (("unit",), parameters.noise)
        if parameters.input_gain is not None:
            labelled["input_gain"] = (("latent", "input"), parameters.input_gain)
        return labelled

    def unlabel(self, values: Mapping[str, Tensor]) -> LinearSDEParameters:
        noise = None if self.readout.noise_name is None else values[self.readout.noise_name]
        return LinearSDEParameters(
            values["drift"], values["loading"], values["offset"], noise, values.get("input_gain")
        )

    def invariants(self, parameters: LinearSDEParameters) -> Labelled:
        with torch.no_grad():
            eigenvalues = torch.linalg.eigvals(parameters.drift)
            order = eigenvalues.real.argsort(dim=-1, descending=True)
            signal = parameters.loading.square().sum(-1).sqrt()
            ahead, behind = parameters.loading @ parameters.drift, parameters.loading @ parameters.drift.mT
            turned = ((ahead - behind) * parameters.loading.roll(-1, -2)).sum(-1)
        found = {
            "decay_rate": (("latent",), -eigenvalues.real.gather(-1, order)),
            "angular_velocity": (("latent",), eigenvalues.imag.abs().gather(-1, order)),
            "signal_sd": (("unit",), signal),
            # The slope of a unit's signal covariance at lag zero: how rough the signal is.
            "covariance_slope": (("unit",), (ahead * parameters.loading).sum(-1)),
            "offset": (("unit",), parameters.offset),
        }
        if self.latent_dim > 1:
            # This unit's signal ahead of the next one's, less the other way round: rotations have a sense.
            found["turning_rate"] = (("unit",), turned)
        if self.readout.noise_name is not None:
            found[self.readout.noise_name] = (("unit",), parameters.noise)
        if parameters.input_gain is not None:
            found["input_effect"] = (("unit", "input"), parameters.loading @ parameters.input_gain)
        return found

    def transformed(self, parameters: LinearSDEParameters, recording: Recording, seed: int) -> LinearSDEParameters:
        """Turn the latent space by a random orthogonal matrix: the symmetry that the gauge takes away."""
        turn = rotation(self.latent_dim, torch.Generator().manual_seed(seed)).to(recording.device)
        gain = parameters.input_gain
        return parameters._replace(
            drift=turn @ parameters.drift @ turn.mT,
            loading=parameters.loading @ turn.mT,
            input_gain=None if gain is None else turn @ gain,
        )

    def _pace(self, recording: Recording) -> float:
        return TYPICAL_BINS * recording.bin_width if self.time_constant is None else self.time_constant

    def _loading_scale(self, recording: Recording) -> Tensor:
        return (self.readout.signal_scale(recording) / math.sqrt(self.latent_dim)).unsqueeze(-1)


def _held(drift: Tensor, moved: Tensor, gain: Tensor) -> Tensor:
    r"""What a constant input adds over a step: :math:`A^{-1} (e^{A \Delta} - I) B`."""
    eye = torch.eye(drift.shape[-1], dtype=drift.dtype, device=drift.device)
    return torch.linalg.solve(drift, (moved - eye) @ gain)
