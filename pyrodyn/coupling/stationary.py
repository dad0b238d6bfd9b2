r"""Matrix equations of a stationary linear system, solved by doubling for whole batches of draws.

After k doublings a solution holds the terms of :math:`2^k` bins, so that a system with a memory of a million bins needs
about twenty. Everything broadcasts over leading dimensions.
"""

from __future__ import annotations

import numpy as np

DOUBLINGS = 64  # more bins of memory than any float64 spectral radius below one can have
SETTLED = 1e-15  # a term this small beside the sum no longer changes it


def stationary_covariance(dynamics: np.ndarray, noise: np.ndarray) -> np.ndarray:
    r"""Covariance that the noise of all past bins leaves behind.

    .. math:: \Sigma = A \Sigma A^\top + Q = \sum_{k \ge 0} A^k Q (A^k)^\top

    Parameters
    ----------
    dynamics : ndarray, (..., latent, latent_from)
        A, of spectral radius below one.
    noise : ndarray, (..., latent, latent)
        Q, a covariance; need not have full rank.

    Returns
    -------
    ndarray, (..., latent, latent)
        Symmetric.

    References
    ----------
    Smith, "Matrix equation XA + BX = C", SIAM Journal on Applied Mathematics, 1968 (doubling).
    """
    power = np.broadcast_to(dynamics, np.broadcast_shapes(dynamics.shape, noise.shape))
    total = np.broadcast_to(noise, power.shape)
    for _ in range(DOUBLINGS):
        term = power @ total @ _t(power)
        total = total + 0.5 * (term + _t(term))
        if np.all(np.abs(term) <= SETTLED * np.abs(total).max((-2, -1), keepdims=True)):
            break
        power = power @ power
    return total


def filter_covariance(
    dynamics: np.ndarray, noise: np.ndarray, readout: np.ndarray, readout_noise: np.ndarray, cross: np.ndarray
) -> np.ndarray:
    r"""Covariance P of a hidden state given all past observations, for correlated noises.

    With :math:`s_t = F s_{t-1} + w_t` and :math:`y_t = C s_{t-1} + v_t`, where w has covariance W, v has V, and
    :math:`E[w v^\top] = N`,

    .. math:: P = F P F^\top + W - (F P C^\top + N)(C P C^\top + V)^{-1}(F P C^\top + N)^\top .

    Parameters
    ----------
    dynamics : ndarray, (..., hidden, hidden)
    noise : ndarray, (..., hidden, hidden)
    readout : ndarray, (..., seen, hidden)
    readout_noise : ndarray, (..., seen, seen)
        Positive definite.
    cross : ndarray, (..., hidden, seen)

    Returns
    -------
    ndarray, (..., hidden, hidden)

    References
    ----------
    Chu, Fan & Lin, Linear Algebra and its Applications, 2005 (the doubling that keeps the structure).
    """
    # The part of w that v predicts is known once y is seen; what remains has independent noises.
    regression = _t(np.linalg.solve(readout_noise, _t(cross)))
    power = _t(dynamics - regression @ readout)
    total = noise - regression @ _t(cross)
    seen = _t(readout) @ np.linalg.solve(readout_noise, readout)
    eye = np.eye(dynamics.shape[-1])
    for _ in range(DOUBLINGS):
        ahead = np.linalg.solve(eye + seen @ total, power)
        back = np.linalg.solve(eye + total @ seen, total)
        term = _t(power) @ back @ power
        spread = power @ np.linalg.solve(eye + seen @ total, seen) @ _t(power)
        total = total + 0.5 * (term + _t(term))
        seen = seen + 0.5 * (spread + _t(spread))
        if np.all(np.abs(term) <= SETTLED * np.abs(total).max((-2, -1), keepdims=True)):
            break
        power = power @ ahead
    return total


def roots(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric square root and its inverse, (..., latent, latent)."""
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(values)[..., None, :]
    return (vectors * root) @ _t(vectors), (vectors / root) @ _t(vectors)


def spectral_radius(dynamics: np.ndarray) -> np.ndarray:
    """Largest modulus of the eigenvalues, (...)."""
    return np.abs(np.linalg.eigvals(dynamics)).max(-1)


def _t(matrix: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrix, -1, -2)
