"""The observations of a recording given a path: what a law makes of a predictor that is affine in it, or is not."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrodyn.linalg.matrix import broadcast_shapes, of_all_trials
from pyrodyn.readouts.law import Law

PIECE = 120_000  # numbers (*batch, time, unit) at a time


class AffineReadout(TorchDistribution):
    """The observations of all trials, bins and units given a path, under a `Law`.

    Parameters
    ----------
    law : Law
    path : Tensor, (*batch, time, latent)
    loading : Tensor, (*batch, unit, latent)
    offset, noise : Tensor, (*batch, unit); ``noise`` may be None
    observed : Tensor of bool, (trial, time, unit), optional
        True where observed. Values under a False count for nothing, in the density and in its gradient.

    Notes
    -----
    Event shape (time, unit). The last batch dimension is the trial; draws stand to its left.
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)

    def __init__(
        self,
        law: Law,
        path: Tensor,
        loading: Tensor,
        offset: Tensor,
        noise: Tensor | None,
        observed: Tensor | None = None,
    ):
        # Weights of 1 / noise^2 lose digits fast: all in float64, whatever it was.
        path, loading, offset = (part.to(torch.float64) for part in (path, loading, offset))
        self.law, self.path, self.loading, self.observed = law, path, loading, observed
        self.offset = offset.unsqueeze(-2)
        self.noise: Any = None if noise is None else noise.to(torch.float64).unsqueeze(-2)
        batch = broadcast_shapes(path.shape[:-2], loading.shape[:-2], offset.shape[:-1])
        super().__init__(batch, torch.Size((path.shape[-2], loading.shape[-2])), validate_args=False)

    @property
    def predictor(self) -> Tensor:
        """The predictor (*batch, time, unit) of the path; computed when asked for, as most uses want another path's."""
        return self.predict(self.path)

    def predict(self, path: Tensor) -> Tensor:
        """The predictor (*batch, time, unit) of another path."""
        return of_all_trials(path, self.loading.mT) + self.offset

    def spread(self, covariance: Tensor) -> Tensor:
        """Variance of the predictor (*batch, time, unit) from that of the path, (*batch, time, latent, latent)."""
        pairs = (self.loading.unsqueeze(-1) * self.loading.unsqueeze(-2)).flatten(-2)
        return covariance.flatten(-2) @ pairs.mT

    def of_bins(self, place: slice) -> AffineReadout:
        """The readout of some bins that follow each other."""
        noise = None if self.noise is None else self.noise.squeeze(-2)
        observed = None if self.observed is None else self.observed[..., place, :]
        return AffineReadout(self.law, self.path[..., place, :], self.loading, self.offset.squeeze(-2), noise, observed)

    def pieces(
        self, observations: Tensor, batch: torch.Size | None = None
    ) -> list[tuple[slice, AffineReadout, Tensor]]:
        """Bins, their readout and observations, a few at a time.

        What is computed for every unit of a batch of paths, by default the readout's own, then stays in the processor's
        cache.
        """
        bins, units = self.event_shape
        size = max(1, PIECE // ((self.batch_shape if batch is None else batch).numel() * units))
        places = [slice(start, min(start + size, bins)) for start in range(0, bins, size)]
        return [(place, self.of_bins(place), observations[..., place, :]) for place in places]

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_likelihood(self.predictor, value)

    def log_likelihood(self, predictor: Tensor, value: Tensor) -> Tensor:
        """Log likelihood of a trial, (*batch), at a given predictor."""
        return self._where_observed(self.law.log_prob(predictor, self.noise, self._where_observed(value))).sum((-2, -1))

    def expand_log(self, predictor: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log likelihood (*batch) up to terms that the predictor does not enter, `score` and `curvature`."""
        kernel, score, curvature = self.expand_bins(predictor, value)
        return kernel.sum(-1), score, curvature

    def expand_bins(self, predictor: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `expand_log`, with the log likelihood of every bin, (*batch, time)."""
        kernel, score, curvature = self.law.expand_log(predictor, self.noise, value)
        score, curvature = self._where_observed(score), self._where_observed(curvature)
        return self._where_observed(kernel).sum(-1), score, curvature

    def partition_bins(self, predictor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `expand_bins`, for a law that is canonical, without the term that the observations enter."""
        total, mean, variance = (self._where_observed(part) for part in self.law.partition(predictor, self.noise))
        return -total.sum(-1), -mean, variance

    def kernel_bins(self, predictor: Tensor, value: Tensor) -> Tensor:
        """The first of `expand_bins` alone, (*batch, time)."""
        return self._where_observed(self.law.log_kernel(predictor, self.noise, value)).sum(-1)

    def score(self, predictor: Tensor, value: Tensor) -> Tensor:
        """Derivative of the log likelihood in the predictor, zero where unobserved."""
        return self._where_observed(self.law.score(predictor, self.noise, self._where_observed(value)))

    def curvature(self, predictor: Tensor, value: Tensor) -> Tensor:
        """Minus the second derivative in the predictor, zero where unobserved."""
        return self._where_observed(self.law.curvature(predictor, self.noise, self._where_observed(value)))

    def _where_observed(self, values: Tensor) -> Tensor:
        # Before the arithmetic as well as after: a hidden NaN, times a gradient of zero, would be a NaN again.
        return values if self.observed is None else torch.where(self.observed, values, 0.0)

    @property
    def mean(self) -> Tensor:
        return self.law.mean(self.predictor, self.noise)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        with torch.no_grad():
            return self.law.sample(self.predictor.expand(self._extended_shape(sample_shape)), self.noise)

    def expand(self, batch_shape, _instance=None) -> AffineReadout:
        path = self.path.expand(torch.Size(batch_shape) + self.path.shape[-2:])
        noise = None if self.noise is None else self.noise.squeeze(-2)
        return AffineReadout(self.law, path, self.loading, self.offset.squeeze(-2), noise, self.observed)


def mode_log_likelihood(
    law: Law, predictor: Tensor, noise: Tensor | None, value: Tensor, observed: Tensor | None = None
) -> Tensor:
    """Log likelihood of every bin under each of a few predictors, summed over units, (*draw, trial, time, mode).

    Parameters
    ----------
    law : Law
    predictor : Tensor, (*draw, 1, mode, unit)
    noise : Tensor, (*draw, 1, unit), or None
    value : Tensor, (*draw, trial, time, unit)
    observed : Tensor of bool, (trial, time, unit), optional
    """
    own = None if noise is None else noise.unsqueeze(-2)
    slope, constant = law.natural(predictor, own)
    # What no predictor enters is told from one of them; of a middle one the least is lost to rounding.
    middle = predictor.mean(-2, keepdim=True)
    middle_slope, middle_constant = law.natural(middle, own)
    if observed is not None:
        value = torch.where(observed, value, 0.0)
    rest = law.log_prob(middle, own, value) - (value * middle_slope - middle_constant)
    seen = torch.ones_like(value[..., :1, :]) if observed is None else observed.to(value.dtype)
    rest = (rest if observed is None else torch.where(observed, rest, 0.0)).sum(-1, keepdim=True)
    return value @ slope.mT - seen @ constant.expand_as(slope).mT + rest


class NetworkReadout(TorchDistribution):
    """The observations given what a network makes of a path: as `AffineReadout` of it, but not affine in the path.

    So nothing that integrates a path out takes it for what it is not.

    Parameters
    ----------
    inner : AffineReadout
        Of the network's output.
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)

    def __init__(self, inner: AffineReadout) -> None:
        self.inner = inner
        super().__init__(inner.batch_shape, inner.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.inner.log_prob(value)

    @property
    def mean(self) -> Tensor:
        return self.inner.mean

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        return self.inner.sample(sample_shape)

    def expand(self, batch_shape, _instance=None) -> NetworkReadout:
        return NetworkReadout(self.inner.expand(batch_shape))
