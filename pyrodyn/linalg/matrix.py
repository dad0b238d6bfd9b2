"""Small dense factorisations that keep a batch alive where one element fails."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor; a batch element that is not positive definite becomes NaN and no other is touched."""
    root, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        root = torch.where((info > 0)[..., None, None], torch.nan, root)
    return root


def log_det_from_root(root: Tensor) -> Tensor:
    """Log determinant of ``root @ root.mT`` for a triangular root."""
    return 2.0 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class _SquareRoots(torch.autograd.Function):
    """Both roots of one eigendecomposition, with a gradient that stays finite where eigenvalues coincide."""

    @staticmethod
    def forward(ctx, matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        root = values.sqrt()
        ctx.save_for_backward(root, vectors)
        return (vectors * root.unsqueeze(-2)) @ vectors.mT, (vectors / root.unsqueeze(-2)) @ vectors.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_root: Tensor, grad_inverse: Tensor):
        root, vectors = ctx.saved_tensors
        # Daleckii-Krein: divided differences of f(a) = a^(1/2) and a^(-1/2), written without a difference.
        total = root.unsqueeze(-1) + root.unsqueeze(-2)
        product = root.unsqueeze(-1) * root.unsqueeze(-2)
        rotated = vectors.mT @ grad_root @ vectors / total - vectors.mT @ grad_inverse @ vectors / (product * total)
        grad = vectors @ rotated @ vectors.mT
        return 0.5 * (grad + grad.mT)


def square_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    r"""Symmetric square root :math:`S^{1/2}` and its inverse :math:`S^{-1/2}` of a positive definite matrix.

    Parameters
    ----------
    matrix : Tensor, (*batch, latent, latent)
        Symmetric positive definite.

    Notes
    -----
    Autograd through an eigendecomposition divides by differences of eigenvalues, which vanish for the very rotations
    that neural data show; the divided differences used here do not.
    """
    return _SquareRoots.apply(matrix)
