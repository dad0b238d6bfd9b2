r"""K-fold cross-validation over trials: all refits are replicates of one density, in one batch.

.. math:: \mathrm{elpd} = \sum_k \sum_{i \in k} \log \int p(y_i \mid \theta)\, p(\theta \mid y_{-k})\, d\theta

The refit without fold k multiplies the log likelihood of its trials by zero. Folds are a leading draw dimension, so
that the models of all folds are climbed, curved and sampled by the same calls of the density.

Reference: Vehtari, Gelman & Gabry, Stat. Comput. 27:1413 (2017), on K-fold where importance weights fail.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from pyrodyn.comparison.loo import refuse_dependent
from pyrodyn.comparison.terms import (
    EXACT,
    LAPLACE,
    PARTICLES,
    Candidate,
    Particles,
    Score,
    averaged_error,
    check_data,
    evidence,
    evidence_error,
    full_weights,
    largest_good_k,
    smoothed,
    terms_of,
)
from pyrodyn.errors import ComparisonError
from pyrodyn.fitting import fit
from pyrodyn.inference import HMC, NUTS, SVI, Laplace, LogDensity, collapse
from pyrodyn.inference.engine import Engine, RefittingEngine, double_precision, random_stream, starting_values
from pyrodyn.posterior import BATCH_NUMBERS, FitWarning, thinned
from pyrodyn.program import globals_given, log_terms
from pyrodyn.progress import progress
from pyrodyn.recording import Recording

CLIMB = 200  # steps of L-BFGS towards the mode of all trials, where the climbs of the folds start
FOLD_STREAM = 1_000_037  # a random stream that nothing else uses
SHORT = HMC(draws=25, warmup=100, chains=16)  # for each fold, started at its mode


@dataclass(frozen=True)
class KFold:
    """Leave a fold of trials out, with refits.

    Parameters
    ----------
    folds : int
        Of about equal size; conditions are spread evenly over them. As many as there are trials leaves out one by one.
    refit : Engine, optional
        `inference.HMC` and `inference.Laplace` take all folds as one batch, others one after another. By default
        what the posterior was fitted by; `Laplace` for a Gaussian guide (SVI) and `HMC` for NUTS, both of which are
        of the same kind.
    particles : Particles, optional
        How the error of a Laplace evidence is taken out of the trials left out; None leaves it in.
    seed : int
        Of the folds; models that are compared have the same.

    Notes
    -----
    Draws of `Laplace` are weighted by the smoothed ratio of the posterior's density to theirs; k-hat of a trial is
    that of its fold.
    """

    folds: int = 10
    refit: Engine | None = None
    particles: Particles | None = field(default_factory=Particles)
    seed: int = 0

    def score(self, candidate: Candidate, recording: Recording | None, seed: int) -> Score:
        """Sum of log p(trial | trials of all other folds)."""
        check_data(candidate, recording)
        refuse_dependent(candidate)
        number = _fold_of(candidate.recording, self.folds, self.seed)
        found = self.left_out(candidate, [np.flatnonzero(number == k) for k in range(number.max() + 1)], seed)
        return Score(
            f"{number.max() + 1}-fold, refits by {found.engine}",
            found.likelihood,
            "elpd",
            found.pointwise,
            "trial",
            candidate.recording.trial,
            candidate.recording,
            good_k=found.good_k,
            k_hat=found.k_hat,
            error=float(np.sqrt(found.variance.sum())),
            p_eff=_parameters(candidate, found),
            uncorrected=found.uncorrected,
        )

    def left_out(self, candidate: Candidate, held: list[np.ndarray], seed: int) -> LeftOut:
        """Scores of the trials in ``held``, a fold each, given all trials of no or another fold."""
        engine = _like(candidate.engine(None)) if self.refit is None else self.refit
        refits = _batched if isinstance(engine, RefittingEngine) else _one_by_one
        count = candidate.recording.num_trials
        found = LeftOut(
            np.full(count, np.nan), np.full(count, np.nan), np.zeros(count), None, EXACT, 0.7, type(engine).__name__
        )
        laplace = "exactly" not in collapse(candidate.model).treatment
        for trials, refitted in zip(held, refits(candidate, engine, held, seed), strict=True):
            found = self._take(found, trials, refitted, candidate, laplace, seed)
        return found

    def _take(
        self, found: LeftOut, trials: np.ndarray, refitted: Refitted, candidate: Candidate, laplace: bool, seed: int
    ) -> LeftOut:
        weights, k_hat = refitted.log_weights, refitted.k_hat
        likelihood = refitted.log_likelihood[:, trials]
        found.pointwise[trials] = logsumexp(weights[:, None] + likelihood, axis=0)
        found.k_hat[trials] = k_hat
        found = found._replace(good_k=largest_good_k(len(weights)))
        if not laplace:
            return found
        if self.particles is None:
            return found._replace(likelihood=LAPLACE)
        before = np.full(len(found.pointwise), np.nan) if found.uncorrected is None else found.uncorrected
        before[trials] = found.pointwise[trials]
        some = thinned(len(weights), self.particles.draws)
        part = candidate.recording.isel(trial=trials)
        errors = evidence_error(
            candidate.model, refitted.globals_at, some, part, self.particles.particles, seed + int(trials[0])
        )
        added, variance = averaged_error(errors, weights[some][:, None] + likelihood[some])
        found.pointwise[trials] += added
        found.variance[trials] = variance
        return found._replace(likelihood=PARTICLES, uncorrected=before)


class LeftOut(NamedTuple):
    """Scores of trials that were left out, (trial,), NaN for those that were not."""

    pointwise: np.ndarray
    k_hat: np.ndarray
    variance: np.ndarray
    uncorrected: np.ndarray | None
    likelihood: str
    good_k: float
    engine: str


class Refitted(NamedTuple):
    """Draws of the posterior without one fold."""

    log_likelihood: np.ndarray  # (sample, trial), path integrated out
    log_weights: np.ndarray  # (sample,), normalised
    k_hat: float  # NaN where draws are from the posterior itself
    globals_at: Any  # positions among the samples -> parameters


def _fold_of(recording: Recording, folds: int, seed: int) -> np.ndarray:
    """The number of every trial's fold."""
    if not 2 <= folds:
        raise ComparisonError(f"folds must be 2 or more, got {folds}")
    folds = min(folds, recording.num_trials)
    split = recording.split_trials({f"{k}": 1.0 / folds for k in range(folds)}, seed=seed).split
    return np.unique(split.astype(int), return_inverse=True)[1]


def _like(engine: Engine) -> Engine:
    """What refits in place of an engine: the same kind of approximation, all folds at once where there is such."""
    if isinstance(engine, (HMC, NUTS)):
        return SHORT
    return Laplace(draws=engine.draws) if isinstance(engine, (SVI, Laplace)) else engine


def _batched(candidate: Candidate, engine: RefittingEngine, held: list[np.ndarray], seed: int):
    """Refits as replicates of one density with weighted trials, in blocks that fit into memory."""
    recording, program = candidate.recording, collapse(candidate.model)
    weights = torch.ones(len(held), 1, recording.num_trials, dtype=torch.float64)
    for row, trials in zip(weights, held, strict=True):
        row[0, torch.from_numpy(trials)] = 0.0
    chains = getattr(engine, "chains", 64)
    block = max(1, BATCH_NUMBERS // (chains * recording.num_trials * recording.num_bins * recording.num_units))
    with progress(len(held), "folds") as bar:
        for part in weights.split(block):
            with random_stream(seed, FOLD_STREAM), double_precision():
                density = LogDensity(program, recording, weights=part)
                start = density.unconstrain(starting_values(program, recording, CLIMB, "K-fold: start"))
                vectors, log_q = engine.refit(density, start.expand(len(part), -1).clone())
                with torch.no_grad():
                    log_p = torch.zeros(vectors.shape[:2]) if log_q is None else density(vectors) - log_q
            for ratio, vector in zip(log_p.numpy(), vectors, strict=True):
                yield _refitted(candidate, density, vector, ratio, weighted=log_q is not None)
                bar.update()


def _refitted(
    candidate: Candidate, density: LogDensity, vectors: Tensor, ratio: np.ndarray, *, weighted: bool
) -> Refitted:
    recording, model = candidate.recording, candidate.model

    def values_at(chosen: np.ndarray) -> Any:
        return density.constrain(vectors[torch.from_numpy(chosen)])

    def globals_at(chosen: np.ndarray) -> Any:
        return globals_given(model, values_at(chosen), recording)

    size = max(1, BATCH_NUMBERS // (recording.num_trials * recording.num_bins * recording.num_units))
    every = np.arange(len(vectors))
    with torch.no_grad(), double_precision():
        parts = [log_terms(density.program, values_at(some), recording)[1] for some in _chunks(every, size)]
    log_weights, k_hat = np.full(len(every), -np.log(len(every))), np.nan
    if weighted:
        smooth, shape = smoothed(ratio[:, None])
        log_weights, k_hat = smooth[:, 0], float(shape[0])
    return Refitted(torch.cat(parts).numpy(), log_weights, k_hat, globals_at)


def _chunks(positions: np.ndarray, size: int) -> list[np.ndarray]:
    return [positions[i : i + size] for i in range(0, len(positions), size)]


def _one_by_one(candidate: Candidate, engine: Engine, held: list[np.ndarray], seed: int):
    """A fit from scratch without every fold, for engines that take one recording at a time."""
    recording, model = candidate.recording, candidate.model
    with progress(len(held), "folds") as bar:
        for k, trials in enumerate(held):
            rest = recording.isel(trial=np.setdiff1d(np.arange(recording.num_trials), trials))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FitWarning)
                posterior = fit(model, rest, engine, seed=seed + k)
            left = Candidate(candidate.name, model, posterior, rest)
            terms = terms_of(left)
            log_weights, k_hat = full_weights(terms)[:, 0], np.nan
            if terms.weighted:
                k_hat = float(smoothed(terms.log_ratio[:, None])[1][0])
            # Parameters, unlike sites, do not depend on the gauge of the trials that they were fitted to.
            found = np.full((len(log_weights), recording.num_trials), np.nan)
            part = recording.isel(trial=trials)
            found[:, trials] = evidence(model, left.globals_at, terms.positions, part)

            def globals_at(chosen: np.ndarray, left: Candidate = left, terms: Any = terms) -> Any:
                return left.globals_at(terms.positions[chosen])

            yield Refitted(found, log_weights, k_hat, globals_at)
            bar.update()


def _parameters(candidate: Candidate, found: LeftOut) -> float:
    """Effective number of parameters: how much better trials are predicted by a posterior that has seen them."""
    terms = terms_of(candidate)
    inside = logsumexp(full_weights(terms) + terms.log_likelihood, axis=0)
    return float((inside - (found.pointwise if found.uncorrected is None else found.uncorrected)).sum())
