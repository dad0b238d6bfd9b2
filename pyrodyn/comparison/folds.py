r"""K-fold cross-validation over trials: all refits are replicates of one density, in one batch.

.. math:: \mathrm{elpd} = \sum_k \sum_{i \in k} \log \int p(y_i \mid \theta)\, p(\theta \mid y_{-k})\, d\theta

The refit without fold k multiplies the log likelihood of its trials by zero. Folds are a leading draw dimension, so
that the models of all folds are climbed, curved and sampled by the same calls of the density.

Reference: Vehtari, Gelman & Gabry, Stat. Comput. 27:1413 (2017), on K-fold where importance weights fail.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from pyrodyn.comparison.loo import refuse_dependent
from pyrodyn.comparison.terms import (
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
    treatment,
    weighted_mean,
)
from pyrodyn.diagnostics import effective_share
from pyrodyn.errors import ComparisonError
from pyrodyn.fitting import fit
from pyrodyn.inference import HMC, NUTS, SVI, Laplace, LogDensity, collapse
from pyrodyn.inference.engine import Engine, RefittingEngine, numerics, random_stream, starting_values
from pyrodyn.posterior import BATCH_NUMBERS, FitWarning, thinned
from pyrodyn.program import globals_given, log_terms
from pyrodyn.progress import progress
from pyrodyn.recording import Recording

CLIMB = 200  # steps of L-BFGS towards the mode of all trials, where the climbs of the folds start
FOLD_STREAM = 1_000_037  # a random stream that nothing else uses
# Surplus latents leave flat directions, along which a climb never ends and a Gaussian without a bound has no meaning.
NEAR_MODE = Laplace(draws=400, max_steps=200, tolerance=1e-8, least_curvature=1.0)
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
    Draws of an approximation (`Laplace`, SVI) are weighted by the smoothed ratio of the posterior's density to theirs,
    where k-hat of the ratio allows it; otherwise they are taken as they are, and the name of the estimator says so. The
    score is then that of the approximate fit: its trials were left out all the same.
    """

    folds: int = 5
    refit: Engine | None = None
    particles: Particles | None = field(default_factory=Particles)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ComparisonError(f"folds must be 2 or more, got {self.folds}")

    def score(self, candidate: Candidate, recording: Recording | None, seed: int) -> Score:
        """Sum of log p(trial | trials of all other folds)."""
        check_data(candidate, recording)
        refuse_dependent(candidate)
        number = _fold_of(candidate.recording, self.folds, self.seed)
        found = self.left_out(candidate, [np.flatnonzero(number == k) for k in range(number.max() + 1)], seed)
        return Score(
            f"{number.max() + 1}-fold, refits by {found.engine}{found.manner}",
            found.likelihood,
            "elpd",
            found.pointwise,
            "trial",
            candidate.recording.trial,
            candidate.recording,
            error=float(np.sqrt(found.variance.sum())),
            p_eff=_parameters(candidate, found),
            uncorrected=found.uncorrected,
        )

    def left_out(self, candidate: Candidate, held: list[np.ndarray], seed: int) -> LeftOut:
        """Scores of the trials in ``held``, a fold each, given all trials of no or another fold."""
        engine = _like(candidate.engine(None)) if self.refit is None else self.refit
        if isinstance(engine, RefittingEngine):
            refitted = _batched(candidate, engine, held, seed)
        else:
            refitted = _one_by_one(candidate, engine, held, seed)
        count, kind = candidate.recording.num_trials, treatment(candidate.model, candidate.recording)
        laplace = kind == LAPLACE
        pointwise, variance, before = np.full(count, np.nan), np.zeros(count), None
        weighted = []
        for trials, fold in zip(held, refitted, strict=True):
            weighted.append(fold.weighted)
            scores = fold.log_weights[:, None] + fold.log_likelihood[:, trials]
            pointwise[trials], variance[trials] = weighted_mean(
                fold.log_weights[:, None], fold.log_likelihood[:, trials], fold.efficiency
            )
            if not laplace or self.particles is None:
                continue
            before = np.full(count, np.nan) if before is None else before
            before[trials] = pointwise[trials]
            some, part = thinned(len(scores), self.particles.draws), candidate.recording.isel(trial=trials)
            errors = evidence_error(
                candidate.model, fold.globals_at, some, part, self.particles.particles, seed + int(trials[0])
            )
            added, more = averaged_error(errors, scores[some])
            pointwise[trials] += added
            variance[trials] += more
        likelihood = PARTICLES if laplace and self.particles is not None else kind
        return LeftOut(pointwise, variance, before, likelihood, type(engine).__name__, _manner(weighted))


class LeftOut(NamedTuple):
    """Scores of trials that were left out, (trial,), NaN for those that were not."""

    pointwise: np.ndarray
    variance: np.ndarray  # Monte Carlo, of draws and particles
    uncorrected: np.ndarray | None
    likelihood: str
    engine: str
    manner: str  # how draws of an approximation were used


class Refitted(NamedTuple):
    """Draws of the posterior without one fold."""

    log_likelihood: np.ndarray  # (sample, trial), path integrated out
    log_weights: np.ndarray  # (sample,), normalised
    weighted: bool | None  # whether by p/q; None where draws are from the posterior itself
    efficiency: float  # effective draws a draw
    globals_at: Any  # positions among the samples -> parameters


def _fold_of(recording: Recording, folds: int, seed: int) -> np.ndarray:
    """The number of every trial's fold."""
    folds = min(folds, recording.num_trials)
    split = recording.split_trials({f"{k}": 1.0 / folds for k in range(folds)}, seed=seed).split
    return np.unique(split.astype(int), return_inverse=True)[1]


def _like(engine: Engine) -> Engine:
    """What refits in place of an engine: the same kind of approximation, all folds at once where there is such."""
    if isinstance(engine, (HMC, NUTS)):
        return SHORT
    return NEAR_MODE if isinstance(engine, (SVI, Laplace)) else engine


def _batched(candidate: Candidate, engine: RefittingEngine, held: list[np.ndarray], seed: int) -> Iterator[Refitted]:
    """Refits as replicates of one density with weighted trials, in blocks that fit into memory."""
    recording, program = candidate.recording, collapse(candidate.model)
    weights = torch.ones(len(held), 1, recording.num_trials, dtype=torch.float64)
    for row, trials in zip(weights, held, strict=True):
        row[0, torch.from_numpy(trials)] = 0.0
    chains = getattr(engine, "chains", 1)
    block = max(1, BATCH_NUMBERS // (max(chains, 64) * recording.num_trials * recording.num_bins * recording.num_units))
    with progress(len(held), "folds") as bar:
        for part in weights.split(block):
            with random_stream(seed, FOLD_STREAM), numerics():
                density = LogDensity(program, recording, weights=part)
                start = density.unconstrain(starting_values(program, recording, CLIMB, "K-fold: start"))
                vectors, log_q = engine.refit(density, start.expand(len(part), -1).clone())
            for k, drawn in enumerate(vectors):
                own = None if log_q is None else log_q[k]
                yield _refitted(candidate, density, drawn, own, part[k, 0] > 0.0, chains)
                bar.update()


def _refitted(
    candidate: Candidate, density: LogDensity, vectors: Tensor, log_q: Tensor | None, kept: Tensor, chains: int
) -> Refitted:
    """Draws (chain x draw, dimension) of the posterior of the trials ``kept``, scored on all trials."""
    recording, model = candidate.recording, candidate.model

    def globals_at(chosen: np.ndarray) -> Any:
        return globals_given(model, density.constrain(vectors[torch.from_numpy(chosen)]), recording)

    size = max(1, BATCH_NUMBERS // (recording.num_trials * recording.num_bins * recording.num_units))
    shared, of_trials = [], []
    with torch.no_grad(), numerics():
        for some in vectors.split(size):
            prior, terms = log_terms(density.program, density.constrain(some), recording)
            shared.append(prior + density.log_jacobian(some))
            of_trials.append(terms)
    found = torch.cat(of_trials).nan_to_num(-torch.inf, posinf=-torch.inf)  # a draw without a density predicts nothing
    log_weights, weighted = _equal(len(vectors)), None
    if log_q is not None:
        log_p = torch.cat(shared) + found[:, kept].sum(-1)
        log_weights, weighted = _trusted((log_p - log_q).numpy())
    share = 1.0 if log_q is not None else effective_share(found.reshape(chains, -1, recording.num_trials).numpy())
    return Refitted(found.numpy(), log_weights, weighted, share, globals_at)


def _trusted(ratio: np.ndarray) -> tuple[np.ndarray, bool]:
    """Log weights by the log ratio of p and q where k-hat allows it, equal ones otherwise, and which."""
    weights, k_hat = smoothed(ratio[:, None])
    if k_hat[0] <= largest_good_k(len(ratio)):
        return weights[:, 0], True
    return _equal(len(ratio)), False


def _equal(count: int) -> np.ndarray:
    return np.full(count, -np.log(count))


def _manner(weighted: list[bool | None]) -> str:
    if None in weighted:
        return ""
    return ", weighted by p/q" if all(weighted) else ", draws as they are" + " in some folds" * any(weighted)


def _one_by_one(candidate: Candidate, engine: Engine, held: list[np.ndarray], seed: int) -> Iterator[Refitted]:
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
            log_weights, weighted = _equal(len(terms.positions)), None
            if terms.weighted:
                log_weights, weighted = _trusted(terms.log_ratio)
            # Parameters, unlike sites, do not depend on the gauge of the trials that they were fitted to.
            found = np.full((len(log_weights), recording.num_trials), np.nan)
            part = recording.isel(trial=trials)
            found[:, trials] = evidence(model, left.globals_at, terms.positions, part)

            def globals_at(chosen: np.ndarray, left: Candidate = left, terms: Any = terms) -> Any:
                return left.globals_at(terms.positions[chosen])

            yield Refitted(found, log_weights, weighted, terms.efficiency, globals_at)
            bar.update()


def _parameters(candidate: Candidate, found: LeftOut) -> float:
    """Effective number of parameters: how much better trials are predicted by a posterior that has seen them."""
    terms = terms_of(candidate)
    inside = logsumexp(full_weights(terms) + terms.log_likelihood, axis=0)
    return float((inside - (found.pointwise if found.uncorrected is None else found.uncorrected)).sum())
