"""The prior of coupled dynamics: its layout, its map to stable systems, its samples, and stationary quantities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.distributions import biject_to

from pyrodyn.distributions.network import LEVEL_PERSISTENCE, NetworkPrior, log_stability, network_layout
from pyrodyn.errors import ModelError
from pyrodyn.inference.engine import random_stream
from pyrodyn.linalg.stationary import (
    block_strength,
    noise_by_group,
    spectral_radius,
    stationary_covariance,
    variance_shares,
)

LAYOUT = network_layout((2, 1), 1, True, ((0, 1), (1, 0)))


def prior(sd: float = 0.3, probability: float = 0.4, layout=LAYOUT) -> NetworkPrior:
    size = len(layout.edge)
    mean = torch.where(layout.rows == layout.columns, 0.5, 0.0).double()
    return NetworkPrior(
        layout, mean, torch.full((size,), sd).double(), torch.full((len(layout.edges),), probability).double()
    )


def draws(count: int, scale: float = 1.0) -> torch.Tensor:
    with random_stream(1):
        return scale * torch.randn(count, len(LAYOUT.edge), dtype=torch.float64)


def test_a_vector_and_its_matrix_are_the_same():
    vector = draws(4)
    matrix = LAYOUT.matrix(vector)
    assert torch.equal(LAYOUT.vector(matrix), vector)
    assert matrix.shape == (4, 5, 5) and bool((matrix[:, -1, -1] == LEVEL_PERSISTENCE).all())
    # Nothing enters what is common to all regions.
    assert not bool(matrix[:, 3:, :3].any()) and not bool(matrix[:, 3, 4].any())
    assert sorted(set(LAYOUT.group.tolist())) == [-2, -1, 0, 1]


def test_the_map_to_stable_systems_has_an_inverse_and_its_jacobian():
    transform = biject_to(prior().support)
    for scale in (0.1, 0.5, 1.0):
        x = draws(5, scale)
        y = transform(x)
        assert bool(torch.isfinite(log_stability(LAYOUT.matrix(y), LAYOUT)).all())
        if scale < 1.0:  # far outside the stable systems, digits of the inverse are lost
            torch.testing.assert_close(transform.inv(y), x, rtol=1e-8, atol=1e-8)
        for i, row in enumerate(x):
            jacobian = torch.autograd.functional.jacobian(lambda v: transform(v.unsqueeze(0))[0], row)
            found = transform.log_abs_det_jacobian(x, y)[i]
            torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], found, rtol=1e-6, atol=1e-8)
    near = 0.1 * draws(1)
    torch.testing.assert_close(transform(near), near, rtol=1e-6, atol=1e-9)  # slow systems are hardly moved
    absent = draws(3)
    absent[:, LAYOUT.edge == 0] = 0.0
    assert not bool(transform(absent)[:, LAYOUT.edge == 0].any())


def test_the_prior_rejects_jointly_and_scores_what_it_samples():
    """Frequencies of the four graphs against importance weights, under a prior that is often unstable."""
    law = prior(sd=0.6)
    with random_stream(3):
        sampled = law.sample((4000,))
    assert bool(torch.isfinite(law.log_prob(sampled)).all())
    graphs = [(a, b) for a in (False, True) for b in (False, True)]
    found = law.present(sampled)
    frequency = [float((found == torch.tensor(graph)).all(-1).double().mean()) for graph in graphs]
    with random_stream(4):
        free = law.mean_entry + law.sd_entry * torch.randn(20000, len(LAYOUT.edge), dtype=torch.float64)
    mass = []
    for graph in graphs:
        there = torch.tensor([*graph, True])[LAYOUT.edge]
        stable = law.log_stability(torch.where(there, free, 0.0)).exp().mean()
        mass.append(float(stable) * math.prod(0.4 if here else 0.6 for here in graph))
    expected = np.array(mass) / sum(mass)
    assert max(mass) / sum(mass) < 0.5  # the truncation changes the frequencies of graphs
    np.testing.assert_allclose(frequency, expected, atol=0.03)
    # The density: a slab where the edge is there, an atom where it is not.
    one = sampled[found.all(-1)][:1]
    normal = torch.distributions.Normal(law.mean_entry, law.sd_entry).log_prob(one)
    whole = normal.sum(-1) + 2 * math.log(0.4) + law.log_stability(one)
    torch.testing.assert_close(law.log_prob(one), whole)
    without = torch.where(LAYOUT.edge == 1, 0.0, one)
    rest = normal[:, LAYOUT.edge != 1].sum(-1) + math.log(0.4) + math.log(0.6) + law.log_stability(without)
    torch.testing.assert_close(law.log_prob(without), rest)


def test_a_prior_that_is_never_stable_says_so(monkeypatch):
    monkeypatch.setattr("pyrodyn.distributions.network.TRIES", 2)
    with pytest.raises(ModelError, match="hardly ever stable"):
        prior(sd=50.0).sample((3,))


def test_the_spectral_radius_has_the_gradient_of_differences():
    with random_stream(0):
        matrix = torch.randn(6, 4, 4, dtype=torch.float64)
    assert torch.allclose(spectral_radius(matrix), torch.linalg.eigvals(matrix).abs().amax(-1))
    assert torch.autograd.gradcheck(spectral_radius, matrix.requires_grad_())
    same = torch.eye(3, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(spectral_radius(same), same)
    assert bool(torch.isfinite(slope).all())


def test_stationary_quantities_agree_with_dense_solutions():
    with random_stream(2):
        raw = torch.randn(3, 4, 4, dtype=torch.float64)
    dynamics = 0.9 * raw / spectral_radius(raw)[:, None, None]
    root = raw.mT + 2.0 * torch.eye(4, dtype=torch.float64)
    own = torch.block_diag(torch.ones(2, 2), torch.ones(1, 1), torch.ones(1, 1)) * (root @ root.mT)
    shared = raw[..., :1]
    noise = own + shared @ shared.mT
    covariance = stationary_covariance(dynamics, noise)
    places = (slice(0, 2), slice(2, 3))
    strength = block_strength(dynamics, covariance, places)
    group = torch.tensor([0, 0, 1, -1])
    noises = noise_by_group(own, (*places, slice(3, 4)))
    torch.testing.assert_close(noises.sum(-3), own)
    noises = torch.cat([noises, (shared @ shared.mT).unsqueeze(-3)], -3)
    shares = variance_shares(dynamics, noises, places)
    scattered = [torch.arange(4)[place] for place in places]  # places may be numbers, too
    assert torch.equal(variance_shares(dynamics, noises, scattered), shares)
    assert torch.equal(block_strength(dynamics, covariance, scattered), strength)
    assert shares.shape == (3, 2, 4)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 2, dtype=torch.float64))
    for i in range(3):
        a, q = dynamics[i].numpy(), noise[i].numpy()
        exact = scipy.linalg.solve_discrete_lyapunov(a, q)
        np.testing.assert_allclose(covariance[i], exact, rtol=1e-9)
        left = np.linalg.inv(scipy.linalg.sqrtm(exact[:2, :2]))
        block = left @ a[:2, 2:3] @ scipy.linalg.sqrtm(exact[2:3, 2:3])
        np.testing.assert_allclose(strength[i, 0, 1], np.linalg.norm(block), rtol=1e-9)
        only = np.where(np.equal.outer(group.numpy() == 1, group.numpy() == 1) & (group.numpy() == 1), own[i], 0.0)
        part = scipy.linalg.solve_discrete_lyapunov(a, only)
        np.testing.assert_allclose(shares[i, 0, 1], np.trace(np.linalg.solve(exact[:2, :2], part[:2, :2])) / 2)
