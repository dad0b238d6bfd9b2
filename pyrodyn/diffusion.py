"""What models of stochastic flows declare, and the grid of times on which their paths live."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrodyn.drifts import Drift, DriftParameters
from pyrodyn.errors import ModelError
from pyrodyn.program import StateSpaceModel
from pyrodyn.recording import Recording
from pyrodyn.smoothing import Target

LONGEST_GRID = 200_000  # points; beyond, a gap in the times is more likely a mistake than a silence


class Grid(NamedTuple):
    """Times of a path: those of the bins and steps between them.

    Attributes
    ----------
    steps : Tensor, (grid - 1)
        Seconds.
    bins : Tensor, (time)
        Positions of the bins.
    """

    steps: Tensor
    bins: Tensor


def grid_of(recording: Recording, steps_per_bin: int) -> Grid:
    """A grid that holds every bin, with no step longer than a bin over ``steps_per_bin``."""
    gaps = np.diff(recording.time)
    number = np.maximum(1, np.ceil(gaps / recording.bin_width * steps_per_bin - 1e-6)).astype(int)
    if number.sum() > LONGEST_GRID:
        widest = int(gaps.argmax())
        raise ModelError(
            f"the recording's times need a grid of {number.sum()} steps of {recording.bin_width / steps_per_bin:.3g} s "
            f"(widest gap {gaps[widest]:.3g} s after time {recording.time[widest]:.6g} s), more than {LONGEST_GRID}; "
            "cut the recording into trials at its gaps, or pass a wider bin_width"
        )
    steps = np.repeat(gaps / number, number)
    bins = np.concatenate([[0], np.cumsum(number)])
    return Grid(torch.from_numpy(steps).to(recording.device), torch.from_numpy(bins).to(recording.device))


class DiffusionModel(StateSpaceModel):
    """A state-space model whose path is a diffusion on a grid; its site ``latent`` has the event (grid, latent)."""

    drift: Drift
    latent_dim: int

    @abstractmethod
    def grid(self, recording: Recording) -> Grid:
        """The times of the path."""

    @abstractmethod
    def drift_parameters(self, parameters: Any) -> DriftParameters:
        """What of the parameters belongs to the drift."""

    @abstractmethod
    def pace(self, recording: Recording) -> float:
        """Seconds in which a latent typically changes: the unit of the drift's priors."""

    @abstractmethod
    def target(self, parameters: Any, recording: Recording) -> Target:
        """The same for a smoother."""

    @abstractmethod
    def linear_relative(self) -> StateSpaceModel:
        """The linear model of the same latents and readout, whose path can be integrated out: where to start."""

    @abstractmethod
    def values_from_relative(self, values: Mapping[str, Tensor], recording: Recording) -> dict[str, Tensor]:
        """Values of this model's sites that say the same as ``values`` of the relative's."""
