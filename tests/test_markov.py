"""Hidden Markov chains against the sum over all paths of modes, on every route to the same numbers."""

from __future__ import annotations

import gc
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from pyrodyn.linalg import (
    _mode_chain,
    _room,
    markov,
    mode_log_normaliser,
    mode_marginals,
    most_probable_modes,
    sample_modes,
)

BINS, MODES = 5, 3


@pytest.fixture(params=["scaled", "logarithmic", "torch"])
def route(request, monkeypatch) -> str:
    """Compiled, by probabilities or by their logarithms; or contracted by torch."""
    if request.param == "torch":
        monkeypatch.setattr(markov, "_compiled_for", lambda *_: None)
    else:
        pytest.importorskip("numba")
        monkeypatch.setattr(_mode_chain, "RAREST", -300.0 if request.param == "scaled" else math.inf)
    return request.param


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def paths_of(initial: Tensor, transition: Tensor, likelihood: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    """Every path of one element, and its log weight."""
    bins, modes = likelihood.shape
    transition = transition.expand(bins - 1, modes, modes)
    paths = list(itertools.product(range(modes), repeat=bins))
    weights = []
    for path in paths:
        weight = initial[path[0]] + likelihood[torch.arange(bins), torch.tensor(path)].sum()
        for t in range(bins - 1):
            weight = weight + transition[t, path[t], path[t + 1]]
        weights.append(weight)
    return paths, torch.stack(weights)


SHAPES = [((), (1,)), ((), (BINS - 1,)), ((2,), (1,)), ((2,), (BINS - 1,))]  # of the transition: batch and bins


@pytest.mark.parametrize(("lead", "steps"), SHAPES)
def test_equal_to_the_sum_over_all_paths(route, lead, steps):
    initial, likelihood = normal(0, 2, MODES), 2.0 * normal(1, 2, BINS, MODES)
    transition = normal(2, *lead, *steps, MODES, MODES)
    found = mode_log_normaliser(initial, transition, likelihood)
    marginal, pairs = mode_marginals(initial, transition, likelihood)
    assert pairs.shape == transition.shape
    expected_pairs = torch.zeros(2, BINS - 1, MODES, MODES, dtype=torch.float64)
    for element in range(2):
        own = transition[element] if lead else transition
        paths, weight = paths_of(initial[element], own, likelihood[element])
        torch.testing.assert_close(found[element], torch.logsumexp(weight, 0))
        share = torch.softmax(weight, 0)
        expected = torch.zeros(BINS, MODES, dtype=torch.float64)
        for path, p in zip(paths, share, strict=True):
            expected[torch.arange(BINS), torch.tensor(path)] += p
            for t in range(BINS - 1):
                expected_pairs[element, t, path[t], path[t + 1]] += p
        torch.testing.assert_close(marginal[element], expected)
    if not lead:
        expected_pairs = expected_pairs.sum(0)
    if steps == (1,):
        expected_pairs = expected_pairs.sum(-3, keepdim=True)
    torch.testing.assert_close(pairs, expected_pairs)


def test_gradcheck(route):
    leaves = [normal(0, 2, 3), normal(2, 1, 3, 3), normal(1, 2, 4, 3)]
    for transition in (leaves[1], normal(3, 2, 3, 3, 3)):
        inputs = [leaves[0], transition, leaves[2]]
        assert gradcheck(mode_log_normaliser, [part.clone().requires_grad_() for part in inputs])


def test_one_bin_and_one_mode(route):
    initial, likelihood = normal(0, 2, 3), normal(1, 2, 1, 3)
    found = mode_log_normaliser(initial, torch.zeros(1, 3, 3, dtype=torch.float64), likelihood)
    torch.testing.assert_close(found, torch.logsumexp(initial + likelihood[:, 0], -1))
    zeros = torch.zeros(1, dtype=torch.float64)
    alone = mode_log_normaliser(zeros, zeros.reshape(1, 1, 1), likelihood[:, :, :1].expand(2, 7, 1))
    torch.testing.assert_close(alone, 7.0 * likelihood[:, 0, 0])


def test_a_mode_that_underflows_comes_back(monkeypatch):
    """A thousand nats behind, then two thousand ahead: nothing may be lost by scaling."""
    pytest.importorskip("numba")
    likelihood = torch.zeros(1, 400, 2, dtype=torch.float64)
    likelihood[0, :200, 1], likelihood[0, 200:, 1] = -5.0, 10.0
    for rarity in (-2.0, -200.0, -1000.0, -torch.inf):
        transition = torch.tensor([[[0.0, rarity], [rarity, 0.0]]], dtype=torch.float64)
        initial = torch.zeros(1, 2, dtype=torch.float64)
        found = mode_log_normaliser(initial, transition, likelihood)
        with monkeypatch.context() as patch:
            patch.setattr(markov, "_compiled_for", lambda *_: None)
            torch.testing.assert_close(
                found, mode_log_normaliser(initial, transition, likelihood), rtol=1e-12, atol=1e-9
            )
    assert float(found) == pytest.approx(-1000.0 + 2000.0)


def test_impossible_potentials_and_large_ones():
    """Left to right, from one known mode; and log likelihoods of counts of ten thousand."""
    initial = torch.tensor([0.0, -torch.inf, -torch.inf], dtype=torch.float64)
    transition = torch.tensor([[[0.0, 0.0, -torch.inf], [-torch.inf, 0.0, 0.0], [-torch.inf, -torch.inf, 0.0]]])
    likelihood = 1e5 * normal(4, 1, BINS, MODES)
    paths, weight = paths_of(initial, transition[0].double(), likelihood[0])
    found = mode_log_normaliser(initial, transition.double(), likelihood)
    torch.testing.assert_close(found[0], torch.logsumexp(weight, 0))
    marginal, pairs = mode_marginals(initial, transition.double(), likelihood)
    assert bool(torch.isfinite(marginal).all()) and bool(torch.isfinite(pairs).all())
    best, value = most_probable_modes(initial, transition.double(), likelihood)
    assert tuple(best[0].tolist()) == paths[int(weight.argmax())]
    torch.testing.assert_close(value[0], weight.max())


@pytest.mark.parametrize("steps", [1, BINS - 1])
def test_the_most_probable_path_is_the_best_of_all(steps):
    initial, transition, likelihood = normal(0, 4, MODES), normal(2, steps, MODES, MODES), normal(1, 4, BINS, MODES)
    path, value = most_probable_modes(initial, transition, likelihood)
    for element in range(4):
        paths, weight = paths_of(initial[element], transition, likelihood[element])
        assert tuple(path[element].tolist()) == paths[int(weight.argmax())]
        torch.testing.assert_close(value[element], weight.max())


def test_drawn_paths_follow_the_posterior():
    initial, transition, likelihood = normal(0, MODES), normal(2, 2, MODES, MODES), normal(1, 3, MODES)
    drawn = sample_modes(initial, transition, likelihood, 20_000, torch.Generator().manual_seed(0))
    paths, weight = paths_of(initial, transition, likelihood)
    share = torch.softmax(weight, 0).numpy()
    code = drawn.numpy() @ np.array([9, 3, 1])
    found = np.bincount(code, minlength=27) / 20_000
    expected = np.zeros(27)
    for path, p in zip(paths, share, strict=True):
        expected[path[0] * 9 + path[1] * 3 + path[2]] = p
    assert np.all(np.abs(found - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-4)


def test_long_chains_agree_on_every_route(monkeypatch):
    pytest.importorskip("numba")
    initial = torch.log_softmax(normal(0, 4), -1)
    transition = torch.log_softmax(normal(1, 1, 4, 4) + 4.0 * torch.eye(4), -1)
    likelihood = 3.0 * normal(2, 2, 3000, 4)
    scaled = mode_log_normaliser(initial, transition, likelihood)
    monkeypatch.setattr(_mode_chain, "RAREST", math.inf)
    torch.testing.assert_close(mode_log_normaliser(initial, transition, likelihood), scaled, rtol=1e-12, atol=1e-8)
    monkeypatch.setattr(markov, "_compiled_for", lambda *_: None)
    torch.testing.assert_close(mode_log_normaliser(initial, transition, likelihood), scaled, rtol=1e-12, atol=1e-8)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"time - 1 or 1, mode, mode.*\(3,\), \(2, 3, 3\) and \(5, 3\)"):
        mode_log_normaliser(normal(0, 3), normal(1, 2, 3, 3), normal(2, 5, 3))


def test_marginals_of_a_shared_likelihood_are_those_of_each_element(route):
    initial, transition, likelihood = normal(0, 5, 2), normal(1, 1, 2, 2), normal(2, 4, 2)
    marginal, _ = mode_marginals(initial, transition, likelihood)
    assert marginal.shape == (5, 4, 2)
    torch.testing.assert_close(marginal.sum(-1), torch.ones(5, 4, dtype=torch.float64))
    found = mode_log_normaliser(initial, torch.zeros(0, 2, 2, dtype=torch.float64), likelihood[:1])
    torch.testing.assert_close(found, torch.logsumexp(initial + likelihood[0], -1))


@pytest.mark.parametrize(("modes", "bins", "steps"), [(3, 40, 1), (3, 40, 39), (20, 7, 1), (2, 2, 1), (4, 1, 1)])
def test_elements_taken_together_equal_elements_taken_one_by_one(monkeypatch, modes, bins, steps):
    """Steps that are products of matrices, pairs summed over several bins at once, against one element at a time."""
    pytest.importorskip("numba")
    leaves = [normal(0, 9, modes), normal(1, steps, modes, modes), 4.0 * normal(2, 9, bins, modes)]
    if bins == 1:
        leaves[1] = leaves[1][:1]
    for weight in (normal(3, 9), torch.full((9,), 2.0, dtype=torch.float64), torch.ones(9, dtype=torch.float64)):
        assert_together_equals_apart(monkeypatch, leaves, weight)


def assert_together_equals_apart(monkeypatch, leaves: list[Tensor], weight: Tensor) -> None:
    """Four elements at once, so that the last block is not full."""
    found = []
    monkeypatch.setattr(_mode_chain, "LEAST", 4)
    monkeypatch.setattr(_mode_chain, "BLOCK", 1)
    for together in (1, 100):
        monkeypatch.setattr(_mode_chain, "TOGETHER", together)
        inputs = [part.clone().requires_grad_() for part in leaves]
        value = mode_log_normaliser(*inputs)
        slopes = torch.autograd.grad((weight * value).sum(), inputs, materialize_grads=True)
        found.append([value, *slopes])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_pairs_of_more_bins_than_stay_in_the_cache():
    """1,500 elements of 12 modes leave room for one bin; 200 for 13, and the last chunk is not full."""
    pytest.importorskip("numba")
    for elements in (1500, 200):
        initial, transition = normal(0, 12), normal(1, 1, 12, 12)
        likelihood = normal(2, elements, 31, 12)
        marginal, pairs = mode_marginals(initial, transition, likelihood)
        torch.testing.assert_close(pairs.sum(), torch.tensor(elements * 30.0, dtype=torch.float64), rtol=1e-12, atol=0)
        torch.testing.assert_close(pairs.sum((0, 1)), marginal[:, 1:].sum((0, 1)), rtol=1e-11, atol=0)
        torch.testing.assert_close(pairs.sum((0, 2)), marginal[:, :-1].sum((0, 1)), rtol=1e-11, atol=0)


@pytest.mark.parametrize("part", ["initial", "transition", "likelihood"])
def test_nan_is_an_error_and_not_an_impossibility(route, part):
    """In the likelihood by every route, in sampling and in the search for the best path."""
    potentials = {"initial": normal(0, 2), "transition": normal(1, 1, 2, 2), "likelihood": normal(2, 4, 2)}
    potentials[part].view(-1)[-1] = torch.nan
    for function in (mode_log_normaliser, mode_marginals, sample_modes, most_probable_modes):
        with pytest.raises(ValueError, match=rf"{part} must not be NaN, got 1 .*look at the log density"):
            function(**potentials)


def test_an_infinite_potential_is_no_nan(route):
    """All modes impossible: a likelihood of zero, and no error."""
    likelihood = normal(2, 4, 2)
    likelihood[1] = -torch.inf
    value = mode_log_normaliser(normal(0, 2), normal(1, 1, 2, 2), likelihood)
    assert float(value) < -1e99


def test_memory_is_used_again_when_nothing_refers_to_it(monkeypatch):
    monkeypatch.setattr(_room, "_waiting", {})
    first = _room.room((100, 300))
    view, address = torch.from_numpy(first[10:])[5:], first.ctypes.data
    del first
    second = _room.room((299, 100))
    assert second.ctypes.data != address and second.shape == (299, 100)
    view += 1.0
    del view
    third = _room.room((30_000,))
    assert third.ctypes.data == address and third.flags.writeable and third.dtype == np.float64
    monkeypatch.setattr(_room, "KEPT", 0)
    del second, third
    assert sum(map(len, _room._waiting.values())) == 0


def test_a_gradient_leaves_its_memory_without_the_collector_of_cycles(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(_room, "_waiting", {})
    likelihood, held = normal(2, 40, 300, 4).requires_grad_(), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            value = mode_log_normaliser(normal(0, 4), normal(1, 1, 4, 4), likelihood).sum()
            torch.autograd.grad(value, likelihood)
            del value
            held.append({memory.ctypes.data for left in _room._waiting.values() for memory in left})
    finally:
        gc.enable()
    assert held[0] == held[1] == held[2]
    assert max(_room._waiting) >= 8 * likelihood.numel()


def test_gradients_of_a_kept_graph_add_up():
    """Three passes over one graph, added in place: the memory of the first is the caller's."""
    pytest.importorskip("numba")
    leaves = [normal(0, 9, 3), normal(1, 1, 3, 3), normal(2, 9, 6, 3)]
    for leaf in leaves:
        leaf.requires_grad_()
    value = mode_log_normaliser(*leaves).sum()
    once = torch.autograd.grad(mode_log_normaliser(*leaves).sum(), leaves)
    for _ in range(3):
        value.backward(retain_graph=True)
    for leaf, slope in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 3.0 * slope)
