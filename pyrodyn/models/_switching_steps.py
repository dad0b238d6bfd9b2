"""Parameters of steps that switch with a mode, and what can be done with them whatever their prior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrodyn.linalg.taming import companion
from pyrodyn.program import Labelled


class ModeSteps(NamedTuple):
    """Parameters of switching steps, each (*draw, 1, *event) or (*event)."""

    initial: Tensor  # (mode)
    transition: Tensor  # (mode, mode_to): rows sum to one
    dynamics: Tensor  # (mode, latent, lag x latent): from earlier bins, the last first, to bin t; acts on columns
    bias: Tensor  # (mode, latent)
    process_noise: Tensor  # (mode, latent, latent), covariances
    input_gain: Tensor | None  # (mode, latent, input)
    recurrence: Tensor | None  # (mode, latent): what the state adds to the logit of the next mode
    recurrence_bias: Tensor | None  # (mode): what is added to it in every state, so that borders may lie anywhere
    mode_gain: Tensor | None  # (mode, input): what an input adds to it

    def map(self, change: Callable[[Tensor], Tensor]) -> ModeSteps:
        """All that is there, changed."""
        parts: Any = (part if part is None else change(part) for part in self)
        return ModeSteps(*parts)


def process_noise(root: Tensor, scale: Tensor) -> Tensor:
    r"""Q (*batch, mode, latent, latent), from the root T of its precision :math:`T T^\top / \psi`."""
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, eye.expand_as(root), upper=False)
    return scale[..., None, None, None] * inverse.mT @ inverse


def permuted(steps: ModeSteps, order: Tensor) -> ModeSteps:
    """The same steps with mode ``order[..., k]`` as the new mode k; ``order`` (mode,) or (*batch, mode)."""

    def along(value: Tensor, axis: int, event: int) -> Tensor:
        """Take modes along an axis, counted from the right, of a value with so many event dims."""
        shape = [1] * event
        shape[axis] = order.shape[-1]
        lead = (1,) * (value.dim() - event - order.dim() + 1)
        return value.take_along_dim(order.reshape(*lead, *order.shape[:-1], *shape), axis)

    def of(value: Tensor | None, event: int) -> Any:
        return None if value is None else along(value, -event, event)

    return ModeSteps(
        of(steps.initial, 1),
        along(along(steps.transition, -2, 2), -1, 2),
        of(steps.dynamics, 3),
        of(steps.bias, 2),
        of(steps.process_noise, 3),
        of(steps.input_gain, 3),
        of(steps.recurrence, 2),
        of(steps.recurrence_bias, 1),
        of(steps.mode_gain, 2),
    )


def rotated(steps: ModeSteps, turn: Tensor) -> ModeSteps:
    """The same steps in latents ``turn' x``, for orthogonal ``turn`` (*batch, latent, latent)."""
    of_modes, dim = turn.unsqueeze(-3), turn.shape[-1]
    by_lag = steps.dynamics.unflatten(-1, (-1, dim))  # (*batch, mode, latent, lag, latent)
    return steps._replace(
        dynamics=of_modes.mT @ (by_lag @ of_modes.unsqueeze(-3)).flatten(-2),
        bias=steps.bias @ turn,
        process_noise=of_modes.mT @ steps.process_noise @ of_modes,
        input_gain=None if steps.input_gain is None else of_modes.mT @ steps.input_gain,
        recurrence=None if steps.recurrence is None else steps.recurrence @ turn,
    )


def mode_summaries(steps: ModeSteps, loading: Tensor) -> Labelled:
    """What neither rotations of the latent nor the numbers of modes change.

    Quantities of single modes are sorted, each by itself; sums over modes, as the units see them, tell which belongs to
    which.
    """
    with torch.no_grad():
        ends = torch.linalg.eigvals(companion(steps.dynamics))
        modulus, angle = (part.sort(-1, descending=True).values for part in (ends.abs(), ends.angle().abs()))
        seen_noise = loading.unsqueeze(-3) @ steps.process_noise
        noise = (seen_noise * loading.unsqueeze(-3)).sum(-1)  # (*batch, mode, unit)
        drift = steps.bias @ loading.mT
        latest = steps.dynamics[..., : steps.dynamics.shape[-2]]
        step = ((loading.unsqueeze(-3) @ latest) * loading.unsqueeze(-3)).sum(-1)
        stay = steps.transition.diagonal(dim1=-2, dim2=-1)

        def in_order(values: Tensor) -> Tensor:
            return values.sort(-2, descending=True).values

        found: Labelled = {
            "eigenvalue_modulus": (("mode", "eigenvalue"), in_order(modulus)),
            "eigenvalue_angle": (("mode", "eigenvalue"), in_order(angle)),
            "stay_probability": (("mode",), stay.sort(-1, descending=True).values),
            "innovation_sd": (("mode",), noise.sum(-1).sqrt().sort(-1, descending=True).values),
            "drift_size": (("mode",), drift.square().sum(-1).sqrt().sort(-1, descending=True).values),
            "initial_drift": (("unit",), (steps.initial.unsqueeze(-1) * drift).sum(-2)),
            "lag_one_signal": (("unit",), (stay.unsqueeze(-1) * step).mean(-2)),
            "drift_by_stay": (("unit",), (stay.unsqueeze(-1) * drift).mean(-2)),
            "innovation_by_drift": (("unit",), (noise.sqrt() * drift).mean(-2)),
        }
        if steps.input_gain is not None:
            effect = loading.unsqueeze(-3) @ steps.input_gain
            found["input_effect"] = (("unit", "input"), effect.mean(-3))
            found["input_by_drift"] = (("unit", "input"), (effect * drift.unsqueeze(-1)).mean(-3))
        if steps.recurrence is not None:
            size = steps.recurrence.square().sum(-1).sqrt()
            found["recurrence_size"] = (("mode",), size.sort(-1, descending=True).values)
            found["recurrence_by_drift"] = (("unit",), ((steps.recurrence @ loading.mT) * drift).mean(-2))
        if steps.recurrence_bias is not None:
            found["border_by_drift"] = (("unit",), (steps.recurrence_bias.unsqueeze(-1) * drift).mean(-2))
            if steps.mode_gain is not None:
                pushed = steps.mode_gain.unsqueeze(-2) * drift.unsqueeze(-1)
                found["mode_gain_by_drift"] = (("unit", "input"), pushed.mean(-3))
    return found


def step_labels(steps: ModeSteps, dim: str) -> Labelled:
    """The parameters by name and dims, those of one lag; ``dim`` is what the path runs over."""
    square = ("mode", dim, f"{dim}_from")
    labelled: dict[str, Any] = {
        "initial": (("mode",), steps.initial),
        "transition": (("mode", "mode_to"), steps.transition),
        "dynamics": (square, steps.dynamics),
        "bias": (("mode", dim), steps.bias),
        "process_noise": (square, steps.process_noise),
        "input_gain": (("mode", dim, "input"), steps.input_gain),
        "recurrence": (("mode", dim), steps.recurrence),
        "recurrence_bias": (("mode",), steps.recurrence_bias),
        "mode_gain": (("mode", "input"), steps.mode_gain),
    }
    return {name: (dims, value) for name, (dims, value) in labelled.items() if value is not None}
