"""Drifts by their definition, their priors, and the reflections that they are closed under."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyrodyn import drifts
from pyrodyn.drifts import Drift, DriftParameters
from pyrodyn.errors import ModelError
from pyrodyn.inference.engine import random_stream

PACE = 0.3
KINDS: dict[str, Drift] = {
    "linear": drifts.Linear(),
    "process": drifts.GaussianProcess(functions=4),
    "network": drifts.MLP(hidden=5),
    "deep": drifts.MLP(hidden=4, layers=3),
}
every = pytest.mark.parametrize("drift", KINDS.values(), ids=KINDS.keys())


def drawn(drift: Drift, dim: int, draws: int, seed: int = 0) -> DriftParameters:
    with random_stream(seed), torch.no_grad(), pyro.plate("draw", draws, dim=-2):
        return drift.sample(dim, PACE)


def one(parameters: DriftParameters, draw: int) -> DriftParameters:
    return DriftParameters(*(None if part is None else part[draw, 0] for part in parameters))


def states(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every
def test_draws_together_equal_draws_one_by_one(drift) -> None:
    parameters, state = drawn(drift, 3, 4), states(4, 2, 7, 3)
    together = drift(parameters, state)
    assert together.shape == (4, 2, 7, 3)
    assert drift.features(parameters, state).shape[-1] == drift.num_features(3)
    for draw in range(4):
        torch.testing.assert_close(drift(one(parameters, draw), state[draw]), together[draw])
    sd = drift.prior_sd(parameters, 3, PACE)
    torch.testing.assert_close(
        drift.prior_sd(one(parameters, 2), 3, PACE), sd.expand(4, 1, -1)[2, 0] if sd.dim() > 1 else sd
    )


def test_a_network_is_what_it_says() -> None:
    drift = KINDS["deep"]
    p = one(drawn(drift, 2, 1), 0)
    x = states(2).numpy()
    active = np.tanh(p.hidden_weights.numpy() @ x + p.hidden_biases.numpy())
    for layer in range(2):
        active = np.tanh(p.deep_weights[layer].numpy() @ active + p.deep_biases[layer].numpy())
    expected = p.weights.numpy().T @ np.concatenate([[1.0], x, active])
    np.testing.assert_allclose(drift(p, torch.from_numpy(x)[None])[0].numpy(), expected)


@pytest.mark.parametrize(("dim", "functions"), [(1, 40), (2, 30)])
def test_a_process_has_the_kernel_of_its_prior(dim, functions) -> None:
    """Sums over waves against a^2 exp(-|x - x'|^2 / 2 l^2), in the middle of the box."""
    drift = drifts.GaussianProcess(functions=functions, box=6.0)
    scale, size = torch.tensor(0.8, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    parameters = DriftParameters(torch.empty(0), scale, size)
    state = states(1, 12, dim).clamp(-2.0, 2.0)
    psi = drift.features(parameters, state)[0, :, 1 + dim :]
    sd = drift.prior_sd(parameters, dim, PACE)[1 + dim :]
    distance = (state[0, :, None] - state[0, None]).square().sum(-1)
    expected = 4.0 * torch.exp(-0.5 * distance / 0.64)
    torch.testing.assert_close((psi * sd.square()) @ psi.mT, expected, rtol=0, atol=2e-3)


def test_waves_are_products_of_sines_that_end_at_the_box() -> None:
    drift = drifts.GaussianProcess(functions=3, box=2.0)
    orders = [o for o in itertools.product((1, 2, 3), repeat=2) if sum((j - 1) ** 2 for j in o) <= 4]
    assert drift.num_features(2) == 3 + len(orders)
    x = states(5, 2).clamp(-1.9, 1.9)
    psi = drift.features(DriftParameters(torch.empty(0)), x[None])[0, :, 3:]
    found = {tuple(np.round(row, 10)) for row in psi.mT.numpy()}
    for order in orders:
        wave = np.prod([np.sin(math.pi * j * (x[:, d].numpy() + 2.0) / 4.0) / math.sqrt(2.0)
                        for d, j in enumerate(order)], axis=0)  # fmt: skip
        assert tuple(np.round(wave, 10)) in found
    edge = torch.tensor([[[2.0, 0.3], [9.0, 0.3]]], dtype=torch.float64)
    assert float(drift.features(DriftParameters(torch.empty(0)), edge)[..., 3:].abs().max()) < 1e-10


@every
def test_reflections_and_reorderings_carry_a_drift_into_itself(drift) -> None:
    """f in the new coordinates at T x is T f(x) in the old ones, for all signs and orders."""
    parameters, state = drawn(drift, 3, 2), states(2, 1, 6, 3)
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1.0, -1.0), repeat=3)):
        turn = torch.diag(torch.tensor(signs, dtype=torch.float64))[:, list(order)]
        moved = drift.turned(parameters, turn)
        torch.testing.assert_close(drift(moved, state @ turn.mT), drift(parameters, state) @ turn.mT)
        # The prior does not see it.
        sd = drift.prior_sd(parameters, 3, PACE).unsqueeze(-1)
        torch.testing.assert_close(
            (moved.weights / sd).square().sum((-2, -1)), (parameters.weights / sd).square().sum((-2, -1))
        )


@every
def test_an_initial_drift_is_affine(drift) -> None:
    slope, level, state = states(2, 2), states(2, seed=3), states(5, 2, seed=4)
    values = drift.initial_values(2, PACE, slope, level)
    with poutine.condition(data=values), torch.no_grad():
        trace = poutine.trace(drift.sample).get_trace(2, PACE)
        parameters = poutine.condition(drift.sample, data=values)(2, PACE)
    assert values.keys() == set(trace.stochastic_nodes) | {
        name for name, site in trace.nodes.items() if site["type"] == "sample"
    }
    torch.testing.assert_close(drift(parameters, state), state @ slope.mT + level)


@every
def test_labels_can_be_undone(drift) -> None:
    parameters = drawn(drift, 2, 3)
    back = drift.unlabel({name: value for name, (_, value) in drift.label(parameters).items()})
    for before, after in zip(parameters, back, strict=True):
        assert (before is None) == (after is None) and (before is None or torch.equal(before, after))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ModelError, match=r"use\s+drifts.MLP"):
        drifts.GaussianProcess().check(6)
    with pytest.raises(ModelError, match="box must be positive, got 0"):
        drifts.GaussianProcess(box=0)
    with pytest.raises(ModelError, match="functions must be a whole number"):
        drifts.GaussianProcess(functions=0)
    with pytest.raises(ModelError, match="hidden must be a whole number of at least 1, got 0"):
        drifts.MLP(hidden=0)
