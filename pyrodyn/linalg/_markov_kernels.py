r"""Compiled kernels of a hidden Markov chain: NumPy arrays in, NumPy arrays out; float64, one CPU core.

Two ways to the same sums. The scaled one multiplies probabilities, normalised in every bin: fast, and exact to rounding
as long as no transition is rarer than :math:`e^{-300}`, since a state that underflows is then filled again from the
others in the next bin. The logarithmic one takes any potential, minus infinity included.

Elements that share a transition are taken together, bin after bin: their step is one product of matrices. Others go one
after another; those kernels are compiled for the very number of modes up to `UNROLLED`, by a tuple of that length; an
empty one stands for any number.

Arrays: initial (element, mode), transition (element or 1, time - 1 or 1, mode, mode) from the first mode to the second,
likelihood (element, time, mode). Elements and bins of size one are shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

try:
    from numba import njit
except ImportError:  # the functions below run as they are: right, and slow
    njit = None

UNROLLED = 16
CACHED = 8_192  # numbers that may wait in the cache for a product of matrices: 64 kB

_OPTIONS = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}


def inlined(function: Callable) -> Callable:
    return function if njit is None else njit(forceinline=True, **_OPTIONS)(function)


def compiled(function: Callable) -> Callable:
    """Compile at the first call and keep the result on disk; where no folder can be written to, without keeping it."""
    if njit is None:
        return function
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        return njit(**_OPTIONS)(function)


@compiled
def relative(likelihood, top, below, known):
    """Largest entry of every bin ``top`` (element, time), and what the others are below it; returns their sum.

    That sum is NaN where a potential is NaN, or the largest of a bin infinite.
    """
    elements, bins = likelihood.shape[:2]
    modes = len(known) or likelihood.shape[2]
    whole = 0.0
    for b in range(elements):
        for t in range(bins):
            largest = likelihood[b, t, 0]
            for k in range(1, modes):
                largest = likelihood[b, t, k] if likelihood[b, t, k] > largest else largest
            top[b, t] = largest
            for k in range(modes):
                below[b, t, k] = likelihood[b, t, k] - largest
                whole += below[b, t, k]
    return whole


@compiled
def filter_together(initial, transition, likelihood, filtered, scale, known):
    """`filter_scaled` of elements that share a transition (time - 1 or 1, mode, mode).

    Time comes first: likelihood and filtered (time, element, mode); not in scale (element, time). The likelihood is
    divided by the scale, as `smooth_together` wants it.
    """
    bins, elements = likelihood.shape[:2]
    modes = len(known) or likelihood.shape[2]
    for t in range(bins):
        if t == 0:
            filtered[0] = initial
        else:
            np.dot(filtered[t - 1], transition[min(t - 1, len(transition) - 1)], filtered[t])
        for b in range(elements):
            total = 0.0
            for k in range(modes):
                filtered[t, b, k] *= likelihood[t, b, k]
                total += filtered[t, b, k]
            scale[b, t] = total
            inverse = 1.0 / total
            for k in range(modes):
                filtered[t, b, k] *= inverse
                likelihood[t, b, k] *= inverse


@compiled
def smooth_together(transition, transposed, likelihood, filtered, weight, marginal, pairs, known):
    """Posterior probabilities of modes (element, time, mode), times the ``weight`` of the element; those of pairs are
    added to ``pairs``, in the shape of ``transition``.

    Likelihood and filtered probabilities are those that `filter_together` left behind.
    """
    bins, elements = likelihood.shape[:2]
    modes = len(known) or likelihood.shape[2]
    # Bins that share a transition share the product that sums their pairs, as many as stay in the cache.
    most = max(1, min(bins - 1, CACHED // (elements * modes))) if len(transition) == 1 else 1
    entered, after = np.empty((most, elements, modes)), np.empty((most + 1, elements, modes))
    found = np.empty((modes, modes))
    for b in range(elements):
        after[0, b, :] = weight[b]
    last = bins - 1
    while last > 0:
        first = max(1, last - most + 1)  # bins of this round, entered from the bin before each
        place = min(first - 1, len(transition) - 1)
        held = last - first + 1
        for step in range(held):
            t = last - step
            slot = t - first
            ahead, now, reached = entered[slot].ravel(), likelihood[t].ravel(), after[step].ravel()
            for i in range(elements * modes):
                ahead[i] = now[i] * reached[i]
            np.dot(entered[slot], transposed[place], after[step + 1])
        rows = held * elements
        before = filtered[first - 1 : last].reshape(rows, modes)
        np.dot(before.T, entered[:held].reshape(rows, modes), found)
        for j in range(modes):
            for k in range(modes):
                pairs[place, j, k] += found[j, k] * transition[place, j, k]
        for b in range(elements):
            for t in range(first, last + 1):
                for k in range(modes):
                    marginal[b, t, k] = filtered[t, b, k] * after[last - t, b, k]
        after[0] = after[held]
        last = first - 1
    for b in range(elements):
        for k in range(modes):
            marginal[b, 0, k] = filtered[0, b, k] * after[0, b, k]


@inlined
def _push(weight, matrix, pushed, modes):
    """``weight @ matrix``: four rows at a time, so that what is summed stays in registers."""
    pushed[:] = 0.0
    whole = modes - modes % 4
    for j in range(0, whole, 4):
        a, b, c, d = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
        for k in range(modes):
            pushed[k] += a * matrix[j, k] + b * matrix[j + 1, k] + c * matrix[j + 2, k] + d * matrix[j + 3, k]
    for j in range(whole, modes):
        for k in range(modes):
            pushed[k] += weight[j] * matrix[j, k]


@compiled
def filter_scaled(initial, transition, likelihood, filtered, scale, known):
    """Filtered probabilities (element, time, mode), and what they were divided by (element, time)."""
    elements, bins = likelihood.shape[:2]
    modes = len(known) or likelihood.shape[2]
    ahead = np.empty(modes)
    for b in range(elements):
        own = min(b, transition.shape[0] - 1)
        for t in range(bins):
            if t == 0:
                ahead[:] = initial[b]
            else:
                _push(filtered[b, t - 1], transition[own, min(t - 1, transition.shape[1] - 1)], ahead, modes)
            total = 0.0
            for k in range(modes):
                filtered[b, t, k] = ahead[k] * likelihood[b, t, k]
                total += filtered[b, t, k]
            scale[b, t] = total
            inverse = 1.0 / total
            for k in range(modes):
                filtered[b, t, k] *= inverse


@compiled
def smooth_scaled(transposed, likelihood, filtered, scale, weight, marginal, entered, known):
    """Posterior probabilities (element, time, mode) times the ``weight`` of the element.

    ``entered`` (element, time, mode) is what, times the filtered probabilities of the bin before and the transition,
    gives those of pairs. ``transposed`` is the transition, from the second mode to the first.
    """
    elements, bins = filtered.shape[:2]
    modes = len(known) or filtered.shape[2]
    after, ahead = np.empty(modes), np.empty(modes)
    for b in range(elements):
        own = min(b, transposed.shape[0] - 1)
        after[:] = 1.0
        for t in range(bins - 1, -1, -1):
            inverse = 1.0 / scale[b, t]
            for k in range(modes):
                marginal[b, t, k] = weight[b] * filtered[b, t, k] * after[k]
                ahead[k] = likelihood[b, t, k] * after[k] * inverse
                entered[b, t, k] = weight[b] * ahead[k] if t > 0 else 0.0
            if t > 0:
                _push(ahead, transposed[own, min(t - 1, transposed.shape[1] - 1)], after, modes)


@compiled
def filter_logarithmic(initial, transition, likelihood, filtered):
    """Log probability of a mode and of all that was observed until its bin, (element, time, mode)."""
    elements, bins, modes = likelihood.shape
    for b in range(elements):
        own = min(b, transition.shape[0] - 1)
        for k in range(modes):
            filtered[b, 0, k] = initial[b, k] + likelihood[b, 0, k]
        for t in range(1, bins):
            step = min(t - 1, transition.shape[1] - 1)
            for k in range(modes):
                largest = -np.inf
                for j in range(modes):
                    largest = max(largest, filtered[b, t - 1, j] + transition[own, step, j, k])
                total = 0.0
                if largest > -np.inf:
                    for j in range(modes):
                        total += math.exp(filtered[b, t - 1, j] + transition[own, step, j, k] - largest)
                    filtered[b, t, k] = largest + math.log(total) + likelihood[b, t, k]
                else:
                    filtered[b, t, k] = -np.inf


@compiled
def smooth_logarithmic(transition, likelihood, filtered, value, marginal, pairs):
    """Posterior probabilities (element, time, mode) and those of pairs (element, time - 1, mode, mode)."""
    elements, bins, modes = likelihood.shape
    after, behind = np.empty(modes), np.empty(modes)
    for b in range(elements):
        own = min(b, transition.shape[0] - 1)
        after[:] = 0.0
        for t in range(bins - 1, -1, -1):
            for k in range(modes):
                marginal[b, t, k] = math.exp(filtered[b, t, k] + after[k] - value[b])
            if t == 0:
                break
            step = min(t - 1, transition.shape[1] - 1)
            for j in range(modes):
                largest = -np.inf
                for k in range(modes):
                    largest = max(largest, transition[own, step, j, k] + likelihood[b, t, k] + after[k])
                total = 0.0
                for k in range(modes):
                    term = transition[own, step, j, k] + likelihood[b, t, k] + after[k]
                    if largest > -np.inf:
                        total += math.exp(term - largest)
                    pairs[b, t - 1, j, k] = math.exp(filtered[b, t - 1, j] + term - value[b])
                behind[j] = largest + math.log(total) if largest > -np.inf else -np.inf
            after[:] = behind


@compiled
def draw(transition, filtered, uniform, modes_drawn):
    """Modes (element, sample, time) drawn backwards from log filtered probabilities, by uniform numbers of that shape.

    ``transition`` is logarithmic.
    """
    elements, bins, modes = filtered.shape
    weight = np.empty(modes)
    for b in range(elements):
        own = min(b, transition.shape[0] - 1)
        for n in range(uniform.shape[1]):
            for t in range(bins - 1, -1, -1):
                largest = -np.inf
                for j in range(modes):
                    weight[j] = filtered[b, t, j]
                    if t < bins - 1:
                        step = min(t, transition.shape[1] - 1)
                        weight[j] += transition[own, step, j, modes_drawn[b, n, t + 1]]
                    largest = max(largest, weight[j])
                total = 0.0
                for j in range(modes):
                    weight[j] = math.exp(weight[j] - largest)
                    total += weight[j]
                left, chosen = uniform[b, n, t] * total, 0
                for j in range(modes):
                    if weight[j] > 0.0:
                        chosen = j
                        left -= weight[j]
                        if left < 0.0:
                            break
                modes_drawn[b, n, t] = chosen


@compiled
def most_probable(initial, transition, likelihood, value, path):
    """The most probable path (element, time) by the algorithm of Viterbi, and its log probability (element,)."""
    elements, bins, modes = likelihood.shape
    best, ahead = np.empty(modes), np.empty(modes)
    came_from = np.empty((bins, modes), np.int64)
    for b in range(elements):
        own = min(b, transition.shape[0] - 1)
        for k in range(modes):
            best[k] = initial[b, k] + likelihood[b, 0, k]
        for t in range(1, bins):
            step = min(t - 1, transition.shape[1] - 1)
            for k in range(modes):
                largest, chosen = -np.inf, 0
                for j in range(modes):
                    score = best[j] + transition[own, step, j, k]
                    if score > largest:
                        largest, chosen = score, j
                ahead[k] = largest + likelihood[b, t, k]
                came_from[t, k] = chosen
            best[:] = ahead
        last = 0
        for k in range(modes):
            if best[k] > best[last]:
                last = k
        value[b] = best[last]
        for t in range(bins - 1, -1, -1):
            path[b, t] = last
            if t > 0:
                last = came_from[t, last]
