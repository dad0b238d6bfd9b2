"""Compiled kernels of `pyrodyn.linalg.recursion`: NumPy arrays in, NumPy arrays out."""

from __future__ import annotations

from pyrodyn.linalg._markov_kernels import compiled


@compiled
def follow(dynamics, shocks, held, found):
    """Paths (element, trial, time, latent) into ``found``, which is zero."""
    elements, trials, bins, dim = shocks.shape
    for b in range(elements):
        for k in range(trials):
            for t in range(bins):
                for i in range(dim):
                    if held[t, i]:
                        continue
                    value = shocks[b, k, t, i]
                    if t > 0:
                        for j in range(dim):
                            value += dynamics[b, i, j] * found[b, k, t - 1, j]
                    found[b, k, t, i] = value


@compiled
def spread(dynamics, noise, initial_covariance, held, found):
    """Covariances (element, time, latent, latent) into ``found``, which is zero."""
    elements, bins, dim, _ = found.shape
    for b in range(elements):
        for t in range(bins):
            for i in range(dim):
                for j in range(i + 1):
                    if held[t, i] or held[t, j]:
                        continue
                    if t == 0:
                        value = initial_covariance[b, i, j]
                    else:
                        value = noise[b, i, j]
                        for k in range(dim):
                            row = 0.0
                            for m in range(dim):
                                row += found[b, t - 1, k, m] * dynamics[b, j, m]
                            value += dynamics[b, i, k] * row
                    found[b, t, i, j] = value
                    found[b, t, j, i] = value
