"""A chain that is the same in every bin but its ends: the kernel that comes to rest against the one that does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from pyrodyn.distributions import GaussMarkov
from pyrodyn.linalg.chain import _compiled, log_normaliser, spread_blocks, steady_log_normaliser

pytest.importorskip("numba")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steady(dim: int, *batch: int, modulus: float = 0.9, readout: float = 0.3) -> tuple[Tensor, Tensor]:
    """Blocks of the posterior precision of x_t = A x_(t-1) + noise, every bin observed through ``readout``."""
    turn = torch.linalg.qr(normal(dim, *batch, dim, dim))[0]
    dynamics, noise = modulus * turn, (1.0 - modulus**2) * torch.eye(dim, dtype=torch.float64)
    inverse = torch.linalg.inv(noise)
    ahead = dynamics.mT @ inverse @ dynamics
    own = normal(dim + 1, *batch, dim, dim)
    seen = readout * own @ own.mT
    eye = torch.eye(dim, dtype=torch.float64)
    blocks = torch.stack([eye + ahead + seen, inverse + ahead + seen, (inverse + seen).expand(ahead.shape)], -3)
    return blocks, -(dynamics.mT @ inverse).unsqueeze(-3)


def both(blocks: Tensor, upper: Tensor, linear: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients by the steady kernel and by the general one."""
    found = []
    for kernel in (steady_log_normaliser, lambda b, u, h: log_normaliser(*spread_blocks(b, u, h.shape[-2]), h)):
        leaves = [part.clone().requires_grad_() for part in (blocks, upper, linear)]
        value = kernel(*leaves)
        weight = normal(9, *value.shape)
        found.append([value.detach(), *torch.autograd.grad((weight * value).sum(), leaves)])
    return found[0], found[1]


def symmetric(gradients: list[Tensor]) -> list[Tensor]:
    value, blocks, upper, linear = gradients
    return [value, 0.5 * (blocks + blocks.mT), upper, linear]


@pytest.mark.parametrize("bins", [1, 2, 3, 4, 5, 60, 700])
@pytest.mark.parametrize(
    ("dim", "lead", "batch"), [(1, (), ()), (2, (3,), (3,)), (3, (2, 1), (2, 4)), (17, (1,), (2,))]
)
def test_value_and_gradient_equal_those_of_the_general_kernel(bins, dim, lead, batch):
    blocks, upper = steady(dim, *lead)
    found, expected = both(blocks, upper, normal(5, *batch, bins, dim))
    for mine, other in zip(symmetric(found), symmetric(expected), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize(("modulus", "readout"), [(0.999, 1e-4), (0.5, 10.0), (0.99999, 1e-8)])
def test_slow_and_fast_chains(modulus, readout):
    """Where a factor comes to rest slowly, stopping too early would be seen in the log determinant of 20,000 bins."""
    blocks, upper = steady(2, modulus=modulus, readout=readout)
    found, expected = both(blocks, upper, normal(5, 20_000, 2))
    for mine, other in zip(symmetric(found), symmetric(expected), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def test_the_factor_comes_to_rest():
    """Or the kernel would be right and slow: 30 slots serve 5,000 bins."""
    compiled = _compiled()
    assert compiled is not None
    blocks, upper = steady(3)
    value = compiled.SteadyLogNormaliser.apply(blocks[None], upper[None], normal(1, 1, 5000, 3, 1).requires_grad_())
    root, _, _, used = value.grad_fn.arrays
    assert int(used[0]) == root.shape[1] < 100


def test_gradcheck():
    blocks, upper = steady(2, 2)

    def of(mixed: Tensor, above: Tensor, linear: Tensor) -> Tensor:
        return steady_log_normaliser(0.5 * (mixed + mixed.mT), above, linear)

    leaves = [part.clone().requires_grad_() for part in (blocks, upper, normal(3, 2, 6, 2))]
    assert gradcheck(of, leaves, check_forward_ad=False)


def test_what_is_not_positive_definite_is_nan_and_harms_no_other():
    blocks, upper = steady(2, 3)
    blocks[1, 1] -= 10.0 * torch.eye(2, dtype=torch.float64)
    value = steady_log_normaliser(blocks, upper, normal(0, 3, 50, 2))
    assert torch.isfinite(value).tolist() == [True, False, True]


def test_a_chain_stays_steady_under_what_is_the_same_in_every_bin():
    eye = torch.eye(2, dtype=torch.float64)
    chain = GaussMarkov.from_dynamics(0.9 * eye, 0.19 * eye, num_bins=30, initial_covariance=eye)
    same, linear = 0.5 * eye.unsqueeze(-3), normal(0, 4, 30, 2)
    assert chain._steady is not None and chain.condition(same, linear)._steady is not None
    each = chain.condition(same.expand(30, 2, 2), linear)
    assert each._steady is None
    torch.testing.assert_close(chain.condition(same, linear).log_normaliser, each.log_normaliser)
    torch.testing.assert_close(chain.condition(same, linear).mean, each.mean)


@pytest.mark.parametrize("unit", [1.0, 1e3, 1e6])
def test_rest_does_not_depend_on_the_units_of_a_latent(unit):
    """One slow latent beside a fast one that is measured in other units."""
    dynamics = torch.diag(torch.tensor([0.999, 0.7], dtype=torch.float64))
    scale = torch.diag(torch.tensor([1.0, unit], dtype=torch.float64))
    noise = scale @ (torch.eye(2, dtype=torch.float64) - dynamics @ dynamics) @ scale
    chain = GaussMarkov.from_dynamics(dynamics, noise, num_bins=5000, initial_covariance=scale @ scale)
    own = (
        torch.linalg.inv(scale) @ torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64) @ torch.linalg.inv(scale)
    )
    posterior = chain.condition(own.unsqueeze(-3), normal(0, 5000, 2) @ torch.linalg.inv(scale))
    full = log_normaliser(posterior.diagonal, posterior.upper, posterior.linear)
    torch.testing.assert_close(posterior.log_normaliser, full, rtol=1e-11, atol=1e-7)
