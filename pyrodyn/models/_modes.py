"""What models with exchangeable modes share: contrasts between modes, and modes numbered alike."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def mode_contrasts(modes: int) -> Tensor:
    """Orthonormal columns (mode, mode - 1), each summing to zero over modes (Helmert's)."""
    basis = torch.zeros(modes, modes - 1, dtype=torch.float64)
    for k in range(1, modes):
        basis[:k, k - 1] = 1.0
        basis[k, k - 1] = -k
        basis[:, k - 1] /= math.sqrt(k * (k + 1))
    return basis


def numbering(costs: Tensor) -> Tensor:
    """Which own mode takes which number, (*batch, mode), by least total of ``costs`` (*batch, mode, own mode)."""
    found = [linear_sum_assignment(cost)[1] for cost in costs.reshape(-1, *costs.shape[-2:]).cpu().numpy()]
    return torch.from_numpy(np.stack(found)).to(costs.device).reshape(costs.shape[:-1])
