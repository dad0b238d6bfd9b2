"""Small dense factorisations that keep a batch alive where one element fails."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable

from pyrodyn.linalg._room import room

CACHED = 1 << 16  # numbers of a matrix that go through a product at once: 512 kB
STRAIGHT = 900_000  # multiplications up to which OpenBLAS does not first copy both factors
FEWEST = 64  # rows that are worth a call
FAR = 1 << 21  # bytes of a matrix of which the nearest cache keeps nothing from one product to the next


def broadcast_shapes(*shapes: tuple[int, ...]) -> torch.Size:
    """What torch's function of this name gives, in a tenth of the time: it is called for every density."""
    found = [1] * max(len(shape) for shape in shapes)
    for shape in shapes:
        for axis in range(-len(shape), 0):
            size = shape[axis]
            if size != 1 and found[axis] != size:
                if found[axis] != 1:
                    return torch.broadcast_shapes(*shapes)  # raises, and says why
                found[axis] = size
    return torch.Size(found)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``; outside of autograd, on the CPU and in float64 by NumPy.

    Its library takes half to a third of the time of torch's for tall matrices, on processors that the latter was not
    made for; and where batches broadcast, torch copies the smaller one.
    """
    tracked = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if tracked or left.device.type != "cpu" or not left.dtype == right.dtype == torch.float64 or followed(left, right):
        return left @ right
    return torch.from_numpy(_by_parts(left.detach().numpy(), right.detach().numpy()))


def followed(*tensors: Tensor) -> bool:
    """Whether a trace is being recorded, or a tangent comes along."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return True
    return any(unpack_dual(tensor).tangent is not None for tensor in tensors)


@np.errstate(all="ignore")  # infinities and NaN go on, as they do in torch
def _by_parts(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A long side, of rows or of what is summed, goes by parts that stay in the cache.

    A product reads several rows at a time, which from memory takes up to three times as long as one after another:
    the parts of a large matrix are summed beforehand, only to have them in the cache.
    """
    rows, inner = left.shape[-2:]
    columns = right.shape[-1]
    found = room((*broadcast_shapes(left.shape[:-2], right.shape[:-2]), rows, columns))
    short = min(rows, inner)
    at_once = max(FEWEST, CACHED // max(short, columns))
    straight = STRAIGHT // max(1, short * columns)
    if straight >= FEWEST:
        at_once = min(at_once, straight)
    if max(rows, inner) < 2 * at_once:
        np.matmul(left, right, out=found)
    elif rows > inner:
        for start in range(0, rows, at_once):
            some = slice(start, start + at_once)
            part = left[..., some, :]
            if left.nbytes > FAR:
                part.sum()
            np.matmul(part, right, out=found[..., some, :])
    else:
        found[:] = 0.0
        for start in range(0, inner, at_once):
            some = slice(start, start + at_once)
            part = right[..., some, :]
            if right.nbytes > FAR:
                part.sum()
            found += np.matmul(left[..., some], part)
    return found


def of_all_trials(values: Tensor, weights: Tensor) -> Tensor:
    """``values @ weights``, (*draw, trial, time, k) and (*draw, 1, k, column): one product for all trials."""
    if weights.dim() < 3 or weights.shape[-3] > 1 or values.dim() < 3:
        return values @ weights
    found = product(values.flatten(-3, -2), weights.squeeze(-3))
    return found.unflatten(-2, values.shape[-3:-1])


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor; a batch element that is not positive definite becomes NaN and no other is touched."""
    root, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        root = torch.where((info > 0)[..., None, None], torch.nan, root)
    return root


class _Precision(torch.autograd.Function):
    """The inverse is its own derivative: one factorisation, and three products for the gradient."""

    @staticmethod
    def forward(ctx, covariance: Tensor) -> tuple[Tensor, Tensor]:
        root = cholesky(covariance)
        precision = torch.cholesky_inverse(root)
        ctx.save_for_backward(precision)
        return precision, 2.0 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_precision: Tensor, grad_log_det: Tensor):
        (precision,) = ctx.saved_tensors
        pulled = precision @ grad_precision @ precision
        return grad_log_det[..., None, None] * precision - 0.5 * (pulled + pulled.mT)


def precision_of(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse and log determinant of symmetric positive definite matrices (*batch, latent, latent).

    An element that is not positive definite becomes NaN. Differentiable once.
    """
    return _Precision.apply(covariance)


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


def strictly_lower(entries: Tensor, dim: int) -> Tensor:
    """The matrix (*batch, dim, dim) with entries (*batch, dim (dim - 1) / 2) below its diagonal, row by row."""
    rows, columns = torch.tril_indices(dim, dim, -1)
    places = (rows * dim + columns).to(entries.device)
    flat = torch.zeros(*entries.shape[:-1], dim * dim, dtype=entries.dtype, device=entries.device)
    return flat.index_copy(-1, places, entries).unflatten(-1, (dim, dim))


def below_diagonal(matrix: Tensor) -> Tensor:
    """The entries (*batch, dim (dim - 1) / 2) below a diagonal; the inverse of `strictly_lower`."""
    rows, columns = torch.tril_indices(matrix.shape[-1], matrix.shape[-1], -1)
    return matrix[..., rows, columns]
