r"""Sample the path in coordinates in which it is nearly standard normal.

Given the globals, the path is written as :math:`x = m(\theta) + L(\theta)\,z` with :math:`q(x \mid \theta)` a
Gauss-Markov approximation of its posterior and z standard normal. The program samples z, and a factor
:math:`\log p(x \mid \theta) - \log q(x \mid \theta)` keeps its density exact whatever q is. A better q only makes z
easier to explore: where the readout is Gaussian, z is exactly independent of the globals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.conditionals.modes import settle
from pyrodyn.conditioning import find_mode, linearised_potential
from pyrodyn.distributions import GaussianProcess, GaussMarkov, NonlinearMarkov, SwitchingPath
from pyrodyn.program import OBSERVATION_DIMS, Program, StateSpaceModel, globals_given, trial_plate
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

SETTLING = 15  # rounds in which the modes and the path of switching dynamics find each other


def whiten(program: Program, recording: Recording, values: Mapping[str, Tensor]) -> tuple[Program, str]:
    """A program whose path is sampled in coordinates whitened at ``values`` of its globals, and that in words."""
    if not isinstance(program, StateSpaceModel):
        return program, "sampled as the program has it"
    parameters = globals_given(program, values, recording)
    path = program.latent_path(parameters, recording)
    if isinstance(path, NonlinearMarkov | GaussianProcess):
        return Whitened(program, None), "sampled, whitened by its prior"
    if not isinstance(path, GaussMarkov | SwitchingPath):
        return program, "sampled as the program has it"
    zeros = torch.zeros(recording.num_trials, *path.event_shape, dtype=torch.float64, device=recording.device)
    readout = program.readout_law(parameters, zeros, recording)
    seen = recording.observations is not None and isinstance(readout, AffineReadout)
    if isinstance(path, SwitchingPath):
        if not seen:
            return program, "sampled as the program has it"
        with torch.no_grad():
            found = settle(path, readout, recording.values, (recording.num_trials,), SETTLING)
        whitened = Whitened(program, found.chain.mean, found.weight)
        return whitened, "sampled, modes summed out exactly, whitened by a Gaussian given probabilities of modes"
    if not seen:
        return Whitened(program, None), "sampled, whitened by its prior"
    with torch.no_grad():
        point = find_mode(path, readout, recording.values)
    return Whitened(program, point), "sampled, whitened by its Laplace approximation"


@dataclass(frozen=True, eq=False)
class Whitened:
    """A state-space model with its path sampled as a standard normal; made by `whiten`.

    Attributes
    ----------
    point : Tensor or None, (trial, time, latent)
        Where the likelihood is expanded; None whitens by the prior.
    weight : Tensor, (trial, time, mode), optional
        Of a path whose dynamics switch: the probabilities of modes that give the Gaussian.
    """

    model: StateSpaceModel
    point: Tensor | None
    weight: Tensor | None = None

    def __call__(self, recording: Recording) -> Tensor:
        parameters = self.model.sample_globals(recording)
        prior = self.model.latent_path(parameters, recording)
        with trial_plate(recording):
            standard = dist.Normal(torch.zeros(prior.event_shape, dtype=torch.float64), 1.0)
            noise = pyro.sample("whitened_latent", standard.to_event(2))
            path, correction = self.colour(parameters, prior, noise, recording)
            if correction is not None:
                pyro.factor("latent", correction)
            return pyro.sample(
                "observations",
                self.model.readout_law(parameters, path, recording),
                obs=recording.observations,
                infer=OBSERVATION_DIMS,
            )

    def colour(self, parameters, prior: Any, noise: Tensor, recording: Recording):
        """The path of standard normal ``noise`` (*draw, trial, time, latent), and log p - log q of it."""
        if self.point is None:
            return prior.transform(noise), None
        readout = self.model.readout_law(parameters, self.point, recording)
        chain = prior if self.weight is None else prior.given_modes(self.weight)
        local = chain.condition(*linearised_potential(readout, self.point, recording.values))
        path = local.transform(noise)
        return path, prior.log_prob(path) - local.log_prob(path)

    def path(self, parameters, noise: Tensor, recording: Recording) -> Tensor:
        """The path alone."""
        return self.colour(parameters, self.model.latent_path(parameters, recording), noise, recording)[0]
