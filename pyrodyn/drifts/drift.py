"""What every drift declares, and what those that hold an affine part have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.program import Labelled

AFFINE_SD = 1.0  # prior sd of the affine part's weights, in units of the pace


class DriftParameters(NamedTuple):
    """Global parameters of a drift, each (*draw, 1, *event) or (*event)."""

    weights: Tensor  # (feature, latent), a second
    length_scale: Tensor | None = None  # ()
    amplitude: Tensor | None = None  # (), a second
    hidden_weights: Tensor | None = None  # (hidden, latent)
    hidden_biases: Tensor | None = None  # (hidden)
    deep_weights: Tensor | None = None  # (layer, hidden, hidden_from)
    deep_biases: Tensor | None = None  # (layer, hidden)


class Drift(ABC):
    """The right-hand side of a differential equation.

    Attributes
    ----------
    prior_sites : names of the sites that only the prior of the weights depends on
    feature_sites : names of the sites that the features depend on
    """

    prior_sites: ClassVar[tuple[str, ...]] = ()
    feature_sites: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def check(self, latent_dim: int) -> None:
        """Raise `ModelError` where the options do not suit this dimension."""

    @abstractmethod
    def num_features(self, latent_dim: int) -> int:
        """Number of features, the affine ones included."""

    @abstractmethod
    def sample_features(self, latent_dim: int, pace: float) -> DriftParameters:
        """Place the priors of what the features depend on; the weights are left empty."""

    @abstractmethod
    def features(self, parameters: DriftParameters, state: Tensor) -> Tensor:
        r""":math:`\psi`, (*draw, trial, point, feature) of states (*draw, trial, point, latent)."""

    @abstractmethod
    def prior_sd(self, parameters: DriftParameters, latent_dim: int, pace: float) -> Tensor:
        """Prior standard deviations of the weights, (*draw, 1, feature) or (feature)."""

    @abstractmethod
    def initial_features(self, latent_dim: int, pace: float) -> dict[str, Tensor]:
        """Where the sites of the features start."""

    @abstractmethod
    def labelled(self, parameters: DriftParameters) -> Labelled:
        """The parameters of the features by name and dims."""

    @abstractmethod
    def unlabelled(self, values: Mapping[str, Tensor]) -> DriftParameters:
        """The parameters from a posterior's variables; the inverse of `labelled`."""

    @abstractmethod
    def turned(self, parameters: DriftParameters, turn: Tensor) -> DriftParameters:
        """The same drift where the state is ``turn @ state``, for a signed permutation ``turn`` (latent, latent)."""

    def sample(self, latent_dim: int, pace: float) -> DriftParameters:
        """Place the priors; ``pace`` is a time in seconds."""
        parameters = self.sample_features(latent_dim, pace)
        shape = (self.num_features(latent_dim), latent_dim)
        standard = dist.Normal(torch.zeros(shape, dtype=torch.float64), 1.0).to_event(2)
        weights = pyro.sample("drift_weights", standard)
        return parameters._replace(weights=self.prior_sd(parameters, latent_dim, pace).unsqueeze(-1) * weights)

    def initial_values(self, latent_dim: int, pace: float, slope: Tensor, level: Tensor) -> dict[str, Tensor]:
        """Values of the sites for the drift ``slope @ state + level``."""
        weights = torch.zeros(self.num_features(latent_dim), latent_dim, dtype=torch.float64)
        weights[0] = level * pace / AFFINE_SD
        weights[1 : latent_dim + 1] = slope.mT * pace / AFFINE_SD
        return {"drift_weights": weights, **self.initial_features(latent_dim, pace)}

    def __call__(self, parameters: DriftParameters, state: Tensor) -> Tensor:
        """f, (*draw, trial, point, latent)."""
        return self.features(parameters, state) @ parameters.weights

    def field(self, parameters: DriftParameters) -> Callable[[Tensor], Tensor]:
        """f as a function of states (*draw, point, latent)."""
        held = lifted(parameters)
        return _Field(lambda state: self(held, state.unsqueeze(-3)).squeeze(-3), held)

    def label(self, parameters: DriftParameters) -> Labelled:
        """The parameters by name and dims."""
        return {"drift_weights": (("feature", "latent"), parameters.weights), **self.labelled(parameters)}

    def unlabel(self, values: Mapping[str, Tensor]) -> DriftParameters:
        """The inverse of `label`."""
        return self.unlabelled(values)._replace(weights=values["drift_weights"])


class _Field:
    """A field that knows the tensors it holds, as solvers with an adjoint need."""

    def __init__(self, rates: Callable[[Tensor], Tensor], held: DriftParameters) -> None:
        self.rates = rates
        self.tensors = tuple(part for part in held if part is not None)

    def __call__(self, state: Tensor) -> Tensor:
        return self.rates(state)


def lifted(parameters: DriftParameters) -> DriftParameters:
    """With the singleton of the trial plate, where there are no draws."""
    if parameters.weights.dim() > 2:
        return parameters
    return DriftParameters._make(None if part is None else part.unsqueeze(0) for part in parameters)


def affine_features(state: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(state[..., :1]), state], -1)


def affine_turned(weights: Tensor, turn: Tensor) -> Tensor:
    """Rows of the weights for 1 and the state, where the state was turned."""
    return torch.cat([weights[..., :1, :], turn @ weights[..., 1:, :]], -2)
