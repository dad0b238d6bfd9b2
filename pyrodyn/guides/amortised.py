r"""Trials read by a network that all of them share: :math:`q(\theta) \prod_i q_\phi(z_i \mid y_i, \theta)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import biject_to

from pyrodyn.distributions import GaussianProcess, GaussMarkov, NonlinearMarkov
from pyrodyn.errors import ModelError
from pyrodyn.guides.base import GlobalsOnly, GuideFactory, Start
from pyrodyn.guides.gaussian import PointEstimate
from pyrodyn.networks.recognition import Encoder, Head
from pyrodyn.program import (
    PATH_DIMS,
    IntegratedModel,
    LatentModel,
    Program,
    Recognised,
    StateSpaceModel,
    globals_given,
    is_random,
    trial_plate,
)
from pyrodyn.recording import Recording

SMALL = -2.0  # log of the gain or of the sd at which recognition starts: near the prior, or near a point


@dataclass(frozen=True)
class Amortised:
    r"""Globals by any guide; what is latent in a trial by a recognition network that reads the trial.

    A model may bring its own recognition network (`pyrodyn.program.Recognised`). For a path it is otherwise a network
    that reads the recording forwards and backwards and gives a Gaussian potential in every bin, by which the path's law
    given the globals is multiplied; for other sites it is an independent Gaussian for every number.

    Because no parameter belongs to one trial, training can take some trials at a time, and new trials need no training.

    Parameters
    ----------
    weights : GuideFactory
        For the globals: a `PointEstimate` by default, as is usual for large networks; `MeanField` or `LowRank` for a
        posterior of the weights.
    hidden_dim : int
        Units of the recognition network in each direction.

    References
    ----------
    Kingma & Welling, ICLR 2014; Johnson, Duvenaud, Wiltschko, Datta & Adams, NIPS 2016 (potentials from a network).
    """

    treatment: ClassVar[str] = "sampled by a recognition network"

    weights: GuideFactory = field(default_factory=PointEstimate)
    hidden_dim: int = 64

    @property
    def posterior_of_globals(self) -> str:
        """What the globals' own guide is, in words."""
        return getattr(self.weights, "posterior_of_globals", "a guide of the user's own")

    def __call__(self, program: Program, recording: Recording, start: Start) -> nn.Module:
        return AmortisedGuide(program, recording, self, start)


class AmortisedGuide(PyroModule):
    """The module built by `Amortised`: ``globals`` guides the globals, ``recognition`` reads the trials."""

    def __init__(self, model: Program, recording: Recording, options: Amortised, start: Start) -> None:
        super().__init__()
        if not isinstance(model, LatentModel):
            raise ModelError(f"the guide Amortised needs a LatentModel, got {type(model).__name__}")
        self._model = (model,)  # in a tuple: a model is not a submodule, and has no parameters to train
        self.globals = options.weights(GlobalsOnly(model), recording, start)
        if isinstance(model, Recognised):
            self.recognition = model.recognition(recording, options.hidden_dim)
        elif isinstance(model, StateSpaceModel):
            self.recognition = PathRecognition(model, recording, options.hidden_dim)
        else:
            self.recognition = SiteRecognition(model, recording, options.hidden_dim)

    def forward(self, recording: Recording) -> dict[str, Tensor]:
        values = dict(self.globals(recording))
        return values | self.local_given(values, recording)

    def local_given(self, values: Mapping[str, Tensor], recording: Recording) -> dict[str, Tensor]:
        """Sample the sites of trials given values of the globals' sites."""
        parameters = globals_given(self._model[0], values, recording)
        with trial_plate(recording):
            return self.recognition(parameters, recording)


class PathRecognition(nn.Module):
    r"""The path's law times Gaussian potentials that an `Encoder` gives, bin by bin.

    A `GaussMarkov` path is multiplied by potentials with a full precision matrix, a `GaussianProcess` by diagonal ones;
    a `NonlinearMarkov` path step by step (`pulled`). The potentials are read off the encoder's states and off the
    observations of the bin themselves: in a linear model the potentials' means are linear in these.
    """

    def __init__(self, model: StateSpaceModel, recording: Recording, hidden_dim: int) -> None:
        super().__init__()
        law = _path_law(model, recording)
        if not isinstance(law, GaussMarkov | GaussianProcess | NonlinearMarkov):
            raise ModelError(
                f"the guide Amortised has no recognition network for a path that is {type(law).__name__}; give "
                f"{type(model).__name__} a method recognition(recording, hidden_dim)"
            )
        self._model = (model,)
        latent = law.event_shape[-1]
        self.encoder = Encoder(recording, hidden_dim)
        read = 2 * hidden_dim + self.encoder.num_features
        self.level = Head(read, latent)
        self.log_weight = Head(read, latent, SMALL)
        self.lower = Head(read, latent * (latent - 1) // 2) if isinstance(law, GaussMarkov) and latent > 1 else None

    def forward(self, parameters: Any, recording: Recording) -> dict[str, Tensor]:
        law = self.law(parameters, recording)
        return {"latent": pyro.sample("latent", law, infer=PATH_DIMS)}

    def law(self, parameters: Any, recording: Recording) -> Any:
        """q(path | globals, recording)."""
        prior = self._model[0].latent_path(parameters, recording)
        encoded = self.encoder(recording)
        read = torch.cat([encoded.states, encoded.features], -1)
        level, weight = self.level(read).transpose(0, 1), self.log_weight(read).transpose(0, 1).exp()
        if isinstance(prior, NonlinearMarkov):
            return prior.pulled(weight, level)
        if isinstance(prior, GaussianProcess):
            return prior.condition(weight, weight * level)
        root = torch.diag_embed(weight.sqrt())
        if self.lower is not None:
            root = root + _strictly_lower(self.lower(read).transpose(0, 1), root.shape[-1])
        precision = root @ root.mT
        return prior.condition(precision, (precision @ level.unsqueeze(-1)).squeeze(-1))


class SiteRecognition(nn.Module):
    """An independent Gaussian for every unconstrained number of every site of a trial.

    Sites whose first event dim is time, as their ``infer`` says, are read off bin by bin, others off the whole trial.
    """

    def __init__(self, model: LatentModel, recording: Recording, hidden_dim: int) -> None:
        super().__init__()
        self.encoder = Encoder(recording, hidden_dim)
        self.level, self.log_sd = nn.ModuleDict(), nn.ModuleDict()
        self._sites = _local_sites(model, recording)
        for name, site in self._sites.items():
            self.level[name] = Head(2 * hidden_dim, site.shape.numel())
            self.log_sd[name] = Head(2 * hidden_dim, site.shape.numel(), SMALL)

    def forward(self, parameters: Any, recording: Recording) -> dict[str, Tensor]:
        del parameters  # what they have to do with a trial's latents stands in the trial's own observations
        encoded = self.encoder(recording)
        found = {}
        for name, site in self._sites.items():
            states = encoded.states.transpose(0, 1) if site.over_time else encoded.summary
            level, sd = self.level[name](states), self.log_sd[name](states).exp()
            level, sd = (
                part.unflatten(-1, site.shape) if len(site.shape) else part.squeeze(-1) for part in (level, sd)
            )
            law = dist.TransformedDistribution(  # type: ignore[attr-defined]
                dist.Normal(level, sd).to_event(level.dim() - 1), [site.transform]
            )
            found[name] = pyro.sample(name, law, infer=site.infer)
        return found


class _Site(NamedTuple):
    """What is known of a local site before any recording is seen."""

    transform: Any
    over_time: bool
    shape: torch.Size  # of the unconstrained event, its time axis left out
    infer: Any


def _strictly_lower(entries: Tensor, size: int) -> Tensor:
    """Matrices (*batch, size, size) with ``entries`` (*batch, size (size - 1) / 2) below a diagonal of zeros."""
    rows, columns = torch.tril_indices(size, size, -1)
    flat = entries.new_zeros(*entries.shape[:-1], size * size)
    return flat.index_copy(-1, rows * size + columns, entries).unflatten(-1, (size, size))


def recognised(model: Program, recording: Recording) -> bool:
    """Whether there is a recognition network for what is latent in trials: the model's own, or that of its path."""
    if isinstance(model, IntegratedModel) or not isinstance(model, LatentModel):
        return False
    if isinstance(model, StateSpaceModel) and not isinstance(model, Recognised):
        return isinstance(_path_law(model, recording), GaussMarkov | GaussianProcess | NonlinearMarkov)
    return bool(_local_sites(model, recording))


def _path_law(model: StateSpaceModel, recording: Recording) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=()), poutine.block():
        return model.latent_path(model.sample_globals(recording), recording)


def _local_sites(model: LatentModel, recording: Recording) -> dict[str, _Site]:
    """The latent sites inside the trial plate, as one draw of the program has them."""
    with torch.no_grad(), torch.random.fork_rng(devices=()), poutine.block():
        trace = poutine.trace(model).get_trace(recording)
    nodes: Any = trace.nodes
    found = {}
    for name, site in nodes.items():
        if is_random(site) and not site["is_observed"] and site["cond_indep_stack"]:
            transform = biject_to(site["fn"].support)
            event: Any = transform.inv(site["value"]).shape[1:]  # type: ignore[union-attr]
            over_time = site["infer"].get("event_dims", ("",))[0] == "time"
            found[name] = _Site(transform, over_time, event[1:] if over_time else event, site["infer"])
    return found
