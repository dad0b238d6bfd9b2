"""Variational families: a frozen set of options that builds a Pyro guide for a program on a recording.

Any callable with the same three arguments serves as well, so a user's own guide is a function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoLowRankMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_sample, init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrodyn.conditioning import find_mode, linearised_potential
from pyrodyn.distributions import GaussMarkov
from pyrodyn.errors import ModelError
from pyrodyn.program import PATH_DIMS, Program, StateSpaceModel, globals_given, is_random, trial_plate
from pyrodyn.readouts import AffineReadout
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
class FullRank:
    """One Gaussian with a full covariance over all unconstrained sites, trained in whitened coordinates."""

    initial_scale: float = 0.05  # where no covariance is known at the start

    def __call__(self, program: Program, recording: Recording, start: Start) -> nn.Module:
        return _WhitenedNormal(program, start, self.initial_scale)


class _WhitenedNormal(AutoContinuous):
    """N(centre + root m, root S S' root'), m and lower triangular S to be learned: 0 and 1 where root is right."""

    def __init__(self, program: Program, start: Start, initial_scale: float) -> None:
        super().__init__(program, init_loc_fn=_initialise(start))
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

    initial_scale: float = 0.05

    def __call__(self, program: Program, recording: Recording, start: Start) -> nn.Module:
        return AutoNormal(program, init_loc_fn=_initialise(start), init_scale=self.initial_scale)


@dataclass(frozen=True)
class LowRank:
    """A Gaussian whose covariance is diagonal plus low rank, for many globals."""

    rank: int = 20
    initial_scale: float = 0.05

    def __call__(self, program: Program, recording: Recording, start: Start) -> nn.Module:
        return AutoLowRankMultivariateNormal(
            program, init_loc_fn=_initialise(start), init_scale=self.initial_scale, rank=self.rank
        )


@dataclass(frozen=True)
class Structured:
    r""":math:`q(\theta)\,q(x \mid \theta)`, the path a Gauss-Markov chain that moves with the parameters.

    :math:`q(x \mid \theta) \propto p(x \mid \theta) \prod_t g_t(x_t; \theta)`, with :math:`g_t` the second-order
    expansion of the likelihood under :math:`\theta` about a learned path. So the dependence of path on parameters is
    kept, where a product :math:`q(\theta)\,q(x)` makes the posterior of the dynamics far too narrow. With a Gaussian
    readout it is the exact conditional whatever the learned path.

    Reference: structured variational inference after Hoffman & Blei, AISTATS 2015.
    """

    globals: GuideFactory = field(default_factory=FullRank)

    def __call__(self, program: Program, recording: Recording, start: Start) -> nn.Module:
        return StructuredGuide(program, recording, self.globals, start)


class StructuredGuide(PyroModule):
    """The module built by `Structured`; ``globals`` is the guide of the globals, ``point`` the learned path."""

    def __init__(self, model: Program, recording: Recording, factory: GuideFactory, start: Start) -> None:
        super().__init__()
        if not isinstance(model, StateSpaceModel):
            raise ModelError(f"the guide Structured needs a StateSpaceModel with a path, got {type(model).__name__}")
        parameters = globals_given(model, start.values, recording)
        prior = model.latent_path(parameters, recording)
        if not isinstance(prior, GaussMarkov):
            raise ModelError(
                f"the guide Structured needs a GaussMarkov path, and that of {type(model).__name__} is "
                f"{type(prior).__name__}; use guides.MeanField()"
            )
        zeros = prior.linear.new_zeros(recording.num_trials, *prior.event_shape)
        readout = model.readout_law(parameters, zeros, recording)
        if not isinstance(readout, AffineReadout):
            raise ModelError(
                f"the guide Structured needs an affine readout, got {type(readout).__name__}; use guides.MeanField()"
            )
        self._model = (model,)  # in a tuple: a model is not a submodule, and has no parameters to train
        self.globals = factory(_GlobalsOnly(model), recording, start)
        with torch.no_grad():
            self.point = nn.Parameter(find_mode(prior, readout, recording.values))

    def forward(self, recording: Recording) -> dict[str, Tensor]:
        values = dict(self.globals(recording))
        law = self.path_given(values, recording)
        with trial_plate(recording):
            values["latent"] = pyro.sample("latent", law, infer=PATH_DIMS)
        return values

    def path_given(self, values: Mapping[str, Tensor], recording: Recording) -> GaussMarkov:
        """q(path | globals)."""
        model = self._model[0]
        parameters = globals_given(model, values, recording)
        readout = model.readout_law(parameters, self.point, recording)
        prior = model.latent_path(parameters, recording)
        law = prior.condition(*linearised_potential(readout, self.point, recording.values))
        if readout.law.is_gaussian:
            return law
        # The expansion point follows the parameters by one Newton step: a fixed point makes their posterior too narrow
        # where rates are high.
        return prior.condition(*linearised_potential(readout, law.mean, recording.values))


@dataclass(frozen=True)
class _GlobalsOnly:
    """A program of the globals alone, so that a guide of them costs no path."""

    model: StateSpaceModel

    def __call__(self, recording: Recording) -> Any:
        return self.model.sample_globals(recording)


def _initialise(start: Start):
    return init_to_value(values=dict(start.values), fallback=init_to_sample)


def draw_globals(guide: nn.Module, recording: Recording, draws: int) -> tuple[dict[str, Tensor], Tensor]:
    """Draws (draw, *event) of the globals, (draw, trial, *event) of what is local to a trial, and their log density
    (draw,).

    Of a `StructuredGuide` the globals alone are drawn.
    """
    source = guide.globals if isinstance(guide, StructuredGuide) else guide
    with torch.no_grad():
        with pyro.plate("draw", draws, dim=-2):
            trace = poutine.trace(source).get_trace(recording)
        trace.compute_log_prob()
    values, log_q = {}, torch.zeros(draws, dtype=torch.float64)
    nodes: Any = trace.nodes
    for name, site in nodes.items():
        if is_random(site):
            log_q = log_q + site["log_prob"].reshape(draws, -1).sum(-1)
            if not site["infer"].get("is_auxiliary", False):
                local = any(frame.name == "trial" for frame in site["cond_indep_stack"])
                values[name] = site["value"] if local else site["value"].squeeze(1)
    return values, log_q
