"""What models of switching steps refuse, and which bins of a recording count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrodyn.errors import ModelError
from pyrodyn.recording import Recording


def inside_of(recording: Recording) -> Tensor:
    """Which bins lie before a trial's end, (trial, time)."""
    return torch.arange(recording.num_bins) < torch.from_numpy(recording.lengths.copy()).unsqueeze(-1)


def check_modes(model: Any, recording: Recording, lags: int) -> None:
    """Refuse recordings on which modes cannot be told, or steps not be made."""
    name = type(model).__name__
    steps = int(torch.as_tensor(recording.lengths.copy() - lags).clamp(min=0).sum())
    if model.num_modes > steps:
        raise ModelError(
            f"num_modes is {model.num_modes} but the recording has {steps} steps (bins of all trials but the first "
            f"{lags} of each); lower num_modes"
        )
    if not recording.regular:
        raise ModelError(
            f"{name} steps from bin to bin and needs equally spaced bins, but the recording's time axis is irregular; "
            "rebin it, or put the gaps into the mask"
        )


def check_options(model: Any) -> None:
    """Refuse options out of their range; those that models of switching steps share."""
    if isinstance(model.num_modes, bool) or not isinstance(model.num_modes, int) or model.num_modes < 1:
        raise ModelError(f"num_modes must be a whole number of at least 1, got {model.num_modes!r}")
    for name in ("concentration", "dynamics_scale", "bias_scale", "max_radius"):
        if not getattr(model, name) > 0:
            raise ModelError(f"{name} must be positive, got {getattr(model, name)!r}")
    if not model.stickiness >= 0:
        raise ModelError(f"stickiness must be 0 or more, got {model.stickiness!r}")
    if not abs(model.persistence) < model.max_radius:
        raise ModelError(
            f"persistence must lie within max_radius, {model.max_radius}, of zero, got {model.persistence!r}"
        )
