r"""Where the fit of a flow without noise starts.

A gradient of a path in a drift that is wrong says little: errors add up along it, and far from the truth the density is
a maze. With some noise in the flow the path bends to the data, and the drift is a regression along it. So the noisy
relative is fitted first. Then trials are cut into pieces, each with a first state of its own, and the density of flow
and states is climbed; pieces are joined two by two until they are the trials again (multiple shooting, whose joints are
free).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.diffusion import DiffusionModel
from pyrodyn.inference._diffusion_fit import WEIGHTS, DiffusionFit, Schedule
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.mode import ascend
from pyrodyn.program import trial_plate
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

SCHEDULE = Schedule(rounds=10, path_steps=2, path_rate=0.7, nodes=2, learning_rate=0.03, tolerance=0.05)
MOST_PIECES = 8
STATES = "initial_state"


@runtime_checkable
class NoiselessFlow(Protocol):
    """A model whose path follows from its first state, the site ``initial_state``."""

    latent_dim: int
    initial_sd: float

    def sample_globals(self, recording: Recording) -> Any:
        """Place the priors."""
        ...

    def relative(self) -> DiffusionModel:
        """The same flow with noise."""
        ...

    def values_from_relative(self, values: Mapping[str, Tensor], recording: Recording) -> dict[str, Tensor]:
        """Values of this model's globals from those of the relative."""
        ...

    def solve(self, parameters: Any, initial: Tensor, bins: slice, recording: Recording) -> Tensor:
        """Paths (*draw, trial, time, latent) at some bins from the states (*draw, trial, latent) in the first."""
        ...

    def readout_at(self, parameters: Any, path: Tensor, recording: Recording) -> AffineReadout:
        """The readout of a path at all bins."""
        ...


@dataclass(frozen=True)
class Pieces:
    """The program of a flow whose trials are cut before the bins ``edges``; no piece knows of another."""

    model: NoiselessFlow
    edges: tuple[int, ...]

    def __call__(self, recording: Recording) -> Tensor:
        parameters = self.model.sample_globals(recording)
        zeros = torch.zeros(len(self.edges), self.model.latent_dim, dtype=torch.float64, device=recording.device)
        bounds = pairwise((*self.edges, recording.num_bins))
        with trial_plate(recording):
            states = pyro.sample(STATES, dist.Normal(zeros, self.model.initial_sd).to_event(2))
            parts = [
                self.model.solve(parameters, state, slice(first, last), recording)
                for state, (first, last) in zip(states.unbind(-2), bounds, strict=True)
            ]
            readout = self.model.readout_at(parameters, torch.cat(parts, -2), recording)
            return pyro.sample("observations", readout, obs=recording.observations)


def flow_start(
    model: NoiselessFlow, recording: Recording, start: Mapping[str, Tensor], max_steps: int, label: str
) -> dict[str, Tensor]:
    """Values of all sites near a mode of the posterior, those of trials among them.

    ``start`` holds values for the globals of the relative's linear relative; ``max_steps`` of L-BFGS are taken with
    pieces of each length.
    """
    relative = model.relative()
    fitted = DiffusionFit(SCHEDULE, relative, recording, start)
    fitted.train(None)
    values = fitted.density.constrain(fitted.place)
    values[WEIGHTS] = fitted.weights.mean / fitted.prior_sd().unsqueeze(-1)
    values = model.values_from_relative(values, recording)
    path = fitted.moments().mean[:, relative.grid(recording).bins]
    number = min(MOST_PIECES, max(1, recording.num_bins // 4))
    while True:
        edges = tuple(round(k * recording.num_bins / number) for k in range(number))
        # States inside of longer pieces come from the path of the noisy relative, those at their starts from the climb.
        density = LogDensity(Pieces(model, edges), recording)
        values[STATES] = path[:, list(edges)]
        place, _ = ascend(density, density.unconstrain(values), max_steps, f"{label}, {number} pieces a trial")
        values = {name: value.detach() for name, value in density.constrain(place).items()}
        path = path.index_copy(1, torch.tensor(edges), values[STATES])
        if number == 1:
            return values | {STATES: values[STATES].squeeze(1)}
        number = (number + 1) // 2
