r"""Leave the future out: later bins from all earlier ones, for a session that cannot be split into trials.

.. math:: \mathrm{elpd} = \sum_t \log p(y_{t+1:t+M} \mid y_{1:t}), \qquad
    p(y_{t+1:t+M} \mid y_{1:t}) = E\Big[\frac{p(y_{1:t+M} \mid \theta)}{p(y_{1:t} \mid \theta)} \,\Big|\, y_{1:t}\Big]

over cuts t that are M bins apart, with the path integrated out of both likelihoods. Draws from a posterior of
:math:`y_{1:t^*}` serve the later cuts, weighted by :math:`p(y_{t^*+1:t} \mid y_{1:t^*}, \theta)`, until k-hat of these
weights is too large; then the model is fitted again.

Reference: Bürkner, Gabry & Vehtari, J. Stat. Comput. Simul. 90:2499 (2020).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pyrodyn.comparison.terms import (
    LAPLACE,
    PARTICLES,
    Candidate,
    Particles,
    Score,
    Terms,
    averaged_error,
    check_data,
    evidence,
    evidence_error,
    largest_good_k,
    smoothed,
    terms_of,
    weighted_mean,
)
from pyrodyn.errors import ComparisonError
from pyrodyn.fitting import fit
from pyrodyn.inference.engine import Engine
from pyrodyn.posterior import FitWarning, thinned
from pyrodyn.progress import progress
from pyrodyn.recording import Recording

BLOCKS = 10  # predicted after the first cut, where nothing else is said


@dataclass(frozen=True)
class LeaveFutureOut:
    """Predict every block of bins from all earlier bins.

    Parameters
    ----------
    first : float
        Share of the bins that come before the first block.
    ahead : int, optional
        Bins in a block; by default, such that there are ten.
    refit : Engine, optional
        By default what the posterior was fitted by.
    particles : Particles, optional
        How the error of a Laplace evidence is taken out; None leaves it in.
    always_refit : bool
        Fit at every cut, and use no weights: the expensive way that the weights stand in for.

    Notes
    -----
    Terms of one session depend on each other; their spread is the standard error of a sum of independent ones.
    """

    first: float = 0.5
    ahead: int | None = None
    refit: Engine | None = None
    particles: Particles | None = field(default_factory=Particles)
    always_refit: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.first < 1.0:
            raise ComparisonError(f"first must be a share of the bins between 0 and 1, got {self.first!r}")
        if self.ahead is not None and self.ahead < 1:
            raise ComparisonError(f"ahead must be 1 bin or more, got {self.ahead!r}")

    def score(self, candidate: Candidate, recording: Recording | None, seed: int) -> Score:
        """Sum of log p(block | all earlier bins)."""
        check_data(candidate, recording)
        cuts = self.cuts(candidate.recording)
        engine = candidate.engine(self.refit)
        blocks, refits, state = [], 0, None
        with progress(len(cuts) - 1, "leave the future out") as bar:
            for cut, stop in pairwise(cuts.tolist()):
                block = None
                if state is not None and not self.always_refit:
                    block = self._block(candidate, state, cut, stop, seed)
                if state is None or block is None or block.k_hat > state.good_k:
                    state, refits = _State.fitted(candidate, engine, cut, seed + refits), refits + 1
                    block = self._block(candidate, state, cut, stop, seed)
                blocks.append(block)
                bar.update()
        pointwise = np.array([block.value for block in blocks])
        before = np.array([block.uncorrected for block in blocks])
        assert state is not None  # there is a block at least
        likelihood = state.terms.likelihood
        corrected = likelihood == LAPLACE and self.particles is not None
        size = int(cuts[1] - cuts[0])
        return Score(
            f"{'refits' if self.always_refit else 'PSIS'}-LFO, {size} bins ahead, {refits} refits by "
            f"{type(engine).__name__}",
            PARTICLES if corrected else likelihood,
            "elpd",
            pointwise,
            "cut",
            candidate.recording.time[cuts[:-1]],
            candidate.recording,
            good_k=state.good_k,
            k_hat=np.array([block.k_hat for block in blocks]),
            error=float(np.sqrt(sum(block.variance for block in blocks))),
            uncorrected=before if corrected else None,
        )

    def cuts(self, recording: Recording) -> np.ndarray:
        """Bins at which blocks begin, and the end of the last one."""
        bins = int(recording.lengths.max())
        first = max(1, round(self.first * bins))
        ahead = max(1, (bins - first) // BLOCKS) if self.ahead is None else self.ahead
        cuts = np.arange(first, bins + 1, ahead)
        if len(cuts) < 2:
            raise ComparisonError(
                f"no block of {ahead} bins fits behind the first {first} of {bins} bins; lower first or ahead"
            )
        return cuts

    def _block(self, candidate: Candidate, state: _State, cut: int, stop: int, seed: int) -> _Block:
        """Score the bins from ``cut`` to ``stop`` by a posterior that was fitted up to ``cut`` or before."""
        known, whole = state.until(candidate, cut), state.until(candidate, stop)
        ratio = state.terms.log_ratio + known - state.until(candidate, state.cut)
        if cut > state.cut or state.terms.weighted:
            smooth, shape = smoothed(ratio[:, None], state.terms.efficiency)
            weights, k_hat = smooth[:, 0], float(shape[0])
        else:
            weights, k_hat = np.full(len(ratio), -np.log(len(ratio))), np.nan
        total, spread = weighted_mean(weights, whole - known, state.terms.efficiency)
        value, variance = float(total), float(spread)
        if state.terms.likelihood != LAPLACE or self.particles is None:
            return _Block(value, value, variance, k_hat)
        added = 0.0
        some = thinned(len(weights), self.particles.draws)
        positions = state.terms.positions[some]
        for sign, bins, log_weights in ((1.0, stop, weights + whole - known), (-1.0, cut, weights)):
            seen = _until(candidate.recording, bins)
            errors = evidence_error(
                candidate.model, state.fit.globals_at, positions, seen, self.particles.particles, seed + bins
            )
            more, noise = averaged_error(errors.sum(1, keepdims=True), log_weights[some][:, None])
            added, variance = added + sign * float(more[0]), variance + float(noise[0])
        return _Block(value + added, value, variance, k_hat)


class _Block(NamedTuple):
    value: float
    uncorrected: float
    variance: float
    k_hat: float  # NaN where draws are from the posterior itself


class _State(NamedTuple):
    """A posterior of all bins before ``cut``."""

    fit: Candidate
    terms: Terms
    cut: int
    known: dict[int, np.ndarray]  # bins -> log p of so many bins at every draw

    @classmethod
    def fitted(cls, candidate: Candidate, engine: Engine, cut: int, seed: int) -> _State:
        seen = _until(candidate.recording, cut)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FitWarning)
            posterior = fit(candidate.model, seen, engine, seed=seed)
        left = Candidate(candidate.name, candidate.model, posterior, seen)
        terms = terms_of(left)
        return cls(left, terms, cut, {cut: terms.log_likelihood.sum(1)})

    @property
    def good_k(self) -> float:
        return largest_good_k(len(self.terms.positions))

    def until(self, candidate: Candidate, bins: int) -> np.ndarray:
        """log p(the first ``bins`` | globals) at every draw, (sample,)."""
        if bins not in self.known:
            seen = _until(candidate.recording, bins)
            found = evidence(candidate.model, self.fit.globals_at, self.terms.positions, seen)
            self.known[bins] = found.sum(1)
        return self.known[bins]


def _until(recording: Recording, bins: int) -> Recording:
    """The recording with all later bins hidden; what is locked to its time axis stays where it is."""
    if bins >= recording.num_bins:
        return recording
    later = np.arange(recording.num_bins) >= bins
    return recording.hide(mask=np.broadcast_to(later, (recording.num_trials, recording.num_bins)))
