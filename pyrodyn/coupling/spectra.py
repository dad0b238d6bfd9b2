r"""Granger-Geweke causality between the region latents of a linear state model, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pyrodyn.linalg.stationary import filter_covariance


def granger_geweke(
    dynamics: np.ndarray, noise: np.ndarray, latents: Sequence[np.ndarray], turns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""Geweke's conditional measure from every region to every other, given all the other latents.

    The whole state follows :math:`x_t = A x_{t-1} + e_t`, :math:`e_t \sim N(0, Q)`. Leave the source s out and call
    the rest y. Forecasts of y from its own past are those of a Kalman filter in which :math:`x_s` is hidden. With P its
    stationary covariance,

    .. math::
        V = A_{ys} P A_{ys}^\top + Q_{yy}, \qquad K = (A_{ss} P A_{ys}^\top + Q_{sy}) V^{-1}, \qquad
        F = \ln |V_{rr}| - \ln |Q_{rr}| ,

    and the filter's errors are, with :math:`z = e^{-i \omega}`,

    .. math::
        u_t = e_{y,t} + A_{ys} z \, [I - (A_{ss} - K A_{ys}) z]^{-1} (e_s - K e_y)_t .

    The part of :math:`u_r` that comes from the target's own noise has the transfer function

    .. math::
        M_r(\omega) = I + A_{rs} z \, [I - (A_{ss} - K A_{ys}) z]^{-1} (Q_{sr} - K Q_{yr}) Q_{rr}^{-1},
        \qquad f(\omega) = \ln |V_{rr}| - \ln |M_r Q_{rr} M_r^*| ,

    where noise that s shares with r in the same bin counts as the target's own, as in Geweke's normalisation. f is
    never negative, its mean over all frequencies is F, and both vanish exactly where :math:`A_{rs} = 0`. With two
    regions and nothing else, this is Geweke's unconditional measure of 1982.

    It is the conditional measure, and not the pairwise one, because an indirect path or a common source makes the
    pairwise one positive where there is no edge.

    Parameters
    ----------
    dynamics, noise : ndarray, (..., latent, latent_from)
        A, of spectral radius below one, and Q, positive definite.
    latents : sequence of ndarray of int
        The latents of every region. Latents of no region, such as shared ones, belong to what is conditioned on.
    turns : ndarray, (frequency,)
        In turns a bin, from 0 to .5.

    Returns
    -------
    total : ndarray, (..., target, source)
        F, nats a bin; NaN on the diagonal.
    spectrum : ndarray, (..., target, source, frequency)
        f, nats; NaN on the diagonal.

    References
    ----------
    Geweke, "Measurement of linear dependence and feedback between multiple time series", JASA, 1982; Geweke, "Measures
    of conditional linear dependence and feedback between time series", JASA, 1984; Barnett & Seth, "Granger causality
    for state-space models", Physical Review E, 2015; Solo, Neural Computation, 2016.
    """
    lead, count = dynamics.shape[:-2], len(latents)
    total = np.full((*lead, count, count), np.nan)
    spectrum = np.full((*lead, count, count, len(turns)), np.nan)
    shift = np.exp(-2j * np.pi * np.asarray(turns, dtype=float))[:, None, None]
    every = np.arange(dynamics.shape[-1])
    for s, source in enumerate(latents):
        rest = np.setdiff1d(every, source)
        if not len(rest):
            continue
        within, outward = _block(dynamics, source, source), _block(dynamics, rest, source)
        seen_noise, cross = _block(noise, rest, rest), _block(noise, source, rest)
        parts = (within, _block(noise, source, source), outward, seen_noise, cross)
        hidden = filter_covariance(*(torch.from_numpy(part) for part in parts)).numpy()
        forecast = outward @ hidden @ _t(outward) + seen_noise
        gain = _t(np.linalg.solve(forecast, _t(within @ hidden @ _t(outward) + cross)))
        decay = (within - gain @ outward)[..., None, :, :]
        resolvent = shift * np.linalg.inv(np.eye(len(source)) - shift * decay)
        for r, target in enumerate(latents):
            if r == s:
                continue
            place = np.searchsorted(rest, target)
            own = _block(noise, target, target)
            left = cross[..., :, place] - gain @ seen_noise[..., :, place]
            left = _t(np.linalg.solve(own, _t(left)))
            transfer = outward[..., None, place, :] @ resolvent @ left[..., None, :, :]
            gained = _log_det(_block(forecast, place, place)) - _log_det(own)
            through = 2.0 * np.linalg.slogdet(np.eye(len(target)) + transfer)[1]
            # Rounding may leave either a hair below zero.
            total[..., r, s] = np.maximum(gained, 0.0)
            spectrum[..., r, s, :] = np.maximum(gained[..., None] - through, 0.0)
    return total, spectrum


def _block(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return matrix[..., rows[:, None], columns]


def _log_det(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.slogdet(matrix)[1]


def _t(matrix: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrix, -1, -2)
