"""The chain kernel on the CPU: `ChainFactor` and the log normaliser by compiled loops over time, in float64.

A third of the arithmetic of the elimination in `pyrodyn.linalg.chain`, and none of the overhead of tensor operations;
the same results to rounding. Importing this module needs numba.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrodyn.linalg import _kernels, _steady
from pyrodyn.linalg._room import room


def _distinct(blocks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The elements of a batch that differ, (element, time, latent, latent), and for each batch element which it is.

    Blocks that were expanded are neither copied nor read twice from memory; time may be expanded too.
    """
    batch = blocks.shape[:-3]
    repeated = [axis for axis, size in enumerate(batch) if size > 1 and blocks.stride(axis) == 0]
    for axis in repeated:
        blocks = blocks.narrow(axis, 0, 1)
    kept = blocks.shape[:-3]
    which = np.arange(kept.numel())
    if repeated:
        which = np.broadcast_to(which.reshape(kept), batch).flatten()
    return blocks.reshape(kept.numel(), *blocks.shape[-3:]).numpy(force=True), which


def _empty_factor(diagonal: Tensor, upper: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Room for a factor. The kernels do not look whether an index is within an array, so shapes are compared here."""
    *_, time, _, latent = diagonal.shape
    batch = diagonal.shape[:-3]
    if diagonal.shape[-2] != latent or upper.shape != (*batch, time - 1, latent, latent):
        raise ValueError(
            "diagonal and upper must be (*batch, time, latent, latent) and (*batch, time - 1, latent, latent), got "
            f"{tuple(diagonal.shape)} and {tuple(upper.shape)}"
        )
    count = batch.numel()
    return room((count, time, latent, latent)), room((count, time - 1, latent, latent))


def _flat(columns: Tensor, batch: torch.Size, root: np.ndarray) -> np.ndarray:
    count, time, latent = root.shape[:3]
    if columns.shape[:-1] != (*batch, time, latent):
        raise ValueError(
            f"columns must be (*batch, time, latent, column) = {(*batch, time, latent)} and a number of columns, got "
            f"{tuple(columns.shape)}"
        )
    return columns.reshape(count, *columns.shape[-3:]).numpy(force=True)


class CompiledFactor:
    """The factorised precision of Gauss-Markov chains: `ChainFactor` for a CPU, outside of autograd.

    Parameters
    ----------
    diagonal, upper : Tensor, (*batch, time, latent, latent) and (*batch, time - 1, latent, latent)
        Blocks of the precision, float64, on the CPU. Only the lower triangles of the diagonal blocks are read.
    parallel : callable
        Makes the `ChainFactor` of the same precision, for what has to be the same on both paths.

    Notes
    -----
    A precision that is not positive definite gives NaN in its own batch element and leaves the others alone.
    """

    def __init__(self, diagonal: Tensor, upper: Tensor, parallel: Callable[[], Any]) -> None:
        self.num_bins, self.latent_dim = diagonal.shape[-3], diagonal.shape[-1]
        self._batch = diagonal.shape[:-3]
        self._root, self._link = _empty_factor(diagonal, upper)
        log_det = np.empty(len(self._root))
        _kernels.factor(self.latent_dim, *_distinct(diagonal), *_distinct(upper), self._root, self._link, log_det)
        self.log_det: Tensor = torch.from_numpy(log_det).reshape(self._batch)
        self._make_parallel = parallel

    @functools.cached_property
    def _parallel(self) -> Any:
        return self._make_parallel()

    def solve(self, columns: Tensor) -> Tensor:
        """Solve ``J x = columns``; shapes (*batch, time, latent, column)."""
        if columns.requires_grad and torch.is_grad_enabled():
            return self._parallel.solve(columns)
        flat = _flat(columns, self._batch, self._root)
        states = room(flat.shape)
        _kernels.solve(self.latent_dim, self._root, self._link, flat, states)
        return torch.from_numpy(states).reshape(columns.shape)

    def colour(self, noise: Tensor) -> Tensor:
        """Map iid standard normal ``noise`` (*batch, time, latent, column) to draws of covariance ``J^-1``.

        The square root is `ChainFactor`'s. A path sampled in whitened coordinates, where gradients are needed, is read
        back where they are not: another root there would give another path.
        """
        return self._parallel.colour(noise)

    def uncolour(self, states: Tensor) -> Tensor:
        """The inverse of `colour`."""
        return self._parallel.noise_of(states)

    def draw(self, noise: Tensor) -> Tensor:
        """As `colour`, without gradients and by another square root, the cheapest; `noise_of` is its inverse."""
        return self._apply(_kernels.colour, noise)

    def noise_of(self, states: Tensor) -> Tensor:
        """The noise (*batch, time, latent, column) that `draw` maps to these states."""
        return self._apply(_kernels.whiten, states)

    def _apply(self, kernel: Callable[..., None], columns: Tensor) -> Tensor:
        flat = _flat(columns, self._batch, self._root)
        found = room(flat.shape)
        kernel(self.latent_dim, self._root, self._link, flat, found)
        return torch.from_numpy(found).reshape(columns.shape)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Blocks of J^-1: Cov(x_t) (*batch, time, latent, latent) and Cov(x_t, x_t+1) (*batch, time - 1, ...)."""
        covariance, cross = room(self._root.shape), room(self._link.shape)
        _kernels.marginals(self.latent_dim, self._root, self._link, covariance, cross)
        return (
            torch.from_numpy(covariance).reshape(self._batch + covariance.shape[-3:]),
            torch.from_numpy(cross).reshape(self._batch + cross.shape[-3:]),
        )


class LogNormaliser(torch.autograd.Function):
    """Log normalisers (*batch, column) of chains; the gradient is the expected sufficient statistics."""

    @staticmethod
    def forward(ctx, diagonal: Tensor, upper: Tensor, columns: Tensor) -> Tensor:
        root, link = _empty_factor(diagonal, upper)
        flat = _flat(columns, diagonal.shape[:-3], root)
        white, value = room(flat.shape), np.empty((len(root), flat.shape[-1]))
        _kernels.evaluate(diagonal.shape[-1], *_distinct(diagonal), *_distinct(upper), flat, root, link, white, value)
        ctx.arrays, ctx.batch = (root, link, white), columns.shape[:-3]
        return torch.from_numpy(value).reshape(columns.shape[:-3] + columns.shape[-1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # grad: (*batch, column)
        root, link, white = ctx.arrays
        rows = np.ascontiguousarray(grad.reshape(len(root), white.shape[-1]).numpy(force=True))
        gradients = [room(part.shape) for part in (root, link, white)]
        _kernels.differentiate(root.shape[-1], root, link, white, rows, *gradients)
        return tuple(torch.from_numpy(part).reshape(ctx.batch + part.shape[1:]) for part in gradients)


class SteadyLogNormaliser(torch.autograd.Function):
    """`LogNormaliser` of chains that are the same in every bin between the first and the last."""

    @staticmethod
    def forward(ctx, blocks: Tensor, upper: Tensor, columns: Tensor) -> Tensor:
        batch, latent = blocks.shape[:-3], blocks.shape[-1]
        time = columns.shape[-3]
        if upper.shape != (*batch, 1, latent, latent) or blocks.shape[-3] != 3 or time < 2:
            raise ValueError(
                "blocks and upper must be (*batch, 3, latent, latent) and (*batch, 1, latent, latent) with two bins or "
                f"more, got {tuple(blocks.shape)}, {tuple(upper.shape)} and {time} bins"
            )
        count = batch.numel()
        root, link = np.empty((count, time, latent, latent)), np.empty((count, time - 1, latent, latent))
        flat, used = _flat(columns, batch, root), np.empty(count, np.int64)
        white, value = room(flat.shape), np.empty((count, flat.shape[-1]))
        own, above = (_contiguous(part, count) for part in (blocks, upper))
        _steady.evaluate(latent, own, above, flat, root, link, white, value, used)
        most = int(used.max(initial=0))
        # Copies, so that the room for slots that were not used is given back.
        ctx.arrays = root[:, :most].copy(), link[:, :most].copy(), white, used
        ctx.batch = batch
        return torch.from_numpy(value).reshape(batch + columns.shape[-1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # grad: (*batch, column)
        root, link, white, used = ctx.arrays
        latent = root.shape[-1]
        rows = np.ascontiguousarray(grad.reshape(len(root), white.shape[-1]).numpy(force=True))
        count, time, _, columns = white.shape
        moments, pulled = np.empty((count, 4, latent, latent)), room((count, columns, time, latent))
        _steady.differentiate(latent, root, link, white, used, rows, moments, pulled)
        found = torch.from_numpy(moments).reshape(*ctx.batch, 4, latent, latent)
        for_columns = torch.from_numpy(pulled).movedim(1, -1).reshape(*ctx.batch, time, latent, columns)
        return found[..., :3, :, :], found[..., 3:, :, :], for_columns


def _contiguous(blocks: Tensor, count: int) -> np.ndarray:
    return np.ascontiguousarray(blocks.reshape(count, *blocks.shape[-3:]).numpy(force=True))
