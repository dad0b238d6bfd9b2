"""The Gauss-Markov chain against a dense Gaussian of the same precision, and against the recursion that defines it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import MultivariateNormal

from pyrodyn.distributions import GaussMarkov

SIZES = [  # bins, latents, batch of the precision, batch of the linear part
    (1, 1, (), ()),
    (1, 3, (2,), (2,)),
    (2, 1, (), (3,)),
    (3, 2, (2, 1), (2, 3)),
    (5, 2, (2, 3), (2, 3)),
    (8, 3, (), ()),
    (9, 1, (2,), ()),
    (13, 2, (3,), (2, 3)),
]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def blocks(bins: int, dim: int, batch=(), linear_batch=(), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A random block-tridiagonal precision, positive definite because its diagonal dominates, and a linear part."""
    generator = torch.Generator().manual_seed(seed)
    upper = 0.5 * normal(generator, *batch, bins - 1, dim, dim)
    square = normal(generator, *batch, bins, dim, dim)
    reach = upper.norm(dim=(-2, -1)).amax(-1)[..., None, None, None] if bins > 1 else 0.0
    diagonal = square @ square.mT + (2.0 * reach + 0.3) * torch.eye(dim, dtype=torch.float64)
    return diagonal, upper, normal(generator, *linear_batch, bins, dim)


def dense_precision(diagonal: Tensor, upper: Tensor) -> Tensor:
    *batch, bins, dim, _ = diagonal.shape
    full = torch.zeros(*batch, bins * dim, bins * dim, dtype=torch.float64)
    for t in range(bins):
        full[..., t * dim : (t + 1) * dim, t * dim : (t + 1) * dim] = diagonal[..., t, :, :]
    for t in range(bins - 1):
        full[..., t * dim : (t + 1) * dim, (t + 1) * dim : (t + 2) * dim] = upper[..., t, :, :]
        full[..., (t + 1) * dim : (t + 2) * dim, t * dim : (t + 1) * dim] = upper[..., t, :, :].mT
    return full


def dense(diagonal: Tensor, upper: Tensor, linear: Tensor) -> MultivariateNormal:
    """The same Gaussian over all bins and latents at once."""
    precision = dense_precision(diagonal, upper)
    flat = linear.flatten(-2)
    mean = torch.linalg.solve(precision, flat.unsqueeze(-1)).squeeze(-1)
    return MultivariateNormal(mean, covariance_matrix=torch.linalg.inv(precision))


def recursion(dynamics: Tensor, noise: Tensor, initial: Tensor, mean: Tensor, drift: Tensor | None, bins: int):
    """Mean and covariance over all bins by stepping x_t = A x_(t-1) + b_t + e_t."""
    dim = len(dynamics)
    means, covariance = [mean], torch.zeros(bins, dim, bins, dim, dtype=torch.float64)
    covariance[0, :, 0] = initial
    for t in range(1, bins):
        means.append(dynamics @ means[-1] + (0.0 if drift is None else drift[t - 1]))
        covariance[t, :, t] = dynamics @ covariance[t - 1, :, t - 1] @ dynamics.T + noise
        for s in range(t):
            covariance[t, :, s] = dynamics @ covariance[t - 1, :, s]
            covariance[s, :, t] = covariance[t, :, s].T
    return torch.stack(means), covariance.reshape(bins * dim, bins * dim)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected.expand(found.shape), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("bins", "dim", "batch", "linear_batch"), SIZES)
def test_every_quantity_equals_the_dense_gaussian(bins, dim, batch, linear_batch):
    parts = blocks(bins, dim, batch, linear_batch)
    chain, reference = GaussMarkov(*parts), dense(*parts)
    assert chain.batch_shape == reference.batch_shape and chain.event_shape == (bins, dim)
    value = normal(torch.Generator().manual_seed(1), *chain.batch_shape, bins, dim)
    close(chain.log_prob(value), reference.log_prob(value.flatten(-2)))
    close(chain.mean, reference.mean.unflatten(-1, (bins, dim)))
    close(chain.entropy(), reference.entropy())
    covariance = reference.covariance_matrix.unflatten(-1, (bins, dim)).unflatten(-3, (bins, dim))
    for t in range(bins):
        close(chain.covariance[..., t, :, :], covariance[..., t, :, t, :])
        close(chain.variance[..., t, :], covariance[..., t, :, t, :].diagonal(dim1=-2, dim2=-1))
    for t in range(bins - 1):
        close(chain.cross_covariance[..., t, :, :], covariance[..., t, :, t + 1, :])
    square = (parts[2].flatten(-2) * reference.mean).sum(-1)
    close(chain.log_normaliser, 0.5 * square + reference.entropy() - 0.5 * bins * dim)


@pytest.mark.parametrize(("bins", "dim"), [(1, 1), (1, 2), (2, 1), (7, 3)])
@pytest.mark.parametrize("drifting", [False, True])
def test_dynamics_equal_their_recursion(bins, dim, drifting):
    generator = torch.Generator().manual_seed(bins)
    dynamics = 0.6 * normal(generator, dim, dim)
    root, first = normal(generator, dim, dim), normal(generator, dim, dim)
    noise = root @ root.T + 0.2 * torch.eye(dim, dtype=torch.float64)
    initial = first @ first.T + 0.2 * torch.eye(dim, dtype=torch.float64)
    mean, drift = normal(generator, dim), normal(generator, bins - 1, dim) if drifting else None
    chain = GaussMarkov.from_dynamics(
        dynamics, noise, num_bins=bins, initial_covariance=initial, initial_mean=mean, drift=drift
    )
    means, covariance = recursion(dynamics, noise, initial, mean, drift, bins)
    close(chain.mean, means, 1e-9)
    close(torch.linalg.inv(dense_precision(chain.diagonal, chain.upper)), covariance, 1e-9)
    value = normal(generator, bins, dim)
    close(chain.log_prob(value), MultivariateNormal(means.flatten(), covariance).log_prob(value.flatten()), 1e-9)
    # The normaliser is known from the dynamics; the kernel must find the same from the blocks alone.
    close(chain.log_normaliser, GaussMarkov(chain.diagonal, chain.upper, chain.linear).log_normaliser, 1e-9)


def test_dynamics_of_many_draws_with_a_drift_of_every_trial():
    generator = torch.Generator().manual_seed(3)
    dynamics, drift = 0.5 * normal(generator, 2, 1, 2, 2), normal(generator, 2, 3, 4, 2)
    eye = torch.eye(2, dtype=torch.float64)
    mean = normal(generator, 3, 2)
    chain = GaussMarkov.from_dynamics(
        dynamics, 0.3 * eye, num_bins=5, initial_covariance=eye, initial_mean=mean, drift=drift
    )
    assert chain.batch_shape == (2, 3)
    value = normal(generator, 2, 3, 5, 2)
    for draw in range(2):
        for trial in range(3):
            means, covariance = recursion(dynamics[draw, 0], 0.3 * eye, eye, mean[trial], drift[draw, trial], 5)
            expected = MultivariateNormal(means.flatten(), covariance).log_prob(value[draw, trial].flatten())
            close(chain.log_prob(value)[draw, trial], expected)


def test_conditioning_multiplies_densities_and_ignores_what_is_masked():
    bins, dim = 6, 2
    parts = blocks(bins, dim)
    generator = torch.Generator().manual_seed(5)
    root, linear = normal(generator, 3, bins, dim, dim), normal(generator, 3, bins, dim)
    precision = root @ root.mT
    mask = torch.rand(3, bins, generator=generator) < 0.6
    assert 0 < mask.sum() < mask.numel()
    hidden = precision.clone().masked_fill_(~mask[..., None, None], torch.nan).requires_grad_()
    hidden_linear = linear.clone().masked_fill_(~mask[..., None], torch.nan).requires_grad_()
    chain = GaussMarkov(*parts).condition(hidden, hidden_linear, mask)
    value = normal(generator, 3, bins, dim)
    log_potential = -0.5 * torch.einsum("nti,ntij,ntj->nt", value, precision, value) + (linear * value).sum(-1)
    joint = GaussMarkov(*parts).log_potential(value) + (log_potential * mask).sum(-1)
    # Equal up to a constant of each batch element, so differences between two paths are equal.
    other = torch.zeros_like(value)
    close(chain.log_prob(value) - chain.log_prob(other), joint)
    full = dense(parts[0] + precision * mask[..., None, None], parts[1].expand(3, -1, -1, -1),
                 parts[2] + linear * mask[..., None])  # fmt: skip
    close(chain.log_prob(value).detach(), full.log_prob(value.flatten(-2)))
    slopes = torch.autograd.grad(chain.log_prob(value).sum(), (hidden, hidden_linear))
    assert all(bool(torch.isfinite(slope).all()) for slope in slopes)
    assert bool((slopes[1][~mask] == 0).all()) and bool((slopes[1][mask] != 0).all())


def test_a_potential_shared_by_all_bins_is_repeated():
    parts, root = blocks(4, 2), normal(torch.Generator().manual_seed(1), 1, 2, 2)
    shared, each = root @ root.mT, (root @ root.mT).expand(4, 2, 2)
    linear = torch.ones(4, 2, dtype=torch.float64)
    close(
        GaussMarkov(*parts).condition(shared, linear).log_normaliser,
        GaussMarkov(*parts).condition(each, linear).log_normaliser,
    )


@pytest.mark.parametrize(("bins", "dim"), [(1, 1), (1, 3), (6, 1), (7, 2)])
def test_transform_is_a_root_of_the_covariance_with_its_jacobian(bins, dim):
    parts = blocks(bins, dim)
    chain, reference = GaussMarkov(*parts), dense(*parts)
    size = bins * dim
    units = torch.eye(size, dtype=torch.float64).reshape(size, bins, dim)
    close(chain.transform(torch.zeros(bins, dim, dtype=torch.float64)), chain.mean)
    root = (chain.transform(units) - chain.mean).flatten(1).T  # column i: where the i-th unit vector goes
    close(root @ root.T, reference.covariance_matrix)
    close(chain.log_whitening_jacobian, torch.linalg.slogdet(root).logabsdet)
    noise = normal(torch.Generator().manual_seed(2), 5, bins, dim)
    white = -0.5 * noise.square().sum((-2, -1)) - 0.5 * size * math.log(2.0 * math.pi)
    close(chain.log_prob(chain.transform(noise)), white - chain.log_whitening_jacobian)


def test_samples_have_the_shape_asked_for_and_follow_the_generator():
    chain = GaussMarkov(*blocks(4, 2, (3, 1), (3, 5)))
    torch.manual_seed(0)
    drawn = chain.rsample(torch.Size([6, 2]))
    assert drawn.shape == (6, 2, 3, 5, 4, 2)
    torch.manual_seed(0)
    close(drawn, chain.transform(torch.randn(6, 2, 3, 5, 4, 2, dtype=torch.float64)))
    assert chain.rsample().shape == (3, 5, 4, 2)
    # No two batch elements or draws share their noise.
    white = (drawn - chain.mean).flatten(0, 3)
    assert len(torch.unique(white[:, 0, 0])) == len(white)


def test_expand_shares_the_precision():
    chain = GaussMarkov(*blocks(4, 2, (1,), (1,)))
    wide = chain.expand((3, 5))
    assert wide.batch_shape == (3, 5) and wide.diagonal.shape == chain.diagonal.shape
    value = normal(torch.Generator().manual_seed(1), 3, 5, 4, 2)
    close(wide.log_prob(value), dense(*blocks(4, 2, (1,), (1,))).log_prob(value.flatten(-2)))
    close(wide.mean, chain.mean)
    close(wide.covariance, chain.covariance)
    assert wide.rsample().shape == (3, 5, 4, 2)
    _ = chain.mean  # the factor is made: an expanded chain may take it over
    close(chain.expand((5,)).transform(value), wide.transform(value))


def test_force_is_the_gradient_of_the_potential():
    parts = blocks(5, 2, (2,), (2,))
    value = normal(torch.Generator().manual_seed(1), 2, 5, 2).requires_grad_()
    chain = GaussMarkov(*parts)
    (slope,) = torch.autograd.grad(chain.log_potential(value).sum(), value)
    close(chain.force(value.detach()), slope)


def test_a_precision_that_is_not_positive_definite_spoils_its_own_batch_element_only():
    diagonal, upper, linear = blocks(5, 2, (3,), (3,))
    healthy = GaussMarkov(diagonal, upper, linear).log_normaliser
    broken = diagonal.clone()
    broken[1, 2] -= 100.0 * torch.eye(2, dtype=torch.float64)
    found = GaussMarkov(broken, upper, linear).log_normaliser
    assert torch.isnan(found[1])
    close(found[[0, 2]], healthy[[0, 2]])


@pytest.mark.parametrize(
    ("bins", "dim", "batch", "linear_batch"), [(1, 1, (), ()), (2, 2, (2, 1), (2, 2)), (5, 2, (), (2,))]
)
def test_gradients(bins, dim, batch, linear_batch):
    diagonal, upper, linear = (part.requires_grad_() for part in blocks(bins, dim, batch, linear_batch))
    value = normal(torch.Generator().manual_seed(1), *linear_batch, bins, dim).requires_grad_()

    def chain(diagonal, upper, linear):
        return GaussMarkov(0.5 * (diagonal + diagonal.mT), upper, linear)

    inputs = (diagonal, upper, linear)
    assert gradcheck(lambda *a: chain(*a[:3]).log_prob(a[3]), (*inputs, value))
    assert gradcheck(lambda *a: chain(*a).log_normaliser, inputs)
    assert gradcheck(lambda *a: chain(*a).transform(value.detach()), inputs)
    assert gradcheck(lambda *a: chain(*a).entropy(), inputs)
    assert gradcheck(lambda *a: (chain(*a).mean, chain(*a).covariance, chain(*a).cross_covariance), inputs)


def test_gradients_in_the_dynamics():
    generator = torch.Generator().manual_seed(2)
    dynamics = (0.5 * normal(generator, 2, 1, 2, 2)).requires_grad_()
    root, first = (normal(generator, 2, 1, 2, 2).requires_grad_() for _ in range(2))
    mean, drift = normal(generator, 3, 2).requires_grad_(), normal(generator, 2, 3, 3, 2).requires_grad_()
    value = normal(generator, 2, 3, 4, 2).requires_grad_()
    eye = torch.eye(2, dtype=torch.float64)

    def density(dynamics, root, first, mean, drift, value):
        return GaussMarkov.from_dynamics(
            dynamics, root @ root.mT + eye, num_bins=4, initial_covariance=first @ first.mT + eye,
            initial_mean=mean, drift=drift,
        ).log_prob(value)  # fmt: skip

    assert gradcheck(density, (dynamics, root, first, mean, drift, value))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (((4, 2, 3), (3, 2, 2), (4, 2)), r"diagonal must be \(\*batch, time, latent, latent\)"),
        (((4, 2, 2), (4, 2, 2), (4, 2)), r"upper must be .* \(\.\.\., 3, 2, 2\)"),
        (((4, 2, 2), (3, 2, 2), (3, 2)), r"linear must be .* \(\.\.\., 4, 2\)"),
    ],
)
def test_wrong_shapes_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        GaussMarkov(*(torch.zeros(shape, dtype=torch.float64) for shape in parts))


def test_what_was_read_without_gradients_has_them_later() -> None:
    linear = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    diagonal = 2.0 * torch.eye(2, dtype=torch.float64).expand(4, 2, 2)
    law = GaussMarkov(diagonal, torch.zeros(3, 2, 2, dtype=torch.float64), linear)
    with torch.no_grad():
        assert not law.mean.requires_grad
    (slope,) = torch.autograd.grad(law.mean.sum(), linear)
    assert torch.allclose(slope, torch.full_like(slope, 0.5))
