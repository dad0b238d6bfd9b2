r"""A latent ordinary differential equation: all that happens in a trial follows from where it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.drifts import MLP, Drift
from pyrodyn.errors import ModelError, SolverError
from pyrodyn.expectations import gauss_hermite
from pyrodyn.integrators import FixedStep, Integrator
from pyrodyn.linalg.matrix import broadcast_shapes
from pyrodyn.models._flow import INITIAL_SD, FlowModel, FlowParameters
from pyrodyn.models.neural_sde import FIRST_STEPS, LOCAL_NODES, NeuralSDE
from pyrodyn.program import OBSERVATION_DIMS, Labelled, TrialModel
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording
from pyrodyn.shooting import shoot
from pyrodyn.smoothing import settled

SLACK = 0.3  # noise of the path that finds where a trial starts, sd in a ``time_constant``
INITIAL_DIMS: Any = {"event_dims": ("latent",)}


@dataclass(frozen=True)
class NeuralODE(FlowModel, TrialModel):
    r"""Latent dynamics without noise, with a prior on the weights of their drift and on the first state of each trial.

    .. math::
        \dot x = f(x), \qquad x(t_1) \sim N(0, 1.5^2 I), \qquad \eta_t = C x(t) + d, \qquad
        y_{t,n} \sim p(\cdot \mid \eta_{t,n}).

    Coordinates, drift and readout are those of `NeuralSDE`; times may be unequal, and any units missing.

    Parameters
    ----------
    latent_dim : int
    readout : Readout
        `Poisson` by default.
    drift : Drift
        One of `pyrodyn.drifts`; a network with one hidden layer by default.
    time_constant : float, optional
        Seconds in which a latent typically changes; by default ten bins.
    integrator : Integrator
        `integrators.FixedStep` by default: a step a bin. With `integrators.Adaptive` a stiff flow raises `SolverError`;
        with fixed steps its density is zero.

    Notes
    -----
    Engines start at a `NeuralSDE` of the same drift: errors of a bad drift add up along a path that nothing pulls back,
    and a gradient from there leads nowhere.

    References
    ----------
    Chen, Rubanova, Bettencourt & Duvenaud, NeurIPS 2018; Rubanova, Chen & Duvenaud, NeurIPS 2019.
    """

    drift: Drift = field(default_factory=MLP)
    integrator: Integrator = field(default_factory=FixedStep)

    initial_sd = INITIAL_SD

    guide_scale: ClassVar[float] = 0.003
    """First states are guided trial by trial, along with the globals, by a Gaussian that starts so narrow. Errors add
    up along a flow: a recognition network does not hit first states well enough, and wider draws leave a chaotic
    attractor, the gradients with them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.integrator, Integrator):
            raise ModelError(
                f"integrator must be FixedStep or Adaptive of pyrodyn.integrators, got {self.integrator!r}"
            )

    def sample_globals(self, recording: Recording) -> FlowParameters:
        return self.sample_flow(recording, None)

    def path(self, parameters: FlowParameters, initial: Tensor, recording: Recording) -> Tensor:
        """Paths (*draw, trial, time, latent) at the bins, from first states (*draw, trial, latent)."""
        return self.solve(parameters, initial, slice(None), recording)

    def solve(self, parameters: FlowParameters, initial: Tensor, bins: slice, recording: Recording) -> Tensor:
        """Paths at some of the bins, from the states (*draw, trial, latent) in the first of them."""
        times = torch.from_numpy(recording.time[bins].copy()).to(recording.device)
        draws = broadcast_shapes(initial.shape[:-2], parameters.loading.shape[:-3])
        initial = initial.expand(*draws, *initial.shape[-2:])
        return self.integrator.solve(self.flow(parameters), initial, times, recording.bin_width)

    def trials(self, parameters: FlowParameters, recording: Recording) -> Tensor:
        """The part of the program inside the trial plate; returns the observations."""
        zeros = torch.zeros(self.latent_dim, dtype=torch.float64, device=recording.device)
        initial = pyro.sample("initial_state", dist.Normal(zeros, self.initial_sd).to_event(1), infer=INITIAL_DIMS)
        return pyro.sample(
            "observations",
            self.readout_at(parameters, self.path(parameters, initial, recording), recording),
            obs=recording.observations,
            infer=OBSERVATION_DIMS,
        )

    def relative(self) -> NeuralSDE:
        """The same flow with noise, whose path can be smoothed: where to start."""
        return NeuralSDE(self.latent_dim, self.readout, self.drift, self.time_constant)

    def values_from_relative(self, values: Mapping[str, Tensor], recording: Recording) -> dict[str, Tensor]:
        """Values of this model's globals, from those of the relative."""
        del recording
        return {name: value for name, value in values.items() if not name.startswith("diffusion")}

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        return self.values_from_relative(self.relative().initial_values(recording), recording)

    def latents(self, parameters: Any, local: Mapping[str, Tensor], recording: Recording) -> Labelled:
        path = self.path(parameters, local["initial_state"], recording)
        return {"path": (("trial", "time", "latent"), self._finite(path, recording))}

    def expected(self, parameters: Any, local: Mapping[str, Tensor], recording: Recording) -> Tensor:
        path = self._finite(self.path(parameters, local["initial_state"], recording), recording)
        return self.readout_at(parameters, path, recording).mean

    def _finite(self, path: Tensor, recording: Recording) -> Tensor:
        lost = ~torch.isfinite(path).all(-1).flatten(0, -3).all(0) if path.dim() > 3 else ~torch.isfinite(path).all(-1)
        if bool(lost.any()):
            trial, time = (int(i) for i in lost.nonzero()[0])
            raise SolverError(
                f"a path ran off to infinity in trial {recording.trial[trial]!r} at time {recording.time[time]:.6g} s; "
                "lower the scale of the drift, or take shorter steps: integrators.FixedStep(bins=0.25)"
            )
        return path

    def draw_local(self, parameters: FlowParameters, recording: Recording) -> dict[str, Tensor]:
        """First states (draw, trial, latent), from a normal law at the mode of each draw and trial."""
        draws, trials = len(parameters.loading), recording.num_trials
        if recording.observations is None:
            return {"initial_state": INITIAL_SD * torch.randn(draws, trials, self.latent_dim, dtype=torch.float64)}

        def readout(path: Tensor) -> AffineReadout:
            return self.readout_at(parameters, path, recording)

        law = shoot(
            lambda state: self.path(parameters, state, recording),
            readout,
            recording.observations,
            self._near(parameters, recording).expand(draws, -1, -1),
            INITIAL_SD,
        )
        return {"initial_state": law.sample()}

    def _near(self, parameters: FlowParameters, recording: Recording) -> Tensor:
        """First states (1, trial, latent) of paths that may leave the flow a little, under the first draw."""
        first = FlowParameters._make(None if part is None else part[:1] for part in parameters)
        eye = torch.eye(self.latent_dim, dtype=torch.float64, device=recording.device)
        slack = SLACK / math.sqrt(self.pace(recording))
        target = self.relative().target(first._replace(diffusion=slack * eye.expand(1, 1, -1, -1)), recording)
        return settled(target, gauss_hermite(self.latent_dim, LOCAL_NODES), FIRST_STEPS).mean[..., 0, :]
