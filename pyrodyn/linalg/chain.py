r"""Gaussians whose precision is block-tridiagonal.

The precision of a Gauss-Markov chain of T states of dimension D is held by its blocks

.. math:: J_{t,t} \;(\text{diagonal}), \qquad J_{t,t+1} \;(\text{upper}), \qquad J_{t+1,t} = J_{t,t+1}^\top .

Block cyclic reduction eliminates every second state at once: given its two neighbours an odd state is independent of
all others, and what remains is again a chain, half as long. So T states take about log2(T) batched steps, forward for
the determinant and the linear solve, backward for means, samples, and the blocks of the inverse. It serves every
device and autograd. On the CPU, where autograd need not follow, `pyrodyn.linalg.compiled` takes one bin after another:
the same results to rounding in a fraction of the time. `factorise` and `log_normaliser` choose.

Shapes: ``diagonal`` (*batch, time, latent, latent), ``upper`` (*batch, time - 1, latent, latent), and columns
(*batch, time, latent, column): all that share a precision are the columns of one solve.

Reference: Heller, SIAM J. Numer. Anal. 13:484 (1976), on block cyclic reduction.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrodyn.linalg.matrix import broadcast_shapes, cholesky, followed

if TYPE_CHECKING:
    from pyrodyn.linalg.compiled import CompiledFactor


class _Level(NamedTuple):
    """One halving: how its odd states hang on their even neighbours."""

    root: Tensor  # Cholesky factor of the odd states' precision
    links: Tensor  # root^-1 [J_odd,left  J_odd,right]: (..., odd, latent, 2 latent)


class ChainFactor:
    r"""The factorised precision of a Gauss-Markov chain; one factor serves every right-hand side.

    Parameters
    ----------
    diagonal : Tensor, (*batch, time, latent, latent)
        Diagonal blocks :math:`J_{t,t}`, symmetric.
    upper : Tensor, (*batch, time - 1, latent, latent)
        Blocks :math:`J_{t,t+1}` above the diagonal.

    Notes
    -----
    A precision that is not positive definite gives NaN in its own batch element and leaves the others alone.
    Every method is differentiable through torch; `log_normaliser` has a cheaper gradient of its own.
    """

    def __init__(self, diagonal: Tensor, upper: Tensor) -> None:
        self.num_bins, self.latent_dim = diagonal.shape[-3], diagonal.shape[-1]
        self._levels: list[_Level] = []
        log_det = diagonal.new_zeros(())
        dim = self.latent_dim
        while diagonal.shape[-3] > 1:
            root = cholesky(diagonal[..., 1::2, :, :])
            left = upper[..., 0::2, :, :].mT
            right = _resize(upper[..., 1::2, :, :], left.shape[-3])
            links = torch.linalg.solve_triangular(root, torch.cat([left, right], -1), upper=False)
            reduction = links.mT @ links
            evens = diagonal.shape[-3] - left.shape[-3]
            diagonal = (
                diagonal[..., 0::2, :, :]
                - _resize(reduction[..., :dim, :dim], evens)
                - _delay(reduction[..., dim:, dim:], evens)
            )
            upper = -reduction[..., : evens - 1, :dim, dim:]
            log_det = log_det + _log_diagonal(root)
            self._levels.append(_Level(root, links))
        self._last = cholesky(diagonal)
        self.log_det: Tensor = 2.0 * (log_det + _log_diagonal(self._last))

    def halve(self, columns: Tensor) -> list[Tensor]:
        """Forward substitution: one tensor of whitened columns for each level, the last state at the end."""
        dim, whitened = self.latent_dim, []
        for root, links in self._levels:
            odd = torch.linalg.solve_triangular(root, columns[..., 1::2, :, :], upper=False)
            pushed = links.mT @ odd
            evens = columns.shape[-3] - odd.shape[-3]
            columns = (
                columns[..., 0::2, :, :] - _resize(pushed[..., :dim, :], evens) - _delay(pushed[..., dim:, :], evens)
            )
            whitened.append(odd)
        whitened.append(torch.linalg.solve_triangular(self._last, columns, upper=False))
        return whitened

    def restore(self, whitened: list[Tensor]) -> Tensor:
        """Backward substitution: the states (*batch, time, latent, column) from the whitened columns of all levels."""
        states = torch.linalg.solve_triangular(self._last.mT, whitened[-1], upper=True)
        for (root, links), odd in zip(reversed(self._levels), reversed(whitened[:-1]), strict=True):
            neighbours = torch.cat([states[..., : odd.shape[-3], :, :], _next(states, odd.shape[-3])], -2)
            states = _interleave(states, torch.linalg.solve_triangular(root.mT, odd - links @ neighbours, upper=True))
        return states

    def solve(self, columns: Tensor) -> Tensor:
        """Solve ``J x = columns``; shapes (*batch, time, latent, column)."""
        return self.restore(self.halve(columns))

    def colour(self, noise: Tensor) -> Tensor:
        """Map iid standard normal ``noise`` (*batch, time, latent, column) to draws of covariance ``J^-1``."""
        split = []
        for _ in self._levels:
            split.append(noise[..., 1::2, :, :])
            noise = noise[..., 0::2, :, :]
        return self.restore([*split, noise])

    def draw(self, noise: Tensor) -> Tensor:
        """As `colour`; `noise_of` is its inverse."""
        return self.colour(noise)

    def noise_of(self, states: Tensor) -> Tensor:
        """The noise (*batch, time, latent, column) that `draw` maps to these states."""
        levels = []
        for root, links in self._levels:
            evens, odd = states[..., 0::2, :, :], states[..., 1::2, :, :]
            count = odd.shape[-3]
            neighbours = torch.cat([evens[..., :count, :, :], _next(evens, count)], -2)
            levels.append(root.mT @ odd + links @ neighbours)
            states = evens
        noise = self._last.mT @ states
        for odd in reversed(levels):
            noise = _interleave(noise, odd)
        return noise

    def uncolour(self, states: Tensor) -> Tensor:
        """The inverse of `colour`."""
        return self.noise_of(states)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Blocks of J^-1: Cov(x_t) (*batch, time, latent, latent) and Cov(x_t, x_t+1) (*batch, time - 1, ...)."""
        identity = torch.eye(self.latent_dim, dtype=self._last.dtype, device=self._last.device)
        covariance = torch.cholesky_solve(identity.expand(self._last.shape), self._last)
        cross = covariance[..., :0, :, :]
        dim = self.latent_dim
        for root, links in reversed(self._levels):
            odds = root.shape[-3]
            weights = -torch.linalg.solve_triangular(root.mT, links, upper=True)
            left, right = covariance[..., :odds, :, :], _next(covariance, odds)
            between = _resize(cross, odds)
            joint = torch.cat([torch.cat([left, between], -1), torch.cat([between.mT, right], -1)], -2)
            spread = weights @ joint
            own = torch.cholesky_solve(identity.expand(root.shape), root) + spread @ weights.mT
            rights = covariance.shape[-3] - 1
            cross = _interleave(spread[..., :dim].mT, spread[..., :rights, :, dim:])
            covariance = _interleave(covariance, own)
        return covariance, cross


@functools.cache
def _compiled() -> ModuleType | None:
    """The module of compiled kernels; None where numba is not installed, or told not to compile."""
    try:
        import numba

        from pyrodyn.linalg import compiled
    except ImportError:
        return None
    return None if numba.config.DISABLE_JIT else compiled  # pyright: ignore[reportAttributeAccessIssue]


def _compiled_for(*tensors: Tensor) -> ModuleType | None:
    """The compiled kernels, where they can stand for operations on these tensors as far as nothing differentiates."""
    if followed(*tensors):
        return None  # a trace would record their result as a constant
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.float64 for tensor in tensors):
        return None
    return _compiled()


def factorise(diagonal: Tensor, upper: Tensor) -> ChainFactor | CompiledFactor:
    """Factorise a precision: by compiled loops on the CPU in float64 where autograd need not follow, else by torch.

    Parameters
    ----------
    diagonal, upper : Tensor, (*batch, time, latent, latent) and (*batch, time - 1, latent, latent)
        Blocks of the precision.

    Returns
    -------
    ChainFactor or CompiledFactor
        Both have ``log_det``, ``solve``, ``colour`` and ``marginals`` with the same results to rounding, differentiable
        in columns that require a gradient.
    """
    recorded = torch.is_grad_enabled() and (diagonal.requires_grad or upper.requires_grad)
    compiled = None if recorded else _compiled_for(diagonal, upper)
    if compiled is None:
        return ChainFactor(diagonal, upper)
    batch = broadcast_shapes(diagonal.shape[:-3], upper.shape[:-3])
    own, above = _expand(diagonal, batch + diagonal.shape[-3:]), _expand(upper, batch + upper.shape[-3:])
    return compiled.CompiledFactor(own, above, parallel=lambda: ChainFactor(diagonal, upper))


class _LogNormaliser(torch.autograd.Function):
    """Its gradient is the expected sufficient statistics: a smoother, not a pass back through the elimination."""

    @staticmethod
    def forward(ctx, diagonal: Tensor, upper: Tensor, columns: Tensor) -> Tensor:
        factor = ChainFactor(diagonal, upper)
        whitened = factor.halve(columns)
        ctx.factor, ctx.whitened = factor, whitened
        square = sum((part.square().sum((-3, -2)) for part in whitened), start=columns.new_zeros(()))
        constant = 0.5 * factor.num_bins * factor.latent_dim * math.log(2.0 * math.pi)
        return 0.5 * square - 0.5 * factor.log_det.unsqueeze(-1) + constant

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # grad: (*batch, column)
        mean = ctx.factor.restore(ctx.whitened)
        weighted = grad[..., None, None, :] * mean
        for_diagonal = for_upper = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            covariance, cross = ctx.factor.marginals()
            total = grad.sum(-1)[..., None, None, None]
            for_diagonal = -0.5 * (total * covariance + weighted @ mean.mT)
            for_upper = -(total * cross + weighted[..., :-1, :, :] @ mean[..., 1:, :, :].mT)
        return for_diagonal, for_upper, weighted


def log_normaliser(diagonal: Tensor, upper: Tensor, linear: Tensor) -> Tensor:
    r"""Log normaliser of :math:`\exp(-\tfrac12 x^\top J x + h^\top x)` over a whole chain.

    .. math:: \log Z = \tfrac12 h^\top J^{-1} h - \tfrac12 \log|J| + \tfrac{TD}{2} \log 2\pi

    Parameters
    ----------
    diagonal, upper : Tensor, (*batch, time, latent, latent) and (*batch, time - 1, latent, latent)
        Blocks of the precision J. Where its batch has size one and that of ``linear`` is larger, one factorisation
        serves all.
    linear : Tensor, (*batch, time, latent)
        The linear potential h.

    Returns
    -------
    Tensor, (*batch)
        Differentiable once; the gradient is the mean and the selected inverse.

    Raises
    ------
    ValueError
        Where the shapes do not fit together.
    """
    time, latent = diagonal.shape[-3], diagonal.shape[-1]
    if upper.shape[-3:] != (time - 1, latent, latent) or linear.shape[-2:] != (time, latent):
        raise ValueError(
            "diagonal, upper and linear must be (*batch, time, latent, latent), (*batch, time - 1, latent, latent) and "
            f"(*batch, time, latent), got {tuple(diagonal.shape)}, {tuple(upper.shape)} and {tuple(linear.shape)}"
        )
    diagonal, upper, columns, layout = as_columns(diagonal, upper, linear)
    compiled = _compiled_for(diagonal, upper, columns)
    kernel = _LogNormaliser if compiled is None else compiled.LogNormaliser
    return from_columns(kernel.apply(diagonal, upper, columns), layout)


def steady_log_normaliser(blocks: Tensor, upper: Tensor, linear: Tensor) -> Tensor:
    """`log_normaliser` of a precision that does not change with time but at its ends.

    Where compiled kernels apply, blocks of the factor and of the inverse are computed until they come to rest, to
    rounding, and no longer.

    Parameters
    ----------
    blocks : Tensor, (*batch, 3, latent, latent)
        Diagonal blocks: of the first bin, of those between, of the last.
    upper : Tensor, (*batch, 1, latent, latent)
        The block above the diagonal.
    linear : Tensor, (*batch, time, latent)
        The linear potential.

    Returns
    -------
    Tensor, (*batch)
    """
    time = linear.shape[-2]
    compiled = _compiled_for(blocks, upper, linear) if time >= 2 else None
    if compiled is None:
        return log_normaliser(*spread_blocks(blocks, upper, time), linear)
    blocks, upper, columns, layout = as_columns(blocks, upper, linear)
    return from_columns(compiled.SteadyLogNormaliser.apply(blocks, upper, columns), layout)


def spread_blocks(blocks: Tensor, upper: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """Diagonal (*batch, time, latent, latent) and upper blocks of a steady precision; of one bin, the first block."""
    if time == 1:
        return blocks[..., :1, :, :], upper[..., :0, :, :]
    first, middle, last = blocks.unbind(-3)
    between = middle.unsqueeze(-3).expand(*middle.shape[:-2], time - 2, *middle.shape[-2:])
    diagonal = torch.cat([first.unsqueeze(-3), between, last.unsqueeze(-3)], -3)
    return diagonal, upper.expand(*upper.shape[:-3], time - 1, *upper.shape[-2:])


class ColumnLayout(NamedTuple):
    """How batch dimensions were moved to columns, so that they can be moved back."""

    batch: torch.Size  # of the result
    shared: tuple[int, ...]  # batch dimensions that share a precision
    kept: tuple[int, ...]


def as_columns(diagonal: Tensor, upper: Tensor, linear: Tensor) -> tuple[Tensor, Tensor, Tensor, ColumnLayout]:
    """Bring batch dimensions in which the precision has size one to the columns of one solve."""
    rank = max(diagonal.dim() - 3, linear.dim() - 2)
    diagonal, upper, linear = _lead(diagonal, rank + 3), _lead(upper, rank + 3), _lead(linear, rank + 2)
    lead = broadcast_shapes(diagonal.shape[:-3], upper.shape[:-3])
    batch = broadcast_shapes(lead, linear.shape[:-2])
    shared = tuple(i for i in range(rank) if lead[i] == 1)
    kept = tuple(i for i in range(rank) if lead[i] != 1)
    diagonal, upper = _expand(diagonal, lead + diagonal.shape[-3:]), _expand(upper, lead + upper.shape[-3:])
    linear = _expand(linear, batch + linear.shape[-2:])
    columns = linear.permute(*kept, rank, rank + 1, *shared).flatten(len(kept) + 2) if shared else linear.unsqueeze(-1)
    layout = ColumnLayout(batch, shared, kept)
    if shared:
        squeezed = torch.Size(lead[i] for i in kept)
        diagonal = diagonal.reshape(squeezed + diagonal.shape[-3:])
        upper = upper.reshape(squeezed + upper.shape[-3:])
    return diagonal, upper, columns, layout


def from_columns(columns: Tensor, layout: ColumnLayout) -> Tensor:
    """Undo `as_columns` on a result (*kept, *event, column): gives (*batch, *event)."""
    batch, shared, kept = layout
    if not shared:
        return columns.squeeze(-1)
    event = columns.shape[len(kept) : -1]
    unfolded = columns.reshape(columns.shape[:-1] + torch.Size(batch[i] for i in shared))
    order = [0] * len(batch)
    for position, i in enumerate(kept):
        order[i] = position
    for position, i in enumerate(shared):
        order[i] = len(kept) + len(event) + position
    return unfolded.permute(*order, *range(len(kept), len(kept) + len(event)))


def _lead(tensor: Tensor, rank: int) -> Tensor:
    """Dimensions of size one in front, as many as are missing."""
    return tensor if tensor.dim() >= rank else tensor[(None,) * (rank - tensor.dim())]


def _expand(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor if tensor.shape == shape else tensor.expand(shape)


def _log_diagonal(root: Tensor) -> Tensor:
    return root.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))


def _resize(blocks: Tensor, count: int) -> Tensor:
    """The first ``count`` blocks along time, zeros where there are fewer."""
    have = blocks.shape[-3]
    if have >= count:
        return blocks[..., :count, :, :]
    return torch.cat([blocks, blocks.new_zeros(blocks.shape[:-3] + (count - have,) + blocks.shape[-2:])], -3)


def _delay(blocks: Tensor, count: int) -> Tensor:
    """Shift one block later along time: what an odd state gives to the even state on its right."""
    padded = torch.cat([blocks.new_zeros(blocks.shape[:-3] + (1,) + blocks.shape[-2:]), blocks], -3)
    return padded[..., :count, :, :]


def _next(blocks: Tensor, count: int) -> Tensor:
    """The right neighbours of ``count`` odd states; zeros for a last one that has none."""
    return _resize(blocks[..., 1:, :, :], count)


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    total = even.shape[-3] + odd.shape[-3]
    batch = broadcast_shapes(even.shape[:-3], odd.shape[:-3])
    woven = torch.empty(batch + (total,) + even.shape[-2:], dtype=even.dtype, device=even.device)
    woven[..., 0::2, :, :] = even
    woven[..., 1::2, :, :] = odd
    return woven
