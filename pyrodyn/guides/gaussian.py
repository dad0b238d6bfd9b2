"""Gaussians over unconstrained globals, and a point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoLowRankMultivariateNormal, AutoNormal
from torch import nn

from pyrodyn.guides.base import Start, initialise
from pyrodyn.program import Program
from pyrodyn.recording import Recording


@dataclass(frozen=True)
class FullRank:
    """One Gaussian with a full covariance over all unconstrained sites, trained in whitened coordinates."""

    posterior_of_globals: ClassVar[str] = "full-rank Gaussian"

    initial_scale: float = 0.05  # where no covariance is known at the start

    def __call__(self, program: Program, recording: Recording, start: Start) -> nn.Module:
        return _WhitenedNormal(program, start, self.initial_scale)


class _WhitenedNormal(AutoContinuous):
    """N(centre + root m, root S S' root'), m and lower triangular S to be learned: 0 and 1 where root is right."""

    def __init__(self, program: Program, start: Start, initial_scale: float) -> None:
        super().__init__(program, init_loc_fn=initialise(start))
        self._root, self._initial_scale = start.root, initial_scale

    def _setup_prototype(self, *args, **kwargs) -> None:
        super()._setup_prototype(*args, **kwargs)
        centre = self._init_loc()
        root = self._root
        if root is None or len(root) != len(centre):
            root = self._initial_scale * torch.eye(len(centre), dtype=centre.dtype)
        self.register_buffer("centre", centre)
        self.register_buffer("root", root)
        self.shift = nn.Parameter(torch.zeros_like(centre))
        self.log_scale = nn.Parameter(torch.zeros_like(centre))
        self.lower = nn.Parameter(torch.zeros_like(root))

    def get_posterior(self, *args, **kwargs) -> dist.MultivariateNormal:
        triangle = self.lower.tril(-1) + torch.diag_embed(self.log_scale.exp())
        return dist.MultivariateNormal(self.centre + self.root @ self.shift, scale_tril=self.root @ triangle)


@dataclass(frozen=True)
class MeanField:
    """An independent Gaussian for every unconstrained number. Posterior standard deviations come out too small."""

    posterior_of_globals: ClassVar[str] = "independent Gaussians"

    initial_scale: float = 0.05

    def __call__(self, program: Program, recording: Recording, start: Start) -> nn.Module:
        return AutoNormal(program, init_loc_fn=initialise(start), init_scale=self.initial_scale)


@dataclass(frozen=True)
class LowRank:
    """A Gaussian whose covariance is diagonal plus low rank, for many globals."""

    posterior_of_globals: ClassVar[str] = "Gaussian of diagonal and low-rank covariance"

    rank: int = 20
    initial_scale: float = 0.05

    def __call__(self, program: Program, recording: Recording, start: Start) -> nn.Module:
        return AutoLowRankMultivariateNormal(
            program, init_loc_fn=initialise(start), init_scale=self.initial_scale, rank=self.rank
        )


@dataclass(frozen=True)
class PointEstimate:
    """The most probable value of the unconstrained sites, all at once: no posterior, and labelled so.

    The density that is maximised has the Jacobian of the unconstrained coordinates, as in `pyrodyn.inference.Laplace`.
    """

    posterior_of_globals: ClassVar[str] = "point estimate, no posterior"

    def __call__(self, program: Program, recording: Recording, start: Start) -> nn.Module:
        return _Point(program, init_loc_fn=initialise(start))


class _Point(AutoContinuous):
    """All mass at one vector."""

    def _setup_prototype(self, *args, **kwargs) -> None:
        super()._setup_prototype(*args, **kwargs)
        self.loc = nn.Parameter(self._init_loc())

    def get_posterior(self, *args, **kwargs) -> dist.TorchDistribution:
        return dist.Delta(self.loc).to_event(1)
