"""The chain kernel on both paths, torch and compiled, against the dense precision; and the matrix square roots."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.autograd import gradcheck

from pyrodyn.linalg import _threads, chain, matrix, square_roots
from pyrodyn.linalg.chain import ChainFactor, factorise, log_normaliser
from pyrodyn.linalg.matrix import of_all_trials, precision_of, product

SIZES = [(bins, dim) for bins in (1, 2, 3, 4, 5, 7, 8, 13) for dim in (1, 2, 3)]


@pytest.fixture(params=["torch", "compiled"])
def path(request, monkeypatch) -> str:
    """Which path `factorise` and `log_normaliser` take."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(chain, "_compiled", lambda: None)
    return request.param


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def precision(bins: int, dim: int, *batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The precision of a random walk-like chain x_t = A_t x_(t-1) + noise, and something more on every bin."""
    step = 0.6 * normal(seed, *batch, bins - 1, dim, dim)
    own = normal(seed + 1, *batch, bins, dim, dim)
    diagonal = 0.5 * torch.eye(dim, dtype=torch.float64) + 0.2 * own @ own.mT
    diagonal[..., 1:, :, :] += torch.eye(dim, dtype=torch.float64)
    diagonal[..., :-1, :, :] += step.mT @ step
    return diagonal, -step.mT


def dense(diagonal: Tensor, upper: Tensor) -> Tensor:
    *batch, bins, dim, _ = diagonal.shape
    full = diagonal.new_zeros(*batch, bins, dim, bins, dim)
    for t in range(bins):
        full[..., t, :, t, :] = diagonal[..., t, :, :]
    for t in range(bins - 1):
        full[..., t, :, t + 1, :] = upper[..., t, :, :]
        full[..., t + 1, :, t, :] = upper[..., t, :, :].mT
    return full.reshape(*batch, bins * dim, bins * dim)


def by_dense(diagonal: Tensor, upper: Tensor, linear: Tensor) -> Tensor:
    """The log normaliser from the dense precision."""
    full, flat = dense(diagonal, upper), linear.flatten(-2)
    mean = torch.linalg.solve(full, flat.unsqueeze(-1)).squeeze(-1)
    return 0.5 * (flat * mean).sum(-1) - 0.5 * torch.logdet(full) + 0.5 * flat.shape[-1] * math.log(2.0 * math.pi)


def symmetric_log_normaliser(diagonal: Tensor, upper: Tensor, linear: Tensor) -> Tensor:
    return log_normaliser(0.5 * (diagonal + diagonal.mT), upper, linear)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("bins", "dim"), [*SIZES, (4, 17)])  # 17: beyond the dimensions that are unrolled
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_factor_equals_dense(path, bins, dim, batch):
    diagonal, upper = precision(bins, dim, *batch)
    full = dense(diagonal, upper)
    inverse = torch.linalg.inv(full).reshape(*batch, bins, dim, bins, dim)
    factor = factorise(diagonal, upper)
    assert (type(factor) is ChainFactor) == (path == "torch")
    assert (factor.num_bins, factor.latent_dim) == (bins, dim)
    close(factor.log_det, torch.logdet(full))
    for count in (1, 4):
        columns = normal(2, *batch, bins, dim, count)
        solved = torch.linalg.solve(full, columns.flatten(-3, -2))
        close(factor.solve(columns), solved.unflatten(-2, (bins, dim)))
    covariance, cross = factor.marginals()
    close(covariance, torch.stack([inverse[..., t, :, t, :] for t in range(bins)], -3))
    assert cross.shape == (*batch, bins - 1, dim, dim)
    for t in range(bins - 1):
        close(cross[..., t, :, :], inverse[..., t, :, t + 1, :])
    identity = torch.eye(bins * dim, dtype=torch.float64).reshape(bins, dim, -1).expand(*batch, bins, dim, -1)
    root = factor.colour(identity).flatten(-3, -2)
    close(root @ root.mT, inverse.reshape(full.shape))


@pytest.mark.parametrize(("bins", "dim"), SIZES)
@pytest.mark.parametrize(
    ("lead", "batch"), [((), ()), ((), (3,)), ((1,), (3,)), ((2, 1), (2, 3)), ((2, 3), (2, 3)), ((2, 3), ())]
)
def test_log_normaliser_equals_dense(path, bins, dim, lead, batch):
    diagonal, upper = precision(bins, dim, *lead)
    linear = normal(2, *batch, bins, dim)
    close(log_normaliser(diagonal, upper, linear), by_dense(diagonal, upper, linear))


@pytest.mark.parametrize(("bins", "dim"), [(1, 2), (2, 1), (4, 2), (2, 17)])
@pytest.mark.parametrize(("lead", "batch"), [((1,), (2,)), ((2, 1), (2, 2)), ((2, 2), (2, 2))])
def test_gradient_of_log_normaliser(path, bins, dim, lead, batch):
    parts = (*precision(bins, dim, *lead), normal(2, *batch, bins, dim))
    parts = tuple(part.requires_grad_() for part in parts if part.numel())
    if bins == 1:  # there is no block above the diagonal to differentiate in
        above = torch.zeros(*lead, 0, dim, dim, dtype=torch.float64)
        assert gradcheck(lambda own, linear: symmetric_log_normaliser(own, above, linear), parts)
    else:
        assert gradcheck(symmetric_log_normaliser, parts, fast_mode=dim > 2)


@pytest.mark.parametrize(("dim", "lead", "batch"), [(5, (4, 1), (4, 6)), (3, (4, 6), (4, 6)), (20, (1,), (2,))])
def test_paths_agree(monkeypatch, dim, lead, batch):
    pytest.importorskip("numba")
    parts = [part.requires_grad_() for part in (*precision(40, dim, *lead), normal(2, *batch, 40, dim))]
    weights = normal(3, *batch)

    def value_and_gradient() -> list[Tensor]:
        value = log_normaliser(*parts)
        return [value.detach(), *torch.autograd.grad((weights * value).sum(), parts)]

    compiled = value_and_gradient()
    monkeypatch.setattr(chain, "_compiled", lambda: None)
    for found, expected in zip(compiled, value_and_gradient(), strict=True):
        close(found, expected, 1e-9)


def test_expanded_and_transposed_blocks_are_read_as_they_are(path):
    bins, dim = 6, 3
    own = normal(0, 2, 1, dim, dim)
    diagonal = (4.0 * torch.eye(dim, dtype=torch.float64) + own @ own.mT)[:, :, None].expand(2, 3, bins, dim, dim)
    upper = (0.3 * normal(1, 1, 3, dim, dim)).mT[:, :, None].expand(2, 3, bins - 1, dim, dim)
    linear = normal(2, dim, 3, bins, 2).permute(3, 1, 2, 0)
    assert not linear.is_contiguous() and 0 in diagonal.stride() and 0 in upper.stride()
    close(log_normaliser(diagonal, upper, linear), by_dense(diagonal, upper, linear))
    solved = torch.linalg.solve(dense(diagonal, upper), linear.flatten(-2).unsqueeze(-1))
    found = factorise(diagonal, upper[:1]).solve(linear.unsqueeze(-1))  # a batch to be expanded here
    close(found.flatten(-3), solved.squeeze(-1))


@pytest.mark.parametrize("bad", [0, 3, 6])
@pytest.mark.parametrize("entry", [-1.0, 0.0])
@pytest.mark.parametrize("count", [1, 2])
def test_only_the_element_that_is_not_positive_definite_is_nan(path, bad, entry, count):
    diagonal, upper = precision(7, 2, 3)
    diagonal[1, bad] = torch.tensor([[2.0, 0.0], [0.0, entry]])
    upper[1, max(bad - 1, 0) : bad + 1] = 0.0
    linear = normal(2, count, 3, 7, 2)
    factor = factorise(diagonal, upper)
    columns = linear.movedim(0, -1)
    parts = [part.clone().requires_grad_() for part in (diagonal, upper, linear)]
    value = log_normaliser(*parts)
    own, above, means = torch.autograd.grad(value.sum(), parts)
    results = [factor.log_det, factor.solve(columns), factor.colour(columns), *factor.marginals()]
    for result in [*results, value.movedim(0, -1), own, above, means.movedim(0, -1)]:
        good = torch.isfinite(result).flatten(1).all(-1) if result.dim() > 1 else torch.isfinite(result)
        assert good.tolist() == [True, False, True]
    assert bool(factor.log_det[1].isnan()) and bool(factor.solve(columns)[1].isnan().all())


def test_long_chain(path):
    bins, weight = 20_000, 0.9
    diagonal, upper = precision(bins, 2)
    columns = normal(2, bins, 2, 1)
    found = factorise(diagonal, upper).solve(columns)
    residual = diagonal @ found - columns
    residual[:-1] += upper @ found[1:]
    residual[1:] += upper.mT @ found[:-1]
    assert residual.abs().max() < 1e-10
    # A stationary AR(1) process of unit innovations: |J| = 1 - weight^2.
    diagonal = torch.full((bins, 1, 1), 1.0 + weight**2, dtype=torch.float64)
    diagonal[[0, -1]] = 1.0
    upper = torch.full((bins - 1, 1, 1), -weight, dtype=torch.float64)
    assert float(factorise(diagonal, upper).log_det) == pytest.approx(math.log(1.0 - weight**2), abs=1e-8)


def test_factorise_takes_torch_where_something_differentiates_or_cannot_compile():
    pytest.importorskip("numba")
    diagonal, upper = precision(4, 2)
    assert type(factorise(diagonal, upper)) is not ChainFactor
    assert type(factorise(diagonal.float(), upper.float())) is ChainFactor
    assert type(factorise(diagonal, upper.requires_grad_())) is ChainFactor
    with torch.no_grad():
        assert type(factorise(diagonal, upper)) is not ChainFactor


def test_columns_that_require_a_gradient_have_one(path):
    factor = factorise(*precision(4, 2))
    columns = normal(2, 4, 2, 2).requires_grad_()
    assert gradcheck(lambda part: (factor.solve(part), factor.colour(part)), columns)


def test_colour_is_one_map_on_both_paths():
    pytest.importorskip("numba")
    diagonal, upper = precision(9, 3)
    noise = normal(2, 9, 3, 2)
    assert torch.equal(factorise(diagonal, upper).colour(noise), ChainFactor(diagonal, upper).colour(noise))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on loading its rules
def test_forward_mode_derivative_is_not_lost(path):
    diagonal, upper = precision(3, 2)
    columns, change = normal(2, 3, 2, 1), torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(diagonal, change.clone())
        found = torch.autograd.forward_ad.unpack_dual(factorise(dual, upper).solve(columns)).tangent
    full = dense(diagonal, upper)
    assert found is not None
    close(found.flatten(), -torch.linalg.solve(full, torch.linalg.solve(full, columns.flatten())))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit.trace
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are compared
def test_trace_follows_its_inputs(path):
    diagonal, upper = precision(3, 2)
    linear = normal(2, 3, 2)
    traced = torch.jit.trace(log_normaliser, (diagonal, upper, linear), check_trace=False)
    close(traced(2.0 * diagonal, upper, linear), by_dense(2.0 * diagonal, upper, linear))


def test_log_normaliser_refuses_shapes_that_do_not_fit(path):
    diagonal, upper = precision(5, 2)
    for parts in ((diagonal, upper[1:], diagonal[..., 0]), (diagonal, upper, diagonal[1:, :, 0])):
        with pytest.raises(ValueError, match=r"upper and linear must be .*\(5, 2, 2\)"):
            log_normaliser(*parts)


def test_compiled_kernels_refuse_shapes_that_do_not_fit():
    pytest.importorskip("numba")
    diagonal, upper = precision(5, 2)
    with pytest.raises(ValueError, match=r"time - 1.*\(5, 2, 2\) and \(3, 2, 2\)"):
        factorise(diagonal, upper[1:])
    with pytest.raises(ValueError, match=r"columns must be .*\(5, 2\).*\(4, 2, 1\)"):
        factorise(diagonal, upper).solve(normal(2, 4, 2, 1))


def test_import_leaves_numba_alone_and_everything_works_without_it():
    program = """
import sys, torch
import pyrodyn.linalg
from pyrodyn.linalg.chain import ChainFactor, factorise, log_normaliser
from pyrodyn.linalg.matrix import of_all_trials, precision_of, product
assert "numba" not in sys.modules
sys.modules["numba"] = None  # as if it were not installed
eye = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
assert type(factorise(2 * eye, 0 * eye[1:])) is ChainFactor
print(float(log_normaliser(2 * eye, 0 * eye[1:], torch.ones(3, 2, dtype=torch.float64))))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert float(finished.stdout) == pytest.approx(1.5 + 3.0 * math.log(math.pi))


def test_precision_equals_the_inverse_and_has_its_gradient():
    mixed = normal(0, 3, 4, 4)
    covariance = mixed @ mixed.mT + 0.5 * torch.eye(4, dtype=torch.float64)
    found, log_det = precision_of(covariance)
    close(found, torch.linalg.inv(covariance))
    close(log_det, torch.linalg.slogdet(covariance).logabsdet)
    assert gradcheck(lambda m: precision_of(m @ m.mT + 0.5 * torch.eye(4)), mixed.clone().requires_grad_())
    covariance[1] -= 20.0 * torch.eye(4)
    assert torch.isfinite(precision_of(covariance)[0]).flatten(1).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_square_roots_equal_scipy(dim):
    own = normal(0, 3, dim, dim)
    matrix = own @ own.mT + 0.1 * torch.eye(dim, dtype=torch.float64)
    root, inverse = square_roots(matrix)
    for index in range(3):
        expected = scipy.linalg.sqrtm(matrix[index].numpy())
        np.testing.assert_allclose(root[index], expected, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(inverse[index], np.linalg.inv(expected), rtol=1e-8, atol=1e-9)


def mixings() -> list[Tensor]:
    """Of distinct eigenvalues, of equal ones (a scaled rotation), and of both."""
    rotation = torch.linalg.qr(normal(1, 3, 3))[0]
    return [normal(0, 2, 3, 3), 3.0 * rotation, rotation @ torch.diag(torch.tensor([2.0, 2.0, 0.5]).double())]


@pytest.mark.parametrize("mixing", mixings(), ids=["distinct", "equal", "both"])
def test_gradient_of_square_roots(mixing):
    eye = torch.eye(3, dtype=torch.float64)
    assert gradcheck(lambda part: square_roots(eye + part @ part.mT), mixing.requires_grad_())


@pytest.mark.parametrize(("left", "right"), [
    ((3, 7), (7, 2)), ((2, 500, 7), (2, 7, 2)), ((500, 7), (4, 7, 2)), ((4, 7, 500), (500, 3)),
    ((2, 1, 5, 500), (3, 500, 2)), ((300, 7), (7, 400)), ((0, 7), (7, 2)),
])  # fmt: skip
def test_products_by_parts_equal_products(monkeypatch, left, right):
    """Tall ones, long sums, broadcast batches; and where a gradient is wanted."""
    monkeypatch.setattr(matrix, "CACHED", 700)
    first, second = normal(0, *left), normal(1, *right)
    torch.testing.assert_close(product(first, second), first @ second, rtol=1e-12, atol=1e-12)
    tracked = first.clone().requires_grad_()
    assert product(tracked, second).requires_grad


def test_a_product_with_infinities_is_what_torch_makes_of_it():
    first, second = normal(0, 4, 3), normal(1, 3, 2)
    first[0, 0], first[1, 1], second[0, 0] = torch.inf, torch.nan, -torch.inf
    first[2, 0], second[0, 1] = 1e300, 1e300
    torch.testing.assert_close(product(first, second), first @ second, equal_nan=True)


def test_a_product_for_all_trials_equals_one_for_each():
    for weights in (normal(1, 1, 4, 2), normal(1, 5, 1, 4, 2), normal(1, 5, 3, 4, 2), normal(1, 4, 2)):
        values = normal(0, 3, 6, 4)
        torch.testing.assert_close(of_all_trials(values, weights), values @ weights, rtol=1e-12, atol=1e-12)
    values, weights = normal(0, 5, 3, 6, 4), normal(1, 5, 1, 4, 2)
    torch.testing.assert_close(of_all_trials(values, weights), values @ weights, rtol=1e-12, atol=1e-12)


@contextmanager
def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("expanded", [False, True])
def test_a_batch_divided_among_threads_gives_the_same_bits(monkeypatch, expanded):
    """Elements of their own precision, and such that share one."""
    monkeypatch.setattr(_threads, "WORTH", 1)
    pytest.importorskip("numba")
    diagonal, upper = precision(6, 3, 5, 1)
    if expanded:
        diagonal, upper = diagonal.expand(5, 2, 6, 3, 3), upper.expand(5, 2, 5, 3, 3)
    columns = normal(2, *diagonal.shape[:-1], 2)
    found = []
    for number in (1, 2, 3, 16):
        with threads(number):
            factor = factorise(diagonal, upper)
            parts = [part.clone().requires_grad_() for part in (diagonal, upper, columns)]
            value = log_normaliser(*parts[:2], parts[2][..., 0])
            gradients = torch.autograd.grad(value.sum(), parts[:2])
            drawn = factor.draw(columns)
            found.append(
                [factor.log_det, factor.solve(columns), drawn, factor.noise_of(drawn), *factor.marginals(), value]
                + list(gradients)
            )
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_what_one_thread_raises_is_raised(monkeypatch):
    monkeypatch.setattr(_threads, "WORTH", 1)

    def run(part: np.ndarray) -> None:
        if part[0] > 0:
            raise ZeroDivisionError

    with threads(2), pytest.raises(ZeroDivisionError):
        _threads.shared_out(run, [np.arange(4)], [False])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(_threads, "WORTH", 1)
    total = np.zeros(4)

    def run(part: np.ndarray, out: np.ndarray) -> None:
        out += part

    with threads(2):
        _threads.shared_out(run, [np.ones(4), total], [False, False])
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a thread that never comes would be waited for
            _threads.shared_out(run, [np.ones(4), total], [False, False])
            os._exit(int((total != 2.0).any()))
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(total, 1.0)
