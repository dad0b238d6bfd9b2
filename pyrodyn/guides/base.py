"""What every guide shares: where it starts, and what it is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pyro.infer.autoguide.initialization import init_to_sample, init_to_value
from torch import Tensor, nn

from pyrodyn.program import LatentModel, Program
from pyrodyn.recording import Recording


class Start(NamedTuple):
    """Where a guide starts.

    Attributes
    ----------
    values : dict of Tensor
        A constrained value for global sites, near the mode where the engine could climb to it.
    root : Tensor or None, (dimension, dimension)
        Lower triangular; ``root @ root.T`` is a first covariance of the unconstrained globals.
    """

    values: Mapping[str, Tensor]
    root: Tensor | None


class GuideFactory(Protocol):
    """Builds a guide, a module whose call has the program's signature and returns its samples by name."""

    def __call__(self, program: Program, recording: Recording, start: Start) -> nn.Module: ...


@dataclass(frozen=True)
class GlobalsOnly:
    """A program of the globals alone, so that a guide of them costs no path."""

    model: LatentModel

    def __call__(self, recording: Recording) -> Any:
        return self.model.sample_globals(recording)


def initialise(start: Start):
    """Pyro's rule for first values: those that are given, and draws of the prior for the rest."""
    return init_to_value(values=dict(start.values), fallback=init_to_sample)
