r"""From latent to observations: Gaussian, Poisson, negative binomial, Bernoulli.

Every readout is an affine map to a predictor, one number a unit and bin, followed by a law for the observation:

.. math:: \eta_{t,n} = (C x_t)_n + d_n, \qquad y_{t,n} \sim p(\cdot \mid \eta_{t,n}, \phi_n).

A readout is a frozen set of options. It places the priors of :math:`d` and :math:`\phi`, checks the observations'
support, and gives log density, score and curvature in :math:`\eta` in closed form; all are log-concave in
:math:`\eta`, which is what lets the path be integrated out by a Laplace approximation.

Reference: Paninski et al., J. Comput. Neurosci. 29:107 (2010).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.weak import WeakTensorKeyDictionary

from pyrodyn.errors import ReadoutError
from pyrodyn.linalg.matrix import broadcast_shapes
from pyrodyn.readouts.law import Readout
from pyrodyn.recording import Recording

__all__ = [
    "Bernoulli",
    "Gaussian",
    "NegativeBinomial",
    "Poisson",
]

MAX_LOG_RATE = 30.0  # exp(30) events a bin: beyond any recording, and far from overflow


@dataclass(frozen=True)
class Gaussian(Readout):
    r"""Real observations: :math:`y \sim N(\eta, \sigma_n^2)`.

    Loadings, offsets and noise are in units of `Recording.scale` about `Recording.center`, so that a voltage and a
    BOLD signal meet the same prior.
    """

    is_gaussian = True
    noise_name = "noise_sd"

    def check(self, recording: Recording) -> None:
        del recording  # any finite number will do, and a Recording holds no others

    def sample_offset(self, recording: Recording) -> Tensor:
        return pyro.sample("offset", dist.Normal(recording.center, recording.scale).to_event(1), infer=_PER_UNIT)

    def sample_noise(self, recording: Recording) -> Tensor:
        prior = dist.LogNormal(recording.scale.log() + math.log(0.5), 1.0)
        return pyro.sample("noise_sd", prior.to_event(1), infer=_PER_UNIT)

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        total, bins = _totals(recording)
        return {"offset": (total + recording.center) / (bins + 1.0), "noise_sd": 0.7 * recording.scale}

    def linearise(self, recording: Recording) -> Tensor:
        return (recording.values - recording.center) / recording.scale

    def signal_scale(self, recording: Recording) -> Tensor:
        return recording.scale

    def log_prob(self, predictor, noise, value):
        return -0.5 * ((value - predictor) / noise).square() - noise.log() - 0.5 * math.log(2.0 * math.pi)

    def natural(self, predictor, noise):
        slope = predictor / noise.square()
        return slope, 0.5 * slope * predictor

    def score(self, predictor, noise, value):
        return (value - predictor) / noise.square()

    def curvature(self, predictor, noise, value):
        return noise.square().reciprocal().expand(broadcast_shapes(predictor.shape, noise.shape))

    def mean(self, predictor, noise):
        return predictor

    def link(self, mean):
        return mean

    def marginal_mean(self, predictor, variance, noise):
        return predictor

    def sample(self, predictor, noise):
        return predictor + noise * torch.randn_like(predictor)


class _Counts(Readout):
    """Event counts under a log link; the prior of the offset is a rate of 10 events a second, within a factor of 50."""

    def check(self, recording: Recording) -> None:
        _refuse(recording, lambda y: (y < 0) | (y != y.round()), type(self).__name__, "non-negative whole counts",
                "use readouts.Gaussian() for smoothed or real-valued data, or bin the raw event times")  # fmt: skip

    def sample_offset(self, recording: Recording) -> Tensor:
        typical = torch.full_like(recording.scale, math.log(10.0 * recording.bin_width))
        return pyro.sample("offset", dist.Normal(typical, 2.0).to_event(1), infer=_PER_UNIT)

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        total, bins = _totals(recording)
        return {"offset": ((total + 0.5) / (bins + 1.0)).log()}

    def linearise(self, recording: Recording) -> Tensor:
        total, bins = _totals(recording)
        rate = (total + 0.5) / (bins + 1.0)
        return recording.values / rate - 1.0  # to first order the deviation of the log rate

    def mean(self, predictor, noise):
        return predictor.clamp(max=MAX_LOG_RATE).exp()

    def link(self, mean):
        return mean.log()

    def marginal_mean(self, predictor, variance, noise):
        return self.mean(predictor + 0.5 * variance, noise)


@dataclass(frozen=True)
class Poisson(_Counts):
    r"""Event counts: :math:`y \sim \mathrm{Poisson}(e^{\eta})`, the rate in events a bin."""

    canonical = True

    def sample_noise(self, recording: Recording) -> None:
        return None

    def log_prob(self, predictor, noise, value):
        return self.log_kernel(predictor, noise, value) - _log_factorial(value)

    def log_kernel(self, predictor, noise, value):
        predictor = predictor.clamp(max=MAX_LOG_RATE)
        return value * predictor - predictor.exp()

    def partition(self, predictor, noise):
        rate = self.mean(predictor, noise)
        return rate, rate, rate

    def natural(self, predictor, noise):
        predictor = predictor.clamp(max=MAX_LOG_RATE)
        return predictor, predictor.exp()

    def score(self, predictor, noise, value):
        return value - self.mean(predictor, noise)

    def curvature(self, predictor, noise, value):
        return self.mean(predictor, noise)

    def expand_log(self, predictor, noise, value):
        predictor = predictor.clamp(max=MAX_LOG_RATE)
        rate = predictor.exp()
        return torch.addcmul(-rate, value, predictor), value - rate, rate

    def sample(self, predictor, noise):
        return torch.poisson(self.mean(predictor, noise))


@dataclass(frozen=True)
class NegativeBinomial(_Counts):
    r"""Overdispersed counts: mean :math:`\mu = e^{\eta}`, variance :math:`\mu + \mu^2 / r_n`.

    The site ``concentration`` is r; Poisson is its limit r to infinity.
    """

    noise_name = "concentration"

    def sample_noise(self, recording: Recording) -> Tensor:
        prior = dist.LogNormal(torch.full_like(recording.scale, math.log(5.0)), 1.5)
        return pyro.sample("concentration", prior.to_event(1), infer=_PER_UNIT)

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        return super().initial_values(recording) | {"concentration": torch.full_like(recording.scale, 5.0)}

    def log_prob(self, predictor, noise, value):
        count = torch.lgamma(value + noise) - torch.lgamma(noise) - _log_factorial(value)
        return count + noise * noise.log() + self.log_kernel(predictor, noise, value)

    def log_kernel(self, predictor, noise, value):
        predictor = predictor.clamp(max=MAX_LOG_RATE)
        return value * predictor - (value + noise) * torch.logaddexp(noise.log(), predictor)

    def natural(self, predictor, noise):
        predictor = predictor.clamp(max=MAX_LOG_RATE)
        both = torch.logaddexp(noise.log(), predictor)
        return predictor - both, noise * both

    def score(self, predictor, noise, value):
        return value - (value + noise) * torch.sigmoid(predictor - noise.log())

    def curvature(self, predictor, noise, value):
        share = torch.sigmoid(predictor - noise.log())
        return (value + noise) * share * (1.0 - share)

    def sample(self, predictor, noise):
        rate = torch._standard_gamma(noise.expand(predictor.shape)) / noise * self.mean(predictor, noise)
        return torch.poisson(rate)


@dataclass(frozen=True)
class Bernoulli(Readout):
    r"""Binary observations: :math:`P(y = 1) = 1 / (1 + e^{-\eta})`."""

    canonical = True

    def check(self, recording: Recording) -> None:
        _refuse(recording, lambda y: (y != 0) & (y != 1), "Bernoulli", "zeros and ones",
                "use readouts.Poisson() for counts, or smaller bins")  # fmt: skip

    def sample_offset(self, recording: Recording) -> Tensor:
        return pyro.sample("offset", dist.Normal(torch.zeros_like(recording.scale), 3.0).to_event(1), infer=_PER_UNIT)

    def sample_noise(self, recording: Recording) -> None:
        return None

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        total, bins = _totals(recording)
        return {"offset": torch.logit((total + 0.5) / (bins + 1.0))}

    def linearise(self, recording: Recording) -> Tensor:
        total, bins = _totals(recording)
        share = (total + 0.5) / (bins + 1.0)
        return (recording.values - share) / (share * (1.0 - share))

    def log_prob(self, predictor, noise, value):
        return value * predictor - softplus(predictor)

    def natural(self, predictor, noise):
        return predictor, softplus(predictor)

    def score(self, predictor, noise, value):
        return value - torch.sigmoid(predictor)

    def curvature(self, predictor, noise, value):
        share = torch.sigmoid(predictor)
        return share * (1.0 - share)

    def mean(self, predictor, noise):
        return torch.sigmoid(predictor)

    def link(self, mean):
        return torch.logit(mean)

    def marginal_mean(self, predictor, variance, noise):
        # Gauss-Hermite of 15 nodes: within 1e-6 for the variances that a loading of order one gives.
        nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(15))
        sd = variance.sqrt()
        total = sum(w * torch.sigmoid(predictor + x * sd) for x, w in zip(nodes, weights, strict=True))
        return total / weights.sum()

    def sample(self, predictor, noise):
        return torch.bernoulli(torch.sigmoid(predictor))


_PER_UNIT: Any = {"event_dims": ("unit",)}


_FACTORIALS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # counts -> (version, log factorials)


def _log_factorial(counts: Tensor) -> Tensor:
    """Parameters do not enter: computed once for a recording."""
    if counts.requires_grad or torch.is_inference_mode_enabled() or counts.is_inference():
        return torch.lgamma(counts + 1.0)
    known = _FACTORIALS.get(counts)
    if known is None or known[0] != counts._version:
        known = counts._version, torch.lgamma(counts + 1.0)
        _FACTORIALS[counts] = known
    return known[1]


def _totals(recording: Recording) -> tuple[Tensor, Tensor]:
    """Sum and number of observed bins of each unit."""
    total = recording.values.sum((0, 1))
    if recording.mask is None:
        return total, torch.full_like(total, float(recording.num_trials * recording.num_bins))
    return total, recording.mask.sum((0, 1)).to(total.dtype)


def _refuse(recording: Recording, wrong, readout: str, expected: str, remedy: str) -> None:
    if recording.observations is None:
        return
    bad = wrong(recording.observations)
    if not bool(bad.any()):
        return
    trial, time, unit = (int(i) for i in bad.nonzero()[0])
    raise ReadoutError(
        f"readout {readout} takes {expected}, but observations has {int(bad.sum())} other values (first: "
        f"{float(recording.observations[trial, time, unit])} at trial {recording.trial[trial]}, time "
        f"{recording.time[time]:.4g} s, unit {recording.unit[unit].item()!r}); {remedy}"
    )
