"""A function of states and its Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def expanded(function: Callable[[Tensor], Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Value (..., latent) and Jacobian (..., latent, latent); rows of the batch do not touch each other."""
    state = state.detach().requires_grad_()
    with torch.enable_grad():
        value = function(state)
        rows = [torch.autograd.grad(column.sum(), state, retain_graph=True)[0] for column in value.unbind(-1)]
    return value.detach(), torch.stack(rows, -2)
