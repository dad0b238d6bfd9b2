"""The contract that every model keeps and every engine relies on.

A model is a generative program: called on a recording it samples its globals, then for every trial a path and the
observations, conditioning on those the recording holds. It never fits itself and holds no data.

**The broadcast rule.** A global may carry any number of draw dimensions on the left, and then a dimension of size one
where the trial plate stands: ``(*draw, 1, *event)``. A local of a trial is ``(*draw, trial, *event)``. So particles,
chains, posterior draws and replicates of a calibration are scored by one batched call.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, final, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyrodyn.errors import ModelError
from pyrodyn.recording import Recording

# Pyro passes these keys through; its own annotation of ``infer`` does not know them.
PATH_DIMS: Any = {"event_dims": ("time", "latent")}
OBSERVATION_DIMS: Any = {"event_dims": ("time", "unit")}


class Program(Protocol):
    """Samples the observations where there are none, conditions on them where there are."""

    def __call__(self, recording: Recording) -> Tensor: ...


Labelled = dict[str, tuple[tuple[str, ...], Tensor]]  # name -> (event dims, value (*draw, 1, *event) or (*event))
Values = dict[str, Tensor]  # of the program's global sites


class LatentModel(ABC):
    """A program with global parameters and, for every trial, something latent.

    Subclasses are frozen dataclasses of options; what they declare is all that engines know of them.

    Attributes
    ----------
    trials_independent : bool
        Whether trials are independent given the globals, as they are unless something drifts from trial to trial.
        Leaving trials out of a comparison relies on it.
    """

    trials_independent: ClassVar[bool] = True

    @abstractmethod
    def check(self, recording: Recording) -> None:
        """Raise an error that says what to do where the options do not fit the recording."""

    @abstractmethod
    def sample_globals(self, recording: Recording) -> Any:
        """Place the priors; returns a NamedTuple of parameters, each ``(*draw, 1, *event)`` or ``(*event)``."""

    @abstractmethod
    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        """Where to start: one constrained value for every global site."""

    @abstractmethod
    def label(self, parameters: Any) -> Labelled:
        """The parameters by name and dims: the variables of the posterior."""

    @abstractmethod
    def unlabel(self, values: Mapping[str, Tensor]) -> Any:
        """The parameters back from the variables of a posterior; the inverse of `label`."""

    @abstractmethod
    def invariants(self, parameters: Any) -> Labelled:
        """Quantities that the model's symmetries leave alone: what diagnostics and calibration look at."""

    @abstractmethod
    def transformed(self, parameters: Any, recording: Recording, seed: int) -> Any:
        """The parameters after a random element of the symmetry group, so that the claim can be tested."""

    def log_copies(self, recording: Recording) -> float:
        """Log of the number of posterior modes that discrete symmetries make equal.

        An evidence computed from the neighbourhood of one mode lacks so much: log K! for K modes of a switching system
        whose labels may be exchanged, zero where the gauge leaves no choice.
        """
        del recording
        return 0.0

    def nearest_copy(
        self, values: Mapping[str, Tensor], reference: Mapping[str, Tensor], recording: Recording
    ) -> dict[str, Tensor]:
        """Of the copies that `log_copies` counts, the one nearest to ``reference``; both are values of global sites.

        ``values`` are (*draw, 1, *event). A model whose draws stay near one copy may leave them as they are.
        """
        del reference, recording
        return dict(values)

    def coordinates(self, recording: Recording) -> dict[str, Any]:
        """Names along the dims of `label` and `invariants` that the recording does not have: as xarray takes them."""
        del recording
        return {}

    def attributes(self, recording: Recording) -> dict[str, Any]:
        """Plain numbers and strings about the priors, for the attributes of the group ``posterior``."""
        del recording
        return {}

    def latents(self, parameters: Any, local: Mapping[str, Tensor], recording: Recording) -> Labelled:
        """What to show of ``local``, drawn values of the sites of trials, each (*draw, trial, *event).

        Dims begin with trial and time, values are (*draw, trial, time, ...). A path of whole numbers is named for the
        dim it runs over, such as ``mode_path`` for the dim ``mode``, and that dim has coordinates: over draws its mean
        is then ``mode_probability`` (trial, time, mode).
        """
        del parameters, local, recording
        return {}

    def expected(self, parameters: Any, local: Mapping[str, Tensor], recording: Recording) -> Tensor:
        """Expected observations given ``local``, (*draw, trial, time, unit)."""
        raise ModelError(f"{type(self).__name__} does not say what observations it expects")

    @abstractmethod
    def forward(self, recording: Recording) -> Tensor:
        """The generative program."""

    @final
    def __call__(self, recording: Recording) -> Tensor:
        return self.forward(recording)


class TrialModel(LatentModel):
    """Globals, and trials that are alike given the globals: their latents are sites of any kind."""

    @abstractmethod
    def trials(self, parameters: Any, recording: Recording) -> Tensor:
        """The part of the program inside the trial plate; returns the observations."""

    @final
    def forward(self, recording: Recording) -> Tensor:
        parameters = self.sample_globals(recording)
        with trial_plate(recording):
            return self.trials(parameters, recording)


class StateSpaceModel(TrialModel):
    """Globals, a latent path in every trial, and a readout of it."""

    @abstractmethod
    def latent_path(self, parameters: Any, recording: Recording) -> TorchDistribution:
        """Law of the path: event (time, latent), batch (*draw, trial) or (*draw, 1)."""

    @abstractmethod
    def readout_law(self, parameters: Any, path: Tensor, recording: Recording) -> TorchDistribution:
        """Law of the observations: event (time, unit), batch (*draw, trial)."""

    def latents(self, parameters: Any, local: Mapping[str, Tensor], recording: Recording) -> Labelled:
        del parameters, recording
        return {"path": (("trial", "time", "latent"), local["latent"])}

    def expected(self, parameters: Any, local: Mapping[str, Tensor], recording: Recording) -> Tensor:
        law: Any = self.readout_law(parameters, local["latent"], recording)
        return law.mean

    @final
    def trials(self, parameters: Any, recording: Recording) -> Tensor:
        """The part of the program inside the trial plate; returns the observations."""
        path = pyro.sample("latent", self.latent_path(parameters, recording), infer=PATH_DIMS)
        return pyro.sample(
            "observations",
            self.readout_law(parameters, path, recording),
            obs=recording.observations,
            infer=OBSERVATION_DIMS,
        )


class IntegratedModel(TrialModel):
    """Globals, and trials whose latents the model sums or integrates out by itself, as a hidden Markov model does."""

    @property
    @abstractmethod
    def treatment(self) -> str:
        """How `evidence` treats what is latent, in words, for the attributes of a posterior: "summed out exactly"."""

    @property
    def is_exact(self) -> bool:
        """Whether `evidence` is exact but for rounding."""
        return True

    @abstractmethod
    def evidence(self, parameters: Any, recording: Recording, observations: Tensor) -> Tensor:
        """log p(observations | parameters) of every trial, (*draw, trial); differentiable in the parameters."""

    @abstractmethod
    def draw_local(self, parameters: Any, recording: Recording) -> dict[str, Tensor]:
        """The sites of the trials, each (*draw, trial, *event), drawn given observations and parameters."""


@runtime_checkable
class Recognised(Protocol):
    """A model that brings a network to read trials with, for `pyrodyn.guides.Amortised`."""

    def recognition(self, recording: Recording, hidden_dim: int) -> nn.Module:
        """A module that samples the sites of the trials, called inside the trial plate with (parameters, recording).

        It returns them by name. What it keeps of ``recording`` is what every other recording has, too: no trials.
        """
        ...


@runtime_checkable
class DrawsLocal(Protocol):
    """A model that draws the sites of its trials by itself, given observations and parameters."""

    def draw_local(self, parameters: Any, recording: Recording) -> dict[str, Tensor]:
        """The sites of the trials, each (*draw, trial, *event)."""
        ...


def trial_plate(recording: Recording) -> pyro.plate:
    """The one plate of the zoo; it is the rightmost batch dimension."""
    return pyro.plate("trial", recording.num_trials, dim=-1)


def globals_given(model: LatentModel, values: Mapping[str, Tensor], recording: Recording) -> Any:
    """The parameters that a model builds when its global sites take ``values`` (*draw, 1, *event)."""
    with poutine.block(), poutine.condition(data=dict(values)):
        return model.sample_globals(recording)


def draws_of(parameters: Any, which: Any) -> Any:
    """Parameters (draw, 1, *event) at some of their draws: a slice, or positions that may be named more than once."""
    return parameters._make(None if part is None else part[which] for part in parameters)


def global_laws(model: LatentModel, recording: Recording) -> dict[str, Any]:
    """The prior of every global site, by name."""
    with poutine.block(), torch.no_grad():
        trace = poutine.trace(model.sample_globals).get_trace(recording)
    return {name: site["fn"] for name, site in trace.nodes.items() if is_random(site)}


def log_terms(program: Program, values: Mapping[str, Tensor], recording: Recording) -> tuple[Tensor, Tensor]:
    """Log density of a program at ``values`` of its latent sites, split in two.

    Returns what belongs to the globals, (*draw), and what belongs to each trial, (*draw, trial). ``values`` keep the
    broadcast rule; draw dimensions are recognised by the trial dimension that follows them.
    """
    trace = poutine.trace(poutine.condition(program, data=dict(values))).get_trace(recording)
    trace.compute_log_prob()
    shared: Tensor = torch.zeros((), dtype=torch.float64)
    of_trials: Tensor = torch.zeros(recording.num_trials, dtype=torch.float64)
    for site in trace.nodes.values():
        if not is_random(site):
            continue
        term = site["log_prob"]
        if site["cond_indep_stack"]:
            of_trials = of_trials + term
        else:
            shared = shared + (term.squeeze(-1) if term.dim() else term)
    return shared, of_trials


def log_joint(program: Program, values: Mapping[str, Tensor], recording: Recording) -> Tensor:
    """Log joint density of a program at ``values`` of its latent sites, (*draw); see `log_terms`."""
    shared, of_trials = log_terms(program, values, recording)
    return shared + of_trials.sum(-1)


def is_random(site: Mapping[str, Any]) -> bool:
    """Whether a node of a Pyro trace is a random variable, not a plate."""
    return site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"


def specification(options: Any) -> Any:
    """A frozen dataclass of options as plain JSON: its class name and its fields."""
    if dataclasses.is_dataclass(options) and not isinstance(options, type):
        fields = {f.name: specification(getattr(options, f.name)) for f in dataclasses.fields(options)}
        return {"class": type(options).__name__, **fields}
    if isinstance(options, Mapping):
        return {str(key): specification(value) for key, value in options.items()}
    if isinstance(options, (list, tuple)):
        return [specification(value) for value in options]
    return options
