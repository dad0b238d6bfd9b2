"""The particle-corrected evidence against quadrature, and against the Laplace evidence it mends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pyrodyn.conditioning import gaussian_evidence
from pyrodyn.distributions import GaussMarkov
from pyrodyn.inference.particles import particle_evidence
from pyrodyn.readouts import AffineReadout, Bernoulli, Gaussian, NegativeBinomial, Poisson, Readout

READOUTS = [Poisson(), NegativeBinomial(), Bernoulli()]


def system(law: Readout, bins: int, units: int, trials: int = 1, seed: int = 0):
    """A one-dimensional latent with strong loadings: far enough from Gaussian for Laplace to be wrong."""
    torch.manual_seed(seed)
    one = torch.ones(1, 1, dtype=torch.float64)
    prior = GaussMarkov.from_dynamics(0.8 * one, 0.36 * one, num_bins=bins, initial_covariance=one)
    loading = 1.5 * torch.ones(units, 1, dtype=torch.float64)
    noise = None if law.noise_name is None else torch.full((units,), 2.0, dtype=torch.float64)
    path = prior.expand((trials,)).sample()
    readout = AffineReadout(law, path, loading, torch.full((units,), -0.5, dtype=torch.float64), noise)
    return prior, readout, readout.sample()


@pytest.mark.parametrize("law", READOUTS, ids=lambda law: type(law).__name__)
def test_equals_quadrature_over_two_bins(law: Readout) -> None:
    prior, readout, counts = system(law, bins=2, units=1)
    grid = torch.linspace(-9.0, 9.0, 801, dtype=torch.float64)
    states = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2, 1)
    log_terms = prior.log_prob(states) + law.log_prob(readout.predict(states), readout.noise, counts).sum((-2, -1))
    exact = log_terms.logsumexp(0) + 2.0 * math.log(grid[1] - grid[0])
    torch.manual_seed(1)
    corrected, laplace = particle_evidence(prior, readout, counts, particles=200_000)
    assert abs(float(laplace - exact)) > 0.005  # there is an error to mend
    assert abs(float(corrected - exact)) < 0.002


def test_few_particles_agree_with_many_and_resample() -> None:
    prior, readout, counts = system(Poisson(), bins=60, units=5, trials=4)
    torch.manual_seed(2)
    many, laplace = particle_evidence(prior, readout, counts, particles=20_000)
    few = np.array([particle_evidence(prior, readout, counts, particles=100)[0].numpy() for _ in range(40)])
    # The estimate is unbiased on the scale of p(y), not of its logarithm.
    mean = np.log(np.exp(few - many.numpy()).mean(0))
    error = np.exp(few - many.numpy()).std(0) / math.sqrt(len(few))
    assert (np.abs(mean) < 4 * error + 0.02).all()
    assert float((laplace - many).abs().max()) > 0.1


def test_nothing_to_mend_where_the_readout_is_gaussian() -> None:
    law = Gaussian()
    torch.manual_seed(3)
    one = torch.ones(1, 1, dtype=torch.float64)
    prior = GaussMarkov.from_dynamics(0.8 * one, 0.36 * one, num_bins=5, initial_covariance=one)
    half = torch.full((3,), 0.5, dtype=torch.float64)
    path = prior.expand((2,)).sample()
    mask = torch.rand(2, 5, 3) > 0.3
    readout = AffineReadout(law, path, torch.ones(3, 1, dtype=torch.float64), half, half, mask)
    values = torch.where(mask, readout.sample(), torch.nan)
    values = torch.where(mask, values, 0.0)
    corrected, laplace = particle_evidence(prior, readout, values, particles=10)
    exact = gaussian_evidence(prior, readout, values)
    assert torch.allclose(corrected, exact, atol=1e-9) and torch.allclose(laplace, exact, atol=1e-9)
