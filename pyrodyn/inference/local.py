r"""What is latent in trials, given the globals: for models whose latents neither collapse nor draw themselves.

With the globals held at posterior draws, every draw and every trial is an inference of its own,
:math:`p(z_i \mid y_i, \theta)`, and all of them are one batch. Where a trial has few latent numbers, it is a Gaussian
at their mode with the curvature there; otherwise the best of a family of laws, found by maximising the evidence lower
bound. A path is given a chain as its law, other sites an independent Gaussian for every number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyrodyn.distributions import GaussianProcess, GaussMarkov, NonlinearMarkov
from pyrodyn.errors import ModelError, NonFiniteError
from pyrodyn.inference.density import Site
from pyrodyn.inference.mode import STEP, ascend, covariance_root
from pyrodyn.linalg.matrix import broadcast_shapes
from pyrodyn.program import LatentModel, StateSpaceModel, TrialModel, is_random, trial_plate
from pyrodyn.progress import progress
from pyrodyn.recording import Recording

FEW = 40  # latent numbers of a trial up to which its Hessian is computed
FLOOR = 1e-6  # least curvature kept at a mode
LAST = 20  # steps over which a bound is averaged


@dataclass(frozen=True)
class LocalInference:
    """How what is latent in trials is inferred while the globals are held.

    Parameters
    ----------
    steps : int
        Of Adam, where the law is found by its bound; of L-BFGS at most, where it stands at the mode.
    learning_rate : float
        At the start; it falls along a half cosine.
    particles : int
        Draws in every step.
    few : int
        Latent numbers of a trial, unconstrained, up to which a Gaussian at the mode is taken.
    """

    steps: int = 250
    learning_rate: float = 0.1
    particles: int = 2
    few: int = FEW

    def infer(self, model: LatentModel, parameters: Any, recording: Recording) -> LocalPosterior:
        """Infer the sites of all trials of ``recording`` for every draw of ``parameters``, each (draw, 1, *event).

        Raises
        ------
        ModelError
            Where the model does not declare the part of its program inside the trial plate.
        """
        target = LocalDensity(model, parameters, recording)
        if recording.observations is None:
            return LocalPosterior(target, Prior(target), "drawn from the prior: there are no observations")
        if target.dimension <= self.few:
            return LocalPosterior(target, AtMode(target, self.steps), "a Gaussian at the mode of each trial")
        family, treatment = _family(target)
        self._train(target, family)
        return LocalPosterior(target, family, treatment)

    def _train(self, target: LocalDensity, family: Family) -> None:
        optimiser = torch.optim.Adam(family.parameters, lr=self.learning_rate)
        with torch.enable_grad(), progress(self.steps, "latents") as bar:
            for step in range(self.steps):
                share = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
                optimiser.param_groups[0]["lr"] = self.learning_rate * (0.01 + 0.99 * share)
                optimiser.zero_grad()
                values, log_q = family.sample(self.particles)
                bound = target(values) - log_q
                # A trial that fails once keeps its law and harms no other.
                good = torch.isfinite(bound)
                (-torch.where(good, bound, 0.0).sum() / self.particles).backward()
                for parameter in family.parameters:
                    if parameter.grad is not None:
                        parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
                optimiser.step()
                bar.update()


class LocalPosterior:
    """An approximation of p(latents of trials | observations, globals), for every draw of the globals.

    Attributes
    ----------
    treatment : str
        What it is, in words.
    """

    def __init__(self, target: LocalDensity, family: Family, treatment: str) -> None:
        self.target, self.family, self.treatment = target, family, treatment

    def sample(self, draws: int = 1) -> dict[str, Tensor]:
        """Sites (draws * draw, trial, *event): so many for every draw of the globals, one draw after the other."""
        with torch.no_grad():
            values, _ = self.family.sample(draws)
        return {name: value.transpose(0, 1).flatten(0, 1) for name, value in values.items()}

    def log_evidence(self, draws: int = 100) -> tuple[Tensor, Tensor]:
        r"""Two lower bounds of log p(y | globals) of every draw and trial, (draw, trial).

        The mean of :math:`\log p(y, z \mid \theta) / q(z)` over ``draws``, and the log of the mean of its exponential:
        tighter, and exact in the limit of many draws.

        References
        ----------
        Burda, Grosse & Salakhutdinov, ICLR 2016.
        """
        with torch.no_grad():
            values, log_q = self.family.sample(draws)
            weights = self.target(values) - log_q
        return weights.mean(0), weights.logsumexp(0) - math.log(draws)


class LocalDensity:
    """Log joint density of the sites of trials and the observations, given the globals.

    ``density(values)`` takes sites (*sample, draw, trial, *event) and returns (*sample, draw, trial).
    """

    def __init__(self, model: LatentModel, parameters: Any, recording: Recording) -> None:
        if not isinstance(model, TrialModel):
            raise ModelError(
                f"{type(model).__name__} must say by a method trials(parameters, recording) what it samples inside the "
                "trial plate, so that latents can be inferred with the globals held"
            )
        self.model, self.parameters, self.recording = model, parameters, recording
        with torch.no_grad(), torch.random.fork_rng(devices=()), poutine.block():
            nodes: Any = poutine.trace(self._program).get_trace().nodes
        sites, start = [], 0
        self.batch = torch.Size()
        for name, node in nodes.items():
            if not is_random(node):
                continue
            lead = len(node["fn"].batch_shape)
            self.batch = broadcast_shapes(self.batch, node["fn"].batch_shape)
            if node["is_observed"] or name == "observations":
                continue
            transform = biject_to(node["fn"].support)
            raw: Any = transform.inv(node["value"])
            stop = start + raw.shape[lead:].numel()
            sites.append(Site(name, True, node["value"].shape[lead:], raw.shape[lead:], transform, slice(start, stop)))
            start = stop
        self.sites, self.dimension = tuple(sites), start

    def _program(self) -> Tensor:
        with trial_plate(self.recording):
            return self.model.trials(self.parameters, self.recording)

    def prior(self, samples: int) -> dict[str, Tensor]:
        """Draws of the sites from their prior, (samples, draw, trial, *event)."""
        with torch.no_grad(), poutine.block(), pyro.plate("sample", samples, dim=-1 - len(self.batch)):
            nodes: Any = poutine.trace(self._program).get_trace().nodes
        return {site.name: nodes[site.name]["value"].expand(samples, *self.batch, *site.shape) for site in self.sites}

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        with poutine.block():
            trace = poutine.trace(poutine.condition(self._program, data=dict(values))).get_trace()
            trace.compute_log_prob()
        nodes: Any = trace.nodes
        return sum(node["log_prob"] for node in nodes.values() if is_random(node))  # type: ignore[return-value]

    def constrain(self, vector: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Sites of vectors (*sample, draw, trial, dimension), and the log Jacobian (*sample, draw, trial)."""
        values, jacobian = {}, vector.new_zeros(vector.shape[:-1])
        for site in self.sites:
            raw = vector[..., site.place].reshape(vector.shape[:-1] + site.unconstrained)
            values[site.name] = value = site.transform(raw)
            term: Any = site.transform.log_abs_det_jacobian(raw, value)
            jacobian = jacobian + term.reshape(*jacobian.shape, -1).sum(-1)
        return values, jacobian

    def gradient(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Log density (*sample, draw, trial) and gradient in unconstrained coordinates; -inf and 0 where it fails."""
        vector = vector.detach().requires_grad_()
        with torch.enable_grad():
            values, jacobian = self.constrain(vector)
            value = self(values) + jacobian
            (slope,) = torch.autograd.grad(value.sum(), vector)
        bad = ~(torch.isfinite(value) & torch.isfinite(slope).all(-1))
        return torch.where(bad, -torch.inf, value.detach()), torch.where(bad.unsqueeze(-1), 0.0, slope)

    def culprit(self, vector: Tensor) -> str:
        """Which of the sites is to blame, for an error message."""
        del vector
        return "observations"


class Family(ABC):
    """A law of the sites of trials for every draw of the globals and every trial."""

    parameters: tuple[Tensor, ...] = ()

    @abstractmethod
    def sample(self, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        """Sites (samples, draw, trial, *event), reparametrised, and their log density (samples, draw, trial)."""


class Prior(Family):
    """Where nothing was observed."""

    def __init__(self, target: LocalDensity) -> None:
        self.target = target

    def sample(self, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        values = self.target.prior(samples)
        return values, torch.full((samples, *self.target.batch), torch.nan, dtype=torch.float64)


class AtMode(Family):
    """A Gaussian in unconstrained coordinates at the mode of each trial, with the curvature there."""

    def __init__(self, target: LocalDensity, max_steps: int) -> None:
        self.target = target
        start = self._start()
        self.mode, _ = ascend(target, start, max_steps, "latents")  # type: ignore[arg-type]
        self.root, _ = covariance_root(self._negative_hessian(), FLOOR)

    def _start(self) -> Tensor:
        """The best of zero and some draws of the prior, trial by trial."""
        target = self.target
        drawn = target.prior(8)
        raw = [site.transform.inv(drawn[site.name]).reshape(8, *target.batch, -1) for site in target.sites]
        starts = torch.cat([torch.cat(raw, -1), torch.zeros(1, *target.batch, target.dimension)])
        value, _ = target.gradient(starts)
        if not bool(torch.isfinite(value).any(0).all()):
            raise NonFiniteError(
                "the latents of some trial have no finite density at any of nine starts; look at the recording with "
                "model.check(recording)"
            )
        best = value.argmax(0)[None, ..., None].expand(1, *starts.shape[1:])
        return starts.gather(0, best).squeeze(0)

    def _negative_hessian(self) -> Tensor:
        columns = []
        for i in range(self.target.dimension):
            step = torch.zeros(self.target.dimension, dtype=torch.float64)
            step[i] = STEP
            _, slopes = self.target.gradient(torch.stack([self.mode + step, self.mode - step]))
            columns.append((slopes[1] - slopes[0]) / (2.0 * STEP))
        hessian = torch.stack(columns, -2)
        return 0.5 * (hessian + hessian.mT)

    def sample(self, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        noise = torch.randn(samples, *self.mode.shape, dtype=torch.float64)
        values, jacobian = self.target.constrain(self.mode + (self.root @ noise.unsqueeze(-1)).squeeze(-1))
        volume = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * noise.shape[-1] * math.log(2.0 * math.pi)
        return values, -0.5 * noise.square().sum(-1) - volume - jacobian


class Independent(Family):
    """An independent Gaussian for every unconstrained number."""

    def __init__(self, target: LocalDensity) -> None:
        self.target = target
        shape = (*target.batch, target.dimension)
        self.level = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        self.log_sd = torch.full(shape, -1.0, dtype=torch.float64, requires_grad=True)
        self.parameters = (self.level, self.log_sd)

    def sample(self, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        noise = torch.randn(samples, *self.level.shape, dtype=torch.float64)
        values, jacobian = self.target.constrain(self.level + self.log_sd.exp() * noise)
        size = 0.5 * noise.shape[-1] * math.log(2.0 * math.pi)
        return values, -0.5 * noise.square().sum(-1) - self.log_sd.sum(-1) - size - jacobian


class Chain(Family):
    """A path's own law, multiplied by a Gaussian potential in every bin.

    A Gaussian path is multiplied by all at once, any other step by step (`NonlinearMarkov.pulled`).
    """

    def __init__(self, target: LocalDensity) -> None:
        law = _path_law(target)
        assert law is not None
        self.law = law
        size = (*target.batch, *law.event_shape)
        self.level = torch.zeros(size, dtype=torch.float64, requires_grad=True)
        self.weight = torch.full(size, -2.0, dtype=torch.float64, requires_grad=True)
        self.parameters = (self.level, self.weight)

    def sample(self, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        weight = self.weight.exp()
        if isinstance(self.law, GaussMarkov):
            guide = self.law.condition(torch.diag_embed(weight), weight * self.level)
        elif isinstance(self.law, GaussianProcess):
            guide = self.law.condition(weight, weight * self.level)
        else:
            guide = self.law.pulled(weight, self.level)
        path = guide.expand(self.level.shape[:-2]).rsample((samples,))
        return {"latent": path}, guide.log_prob(path)


def _family(target: LocalDensity) -> tuple[Family, str]:
    if _path_law(target) is None:
        return Independent(target), "independent Gaussians, by the bound of each trial"
    return Chain(target), "a chain for each path, by the bound of each trial"


def _path_law(target: LocalDensity) -> GaussMarkov | GaussianProcess | NonlinearMarkov | None:
    if not isinstance(target.model, StateSpaceModel):
        return None
    law = target.model.latent_path(target.parameters, target.recording)
    return law if isinstance(law, GaussMarkov | GaussianProcess | NonlinearMarkov) else None
