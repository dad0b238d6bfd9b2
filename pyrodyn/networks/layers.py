"""Weights as sample sites, and products with weights that carry draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.recording import Recording


def sample_weight(name: str, shape: Sequence[int], sd: float, recording: Recording) -> Tensor:
    """A site of independent N(0, sd^2) entries, (*draw, 1, *shape) or (*shape)."""
    zeros = torch.zeros(tuple(shape), dtype=torch.float64, device=recording.device)
    return pyro.sample(name, dist.Normal(zeros, sd).to_event(len(shape)))


def start_weight(shape: Sequence[int], sd: float, place: int) -> Tensor:
    """Where such a site starts: entries as the prior has them, the same in every call, another set for each place.

    Weights that start equal, at zero for one, receive equal gradients and stay equal.
    """
    generator = torch.Generator().manual_seed(1000 + place)
    return sd * torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def product(values: Tensor, weight: Tensor, axes: int = 2) -> Tensor:
    """``weight @ value`` in every trial and bin.

    Parameters
    ----------
    values : Tensor, (*draw, ..., in)
        With ``axes`` axes, (trial, time) or (trial), between draws and last axis; it may lack the draws.
    weight : Tensor, (*draw, 1, out, in) or (out, in)

    Notes
    -----
    Trials and bins are one axis of the product: broadcast as they stand, a weight would be copied for every trial.
    """
    if weight.dim() == 2:
        return values @ weight.mT
    found = values.flatten(-1 - axes, -2) @ weight.squeeze(-3).mT
    return found.unflatten(-2, values.shape[-1 - axes : -1])


def prior_sd(fan_in: int) -> float:
    """Standard deviation at which a sum over ``fan_in`` inputs of unit variance has unit variance."""
    return 1.0 / math.sqrt(max(1, fan_in))
