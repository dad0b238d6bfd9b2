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

from pyrodyn.conditioning import find_mode, linearised_potential
from pyrodyn.distributions import GaussMarkov, NonlinearMarkov
from pyrodyn.errors import ModelError
from pyrodyn.guides.base import GlobalsOnly, GuideFactory, Start
from pyrodyn.guides.gaussian import FullRank
from pyrodyn.program import PATH_DIMS, Program, StateSpaceModel, globals_given, trial_plate
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

SMALL_GAIN = -2.0  # logit of the gain by which a path's steps are drawn towards their levels at the start


@dataclass(frozen=True)
class Structured:
    r""":math:`q(\theta)\,q(x \mid \theta)`, the path a chain that moves with the parameters.

    :math:`q(x \mid \theta) \propto p(x \mid \theta) \prod_t g_t(x_t; \theta)`. For a Gauss-Markov path under an affine
    readout :math:`g_t` is the second-order expansion of the likelihood under :math:`\theta` about a learned path: the
    exact conditional where the readout is Gaussian, whatever the learned path. For a `NonlinearMarkov` path every step
    is multiplied by a learned Gaussian potential of its own and normalised (`NonlinearMarkov.filtered`).

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
        if not isinstance(law, GaussMarkov):
            raise ModelError(
                f"the guide Structured needs a GaussMarkov or NonlinearMarkov path, and that of "
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
        parameters = globals_given(model, start.values, recording)
        prior: Any = model.latent_path(parameters, recording)
        zeros = prior.linear.new_zeros(recording.num_trials, *prior.event_shape)
        readout = model.readout_law(parameters, zeros, recording)
        if not isinstance(readout, AffineReadout):
            raise ModelError(
                f"the guide Structured needs an affine readout, got {type(readout).__name__}; use guides.MeanField()"
            )
        with torch.no_grad():
            self.point = nn.Parameter(find_mode(prior, readout, recording.values))

    def path_given(self, values: Mapping[str, Tensor], recording: Recording) -> GaussMarkov:
        model = self._model[0]
        parameters = globals_given(model, values, recording)
        readout: Any = model.readout_law(parameters, self.point, recording)
        prior: Any = model.latent_path(parameters, recording)
        law = prior.condition(*linearised_potential(readout, self.point, recording.values))
        if readout.law.is_gaussian:
            return law
        # The expansion point follows the parameters by one Newton step: a fixed point makes their posterior too narrow
        # where rates are high.
        return prior.condition(*linearised_potential(readout, law.mean, recording.values))


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
