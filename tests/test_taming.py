"""Dynamics scaled to a bounded spectral radius: the bound, the inverse, and the Jacobian by autograd."""

from __future__ import annotations

import pytest
import torch

from pyrodyn.linalg.taming import lagged_radius, log_tame_jacobian, tame, untame

SHAPES = [(1, 1), (3, 3), (2, 6)]


def free(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(5, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_radii_stay_below_the_limit_and_small_ones_stay_where_they_are(shape):
    drawn = free(shape)
    assert float(lagged_radius(drawn).max()) > 1.3
    assert float(lagged_radius(tame(drawn, 1.05)).max()) < 1.05
    # The map is flat far above the limit: there a few digits are left.
    torch.testing.assert_close(untame(tame(drawn, 1.05), 1.05), drawn, rtol=1e-3, atol=1e-8)
    near = drawn / lagged_radius(drawn)[:, None, None] ** (torch.arange(shape[1]) // shape[0] + 1)
    torch.testing.assert_close(untame(tame(near, 1.05), 1.05), near, rtol=1e-12, atol=1e-12)
    small = 0.1 * drawn
    torch.testing.assert_close(tame(small, 20.0), small, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_jacobian_is_that_of_autograd(shape):
    for drawn in free(shape, seed=1):
        size = drawn.numel()
        rows = []
        for i in range(size):  # differentiable once, so row by row
            leaf = drawn.clone().requires_grad_()
            rows.append(torch.autograd.grad(tame(leaf, 1.2).flatten()[i], leaf)[0].flatten())
        torch.testing.assert_close(log_tame_jacobian(drawn, 1.2), torch.stack(rows).det().abs().log())


def test_with_lags_it_is_the_radius_of_what_is_simulated():
    dynamics = free((2, 6), seed=2)[0]
    state, grown = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), []
    for _ in range(400):
        now = dynamics @ state
        state = torch.cat([now, state[:-2]])
        grown.append(state.norm().log())
        state = state / state.norm()
    rate = torch.stack(grown[200:]).mean().exp()
    torch.testing.assert_close(lagged_radius(dynamics), rate, rtol=0.01, atol=0.0)
