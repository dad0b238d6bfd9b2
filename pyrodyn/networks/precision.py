"""The number of digits that networks work in.

Weights, their gradients and all densities are float64. What lies between, the recurrences over bins, is where the time
goes and can stand fewer digits: inside `network_precision(torch.float32)` it runs in those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_WORKING: ContextVar[torch.dtype] = ContextVar("dtype of networks", default=torch.float64)


@contextmanager
def network_precision(dtype: torch.dtype) -> Iterator[None]:
    """Networks work in ``dtype`` inside."""
    token = _WORKING.set(dtype)
    try:
        yield
    finally:
        _WORKING.reset(token)


def lowered(*values: Tensor | None) -> list[Tensor]:
    """Values in the digits that networks work in; None stays None."""
    return [None if value is None else value.to(_WORKING.get()) for value in values]  # type: ignore[misc]
