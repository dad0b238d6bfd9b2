r"""Compiled kernels of a chain whose precision does not change with time but at its ends.

Between the first bin and the last the factor

.. math:: R_t R_t^\top = J_{mid} - W_{t-1}^\top W_{t-1}, \qquad W_t = R_t^{-1} J_{upper}

comes to rest after some bins, and so do the blocks of the inverse on the way back. From there on both are read, not
computed: only the columns still take a step a bin. Gradients are summed over bins as they come, so that nothing of the
size (time, latent, latent) is ever written.

Arrays: blocks (element, 3, latent, latent), the diagonal blocks of the first bin, of those between, and of the last;
upper (element, 1, latent, latent); root and link (element, slot, latent, latent), one slot for each distinct factor, at
most one a bin, `used` says how many; columns and white (element, time, latent, column); means (1, 2, latent, column),
of two bins that follow each other. At least two bins.
"""

from __future__ import annotations

import math

import numpy as np

from pyrodyn.linalg._kernels import backward_step, factor_step, forward_step, inlined, inverse_step, kernel

AT_REST = 1e-15  # largest change of an entry from one bin to the next, in units of its row and column


@inlined
def _factor_at_rest(root, b, s, p, dim):
    """Whether the factors of slots s and p are equal to rounding, whatever the units of each latent.

    The diagonal of ``root`` holds reciprocals.
    """
    for i in range(dim):
        if abs(root[b, s, i, i] - root[b, p, i, i]) > AT_REST * abs(root[b, s, i, i]):
            return False
        for j in range(i):
            if abs(root[b, s, i, j] - root[b, p, i, j]) * abs(root[b, s, i, i]) > AT_REST:
                return False
    return True


@inlined
def _covariance_at_rest(covariance, s, p, dim):
    for i in range(dim):
        for j in range(i + 1):
            unit = math.sqrt(covariance[0, s, i, i] * covariance[0, s, j, j])
            if not abs(covariance[0, s, i, j] - covariance[0, p, i, j]) <= AT_REST * unit:
                return False
    return True


@kernel("blocks blocks strided blocks blocks blocks rows index")
def evaluate(blocks, upper, columns, root, link, white, value, used, known):
    """Factor, forward substitution and log normaliser in one sweep."""
    dim = len(known) or root.shape[3]
    work = np.empty((dim, dim))
    last = columns.shape[1] - 1
    for b in range(root.shape[0]):
        value[b, :] = 0.0
        log_det, step, s, resting = 0.0, 0.0, -1, False
        for t in range(columns.shape[1]):
            before = s
            if t == 0 or t == last or not resting:
                s += 1
                at = 0 if t == 0 else (2 if t == last else 1)
                ahead = 0 if t < last else -1
                step = factor_step(blocks, b, at, upper, b, ahead, root, link, work, b, s, dim)
                resting = 1 < t < last and _factor_at_rest(root, b, s, s - 1, dim)
            log_det += step
            forward_step(root, link, columns, white, b, t, s, before, dim)
            for i in range(dim):
                for n in range(white.shape[3]):
                    value[b, n] += white[b, t, i, n] * white[b, t, i, n]
        used[b] = s + 1
        constant = 0.5 * columns.shape[1] * dim * math.log(2.0 * math.pi) - log_det
        for n in range(white.shape[3]):
            value[b, n] = 0.5 * value[b, n] + constant


@inlined
def _add_moments(moments, place, means, grad, row, b, u, v, dim):
    """Add the weighted outer product of the means at u and v to ``moments[b, place]``.

    Of u with itself only what is not above the diagonal, where there are several columns.
    """
    if grad.shape[1] == 1:
        for i in range(dim):
            weighted = grad[b, 0] * means[0, u, i, 0]
            for j in range(dim):
                moments[b, place, i, j] += weighted * means[0, v, j, 0]
        return
    for i in range(moments.shape[3]):
        for n in range(grad.shape[1]):
            row[n] = grad[b, n] * means[0, u, i, n]
        size = moments.shape[3] if v != u else i + 1
        for j in range(1, size, 2):  # two at a time: a loop over columns costs as much to begin as ten of its steps
            one, two = 0.0, 0.0
            for n in range(grad.shape[1]):
                one += row[n] * means[0, v, j - 1, n]
                two += row[n] * means[0, v, j, n]
            moments[b, place, i, j - 1] += one
            moments[b, place, i, j] += two
        if size % 2:
            one = 0.0
            for n in range(grad.shape[1]):
                one += row[n] * means[0, v, size - 1, n]
            moments[b, place, i, size - 1] += one


@kernel("blocks blocks blocks index rows blocks blocks")
def differentiate(root, link, white, used, grad, moments, pulled, known):
    """Expected sufficient statistics, weighted by ``grad`` and summed over bins.

    ``moments`` (element, 4, latent, latent) becomes the gradient in the three blocks and the upper one, ``pulled``
    (element, column, time, latent) that in the columns. Means are kept of two bins, which stay in the cache.
    """
    dim = len(known) or root.shape[3]
    work, row = np.empty((2, dim, dim)), np.empty(grad.shape[1])
    covariance, cross = np.empty((1, 2, dim, dim)), np.empty((1, 2, dim, dim))
    means = np.empty((1, 2, root.shape[3], white.shape[3]))
    last = white.shape[1] - 1
    for b in range(root.shape[0]):
        moments[b] = 0.0
        share = 0.0
        for n in range(grad.shape[1]):
            share += grad[b, n]
        own, resting, held, stays = 0, False, 0.0, used[b] - 2  # the slot of all bins between that are at rest
        for t in range(last, -1, -1):
            s = used[b] - 1 if t == last else min(t, stays)
            u, v = t % 2, (t + 1) % 2
            backward_step(root, link, white, means, b, t, s, 0, u, v, dim)
            if resting and s == stays and t > 0:
                held += 1.0
            else:
                if held > 0.0:
                    for i in range(dim):
                        for j in range(dim):
                            moments[b, 1, i, j] += share * held * covariance[0, own, i, j]
                            moments[b, 3, i, j] += share * held * cross[0, own, i, j]
                    held = 0.0
                after = own if t < last else -1
                own = 1 - own
                inverse_step(root, link, covariance, cross, work, b, s, 0, own, after, dim)
                resting = 0 < t < last - 1 and s == stays and _covariance_at_rest(covariance, own, after, dim)
                place = 0 if t == 0 else (2 if t == last else 1)
                for i in range(dim):
                    for j in range(dim):
                        moments[b, place, i, j] += share * covariance[0, own, i, j]
                        if t < last:
                            moments[b, 3, i, j] += share * cross[0, own, i, j]
            _add_moments(moments, 0 if t == 0 else (2 if t == last else 1), means, grad, row, b, u, u, dim)
            if t < last:
                _add_moments(moments, 3, means, grad, row, b, u, v, dim)
            for n in range(grad.shape[1]):
                for i in range(dim):
                    pulled[b, n, t, i] = grad[b, n] * means[0, u, i, n]
        for i in range(dim):
            for j in range(dim):
                moments[b, 3, i, j] *= -1.0
            for place in range(3):
                for j in range(i + 1):
                    moments[b, place, i, j] *= -0.5
                    moments[b, place, j, i] = moments[b, place, i, j]
