r"""A generator whose inputs a controller infers while it runs: two gated units in a loop, over all bins in one call.

In every bin the controller reads what an encoder says of the bin and what the generator's state was, and gives the law
of an input; a draw of it drives the generator:

.. math::
    c_t &= \mathrm{GRU}(c_{t-1};\, d^c_t + M g_{t-1}), \qquad (m_t, \log s_t) = H c_t + h, \\
    u_t &= m_t + s_t \odot \epsilon_t, \qquad g_t = \mathrm{GRU}(g_{t-1};\, d^g_t + V u_t).

Tensors are time-major, (time, *batch, ...), ``*batch`` being (*draw, trial).

Reference: Pandarinath et al., Nat. Methods 15:805 (2018).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrodyn.linalg.matrix import broadcast_shapes
from pyrodyn.networks.scans import gated_slopes, gated_step, outer, reduced


class Loop(NamedTuple):
    """What a controlled generator is made of; weights are (*draw, ...) or have no draws, and the controller has none.

    Attributes
    ----------
    drive : Tensor, (time, *batch, 3 controller)
        :math:`d^c`, from the encoder.
    feedback : Tensor, (*draw, 3 controller, generator)
        M.
    recurrent, bias : Tensor, (3 controller, controller) and (controller)
        Of the controller.
    head, head_bias : Tensor, (2 input, controller) and (2 input)
        H and h.
    start : Tensor, (controller)
        The controller before the first bin.
    generator_drive : Tensor, (time, *batch, 3 generator)
        :math:`d^g`; axes may have size one.
    input_weight : Tensor, (*draw, 3 generator, input)
        V.
    generator_recurrent, generator_bias : Tensor, (*draw, 3 generator, generator) and (*draw, 1, generator)
    initial : Tensor, (*batch, generator)
        The generator before the first bin.
    """

    drive: Tensor
    feedback: Tensor
    recurrent: Tensor
    bias: Tensor
    head: Tensor
    head_bias: Tensor
    start: Tensor
    generator_drive: Tensor
    input_weight: Tensor
    generator_recurrent: Tensor
    generator_bias: Tensor
    initial: Tensor


def controlled_scan(
    loop: Loop, noise: Tensor | None, given: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Inputs, their means and log standard deviations (time, *batch, input), and generator states after each bin.

    Parameters
    ----------
    loop : Loop
    noise : Tensor, (time, *batch, input)
        :math:`\epsilon`.
    given : Tensor, (time, *batch, input), optional
        Inputs in place of draws; ``noise`` is then not looked at.
    """
    return _Controlled.apply(noise, given, *loop)  # type: ignore[return-value]


class _Controlled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, noise, given, *parts):
        loop = Loop(*parts)
        driver = noise if given is None else given
        time, batch, size = len(driver), driver.shape[1:-1], driver.shape[-1]
        control = loop.start.expand(*batch, loop.start.shape[-1]).contiguous()
        state = loop.initial.expand(*batch, loop.initial.shape[-1]).contiguous()
        kept_c, kept_g = _room(control, time), _room(state, time)
        inputs = driver.new_empty(driver.shape)
        laws = driver.new_empty(time, *batch, 2 * size)
        both = torch.cat(_matched(loop.feedback, loop.generator_recurrent), -2).mT
        of_control, of_input, head = loop.recurrent.mT, loop.input_weight.mT, loop.head.mT
        rows = loop.drive.shape[-1]
        first = control, state
        for t in range(time):
            product = state @ both
            made = tuple(part[t] for part in kept_c)
            gated_step(loop.drive[t] + product[..., :rows], control @ of_control, loop.bias, control, made)
            control = made[-1]
            torch.add(control @ head, loop.head_bias, out=laws[t])
            if given is None:
                mean, log_sd = laws[t].chunk(2, -1)
                torch.addcmul(mean, log_sd.exp(), noise[t], out=inputs[t])
            else:
                inputs[t] = given[t]
            made = tuple(part[t] for part in kept_g)
            drive = loop.generator_drive[t if len(loop.generator_drive) > 1 else 0] + inputs[t] @ of_input
            gated_step(drive, product[..., rows:], loop.generator_bias, state, made)
            state = made[-1]
        mean, log_sd = laws.chunk(2, -1)
        ctx.given = given is not None
        ctx.save_for_backward(noise, inputs, laws, *first, *kept_c, *kept_g, *parts)
        return inputs, mean.contiguous(), log_sd.contiguous(), kept_g[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, for_inputs, for_mean, for_log_sd, for_states):
        noise, inputs, laws, control, state, *rest = ctx.saved_tensors
        kept_c, kept_g, loop = rest[:4], rest[4:8], Loop(*rest[8:])
        time, batch = len(inputs), inputs.shape[1:-1]
        rows, hidden, size = loop.drive.shape[-1], state.shape[-1], inputs.shape[-1]
        for_drive_c, for_inner_c = state.new_empty(time, *batch, rows), torch.empty_like(kept_c[-1])
        for_drive_g, for_inner_g = state.new_empty(time, *batch, 3 * hidden), torch.empty_like(kept_g[-1])
        for_laws = torch.cat([for_mean, for_log_sd], -1)
        for_given = torch.empty_like(inputs)
        sd = laws[..., size:].exp()
        carry_c, carry_g = torch.zeros_like(control), torch.zeros_like(state)
        gates_g, new_g = loop.generator_recurrent[..., : 2 * hidden, :], loop.generator_recurrent[..., 2 * hidden :, :]
        two = 2 * control.shape[-1]
        for t in range(time - 1, -1, -1):
            before_c, before_g = (kept_c[-1][t - 1], kept_g[-1][t - 1]) if t else (control, state)
            made = tuple(part[t] for part in kept_g[:3])
            kept = gated_slopes(for_states[t] + carry_g, before_g, made, for_drive_g[t], for_inner_g[t])
            slope = torch.add(for_inputs[t], for_drive_g[t] @ loop.input_weight, out=for_given[t])
            if not ctx.given:
                for_laws[t, ..., :size] += slope
                for_laws[t, ..., size:] += slope * sd[t] * noise[t]
            made = tuple(part[t] for part in kept_c[:3])
            slope = for_laws[t] @ loop.head + carry_c
            carry_c = gated_slopes(slope, before_c, made, for_drive_c[t], for_inner_c[t])
            carry_c = carry_c + for_drive_c[t, ..., :two] @ loop.recurrent[:two]
            carry_c += for_inner_c[t] @ loop.recurrent[two:]
            carry_g = kept + for_drive_c[t] @ loop.feedback
            carry_g += for_drive_g[t, ..., : 2 * hidden] @ gates_g
            carry_g += for_inner_g[t] @ new_g
        befores_c = torch.cat([control.unsqueeze(0), kept_c[-1][:-1]])
        befores_g = torch.cat([state.unsqueeze(0), kept_g[-1][:-1]])
        slopes = Loop(
            drive=reduced(for_drive_c, loop.drive),
            feedback=outer(for_drive_c, befores_g, loop.feedback),
            recurrent=_gated_outer(for_drive_c, for_inner_c, befores_c, loop.recurrent),
            bias=for_inner_c.sum_to_size(loop.bias.shape),
            head=outer(for_laws, kept_c[-1], loop.head),
            head_bias=for_laws.sum_to_size(loop.head_bias.shape),
            start=carry_c.sum_to_size(loop.start.shape),
            generator_drive=reduced(for_drive_g, loop.generator_drive),
            input_weight=outer(for_drive_g, inputs, loop.input_weight),
            generator_recurrent=_gated_outer(for_drive_g, for_inner_g, befores_g, loop.generator_recurrent),
            generator_bias=for_inner_g.sum_to_size(loop.generator_bias.shape),
            initial=carry_g.sum_to_size(loop.initial.shape),
        )
        return None, for_given if ctx.given else None, *slopes


def _room(state: Tensor, time: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For what `gated_step` writes in all bins."""
    gates = state.new_empty(time, *state.shape[:-1], 2 * state.shape[-1])
    inner, new, states = (state.new_empty(time, *state.shape) for _ in range(3))
    return gates, inner, new, states


def _matched(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights (*draw, row, hidden) with the draws of both."""
    lead = broadcast_shapes(first.shape[:-2], second.shape[:-2])
    return first.expand(lead + first.shape[-2:]), second.expand(lead + second.shape[-2:])


def _gated_outer(for_drive: Tensor, for_inner: Tensor, before: Tensor, weight: Tensor) -> Tensor:
    two = 2 * before.shape[-1]
    return torch.cat([outer(for_drive[..., :two], before, weight), outer(for_inner, before, weight)], -2)
