r"""A path that moves with the parameters, its approximation free for every trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrodyn.conditionals.modes import settle
from pyrodyn.conditioning import find_mode, linearised_potential
from pyrodyn.distributions import BentChain, GaussMarkov, NonlinearMarkov, SwitchingPath
from pyrodyn.errors import ModelError
from pyrodyn.guides.base import GlobalsOnly, GuideFactory, Start
from pyrodyn.guides.gaussian import FullRank
from pyrodyn.program import PATH_DIMS, Program, StateSpaceModel, globals_given, trial_plate
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

SMALL_GAIN = -2.0  # logit of the gain by which a path's steps are drawn towards their levels at the start
SETTLING = 15  # rounds in which modes and path find each other, before a guide learns the rest
LEAST_WEIGHT = 1e-3  # probability of a mode at the start: from zero, nothing is learned


@dataclass(frozen=True)
class Structured:
    r""":math:`q(\theta)\,q(x \mid \theta)`, the path a chain that moves with the parameters.

    :math:`q(x \mid \theta) \propto p(x \mid \theta) \prod_t g_t(x_t; \theta)`. For a Gauss-Markov path under an affine
    readout :math:`g_t` is the second-order expansion of the likelihood under :math:`\theta` about a learned path: the
    exact conditional where the readout is Gaussian, whatever the learned path. For a `NonlinearMarkov` path every step
    is multiplied by a learned Gaussian potential of its own and normalised (`NonlinearMarkov.filtered`).

    Of a `SwitchingPath`, p(x | theta) is replaced by the Gauss-Markov chain that probabilities of the modes give,
    learned bin by bin, and the result is bent in its whitened coordinates (`BentChain`). The bound stays that of the
    program, in which the modes are summed out exactly given the path: it is tighter, and its modes are nearer the
    truth, than if path and modes were taken as independent.

    So the dependence of path on parameters is kept, where a product :math:`q(\theta)\,q(x)` makes the posterior of the
    dynamics far too narrow.

    Reference: structured variational inference after Hoffman & Blei, AISTATS 2015.
    """

    treatment: ClassVar[str] = "sampled by the structured guide"

    globals: GuideFactory = field(default_factory=FullRank)

    @property
    def posterior_of_globals(self) -> str:
        """What the globals' own guide is, in words."""
        return getattr(self.globals, "posterior_of_globals", "a guide of the user's own")

    def __call__(self, program: Program, recording: Recording, start: Start) -> nn.Module:
        if not isinstance(program, StateSpaceModel):
            raise ModelError(f"the guide Structured needs a StateSpaceModel with a path, got {type(program).__name__}")
        parameters = globals_given(program, start.values, recording)
        law = program.latent_path(parameters, recording)
        if isinstance(law, NonlinearMarkov):
            return FilteredGuide(program, recording, self.globals, start)
        if isinstance(law, SwitchingPath):
            return SwitchingGuide(program, recording, self.globals, start)
        if not isinstance(law, GaussMarkov):
            raise ModelError(
                f"the guide Structured needs a path that is GaussMarkov, NonlinearMarkov or SwitchingPath, and that of "
                f"{type(program).__name__} is {type(law).__name__}; use guides.MeanField()"
            )
        return ExpandedGuide(program, recording, self.globals, start)


class StructuredGuide(PyroModule):
    """What `Structured` builds; ``globals`` is the guide of the globals."""

    def __init__(self, model: StateSpaceModel, recording: Recording, factory: GuideFactory, start: Start) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: a model is not a submodule, and has no parameters to train
        self.globals = factory(GlobalsOnly(model), recording, start)

    def forward(self, recording: Recording) -> dict[str, Tensor]:
        values = dict(self.globals(recording))
        return values | self.local_given(values, recording)

    def local_given(self, values: Mapping[str, Tensor], recording: Recording) -> dict[str, Tensor]:
        """Sample the path given values of the globals' sites."""
        law = self.path_given(values, recording)
        with trial_plate(recording):
            return {"latent": pyro.sample("latent", law, infer=PATH_DIMS)}

    def path_given(self, values: Mapping[str, Tensor], recording: Recording) -> TorchDistribution:
        """q(path | globals)."""
        raise NotImplementedError


class ExpandedGuide(StructuredGuide):
    """Of a Gauss-Markov path; ``point`` is the learned path."""

    def __init__(self, model: StateSpaceModel, recording: Recording, factory: GuideFactory, start: Start) -> None:
        super().__init__(model, recording, factory, start)
        prior, readout = _affine(model, recording, start)
        with torch.no_grad():
            self.point = nn.Parameter(find_mode(prior, readout, recording.values))

    def path_given(self, values: Mapping[str, Tensor], recording: Recording) -> GaussMarkov:
        model = self._model[0]
        parameters = globals_given(model, values, recording)
        readout: Any = model.readout_law(parameters, self.point, recording)
        return _expanded(model.latent_path(parameters, recording), readout, self.point, recording)


class SwitchingGuide(StructuredGuide):
    """Of a `SwitchingPath`; ``point`` is the learned path, ``logit`` gives the probabilities of modes."""

    def __init__(self, model: StateSpaceModel, recording: Recording, factory: GuideFactory, start: Start) -> None:
        super().__init__(model, recording, factory, start)
        prior, readout = _affine(model, recording, start)
        with torch.no_grad():
            found = settle(prior, readout, recording.values, (recording.num_trials,), SETTLING)
            self.point = nn.Parameter(found.chain.mean)
            self.logit = nn.Parameter(found.weight.clamp(min=LEAST_WEIGHT).log())
            self.shift = nn.Parameter(torch.zeros_like(found.chain.mean))
            self.lower = nn.Parameter(torch.zeros_like(found.chain.covariance))

    def path_given(self, values: Mapping[str, Tensor], recording: Recording) -> BentChain:
        model = self._model[0]
        parameters = globals_given(model, values, recording)
        readout: Any = model.readout_law(parameters, self.point, recording)
        prior: Any = model.latent_path(parameters, recording)
        law = _expanded(prior.given_modes(torch.softmax(self.logit, -1)), readout, self.point, recording)
        root = self.lower.tril(-1) + torch.diag_embed(self.lower.diagonal(dim1=-2, dim2=-1).exp())
        return BentChain(law, self.shift, root)


class FilteredGuide(StructuredGuide):
    """Of a `NonlinearMarkov` path: ``level`` is what a step is drawn to, by a gain of 1 / (1 + exp(-weight))."""

    def __init__(self, model: StateSpaceModel, recording: Recording, factory: GuideFactory, start: Start) -> None:
        super().__init__(model, recording, factory, start)
        law = model.latent_path(globals_given(model, start.values, recording), recording)
        size = (recording.num_trials, *law.event_shape)
        self.level = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.weight = nn.Parameter(torch.full(size, SMALL_GAIN, dtype=torch.float64))

    def path_given(self, values: Mapping[str, Tensor], recording: Recording) -> NonlinearMarkov:
        model = self._model[0]
        prior: Any = model.latent_path(globals_given(model, values, recording), recording)
        return prior.pulled(self.weight.exp(), self.level)


def _affine(model: StateSpaceModel, recording: Recording, start: Start) -> tuple[Any, AffineReadout]:
    """The law of the path and the readout at a guide's start."""
    parameters = globals_given(model, start.values, recording)
    prior: Any = model.latent_path(parameters, recording)
    zeros = torch.zeros(recording.num_trials, *prior.event_shape, dtype=torch.float64, device=recording.device)
    readout = model.readout_law(parameters, zeros, recording)
    if not isinstance(readout, AffineReadout):
        raise ModelError(
            f"the guide Structured needs an affine readout, got {type(readout).__name__}; use guides.MeanField()"
        )
    return prior, readout


def _expanded(prior: Any, readout: AffineReadout, point: Tensor, recording: Recording) -> GaussMarkov:
    """A chain given the likelihood expanded about ``point``."""
    law = prior.condition(*linearised_potential(readout, point, recording.values))
    if readout.law.is_gaussian:
        return law
    # The expansion point follows the parameters by one Newton step: a fixed point makes their posterior too narrow
    # where rates are high.
    return prior.condition(*linearised_potential(readout, law.mean, recording.values))
