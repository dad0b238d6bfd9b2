r"""Recurrences that run over all bins in one call, with their derivatives written out.

Both have the form :math:`h_t = a_t \odot F(h_{t-1}, d_t) + b_t` with a network F. With :math:`a = 1` and noise for b it
is a draw of a noisy network; with a gain and a pull towards the data for a and b, a draw of its posterior. Autograd
would keep a dozen nodes for every bin, and multiply the gradient of the weights together bin by bin; here a bin costs
its matrix product forward and one back, and the weights' gradient is one product over all bins.

Tensors are time-major, (time, *batch, ...), so that a bin lies in one piece. ``*batch`` is (*draw, trial); a weight is
(*draw, ...) or has no draws.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrodyn.linalg.matrix import broadcast_shapes


def gated_scan(
    drive: Tensor,
    initial: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    r"""States (time, *batch, hidden) of a gated recurrent unit after each bin.

    .. math::
        (r, z) = \sigma(d^{rz}_t + W^{rz} h_{t-1}), \quad n = \tanh(d^n_t + r \odot (W^n h_{t-1} + c)), \quad
        F = n + z \odot (h_{t-1} - n).

    Parameters
    ----------
    drive : Tensor, (time, *batch, 3 hidden)
        d, in the order r, z, n. Axes of the batch may have size one.
    initial : Tensor, (*batch, hidden)
        The state before the first of these bins.
    recurrent : Tensor, (*draw, 3 hidden, hidden)
        W.
    bias : Tensor, (*draw, 1, hidden) or (hidden)
        c.
    gain, shift : Tensor, (time, *batch, hidden), optional
        a and b; 1 and 0 where None.

    References
    ----------
    Cho et al., EMNLP 2014 (the unit); Chung et al., arXiv:1412.3555 (compared with others).
    """
    return _Gated.apply(drive, initial, recurrent, bias, gain, shift)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, drive, initial, recurrent, bias, gain, shift):
        hidden = initial.shape[-1]
        two = 2 * hidden
        state = initial.expand(_batch(drive, initial, gain, shift) + (hidden,)).contiguous()
        gates = state.new_empty(len(drive), *state.shape[:-1], two)
        inner, new, states = (state.new_empty(len(drive), *state.shape) for _ in range(3))
        weight = recurrent.mT
        first = state
        for t in range(len(drive)):
            gated_step(drive[t], state @ weight, bias, state, (gates[t], inner[t], new[t], states[t]))
            _move(states[t], t, gain, shift)
            state = states[t]
        ctx.save_for_backward(drive, initial, recurrent, bias, gain, shift, first, gates, inner, new, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, for_states):
        drive, initial, recurrent, bias, gain, shift, first, gates, inner, new, states = ctx.saved_tensors
        hidden = first.shape[-1]
        two = 2 * hidden
        for_drive = first.new_empty(len(states), *first.shape[:-1], 3 * hidden)
        for_inner = torch.empty_like(states)
        pulled = torch.empty_like(states) if gain is not None or shift is not None else None
        carry = torch.zeros_like(first)
        of_gates, of_new = recurrent[..., :two, :], recurrent[..., two:, :]
        for t in range(len(states) - 1, -1, -1):
            slope = _slope(for_states[t] + carry, t, gain, pulled)
            before = states[t - 1] if t else first
            kept = gated_slopes(slope, before, (gates[t], inner[t], new[t]), for_drive[t], for_inner[t])
            carry = kept + for_drive[t, ..., :two] @ of_gates
            carry += for_inner[t] @ of_new
        before = torch.cat([first.unsqueeze(0), states[:-1]])
        for_recurrent = for_gain = for_shift = None
        if ctx.needs_input_grad[2]:
            parts = [outer(for_drive[..., :two], before, recurrent), outer(for_inner, before, recurrent)]
            for_recurrent = torch.cat(parts, -2)
        if gain is not None and pulled is not None:
            for_gain = reduced(pulled * torch.lerp(new, before, gates[..., hidden:]), gain)
        if shift is not None and pulled is not None:
            for_shift = reduced(pulled, shift)
        return (
            reduced(for_drive, drive) if ctx.needs_input_grad[0] else None,
            carry.sum_to_size(initial.shape),
            for_recurrent,
            for_inner.sum_to_size(bias.shape) if ctx.needs_input_grad[3] else None,
            for_gain,
            for_shift,
        )


def gated_step(drive: Tensor, own: Tensor, bias: Tensor, state: Tensor, into: tuple[Tensor, ...]) -> None:
    """One step of a gated unit.

    ``own`` is what the state (*batch, hidden) gives through W. The results are written into (*batch, 2 hidden) gates
    and three tensors (*batch, hidden): what the candidate is given by W and c, the candidate, the state.
    """
    gates, inner, new, after = into
    two = gates.shape[-1]
    torch.add(drive[..., :two], own[..., :two], out=gates).sigmoid_()
    reset, update = gates.chunk(2, -1)
    torch.add(own[..., two:], bias, out=inner)
    tanh_(torch.addcmul(drive[..., two:], reset, inner, out=new))
    torch.lerp(new, state, update, out=after)


def gated_slopes(
    slope: Tensor, before: Tensor, made: tuple[Tensor, ...], for_drive: Tensor, for_inner: Tensor
) -> Tensor:
    """The way back through `gated_step`.

    From the slope in the state (*batch, hidden), the slopes in the drive (*batch, 3 hidden) and in what the candidate
    is given by W (*batch, hidden) are written; what passes on to the state before without W is returned.
    """
    gates, inner, new = made
    hidden = new.shape[-1]
    reset, update = gates.chunk(2, -1)
    kept = update * slope
    for_new = torch.mul(slope - kept, 1.0 - new.square(), out=for_drive[..., 2 * hidden :])
    torch.mul(kept, (before - new) * (1.0 - update), out=for_drive[..., hidden : 2 * hidden])
    torch.mul(for_new, reset, out=for_inner)
    torch.mul(for_inner * inner, 1.0 - reset, out=for_drive[..., :hidden])
    return kept


def leaky_scan(
    drive: Tensor,
    initial: Tensor,
    recurrent: Tensor,
    leak: Tensor,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    r"""States (time, *batch, hidden) of a leaky network after each bin.

    .. math:: F = x_{t-1} + \alpha_t \odot (J \tanh x_{t-1} + d_t - x_{t-1}).

    Parameters
    ----------
    drive : Tensor, (time, *batch, hidden)
        d. Axes of the batch may have size one.
    initial : Tensor, (*batch, hidden)
        The state before the first of these bins.
    recurrent : Tensor, (*draw, hidden, hidden)
        J.
    leak : Tensor, (time or 1, *batch, hidden)
        :math:`\alpha`, between 0 and 1.
    gain, shift : Tensor, (time, *batch, hidden), optional
        a and b; 1 and 0 where None.

    References
    ----------
    Sompolinsky, Crisanti & Sommers, Phys. Rev. Lett. 61:259 (1988).
    """
    return _Leaky.apply(drive, initial, recurrent, leak, gain, shift)


class _Leaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, drive, initial, recurrent, leak, gain, shift):
        state = initial.expand(_batch(drive, initial, leak, gain, shift) + initial.shape[-1:]).contiguous()
        activity, target, states = (state.new_empty(len(drive), *state.shape) for _ in range(3))
        leaks = leak.expand(len(drive), *leak.shape[1:])
        weight = recurrent.mT
        first = state
        for t in range(len(drive)):
            tanh_(activity[t].copy_(state))
            torch.add(activity[t] @ weight, drive[t], out=target[t])
            torch.lerp(state, target[t], leaks[t].expand(state.shape), out=states[t])
            _move(states[t], t, gain, shift)
            state = states[t]
        ctx.save_for_backward(drive, initial, recurrent, leak, gain, shift, first, activity, target, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, for_states):
        drive, initial, recurrent, leak, gain, shift, first, activity, target, states = ctx.saved_tensors
        leaks = leak.expand(len(drive), *leak.shape[1:])
        for_drive, flowing = torch.empty_like(states), torch.empty_like(states)
        pulled = torch.empty_like(states) if gain is not None or shift is not None else None
        carry = torch.zeros_like(first)
        for t in range(len(states) - 1, -1, -1):
            slope = _slope(for_states[t] + carry, t, gain, pulled)
            flowing[t] = slope
            torch.mul(slope, leaks[t], out=for_drive[t])
            carry = slope - for_drive[t]
            carry.addcmul_(for_drive[t] @ recurrent, 1.0 - activity[t].square())
        before = torch.cat([first.unsqueeze(0), states[:-1]])
        for_leak = for_gain = for_shift = None
        if ctx.needs_input_grad[3]:
            for_leak = reduced(flowing * (target - before), leak)
        if gain is not None and pulled is not None:
            for_gain = reduced(pulled * torch.lerp(before, target, _spread(leaks, before)), gain)
        if shift is not None and pulled is not None:
            for_shift = reduced(pulled, shift)
        return (
            reduced(for_drive, drive) if ctx.needs_input_grad[0] else None,
            carry.sum_to_size(initial.shape),
            outer(for_drive, activity, recurrent) if ctx.needs_input_grad[2] else None,
            for_leak,
            for_gain,
            for_shift,
        )


def tanh_(values: Tensor) -> Tensor:
    """The hyperbolic tangent, in place: by the logistic function, which torch computes seven times as fast."""
    return values.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0)


def _batch(drive: Tensor, initial: Tensor, *others: Tensor | None) -> torch.Size:
    """The batch (*draw, trial) that all of these broadcast to."""
    shapes = [part.shape[1:-1] for part in (drive, *others) if part is not None]
    return broadcast_shapes(initial.shape[:-1], *shapes)


def _move(state: Tensor, t: int, gain: Tensor | None, shift: Tensor | None) -> None:
    """``a_t * state + b_t``, in place."""
    if gain is not None:
        state.mul_(gain[t])
    if shift is not None:
        state.add_(shift[t])


def _slope(slope: Tensor, t: int, gain: Tensor | None, pulled: Tensor | None) -> Tensor:
    """The slope in F of the slope in the state, which is kept for the gradients of gain and shift."""
    if pulled is not None:
        pulled[t] = slope
    return slope if gain is None else slope * gain[t]


def reduced(slopes: Tensor, part: Tensor) -> Tensor:
    """Slopes (time, *batch, row) summed over what ``part`` (time or 1, *some of the batch, row) was broadcast over."""
    missing = (1,) * (slopes.dim() - part.dim())
    return slopes.sum_to_size(part.shape[:1] + missing + part.shape[1:]).reshape(part.shape)


def _spread(part: Tensor, like: Tensor) -> Tensor:
    """``part`` (time, *some of the batch, row) over the whole batch."""
    missing = (1,) * (like.dim() - part.dim())
    return part.reshape(part.shape[:1] + missing + part.shape[1:]).expand(like.shape)


def outer(slopes: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """The sum over bins and trials of slopes (time, *draw, trial, out) times values (time, *draw, trial, in).

    With the draws of ``weight`` (*draw, row, in); draws that it does not have are summed, too.
    """
    if weight.dim() == 2:
        return slopes.flatten(0, -2).mT @ values.flatten(0, -2)
    slopes, values = (part.movedim(0, -3).flatten(-3, -2) for part in (slopes, values))
    found = slopes.mT @ values
    return found.sum_to_size(weight.shape[:-2] + found.shape[-2:])
