r"""Integrate the path out, and draw it back.

Given the globals a Gauss-Markov path under an affine readout can be integrated out: exactly where the readout is
Gaussian, by a Laplace approximation where it is log-concave. What remains is a program of the globals alone, which any
engine takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyrodyn.conditioning import path_evidence, path_given
from pyrodyn.distributions import GaussMarkov
from pyrodyn.errors import CollapseError
from pyrodyn.inference.particles import particle_evidence
from pyrodyn.linalg.matrix import broadcast_shapes
from pyrodyn.program import OBSERVATION_DIMS, IntegratedModel, Program, StateSpaceModel, trial_plate
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording


def collapse(model: Program) -> Collapsed:
    """The same model with its path integrated out.

    Raises
    ------
    CollapseError
        Where the path is not Gauss-Markov or the readout not affine, by name.
    """
    if isinstance(model, Collapsed):
        return model
    if not isinstance(model, StateSpaceModel | IntegratedModel):
        raise CollapseError(
            f"{type(model).__name__} is neither a StateSpaceModel nor an IntegratedModel: it has nothing that can be "
            "integrated out"
        )
    return Collapsed(model)


def collapses(model: Program, recording: Recording) -> bool:
    """Whether `collapse` applies to this model on this recording."""
    try:
        collapse(model).check(recording)
    except CollapseError:
        return False
    return True


@dataclass(frozen=True)
class Collapsed:
    """A model whose latents are integrated out; made by `collapse`."""

    model: StateSpaceModel | IntegratedModel

    def __call__(self, recording: Recording) -> Tensor:
        parameters = self.model.sample_globals(recording)
        with trial_plate(recording):
            return pyro.sample(
                "observations",
                self.marginal(parameters, recording),
                obs=recording.observations,
                infer=OBSERVATION_DIMS,
            )

    def check(self, recording: Recording) -> None:
        """Raise `CollapseError` where the path cannot be integrated out."""
        with torch.no_grad(), torch.random.fork_rng(devices=()), poutine.block():
            self.marginal(self.model.sample_globals(recording), recording)

    def marginal(self, parameters: Any, recording: Recording) -> TorchDistribution:
        """Law of the observations given the parameters: event (time, unit), batch (*draw, trial)."""
        if isinstance(self.model, IntegratedModel):
            return Marginal(self.model, parameters, recording)
        return MarginalReadout(*self.factors(parameters, recording))

    def factors(self, parameters: Any, recording: Recording) -> tuple[GaussMarkov, AffineReadout]:
        """Prior of the path and readout at a path of zeros."""
        assert isinstance(self.model, StateSpaceModel)
        path = self.model.latent_path(parameters, recording)
        name = type(self.model).__name__
        if not isinstance(path, GaussMarkov):
            raise CollapseError(
                f"{name}: the path follows {type(path).__name__}, and only a GaussMarkov path can be integrated out; "
                "use an engine option collapse=False to sample the path"
            )
        zeros = path.linear.new_zeros(recording.num_trials, *path.event_shape)
        readout = self.model.readout_law(parameters, zeros, recording)
        if not isinstance(readout, AffineReadout):
            raise CollapseError(
                f"{name}: the readout {type(readout).__name__} is not affine in the path, so the path cannot be "
                "integrated out; use an engine option collapse=False to sample the path"
            )
        return path, readout

    def path_posterior(self, parameters: Any, recording: Recording) -> GaussMarkov:
        """p(path | observations, parameters), exact or Laplace; batch (*draw, trial)."""
        prior, readout = self.factors(parameters, recording)
        if recording.observations is None:
            return prior.expand(readout.batch_shape)
        return path_given(prior, readout, recording.observations)

    def evidence(self, parameters: Any, recording: Recording) -> Tensor:
        """log p(observations | parameters) of every trial, (*draw, trial), by the `treatment` of the latents."""
        law: Any = self.marginal(parameters, recording)
        return law.log_prob(recording.values)

    def evidence_error(self, parameters: Any, recording: Recording, particles: int) -> Tensor:
        """What to add to `evidence`, (*draw, trial), by particles from torch's random state; zero where it is exact."""
        if self.is_exact:
            return torch.zeros_like(self.evidence(parameters, recording))
        prior, readout = self.factors(parameters, recording)
        corrected, approximate = particle_evidence(prior, readout, recording.values, particles=particles)
        return corrected - approximate

    @property
    def is_exact(self) -> bool:
        """Whether `evidence` is exact but for rounding."""
        if isinstance(self.model, IntegratedModel):
            return self.model.is_exact
        return getattr(getattr(self.model, "readout", None), "is_gaussian", False)

    @property
    def treatment(self) -> str:
        """How the latents were treated, for the attributes of a posterior."""
        if isinstance(self.model, IntegratedModel):
            return self.model.treatment
        return "integrated out exactly" if self.is_exact else "integrated out by Laplace"


class Marginal(TorchDistribution):
    """Observations of an `IntegratedModel` given its parameters: event (time, unit), batch (trial)."""

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)

    def __init__(self, model: IntegratedModel, parameters: Any, recording: Recording) -> None:
        self.model, self.parameters, self.recording = model, parameters, recording
        event = torch.Size((recording.num_bins, recording.num_units))
        super().__init__(torch.Size((recording.num_trials,)), event, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.model.evidence(self.parameters, self.recording, value)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        # The plate around this site is hidden with the rest, and may not be entered twice.
        with torch.no_grad(), poutine.block(), _ForTrials(self.batch_shape):
            return self.model.trials(self.parameters, self.recording.blank())

    def expand(self, batch_shape, _instance=None) -> Marginal:
        return self  # the trials' sites know their draws themselves


class _ForTrials(Messenger):
    """Gives every site the batch shape of the trials, as their plate would."""

    def __init__(self, batch_shape: torch.Size) -> None:
        super().__init__()
        self.batch_shape = batch_shape

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = msg["fn"].expand(broadcast_shapes(msg["fn"].batch_shape, self.batch_shape))


class MarginalReadout(TorchDistribution):
    """Observations with the path integrated out: event (time, unit), batch (*draw, trial)."""

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)

    def __init__(self, prior: GaussMarkov, readout: AffineReadout) -> None:
        self.prior, self.readout = prior, readout
        batch = broadcast_shapes(prior.batch_shape, readout.batch_shape)
        super().__init__(batch, readout.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return path_evidence(self.prior, self.readout, value)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        readout = self.readout
        path = self.prior.expand(self.batch_shape).sample(sample_shape)
        noise = None if readout.noise is None else readout.noise.squeeze(-2)
        return AffineReadout(readout.law, path, readout.loading, readout.offset.squeeze(-2), noise).sample()

    def expand(self, batch_shape, _instance=None) -> MarginalReadout:
        return MarginalReadout(self.prior.expand(batch_shape), self.readout)
