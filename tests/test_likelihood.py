"""The likelihood of paths a few bins at a time, beside the readout's own and autograd's derivatives."""

from __future__ import annotations

import pytest
import torch
import zoo

from pyrodyn.conditioning import laplace_evidence
from pyrodyn.distributions import GaussMarkov
from pyrodyn.readouts import AffineReadout, Poisson, Readout, observations
from pyrodyn.readouts.likelihood import PathLikelihood, outer

DRAWS, TRIALS, BINS, UNITS, LATENTS = 2, 3, 7, 5, 3
LAWS = [pytest.param(law, id=type(law).__name__) for law in zoo.READOUTS]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(law: Readout, masked: bool) -> tuple[AffineReadout, torch.Tensor, torch.Tensor]:
    """A readout in which each unit reads out some of the latents, observations, and a path of every draw and trial."""
    loading = 0.5 * normal(1, DRAWS, 1, UNITS, LATENTS)
    loading[..., :3, 2], loading[..., 3:, :2] = 0.0, 0.0
    observed = normal(2, TRIALS, BINS, UNITS) > -1.0 if masked else None
    noise = None if law.noise_name is None else 0.5 + normal(3, DRAWS, 1, UNITS).square()
    zeros = torch.zeros(TRIALS, BINS, LATENTS, dtype=torch.float64)
    readout = AffineReadout(law, zeros, loading, normal(4, DRAWS, 1, UNITS), noise, observed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        seen = law.sample(normal(5, TRIALS, BINS, UNITS), None if noise is None else noise[0])
    if observed is not None:
        seen = torch.where(observed, seen, torch.nan)
    return readout, seen, normal(6, DRAWS, TRIALS, BINS, LATENTS)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("piece", [1, 60, 60_000])
def test_values_and_derivatives_are_those_of_the_readout(monkeypatch, law, masked, piece):
    monkeypatch.setattr(observations, "PIECE", piece)
    readout, seen, path = parts(law, masked)
    found = PathLikelihood(readout, seen)
    assert len(found.pieces) == {1: BINS, 60: BINS // 2 + 1, 60_000: 1}[piece]
    with torch.no_grad():
        value, force, precision = found.expand(path)
        torch.testing.assert_close(found.bins(path), value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.slope(path), (value, force), rtol=1e-10, atol=1e-10)
    moved = path.clone().requires_grad_()
    whole = readout.log_likelihood(readout.predict(moved), seen)
    (slope,) = torch.autograd.grad(whole.sum(), moved)
    torch.testing.assert_close(force, slope, rtol=1e-9, atol=1e-9)
    other = path + 0.3
    expected = readout.log_likelihood(readout.predict(other), seen) - whole.detach()
    torch.testing.assert_close((found.bins(other) - value).sum(-1), expected, rtol=1e-9, atol=1e-9)
    curvature = readout.curvature(readout.predict(path), seen)
    square = torch.einsum("ktbu,kui,kuj->ktbij", curvature, readout.loading[:, 0], readout.loading[:, 0])
    torch.testing.assert_close(precision, square, rtol=1e-10, atol=1e-12)
    furthest = readout.predict(path) - readout.offset
    torch.testing.assert_close(found.reach(path), furthest.abs().amax((-2, -1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("empty", ["none", "some", "all"])
def test_what_units_see_of_a_path_is_the_same_with_and_without_a_gradient(empty):
    readout, _, _ = parts(Poisson(), False)
    if empty == "none":
        readout.loading = normal(7, DRAWS, 1, UNITS, LATENTS)
    elif empty == "all":
        readout.loading = torch.zeros_like(readout.loading)
    curvature = normal(8, DRAWS, TRIALS, BINS, UNITS).square()
    with torch.no_grad():
        found = outer(readout, curvature)
    torch.testing.assert_close(found, outer(readout, curvature), rtol=1e-12, atol=1e-12)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("unit", [1.0, 50.0])
@pytest.mark.parametrize("law", [law for law in LAWS if not law.values[0].is_gaussian])
def test_the_evidence_alone_is_the_one_that_a_gradient_is_taken_of(law, unit):
    """Its mode is looked for with less patience, whatever the units of the latents."""
    readout, seen, _ = parts(law, True)
    readout.loading = unit * readout.loading
    turn = torch.linalg.qr(normal(9, LATENTS, LATENTS))[0]
    eye = torch.eye(LATENTS, dtype=torch.float64).expand(DRAWS, 1, -1, -1)
    noise, initial = 0.3 * eye / unit**2, 2.0 * eye / unit**2
    prior = GaussMarkov.from_dynamics(0.95 * turn @ eye, noise, num_bins=BINS, initial_covariance=initial)
    graded = laplace_evidence(prior, readout, seen)
    with torch.no_grad():
        alone = laplace_evidence(prior, readout, seen)
    torch.testing.assert_close(alone, graded, rtol=1e-9, atol=1e-8)
