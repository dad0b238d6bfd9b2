"""The rule by which a proposal is accepted."""

from __future__ import annotations

import torch
from torch import Tensor


def acceptance_of(log_ratio: Tensor) -> Tensor:
    """Probability of accepting; none where the ratio is not a number."""
    return torch.nan_to_num(log_ratio, -torch.inf, torch.inf, -torch.inf).clamp(max=0.0).exp()
