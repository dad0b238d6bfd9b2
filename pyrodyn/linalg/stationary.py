r"""What a linear system settles into: stationary covariance, spectral radius, and what couples one part to another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DOUBLINGS = 18  # a spectral radius of .9999 leaves exp(-2 x 262144 x .0001) of the sum


def stationary_covariance(dynamics: Tensor, process_noise: Tensor) -> Tensor:
    r"""The solution of :math:`\Sigma = A \Sigma A^\top + Q`, (*batch, latent, latent).

    By doubling: :math:`\Sigma_{2n} = \Sigma_n + A^n \Sigma_n (A^n)^\top`. An unstable element is not finite, or has no
    meaning: look at `spectral_radius`.

    Reference: Anderson & Moore, *Optimal Filtering*, 1979, section 6.7.
    """
    covariance, power = process_noise, dynamics
    for _ in range(DOUBLINGS):
        covariance = covariance + power @ covariance @ power.mT
        power = power @ power
    return 0.5 * (covariance + covariance.mT)


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


def block_strength(dynamics: Tensor, covariance: Tensor, places: tuple[slice, ...]) -> Tensor:
    r"""Frobenius norm of :math:`\Sigma_r^{-1/2} A_{rs} \Sigma_s^{1/2}` for all pairs, (*batch, target, source).

    Any invertible map of a group's latents leaves it alone. The blocks of the stationary ``covariance`` are
    :math:`\Sigma_r`, for ``places`` in the state.
    """
    roots = [torch.linalg.cholesky_ex(covariance[..., place, place])[0] for place in places]
    rows = []
    for target, root in zip(places, roots, strict=True):
        # L^-1 in place of the symmetric root: they differ by a rotation, which a Frobenius norm does not see.
        scaled = torch.linalg.solve_triangular(root, dynamics[..., target, :], upper=False)
        rows.append(
            torch.stack([(scaled[..., s] @ r).square().sum((-2, -1)) for s, r in zip(places, roots, strict=True)], -1)
        )
    return torch.stack(rows, -2).sqrt()


def variance_shares(dynamics: Tensor, own_noise: Tensor, shared: Tensor, group: Tensor) -> Tensor:
    r"""Share of each group's stationary variance that comes from the noise of every source, (*batch, target, source).

    :math:`\mathrm{tr}(\Sigma_{rr}^{-1} \Sigma_{rr}^{(s)}) / d_r`, with :math:`\Sigma^{(s)}` the stationary covariance
    under the noise of s alone. Sources are the groups from 0, the groups -1, -2, ..., and the shared innovations, if
    there are any; shares of a target sum to one.

    Parameters
    ----------
    dynamics : Tensor, (*batch, latent, latent)
    own_noise : Tensor, (*batch, latent, latent)
        Block-diagonal over groups.
    shared : Tensor, (*batch, latent, shared)
    group : Tensor, (latent,)
        The group of every latent, from 0; negative numbers are sources without being targets.
    """
    targets = int(group.max()) + 1
    sources = [group == r for r in range(targets)]
    sources += [group == int(g) for g in sorted(set(group[group < 0].tolist()), reverse=True)]
    noises = [torch.where(held, own_noise, 0.0) for held in sources]
    if shared.shape[-1]:
        noises.append((shared @ shared.mT).expand_as(own_noise))
    parts = stationary_covariance(dynamics.unsqueeze(-3), torch.stack(noises, -3))
    total = parts.sum(-3)
    rows = []
    for r in range(targets):
        at = (group == r).nonzero().squeeze(-1)
        whole = total[..., at[:, None], at].unsqueeze(-3)
        rows.append(torch.linalg.solve(whole, parts[..., at[:, None], at]).diagonal(dim1=-2, dim2=-1).mean(-1))
    return torch.stack(rows, -2)
