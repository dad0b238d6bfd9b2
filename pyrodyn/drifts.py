r"""Drifts of differential equations: linear, Gaussian process, neural network.

Every drift is a linear map of features of the state,

.. math:: f(x) = W^\top \psi(x), \qquad W_{md} \sim N(0, v_m),

the features being 1, the state itself, and what makes the drift nonlinear. So an engine can treat W exactly, whatever
the features are. Rates are in units of the pace, one over the time in which a latent typically changes.

A drift is a frozen set of options. Its sites are ``drift_weights`` (feature, latent), W over its prior standard
deviation, and those that its features have.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.errors import ModelError
from pyrodyn.integrators import Network
from pyrodyn.program import Labelled

__all__ = ["MLP", "Drift", "GaussianProcess", "Linear"]

AFFINE_SD = 1.0  # prior sd of the affine part's weights, in units of the pace
MOST_FEATURES = 2000


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
        held = _lifted(parameters)
        return _Field(lambda state: self(held, state.unsqueeze(-3)).squeeze(-3), held)

    def label(self, parameters: DriftParameters) -> Labelled:
        """The parameters by name and dims."""
        return {"drift_weights": (("feature", "latent"), parameters.weights), **self.labelled(parameters)}

    def unlabel(self, values: Mapping[str, Tensor]) -> DriftParameters:
        """The inverse of `label`."""
        return self.unlabelled(values)._replace(weights=values["drift_weights"])


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
        return _affine(state)

    def prior_sd(self, parameters: DriftParameters, latent_dim: int, pace: float) -> Tensor:
        return torch.full((1 + latent_dim,), AFFINE_SD / pace, dtype=torch.float64)

    def initial_features(self, latent_dim: int, pace: float) -> dict[str, Tensor]:
        return {}

    def labelled(self, parameters: DriftParameters) -> Labelled:
        return {}

    def unlabelled(self, values: Mapping[str, Tensor]) -> DriftParameters:
        return DriftParameters(torch.empty(0))

    def turned(self, parameters: DriftParameters, turn: Tensor) -> DriftParameters:
        return parameters._replace(weights=_affine_turned(parameters.weights, turn) @ turn.mT)


@dataclass(frozen=True)
class GaussianProcess(Drift):
    r"""An affine drift and a Gaussian process with a squared-exponential kernel, by eigenfunctions of a box.

    .. math:: \phi_j(x) = \prod_d L^{-1/2} \sin \frac{\pi j_d (x_d + L)}{2 L}, \qquad
        v_j = a^2 (2\pi)^{D/2} \ell^D e^{-\ell^2 |\omega_j|^2 / 2}, \quad \omega_{jd} = \frac{\pi j_d}{2 L} .

    Inside the box, away from its walls, this is the process itself up to frequencies that v makes small; beyond it the
    affine part goes on alone, and states that far out are not what it is for. Length scale and amplitude enter the
    prior of the weights only, not the features.

    Parameters
    ----------
    functions : int, optional
        Frequencies in each dimension; of their products those inside an ellipsoid are kept. By default 24, 12 and 8 in
        one, two and three dimensions.
    box : float
        L, in the latent's units, in which paths have a standard deviation of about one.
    length_scale : float
        Median of the prior of :math:`\ell`, whose logarithm has a standard deviation of one half.
    amplitude : float
        Median of the prior of a, in units of the pace, whose logarithm has a standard deviation of one.

    References
    ----------
    Solin & Särkkä, Stat. Comput. 30:419 (2020).
    """

    prior_sites = ("length_scale", "amplitude")

    functions: int | None = None
    box: float = 4.0
    length_scale: float = 1.0
    amplitude: float = 1.0

    def __post_init__(self) -> None:
        for name in ("box", "length_scale", "amplitude"):
            if not getattr(self, name) > 0:
                raise ModelError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.functions is not None and (not isinstance(self.functions, int) or self.functions < 1):
            raise ModelError(f"functions must be a whole number of at least 1, got {self.functions!r}")

    def check(self, latent_dim: int) -> None:
        count = self.num_features(latent_dim) if latent_dim <= 4 else math.inf
        if count > MOST_FEATURES:
            raise ModelError(
                f"a GaussianProcess drift of {latent_dim} latents would need more than {MOST_FEATURES} functions; use "
                "drifts.MLP(), or lower functions or latent_dim"
            )

    def num_features(self, latent_dim: int) -> int:
        return 1 + latent_dim + len(self._orders(latent_dim))

    def _orders(self, latent_dim: int) -> Tensor:
        return _ellipsoid(self.functions or {1: 24, 2: 12, 3: 8}.get(latent_dim, 5), latent_dim)

    def sample_features(self, latent_dim: int, pace: float) -> DriftParameters:
        def around(name: str, median: float, spread: float) -> Tensor:
            centre = torch.tensor(math.log(median), dtype=torch.float64)
            return pyro.sample(name, dist.LogNormal(centre, spread))

        scale = around("length_scale", self.length_scale, 0.5)
        return DriftParameters(torch.empty(0), scale, around("amplitude", self.amplitude / pace, 1.0))

    def features(self, parameters: DriftParameters, state: Tensor) -> Tensor:
        dim = state.shape[-1]
        orders = self._orders(dim).to(state.device)
        most = int(orders.max())
        angle = (state.unsqueeze(-1) + self.box) * (math.pi / (2.0 * self.box))
        waves = (angle * torch.arange(1, most + 1, dtype=state.dtype, device=state.device)).sin() / self.box**0.5
        product = waves[..., 0, :].index_select(-1, orders[:, 0] - 1)
        for axis in range(1, dim):
            product = product * waves[..., axis, :].index_select(-1, orders[:, axis] - 1)
        # A wave goes on for ever outside its box; a fall to zero there leaves the affine part alone.
        outside = (state.abs() - self.box).clamp(min=0.0).square().sum(-1, keepdim=True)
        return torch.cat([_affine(state), product * torch.exp(-outside)], -1)

    def prior_sd(self, parameters: DriftParameters, latent_dim: int, pace: float) -> Tensor:
        assert parameters.length_scale is not None and parameters.amplitude is not None
        scale, size = parameters.length_scale.unsqueeze(-1), parameters.amplitude.unsqueeze(-1)
        squared = self._orders(latent_dim).to(scale).square().sum(-1) * (math.pi / (2.0 * self.box)) ** 2
        log_sd = size.log() + 0.5 * latent_dim * (0.5 * math.log(2.0 * math.pi) + scale.log())
        waves = (log_sd - 0.25 * scale.square() * squared).exp()
        affine = torch.full((1 + latent_dim,), AFFINE_SD / pace, dtype=waves.dtype, device=waves.device)
        return torch.cat([affine.expand(*waves.shape[:-1], -1), waves], -1)

    def initial_features(self, latent_dim: int, pace: float) -> dict[str, Tensor]:
        return {
            "length_scale": torch.tensor(self.length_scale, dtype=torch.float64),
            "amplitude": torch.tensor(self.amplitude / pace, dtype=torch.float64),
        }

    def labelled(self, parameters: DriftParameters) -> Labelled:
        assert parameters.length_scale is not None and parameters.amplitude is not None
        return {"length_scale": ((), parameters.length_scale), "amplitude": ((), parameters.amplitude)}

    def unlabelled(self, values: Mapping[str, Tensor]) -> DriftParameters:
        return DriftParameters(torch.empty(0), values["length_scale"], values["amplitude"])

    def turned(self, parameters: DriftParameters, turn: Tensor) -> DriftParameters:
        dim = len(turn)
        orders = self._orders(dim)
        source, sign = turn.abs().argmax(1), turn.sum(1)
        moved = orders[:, source]
        # sin(pi j (L - x) / 2 L) = (-1)^(j + 1) sin(pi j (x + L) / 2 L)
        flips = torch.where((sign < 0) & (moved % 2 == 0), -1.0, 1.0).prod(-1).to(turn.dtype)
        place = {tuple(order): i for i, order in enumerate(orders.tolist())}
        target = torch.tensor([place[tuple(order)] for order in moved.tolist()])
        waves = (flips.unsqueeze(-1) * parameters.weights[..., 1 + dim :, :])[..., target.argsort(), :]
        affine = _affine_turned(parameters.weights[..., : 1 + dim, :], turn)
        return parameters._replace(weights=torch.cat([affine, waves], -2) @ turn.mT)


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
        return torch.cat([_affine(state), active], -1)

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
        held = _lifted(parameters)
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
        affine = _affine_turned(parameters.weights[..., : 1 + dim, :], turn)
        weights = torch.cat([affine, parameters.weights[..., 1 + dim :, :]], -2) @ turn.mT
        return parameters._replace(weights=weights, hidden_weights=parameters.hidden_weights @ turn.mT)


class _Field:
    """A field that knows the tensors it holds, as solvers with an adjoint need."""

    def __init__(self, rates: Callable[[Tensor], Tensor], held: DriftParameters) -> None:
        self.rates = rates
        self.tensors = tuple(part for part in held if part is not None)

    def __call__(self, state: Tensor) -> Tensor:
        return self.rates(state)


def _lifted(parameters: DriftParameters) -> DriftParameters:
    """With the singleton of the trial plate, where there are no draws."""
    if parameters.weights.dim() > 2:
        return parameters
    return DriftParameters._make(None if part is None else part.unsqueeze(0) for part in parameters)


def _affine(state: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(state[..., :1]), state], -1)


def _affine_turned(weights: Tensor, turn: Tensor) -> Tensor:
    """Rows of the weights for 1 and the state, where the state was turned."""
    return torch.cat([weights[..., :1, :], turn @ weights[..., 1:, :]], -2)


@lru_cache(maxsize=32)
def _ellipsoid(functions: int, dim: int) -> Tensor:
    """Orders (function, latent) of the products of waves that are kept, lowest first."""
    found = [
        order
        for order in itertools.product(range(1, functions + 1), repeat=dim)
        if sum((j - 1) ** 2 for j in order) <= (functions - 1) ** 2
    ]
    found.sort(key=lambda order: (sum(j**2 for j in order), order))
    return torch.tensor(found)
