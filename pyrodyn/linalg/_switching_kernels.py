"""Compiled kernels of switching linear dynamics: NumPy arrays in, NumPy arrays out; float64, one CPU core.

Arrays: initial (element, mode), transition (element, mode, mode) from the first mode to the second, recurrence
(element, mode, latent), push (element, time - 1 or 1, mode), dynamics (element, mode, latent, lag x latent), drift
(element, time - 1 or 1, mode, latent), root (element, mode, latent, latent); potentials are logarithms.
"""

from __future__ import annotations

import numpy as np

from pyrodyn.linalg._markov_kernels import compiled


@compiled
def simulate(initial, transition, recurrence, push, dynamics, drift, root, uniform, noise, modes, path):
    """Modes (element, time) and states (element, time, latent), forward in time.

    ``path`` holds the first states, as many as there are lags; ``noise`` (element, time, latent) is standard normal and
    ``uniform`` (element, time) on [0, 1).
    """
    elements, bins, dim = path.shape
    count = initial.shape[1]
    lags = dynamics.shape[3] // dim
    weight = np.empty(count)
    for b in range(elements):
        mode = 0
        for t in range(bins):
            for k in range(count):
                weight[k] = initial[b, k] if t == 0 else transition[b, mode, k]
                if t > 0:
                    weight[k] += push[b, min(t - 1, push.shape[1] - 1), k]
                    for i in range(dim):
                        weight[k] += recurrence[b, k, i] * path[b, t - 1, i]
            largest = weight.max()
            total = 0.0
            for k in range(count):
                weight[k] = np.exp(weight[k] - largest)
                total += weight[k]
            left = uniform[b, t] * total
            mode = 0
            while mode < count - 1 and left >= weight[mode]:
                left -= weight[mode]
                mode += 1
            modes[b, t] = mode
            if t < lags:
                continue
            for i in range(dim):
                value = drift[b, min(t - 1, drift.shape[1] - 1), mode, i]
                for j in range(dim):
                    value += root[b, mode, i, j] * noise[b, t, j]
                for lag in range(lags):
                    for j in range(dim):
                        value += dynamics[b, mode, i, lag * dim + j] * path[b, t - 1 - lag, j]
                path[b, t, i] = value
