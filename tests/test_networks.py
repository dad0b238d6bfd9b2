"""Fused recurrences and noisy networks against the step by step definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from pyrodyn.distributions import NonlinearMarkov
from pyrodyn.networks import Gated, Leaky, LowRank
from pyrodyn.networks.cells import BoundCell, CellWeights
from pyrodyn.networks.controlled import Loop, controlled_scan
from pyrodyn.networks.layers import product
from pyrodyn.networks.scans import gated_scan, leaky_scan, tanh_

CELLS = (Gated(), Leaky(), LowRank(rank=2))
BINS, LATENT, TRIALS = 6, 3, 4


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def one_gated_step(state, drive, recurrent, bias):
    """The unit as torch's own cell has it, gate by gate."""
    hidden = state.shape[-1]
    own = (recurrent @ state.unsqueeze(-1)).squeeze(-1)
    reset, update = (torch.sigmoid(drive[..., i : i + hidden] + own[..., i : i + hidden]) for i in (0, hidden))
    new = torch.tanh(drive[..., 2 * hidden :] + reset * (own[..., 2 * hidden :] + bias))
    return (1.0 - update) * new + update * state


def one_leaky_step(state, drive, recurrent, leak):
    return (1.0 - leak) * state + leak * ((recurrent @ torch.tanh(state).unsqueeze(-1)).squeeze(-1) + drive)


def scan_arguments(kind: str, draws: tuple[int, ...], shared: bool, gain: bool, shift: bool) -> list[Tensor | None]:
    """Arguments of a scan; ``shared`` weights have no draws, and the drive is the same for all trials."""
    g = torch.Generator().manual_seed(len(draws) + 2 * shared)
    rows = 3 * LATENT if kind == "gated" else LATENT
    of_weight = () if shared else draws
    initial = normal(g, *draws, TRIALS, LATENT)
    drive = normal(g, BINS, *((1,) * len(draws)), 1, rows) if shared else normal(g, BINS, *draws, TRIALS, rows)
    recurrent = normal(g, *of_weight, rows, LATENT)
    other = normal(g, *of_weight, *(() if shared else (1,)), LATENT)
    if kind == "leaky":  # axes of the batch may be missing
        other = torch.sigmoid(normal(g, 1 if shared and draws else BINS, *((1,) * (len(draws) + 1 - shared)), 1))
    a = normal(g, BINS, *draws, TRIALS, LATENT) if gain else None
    b = normal(g, BINS, *draws, TRIALS, LATENT) if shift else None
    return [drive, initial, recurrent, other, a, b]


def by_steps(kind: str, drive, initial, recurrent, other, gain, shift) -> Tensor:
    state, states = initial, []
    for t in range(BINS):
        weight = recurrent if recurrent.dim() == 2 else recurrent.unsqueeze(-3)
        if kind == "gated":
            state = one_gated_step(state, drive[t], weight, other)
        else:
            state = one_leaky_step(state, drive[t], weight, other[t if len(other) > 1 else 0])
        state = state if gain is None else gain[t] * state
        state = state if shift is None else state + shift[t]
        states.append(state)
    return torch.stack(states)


@pytest.mark.parametrize("kind", ["gated", "leaky"])
@pytest.mark.parametrize("draws", [(), (2,), (2, 3)])
@pytest.mark.parametrize(("shared", "gain", "shift"), [(True, False, False), (False, True, True), (False, False, True)])
def test_a_scan_and_its_gradient_equal_autograd_through_the_steps(kind, draws, shared, gain, shift):
    arguments = [part if part is None else part.requires_grad_() for part in
                 scan_arguments(kind, draws, shared, gain, shift)]  # fmt: skip
    inputs = [part for part in arguments if part is not None]
    expected = by_steps(kind, *arguments)
    found = (gated_scan if kind == "gated" else leaky_scan)(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slope = normal(torch.Generator().manual_seed(1), *expected.shape)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, slope), torch.autograd.grad(expected, inputs, slope),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", ["gated", "leaky"])
def test_a_scan_passes_gradcheck(kind):
    arguments = [part.requires_grad_() for part in scan_arguments(kind, (2,), False, True, True)]
    assert gradcheck(gated_scan if kind == "gated" else leaky_scan, arguments, eps=1e-6, atol=1e-6, rtol=1e-4)


def test_the_gated_scan_is_torchs_gru():
    g = torch.Generator().manual_seed(0)
    peer = torch.nn.GRU(2, LATENT, dtype=torch.float64)
    values, initial = normal(g, BINS, TRIALS, 2), normal(g, TRIALS, LATENT)
    bias, own = peer.bias_ih_l0, peer.bias_hh_l0
    drive = values @ peer.weight_ih_l0.mT + bias + torch.cat([own[: 2 * LATENT], torch.zeros(LATENT)])
    found = gated_scan(drive, initial, peer.weight_hh_l0, own[2 * LATENT :])
    torch.testing.assert_close(found, peer(values, initial[None])[0], rtol=1e-12, atol=1e-12)


def test_the_fast_tangent_is_the_tangent():
    values = torch.cat([torch.linspace(-20, 20, 401, dtype=torch.float64), torch.tensor([0.0, 1e-9, 800.0, -800.0])])
    torch.testing.assert_close(tanh_(values.clone()), torch.tanh(values), rtol=0, atol=5e-16)


# ------------------------------------------------------------------------------------------ cells and paths


def weights_of(cell, draws: tuple[int, ...], inputs: int, seed: int = 0) -> CellWeights:
    g = torch.Generator().manual_seed(seed)
    lead = (*draws, 1) if draws else ()
    rows = cell.gates * LATENT
    low = isinstance(cell, LowRank)
    return CellWeights(
        normal(g, *lead, rows, cell.rank if low else LATENT),
        normal(g, *lead, LATENT, cell.rank) if low else None,
        normal(g, *lead, rows),
        normal(g, *lead, LATENT) if isinstance(cell, Gated) else None,
        None if isinstance(cell, Gated) else normal(g, *lead).exp(),
        normal(g, *lead, rows, inputs) if inputs else None,
    )


def path_law(cell, draws: tuple[int, ...] = (), inputs: int = 2, seed: int = 0) -> NonlinearMarkov:
    g = torch.Generator().manual_seed(seed + 10)
    lead = (*draws, 1) if draws else ()
    weights = weights_of(cell, draws, inputs, seed)
    steps = torch.linspace(0.5, 1.5, BINS - 1, dtype=torch.float64)
    bound = cell.bind(weights, normal(g, TRIALS, BINS - 1, inputs) if inputs else None, steps)
    noise = cell.noise_scale(weights, steps) * normal(g, *lead, LATENT).exp().unsqueeze(-2)
    return NonlinearMarkov(
        bound, normal(g, *lead, LATENT), normal(g, *lead, LATENT).exp(), noise, num_bins=BINS
    )  # fmt: skip


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: type(cell).__name__)
@pytest.mark.parametrize("draws", [(), (2,), (2, 3)])
@pytest.mark.parametrize("inputs", [0, 2])
def test_one_step_at_all_bins_is_the_scan_bin_by_bin(cell, draws, inputs):
    law = path_law(cell, draws, inputs)
    assert law.batch_shape == (*draws, TRIALS if inputs else 1) or (not draws and not inputs)
    path = law.expand((*draws, TRIALS)).sample()
    bound = law.transition
    assert isinstance(bound, BoundCell)
    path[..., 1:, :] = bound.scan(path[..., 0, :], None, None)
    torch.testing.assert_close(bound.advance(path[..., :-1, :]), path[..., 1:, :], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: type(cell).__name__)
def test_a_path_and_its_noise_are_one_to_one_and_carry_the_density(cell):
    law = path_law(cell, (3,)).expand((3, TRIALS))
    noise = normal(torch.Generator().manual_seed(3), 3, TRIALS, BINS, LATENT)
    path = law.transform(noise)
    torch.testing.assert_close(law.noise_of(path), noise, rtol=1e-9, atol=1e-9)
    # The map is triangular in time, so its Jacobian is that of the noise alone.
    volume = law.initial_sd.log().sum(-1) + law.noise_sd.log().expand(3, 1, BINS - 1, LATENT).sum((-2, -1))
    standard = -0.5 * noise.square().sum((-2, -1)) - 0.5 * BINS * LATENT * math.log(2.0 * math.pi)
    torch.testing.assert_close(law.log_prob(path), standard - volume, rtol=1e-10, atol=1e-10)


def test_a_filtered_path_multiplies_every_step_by_its_potential():
    """Against the normalised product of one step's density and its potential, on a grid."""
    cell = Leaky()
    law = path_law(cell, inputs=0)
    g = torch.Generator().manual_seed(5)
    precision, linear = normal(g, TRIALS, BINS, LATENT).square(), normal(g, TRIALS, BINS, LATENT)
    found = law.filtered(precision, linear)
    path = found.expand((TRIALS,)).sample()
    grid = torch.linspace(-30, 30, 20001, dtype=torch.float64)
    total = torch.zeros(TRIALS, dtype=torch.float64)
    centre = law.transition.advance(path[:, :-1])
    for i in range(TRIALS):
        for t in range(BINS):
            for k in range(LATENT):
                mean = law.initial_mean[k] if t == 0 else centre[i, t - 1, k]
                sd = law.initial_sd[k] if t == 0 else law.noise_sd[t - 1, k]

                def kernel(x, mean=mean, sd=sd, i=i, t=t, k=k):
                    return (-0.5 * ((x - mean) / sd) ** 2 - 0.5 * precision[i, t, k] * x**2 + linear[i, t, k] * x).exp()

                total[i] += (kernel(path[i, t, k]) / torch.trapezoid(kernel(grid), grid)).log()
    torch.testing.assert_close(found.log_prob(path), total, rtol=1e-8, atol=1e-8)
    nothing = law.filtered(torch.zeros(BINS, LATENT), torch.zeros(BINS, LATENT))
    torch.testing.assert_close(nothing.log_prob(path), law.log_prob(path), rtol=1e-12, atol=1e-12)


def test_irregular_bins_of_a_leaky_network_compose():
    """Without coupling, one long step has the mean and the variance of two short ones."""
    cell = Leaky()
    weights = weights_of(cell, (), 0)._replace(recurrent=torch.zeros(LATENT, LATENT, dtype=torch.float64))
    one, two = (torch.tensor(steps, dtype=torch.float64) for steps in ([1.1], [0.4, 0.7]))
    start = normal(torch.Generator().manual_seed(0), LATENT)
    long, short = (cell.bind(weights, None, steps).scan(start, None, None) for steps in (one, two))
    torch.testing.assert_close(long[-1], short[-1], rtol=1e-12, atol=1e-12)
    kept = torch.exp(-0.7 / weights.time_constant)
    variances = [cell.noise_scale(weights, steps).square().squeeze() for steps in (one, two)]
    torch.testing.assert_close(variances[0], kept**2 * variances[1][0] + variances[1][1], rtol=1e-12, atol=1e-12)


def test_a_product_with_drawn_weights_is_that_of_every_draw():
    g = torch.Generator().manual_seed(0)
    weight, values, plain = normal(g, 2, 3, 1, 5, 4), normal(g, 2, 3, TRIALS, BINS, 4), normal(g, TRIALS, BINS, 4)
    found, shared = product(values, weight), product(plain, weight)
    for i, j in np.ndindex(2, 3):
        torch.testing.assert_close(found[i, j], values[i, j] @ weight[i, j, 0].mT)
        torch.testing.assert_close(shared[i, j], plain @ weight[i, j, 0].mT)
    torch.testing.assert_close(product(plain, weight[0, 0, 0]), plain @ weight[0, 0, 0].mT)


# ------------------------------------------------------------------------------------------ a generator under control

CONTROL, GENERATOR, INPUTS = 2, 3, 2


def loop_of(draws: tuple[int, ...], drawn_weights: bool) -> Loop:
    g = torch.Generator().manual_seed(7)
    lead = draws if drawn_weights else ()
    return Loop(
        drive=normal(g, BINS, *((1,) * len(draws)), TRIALS, 3 * CONTROL),
        feedback=normal(g, *lead, 3 * CONTROL, GENERATOR),
        recurrent=normal(g, 3 * CONTROL, CONTROL),
        bias=normal(g, CONTROL),
        head=normal(g, 2 * INPUTS, CONTROL),
        head_bias=normal(g, 2 * INPUTS),
        start=normal(g, CONTROL),
        generator_drive=normal(g, 1, *lead, *((1,) if lead else ()), 3 * GENERATOR),
        input_weight=normal(g, *lead, 3 * GENERATOR, INPUTS),
        generator_recurrent=normal(g, *lead, 3 * GENERATOR, GENERATOR),
        generator_bias=normal(g, *lead, *((1,) if lead else ()), GENERATOR),
        initial=normal(g, *draws, TRIALS, GENERATOR),
    )


def loop_by_steps(loop: Loop, noise: Tensor, given: Tensor | None):
    def wide(weight: Tensor) -> Tensor:
        return weight if weight.dim() == 2 else weight.unsqueeze(-3)

    def times(weight: Tensor, value: Tensor) -> Tensor:
        return (wide(weight) @ value.unsqueeze(-1)).squeeze(-1)

    control, state = loop.start, loop.initial
    found = []
    for t in range(BINS):
        control = one_gated_step(control, loop.drive[t] + times(loop.feedback, state), loop.recurrent, loop.bias)
        mean, log_sd = (times(loop.head, control) + loop.head_bias).chunk(2, -1)
        value = mean + log_sd.exp() * noise[t] if given is None else given[t]
        drive = loop.generator_drive[0] + times(loop.input_weight, value)
        state = one_gated_step(state, drive, wide(loop.generator_recurrent), loop.generator_bias)
        found.append((value, mean, log_sd, state))
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("draws", "drawn"), [((), False), ((2,), False), ((2, 3), True)])
def test_the_loop_and_its_gradient_equal_autograd_through_the_steps(given, draws, drawn):
    g = torch.Generator().manual_seed(1)
    loop = Loop(*(part.requires_grad_() for part in loop_of(draws, drawn)))
    noise = normal(g, BINS, *draws, TRIALS, INPUTS)
    held = normal(g, BINS, *draws, TRIALS, INPUTS).requires_grad_() if given else None
    found, expected = controlled_scan(loop, noise, held), loop_by_steps(loop, noise, held)
    slopes = [normal(g, *part.shape) for part in expected]
    inputs = [*loop, held] if given else list(loop)
    totals = [
        sum((slope * part).sum() for slope, part in zip(slopes, parts, strict=True)) for parts in (found, expected)
    ]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name, ours, theirs in zip(
        [*Loop._fields, "given"], *(torch.autograd.grad(total, inputs) for total in totals), strict=False
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
