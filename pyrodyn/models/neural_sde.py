r"""A latent stochastic differential equation whose drift is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.diffusion import DiffusionModel, Grid, grid_of
from pyrodyn.distributions import EulerMaruyama
from pyrodyn.drifts import DriftParameters
from pyrodyn.errors import ModelError
from pyrodyn.expectations import Diffusion, gauss_hermite
from pyrodyn.linalg.matrix import below_diagonal, precision_of, strictly_lower
from pyrodyn.models._anchor import anchor
from pyrodyn.models._flow import INITIAL_SD, FlowModel, FlowParameters
from pyrodyn.models.linear_sde import LinearSDE
from pyrodyn.program import Labelled, draws_of, globals_given
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording
from pyrodyn.smoothing import Target, settled

LOCAL_NODES = 2  # of the quadrature in each dimension, where the path alone is inferred
FIRST_STEPS, LATER_STEPS = 20, 3  # natural steps of the first draw's path, and of the others'
DRAWS_AT_ONCE = 10


@dataclass(frozen=True)
class NeuralSDE(FlowModel, DiffusionModel):
    r"""Noisy latent dynamics in continuous time with a nonlinear drift, read out at any times.

    .. math::
        dx = f(x)\,dt + L\,dW, \qquad x(t_1) \sim N(0, 1.5^2 I), \qquad \eta_t = C x(t) + d, \qquad
        y_{t,n} \sim p(\cdot \mid \eta_{t,n}),

    on a grid of Euler-Maruyama steps that holds every bin. Bins may lie at any times and miss any units.

    **Coordinates.** All affine maps of the latent are fixed by the recording: paths have about unit standard deviation
    in each coordinate, and fixed points, boxes and length scales are in these units.

    **Prior.** That of f is the drift's. L is lower triangular, its rows scaled by log-normal factors of median
    :math:`\tau^{-1/2}`, with :math:`\tau` the ``time_constant``; below the diagonal it has normal entries.

    Parameters
    ----------
    latent_dim : int
    readout : Readout
        `Poisson` by default.
    drift : Drift
        One of `pyrodyn.drifts`; a Gaussian process by default.
    time_constant : float, optional
        :math:`\tau` in seconds, in which a latent typically changes; by default ten bins.
    steps_per_bin : int
        Euler-Maruyama steps in a bin, at least.

    Notes
    -----
    `inference.NaturalGradient` is made for this model. Other engines sample the path.

    References
    ----------
    Duncker, Bohner, Boussard & Sahani, ICML 2019 (Gaussian-process drifts); Hu, Smith & Linderman (2025).
    """

    steps_per_bin: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.steps_per_bin, int) or self.steps_per_bin < 1:
            raise ModelError(f"steps_per_bin must be a whole number of at least 1, got {self.steps_per_bin!r}")

    def grid(self, recording: Recording) -> Grid:
        return grid_of(recording, self.steps_per_bin)

    def sample_globals(self, recording: Recording) -> FlowParameters:
        dim = self.latent_dim
        zeros = torch.zeros(dim, dtype=torch.float64, device=recording.device)
        typical = zeros - 0.5 * math.log(self.pace(recording))
        scale = pyro.sample("diffusion_scale", dist.LogNormal(typical, 1.0).to_event(1))
        diffusion = torch.diag_embed(scale)
        if dim > 1:
            below = dist.Normal(zeros[:1].expand(dim * (dim - 1) // 2), 1.0).to_event(1)
            mixing = strictly_lower(pyro.sample("diffusion_mixing", below), dim)
            diffusion = diffusion + scale.unsqueeze(-1) * mixing
        return self.sample_flow(recording, diffusion)

    def drift_parameters(self, parameters: FlowParameters) -> DriftParameters:
        return parameters.drift

    def latent_path(self, parameters: FlowParameters, recording: Recording) -> EulerMaruyama:
        assert parameters.diffusion is not None
        own = parameters.drift
        return EulerMaruyama(
            lambda state: self.drift(own, state),
            parameters.diffusion,
            self.grid(recording).steps,
            initial_sd=INITIAL_SD,
        )

    def readout_law(self, parameters: FlowParameters, path: Tensor, recording: Recording) -> AffineReadout:
        return self.readout_at(parameters, path[..., self.grid(recording).bins, :], recording)

    def target(self, parameters: FlowParameters, recording: Recording) -> Target:
        assert parameters.diffusion is not None
        grid, own = self.grid(recording), parameters.drift
        precision, _ = precision_of(parameters.diffusion @ parameters.diffusion.mT)
        return Target(
            Diffusion(lambda x: self.drift.features(own, x), own.weights, None, precision, grid.steps, INITIAL_SD),
            lambda path: self.readout_at(parameters, path, recording),
            recording.observations,
            grid.bins,
        )

    def latents(self, parameters: Any, local: Mapping[str, Tensor], recording: Recording) -> Labelled:
        return {"path": (("trial", "time", "latent"), local["latent"][..., self.grid(recording).bins, :])}

    def linear_relative(self) -> LinearSDE:
        return LinearSDE(self.latent_dim, self.readout, self.time_constant)

    def values_from_relative(self, values: Mapping[str, Tensor], recording: Recording) -> dict[str, Tensor]:
        linear = globals_given(self.linear_relative(), values, recording)
        turn, shift, found = anchor(recording, self.latent_dim, self.readout).moved(linear.loading, linear.offset)
        slope = torch.linalg.solve(turn.mT, (turn @ linear.drift).mT).mT  # T A T^-1
        found |= self.drift.initial_values(self.latent_dim, self.pace(recording), slope, -slope @ shift)
        root = torch.linalg.cholesky(-turn @ (linear.drift + linear.drift.mT) @ turn.mT)
        scale = root.diagonal()
        found["diffusion_scale"] = scale.clone()
        if self.latent_dim > 1:
            found["diffusion_mixing"] = below_diagonal(root / scale[:, None])
        if self.readout.noise_name is not None:
            found[self.readout.noise_name] = values[self.readout.noise_name]
        return found

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        return self.values_from_relative(self.linear_relative().initial_values(recording), recording)

    def draw_local(self, parameters: FlowParameters, recording: Recording) -> dict[str, Tensor]:
        """Draws (draw, trial, grid, latent) of the nearest Gauss-Markov laws of the path, given the parameters."""
        if recording.observations is None:
            wide = self.latent_path(parameters, recording)
            return {"latent": wide.expand(torch.Size((*wide.batch_shape[:-1], recording.num_trials))).sample()}
        rule = gauss_hermite(self.latent_dim, LOCAL_NODES)
        # One draw from afar, the others from its law: laws of different draws lie close together.
        near = settled(self.target(draws_of(parameters, slice(0, 1)), recording), rule, FIRST_STEPS)
        paths = []
        for start in range(0, len(parameters.loading), DRAWS_AT_ONCE):
            target = self.target(draws_of(parameters, slice(start, start + DRAWS_AT_ONCE)), recording)
            paths.append(settled(target, rule, LATER_STEPS, near).sample())
        return {"latent": torch.cat(paths)}
