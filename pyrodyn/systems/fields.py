r"""Vector fields of the textbook flows, with what is known of them in closed form.

A field takes arrays or tensors (..., latent), so that the same equations simulate in numpy and serve as a true drift in
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import xarray as xr


@dataclass(frozen=True, eq=False)
class Field:
    r"""The right-hand side of :math:`\dot x = f(x)`.

    Attributes
    ----------
    name : str
    parameters : mapping of str to float
    dim : int
    period : float, of the dominant oscillation, in the field's own unit of time
    """

    name: str
    parameters: Mapping[str, float]

    @property
    def dim(self) -> int:
        return _KINDS[self.name].dim

    @property
    def period(self) -> float:
        return _KINDS[self.name].period

    def __call__(self, state: Any) -> Any:
        """f(x), an array or tensor (..., latent) as ``state`` is."""
        columns = _KINDS[self.name].rates(*(state[..., i] for i in range(self.dim)), **self.parameters)
        return torch.stack(columns, -1) if isinstance(state, torch.Tensor) else np.stack(columns, -1)

    def jacobian(self, state: Any) -> np.ndarray:
        r""":math:`\partial f_i / \partial x_j`, (..., latent, latent)."""
        points = torch.as_tensor(np.asarray(state, dtype=np.float64)).reshape(-1, self.dim)
        slopes: Any = torch.func.vmap(torch.func.jacrev(self.__call__))(points)
        return slopes.reshape(*np.shape(state), self.dim).numpy()

    @property
    def fixed_points(self) -> np.ndarray:
        """Where f is zero, (point, latent), in closed form."""
        return np.array(_KINDS[self.name].fixed_points(**self.parameters), dtype=np.float64)


@dataclass(frozen=True)
class _Kind:
    dim: int
    period: float
    parameters: Mapping[str, float]
    rates: Callable[..., tuple]
    fixed_points: Callable[..., list]
    start: tuple[float, ...]  # a state that the flow takes to its attractor


def _lorenz(x, y, z, *, sigma, rho, beta):
    return sigma * (y - x), x * (rho - z) - y, x * y - beta * z


def _lorenz_points(*, sigma, rho, beta):
    if rho <= 1.0:
        return [(0.0, 0.0, 0.0)]
    side = np.sqrt(beta * (rho - 1.0))
    return [(0.0, 0.0, 0.0), (side, side, rho - 1.0), (-side, -side, rho - 1.0)]


def _arneodo(x, y, z, *, a, b, c, d):
    return y, z, -a * x - b * y - c * z + d * x**3


def _arneodo_points(*, a, b, c, d):
    side = a / d
    if side <= 0.0:
        return [(0.0, 0.0, 0.0)]
    return [(0.0, 0.0, 0.0), (np.sqrt(side), 0.0, 0.0), (-np.sqrt(side), 0.0, 0.0)]


def _rossler(x, y, z, *, a, b, c):
    return -y - z, x + a * y, b + z * (x - c)


def _rossler_points(*, a, b, c):
    inside = c**2 - 4.0 * a * b
    roots = [(c - np.sqrt(inside)) / 2.0, (c + np.sqrt(inside)) / 2.0] if inside >= 0.0 else []
    return [(x, -x / a, x / a) for x in roots]


def _duffing(x, v, *, alpha, beta, gamma):
    return v, alpha * x - beta * x**3 - gamma * v


def _duffing_points(*, alpha, beta, gamma):
    side = alpha / beta
    return [(0.0, 0.0)] if side <= 0.0 else [(0.0, 0.0), (np.sqrt(side), 0.0), (-np.sqrt(side), 0.0)]


def _van_der_pol(x, y, *, mu, tau):
    return tau * mu * (x - x**3 / 3.0 - y), tau * x / mu


def _spiral(x, y, *, decay, frequency):
    return -decay * x - frequency * y, frequency * x - decay * y


def _origin(**_):
    return [(0.0, 0.0)]


_KINDS: dict[str, _Kind] = {
    "lorenz": _Kind(
        3,
        1.5008,
        MappingProxyType({"sigma": 10.0, "rho": 28.0, "beta": 2.667}),
        _lorenz,
        _lorenz_points,
        (1.0, 1.0, 20.0),
    ),
    "arneodo": _Kind(
        3,
        3.1641,
        MappingProxyType({"a": -5.5, "b": 4.5, "c": 1.0, "d": -1.0}),
        _arneodo,
        _arneodo_points,
        (0.1, 0.0, 0.0),
    ),
    "rossler": _Kind(
        3, 5.9086, MappingProxyType({"a": 0.2, "b": 0.2, "c": 5.7}), _rossler, _rossler_points, (1.0, 1.0, 0.0)
    ),
    "duffing": _Kind(
        2, np.pi, MappingProxyType({"alpha": 2.0, "beta": 1.0, "gamma": 0.1}), _duffing, _duffing_points, (1.0, 0.0)
    ),
    "van_der_pol": _Kind(2, 0.763, MappingProxyType({"mu": 2.0, "tau": 10.0}), _van_der_pol, _origin, (1.0, 0.0)),
    "spiral": _Kind(2, 0.5, MappingProxyType({"decay": 3.0, "frequency": 4.0 * np.pi}), _spiral, _origin, (1.0, 0.0)),
}


def field(name: str, **parameters: float) -> Field:
    """A field by its name: "lorenz", "arneodo", "rossler", "duffing", "van_der_pol" or "spiral".

    Parameters that are not given have their usual values.
    """
    if name not in _KINDS:
        raise ValueError(f"name must be one of {', '.join(map(repr, _KINDS))}, got {name!r}")
    usual = _KINDS[name].parameters
    unknown = sorted(set(parameters) - set(usual))
    if unknown:
        raise ValueError(f"{name} has the parameters {', '.join(usual)}, got {', '.join(unknown)}")
    return Field(name, MappingProxyType(dict(usual) | {key: float(value) for key, value in parameters.items()}))


def field_of(truth: xr.Dataset) -> Field:
    """The field that a synthetic system was made with, from its truth, also after netCDF."""
    name = truth.attrs.get("field")
    if name is None:
        raise ValueError("this truth was not made by a flow: it has no attribute 'field'")
    return field(name, **{key: truth.attrs[key] for key in _KINDS[name].parameters})


def start_of(name: str) -> np.ndarray:
    """A state (latent) from which the flow reaches its attractor."""
    return np.array(_KINDS[name].start)
