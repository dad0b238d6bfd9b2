"""Parameters in float32: the density of these very numbers, or an error; never a wrong digit without a word."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pyrodyn.conditioning import gaussian_evidence
from pyrodyn.distributions import GaussMarkov
from pyrodyn.errors import PrecisionError
from pyrodyn.readouts import AffineReadout, Gaussian

# Process noise, observation noise and modulus of the dynamics, of four latents, ten units and 1,000 bins. A filter in
# float32 is 82% wrong in the first cell of (1e-4, .5, .999), and says nothing.
GRID = tuple(itertools.product((1e-1, 1e-2, 1e-3, 1e-4), (0.5, 1e-2), (0.99, 0.999)))


def system(process_sd: float, noise_sd: float, modulus: float) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    loading = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    path = torch.zeros(1000, 4, dtype=torch.float64)
    kicks = process_sd * torch.randn(1000, 4, generator=generator, dtype=torch.float64)
    for t in range(1, 1000):
        path[t] = modulus * turn @ path[t - 1] + kicks[t]
    values = path @ loading.T + noise_sd * torch.randn(1000, 10, generator=generator, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    parameters = [modulus * turn, process_sd**2 * eye, loading, torch.zeros(10), torch.full((10,), noise_sd)]
    return [part.to(torch.float32) for part in parameters], values.unsqueeze(0)


def evidence(parameters: list[Tensor], values: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [part.clone().requires_grad_() for part in parameters]
    dynamics, process_noise, loading, offset, noise_sd = leaves
    prior = GaussMarkov.from_dynamics(
        dynamics, process_noise, num_bins=1000, initial_covariance=torch.eye(4, dtype=dynamics.dtype)
    )
    readout = AffineReadout(
        Gaussian(), torch.zeros(1, 1000, 4, dtype=dynamics.dtype), loading[None], offset[None], noise_sd[None]
    )
    value = gaussian_evidence(prior, readout, values).sum()
    return value.detach(), list(torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("cell", GRID, ids=str)
def test_the_stress_grid(cell):
    parameters, values = system(*cell)
    found, slopes = evidence(parameters, values)
    expected, exact = evidence([part.double() for part in parameters], values)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    for mine, other in zip(slopes, exact, strict=True):
        assert float((mine.double() - other).norm() / other.norm()) < 1e-3


def test_blocks_in_float32_are_refused():
    eye = torch.eye(2, dtype=torch.float32)
    with pytest.raises(PrecisionError, match=r"must be float64, got torch.float32.*from_dynamics"):
        GaussMarkov(eye.expand(5, 2, 2), torch.zeros(4, 2, 2), torch.zeros(5, 2))
