r"""Leave one trial out, by Pareto-smoothed importance sampling.

.. math:: \mathrm{elpd} = \sum_i \log p(y_i \mid y_{-i}), \qquad
    p(y_i \mid y_{-i}) \approx \sum_s w_{is}\, p(y_i \mid \theta_s), \quad
    w_{is} \propto \frac{p(\theta_s, y)}{q(\theta_s)}\,\frac{1}{p(y_i \mid \theta_s)}

with paths integrated out of every :math:`p(y_i \mid \theta)`, and q the density that draws are from: the posterior for
MCMC, so that the first factor is constant, and the guide for variational fits and Laplace's approximation.

References
----------
Vehtari, Gelman & Gabry, Stat. Comput. 27:1413 (2017); Magnusson et al., ICML 2019, on approximate posteriors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.special import logsumexp

from pyrodyn.comparison.terms import (
    LAPLACE,
    PARTICLES,
    Candidate,
    Particles,
    Score,
    check_data,
    corrected,
    full_weights,
    largest_good_k,
    smoothed,
    terms_of,
    weighted_mean,
)
from pyrodyn.errors import ComparisonError
from pyrodyn.recording import Recording


@dataclass(frozen=True)
class LOO:
    """Leave one trial out, without refits.

    Parameters
    ----------
    particles : Particles, optional
        How the error of a Laplace evidence is taken out of the trial left out; None leaves it in. The posterior is the
        one that was fitted.
    """

    particles: Particles | None = field(default_factory=Particles)

    def score(self, candidate: Candidate, recording: Recording | None, seed: int) -> Score:
        """Sum of log p(trial | all other trials)."""
        check_data(candidate, recording)
        refuse_dependent(candidate)
        terms = terms_of(candidate)
        found = terms.log_likelihood
        weights, k_hat = smoothed(terms.log_ratio[:, None] - found, terms.efficiency)
        pointwise, variance = weighted_mean(weights, found, terms.efficiency)
        inside = logsumexp(full_weights(terms) + found, axis=0)
        likelihood, uncorrected = terms.likelihood, None
        if terms.likelihood == LAPLACE and self.particles is not None:
            added, more = corrected(candidate, terms, weights, self.particles, seed)
            likelihood, uncorrected = PARTICLES, pointwise
            pointwise, variance = pointwise + added, variance + more
        estimator = "PSIS-LOO"
        if terms.weighted:
            estimator += f" of {terms.engine} draws weighted by p/q"
        elif terms.engine == "SVI":
            estimator += " of SVI draws as they are"
        return Score(
            estimator,
            likelihood,
            "elpd",
            pointwise,
            "trial",
            terms.labels,
            candidate.recording,
            good_k=largest_good_k(len(found)),
            k_hat=k_hat,
            error=float(np.sqrt(variance.sum())),
            p_eff=float((inside - (pointwise if uncorrected is None else uncorrected)).sum()),
            uncorrected=uncorrected,
        )


def refuse_dependent(candidate: Candidate) -> None:
    """Raise where trials cannot be left out one by one."""
    name = type(candidate.model).__name__
    if not candidate.model.trials_independent:
        raise ComparisonError(
            f"{candidate.name!r}: the trials of {name} are not independent given its globals, so that a trial left out "
            "says nothing of a new one; predict later bins from earlier ones: method=comparison.LeaveFutureOut()"
        )
    if candidate.recording.num_trials < 2:
        raise ComparisonError(
            f"{candidate.name!r}: the recording has a single trial, and nothing is left when it is left out; predict "
            "its later bins from earlier ones: method=comparison.LeaveFutureOut()"
        )
