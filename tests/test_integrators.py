"""Solutions of ordinary differential equations against closed forms, and gradients against autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from torch import Tensor

from pyrodyn.errors import ModelError, SolverError
from pyrodyn.integrators import Adaptive, FixedStep, Network, rk4_step

TIMES = torch.tensor([0.3, 0.35, 0.9, 1.0, 1.62, 2.3], dtype=torch.float64)


def network(*draws: int, latent: int = 3, hidden: int = 5, seed: int = 0) -> Network:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*draws, 1, *shape, generator=generator, dtype=torch.float64).requires_grad_()

    return Network(
        normal(latent, latent), normal(latent), normal(hidden, latent), normal(hidden), normal(hidden, latent)
    )


def starts(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("draws", [(), (1,), (3,), (2, 2)])
def test_the_fused_scheme_and_its_adjoint_are_those_of_autograd(draws) -> None:
    """The same scheme as a plain loop, at unequal times, with a cotangent that weighs every state differently."""
    field, initial, solver = network(*draws), starts(*draws, 4, 3), FixedStep(0.7)
    weights = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2.0, 0.3]).double()
    found = []
    for form in (field, lambda state: field(state)):
        path = solver.solve(form, initial, TIMES, 0.2)
        assert path.shape == (*draws, 4, 6, 3)
        slopes = torch.autograd.grad((weights * path.sin()).sum(), (initial, *field))
        found.append((path, *slopes))
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)


def test_draws_together_are_draws_one_by_one_and_one_network_serves_all() -> None:
    field, initial = network(3), starts(3, 4, 3)
    together = FixedStep().solve(field, initial, TIMES, 0.2)
    for draw in range(3):
        alone = FixedStep().solve(Network(*(part[draw] for part in field)), initial[draw], TIMES, 0.2)
        torch.testing.assert_close(alone, together[draw])
    shared = network()
    many = FixedStep().solve(shared, initial, TIMES, 0.2)
    torch.testing.assert_close(many[1], FixedStep().solve(shared, initial[1], TIMES, 0.2))


def test_the_error_falls_with_the_fourth_power_of_the_step_between_knots_too() -> None:
    matrix = torch.tensor([[-0.1, -2.0], [2.0, -0.1]], dtype=torch.float64)
    initial = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    times = torch.linspace(0.0, 3.0, 41, dtype=torch.float64)
    exact = torch.stack([torch.linalg.matrix_exp(matrix * t) @ initial[0] for t in times])
    sizes = np.array([0.3, 0.15, 0.075])
    errors = [
        float((FixedStep(size).solve(lambda x: x @ matrix.mT, initial, times, 1.0)[0] - exact).abs().max())
        for size in sizes
    ]
    assert np.polyfit(np.log(sizes), np.log(errors), 1)[0] == pytest.approx(4.0, abs=0.3)
    step = rk4_step(lambda x: x @ matrix.mT, initial, 0.1)
    series = sum(torch.linalg.matrix_power(0.1 * matrix, k) / math.factorial(k) for k in range(5))
    torch.testing.assert_close(step, initial @ series.mT)


@pytest.mark.parametrize("solver", [FixedStep(0.02), Adaptive(rtol=1e-8, atol=1e-8)])
def test_a_network_is_solved_as_by_another_library(solver) -> None:
    field, initial = network(), starts(2, 3)
    with torch.no_grad():
        path = solver.solve(field, initial, TIMES, 0.2)
    for trial in range(2):
        solved = scipy.integrate.solve_ivp(
            lambda _, x: field(torch.from_numpy(x)[None]).detach().numpy()[0],
            (0.3, 2.3),
            initial[trial].detach().numpy(),
            "DOP853",
            TIMES.numpy(),
            rtol=1e-11,
            atol=1e-11,
        )
        np.testing.assert_allclose(path[trial].numpy(), solved.y.T, atol=1e-6 * np.abs(solved.y).max())


def test_adjoint_and_direct_gradients_agree_and_tolerances_hold() -> None:
    field, initial = network(), starts(2, 3)
    slopes, losses = [], []
    for solver in (Adaptive(rtol=1e-7, atol=1e-7), Adaptive(rtol=1e-7, atol=1e-7, adjoint=True)):
        loss = solver.solve(field, initial, TIMES, 0.2).square().mean()
        slopes.append(torch.autograd.grad(loss, (initial, *field)))
    for direct, adjoint in zip(*slopes, strict=True):
        assert float((direct - adjoint).norm() / direct.norm()) < 1e-4
    with torch.no_grad():
        losses = [
            float(Adaptive(rtol=r, atol=r).solve(field, initial, TIMES, 0.2).square().mean()) for r in (1e-6, 5e-7)
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def blowing_up(state: Tensor) -> Tensor:
    """x' = x^2 leaves for infinity at t0 + 1 / x0."""
    return state.square()


def test_a_stiff_flow_names_the_trial_and_the_time() -> None:
    initial = torch.tensor([[0.1], [-3.0], [4.0]], dtype=torch.float64)
    with pytest.raises(SolverError, match=r"trial 2 \(counted from 0\) at time 0\.5[45]\d* s.*FixedStep") as caught:
        Adaptive(max_steps=500).solve(blowing_up, initial, TIMES, 0.2)
    assert float(str(caught.value).split("at time ")[1].split(" ")[0]) == pytest.approx(0.3 + 0.25, abs=0.01)


def test_fixed_steps_spoil_only_the_trial_that_runs_off() -> None:
    initial = torch.tensor([[0.1], [-3.0], [4.0]], dtype=torch.float64, requires_grad=True)
    path = FixedStep(0.1).solve(blowing_up, initial, TIMES, 0.2)
    assert bool(torch.isfinite(path[:2]).all()) and not bool(torch.isfinite(path[2, -1]).all())
    exact = initial[:2] / (1.0 - initial[:2] * (TIMES - 0.3))
    torch.testing.assert_close(path[:2, :, 0], exact, atol=1e-5, rtol=1e-5)


def test_one_time_needs_no_solver_and_options_are_checked() -> None:
    initial = starts(2, 3)
    for solver in (FixedStep(), Adaptive()):
        assert torch.equal(solver.solve(network(), initial, TIMES[:1], 0.2), initial.unsqueeze(-2))
    with pytest.raises(ModelError, match="bins must be positive"):
        FixedStep(0.0)
    with pytest.raises(ModelError, match="method must be one of dopri5"):
        Adaptive("rk4")
    with pytest.raises(ModelError, match="rtol must be positive"):
        Adaptive(rtol=0.0)
