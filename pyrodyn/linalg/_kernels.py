r"""The compiled kernels of a chain: NumPy arrays in, NumPy arrays out; on the CPU, float64, one bin after another.

The precision :math:`J = L L^\top` is factorised from the first state to the last,

.. math:: R_t R_t^\top = J_{t,t} - W_{t-1}^\top W_{t-1}, \qquad W_t = R_t^{-1} J_{t,t+1} ,

with :math:`R_t` and :math:`W_t^\top` the blocks of L; the states and the blocks of the inverse follow from the last to
the first.

Importing this module imports numba and compiles nothing. A kernel is compiled when first called, once for every latent
dimension up to `UNROLLED` (its loops are then unrolled, and several times faster) and once for all larger ones. That
takes seconds; numba keeps the result on disk, and the next process reads it in milliseconds.

Batch elements do not know of each other. Large batches are divided among as many threads as torch has, with the same
results to the bit.

Arrays: diagonal (element, time, latent, latent), upper and link (element, time - 1, latent, latent), columns, white and
states (element, time, latent, column). A pivot that is not positive becomes NaN, and with it its batch element.

Reference: Golub and Van Loan, Matrix Computations (4th ed.), section 4.5, on block-tridiagonal systems.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from pyrodyn.linalg._threads import shared_out

UNROLLED = 16  # compile for the very latent dimension up to here: beyond, unrolled loops are no faster

# Sums may be reordered; NaN and infinity keep their meaning, since a NaN says that an element is not positive definite.
_OPTIONS = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "nogil": True}


def inlined(function: Callable) -> Callable:
    from numba import njit

    return njit(forceinline=True, **_OPTIONS)(function)


def kernel(layouts: str) -> Callable[[Callable], Callable[..., None]]:
    """Compile a function of arrays when first called with a latent dimension.

    ``layouts`` names the layout of each array: what is "distinct" is there for all batch elements, of every other array
    each has its own part. The last argument is a tuple as long as the latent dimension: its length is known when
    compiling. An empty one stands for any dimension.
    """

    common = [name == "distinct" for name in layouts.split()]

    def wrap(function: Callable) -> Callable[..., None]:
        @functools.cache
        def specialised(length: int) -> Callable[..., None]:
            from numba import njit, types

            layout = {
                "distinct": types.Array(types.float64, 4, "A"),
                "strided": types.Array(types.float64, 4, "A"),
                "blocks": types.Array(types.float64, 4, "C"),
                "rows": types.Array(types.float64, 2, "C"),
                "vector": types.Array(types.float64, 1, "C"),
                "index": types.Array(types.int64, 1, "C"),
                "stack": types.Array(types.float64, 3, "C"),
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
            run, known = specialised(length), (0,) * length
            shared_out(lambda *some: run(*some, known), arrays, common)

        return call

    return wrap


# The steps of one bin. The diagonal of `root` holds reciprocals; what stands above it is never read.


@inlined
def factor_step(diagonal, own, at, upper, above, ahead, root, link, work, b, s, dim):
    """Write R and W of slot s from the diagonal block ``at`` and the upper block ``ahead``, none behind the last bin;
    return log |R|."""
    for i in range(dim):
        for j in range(i + 1):
            work[i, j] = diagonal[own, at, i, j]
    if s > 0:
        for k in range(dim):
            for i in range(dim):
                weight = link[b, s - 1, k, i]
                for j in range(i + 1):
                    work[i, j] -= weight * link[b, s - 1, k, j]
    log_det = 0.0
    for j in range(dim):
        pivot = work[j, j]
        for k in range(j):
            pivot -= root[b, s, j, k] * root[b, s, j, k]
        log_det += 0.5 * math.log(pivot) if pivot > 0.0 else np.nan
        inverse = 1.0 / math.sqrt(pivot) if pivot > 0.0 else np.nan
        root[b, s, j, j] = inverse
        for i in range(j + 1, dim):
            entry = work[i, j]
            for k in range(j):
                entry -= root[b, s, i, k] * root[b, s, j, k]
            root[b, s, i, j] = entry * inverse
    if ahead >= 0:
        for i in range(dim):
            for j in range(dim):
                link[b, s, i, j] = upper[above, ahead, i, j]
            for k in range(i):
                weight = root[b, s, i, k]
                for j in range(dim):
                    link[b, s, i, j] -= weight * link[b, s, k, j]
            for j in range(dim):
                link[b, s, i, j] *= root[b, s, i, i]
    return log_det


@inlined
def _less(found, b, t, i, one, rows, e, u, k):
    """Take ``one`` times row k from row i, over all columns."""
    for n in range(found.shape[3]):
        found[b, t, i, n] -= one * rows[e, u, k, n]


@inlined
def _less_two(found, b, t, i, one, two, rows, e, u, k):
    """Take ``one`` times row k - 1 and ``two`` times row k from row i: half the traffic of one after the other."""
    for n in range(found.shape[3]):
        found[b, t, i, n] -= one * rows[e, u, k - 1, n] + two * rows[e, u, k, n]


@inlined
def forward_step(root, link, columns, white, b, t, s, p, dim):
    """White columns of bin t: R_s^-1 (columns_t - W_p' white_t-1), with p the slot of bin t - 1."""
    if white.shape[3] == 1:
        for i in range(dim):
            total = columns[b, t, i, 0]
            if t > 0:
                for k in range(dim):
                    total -= link[b, p, k, i] * white[b, t - 1, k, 0]
            for k in range(i):
                total -= root[b, s, i, k] * white[b, t, k, 0]
            white[b, t, i, 0] = total * root[b, s, i, i]
        return
    size = root.shape[3]  # unrolled, these loops are no faster and slow to compile
    for i in range(size):
        for n in range(white.shape[3]):
            white[b, t, i, n] = columns[b, t, i, n]
        if t > 0:
            for k in range(1, size, 2):
                _less_two(white, b, t, i, link[b, p, k - 1, i], link[b, p, k, i], white, b, t - 1, k)
            if size % 2:
                _less(white, b, t, i, link[b, p, size - 1, i], white, b, t - 1, size - 1)
        for k in range(1, i, 2):
            _less_two(white, b, t, i, root[b, s, i, k - 1], root[b, s, i, k], white, b, t, k)
        if i % 2:
            _less(white, b, t, i, root[b, s, i, i - 1], white, b, t, i - 1)
        for n in range(white.shape[3]):
            white[b, t, i, n] *= root[b, s, i, i]


@inlined
def backward_step(root, link, white, states, b, t, s, e, u, v, dim):
    """States of bin t, R_s^-T (white_t - W_s x_t+1), at u of element e, from those of the next at v. ``white`` may be
    ``states`` itself."""
    last = t == white.shape[1] - 1
    if white.shape[3] == 1:
        for i in range(dim - 1, -1, -1):
            total = white[b, t, i, 0]
            if not last:
                for k in range(dim):
                    total -= link[b, s, i, k] * states[e, v, k, 0]
            for k in range(i + 1, dim):
                total -= root[b, s, k, i] * states[e, u, k, 0]
            states[e, u, i, 0] = total * root[b, s, i, i]
        return
    size = root.shape[3]  # unrolled, these loops are no faster and slow to compile
    for i in range(size - 1, -1, -1):
        for n in range(white.shape[3]):
            states[e, u, i, n] = white[b, t, i, n]
        if not last:
            for k in range(1, size, 2):
                _less_two(states, e, u, i, link[b, s, i, k - 1], link[b, s, i, k], states, e, v, k)
            if size % 2:
                _less(states, e, u, i, link[b, s, i, size - 1], states, e, v, size - 1)
        for k in range(i + 2, size, 2):
            _less_two(states, e, u, i, root[b, s, k - 1, i], root[b, s, k, i], states, e, u, k)
        if (size - i) % 2 == 0:
            _less(states, e, u, i, root[b, s, size - 1, i], states, e, u, size - 1)
        for n in range(white.shape[3]):
            states[e, u, i, n] *= root[b, s, i, i]


@inlined
def inverse_step(root, link, covariance, cross, work, b, s, e, t, n, dim):
    """Cov(x_t) = R_s^-T R_s^-1 + G Cov(x_n) G' and Cov(x_t, x_n) = -G Cov(x_n), with G = R_s^-T W_s and n the next bin;
    n < 0 behind the last. Covariances are those of element e."""
    for i in range(dim):  # work[0] = R_s^-1
        for j in range(i + 1):
            work[0, i, j] = 0.0
        for k in range(i):
            weight = root[b, s, i, k]
            for j in range(k + 1):
                work[0, i, j] -= weight * work[0, k, j]
        for j in range(i):
            work[0, i, j] *= root[b, s, i, i]
        work[0, i, i] = root[b, s, i, i]
    for i in range(dim):
        for j in range(i + 1):
            covariance[e, t, i, j] = 0.0
    for k in range(dim):
        for i in range(k + 1):
            weight = work[0, k, i]
            for j in range(i + 1):
                covariance[e, t, i, j] += weight * work[0, k, j]
    if n >= 0:
        for i in range(dim):
            for j in range(dim):
                work[1, i, j] = 0.0
                cross[e, t, i, j] = 0.0
            for k in range(i, dim):
                weight = work[0, k, i]
                for j in range(dim):
                    work[1, i, j] += weight * link[b, s, k, j]
            for k in range(dim):
                weight = work[1, i, k]
                for j in range(dim):
                    cross[e, t, i, j] -= weight * covariance[e, n, k, j]
            for j in range(i + 1):
                total = 0.0
                for k in range(dim):
                    total += cross[e, t, i, k] * work[1, j, k]
                covariance[e, t, i, j] -= total
    for i in range(dim):
        for j in range(i):
            covariance[e, t, j, i] = covariance[e, t, i, j]


@inlined
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


@inlined
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


@kernel("distinct index distinct index blocks blocks vector")
def factor(diagonal, own, upper, above, root, link, log_det, known):
    dim = len(known) or root.shape[3]
    work = np.empty((dim, dim))
    for b in range(root.shape[0]):
        total = 0.0
        for t in range(root.shape[1]):
            ahead = t if t < root.shape[1] - 1 else -1
            total += factor_step(diagonal, own[b], t, upper, above[b], ahead, root, link, work, b, t, dim)
        log_det[b] = 2.0 * total


@kernel("blocks blocks strided blocks")
def solve(root, link, columns, states, known):
    dim = len(known) or root.shape[3]
    for b in range(root.shape[0]):
        for t in range(root.shape[1]):
            forward_step(root, link, columns, states, b, t, t, t - 1, dim)
        for t in range(root.shape[1] - 1, -1, -1):
            backward_step(root, link, states, states, b, t, t, b, t, t + 1, dim)


@kernel("blocks blocks strided blocks")
def colour(root, link, noise, states, known):
    """The second half of `solve`: states of precision J from iid noise."""
    dim = len(known) or root.shape[3]
    for b in range(root.shape[0]):
        for t in range(root.shape[1] - 1, -1, -1):
            backward_step(root, link, noise, states, b, t, t, b, t, t + 1, dim)


@kernel("blocks blocks strided blocks")
def whiten(root, link, states, noise, known):
    """The inverse of `colour`: R_t' x_t + W_t x_t+1."""
    dim = len(known) or root.shape[3]
    for b in range(root.shape[0]):
        for t in range(root.shape[1]):
            for i in range(dim):
                for n in range(states.shape[3]):
                    total = states[b, t, i, n] / root[b, t, i, i]
                    for k in range(i + 1, dim):
                        total += root[b, t, k, i] * states[b, t, k, n]
                    if t < root.shape[1] - 1:
                        for k in range(dim):
                            total += link[b, t, i, k] * states[b, t + 1, k, n]
                    noise[b, t, i, n] = total


@kernel("blocks blocks blocks blocks")
def marginals(root, link, covariance, cross, known):
    dim = len(known) or root.shape[3]
    work = np.empty((2, dim, dim))
    for b in range(root.shape[0]):
        for t in range(root.shape[1] - 1, -1, -1):
            after = t + 1 if t < root.shape[1] - 1 else -1
            inverse_step(root, link, covariance, cross, work, b, t, b, t, after, dim)


@kernel("distinct index distinct index strided blocks blocks blocks rows")
def evaluate(diagonal, own, upper, above, columns, root, link, white, value, known):
    """Factor, forward substitution and log normaliser in one sweep, while a block is in the cache."""
    dim = len(known) or root.shape[3]
    work = np.empty((dim, dim))
    for b in range(root.shape[0]):
        log_det = 0.0
        value[b, :] = 0.0
        for t in range(root.shape[1]):
            ahead = t if t < root.shape[1] - 1 else -1
            log_det += factor_step(diagonal, own[b], t, upper, above[b], ahead, root, link, work, b, t, dim)
            forward_step(root, link, columns, white, b, t, t, t - 1, dim)
            for i in range(dim):
                for n in range(white.shape[3]):
                    value[b, n] += white[b, t, i, n] * white[b, t, i, n]
        constant = 0.5 * root.shape[1] * dim * math.log(2.0 * math.pi) - log_det
        for n in range(white.shape[3]):
            value[b, n] = 0.5 * value[b, n] + constant


@kernel("blocks blocks blocks rows blocks blocks blocks")
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
                backward_step(root, link, white, means, b, t, t, b, t, t + 1, dim)
                after = t + 1 if t < last else -1
                inverse_step(root, link, covariance, cross, work, b, t, b, t, after, dim)
                if t < last:
                    _cross_moment_step(means, cross, grad, share, row, b, t, dim)
            if t < last:
                _own_moment_step(means, covariance, grad, share, row, b, t + 1, dim)
