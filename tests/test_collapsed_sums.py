"""The few matrices through which parameters enter an exact evidence: written out, against autograd's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from pyrodyn import conditioning
from pyrodyn.conditioning import gaussian_evidence
from pyrodyn.distributions import GaussMarkov
from pyrodyn.linalg import dynamics as dynamics_module
from pyrodyn.linalg.dynamics import dynamics_blocks
from pyrodyn.readouts import AffineReadout, Gaussian


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed: int, *shape: int) -> Tensor:
    root = normal(seed, *shape, shape[-1])
    return root @ root.mT + 0.5 * torch.eye(shape[-1], dtype=torch.float64)


@pytest.mark.parametrize("bins", [1, 2, 5])
@pytest.mark.parametrize(
    ("dim", "batches"), [(1, [(), (), ()]), (3, [(4, 1), (4, 1), (1,)]), (2, [(), (3,), (2, 1)]), (20, [(2,)] * 3)]
)
def test_blocks_and_gradient_equal_those_of_torch(monkeypatch, bins, dim, batches):
    pytest.importorskip("numba")
    leaves = [0.5 * normal(0, *batches[0], dim, dim), covariance(1, *batches[1], dim), covariance(2, *batches[2], dim)]
    found = []
    for _ in range(2):
        inputs = [part.clone().requires_grad_() for part in leaves]
        parts = dynamics_blocks(*inputs, bins)
        score = sum((normal(7 + place, *part.shape) * part).sum() for place, part in enumerate(parts))
        found.append([*(part.detach() for part in parts), *torch.autograd.grad(score, inputs)])
        monkeypatch.setattr(dynamics_module, "_compiled_for", lambda *_: None)
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9 * max(1.0, float(other.abs().max())))


def test_blocks_that_are_not_positive_definite_are_nan_and_harm_no_other():
    noise = covariance(1, 3, 2)
    noise[1] = -noise[1]
    blocks, upper, normaliser = dynamics_blocks(normal(0, 3, 2, 2), noise, covariance(2, 3, 2), 9)
    for part in (blocks, upper, normaliser):
        assert part.isfinite().reshape(3, -1).all(1).tolist() == [True, False, True]


class Problem:
    """A linear-Gaussian model with any number of draws."""

    def __init__(self, lead: tuple[int, ...], trials: int = 3, bins: int = 5, units: int = 4, dim: int = 2) -> None:
        self.prior = [0.6 * normal(0, *lead, dim, dim), covariance(1, *lead, dim), covariance(2, *lead, dim)]
        self.site = [normal(3, *lead, units, dim), normal(4, *lead, units), 0.5 + normal(5, *lead, units).square()]
        self.values = 3.0 + normal(6, trials, bins, units)
        self.path = torch.zeros(trials, bins, dim, dtype=torch.float64)

    def evidence(self, *parameters: Tensor) -> Tensor:
        dynamics, noise, initial, *site = parameters
        noise, initial = 0.5 * (noise + noise.mT), 0.5 * (initial + initial.mT)
        prior = GaussMarkov.from_dynamics(dynamics, noise, num_bins=self.path.shape[1], initial_covariance=initial)
        return gaussian_evidence(prior, AffineReadout(Gaussian(), self.path, *site), self.values)


@pytest.mark.parametrize("lead", [(1,), (3, 1), (2, 3, 1)])
@pytest.mark.parametrize("bins", [1, 2, 5])
def test_evidence_and_gradient_equal_those_through_autograd(monkeypatch, lead, bins):
    problem = Problem(lead, bins=bins)
    calls = []
    forward = conditioning._Sums.forward
    monkeypatch.setattr(conditioning._Sums, "forward", lambda *given: calls.append(1) or forward(*given))
    found = []
    for _ in range(2):
        leaves = [part.clone().requires_grad_() for part in (*problem.prior, *problem.site)]
        value = problem.evidence(*leaves)
        found.append([value.detach(), *torch.autograd.grad((normal(9, *value.shape) * value).sum(), leaves)])
        monkeypatch.setattr(conditioning, "_apart", lambda *_: False)
    assert len(calls) == 1
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    problem = Problem((2, 1), trials=2, bins=3)
    assert gradcheck(problem.evidence, [part.clone().requires_grad_() for part in (*problem.prior, *problem.site)])
