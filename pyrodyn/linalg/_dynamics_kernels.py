"""Compiled kernels of `pyrodyn.linalg.dynamics`: NumPy arrays in, NumPy arrays out.

Arrays: matrices (element, latent, latent), blocks (element, 3, latent, latent), upper (element, 1, latent, latent).
"""

from __future__ import annotations

import math

import numpy as np

from pyrodyn.linalg._markov_kernels import compiled


@compiled
def _product(left, right, found):
    """``left @ right``: in loops, since these matrices are too small to be worth a call."""
    dim = len(left)
    for i in range(dim):
        found[i, :] = 0.0
        for k in range(dim):
            for j in range(dim):
                found[i, j] += left[i, k] * right[k, j]


@compiled
def _invert(covariance, root, precision):
    """Write the inverse of a positive definite matrix, NaN where it is not; return the log determinant."""
    dim = len(covariance)
    log_det = 0.0
    for j in range(dim):
        pivot = covariance[j, j]
        for k in range(j):
            pivot -= root[j, k] * root[j, k]
        log_det += math.log(pivot) if pivot > 0.0 else np.nan
        inverse = 1.0 / math.sqrt(pivot) if pivot > 0.0 else np.nan
        root[j, j] = inverse
        for i in range(j + 1, dim):
            entry = covariance[i, j]
            for k in range(j):
                entry -= root[i, k] * root[j, k]
            root[i, j] = entry * inverse
    for i in range(dim):  # root becomes its own inverse
        for j in range(i):
            entry = 0.0
            for k in range(j, i):
                entry -= root[i, k] * root[k, j]
            root[i, j] = entry * root[i, i]
    for i in range(dim):
        for j in range(i + 1):
            entry = 0.0
            for k in range(i, dim):
                entry += root[k, i] * root[k, j]
            precision[i, j] = entry
            precision[j, i] = entry
    return log_det


@compiled
def evaluate(dynamics, process_noise, initial_covariance, later, blocks, upper, log_det, initial_precision):
    """The blocks, the log determinant of the covariance of the chain, and the inverse of the initial covariance."""
    dim = dynamics.shape[1]
    root, ahead = np.empty((dim, dim)), np.empty((dim, dim))
    for b in range(len(dynamics)):
        noise_precision, pushed = blocks[b, 2], upper[b, 0]
        log_det[b] = later * _invert(process_noise[b], root, noise_precision)
        log_det[b] += _invert(initial_covariance[b], root, initial_precision[b])
        _product(dynamics[b].T, noise_precision, pushed)
        _product(pushed, dynamics[b], ahead)
        for i in range(dim):
            for j in range(dim):
                pushed[i, j] = -pushed[i, j]
                blocks[b, 0, i, j] = initial_precision[b, i, j] + (ahead[i, j] if later > 0 else 0.0)
                blocks[b, 1, i, j] = noise_precision[i, j] + ahead[i, j]


@compiled
def _pull_back(precision, grad, grad_log_det, work, found):
    """Gradient in a covariance, from those in its inverse and in its log determinant."""
    dim = len(precision)
    _product(precision, grad, work)
    _product(work, precision, found)
    for i in range(dim):
        for j in range(i + 1):
            entry = grad_log_det * precision[i, j] - 0.5 * (found[i, j] + found[j, i])
            found[i, j] = entry
            found[j, i] = entry


@compiled
def differentiate(dynamics, noise_precision, initial_precision, later, grad_blocks, grad_upper, grad_log_det, found):
    """Gradients (3, element, latent, latent) in dynamics, process noise and initial covariance."""
    dim = dynamics.shape[1]
    work, pushed, for_ahead = np.empty((dim, dim)), np.empty((dim, dim)), np.empty((dim, dim))
    for_pushed, for_noise = np.empty((dim, dim)), np.empty((dim, dim))
    for b in range(len(dynamics)):
        for_ahead[:] = grad_blocks[b, 1]
        if later > 0:
            for_ahead += grad_blocks[b, 0]
        # ahead = pushed A
        _product(dynamics[b].T, noise_precision[b], pushed)
        _product(pushed.T, for_ahead, found[0, b])
        _product(for_ahead, dynamics[b].T, for_pushed)
        for_pushed -= grad_upper[b, 0]
        # pushed = A' Q^-1
        _product(noise_precision[b], for_pushed.T, work)
        found[0, b] += work
        _product(dynamics[b], for_pushed, for_noise)
        for_noise += grad_blocks[b, 1]
        for_noise += grad_blocks[b, 2]
        _pull_back(noise_precision[b], for_noise, later * grad_log_det[b], work, found[1, b])
        _pull_back(initial_precision[b], grad_blocks[b, 0], grad_log_det[b], work, found[2, b])
