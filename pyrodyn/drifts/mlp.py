"""A drift that is a neural network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.drifts.drift import AFFINE_SD, Drift, DriftParameters, affine_features, affine_turned, lifted
from pyrodyn.errors import ModelError
from pyrodyn.integrators import Network
from pyrodyn.program import Labelled


@dataclass(frozen=True)
class MLP(Drift):
    r"""An affine drift and a neural network with tanh units.

    .. math:: f(x) = A x + b + W^\top h_K, \qquad h_k = \tanh(V_k h_{k-1} + c_k), \quad h_0 = x,

    with the entries of :math:`V_k` and :math:`c_k` normal, of variance one over the number of inputs and one, and those
    of W of variance ``amplitude`` squared over the number of hidden units, in units of the pace.

    Parameters
    ----------
    hidden : int
        Units of a layer.
    layers : int
        K.
    amplitude : float
    """

    feature_sites = ("hidden_weights", "hidden_biases", "deep_weights", "deep_biases")

    hidden: int = 64
    layers: int = 1
    amplitude: float = 3.0

    def __post_init__(self) -> None:
        for name in ("hidden", "layers"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ModelError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if not self.amplitude > 0:
            raise ModelError(f"amplitude must be positive, got {self.amplitude!r}")

    def check(self, latent_dim: int) -> None:
        del latent_dim  # any will do

    def num_features(self, latent_dim: int) -> int:
        return 1 + latent_dim + self.hidden

    def _shapes(self, latent_dim: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "hidden_weights": (self.hidden, latent_dim),
            "hidden_biases": (self.hidden,),
        }
        if self.layers > 1:
            shapes["deep_weights"] = (self.layers - 1, self.hidden, self.hidden)
            shapes["deep_biases"] = (self.layers - 1, self.hidden)
        return shapes

    def sample_features(self, latent_dim: int, pace: float) -> DriftParameters:
        sampled = {}
        for name, shape in self._shapes(latent_dim).items():
            sd = shape[-1] ** -0.5 if name.endswith("weights") else 1.0
            normal = dist.Normal(torch.zeros(shape, dtype=torch.float64), sd)
            sampled[name] = pyro.sample(name, normal.to_event(len(shape)))
        return DriftParameters(torch.empty(0), **sampled)

    def features(self, parameters: DriftParameters, state: Tensor) -> Tensor:
        assert parameters.hidden_weights is not None and parameters.hidden_biases is not None
        active = torch.tanh(state @ parameters.hidden_weights.mT + parameters.hidden_biases.unsqueeze(-2))
        if parameters.deep_weights is not None and parameters.deep_biases is not None:
            for weight, bias in zip(parameters.deep_weights.unbind(-3), parameters.deep_biases.unbind(-2), strict=True):
                active = torch.tanh(active @ weight.mT + bias.unsqueeze(-2))
        return torch.cat([affine_features(state), active], -1)

    def prior_sd(self, parameters: DriftParameters, latent_dim: int, pace: float) -> Tensor:
        affine = torch.full((1 + latent_dim,), AFFINE_SD, dtype=torch.float64)
        last = torch.full((self.hidden,), self.amplitude * self.hidden**-0.5, dtype=torch.float64)
        return torch.cat([affine, last]) / pace

    def initial_features(self, latent_dim: int, pace: float) -> dict[str, Tensor]:
        # Equal units would stay equal: a draw of the prior, always the same.
        generator = torch.Generator().manual_seed(0)
        found = {}
        for name, shape in self._shapes(latent_dim).items():
            sd = shape[-1] ** -0.5 if name.endswith("weights") else 1.0
            found[name] = sd * torch.randn(shape, generator=generator, dtype=torch.float64)
        return found

    def field(self, parameters: DriftParameters) -> Callable[[Tensor], Tensor]:
        held = lifted(parameters)
        dim = held.weights.shape[-1]
        if self.layers > 1 or held.hidden_weights is None or held.hidden_biases is None:
            return super().field(parameters)
        level, slope, weights = held.weights.split([1, dim, self.hidden], -2)
        return Network(slope, level.squeeze(-2), held.hidden_weights, held.hidden_biases, weights)

    def labelled(self, parameters: DriftParameters) -> Labelled:
        dims = {
            "hidden_weights": ("hidden", "latent"),
            "hidden_biases": ("hidden",),
            "deep_weights": ("layer", "hidden", "hidden_from"),
            "deep_biases": ("layer", "hidden"),
        }
        values = parameters._asdict()
        return {name: (axes, values[name]) for name, axes in dims.items() if values[name] is not None}

    def unlabelled(self, values: Mapping[str, Tensor]) -> DriftParameters:
        return DriftParameters(torch.empty(0), **{name: values[name] for name in self._shapes(1)})

    def turned(self, parameters: DriftParameters, turn: Tensor) -> DriftParameters:
        assert parameters.hidden_weights is not None
        dim = len(turn)
        affine = affine_turned(parameters.weights[..., : 1 + dim, :], turn)
        weights = torch.cat([affine, parameters.weights[..., 1 + dim :, :]], -2) @ turn.mT
        return parameters._replace(weights=weights, hidden_weights=parameters.hidden_weights @ turn.mT)
