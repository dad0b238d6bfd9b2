r"""Marginal likelihoods: globals and paths both integrated out.

Draws of an approximation q (SVI, `Laplace`) give :math:`p(y) = E_q[p(y, \theta) / q(\theta)]`, by Pareto-smoothed
weights; draws of MCMC are bridged (see `bridge`). Where paths were integrated out by Laplace, with errors
:math:`c_i(\theta)` of the trials' log likelihoods, what is missing is

.. math:: \log E\Big[e^{\sum_i c_i}\Big] \approx \sum_i \log E[e^{c_i}] + \tfrac12 \sum_{i \ne j}
    \mathrm{Cov}(c_i, c_j)

under the posterior. Particles estimate every :math:`e^{c_i}` without bias and independently over trials, so that their
noise averages out trial by trial and does not enter the covariances. The plain mean of :math:`e^{\sum_i c_i}` would be
ruled by its largest term.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import logsumexp

from pyrodyn.comparison.bridge import bridge
from pyrodyn.comparison.terms import (
    EXACT,
    LAPLACE,
    PARTICLES,
    Candidate,
    Particles,
    Score,
    averaged_error,
    check_data,
    evidence_error,
    largest_good_k,
    smoothed,
)
from pyrodyn.errors import ComparisonError
from pyrodyn.inference import LogDensity, collapse
from pyrodyn.inference.engine import double_precision, random_stream
from pyrodyn.posterior import BATCH_NUMBERS, thinned
from pyrodyn.recording import Recording

BRIDGE_STREAM = 1_000_039  # a random stream that nothing else uses


@dataclass(frozen=True)
class Evidence:
    """Log marginal likelihood, with its Monte Carlo standard error.

    Parameters
    ----------
    particles : Particles, optional
        How the error of Laplace evidences of paths is taken out; None leaves it in, which favours more latents.

    Notes
    -----
    Of all modes that a model's symmetry makes equal, draws are taken to lie in one: the log of their number
    (`LatentModel.log_copies`) is added. An evidence depends on how wide priors are where the data say nothing.
    """

    particles: Particles | None = field(default_factory=lambda: Particles(particles=200, draws=60))

    def score(self, candidate: Candidate, recording: Recording | None, seed: int) -> Score:
        """log p(recording)."""
        check_data(candidate, recording)
        if json.loads(candidate.posterior.attrs["notes"]).get("atoms") == "sampled":
            raise ComparisonError(
                f"{candidate.name!r}: draws with edges that come and go have no one density to bridge; compare by "
                "method=comparison.KFold(), or fit with inference.HMC()"
            )
        vectors, density = _vectors(candidate)
        stats = candidate.posterior["sample_stats"].to_dataset()
        k_hat, log_weights = math.nan, np.zeros(vectors.shape[:2]).ravel()
        if "log_q" in stats and "lp" in stats:
            ratio = (stats["lp"] - stats["log_q"]).values.ravel()
            value, error, k_hat, log_weights = _weighted(ratio)
            estimator = "importance sampling"
        else:
            with random_stream(seed, BRIDGE_STREAM):
                value, error = bridge(lambda some: _in_parts(density, some), vectors)
            estimator = "bridge sampling"
        value += candidate.model.log_copies(candidate.recording)
        before, likelihood = None, EXACT
        if "exactly" not in collapse(candidate.model).treatment:
            likelihood = LAPLACE
            if self.particles is not None:
                likelihood, before = PARTICLES, np.array([value])
                added, variance = self._missing(candidate, log_weights, seed)
                value, error = value + added, math.hypot(error, math.sqrt(variance))
        return Score(
            estimator,
            likelihood,
            "log_evidence",
            np.array([value]),
            "recording",
            np.array([candidate.recording.session]),
            candidate.recording,
            good_k=largest_good_k(len(log_weights)),
            k_hat=np.array([k_hat]),
            error=error,
            uncorrected=before,
        )

    def _missing(self, candidate: Candidate, log_weights: np.ndarray, seed: int) -> tuple[float, float]:
        """What the Laplace evidences of all trials lack together, and the variance of that."""
        assert self.particles is not None
        chosen = thinned(len(log_weights), self.particles.draws)
        errors = evidence_error(
            candidate.model, candidate.globals_at, chosen, candidate.recording, self.particles.particles, seed
        )
        own = log_weights[chosen][:, None]
        alone, variance = averaged_error(errors, own)
        weights = np.exp(own - own.max())
        weights = weights / weights.sum()
        apart = errors - (weights * errors).sum(0)
        scale = 1.0 / (1.0 - (weights**2).sum())
        total = scale * (weights[:, 0] * apart.sum(1) ** 2).sum()
        together = total - scale * (weights * apart**2).sum()
        spread = 0.5 * total * math.sqrt(2.0 * (weights**2).sum())
        return float(alone.sum() + 0.5 * together), float(variance.sum() + spread**2)


def _weighted(ratio: np.ndarray) -> tuple[float, float, float, np.ndarray]:
    """Log of the mean of exp(ratio), its standard error, k-hat, and the normalised log weights."""
    weights, shape = smoothed(ratio[:, None])
    weights = weights[:, 0]
    # Smoothing moves the largest ratios alone: any other one tells what the weights were divided by.
    least = int(ratio.argmin())
    value = float(ratio[least] - weights[least]) - math.log(len(ratio))
    error = math.sqrt(max(0.0, math.exp(logsumexp(2.0 * weights)) - 1.0 / len(ratio)))
    return value, error, float(shape[0]), weights


def _vectors(candidate: Candidate) -> tuple[torch.Tensor, LogDensity]:
    """The draws in unconstrained coordinates (chain, draw, dimension), and their log joint density."""
    density = LogDensity(collapse(candidate.model), candidate.recording)
    stored = candidate.posterior["unconstrained_posterior"]
    parts = [torch.from_numpy(np.ascontiguousarray(stored[site.name].values)) for site in density.sites]
    return torch.cat(parts, -1), density


def _in_parts(density: LogDensity, vectors: torch.Tensor) -> torch.Tensor:
    recording = density.recording
    size = max(1, BATCH_NUMBERS // (recording.num_trials * recording.num_bins * recording.num_units))
    with torch.no_grad(), double_precision():
        return torch.cat([density(part) for part in vectors.split(size)])
