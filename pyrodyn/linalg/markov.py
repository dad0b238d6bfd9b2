r"""Hidden Markov chains: the log likelihood of all bins with the modes summed out, and what the posterior says of them.

.. math:: Z = \sum_{z_{1:T}} \exp\!\Big(\pi_{z_1} + \sum_{t>1} P^{(t)}_{z_{t-1} z_t} + \sum_t \ell_{t,z_t}\Big)

with log potentials :math:`\pi` of the first mode, :math:`P` of transitions (they may change with time) and
:math:`\ell` of the observations. Potentials need not be normalised: the gradient of :math:`\log Z` is the posterior
probability of modes and of pairs of modes.

On the CPU in float64 compiled loops go bin by bin; elsewhere pairs of neighbouring bins are contracted in about log2(T)
batched steps of torch.

Shapes: ``initial`` (*batch, mode), ``transition`` (*batch, time - 1 or 1, mode, mode) from the first mode to the
second, and ``likelihood`` (*batch, time, mode). Batches broadcast; a transition of one bin holds for all.

References
----------
Rabiner, Proc. IEEE 77:257 (1989); Särkkä & García-Fernández, IEEE Trans. Autom. Control 66:299 (2021).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrodyn.linalg.chain import _compiled_for
from pyrodyn.linalg.matrix import broadcast_shapes

TOGETHER = 8  # elements, sharing a transition, from which their step is a product of matrices
LARGE = 1 << 19  # numbers from which NumPy asks for large pages
RAREST = -300.0  # log probability of a transition, beside the commonest, from which logarithms are needed


def mode_log_normaliser(initial: Tensor, transition: Tensor, likelihood: Tensor) -> Tensor:
    """Log normaliser, (*batch): the log likelihood, where initial and transition are normalised log probabilities.

    Differentiable once; see the module for shapes.

    Raises
    ------
    ValueError
        Where the shapes do not fit together, or a potential is NaN.
    """
    initial, transition, likelihood, batch = _aligned(initial, transition, likelihood)
    if _compiled_for(initial, transition, likelihood) is None:
        value = _contracted(initial, transition, likelihood)
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and bool(torch.isnan(value).any()):
            _refuse_nan(initial=initial, transition=transition, likelihood=likelihood)
        return value.reshape(batch)
    return _ModeLogNormaliser.apply(initial, transition, likelihood).reshape(batch)


def mode_marginals(initial: Tensor, transition: Tensor, likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior probabilities of modes (*batch, time, mode), and of pairs of them, in the shape of ``transition``.

    Those of pairs are summed over what shares a transition, batch elements and bins.
    """
    batch = _aligned(initial, transition, likelihood)[-1]
    likelihood = likelihood.expand(*batch, *likelihood.shape[-2:])
    leaves = [part.detach().requires_grad_() for part in (initial, transition, likelihood)]
    with torch.enable_grad():
        value = mode_log_normaliser(*leaves).sum()
        _, pairs, marginal = torch.autograd.grad(value, leaves, materialize_grads=True)
    return marginal, pairs


def sample_modes(
    initial: Tensor, transition: Tensor, likelihood: Tensor, samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Whole paths of modes from their posterior, (*batch, sample, time), by filtering forward and drawing backward.

    Raises
    ------
    ValueError
        Where the shapes do not fit together, or a potential is NaN.
    """
    initial, transition, likelihood, batch = _aligned(initial, transition, likelihood)
    _refuse_nan(initial=initial, transition=transition, likelihood=likelihood)
    with torch.no_grad():
        scaled = _scaled(initial, transition, likelihood)
    if scaled is None:
        filtered = np.empty(likelihood.shape)
        _kernels().filter_logarithmic(*(_array(part) for part in (initial, transition, likelihood)), filtered)
    else:
        ordered = scaled.filtered.swapaxes(0, 1) if scaled.together else scaled.filtered
        with np.errstate(divide="ignore"):  # what underflowed is not drawn
            filtered = np.log(np.ascontiguousarray(ordered))
    shape = (len(filtered), samples, likelihood.shape[-2])
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator).numpy()
    drawn = np.empty(shape, np.int64)
    _kernels().draw(_array(transition), filtered, uniform, drawn)
    return torch.from_numpy(drawn).reshape(*batch, *shape[1:]).to(likelihood.device)


def most_probable_modes(initial: Tensor, transition: Tensor, likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable path of modes (*batch, time), and its log probability together with the data, (*batch).

    Raises
    ------
    ValueError
        Where the shapes do not fit together, or a potential is NaN.
    """
    initial, transition, likelihood, batch = _aligned(initial, transition, likelihood)
    _refuse_nan(initial=initial, transition=transition, likelihood=likelihood)
    arrays = [_array(part) for part in (initial, transition, likelihood)]
    value, path = np.empty(len(arrays[2])), np.empty(arrays[2].shape[:2], np.int64)
    _kernels().most_probable(*arrays, value, path)
    device = likelihood.device
    return torch.from_numpy(path).reshape(*batch, -1).to(device), torch.from_numpy(value).reshape(batch).to(device)


def _aligned(initial: Tensor, transition: Tensor, likelihood: Tensor) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """One batch dimension: (element, mode), (element or 1, bins, mode, mode), (element, time, mode)."""
    time, modes = likelihood.shape[-2:]
    steps = transition.shape[-3] if transition.dim() > 2 else -1
    fits = transition.shape[-2:] == (modes, modes) and initial.shape[-1:] == (modes,)
    if not fits or steps not in (1, time - 1):
        raise ValueError(
            "initial, transition and likelihood must be (*batch, mode), (*batch, time - 1 or 1, mode, mode) and "
            f"(*batch, time, mode), got {tuple(initial.shape)}, {tuple(transition.shape)} and {tuple(likelihood.shape)}"
        )
    if steps == 0:  # of one bin: no transition is ever made
        transition = torch.zeros_like(likelihood[..., :1, :, None] * likelihood[..., :1, None, :])
    batch = broadcast_shapes(initial.shape[:-1], transition.shape[:-3], likelihood.shape[:-2])
    initial = initial.expand(*batch, modes).reshape(-1, modes)
    likelihood = likelihood.expand(*batch, time, modes).reshape(-1, time, modes)
    if transition.shape[:-3].numel() == 1:
        transition = transition.reshape(1, *transition.shape[-3:])
    else:
        transition = transition.expand(*batch, *transition.shape[-3:]).reshape(-1, *transition.shape[-3:])
    return initial, transition, likelihood, batch


def _refuse_nan(**potentials: Tensor) -> None:
    """A NaN compares as smaller than anything and would pass for an impossible mode."""
    for name, values in potentials.items():
        wrong = torch.isnan(values)
        if bool(wrong.any()):
            raise ValueError(
                f"{name} must not be NaN, got {int(wrong.sum())} (first at {tuple(wrong.nonzero()[0].tolist())} "
                "of element, then bin, then modes); look at the log density of the readout"
            )


class _Scaled(NamedTuple):
    """The forward algorithm in probabilities, scaled in every bin; time comes first where elements go together."""

    together: bool
    probability: np.ndarray  # of transitions, beside the commonest
    seen: np.ndarray  # likelihood, beside the largest of a bin
    filtered: np.ndarray
    scale: np.ndarray
    value: Tensor  # log normaliser, (element,)


def _scaled(initial: Tensor, transition: Tensor, likelihood: Tensor) -> _Scaled | None:
    """None where a potential is too rare for probabilities, infinite in a whole bin, or NaN."""
    commonest = transition.amax((-2, -1), keepdim=True)
    first = initial.amax(-1, keepdim=True)
    rarest = float(torch.minimum((transition - commonest).amin(), (initial - first).amin()))
    potentials = _array(likelihood)
    elements, bins, modes = potentials.shape
    together = len(transition) == 1 and elements >= TOGETHER
    seen = _room((bins, elements, modes) if together else potentials.shape)
    top = np.empty((elements, bins))
    whole = _kernels().relative(potentials, top, seen.swapaxes(0, 1) if together else seen)
    if not rarest > RAREST or math.isnan(whole):
        return None
    np.exp(seen, out=seen)
    filtered, start = _room(seen.shape), _array((initial - first).exp())
    probability, scale = _array((transition - commonest).exp()), np.empty(seen.shape[:2])
    if together:
        _kernels().filter_together(start, probability[0], seen, filtered, scale)
    else:
        _kernels().filter_scaled(start, probability, seen, filtered, scale, _known(modes))
    total = top.sum(-1) + np.log(scale).sum(0 if together else 1)
    shift = commonest.sum((-3, -2, -1)) * (bins - 1 if transition.shape[-3] == 1 else 1)
    value = torch.from_numpy(total) + first.squeeze(-1) + (shift if bins > 1 else 0.0)
    return _Scaled(together, probability, seen, filtered, scale, value)


class _ModeLogNormaliser(torch.autograd.Function):
    """The compiled forward algorithm; its gradient is the compiled smoother."""

    @staticmethod
    def forward(ctx, initial: Tensor, transition: Tensor, likelihood: Tensor) -> Tensor:
        scaled = _scaled(initial, transition, likelihood)
        ctx.scaled = scaled is not None
        if scaled is None:
            _refuse_nan(initial=initial, transition=transition, likelihood=likelihood)
            arrays = _array(initial), _array(transition), _array(likelihood)
            filtered = np.empty(likelihood.shape)
            _kernels().filter_logarithmic(*arrays, filtered)
            value = torch.logsumexp(torch.from_numpy(filtered[:, -1]), -1)
            ctx.arrays = *arrays[1:], filtered, value.numpy()
            return value
        ctx.together = scaled.together
        ctx.arrays = scaled.probability, scaled.seen, scaled.filtered, scaled.scale
        return scaled.value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        transition, seen, filtered, last = ctx.arrays
        weight = _array(grad)
        if ctx.scaled and ctx.together:
            bins, elements, modes = filtered.shape
            marginal, each = _room((elements, bins, modes)), np.empty(transition.shape)
            _kernels().smooth_together(transition[0], seen, filtered, last, weight, marginal, each[0])
            weighted, pairs = torch.from_numpy(marginal), torch.from_numpy(each)
        elif ctx.scaled:
            marginal, entered = _room(filtered.shape), _room(filtered.shape)
            transposed = np.ascontiguousarray(transition.swapaxes(-2, -1))
            _kernels().smooth_scaled(
                transposed, seen, filtered, last, weight, marginal, entered, _known(seen.shape[-1])
            )
            before, after = torch.from_numpy(filtered), torch.from_numpy(entered)
            if transition.shape[:2] == (1, 1):
                # All bins of all elements as one row of bins; nothing enters an element's first.
                outer = before.flatten(0, 1)[:-1].mT @ after.flatten(0, 1)[1:]
                pairs = outer[None, None] * torch.from_numpy(transition)
            else:
                pairs = _summed(before[:, :-1].unsqueeze(-1) * after[:, 1:].unsqueeze(-2), transition.shape)
                pairs = pairs * torch.from_numpy(transition)
            weighted = torch.from_numpy(marginal)
        else:
            marginal = np.empty(filtered.shape)
            each = np.zeros((*filtered.shape[:1], filtered.shape[1] - 1, *transition.shape[-2:]))
            _kernels().smooth_logarithmic(transition, seen, filtered, last, marginal, each)
            pairs = _summed(torch.from_numpy(each) * grad[:, None, None, None], transition.shape)
            weighted = torch.from_numpy(marginal) * grad[:, None, None]
        return weighted[:, 0], pairs, weighted


def _summed(pairs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum over elements and bins that share a transition."""
    for axis in (0, 1):
        if shape[axis] == 1:
            pairs = pairs.sum(axis, keepdim=True)
    return pairs


def _contracted(initial: Tensor, transition: Tensor, likelihood: Tensor) -> Tensor:
    """Neighbouring bins in pairs, until one is left."""
    # What cannot happen is merely beyond belief: minus infinity has no gradient.
    initial, transition, likelihood = (part.clamp(min=-1e100) for part in (initial, transition, likelihood))
    time = likelihood.shape[-2]
    start = initial + likelihood[:, 0]
    if time == 1:
        return torch.logsumexp(start, -1)
    links = transition.expand(len(likelihood), time - 1, *transition.shape[-2:]) + likelihood[:, 1:].unsqueeze(-2)
    while links.shape[1] > 1:
        pairs = links.shape[1] // 2
        joined = torch.logsumexp(
            links[:, 0 : 2 * pairs : 2].unsqueeze(-1) + links[:, 1 : 2 * pairs : 2].unsqueeze(-3), -2
        )
        links = torch.cat([joined, links[:, 2 * pairs :]], 1)
    return torch.logsumexp(start.unsqueeze(-1) + links[:, 0], (-2, -1))


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """An array to be filled. Memory touched for the first time costs more than this arithmetic, in small pages."""
    size = math.prod(shape)
    if size < LARGE // 4:
        return np.empty(shape)
    return np.empty(max(size, LARGE))[:size].reshape(shape)


def _known(modes: int) -> tuple[int, ...]:
    """Tells a kernel the number of modes when it is compiled."""
    return (0,) * modes if modes <= _kernels().UNROLLED else ()


def _kernels() -> Any:
    from pyrodyn.linalg import _markov_kernels

    return _markov_kernels


def _array(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.detach().cpu().double().numpy())
