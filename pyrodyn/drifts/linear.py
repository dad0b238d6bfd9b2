"""A drift that is affine in the state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrodyn.drifts.drift import AFFINE_SD, Drift, DriftParameters, affine_features, affine_turned
from pyrodyn.program import Labelled


@dataclass(frozen=True)
class Linear(Drift):
    r""":math:`f(x) = A x + b`."""

    def check(self, latent_dim: int) -> None:
        del latent_dim  # any will do

    def num_features(self, latent_dim: int) -> int:
        return 1 + latent_dim

    def sample_features(self, latent_dim: int, pace: float) -> DriftParameters:
        return DriftParameters(torch.empty(0))

    def features(self, parameters: DriftParameters, state: Tensor) -> Tensor:
        return affine_features(state)

    def prior_sd(self, parameters: DriftParameters, latent_dim: int, pace: float) -> Tensor:
        return torch.full((1 + latent_dim,), AFFINE_SD / pace, dtype=torch.float64)

    def initial_features(self, latent_dim: int, pace: float) -> dict[str, Tensor]:
        return {}

    def labelled(self, parameters: DriftParameters) -> Labelled:
        return {}

    def unlabelled(self, values: Mapping[str, Tensor]) -> DriftParameters:
        return DriftParameters(torch.empty(0))

    def turned(self, parameters: DriftParameters, turn: Tensor) -> DriftParameters:
        return parameters._replace(weights=affine_turned(parameters.weights, turn) @ turn.mT)
