r"""What a linear system settles into, and what couples one part to another; for whole batches of draws.

Matrix equations are solved by doubling: after k doublings a solution holds the terms of :math:`2^k` bins, so that a
memory of a million bins takes about twenty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrodyn.linalg.matrix import cholesky

DOUBLINGS = 64  # more bins of memory than any float64 spectral radius below one can have
SETTLED = 1e-15  # a term this small beside the sum no longer changes it

Place = slice | Tensor  # where some latents stand in the state


def stationary_covariance(dynamics: Tensor, noise: Tensor) -> Tensor:
    r"""Covariance that the noise of all past bins leaves behind.

    .. math:: \Sigma = A \Sigma A^\top + Q = \sum_{k \ge 0} A^k Q (A^k)^\top

    Parameters
    ----------
    dynamics : Tensor, (*batch, latent, latent)
        A, of spectral radius below one. An element that is not stable does not come out finite, or has no meaning: look
        at `spectral_radius`.
    noise : Tensor, (*batch, latent, latent)
        Q, a covariance; need not have full rank.

    Returns
    -------
    Tensor, (*batch, latent, latent)
        Symmetric.

    References
    ----------
    Smith, "Matrix equation XA + BX = C", SIAM Journal on Applied Mathematics, 1968 (doubling).
    """
    total, power = noise, dynamics
    for _ in range(DOUBLINGS):
        term = power @ total @ power.mT
        total = total + 0.5 * (term + term.mT)
        if _settled(term, total):
            break
        power = power @ power
    return total


def filter_covariance(dynamics: Tensor, noise: Tensor, readout: Tensor, readout_noise: Tensor, cross: Tensor) -> Tensor:
    r"""Covariance P of a hidden state given all past observations, for correlated noises.

    With :math:`s_t = F s_{t-1} + w_t` and :math:`y_t = C s_{t-1} + v_t`, where w has covariance W, v has V, and
    :math:`E[w v^\top] = N`,

    .. math:: P = F P F^\top + W - (F P C^\top + N)(C P C^\top + V)^{-1}(F P C^\top + N)^\top .

    Parameters
    ----------
    dynamics : Tensor, (*batch, hidden, hidden)
    noise : Tensor, (*batch, hidden, hidden)
    readout : Tensor, (*batch, seen, hidden)
    readout_noise : Tensor, (*batch, seen, seen)
        Positive definite.
    cross : Tensor, (*batch, hidden, seen)

    Returns
    -------
    Tensor, (*batch, hidden, hidden)

    References
    ----------
    Chu, Fan & Lin, Linear Algebra and its Applications, 2005 (the doubling that keeps the structure).
    """
    # The part of w that v predicts is known once y is seen; what remains has independent noises.
    regression = torch.linalg.solve(readout_noise, cross.mT).mT
    power = (dynamics - regression @ readout).mT
    total = noise - regression @ cross.mT
    seen = readout.mT @ torch.linalg.solve(readout_noise, readout)
    eye = torch.eye(dynamics.shape[-1], dtype=dynamics.dtype, device=dynamics.device)
    for _ in range(DOUBLINGS):
        ahead = torch.linalg.solve(eye + seen @ total, power)
        back = torch.linalg.solve(eye + total @ seen, total)
        term = power.mT @ back @ power
        spread = power @ torch.linalg.solve(eye + seen @ total, seen) @ power.mT
        total = total + 0.5 * (term + term.mT)
        seen = seen + 0.5 * (spread + spread.mT)
        if _settled(term, total):
            break
        power = power @ ahead
    return total


def _settled(term: Tensor, total: Tensor) -> bool:
    return bool((term.abs() <= SETTLED * total.abs().amax((-2, -1), keepdim=True)).all())


class _SpectralRadius(torch.autograd.Function):
    """The gradient needs the leading pair of eigenvectors alone, so it is finite where other eigenvalues coincide."""

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        if not bool(torch.isfinite(matrix).all()):
            matrix = torch.where(torch.isfinite(matrix).all(-1).all(-1)[..., None, None], matrix, 0.0)
        values, right = torch.linalg.eig(matrix)
        radius, leading = values.abs().max(-1)
        ctx.save_for_backward(matrix, values, right, leading)
        return radius

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        matrix, values, right, leading = ctx.saved_tensors
        left_values, left = torch.linalg.eig(matrix.mT)
        value = values.gather(-1, leading.unsqueeze(-1))
        place = (left_values - value).abs().argmin(-1)
        v = right.take_along_dim(leading[..., None, None], -1).squeeze(-1)
        w = left.take_along_dim(place[..., None, None], -1).squeeze(-1)
        unit = value.conj() / value.abs().clamp(min=1e-300)
        slope = (unit / (w * v).sum(-1, keepdim=True)).unsqueeze(-1) * w.unsqueeze(-1) * v.unsqueeze(-2)
        return grad[..., None, None] * torch.nan_to_num(slope.real, 0.0, 0.0, 0.0)


def spectral_radius(matrix: Tensor) -> Tensor:
    """Largest modulus of an eigenvalue, (*batch); differentiable once. A matrix that is not finite counts as zero."""
    return _SpectralRadius.apply(matrix)


def block(matrix: Tensor, rows: Place, columns: Place) -> Tensor:
    """The part of (*batch, latent, latent) between two groups of latents."""
    return matrix[..., rows, :][..., columns]


def block_strength(dynamics: Tensor, covariance: Tensor, places: Sequence[Place]) -> Tensor:
    r"""Frobenius norm of :math:`\Sigma_r^{-1/2} A_{rs} \Sigma_s^{1/2}` for all pairs, (*batch, target, source).

    Any invertible map of a group's latents leaves it alone. The blocks of the stationary ``covariance`` are
    :math:`\Sigma_r`, for ``places`` in the state.
    """
    # Cholesky roots in place of symmetric ones: they differ by a rotation, which a Frobenius norm does not see.
    roots = [cholesky(block(covariance, place, place)) for place in places]
    rows = []
    for target, root in zip(places, roots, strict=True):
        scaled = torch.linalg.solve_triangular(root, dynamics[..., target, :], upper=False)
        rows.append(
            torch.stack([(scaled[..., s] @ r).square().sum((-2, -1)) for s, r in zip(places, roots, strict=True)], -1)
        )
    return torch.stack(rows, -2).sqrt()


def variance_shares(dynamics: Tensor, noises: Tensor, places: Sequence[Place]) -> Tensor:
    r"""Share of each group's stationary variance that every origin of noise accounts for, (*batch, target, origin).

    .. math::
        \Sigma^{(o)} = A \Sigma^{(o)} A^\top + Q^{(o)}, \qquad
        \mathrm{share}_{r o} = \mathrm{tr}\big(\Sigma_{rr}^{-1} \Sigma_{rr}^{(o)}\big) / d_r, \qquad
        \Sigma = \textstyle\sum_o \Sigma^{(o)},

    so that the shares of a target sum to one.

    Parameters
    ----------
    dynamics : Tensor, (*batch, latent, latent)
    noises : Tensor, (*batch, origin, latent, latent)
        The process noise in its parts; see `noise_by_group`.
    places : sequence
        Where the latents of each target stand.
    """
    parts = stationary_covariance(dynamics.unsqueeze(-3), noises)
    total = parts.sum(-3, keepdim=True)
    rows = [torch.linalg.solve(block(total, at, at), block(parts, at, at)) for at in places]
    return torch.stack([row.diagonal(dim1=-2, dim2=-1).mean(-1) for row in rows], -2)


def noise_by_group(noise: Tensor, places: Sequence[Place]) -> Tensor:
    """Block-diagonal noise (*batch, latent, latent) as the sum of what each group adds, (*batch, group, latent,
    latent)."""
    parts = []
    for place in places:
        held = torch.zeros(noise.shape[-1], dtype=torch.bool, device=noise.device)
        held[place] = True
        parts.append(torch.where(held.unsqueeze(-1) & held, noise, 0.0))
    return torch.stack(parts, -3)
