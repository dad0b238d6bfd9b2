"""What the estimators work on: candidates, their log likelihoods trial by trial, and the scores that come out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from scipy.special import logsumexp
from torch import Tensor

from pyrodyn.diagnostics import effective_share
from pyrodyn.distributions import SwitchingPath
from pyrodyn.errors import ComparisonError
from pyrodyn.inference import collapse, collapses
from pyrodyn.inference.engine import Engine, numerics, random_stream
from pyrodyn.inference.switching_particles import switching_evidence
from pyrodyn.posterior import BATCH_NUMBERS, engine_of, parameters_at, thinned
from pyrodyn.program import LatentModel, StateSpaceModel
from pyrodyn.recording import Recording

Globals = Callable[[np.ndarray], Any]  # positions of draws -> parameters of a model, each (draw, 1, *event)

LARGEST = 300.0  # log of a ratio whose square is still a number
LEAST_DRAWS = 25  # from which the tail of the weights can be fitted
PARTICLE_STREAM = 1_000_033  # a random stream that nothing else uses
EXACT, LAPLACE, PARTICLES = "exact", "Laplace", "Laplace + particles"
FILTERED = "particles"  # alone: of a path whose dynamics switch
FILTER_PARTICLES, FILTER_DRAWS = 300, 100


@dataclass(frozen=True)
class Particles:
    """How the error of a Laplace evidence of paths is measured; see `inference.particles`.

    Parameters
    ----------
    particles : int
        For every draw and trial.
    draws : int
        Posterior draws over which the measured errors are averaged.
    """

    particles: int = 100
    draws: int = 40

    def __post_init__(self) -> None:
        if self.particles < 2 or self.draws < 2:
            raise ComparisonError(
                f"particles and draws must be 2 or more, got {self.particles} and {self.draws}; "
                "say particles=None to leave the Laplace evidence as it is"
            )


@dataclass(frozen=True, eq=False)
class Candidate:
    """One model of a comparison with its posterior and the recording it was fitted to."""

    name: str
    model: LatentModel
    posterior: xr.DataTree
    recording: Recording

    def engine(self, instead: Engine | None) -> Engine:
        """What to refit with: the engine of the posterior, unless another is given."""
        return engine_of(self.posterior) if instead is None else instead

    def globals_at(self, chosen: np.ndarray) -> Any:
        """The parameters at positions in (chain x draw) of the posterior."""
        return parameters_at(self.posterior, self.model, chosen)

    @property
    def fit_seconds(self) -> float:
        return float(self.posterior.attrs["wall_time_seconds"])


@dataclass(frozen=True, eq=False)
class Score:
    """What an estimator says of one candidate.

    Attributes
    ----------
    estimator, likelihood : str
        How the score was computed, and how the path was integrated out.
    quantity : str
        ``elpd``, ``log_evidence`` or ``bits_per_spike``.
    pointwise : ndarray, (term,)
        Its sum is the score. A single term where the score does not split.
    dim, labels
        What the terms are: trials, cuts, ...
    k_hat : ndarray, (term,), optional
        Of the importance weights behind every term; NaN where a term has none.
    error : float
        Monte Carlo standard error of the sum, of draws and particles; beside it stands the spread over terms.
    p_eff : float
        Effective number of parameters; NaN where the estimator has none.
    uncorrected : ndarray, (term,), optional
        The terms before the correction by particles.
    recording : Recording
        What was scored.
    details : mapping
        More variables for the table, by name.
    """

    estimator: str
    likelihood: str
    quantity: str
    pointwise: np.ndarray
    dim: str
    labels: np.ndarray
    recording: Recording
    good_k: float = 0.7
    k_hat: np.ndarray | None = None
    error: float = 0.0
    p_eff: float = math.nan
    uncorrected: np.ndarray | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        return float(self.pointwise.sum())

    @property
    def bad_share(self) -> float:
        """Share of the terms with weights that are not to be trusted."""
        if self.k_hat is None:
            return 0.0
        return float((self.k_hat > self.good_k).mean())


@dataclass(frozen=True, eq=False)
class Terms:
    """Log likelihoods (sample, term) at draws of a posterior, path integrated out.

    Attributes
    ----------
    log_ratio : ndarray, (sample,)
        Log of posterior density over the density that the draws are from, up to a constant; zeros for MCMC.
    efficiency : float
        Effective draws a draw.
    positions : ndarray, (sample,)
        Positions of the draws in (chain x draw) of the posterior.
    """

    log_likelihood: np.ndarray
    log_ratio: np.ndarray
    efficiency: float
    positions: np.ndarray
    labels: np.ndarray
    likelihood: str
    weighted: bool  # whether the draws are independent ones from an approximation with a known density
    engine: str


def terms_of(candidate: Candidate) -> Terms:
    """The log likelihood of every trial at the draws of a posterior, from its group ``log_likelihood``.

    Raises
    ------
    ComparisonError
        Where the posterior has no log likelihood with its path integrated out, where it is not split into trials, or
        where there are too few draws.
    """
    posterior, name = candidate.posterior, candidate.name
    if "log_likelihood" not in posterior.children:
        if treatment(candidate.model, candidate.recording) == FILTERED:
            return _filtered(candidate)
        raise ComparisonError(
            f"{name!r}: the posterior has no group log_likelihood, since its path cannot be integrated out; compare by "
            "held-out entries instead: method=comparison.HeldOutEntries()"
        )
    stored: Any = posterior["log_likelihood"]["observations"]
    if set(stored.dims) != {"chain", "draw", "trial"}:
        raise ComparisonError(
            f"{name!r}: the log likelihood has dims {stored.dims}, expected (chain, draw, trial); bins and units of "
            "one trial share its path, so given the globals they are not independent and cannot be left out one by "
            "one: sum over them, with the path integrated out, or use method=comparison.LeaveFutureOut()"
        )
    stored = stored.transpose("chain", "draw", "trial")
    values = stored.values.reshape(-1, stored.sizes["trial"])
    if len(values) < LEAST_DRAWS:
        raise ComparisonError(
            f"{name!r}: the posterior has {len(values)} draws with a log likelihood, expected {LEAST_DRAWS} or more to "
            "judge importance weights by; fit with more draws"
        )
    fitted, stats = posterior["posterior"].to_dataset(), posterior["sample_stats"].to_dataset()
    kept = np.searchsorted(fitted["draw"].values, stored["draw"].values)
    sizes = fitted.sizes
    positions = (np.arange(sizes["chain"])[:, None] * sizes["draw"] + kept).ravel()
    ratio, weighted = np.zeros(len(values)), "log_q" in stats and "lp" in stats
    if weighted:
        ratio = (stats["lp"] - stats["log_q"]).values.ravel()[positions]
    efficiency = 1.0 if "log_q" in stats else effective_share(stored.values)
    return Terms(
        values,
        ratio - ratio.max(),
        efficiency,
        positions,
        stored["trial"].values,
        posterior.attrs["log_likelihood_estimator"],
        weighted,
        engine_name(posterior),
    )


def _filtered(candidate: Candidate) -> Terms:
    """Log likelihoods that only particles give; MCMC draws, thinned since each costs a filter."""
    posterior = candidate.posterior
    stats, sizes = posterior["sample_stats"].to_dataset(), posterior["posterior"].to_dataset().sizes
    if "log_q" in stats:
        raise ComparisonError(
            f"{candidate.name!r}: draws of {engine_name(posterior)} have a density over globals and paths together, "
            "and cannot be weighted by the globals alone; fit with inference.Gibbs()"
        )
    positions = thinned(sizes["chain"] * sizes["draw"], FILTER_DRAWS)
    if len(positions) < LEAST_DRAWS:
        raise ComparisonError(
            f"{candidate.name!r}: the posterior has {len(positions)} draws, expected {LEAST_DRAWS} or more to judge "
            "importance weights by; fit with more draws"
        )
    values = evidence(candidate.model, candidate.globals_at, positions, candidate.recording)
    return Terms(
        values,
        np.zeros(len(values)),
        effective_share(values[None]),
        positions,
        candidate.recording.trial,
        FILTERED,
        False,
        engine_name(posterior),
    )


def treatment(model: LatentModel, recording: Recording) -> str:
    """How log likelihoods of trials come about with everything latent integrated out."""
    if isinstance(model, StateSpaceModel) and not collapses(model, recording):
        with torch.no_grad(), torch.random.fork_rng(devices=()), poutine.block():
            law = model.latent_path(model.sample_globals(recording), recording)
        if isinstance(law, SwitchingPath):
            return FILTERED
    return EXACT if collapse(model).is_exact else LAPLACE


def check_data(candidate: Candidate, recording: Recording | None) -> None:
    """Raise where another recording is given than the one that was fitted."""
    if recording is not None and not same_data(recording, candidate.recording):
        raise ComparisonError(
            f"{candidate.name!r} was fitted to other data than recording={recording!r}; leave recording out, or score "
            "new data with method=comparison.HeldOutUnits()"
        )


def same_data(one: Recording, other: Recording) -> bool:
    """Whether two recordings hold the same observations of the same trials, bins and units."""
    if one is other:
        return True
    a, b = (recording.to_xarray()["observations"] for recording in (one, other))
    return a.shape == b.shape and all(
        [np.array_equal(a.values, b.values, equal_nan=True)]
        + [np.array_equal(a[axis].values, b[axis].values) for axis in ("trial", "time", "unit")]
    )


def engine_name(posterior: xr.DataTree) -> str:
    return str(json.loads(posterior.attrs["engine"]).get("class", "?"))


def smoothed(log_ratio: np.ndarray, efficiency: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed log weights (sample, term), normalised over samples, and k-hat (term,), of log ratios.

    Reference: Vehtari, Simpson, Gelman, Yao & Gabry, JMLR 25(72) (2024).
    """
    ratios = xr.DataArray(log_ratio, dims=("sample", "term"))
    with np.errstate(all="ignore"):
        weights, shape = (-ratios).azstats.psislw(r_eff=efficiency, dim="sample")
    return weights.transpose("sample", "term").values, np.asarray(shape.values, dtype=float)


def full_weights(terms: Terms) -> np.ndarray:
    """Normalised log weights (sample, 1) that make the draws draws from the whole posterior."""
    if terms.weighted:
        return smoothed(terms.log_ratio[:, None])[0]
    return np.full((len(terms.log_ratio), 1), -math.log(len(terms.log_ratio)))


def weighted_mean(
    log_weights: np.ndarray, log_values: np.ndarray, efficiency: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Log of the weighted mean of exp(log_values) over samples, and its Monte Carlo variance, (term,).

    Both are (sample, term), or broadcast to it; weights are normalised. Reference: Vehtari, Simpson, Gelman, Yao &
    Gabry, JMLR 25(72) (2024), on the variance.
    """
    scores = log_weights + log_values
    total = logsumexp(scores, axis=0)
    apart = np.exp(np.minimum(log_values - total, LARGEST)) - 1.0
    return total, (np.exp(2.0 * log_weights) * apart**2).sum(0) / efficiency


def largest_good_k(samples: int) -> float:
    """k-hat up to which so many samples give a reliable estimate: at most .7."""
    return min(1.0 - 1.0 / math.log10(samples), 0.7)


def evidence(model: LatentModel, globals_at: Globals, chosen: np.ndarray, recording: Recording) -> np.ndarray:
    """log p(y | globals) of every trial at the chosen draws, (draw, trial), in batches of draws.

    Exact or Laplace; where dynamics switch, by particles, the same random numbers at every call.
    """
    if treatment(model, recording) == FILTERED:
        assert isinstance(model, StateSpaceModel)

        def filtered(parameters: Any) -> Tensor:
            law = model.latent_path(parameters, recording)
            zeros = torch.zeros(recording.num_trials, *law.event_shape, dtype=torch.float64)
            readout: Any = model.readout_law(parameters, zeros, recording)
            return switching_evidence(law, readout, recording.values, particles=FILTER_PARTICLES)[0]

        with random_stream(0, PARTICLE_STREAM):
            return _in_batches(globals_at, chosen, recording, FILTER_PARTICLES, filtered)
    program = collapse(model)
    return _in_batches(globals_at, chosen, recording, 1, lambda some: program.evidence(some, recording))


def evidence_error(
    model: LatentModel, globals_at: Globals, chosen: np.ndarray, recording: Recording, particles: int, seed: int
) -> np.ndarray:
    """What particles say is missing in `evidence`, (draw, trial)."""
    program = collapse(model)
    with random_stream(seed, PARTICLE_STREAM):
        return _in_batches(
            globals_at, chosen, recording, particles, lambda some: program.evidence_error(some, recording, particles)
        )


def _in_batches(
    globals_at: Globals, chosen: np.ndarray, recording: Recording, each: int, score: Callable[[Any], Tensor]
) -> np.ndarray:
    share = recording.num_trials * max(recording.num_bins, each) * recording.num_units
    size = max(1, BATCH_NUMBERS // share)
    with torch.no_grad(), numerics():
        found = [score(globals_at(chosen[i : i + size])).numpy() for i in range(0, len(chosen), size)]
    return np.concatenate(found)


def corrected(
    candidate: Candidate, terms: Terms, log_weights: np.ndarray, particles: Particles, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    r"""What the error of the Laplace evidence adds to every term, and the variance of that, both (trial,).

    A term is :math:`\log \sum_s w_s \hat L_s e^{c_s}` with Laplace evidences :math:`\hat L_s` and errors
    :math:`c_s`; what is added to :math:`\log \sum_s w_s \hat L_s` is the log of a mean of :math:`e^{c_s}`, which
    varies so little over the posterior that a few draws will do. Particles estimate :math:`e^{c_s}` without bias.
    """
    some = thinned(len(terms.positions), particles.draws)
    errors = evidence_error(
        candidate.model,
        candidate.globals_at,
        terms.positions[some],
        candidate.recording,
        particles.particles,
        seed,
    )
    return averaged_error(errors, log_weights[some] + terms.log_likelihood[some])


def averaged_error(errors: np.ndarray, log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of the weighted mean of exp(errors) over draws, and its variance, (trial,), from (draw, trial)."""
    weights = np.exp(log_weights - log_weights.max(0))
    weights = weights / weights.sum(0)
    top = errors.max(0)
    scaled = np.exp(errors - top)
    mean = (weights * scaled).sum(0)
    variance = (weights**2 * (scaled - mean) ** 2).sum(0) / mean**2
    return np.log(mean) + top, variance
