r"""Ordinary differential equations: fixed steps fast, adaptive steps by torchdiffeq.

Fixed steps of the classical Runge-Kutta scheme of order four go over the whole span at one pace, whatever the times
that are asked for; between its knots a path is the cubic through states and rates at both ends, of order four as well.
So the cost follows the dynamics and not the bins, and unequal times cost nothing.

For a drift with one hidden layer the scheme is fused: one node of autograd, whose backward pass is the exact adjoint of
the discrete scheme, written out. Its operations are few and in place, since at these sizes a call costs as much as its
arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrodyn.errors import ModelError, SolverError

__all__ = ["Adaptive", "FixedStep", "Integrator", "Network"]

METHODS = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "tsit5")


class Network(NamedTuple):
    r"""A field with one hidden layer, :math:`f(x) = A x + b + W^\top \tanh(V x + c)`.

    Attributes
    ----------
    slope : Tensor, (*draw, 1, latent, latent)
        :math:`A^\top`, acting on row vectors.
    level : Tensor, (*draw, 1, latent)
    hidden_weights : Tensor, (*draw, 1, hidden, latent)
    hidden_biases : Tensor, (*draw, 1, hidden)
    weights : Tensor, (*draw, 1, hidden, latent)
    """

    slope: Tensor
    level: Tensor
    hidden_weights: Tensor
    hidden_biases: Tensor
    weights: Tensor

    def __call__(self, state: Tensor) -> Tensor:
        """Rates of states (*draw, trial, latent)."""
        active = torch.tanh(state @ self.hidden_weights.squeeze(-3).mT + self.hidden_biases)
        return state @ self.slope.squeeze(-3) + self.level + active @ self.weights.squeeze(-3)


Field = Callable[[Tensor], Tensor]  # states (*draw, trial, latent) to rates


@dataclass(frozen=True)
class FixedStep:
    r"""The classical Runge-Kutta scheme of order four with cubic interpolation.

    Parameters
    ----------
    bins : float
        Longest step, in bins.

    Notes
    -----
    A state that runs off to infinity is NaN from there on, for its own trial and draw: a density can be refused where
    an error would end a run.
    """

    bins: float = 1.0

    def __post_init__(self) -> None:
        if not self.bins > 0:
            raise ModelError(f"bins must be positive, got {self.bins!r}")

    def solve(self, field: Field, initial: Tensor, times: Tensor, bin_width: float) -> Tensor:
        """States (*draw, trial, time, latent) at ``times`` (time), seconds, from ``initial`` at the first of them."""
        span = float(times[-1] - times[0])
        if span == 0.0:
            return initial.unsqueeze(-2)
        count = max(1, math.ceil(span / (self.bins * bin_width) - 1e-9))
        step = span / count
        if isinstance(field, Network):
            states, rates = _fused(field, initial, step, count)
        else:
            states, rates = _knots(field, initial, step, count)
        return _cubic(states, rates, step, times - times[0])


@dataclass(frozen=True)
class Adaptive:
    r"""Steps that hold an estimate of the error below a tolerance, by torchdiffeq.

    Parameters
    ----------
    method : str
        One of torchdiffeq's adaptive methods.
    rtol, atol : float
    adjoint : bool
        Whether gradients come from an equation backward in time, in little memory, and not from the stored steps.
    max_steps : int
        Before the equation is given up as stiff.

    Notes
    -----
    All trials and draws share their steps, so that draws scored together and one by one agree within the tolerances
    only.

    References
    ----------
    Chen, Rubanova, Bettencourt & Duvenaud, NeurIPS 2018.
    """

    method: str = "dopri5"
    rtol: float = 1e-6
    atol: float = 1e-6
    adjoint: bool = False
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ModelError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("rtol", "atol", "max_steps"):
            if not getattr(self, name) > 0:
                raise ModelError(f"{name} must be positive, got {getattr(self, name)!r}")

    def solve(self, field: Field, initial: Tensor, times: Tensor, bin_width: float) -> Tensor:
        """As of `FixedStep`.

        Raises
        ------
        SolverError
            Where the steps become too short or too many; names the trial, counted from 0, and the time.
        """
        if len(times) == 1:
            return initial.unsqueeze(-2)
        try:
            return self._solve(field, initial, times)
        except AssertionError as error:
            raise self._culprit(field, initial, times, error) from error

    def _solve(self, field: Field, initial: Tensor, times: Tensor) -> Tensor:
        import torchdiffeq

        options: dict[str, Any] = {"max_num_steps": self.max_steps}
        given: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol, "method": self.method, "options": options}
        if self.adjoint:
            held = tuple(part for part in _tensors(field) if part.requires_grad)
            solve = torchdiffeq.odeint_adjoint
            found: Any = solve(_Module(field), initial, times, adjoint_params=held, **given)
        else:
            found = torchdiffeq.odeint(lambda _, state: field(state), initial, times, **given)
        return found.movedim(0, -2)

    def _culprit(self, field: Field, initial: Tensor, times: Tensor, error: AssertionError) -> SolverError:
        """Which trial it was: each one by itself, with the last time at which it was still defined."""
        reached = [float(times[0])]
        import torchdiffeq

        for trial in range(initial.shape[-2]):
            state = initial.detach()[..., trial : trial + 1, :]

            def watched(time: Tensor, value: Tensor) -> Tensor:
                reached[0] = float(time)
                return field(value)

            try:
                with torch.no_grad():
                    torchdiffeq.odeint(
                        watched, state, times, rtol=self.rtol, atol=self.atol, method=self.method,
                        options={"max_num_steps": self.max_steps},
                    )  # fmt: skip
            except AssertionError:
                return SolverError(
                    f"the solver {self.method} gave up on trial {trial} (counted from 0) at time {reached[0]:.6g} s: "
                    f"{error}; the flow is stiff or runs off to infinity there: raise max_steps={self.max_steps} or "
                    f"rtol={self.rtol:g}, lower the scale of the drift, or use integrators.FixedStep()"
                )
        return SolverError(
            f"the solver {self.method} gave up on the {initial.shape[-2]} trials together, though on none alone: "
            f"{error}; raise max_steps={self.max_steps}"
        )


Integrator = FixedStep | Adaptive


def rk4_step(field: Field, state: Tensor, step: Any) -> Tensor:
    """One step of the classical Runge-Kutta scheme of order four, for states (..., latent)."""
    return _rk4(field, state, step)[0]


def _rk4(field: Field, state: Tensor, step: Any) -> tuple[Tensor, Tensor]:
    first = field(state)
    second = field(state + 0.5 * step * first)
    third = field(state + 0.5 * step * second)
    fourth = field(state + step * third)
    return state + step / 6.0 * (first + 2.0 * second + 2.0 * third + fourth), first


def _knots(field: Field, initial: Tensor, step: float, count: int) -> tuple[Tensor, Tensor]:
    """States and rates (knot, *draw, trial, latent) at all knots, recorded by autograd."""
    states, rates = [initial], []
    for _ in range(count):
        state, rate = _rk4(field, states[-1], step)
        states.append(state)
        rates.append(rate)
    rates.append(field(states[-1]))
    return torch.stack(states), torch.stack(rates)


def _cubic(states: Tensor, rates: Tensor, step: float, times: Tensor) -> Tensor:
    """Hermite's interpolation between knots (knot, *batch, latent): (*batch, time, latent)."""
    place = times / step
    left = place.floor().long().clamp(0, len(states) - 2)
    share = (place - left).reshape(-1, *(1,) * (states.dim() - 1))
    rest = 1.0 - share
    found = (1.0 + 2.0 * share) * rest.square() * states[left] + share.square() * (1.0 + 2.0 * rest) * states[left + 1]
    found = found + step * share * rest * (rest * rates[left] - share * rates[left + 1])
    return found.movedim(0, -2)


def _fused(network: Network, initial: Tensor, step: float, count: int) -> tuple[Tensor, Tensor]:
    """As `_knots`, by `_FusedKnots`: tanh u = 2 / (1 + exp(-2 u)) - 1 folds into the weights."""
    inner, outer = 2.0 * network.hidden_weights, 2.0 * network.weights
    level = network.level - network.weights.sum(-2)
    lead = initial.shape[:-2]
    draws = lead.numel()

    def flat(part: Tensor, event: int) -> Tensor:
        kept = part.shape[part.dim() - event :]
        wide = part if part.dim() == event else part.expand(*lead, 1, *kept)
        return wide.expand(*lead, *(1,) * (wide.dim() > event), *kept).reshape(draws, *kept)

    parts = (
        initial.reshape(draws, *initial.shape[-2:]),
        flat(network.slope, 2),
        flat(level, 1),
        flat(inner, 2),
        flat(2.0 * network.hidden_biases, 1),
        flat(outer, 2),
    )
    states, rates = _FusedKnots.apply(*parts, step, count)
    return tuple(part.reshape(count + 1, *initial.shape) for part in (states, rates))  # type: ignore[return-value]


class _FusedKnots(torch.autograd.Function):
    r"""Knots of :math:`f(x) = x A + b + \sigma(x V^\top + c) W`, :math:`\sigma` logistic: it is the fastest of all.

    What the backward pass needs is kept: the states and activities of every evaluation. It is the transpose of the
    scheme, stage by stage from the last; gradients of weights are two products over all evaluations at the end.
    """

    @staticmethod
    def forward(ctx, initial: Tensor, slope: Tensor, level: Tensor, inner: Tensor, bias: Tensor, outer: Tensor,
                step: float, count: int):  # fmt: skip
        ctx.single = len(initial) == 1  # products of matrices are faster than of batches of one
        squeeze = (lambda part: part[0]) if ctx.single else (lambda part: part)
        product = torch.addmm if ctx.single else torch.baddbmm
        x, slope, outer = squeeze(initial), squeeze(slope), squeeze(outer)
        inner_t = squeeze(inner).mT.contiguous()
        level, bias = (part[0] if ctx.single else part.unsqueeze(1) for part in (level, bias))
        hidden = outer.shape[-2]
        number = 4 * count + 1
        seen = x.new_empty(number, *x.shape)
        active = x.new_empty(number, *x.shape[:-1], hidden)
        rates = x.new_empty(count + 1, *x.shape)
        stages = list(x.new_empty(4, *x.shape).unbind(0))
        states, units = seen.unbind(0), active.unbind(0)

        def evaluate(i: int, out: Tensor) -> Tensor:
            z = units[i]
            product(bias, states[i], inner_t, out=z)
            torch.sigmoid(z, out=z)
            product(level, z, outer, out=out)
            return product(out, states[i], slope, out=out)

        states[0].copy_(x)
        for n in range(count):
            i = 4 * n
            first = evaluate(i, rates[n])
            behind = first
            for stage, share in ((1, 0.5), (2, 0.5), (3, 1.0)):
                torch.add(states[i], behind, alpha=share * step, out=states[i + stage])
                behind = evaluate(i + stage, stages[stage])
            total = stages[1].add_(stages[2]).mul_(2.0).add_(first).add_(stages[3])
            torch.add(states[i], total, alpha=step / 6.0, out=states[i + 4])
        evaluate(number - 1, rates[-1])
        ctx.kept, ctx.step, ctx.count = (seen, active, slope, inner_t, outer), step, count
        knots = seen[::4].clone()
        if ctx.single:
            return knots.unsqueeze(1), rates.unsqueeze(1)
        return knots, rates

    @staticmethod
    @once_differentiable
    def backward(ctx, for_states: Tensor, for_rates: Tensor):
        seen, active, slope, inner_t, outer = ctx.kept
        step, count = ctx.step, ctx.count
        product = torch.addmm if ctx.single else torch.baddbmm
        multiply = torch.mm if ctx.single else torch.bmm
        if ctx.single:
            for_states, for_rates = for_states.squeeze(1), for_rates.squeeze(1)
        inner, outer_t, slope_t = inner_t.mT.contiguous(), outer.mT.contiguous(), slope.mT.contiguous()
        pulled = torch.empty_like(seen)  # of every evaluation's rate
        inside = torch.empty_like(active)  # of every evaluation's hidden units, before the logistic function
        units, pulls, insides = active.unbind(0), pulled.unbind(0), inside.unbind(0)
        through = torch.empty_like(for_states[0])

        def back(i: int) -> Tensor:
            """The gradient in an evaluation's state."""
            z = insides[i]
            multiply(pulls[i], outer_t, out=z)
            torch.ops.aten.sigmoid_backward.grad_input(z, units[i], grad_input=z)
            multiply(z, inner, out=through)
            return product(through, pulls[i], slope_t, out=through)

        pulls[-1].copy_(for_rates[-1])
        total = for_states[-1] + back(len(seen) - 1)
        for n in reversed(range(count)):
            i = 4 * n
            torch.mul(total, step / 6.0, out=pulls[i + 3])
            ahead = total + back(i + 3)
            for stage, share in ((2, 1.0), (1, 0.5), (0, 0.5)):
                weight = step / 6.0 if stage == 0 else step / 3.0
                torch.mul(total, weight, out=pulls[i + stage]).add_(through, alpha=share * step)
                if stage == 0:
                    pulls[i].add_(for_rates[n])
                ahead.add_(back(i + stage))
            total = ahead.add_(for_states[n])

        def over_all(left: Tensor, right: Tensor) -> Tensor:
            """Sum over evaluations and trials of outer products, (draw, left, right)."""
            if ctx.single:
                return (left.flatten(0, 1).mT @ right.flatten(0, 1)).unsqueeze(0)
            return left.movedim(0, 1).flatten(1, 2).mT @ right.movedim(0, 1).flatten(1, 2)

        def summed(part: Tensor) -> Tensor:
            whole = part.sum((0, -2))
            return whole.unsqueeze(0) if ctx.single else whole

        for_initial = total.unsqueeze(0) if ctx.single else total
        return (
            for_initial, over_all(seen, pulled), summed(pulled), over_all(inside, seen), summed(inside),
            over_all(active, pulled), None, None,
        )  # fmt: skip


class _Module(torch.nn.Module):
    """A field as torchdiffeq's adjoint wants it."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self._field = (field,)

    def forward(self, time: Tensor, state: Tensor) -> Tensor:
        return self._field[0](state)


def _tensors(field: Field) -> list[Tensor]:
    """The tensors that a field holds, for the adjoint."""
    if isinstance(field, tuple):
        return [part for part in field if isinstance(part, Tensor)]
    held = getattr(field, "tensors", None)
    return list(held) if held is not None else []
