r"""The compiled kernels of a chain: NumPy arrays in, NumPy arrays out; one CPU core, float64, one bin after another.

The precision :math:`J = L L^\top` is factorised from the first state to the last,

.. math:: R_t R_t^\top = J_{t,t} - W_{t-1}^\top W_{t-1}, \qquad W_t = R_t^{-1} J_{t,t+1} ,

with :math:`R_t` and :math:`W_t^\top` the blocks of L; the states and the blocks of the inverse follow from the last to
the first.

Importing this module imports numba and compiles nothing. A kernel is compiled when first called, once for every latent
dimension up to `UNROLLED` (its loops are then unrolled, and several times faster) and once for all larger ones. That
takes seconds; numba keeps the result on disk, and the next process reads it in milliseconds.

Arrays: diagonal (element, time, latent, latent), upper and link (element, time - 1, latent, latent), columns, white and
states (element, time, latent, column). A pivot that is not positive becomes NaN, and with it its batch element.

Reference: Golub and Van Loan, Matrix Computations (4th ed.), section 4.5, on block-tridiagonal systems.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

UNROLLED = 16  # compile for the very latent dimension up to here: beyond, unrolled loops are no faster

# Sums may be reordered; NaN and infinity keep their meaning, since a NaN says that an element is not positive definite.
_OPTIONS = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "arcp", "nsz"}}


def _inlined(function: Callable) -> Callable:
    from numba import njit

    return njit(forceinline=True, **_OPTIONS)(function)


def _kernel(layouts: str) -> Callable[[Callable], Callable[..., None]]:
    """Compile a function of arrays when first called with a latent dimension.

    ``layouts`` names the layout of each array. The last argument is a tuple as long as the latent dimension: its length
    is known when compiling. An empty one stands for any dimension.
    """

    def wrap(function: Callable) -> Callable[..., None]:
        @functools.cache
        def specialised(length: int) -> Callable[..., None]:
            from numba import njit, types

            layout = {
                "strided": types.Array(types.float64, 4, "A"),
                "blocks": types.Array(types.float64, 4, "C"),
                "rows": types.Array(types.float64, 2, "C"),
                "vector": types.Array(types.float64, 1, "C"),
                "index": types.Array(types.int64, 1, "C"),
            }
            signature = (*(layout[name] for name in layouts.split()), types.UniTuple(types.int64, length))
            try:
                dispatcher = njit(cache=True, **_OPTIONS)(function)
                dispatcher.compile(signature)
            except (RuntimeError, OSError):  # no folder that can be written to
                dispatcher = njit(**_OPTIONS)(function)
                dispatcher.compile(signature)
            dispatcher.disable_compile()  # contiguous arrays pass as strided ones
            return dispatcher

        def call(latent_dim: int, *arrays: np.ndarray) -> None:
            length = latent_dim if latent_dim <= UNROLLED else 0
            specialised(length)(*arrays, (0,) * length)

        return call

    return wrap


# The steps of one bin. The diagonal of `root` holds reciprocals; what stands above it is never read.


@_inlined
def _factor_step(diagonal, own, upper, above, root, link, work, b, t, dim):
    """Write R_t and W_t; return log |R_t|."""
    for i in range(dim):
        for j in range(i + 1):
            work[i, j] = diagonal[own, t, i, j]
    if t > 0:
        for k in range(dim):
            for i in range(dim):
                weight = link[b, t - 1, k, i]
                for j in range(i + 1):
                    work[i, j] -= weight * link[b, t - 1, k, j]
    log_det = 0.0
    for j in range(dim):
        pivot = work[j, j]
        for k in range(j):
            pivot -= root[b, t, j, k] * root[b, t, j, k]
        log_det += 0.5 * math.log(pivot) if pivot > 0.0 else np.nan
        inverse = 1.0 / math.sqrt(pivot) if pivot > 0.0 else np.nan
        root[b, t, j, j] = inverse
        for i in range(j + 1, dim):
            entry = work[i, j]
            for k in range(j):
                entry -= root[b, t, i, k] * root[b, t, j, k]
            root[b, t, i, j] = entry * inverse
    if t < diagonal.shape[1] - 1:
        for i in range(dim):
            for j in range(dim):
                link[b, t, i, j] = upper[above, t, i, j]
            for k in range(i):
                weight = root[b, t, i, k]
                for j in range(dim):
                    link[b, t, i, j] -= weight * link[b, t, k, j]
            for j in range(dim):
                link[b, t, i, j] *= root[b, t, i, i]
    return log_det


@_inlined
def _forward_step(root, link, columns, white, b, t, dim):
    """White columns of bin t: R_t^-1 (columns_t - W_t-1' white_t-1)."""
    if white.shape[3] == 1:
        for i in range(dim):
            total = columns[b, t, i, 0]
            if t > 0:
                for k in range(dim):
                    total -= link[b, t - 1, k, i] * white[b, t - 1, k, 0]
            for k in range(i):
                total -= root[b, t, i, k] * white[b, t, k, 0]
            white[b, t, i, 0] = total * root[b, t, i, i]
        return
    size = root.shape[3]  # unrolled, these loops are no faster and slow to compile
    for i in range(size):
        for n in range(white.shape[3]):
            white[b, t, i, n] = columns[b, t, i, n]
        if t > 0:
            for k in range(size):
                weight = link[b, t - 1, k, i]
                for n in range(white.shape[3]):
                    white[b, t, i, n] -= weight * white[b, t - 1, k, n]
        for k in range(i):
            weight = root[b, t, i, k]
            for n in range(white.shape[3]):
                white[b, t, i, n] -= weight * white[b, t, k, n]
        for n in range(white.shape[3]):
            white[b, t, i, n] *= root[b, t, i, i]


@_inlined
def _backward_step(root, link, white, states, b, t, dim):
    """States of bin t from those of the next: R_t^-T (white_t - W_t x_t+1). ``white`` may be ``states`` itself."""
    last = t == root.shape[1] - 1
    if white.shape[3] == 1:
        for i in range(dim - 1, -1, -1):
            total = white[b, t, i, 0]
            if not last:
                for k in range(dim):
                    total -= link[b, t, i, k] * states[b, t + 1, k, 0]
            for k in range(i + 1, dim):
                total -= root[b, t, k, i] * states[b, t, k, 0]
            states[b, t, i, 0] = total * root[b, t, i, i]
        return
    size = root.shape[3]  # unrolled, these loops are no faster and slow to compile
    for i in range(size - 1, -1, -1):
        for n in range(white.shape[3]):
            states[b, t, i, n] = white[b, t, i, n]
        if not last:
            for k in range(size):
                weight = link[b, t, i, k]
                for n in range(white.shape[3]):
                    states[b, t, i, n] -= weight * states[b, t + 1, k, n]
        for k in range(i + 1, size):
            weight = root[b, t, k, i]
            for n in range(white.shape[3]):
                states[b, t, i, n] -= weight * states[b, t, k, n]
        for n in range(white.shape[3]):
            states[b, t, i, n] *= root[b, t, i, i]


@_inlined
def _inverse_step(root, link, covariance, cross, work, b, t, dim):
    """Cov(x_t) = R_t^-T R_t^-1 + G Cov(x_t+1) G' and Cov(x_t, x_t+1) = -G Cov(x_t+1), with G = R_t^-T W_t."""
    for i in range(dim):  # work[0] = R_t^-1
        for j in range(i + 1):
            work[0, i, j] = 0.0
        for k in range(i):
            weight = root[b, t, i, k]
            for j in range(k + 1):
                work[0, i, j] -= weight * work[0, k, j]
        for j in range(i):
            work[0, i, j] *= root[b, t, i, i]
        work[0, i, i] = root[b, t, i, i]
    for i in range(dim):
        for j in range(i + 1):
            covariance[b, t, i, j] = 0.0
    for k in range(dim):
        for i in range(k + 1):
            weight = work[0, k, i]
            for j in range(i + 1):
                covariance[b, t, i, j] += weight * work[0, k, j]
    if t < root.shape[1] - 1:
        for i in range(dim):
            for j in range(dim):
                work[1, i, j] = 0.0
                cross[b, t, i, j] = 0.0
            for k in range(i, dim):
                weight = work[0, k, i]
                for j in range(dim):
                    work[1, i, j] += weight * link[b, t, k, j]
            for k in range(dim):
                weight = work[1, i, k]
                for j in range(dim):
                    cross[b, t, i, j] -= weight * covariance[b, t + 1, k, j]
            for j in range(i + 1):
                total = 0.0
                for k in range(dim):
                    total += cross[b, t, i, k] * work[1, j, k]
                covariance[b, t, i, j] -= total
    for i in range(dim):
        for j in range(i):
            covariance[b, t, j, i] = covariance[b, t, i, j]


@_inlined
def _cross_moment_step(means, cross, grad, share, row, b, t, dim):
    """Turn Cov(x_t, x_t+1) into minus its moment weighted by ``grad``, of which ``share`` is the sum."""
    if grad.shape[1] == 1:
        for i in range(dim):
            weighted = share * means[b, t, i, 0]
            for j in range(dim):
                cross[b, t, i, j] = -(share * cross[b, t, i, j] + weighted * means[b, t + 1, j, 0])
        return
    for i in range(cross.shape[3]):
        for n in range(grad.shape[1]):
            row[n] = grad[b, n] * means[b, t, i, n]
        for j in range(cross.shape[3]):
            total = share * cross[b, t, i, j]
            for n in range(grad.shape[1]):
                total += row[n] * means[b, t + 1, j, n]
            cross[b, t, i, j] = -total


@_inlined
def _own_moment_step(means, covariance, grad, share, row, b, t, dim):
    """Turn Cov(x_t) into minus half its weighted moment, and means into weighted means."""
    if grad.shape[1] == 1:
        for i in range(dim):
            weighted = share * means[b, t, i, 0]
            for j in range(dim):
                covariance[b, t, i, j] = -0.5 * (share * covariance[b, t, i, j] + weighted * means[b, t, j, 0])
        for i in range(dim):
            means[b, t, i, 0] *= share
        return
    for i in range(covariance.shape[3] - 1, -1, -1):  # the mean of row i is not needed in the rows above
        for n in range(grad.shape[1]):
            row[n] = grad[b, n] * means[b, t, i, n]
        for j in range(i + 1):
            total = share * covariance[b, t, i, j]
            for n in range(grad.shape[1]):
                total += row[n] * means[b, t, j, n]
            covariance[b, t, i, j] = -0.5 * total
            covariance[b, t, j, i] = -0.5 * total
        for n in range(grad.shape[1]):
            means[b, t, i, n] = row[n]


# The kernels. `own` and `above` say which of the distinct precisions a batch element has.


@_kernel("strided index strided index blocks blocks vector")
def factor(diagonal, own, upper, above, root, link, log_det, known):
    dim = len(known) or root.shape[3]
    work = np.empty((dim, dim))
    for b in range(root.shape[0]):
        total = 0.0
        for t in range(root.shape[1]):
            total += _factor_step(diagonal, own[b], upper, above[b], root, link, work, b, t, dim)
        log_det[b] = 2.0 * total


@_kernel("blocks blocks strided blocks")
def solve(root, link, columns, states, known):
    dim = len(known) or root.shape[3]
    for b in range(root.shape[0]):
        for t in range(root.shape[1]):
            _forward_step(root, link, columns, states, b, t, dim)
        for t in range(root.shape[1] - 1, -1, -1):
            _backward_step(root, link, states, states, b, t, dim)


@_kernel("blocks blocks blocks blocks")
def marginals(root, link, covariance, cross, known):
    dim = len(known) or root.shape[3]
    work = np.empty((2, dim, dim))
    for b in range(root.shape[0]):
        for t in range(root.shape[1] - 1, -1, -1):
            _inverse_step(root, link, covariance, cross, work, b, t, dim)


@_kernel("strided index strided index strided blocks blocks blocks rows")
def evaluate(diagonal, own, upper, above, columns, root, link, white, value, known):
    """Factor, forward substitution and log normaliser in one sweep, while a block is in the cache."""
    dim = len(known) or root.shape[3]
    work = np.empty((dim, dim))
    for b in range(root.shape[0]):
        log_det = 0.0
        value[b, :] = 0.0
        for t in range(root.shape[1]):
            log_det += _factor_step(diagonal, own[b], upper, above[b], root, link, work, b, t, dim)
            _forward_step(root, link, columns, white, b, t, dim)
            for i in range(dim):
                for n in range(white.shape[3]):
                    value[b, n] += white[b, t, i, n] * white[b, t, i, n]
        constant = 0.5 * root.shape[1] * dim * math.log(2.0 * math.pi) - log_det
        for n in range(white.shape[3]):
            value[b, n] = 0.5 * value[b, n] + constant


@_kernel("blocks blocks blocks rows blocks blocks blocks")
def differentiate(root, link, white, grad, covariance, cross, means, known):
    """The smoother, and in its place what ``grad`` makes of it, one bin behind: the bin before still needs a bin."""
    dim = len(known) or root.shape[3]
    work, row = np.empty((2, dim, dim)), np.empty(grad.shape[1])
    last = root.shape[1] - 1
    for b in range(root.shape[0]):
        share = 0.0
        for n in range(grad.shape[1]):
            share += grad[b, n]
        for t in range(last, -2, -1):
            if t >= 0:
                _backward_step(root, link, white, means, b, t, dim)
                _inverse_step(root, link, covariance, cross, work, b, t, dim)
                if t < last:
                    _cross_moment_step(means, cross, grad, share, row, b, t, dim)
            if t < last:
                _own_moment_step(means, covariance, grad, share, row, b, t + 1, dim)
