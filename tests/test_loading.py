"""The gauged loading: its density against the iid normal matrix it stands for, whichever pivots are taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.integrate import quad
from scipy.special import multigammaln
from torch.autograd import gradcheck
from torch.distributions import biject_to

from pyrodyn.distributions import GaugedLoading
from pyrodyn.distributions.loading import gauge_fix

CASES = [(1, 1, (0,)), (4, 1, (2,)), (3, 3, (2, 0, 1)), (5, 2, (4, 1)), (6, 3, (0, 5, 2))]


@pytest.mark.parametrize(("units", "dim", "pivots"), CASES)
def test_the_gauge_is_triangular_in_the_pivots_and_a_rotation_away(units, dim, pivots):
    torch.manual_seed(0)
    loading = torch.randn(7, units, dim, dtype=torch.float64)
    gauged, rotation = gauge_fix(loading, pivots)
    eye = torch.eye(dim, dtype=torch.float64).expand(7, dim, dim)
    torch.testing.assert_close(rotation @ rotation.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(loading @ rotation, gauged, rtol=0, atol=1e-12)
    assert bool(GaugedLoading(units, dim, pivots).support.check(gauged).all())
    assert dim == 1 or not bool(GaugedLoading(units, dim, pivots).support.check(loading).any())
    # A rotation of the latents changes nothing: there is one member of each family.
    turn = torch.linalg.qr(torch.randn(7, dim, dim, dtype=torch.float64))[0]
    torch.testing.assert_close(gauge_fix(loading @ turn, pivots)[0], gauged, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("units", "dim", "pivots"), CASES)
def test_density_is_the_iid_normal_one_times_the_volume_of_the_rotations(units, dim, pivots):
    """dC = prod_i L_ii^(d-i) dL dO for C = L O; the orthogonal group has volume 2^d pi^(d d/2) / Gamma_d(d/2)."""
    law = GaugedLoading(units, dim, pivots)
    torch.manual_seed(1)
    drawn = law.sample(torch.Size([6]))
    assert bool(law.support.check(drawn).all())
    roots = drawn[:, list(pivots), range(dim)]
    powers = torch.arange(dim - 1, -1, -1, dtype=torch.float64)
    iid = -0.5 * drawn.square().sum((-2, -1)) - 0.5 * units * dim * math.log(2.0 * math.pi)
    volume = dim * math.log(2.0) + 0.5 * dim**2 * math.log(math.pi) - multigammaln(0.5 * dim, dim)
    expected = iid + (powers * roots.log()).sum(-1) + volume
    torch.testing.assert_close(law.log_prob(drawn), expected, rtol=1e-12, atol=1e-12)


def test_density_integrates_to_one_and_samples_follow_it():
    law = GaugedLoading(1, 1, (0,))
    total, _ = quad(lambda x: math.exp(float(law.log_prob(torch.tensor([[x]], dtype=torch.float64)))), 1e-12, 40.0)
    assert abs(total - 1.0) < 1e-8
    torch.manual_seed(2)
    drawn = GaugedLoading(4, 3, (3, 1, 0)).sample(torch.Size([4000]))
    for i, unit in enumerate((3, 1, 0)):
        assert scipy.stats.kstest(drawn[:, unit, i].numpy(), scipy.stats.chi(3 - i).cdf).pvalue > 1e-3
    for unit, latent in ((2, 0), (2, 2), (1, 0), (0, 1)):
        assert scipy.stats.kstest(drawn[:, unit, latent].numpy(), scipy.stats.norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize(("units", "dim", "pivots"), CASES)
def test_unconstrained_coordinates_fill_the_support(units, dim, pivots):
    law = GaugedLoading(units, dim, pivots)
    transform = biject_to(law.support)
    size = units * dim - dim * (dim - 1) // 2
    torch.manual_seed(3)
    raw = torch.randn(2, 3, size, dtype=torch.float64)
    value = transform(raw)
    assert value.shape == (2, 3, units, dim) and bool(law.support.check(value).all())
    torch.testing.assert_close(transform.inv(value), raw, rtol=0, atol=1e-12)
    free = value[0, 0].flatten().nonzero().squeeze(-1)
    jacobian = torch.autograd.functional.jacobian(lambda x: transform(x).flatten()[free], raw[0, 0])
    found = transform.log_abs_det_jacobian(raw, value)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found[0, 0], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-10, atol=1e-10)


def test_gradients():
    law = GaugedLoading(4, 2, (2, 0))
    transform = biject_to(law.support)
    raw = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert gradcheck(lambda x: law.log_prob(transform(x)) + transform.log_abs_det_jacobian(x, transform(x)), (raw,))


@pytest.mark.parametrize("pivots", [(0,), (0, 0), (0, 4), (-1, 0), (0, 1, 2)])
def test_wrong_pivots_are_refused(pivots):
    with pytest.raises(ValueError, match="pivots must be 2 distinct units .* among 4"):
        GaugedLoading(4, 2, pivots)


def test_with_degrees_it_is_the_root_of_a_wishart_matrix():
    law = GaugedLoading(3, 3, (0, 1, 2), degrees=5.5)
    torch.manual_seed(3)
    drawn = law.sample(torch.Size([6]))
    reference = scipy.stats.wishart(df=5.5, scale=np.eye(3))
    # dW = 2^d prod_i L_ii^(d-i+1) dL
    roots = drawn.diagonal(dim1=-2, dim2=-1)
    jacobian = 3.0 * math.log(2.0) + (torch.tensor([3.0, 2.0, 1.0]) * roots.log()).sum(-1)
    expected = [reference.logpdf(w) for w in (drawn @ drawn.mT).numpy()]
    torch.testing.assert_close(law.log_prob(drawn) - jacobian, torch.tensor(expected), rtol=1e-10, atol=1e-10)
    many = law.sample(torch.Size([4000]))
    torch.testing.assert_close((many @ many.mT).mean(0), 5.5 * torch.eye(3, dtype=torch.float64), rtol=0, atol=0.25)
    for i in range(3):
        assert scipy.stats.kstest(many[:, i, i].numpy(), scipy.stats.chi(5.5 - i).cdf).pvalue > 1e-3
    with pytest.raises(ValueError, match="degrees must be more than latent_dim - 1 = 2, got 2"):
        GaugedLoading(3, 3, (0, 1, 2), degrees=2.0)
