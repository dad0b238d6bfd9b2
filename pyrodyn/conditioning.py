r"""What observations say of a path, given the parameters: exact, Laplace, or linearised about a given path.

For a Gaussian readout the path is Gaussian given the parameters, and can be integrated out exactly. For a log-concave
readout, with :math:`\hat x` the mode of :math:`\log p(y, x \mid \theta)` and H minus its Hessian there,

.. math:: \log p(y \mid \theta) \approx \log p(y, \hat x \mid \theta) - \tfrac12 \log|H| + \tfrac{TD}{2}\log 2\pi .

The mode depends on :math:`\theta`. One Newton step from the detached mode, with the Hessian detached and the gradient
not, carries that dependence, so that one pass of autograd gives the full derivative; a mode that is merely detached
does not.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from pyrodyn.distributions import GaussMarkov
from pyrodyn.linalg import log_normaliser
from pyrodyn.linalg.matrix import broadcast_shapes, of_all_trials, product
from pyrodyn.readouts import AffineReadout
from pyrodyn.readouts.likelihood import Pairs, PathLikelihood, outer

MAX_NEWTON_STEPS = 100
MAX_PREDICTOR_STEP = 4.0  # in one Newton step no predictor moves further: exp() overshoots from afar
TOLERANCE = 1e-4  # largest full step of a latent at convergence; its error is the square, and is squared again
COARSE = 1e-2  # where only the value is wanted; in any case of a predictor, whatever the units of the latents
SUFFICIENT = 1e-4  # Armijo's constant
WORTH = 5000  # bins x latents squared of a factorisation that are worth the calls of a group of trials
MOST_GROUPS = 32  # of trials of one mask


def path_given(prior: GaussMarkov, readout: AffineReadout, observations: Tensor) -> GaussMarkov:
    """Posterior of the path: exact for a Gaussian readout, the Laplace approximation otherwise."""
    if readout.law.is_gaussian:
        return prior.condition(*gaussian_potential(readout, observations))
    return laplace_path(prior, readout, observations)


def path_evidence(prior: GaussMarkov, readout: AffineReadout, observations: Tensor) -> Tensor:
    """log p(y | parameters) of every trial, (*draw, trial): exact for a Gaussian readout, Laplace otherwise."""
    if readout.law.is_gaussian:
        return gaussian_evidence(prior, readout, observations)
    return laplace_evidence(prior, readout, observations)


def gaussian_potential(readout: AffineReadout, observations: Tensor) -> tuple[Tensor, Tensor]:
    """What Gaussian observations say of the path: precision (*batch, time or 1, latent, latent) and linear part."""
    weighted = _weighted(readout)
    linear = _gaussian_linear(readout, weighted, observations)
    if readout.observed is None:
        return (readout.loading.mT @ weighted).unsqueeze(-3), linear
    return _precision_of(readout, weighted, _pattern(readout.observed)), linear


def _weighted(readout: AffineReadout) -> Tensor:
    """R^-1 C, (*draw, 1, unit, latent)."""
    return readout.loading * readout.noise.square().reciprocal().squeeze(-2).unsqueeze(-1)


def _gaussian_linear(readout: AffineReadout, weighted: Tensor, observations: Tensor) -> Tensor:
    if readout.observed is None:
        return observations @ weighted - (readout.offset @ weighted)
    return torch.where(readout.observed, observations - readout.offset, 0.0) @ weighted


def _precision_of(readout: AffineReadout, weighted: Tensor, seen: Tensor) -> Tensor:
    """Sum over the units that are ``seen`` (trial or 1, time or 1, unit): (*draw, trial or 1, time or 1, latent,
    latent)."""
    pairs = (readout.loading.unsqueeze(-1) * weighted.unsqueeze(-2)).flatten(-2)
    precision = seen.to(weighted.dtype) @ pairs
    return precision.reshape(precision.shape[:-1] + readout.loading.shape[-1:] * 2)


def gaussian_evidence(prior: GaussMarkov, readout: AffineReadout, observations: Tensor) -> Tensor:
    """Exact log p(y | parameters) of every trial; units enter only through their weighted sums."""
    middle, sums = _moments(observations, readout.observed)
    if _apart(readout, observations):
        parts = readout.loading, readout.offset, readout.noise
        if readout.loading.dim() == 2:  # no draws
            parts = tuple(part.unsqueeze(0) for part in parts)
        precision, linear, at_zero = _Sums.apply(*parts, observations, middle, sums)
        normaliser = prior.condition(precision, linear).log_normaliser
    else:
        normaliser = _grouped_normaliser(prior, readout, observations)
        # Log density of the observations at a path of zeros, from sums over bins: no (draw, trial, time, unit) tensor.
        offset = readout.offset.squeeze(-2) - middle.squeeze(-2)
        sd = readout.noise.squeeze(-2)
        weight = sd.square().reciprocal()
        pull = offset * weight
        constant = offset * pull + 2.0 * sd.log() + math.log(2.0 * math.pi)
        at_zero = -0.5 * (sums @ torch.cat([weight.expand_as(pull), -2.0 * pull, constant], -1).mT).squeeze(-1)
    return at_zero + normaliser - prior.log_normaliser


def _grouped_normaliser(prior: GaussMarkov, readout: AffineReadout, observations: Tensor) -> Tensor:
    """Log normaliser of the posterior, (*draw, trial): one factorisation for all trials of the same mask."""
    observed: Any = readout.observed
    groups = _groups(observed, prior.event_shape[-1])
    weighted = _weighted(readout)
    if groups is None or not prior.shares_precision or weighted.dim() < 3 or weighted.shape[-3] > 1:
        return prior.condition(*gaussian_potential(readout, observations)).log_normaliser
    linear = _gaussian_linear(readout, weighted, observations)
    own = prior.linear.dim() > 2 and prior.linear.shape[-3] > 1  # a drift or a mean in each trial
    found = []
    for trials, seen in groups.parts:
        chain = prior.of_trials(trials) if own else prior
        posterior = chain.condition(_precision_of(readout, weighted, seen), linear[..., trials, :, :])
        found.append(posterior.log_normaliser)
    return torch.cat(found, -1)[..., groups.back]


def _apart(readout: AffineReadout, observations: Tensor) -> bool:
    """Whether nothing is missing, no parameter differs between trials, and all have the same draws."""
    loading, offset, noise = readout.loading, readout.offset, readout.noise
    return (
        readout.observed is None
        and observations.dim() == 3
        and not observations.requires_grad
        and (loading.dim() == 2 or loading.shape[-3] == 1)
        and offset.shape == noise.shape == (*loading.shape[:-2], 1, loading.shape[-2])
        and not any(unpack_dual(part).tangent is not None for part in (loading, offset, noise))
    )


class _Sums(torch.autograd.Function):
    """`gaussian_potential`, and the log density of the observations (*draw, trial) at a path of zeros.

    The same as the operations in `gaussian_evidence`, with a gradient written out: for one trial their graph costs as
    much as the chain.
    """

    @staticmethod
    def forward(
        ctx, loading: Tensor, offset: Tensor, noise: Tensor, observations: Tensor, middle: Tensor, sums: Tensor
    ):
        offset, sd = offset.squeeze(-2), noise.squeeze(-2)  # (*draw, 1, unit)
        variance = sd.square()
        weight = variance.reciprocal()
        weighted = loading * weight.unsqueeze(-1)
        precision = (loading.mT @ weighted).unsqueeze(-3)
        # A wide product takes half the time of a tall one; of many trials its layout would cost more than that.
        seen = (weighted.mT @ observations.mT).mT if len(observations) == 1 else of_all_trials(observations, weighted)
        linear = seen - (weighted * offset.unsqueeze(-1)).sum(-2, keepdim=True)
        centred = offset - middle.squeeze(-2)
        pull = centred * weight
        constant = torch.addcmul((2.0 * math.pi * variance).log(), centred, pull)
        at_zero = (sums @ torch.cat([-0.5 * weight, pull, -0.5 * constant], -1).mT).squeeze(-1)
        ctx.save_for_backward(loading, offset, sd, observations, sums, weight, weighted, centred, pull)
        return precision, linear, at_zero

    @staticmethod
    @once_differentiable
    def backward(ctx, for_precision: Tensor, for_linear: Tensor, for_zero: Tensor):
        loading, offset, sd, observations, sums, weight, weighted, centred, pull = ctx.saved_tensors
        # C' W C
        for_precision = for_precision.squeeze(-3)
        both = loading @ (for_precision + for_precision.mT)
        # (y - offset) W C, summed over trials and bins
        for_linear = for_linear.flatten(-3, -2)
        whole = for_linear.sum(-2, keepdim=True)
        seen = product(for_linear.mT, observations.flatten(0, 1)).mT
        seen = torch.addcmul(seen, offset.mT, whole, value=-1.0).unsqueeze(-3)
        for_loading = (both + seen) * weight.unsqueeze(-1)
        for_weight = (torch.add(seen, both, alpha=0.5) * loading).sum(-1)
        for_offset = (weighted * whole.unsqueeze(-3)).sum(-1)
        # weight, pull and constant at a path of zeros
        own, for_pull, each = (for_zero.unsqueeze(-2) @ sums).chunk(3, -1)
        for_pull = torch.addcmul(for_pull, each, centred, value=-0.5)
        for_weight = torch.addcmul(torch.add(for_weight, own, alpha=-0.5), for_pull, centred)
        for_offset = torch.addcmul(for_pull * weight - for_offset, each, pull, value=-0.5)
        for_noise = (torch.addcmul(0.5 * each, for_weight, weight) / sd).mul(-2.0)
        return for_loading, for_offset.unsqueeze(-2), for_noise.unsqueeze(-2), None, None, None


class _Groups(NamedTuple):
    """Trials by their mask."""

    parts: tuple[tuple[Tensor, Tensor], ...]  # trials, and their mask (trial or 1, time or 1, unit)
    back: Tensor  # the place of every trial in the parts, one after another


_GROUPS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # mask -> (its state, groups or None)


def _groups(observed: Tensor | None, latent_dim: int) -> _Groups | None:
    """Trials that share a mask, where sharing is worth it; all others in one part.

    None where no mask is so common, or there is only one.
    """
    if observed is None or observed.is_inference():
        return None
    fewest = 2 + WORTH // max(1, observed.shape[1] * latent_dim**2)
    if len(observed) <= fewest:
        return None
    state = observed._version, fewest
    known = _GROUPS.get(observed)
    if known is None or known[0] != state:
        known = state, _group(observed, fewest)
        _GROUPS[observed] = known
    return known[1]


def _group(observed: Tensor, fewest: int) -> _Groups | None:
    patterns, which, count = observed.flatten(1).unique(dim=0, return_inverse=True, return_counts=True)
    common = count.argsort(descending=True, stable=True)[:MOST_GROUPS]
    common = common[count[common] >= fewest]
    if len(patterns) == 1 or not len(common):
        return None
    rest = (~torch.isin(which, common)).nonzero().squeeze(-1)
    members = [(which == pattern).nonzero().squeeze(-1) for pattern in common]
    if len(rest):
        members.append(rest)
    parts = []
    for trials in members:
        mask = observed[trials]
        for axis in (0, 1):  # as in `_pattern`
            first = mask.narrow(axis, 0, 1)
            mask = first if bool((mask == first).all()) else mask
        parts.append((trials, mask))
    return _Groups(tuple(parts), torch.cat(members).argsort())


_PATTERNS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # mask -> (version, axes along which it repeats itself)


def _pattern(observed: Tensor) -> Tensor:
    """The mask (trial or 1, time or 1, unit) without the axes along which it repeats itself.

    So trials that miss the same entries share a factorisation, and hidden units leave a chain steady.
    """
    keep = not observed.is_inference()
    known = _PATTERNS.get(observed) if keep else None
    if known is None or known[0] != observed._version:
        axes = tuple(axis for axis in (0, 1) if bool((observed == observed.narrow(axis, 0, 1)).all()))
        known = observed._version if keep else 0, axes
        if keep:
            _PATTERNS[observed] = known
    for axis in known[1]:
        observed = observed.narrow(axis, 0, 1)
    return observed


class _Moments(NamedTuple):
    """The middle of every unit (*batch, 1, 1, unit), and sums over the observed bins of a trial about it."""

    middle: Tensor
    sums: Tensor  # of squares, of values, and of ones: (*batch, trial, 3 x unit)


_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # observations -> (version, mask, moments)


def _moments(observations: Tensor, observed: Tensor | None) -> _Moments:
    """Moments of the observations: parameters do not enter, so they are computed once for a recording."""
    keep = not (observations.requires_grad or torch.is_inference_mode_enabled() or observations.is_inference())
    known = _KNOWN.get(observations) if keep else None
    if known is not None and known[0] == observations._version and known[1]() is observed:
        return known[2]
    seen = torch.ones_like(observations) if observed is None else observed.to(observations.dtype)
    values = observations if observed is None else torch.where(observed, observations, 0.0)
    middle = values.sum((-3, -2), keepdim=True) / seen.sum((-3, -2), keepdim=True).clamp(min=1.0)
    centred = (values - middle) * seen
    total = centred.sum(-2)
    found = _Moments(middle, torch.cat([centred.square().sum(-2), total, seen.sum(-2).expand_as(total)], -1))
    if keep:
        mask = (lambda: None) if observed is None else weakref.ref(observed)
        _KNOWN[observations] = (observations._version, mask, found)
    return found


def linearised_potential(readout: AffineReadout, point: Tensor, observations: Tensor) -> tuple[Tensor, Tensor]:
    """The second-order expansion of the log likelihood about the path ``point``, as a Gaussian potential on the path.

    Exact, and independent of ``point``, for a Gaussian readout. Returns precision (*batch, time or 1, latent, latent)
    and linear part (*batch, time, latent).
    """
    if readout.law.is_gaussian:
        return gaussian_potential(readout, observations)
    predictor = readout.predict(point)
    curvature = readout.curvature(predictor, observations)
    target = readout.score(predictor, observations) + curvature * (predictor - readout.offset)
    return outer(readout, curvature), target @ readout.loading


def laplace_path(prior: GaussMarkov, readout: AffineReadout, observations: Tensor) -> GaussMarkov:
    """The Gaussian with the mode and curvature of p(path | observations, parameters); batch (*draw, trial)."""
    with torch.no_grad():
        mode = find_mode(prior, readout, observations)
        return prior.condition(*linearised_potential(readout, mode, observations))


def laplace_evidence(prior: GaussMarkov, readout: AffineReadout, observations: Tensor) -> Tensor:
    """Laplace approximation of log p(y | parameters) of every trial, (*draw, trial)."""
    graded = torch.is_grad_enabled()
    with torch.no_grad():
        # torch's lazy properties turn gradients on inside no_grad: a prior not detached would have the search recorded.
        still = prior.detach()
        mode = find_mode(still, readout, observations, TOLERANCE if graded else COARSE)
    predictor = readout.predict(mode)
    with torch.no_grad():
        precision = outer(readout, readout.curvature(predictor, observations))
        curved = still.condition(precision, torch.zeros_like(mode))
    slope = prior.force(mode) + of_all_trials(readout.score(predictor, observations), readout.loading)
    moved = mode + _Newton.apply(curved, slope)
    predictor = readout.predict(moved)
    precision = prior.diagonal + outer(readout, readout.curvature(predictor, observations))
    fluctuation = log_normaliser(precision, prior.upper, torch.zeros_like(mode))
    fit = readout.log_likelihood(predictor, observations)
    return fit + prior.log_potential(moved) - prior.log_normaliser + fluctuation


def find_mode(prior: GaussMarkov, readout: AffineReadout, observations: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """The most probable path of every draw and trial, (*draw, trial, time, latent), by damped Newton steps.

    The start is a function of parameters and observations: one carried over from an earlier call would make a sampler's
    target depend on its history. Each batch element stops by itself when its step is below ``tolerance``.
    """
    batch = broadcast_shapes(prior.batch_shape, readout.batch_shape)
    likelihood = PathLikelihood(readout, observations, batch)
    state = _first_path(prior, readout, observations, batch).expand(batch + prior.event_shape)
    floor = likelihood.bins(prior.mean).sum(-1) + prior.log_potential(prior.mean)
    fit, force, precision = likelihood.expand(state)
    value = fit.sum(-1) + prior.log_potential(state)
    if not bool((value >= floor).all()):  # parameters that fit badly
        state = torch.where((value >= floor)[..., None, None], state, prior.mean)
        fit, force, precision = likelihood.expand(state)
        value = fit.sum(-1) + prior.log_potential(state)
    active = torch.isfinite(value)
    for _ in range(MAX_NEWTON_STEPS):
        slope = prior.force(state) + force
        step = GaussMarkov(prior.diagonal + precision, prior.upper, slope).mean
        reach = likelihood.reach(step)
        size = (MAX_PREDICTOR_STEP / reach.clamp(min=1e-12)).clamp(max=1.0)
        gain = (slope * step).sum((-2, -1))
        active = active & torch.isfinite(gain)
        size = torch.where(active, size, 0.0)
        while True:
            ahead = torch.addcmul(state, size[..., None, None], step)
            fit, force, precision = likelihood.expand(ahead)
            value_ahead = fit.sum(-1) + prior.log_potential(ahead)
            small = gain * size < 1e-10 * value.abs().clamp(min=1.0)  # below rounding: any such step will do
            enough = (value_ahead >= value + SUFFICIENT * size * gain) | small | ~active
            if bool(enough.all()):
                break
            size = torch.where(enough, size, 0.5 * size)
        state, value = ahead, value_ahead
        active = active & ((step.abs().amax((-2, -1)) > tolerance) | (reach > COARSE))
        if not bool(active.any()):
            break
    return state


def _first_path(prior: GaussMarkov, readout: AffineReadout, observations: Tensor, batch: torch.Size) -> Tensor:
    """A path (*draw, trial, time, latent) that is mostly two or three Newton steps nearer than the prior mean.

    The most probable one where the log likelihood is expanded, in every bin, about a predictor midway between the
    observation and its unit's mean in the trial: how generalised linear models are started (McCullagh and Nelder,
    Generalized Linear Models, 1989, section 2.5).
    """
    pairs = Pairs(readout.loading)
    middle, sums = _moments(observations, readout.observed)
    _, total, bins = sums.unsqueeze(-2).chunk(3, -1)
    typical = (total + bins * middle + 0.5) / (bins + 1.0)
    found = []
    for _, own, seen in readout.pieces(observations, batch):
        values = seen if own.observed is None else torch.where(own.observed, seen, typical)
        predictor = own.law.link(0.5 * (values + typical))
        _, score, curvature = own.expand_bins(predictor, values)
        target = score + curvature * (predictor - own.offset)
        found.append((pairs.outer(curvature), of_all_trials(target, own.loading)))
    precision, linear = zip(*found, strict=True)
    return prior.condition(torch.cat(precision, -3), torch.cat(linear, -2)).mean


class _Newton(torch.autograd.Function):
    """``H^-1 slope`` with H held fixed; symmetric, so that the backward pass is the same solve."""

    @staticmethod
    def forward(ctx, curved: GaussMarkov, slope: Tensor) -> Tensor:
        ctx.curved = curved
        return curved._solve(slope)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, ctx.curved._solve(grads[0])
