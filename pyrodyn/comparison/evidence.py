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
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.posterior import BATCH_NUMBERS, thinned
from pyrodyn.program import LatentModel
from pyrodyn.recording import Recording

SAME = 1e-9  # share by which values differ that are the same but for rounding
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
    Of all posterior modes that a model's symmetry makes equal, one is integrated, and the log of their number
    (`LatentModel.log_copies`) is added. Draws of MCMC are first moved to that mode, so that chains may have started in,
    or gone to, any; draws of an approximation that fall outside count for nothing.

    An evidence depends on how wide priors are where the data say nothing.
    """

    particles: Particles | None = field(default_factory=lambda: Particles(particles=200, draws=60))

    def score(self, candidate: Candidate, recording: Recording | None, seed: int) -> Score:
        """log p(recording)."""
        check_data(candidate, recording)
        if json.loads(candidate.posterior.attrs["notes"]).get("atoms") == "sampled":
            raise ComparisonError(
                f"{candidate.name!r}: draws of blocked Gibbs sampling, with edges or modes that come and go, have no "
                "one density to bridge; compare by method=comparison.KFold(), or fit with inference.HMC()"
            )
        vectors, density = _vectors(candidate)
        near = _NearOneCopy(candidate, density, vectors)
        stats = candidate.posterior["sample_stats"].to_dataset()
        k_hat, log_weights = math.nan, np.zeros(vectors.shape[:2]).ravel()
        if "log_q" in stats and "lp" in stats:
            ratio = (stats["lp"] - stats["log_q"]).values.ravel()
            value, error, k_hat, log_weights = _weighted(ratio, near.holds(vectors.flatten(0, 1)))
            estimator = "importance sampling"
        else:
            with random_stream(seed, BRIDGE_STREAM):
                value, error = bridge(near.log_density, near.moved(vectors))
            estimator = "bridge sampling"
        value += candidate.model.log_copies(candidate.recording)
        before, likelihood = None, EXACT
        if not collapse(candidate.model).is_exact:
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


class _NearOneCopy:
    """The posterior on the part of the space that is nearer to one of its symmetric copies than to all others."""

    def __init__(self, candidate: Candidate, density: LogDensity, vectors: torch.Tensor) -> None:
        self.model, self.recording, self.density = candidate.model, candidate.recording, density
        self.told_apart = type(self.model).nearest_copy is not LatentModel.nearest_copy
        stats = candidate.posterior["sample_stats"].to_dataset()
        best = int(np.argmax(stats["lp"].values)) if "lp" in stats else 0
        self.reference = density.constrain(vectors.flatten(0, 1)[best])

    def moved(self, vectors: torch.Tensor) -> torch.Tensor:
        """Draws (chain, draw, dimension) of the whole posterior as draws of this part."""
        if not self.told_apart:
            return vectors
        flat = vectors.flatten(0, 1)
        values = self.model.nearest_copy(self.density.constrain(flat), self.reference, self.recording)
        return self.density.unconstrain(values).reshape(vectors.shape)

    def holds(self, vectors: torch.Tensor) -> np.ndarray:
        """Whether vectors (draw, dimension) lie in this part, (draw,)."""
        found = torch.ones(len(vectors), dtype=torch.bool)
        if self.told_apart:
            values = self.density.constrain(vectors)
            for name, moved in self.model.nearest_copy(values, self.reference, self.recording).items():
                apart = (moved - values[name]).abs() > SAME * (1.0 + values[name].abs())
                found &= ~apart.flatten(1).any(-1)
        return found.numpy()

    def log_density(self, vectors: torch.Tensor) -> torch.Tensor:
        """Log joint density of vectors (draw, dimension), minus infinity outside of this part."""
        found = _in_parts(self.density, vectors)
        return torch.where(torch.from_numpy(self.holds(vectors)), found, -torch.inf)


def _weighted(ratio: np.ndarray, holds: np.ndarray) -> tuple[float, float, float, np.ndarray]:
    """Log of the mean of exp(ratio) where it counts, its standard error, k-hat, and the normalised log weights."""
    own, inside = ratio[holds], float(holds.mean())
    smooth, shape = smoothed(own[:, None])
    # Smoothing moves the largest ratios alone: any other one tells what the weights were divided by.
    least = int(own.argmin())
    value = float(own[least] - smooth[least, 0]) - math.log(len(own)) + math.log(inside)
    weights = np.full(len(ratio), -np.inf)
    weights[holds] = smooth[:, 0]
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
    with torch.no_grad(), numerics():
        return torch.cat([density(part) for part in vectors.split(size)])
