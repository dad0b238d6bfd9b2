r"""Hidden Markov chains on one CPU core: potentials as probabilities, filtered and smoothed by compiled kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrodyn.linalg._room import room

TOGETHER = 8  # elements, sharing a transition, from which their step is a product of matrices
LEAST = 8  # elements that go together at once at least: fewer, and the products of matrices slow down
BLOCK = 1 << 17  # numbers in the likelihoods of elements that go together at once: 1 MB
RAREST = -300.0  # log probability of a transition, beside the commonest, from which logarithms are needed


class Scaled(NamedTuple):
    """The forward algorithm in probabilities, scaled in every bin."""

    probability: np.ndarray  # of transitions, beside the commonest
    seen: np.ndarray  # likelihood, beside the largest of a bin
    filtered: np.ndarray
    scale: np.ndarray


class Smoothed(NamedTuple):
    """The gradient of the log normaliser: times a weight of each element, summed over them for pairs."""

    marginal: np.ndarray  # (element, time, mode)
    pairs: np.ndarray  # in the shape of the transition


class ModeChain:
    """Potentials beside the commonest or largest, as probabilities, and what takes their logarithms back."""

    def __init__(self, initial: Tensor, transition: Tensor, likelihood: Tensor) -> None:
        commonest, first = transition.amax((-2, -1), keepdim=True), initial.amax(-1, keepdim=True)
        self.rare = not bool(torch.minimum((transition - commonest).amin(), (initial - first).amin()) > RAREST)
        self.initial, self.probability = array((initial - first).exp()), array((transition - commonest).exp())
        self.likelihood = array(likelihood)
        self.elements, self.bins, self.modes = self.likelihood.shape
        self.together = len(transition) == 1 and self.elements >= TOGETHER
        self.known = (0,) * self.modes if self.modes <= kernels().UNROLLED else ()
        shift = commonest.sum((-3, -2, -1)) * (self.bins - 1 if transition.shape[-3] == 1 else 1)
        self.shift = first.squeeze(-1) + (shift if self.bins > 1 else 0.0)

    def seen(self, elements: slice, top: np.ndarray, out: np.ndarray) -> bool:
        """Likelihood beside the largest of a bin; False where one is infinite in a whole bin, or NaN."""
        whole = kernels().relative(self.likelihood[elements], top, out, self.known)
        np.exp(out, out=out)
        return not math.isnan(whole)

    def value(self, top: np.ndarray, scale: np.ndarray) -> Tensor:
        total = np.log(scale, out=room(scale.shape))
        total += top
        return torch.from_numpy(total.sum(-1)) + self.shift

    def filter(self) -> tuple[Tensor, Scaled] | None:
        """Log normaliser and filtered probabilities.

        None where a potential is too rare for probabilities, infinite in a whole bin, or NaN.
        """
        shape = self.elements, self.bins, self.modes
        top, scale = room((2, *shape[:2]))
        if self.together:
            seen, filtered = (room((shape[1], shape[0], shape[2])).swapaxes(0, 1) for _ in range(2))
        else:
            seen, filtered = room(shape), room(shape)
        if self.rare or not self.seen(slice(None), top, seen):
            return None
        if self.together:
            arrays = seen.swapaxes(0, 1), filtered.swapaxes(0, 1), scale
            kernels().filter_together(self.initial, self.probability[0], *arrays, self.known)
        else:
            kernels().filter_scaled(self.initial, self.probability, seen, filtered, scale, self.known)
        return self.value(top, scale), Scaled(self.probability, seen, filtered, scale)

    def smooth(self, weight: np.ndarray) -> tuple[Tensor, Smoothed] | None:
        """Log normaliser and gradient of elements that go `together`; None as in `filter`.

        Some elements at a time: what is filtered is smoothed while the cache still holds it.
        """
        if self.rare:
            return None
        top, scale = room((2, self.elements, self.bins))
        marginal, pairs = room(self.likelihood.shape), np.zeros(self.probability.shape)
        transposed = np.ascontiguousarray(self.probability[0].swapaxes(-2, -1))
        at_once = max(LEAST, min(self.elements, BLOCK // (self.bins * self.modes)))
        held = room((2, at_once * self.bins * self.modes))
        for start in range(0, self.elements, at_once):
            some = slice(start, min(start + at_once, self.elements))
            shape = self.bins, some.stop - start, self.modes
            seen, filtered = (part[: math.prod(shape)].reshape(shape) for part in held)
            if not self.seen(some, top[some], seen.swapaxes(0, 1)):
                return None
            kernels().filter_together(self.initial[some], self.probability[0], seen, filtered, scale[some], self.known)
            kernels().smooth_together(
                self.probability[0], transposed, seen, filtered, weight[some], marginal[some], pairs[0], self.known
            )
        return self.value(top, scale), Smoothed(marginal, pairs)


class ModeLogNormaliser(torch.autograd.Function):
    """The compiled forward algorithm; its gradient is the compiled smoother.

    Where elements go together and a gradient is wanted, both come from one pass, with a weight of one for each element;
    another pass follows only where the gradient turns out to weigh elements differently.
    """

    @staticmethod
    def forward(ctx, initial: Tensor, transition: Tensor, likelihood: Tensor, graded: bool) -> Tensor:
        chain = ModeChain(initial, transition, likelihood)
        ctx.smoothed = ctx.scaled = ctx.arrays = None
        ctx.together = False
        if chain.together and graded:
            found = chain.smooth(np.ones(chain.elements))
            if found is not None:
                # Not the value: with it, memory would wait for the collector of cycles.
                value, ctx.smoothed = found
                ctx.together = True
                ctx.save_for_backward(initial, transition, likelihood)
                return value
        else:
            found = chain.filter()
            if found is not None:
                value, ctx.scaled = found
                ctx.known = chain.known
                return value
        refuse_nan(initial=initial, transition=transition, likelihood=likelihood)
        arrays = array(initial), array(transition), chain.likelihood
        filtered = np.empty(likelihood.shape)
        kernels().filter_logarithmic(*arrays, filtered)
        value = torch.logsumexp(torch.from_numpy(filtered[:, -1]), -1)
        ctx.arrays = *arrays[1:], filtered, value.numpy()
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        if ctx.together:
            # Given away once: a gradient that is added to in place must not be found here by the next pass.
            smoothed, ctx.smoothed = ctx.smoothed, None
            weighted, pairs = _weighted(ctx.saved_tensors, smoothed, grad)
        elif ctx.scaled is not None:
            weighted, pairs = _smooth_apart(ctx.scaled, ctx.known, grad)
        else:
            transition, seen, filtered, last = ctx.arrays
            marginal = np.empty(filtered.shape)
            each = np.zeros((*filtered.shape[:1], filtered.shape[1] - 1, *transition.shape[-2:]))
            kernels().smooth_logarithmic(transition, seen, filtered, last, marginal, each)
            pairs = _summed(torch.from_numpy(each) * grad[:, None, None, None], transition.shape)
            weighted = torch.from_numpy(marginal) * grad[:, None, None]
        return weighted[:, 0].clone(), pairs, weighted, None


def _weighted(potentials: tuple[Tensor, ...], smoothed: Smoothed | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Marginals and pairs of elements that go together, from those with a weight of one where they are still held."""
    common = float(grad[0])
    if smoothed is None or bool((grad != common).any()):
        again = ModeChain(*potentials).smooth(array(grad))
        assert again is not None  # it went before
        smoothed, common = again[1], 1.0
    marginal, pairs = torch.from_numpy(smoothed.marginal), torch.from_numpy(smoothed.pairs)
    return (marginal, pairs) if common == 1.0 else (common * marginal, common * pairs)


def _smooth_apart(scaled: Scaled, known: tuple[int, ...], grad: Tensor) -> tuple[Tensor, Tensor]:
    """Marginals and pairs of elements that go one after another."""
    transition, seen, filtered, scale = scaled
    marginal, entered = room(filtered.shape), room(filtered.shape)
    transposed = np.ascontiguousarray(transition.swapaxes(-2, -1))
    kernels().smooth_scaled(transposed, seen, filtered, scale, array(grad), marginal, entered, known)
    before, after = torch.from_numpy(filtered), torch.from_numpy(entered)
    if transition.shape[:2] == (1, 1):
        # All bins of all elements as one row of bins; nothing enters an element's first.
        outer = before.flatten(0, 1)[:-1].mT @ after.flatten(0, 1)[1:]
        pairs = outer[None, None] * torch.from_numpy(transition)
    else:
        pairs = _summed(before[:, :-1].unsqueeze(-1) * after[:, 1:].unsqueeze(-2), transition.shape)
        pairs = pairs * torch.from_numpy(transition)
    return torch.from_numpy(marginal), pairs


def _summed(pairs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum over elements and bins that share a transition."""
    for axis in (0, 1):
        if shape[axis] == 1:
            pairs = pairs.sum(axis, keepdim=True)
    return pairs


def refuse_nan(**potentials: Tensor) -> None:
    """A NaN compares as smaller than anything and would pass for an impossible mode."""
    for name, values in potentials.items():
        wrong = torch.isnan(values)
        if bool(wrong.any()):
            raise ValueError(
                f"{name} must not be NaN, got {int(wrong.sum())} (first at {tuple(wrong.nonzero()[0].tolist())} "
                "of element, then bin, then modes); look at the log density of the readout"
            )


def kernels() -> Any:
    from pyrodyn.linalg import _markov_kernels

    return _markov_kernels


def array(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.detach().cpu().double().numpy())
