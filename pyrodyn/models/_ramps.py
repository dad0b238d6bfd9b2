r"""What models of evidence that accumulates share: a diffusion on a grid of positions, up to a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.special import log_ndtr

from pyrodyn.errors import ModelError
from pyrodyn.models._conditioned import RAREST, ConditionedChain
from pyrodyn.recording import Recording

STARTS = (0.3, 0.5, 0.7)  # that the first guess tries
LINEAR = -36.0  # argument below which log softplus is its argument to the last digit
MAX_DRIFT = 1.5  # of the first guess, per second


@dataclass(frozen=True)
class Ramps(ConditionedChain):
    """Diffusions on a grid of positions, with a state of its own at the bound 1.

    A step's density is taken at the grid's points, a sum that is the integral to 5e-9 once the standard deviation is
    the spacing, and is normalised on what lies inside; the mass beyond the bound is exact. What is left is of the order
    of the spacing squared, where the density ends at the bound. No path goes below the lower end of the grid, where
    rates are next to zero.

    Parameters
    ----------
    conditions : tuple of str
        As in `ConditionedChain`; drifts depend on them.
    grid : int
        Number of positions below the bound.
    lower : float
        Lower end of the grid.
    drift_scale : float
        Prior standard deviation of a drift, per second.
    diffusion : float
        Middle of the prior of the diffusion, per root of a second.
    """

    grid: int = 100
    lower: float = -0.5
    drift_scale: float = 1.0
    diffusion: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.grid, int) or self.grid < 10:
            raise ModelError(f"grid must be a whole number of at least 10, got {self.grid!r}")
        if not self.lower <= 0.0:
            raise ModelError(f"lower must be 0 or less, got {self.lower!r}")
        if not self.drift_scale > 0 or not self.diffusion > 0:
            raise ModelError(
                f"drift_scale and diffusion must be positive, got {self.drift_scale!r} and {self.diffusion!r}"
            )

    @property
    def end(self) -> float:
        """Upper end of the grid."""
        return 1.0

    @property
    def bounded(self) -> bool:
        """Whether paths are held where they pass the upper end."""
        return True

    @property
    def spacing(self) -> float:
        """Distance between two positions of the grid."""
        return (self.end - self.lower) / self.grid

    @property
    def positions(self) -> Tensor:
        """The middles of the grid's cells, and the bound."""
        inside = self.lower + self.spacing * (torch.arange(self.grid, dtype=torch.float64) + 0.5)
        return torch.cat([inside, inside.new_ones(1)]) if self.bounded else inside

    def check(self, recording: Recording) -> None:
        super().check(recording)
        step = self.diffusion * math.sqrt(recording.bin_width)
        if self.spacing > step:
            needed = math.ceil(self.grid * self.spacing / step)
            raise ModelError(
                f"grid has positions {self.spacing:.3g} apart, but in a bin of {recording.bin_width:g} s x moves by "
                f"{step:.3g}; expected a spacing no larger: set grid to {needed} or more, or take wider bins"
            )

    def steps(self, mean: Tensor, sd: Tensor) -> Tensor:
        """Log probabilities of the positions after a step with means (*batch, from) and sd (*batch, 1)."""
        mean, sd = mean.unsqueeze(-1), sd.unsqueeze(-1)
        inside = -0.5 * ((self.positions[: self.grid].to(mean.device) - mean) / sd).square()
        inside = inside - inside.logsumexp(-1, keepdim=True)
        if self.bounded:
            beyond = (mean - 1.0) / sd
            inside = torch.cat([inside + log_ndtr(-beyond), log_ndtr(beyond)], -1)
        return inside.clamp(min=RAREST)


def log_softplus(driven: Tensor) -> Tensor:
    """Far below zero the logarithm of softplus is its argument, and softplus itself is 0."""
    return torch.where(driven < LINEAR, driven, softplus(driven.clamp(min=LINEAR)).log())
