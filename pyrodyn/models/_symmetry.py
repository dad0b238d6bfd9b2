"""Random elements of the symmetry groups of latent spaces, by which models show that their invariants are."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix, uniform: reflections as well."""
    basis, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis * triangle.diagonal().sign()


def order_and_signs(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A permutation, and a sign for every place, each (size,)."""
    order = torch.randperm(size, generator=generator)
    return order, 2.0 * torch.randint(0, 2, (size,), generator=generator).to(torch.float64) - 1.0


def signed_permutation(size: int, generator: torch.Generator) -> Tensor:
    """`order_and_signs` as a matrix."""
    order, sign = order_and_signs(size, generator)
    return sign[:, None] * torch.eye(size, dtype=torch.float64)[order]
