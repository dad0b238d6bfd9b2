"""What a law for observations is asked, and what a readout adds to it: the contract of `pyrodyn.readouts.laws`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from pyrodyn.recording import Recording


class Law(ABC):
    """The law of every unit's observations given its predictor.

    Shapes: ``predictor`` (*batch, time, unit), ``noise`` (*batch, 1, unit) or None, ``value`` (*batch, time, unit).
    """

    is_gaussian: bool = False  # whether the path given the parameters is exactly Gaussian
    canonical: bool = False  # whether the predictor is the natural parameter
    noise_name: str | None = None  # the site of the law's own parameter

    def of_units(self, units: Tensor) -> Law:
        """The law of some of the units, by their positions."""
        del units
        return self

    @abstractmethod
    def log_prob(self, predictor: Tensor, noise: Any, value: Tensor) -> Tensor:
        """Log density or mass."""

    def log_kernel(self, predictor: Tensor, noise: Any, value: Tensor) -> Tensor:
        """`log_prob` up to terms that the predictor does not enter: all that a search over paths needs."""
        return self.log_prob(predictor, noise, value)

    @abstractmethod
    def natural(self, predictor: Tensor, noise: Any) -> tuple[Tensor, Tensor]:
        """Slope and constant with which `log_kernel` is ``value * slope - constant``, plus what no predictor enters.

        So sums over units, for few predictors and many bins, are products of matrices.
        """

    @abstractmethod
    def score(self, predictor: Tensor, noise: Any, value: Tensor) -> Tensor:
        """First derivative of `log_prob` in the predictor."""

    @abstractmethod
    def curvature(self, predictor: Tensor, noise: Any, value: Tensor) -> Tensor:
        """Minus the second derivative of `log_prob` in the predictor; never negative."""

    def expand_log(self, predictor: Tensor, noise: Any, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`log_kernel`, `score` and `curvature` at once, for laws whose three share an exponential."""
        return (
            self.log_kernel(predictor, noise, value),
            self.score(predictor, noise, value),
            self.curvature(predictor, noise, value),
        )

    def partition(self, predictor: Tensor, noise: Any) -> tuple[Tensor, Tensor, Tensor]:
        """A in `log_kernel` = value * predictor - A, and its first two derivatives; of laws that are canonical."""
        return (
            self.natural(predictor, noise)[1],
            self.mean(predictor, noise),
            self.curvature(predictor, noise, predictor),
        )

    @abstractmethod
    def mean(self, predictor: Tensor, noise: Any) -> Tensor:
        """Expected observation: a count for a bin, or a value in the recording's units."""

    @abstractmethod
    def link(self, mean: Tensor) -> Tensor:
        """The predictor at which `mean` is a given one, (*batch, time, unit)."""

    @abstractmethod
    def marginal_mean(self, predictor: Tensor, variance: Tensor, noise: Any) -> Tensor:
        """Expected observation where the predictor is itself normal, with mean ``predictor`` and ``variance``."""

    @abstractmethod
    def sample(self, predictor: Tensor, noise: Any) -> Tensor:
        """Draw observations."""


class Readout(Law):
    """What stands between the predictor and the observations: one law for all units, and its priors."""

    def bound(self, recording: Recording) -> Law:
        """The law of a recording's units."""
        del recording
        return self

    def noisy(self, recording: Recording) -> Tensor:
        """Positions of the units whose law has a parameter of its own."""
        return torch.arange(recording.num_units if self.noise_name else 0)

    @abstractmethod
    def check(self, recording: Recording) -> None:
        """Raise `ReadoutError` where an observation lies outside the support."""

    @abstractmethod
    def sample_offset(self, recording: Recording) -> Tensor:
        """The site ``offset``, (unit)."""

    @abstractmethod
    def sample_noise(self, recording: Recording) -> Tensor | None:
        """The site of the law's own parameter, (unit), or None."""

    @abstractmethod
    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        """Moment estimates for the readout's sites, in a model without latents."""

    @abstractmethod
    def linearise(self, recording: Recording) -> Tensor:
        """Observations on the predictor's scale, about 0, (trial, time, unit): what linear start-ups work on."""

    def signal_scale(self, recording: Recording) -> Tensor:
        """What a loading of one means on the predictor's scale, (unit)."""
        return torch.ones_like(recording.scale)
