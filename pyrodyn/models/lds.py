r"""The linear dynamical system, the skeleton that every later model file is read against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.distributions import GaugedLoading, GaussMarkov
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.errors import ModelError
from pyrodyn.linalg import square_roots
from pyrodyn.models._startup import linear_start
from pyrodyn.models._symmetry import rotation
from pyrodyn.program import Labelled, StateSpaceModel
from pyrodyn.readouts import AffineReadout, PerRegion, Poisson, Readout, as_readout
from pyrodyn.recording import Recording


class LDSParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event)."""

    dynamics: Tensor  # (latent, latent): from bin t - 1 to bin t, acting on column vectors
    process_noise: Tensor  # (latent, latent), a covariance
    loading: Tensor  # (unit, latent)
    offset: Tensor  # (unit)
    noise: Tensor | None  # (unit): the readout's own parameter
    input_gain: Tensor | None  # (latent, input)


@dataclass(frozen=True)
class LDS(StateSpaceModel):
    r"""Linear dynamical system with any readout.

    .. math::
        x_1 &\sim N(0, I), \qquad x_t = A x_{t-1} + B u_t + \epsilon_t, \quad \epsilon_t \sim N(0, Q), \\
        \eta_t &= C x_t + d, \qquad y_{t,n} \sim p(\cdot \mid \eta_{t,n}).

    **Prior of the dynamics.** With M iid normal, :math:`A = (I + M M^\top)^{-1/2} M` and :math:`Q = (I + M
    M^\top)^{-1}`, so that :math:`A A^\top + Q = I`: the latent is stationary with unit covariance, every draw is
    stable, and every stable LDS is reached up to a change of latent coordinates.

    **Gauge.** What is left of those coordinates is a rotation; it is fixed by a loading that is lower triangular in
    ``latent_dim`` pivot units (see `GaugedLoading`), chosen from the data. The prior of any invariant does not depend
    on the choice, and the posterior has no flat direction.

    **Loading.** :math:`C = d^{-1/2}\,\mathrm{diag}(s)\,W`, with W the gauged form of an iid standard normal matrix and
    s the readout's signal scale: a unit's signal is as large a priori with ten latents as with two.

    Parameters
    ----------
    latent_dim : int
        Dimension of the latent, at most the number of units.
    readout : Readout, or mapping of region to Readout
        `Poisson` by default; any of `pyrodyn.readouts`. A mapping gives every region a law of its own.
    dynamics_scale : float
        Standard deviation of the entries of M. At 3, a one-dimensional latent has a median time constant of a few bins
        and a tail of hundreds.

    References
    ----------
    Macke et al., NIPS 2011 (Poisson readout); Durbin & Koopman, *Time Series Analysis by State Space Methods*, 2012.
    """

    latent_dim: int
    readout: Readout | PerRegion = field(default_factory=Poisson)
    dynamics_scale: float = 3.0

    def __post_init__(self) -> None:
        if not isinstance(self.latent_dim, int) or self.latent_dim < 1:
            raise ModelError(f"latent_dim must be a whole number of at least 1, got {self.latent_dim!r}")
        object.__setattr__(self, "readout", as_readout(self.readout))
        if not self.dynamics_scale > 0:
            raise ModelError(f"dynamics_scale must be positive, got {self.dynamics_scale!r}")

    def check(self, recording: Recording) -> None:
        if self.latent_dim > recording.num_units:
            raise ModelError(
                f"latent_dim is {self.latent_dim} but the recording has {recording.num_units} units; a loading "
                "(unit, latent) of full rank needs latent_dim <= units: lower latent_dim"
            )
        if not recording.regular:
            raise ModelError(
                "LDS steps from bin to bin and needs equally spaced bins, but the recording's time axis is irregular; "
                "use LinearSDE, rebin it, or put the gaps into the mask"
            )
        self.readout.check(recording)

    def sample_globals(self, recording: Recording) -> LDSParameters:
        dim, units = self.latent_dim, recording.num_units
        zero = torch.zeros((), dtype=torch.float64, device=recording.scale.device)
        mixing = pyro.sample("mixing", dist.Normal(zero.expand(dim, dim), self.dynamics_scale).to_event(2))
        weights = pyro.sample("weights", GaugedLoading(units, dim, self.pivots(recording)))
        offset = self.readout.sample_offset(recording)
        noise = self.readout.sample_noise(recording)
        gain = None
        if recording.num_inputs:
            drive = pyro.sample("drive", dist.Normal(zero.expand(dim, recording.num_inputs), 1.0).to_event(2))
            gain = drive / recording.input_scale
        dynamics, process_noise = stationary_dynamics(mixing)
        return LDSParameters(dynamics, process_noise, self._loading_scale(recording) * weights, offset, noise, gain)

    def latent_path(self, parameters: LDSParameters, recording: Recording) -> GaussMarkov:
        drift = None
        if parameters.input_gain is not None and recording.inputs is not None:
            drift = recording.inputs[:, 1:] @ parameters.input_gain.mT
        return GaussMarkov.from_dynamics(
            parameters.dynamics,
            parameters.process_noise,
            num_bins=recording.num_bins,
            initial_covariance=torch.eye(self.latent_dim, dtype=torch.float64, device=recording.scale.device),
            drift=drift,
        )

    def readout_law(self, parameters: LDSParameters, path: Tensor, recording: Recording) -> AffineReadout:
        law = self.readout.bound(recording)
        return AffineReadout(law, path, parameters.loading, parameters.offset, parameters.noise, recording.mask)

    def pivots(self, recording: Recording) -> tuple[int, ...]:
        """The units whose loading rows fix the rotation; depends on the recording alone."""
        return linear_start(recording, self.latent_dim, self.readout).pivots

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        start = linear_start(recording, self.latent_dim, self.readout)
        weights, rotation = gauge_fix(start.loading * self.latent_dim**0.5, start.pivots)
        dynamics = rotation.mT @ start.dynamics @ rotation
        eye = torch.eye(self.latent_dim, dtype=torch.float64)
        root, _ = square_roots(torch.linalg.inv(eye - dynamics @ dynamics.mT))
        values = {"mixing": root @ dynamics, "weights": weights}
        if recording.observations is not None:
            values |= self.readout.initial_values(recording)
            if "noise_sd" in values:
                values["noise_sd"] = recording.scale * start.residual.to(recording.scale.device).sqrt()
        if recording.num_inputs:
            values["drive"] = torch.zeros(self.latent_dim, recording.num_inputs, dtype=torch.float64)
        return {name: value.to(recording.scale.device) for name, value in values.items()}

    def label(self, parameters: LDSParameters) -> Labelled:
        labelled = {
            "dynamics": (("latent", "latent_from"), parameters.dynamics),
            "process_noise": (("latent", "latent_from"), parameters.process_noise),
            "loading": (("unit", "latent"), parameters.loading),
            "offset": (("unit",), parameters.offset),
        }
        if self.readout.noise_name is not None:
            labelled[self.readout.noise_name] = (("unit",), parameters.noise)
        if parameters.input_gain is not None:
            labelled["input_gain"] = (("latent", "input"), parameters.input_gain)
        return labelled

    def unlabel(self, values: Mapping[str, Tensor]) -> LDSParameters:
        noise = None if self.readout.noise_name is None else values[self.readout.noise_name]
        return LDSParameters(
            values["dynamics"], values["process_noise"], values["loading"], values["offset"], noise,
            values.get("input_gain"),
        )  # fmt: skip

    def invariants(self, parameters: LDSParameters) -> Labelled:
        with torch.no_grad():
            eigenvalues = torch.linalg.eigvals(parameters.dynamics)
            modulus, angle = eigenvalues.abs(), eigenvalues.angle().abs()
            order = modulus.argsort(dim=-1, descending=True)
            signal = parameters.loading.square().sum(-1).sqrt()
            ahead, behind = parameters.loading @ parameters.dynamics, parameters.loading @ parameters.dynamics.mT
            lagged = (ahead * parameters.loading).sum(-1)
            turned = ((ahead - behind) * parameters.loading.roll(-1, -2)).sum(-1)
        found = {
            "eigenvalue_modulus": (("latent",), modulus.gather(-1, order)),
            "eigenvalue_angle": (("latent",), angle.gather(-1, order)),
            "signal_sd": (("unit",), signal),
            "lag_one_covariance": (("unit",), lagged),
            "offset": (("unit",), parameters.offset),
        }
        if self.latent_dim > 1:
            # This unit's signal with that of the next one bin before, less the other way round: rotations have a sense.
            found["lag_one_asymmetry"] = (("unit",), turned)
        if self.readout.noise_name is not None:
            found[self.readout.noise_name] = (("unit",), parameters.noise)
        if parameters.input_gain is not None:
            found["input_effect"] = (("unit", "input"), parameters.loading @ parameters.input_gain)
        return found

    def transformed(self, parameters: LDSParameters, recording: Recording, seed: int) -> LDSParameters:
        """Turn the latent space by a random orthogonal matrix: the symmetry that the gauge takes away."""
        turn = rotation(self.latent_dim, torch.Generator().manual_seed(seed)).to(recording.scale.device)
        gain = parameters.input_gain
        return parameters._replace(
            dynamics=turn @ parameters.dynamics @ turn.mT,
            process_noise=turn @ parameters.process_noise @ turn.mT,
            loading=parameters.loading @ turn.mT,
            input_gain=None if gain is None else turn @ gain,
        )

    def _loading_scale(self, recording: Recording) -> Tensor:
        return (self.readout.signal_scale(recording) / math.sqrt(self.latent_dim)).unsqueeze(-1)


def stationary_dynamics(mixing: Tensor) -> tuple[Tensor, Tensor]:
    r"""Dynamics A and process noise Q with :math:`A A^\top + Q = I`, from any square matrix M (*batch, latent, latent).

    :math:`A = (I + M M^\top)^{-1/2} M` and :math:`Q = (I + M M^\top)^{-1}`.
    """
    eye = torch.eye(mixing.shape[-1], dtype=mixing.dtype, device=mixing.device)
    _, inverse = square_roots(eye + mixing @ mixing.mT)
    return inverse @ mixing, inverse @ inverse
