"""A program's log joint density as a function of one unconstrained vector, batched over draws."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyrodyn.errors import ModelError
from pyrodyn.program import Program, is_random, log_joint, log_terms
from pyrodyn.recording import Recording


class Site(NamedTuple):
    """Where a latent site stands in the vector."""

    name: str
    local: bool  # inside the trial plate
    shape: torch.Size  # constrained, with the trial axis if local
    unconstrained: torch.Size
    transform: Transform
    place: slice


class LogDensity:
    r"""Log joint density :math:`\log p(y, z)` of a program in unconstrained coordinates, Jacobian included.

    Parameters
    ----------
    program : Program
    recording : Recording
    observations : Tensor, (replicate, 1, trial, time, unit), optional
        Replicates of an experiment, in place of the recording's observations: each has a density of its own, and their
        vectors are (replicate, draw, dimension).
    weights : Tensor, (replicate, 1, trial), optional
        What each trial's log likelihood is multiplied by: zeros leave trials out, so that refits of a cross-validation
        are replicates, too. The program's only sites inside the trial plate are then its observations.

    Notes
    -----
    ``density(vector)`` takes (*draw, dimension) and returns (*draw): any number of draws is one trace of the program.
    """

    def __init__(
        self,
        program: Program,
        recording: Recording,
        observations: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        self.plain, self.observations, self.weights, self.recording = program, observations, weights, recording
        self.program: Any = program
        if observations is not None:
            self.program = poutine.condition(program, data={"observations": observations})
        with torch.random.fork_rng(devices=()), torch.no_grad():
            trace = poutine.trace(self.program).get_trace(recording)
        sites, parts, start = [], [], 0
        for name, node in trace.nodes.items():
            if not is_random(node) or node["is_observed"]:
                continue
            transform = biject_to(node["fn"].support)
            value: Any = node["value"]
            raw: Any = transform.inv(value)
            stop = start + raw.numel()
            local = bool(node["cond_indep_stack"])
            sites.append(Site(name, local, value.shape, raw.shape, transform, slice(start, stop)))
            start = stop
            parts.append(raw.reshape(-1))
        self.sites = tuple(sites)
        if weights is not None and any(site.local for site in sites):
            raise ModelError(
                "weights of trials need a program without a path of its own, since a trial that counts for nothing "
                "leaves its path no law; integrate the path out: inference.collapse(model)"
            )
        self.dimension = start
        self.prototype = (
            torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=recording.device)
        )  # one draw from the prior

    def among(self, replicates: Tensor) -> LogDensity:
        """The density of some of the replicates, by their positions."""
        chosen = copy.copy(self)
        if self.weights is not None:
            chosen.weights = self.weights[replicates]
        if self.observations is not None:
            chosen.observations = self.observations[replicates]
            chosen.program = poutine.condition(self.plain, data={"observations": chosen.observations})
        return chosen

    def constrain(self, vector: Tensor) -> dict[str, Tensor]:
        """Site values (*draw, 1, *event) or (*draw, trial, *event) of an unconstrained vector (*draw, dimension)."""
        return {site.name: self._value(site, vector)[0] for site in self.sites}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The vector (*draw, dimension) of constrained values that keep the broadcast rule, or carry no draws."""
        parts = []
        for site in self.sites:
            value = site.transform.inv(values[site.name])
            extra = value.dim() - len(site.unconstrained)
            draws = value.shape[:extra]
            if not site.local and extra:
                draws = draws[:-1]  # the singleton of the trial plate
            parts.append(value.reshape(draws + (site.unconstrained.numel(),)))
        return torch.cat(parts, -1)

    def __call__(self, vector: Tensor) -> Tensor:
        values, jacobian = {}, torch.zeros(vector.shape[:-1], dtype=vector.dtype, device=vector.device)
        for site in self.sites:
            values[site.name], term = self._value(site, vector)
            jacobian = jacobian + term
        if self.weights is None:
            return log_joint(self.program, values, self.recording) + jacobian
        shared, of_trials = log_terms(self.program, values, self.recording)
        return shared + (self.weights * of_trials).sum(-1) + jacobian

    def _value(self, site: Site, vector: Tensor) -> tuple[Tensor, Tensor]:
        draws = vector.shape[:-1]
        lead = draws if site.local or not draws else (*draws, 1)
        raw = vector[..., site.place].reshape((*lead, *site.unconstrained))
        value: Any = site.transform(raw)
        term = site.transform.log_abs_det_jacobian(raw, value)
        return value, term.reshape(*draws, -1).sum(-1)

    def log_jacobian(self, vector: Tensor) -> Tensor:
        """Log Jacobian determinant of `constrain`, (*draw)."""
        return sum((self._value(site, vector)[1] for site in self.sites), start=vector.new_zeros(vector.shape[:-1]))

    def gradient(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Log density (*draw) and its gradient (*draw, dimension); a failed element is -inf with a zero gradient."""
        vector = vector.detach().requires_grad_()
        with torch.enable_grad(), pyro.validation_enabled(False):
            value = self(vector)
            (slope,) = torch.autograd.grad(value.sum(), vector)
        bad = ~(torch.isfinite(value) & torch.isfinite(slope).all(-1))
        return (
            torch.where(bad, -torch.inf, value.detach()),
            torch.where(bad.unsqueeze(-1), 0.0, slope),
        )

    def culprit(self, vector: Tensor) -> str:
        """The first site of the program that is not finite at ``vector``."""
        with torch.no_grad(), pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(self.program, data=self.constrain(vector))).get_trace(
                self.recording
            )
            trace.compute_log_prob()
        nodes: Any = trace.nodes
        for name, site in nodes.items():
            if is_random(site) and not (_finite(site["value"]) and _finite(site["log_prob"])):
                return name
        return "none, but the gradient is not finite"


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
