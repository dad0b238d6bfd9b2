"""Steps of ordinary differential equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def rk4_step(field: Callable[[Tensor], Tensor], state: Tensor, step: Any) -> Tensor:
    """One step of the classical Runge-Kutta scheme of order four, for states (..., latent)."""
    first = field(state)
    second = field(state + 0.5 * step * first)
    third = field(state + 0.5 * step * second)
    fourth = field(state + step * third)
    return state + step / 6.0 * (first + 2.0 * second + 2.0 * third + fourth)
