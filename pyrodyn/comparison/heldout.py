"""Predict entries from the others of the same trials: held-out units, and held-out bins.

Counts are scored in bits per spike of the predicted rates (`scoring`), real values by the log density of the held-out
entries given the others, path and globals integrated out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import logsumexp

from pyrodyn.comparison.terms import Candidate, Score, evidence, treatment
from pyrodyn.errors import ComparisonError
from pyrodyn.fitting import predict
from pyrodyn.posterior import thinned
from pyrodyn.recording import Recording
from pyrodyn.scoring import bits_per_spike_over_trials

PREDICTED = "predicted rates"


@dataclass(frozen=True)
class HeldOutUnits:
    """Co-smoothing: every unit from the units of other groups, in trials that should be new.

    Parameters
    ----------
    groups : int
        Parts of the population that are hidden in turn, at random. Where the recording marks units as ``heldout``,
        these are hidden together, and only they are scored.
    draws : int
        Posterior draws to average over.
    seed : int
        Of the groups; models that are compared have the same.

    Notes
    -----
    Give new trials as ``recording``. Without, those of the fit are scored, whose spikes the loadings have seen; the
    name of the estimator says so. The standard error is over trials.

    References
    ----------
    Pei et al., "Neural Latents Benchmark '21", NeurIPS Datasets and Benchmarks 2021.
    """

    groups: int = 4
    draws: int = 100
    seed: int = 0

    def score(self, candidate: Candidate, recording: Recording | None, seed: int) -> Score:
        """Bits per spike of all units pooled, and of every unit; or the log density of real values."""
        scored = candidate.recording if recording is None else recording
        groups = self._groups(scored)
        masks = [np.isin(np.arange(scored.num_units), units) for units in groups]
        where = "trials of the fit" if recording is None else "new trials"
        estimator = f"held-out units in {where}, {len(groups)} group" + "s" * (len(groups) > 1)
        hidden = [scored.hide(unit=scored.unit[mask]) for mask in masks]
        if not scored.counts:
            return _density(candidate, scored, hidden, self.draws, estimator)
        expected, seen = np.full(_shape(scored), np.nan), np.zeros(scored.num_units, dtype=bool)
        for mask, rest in zip(masks, hidden, strict=True):
            found = predict(candidate.posterior, rest, draws=self.draws, seed=seed, model=candidate.model)
            expected[..., mask] = found["expected"].values[..., mask]
            seen |= mask
        counts = np.where(seen, _observed(scored), np.nan)
        score = _bits(candidate, scored, np.where(seen, expected, 0.0), counts, estimator)
        return _with_units(score, expected, counts, scored.unit, seen)

    def _groups(self, recording: Recording) -> list[np.ndarray]:
        """Positions of the units that are hidden together."""
        if recording.heldout.any() and not recording.heldout.all():
            return [np.flatnonzero(recording.heldout)]
        if self.groups < 2:
            raise ComparisonError(
                f"groups must be 2 or more, got {self.groups}: some units must be left to predict from"
            )
        if recording.num_units < 2:
            raise ComparisonError(
                "the recording has a single unit, and no other to predict it from; use HeldOutEntries"
            )
        order = np.random.default_rng(self.seed).permutation(recording.num_units)
        return [np.sort(part) for part in np.array_split(order, min(self.groups, recording.num_units))]


@dataclass(frozen=True)
class HeldOutEntries:
    """Entries that were hidden from the fit: fit ``recording.hide(...)``, and give ``recording`` to `compare`.

    Parameters
    ----------
    draws : int
        Posterior draws to average over.
    """

    draws: int = 100

    def score(self, candidate: Candidate, recording: Recording | None, seed: int) -> Score:
        """Bits per spike of the entries hidden from the fit, or the log density of real values."""
        hidden = self._hidden(candidate, recording)
        assert recording is not None  # or `_hidden` had said so
        only = recording.hide(mask=~hidden)
        estimator = f"{int(hidden.sum())} held-out entries"
        if not recording.counts:
            return _density(candidate, recording, [candidate.recording], self.draws, estimator, only)
        found = predict(candidate.posterior, candidate.recording, draws=self.draws, seed=seed, model=candidate.model)
        return _bits(candidate, only, np.where(hidden, found["expected"].values, 0.0), _observed(only), estimator)

    @staticmethod
    def _hidden(candidate: Candidate, recording: Recording | None) -> np.ndarray:
        """Entries (trial, time, unit) that ``recording`` holds and the fit did not see."""
        if recording is None:
            raise ComparisonError(
                "HeldOutEntries scores what was hidden from the fit: fit recording.hide(...), and say recording=..., "
                "the one with nothing hidden"
            )
        fitted = candidate.recording
        if _shape(fitted) != _shape(recording) or not np.array_equal(fitted.trial, recording.trial):
            raise ComparisonError(
                f"{candidate.name!r} was fitted to (trial, time, unit) = {_shape(fitted)} and recording has "
                f"{_shape(recording)}, or other trials; give the recording that entries were hidden from"
            )
        hidden = np.isfinite(_observed(recording)) & np.isnan(_observed(fitted))
        if not hidden.any():
            raise ComparisonError(
                f"{candidate.name!r}: no entry of recording was hidden from the fit; fit recording.hide(mask=...)"
            )
        return hidden


def _shape(recording: Recording) -> tuple[int, int, int]:
    return recording.num_trials, recording.num_bins, recording.num_units


def _observed(recording: Recording) -> np.ndarray:
    """Observations, NaN where hidden."""
    return recording.to_xarray()["observations"].values


def _bits(candidate: Candidate, scored: Recording, expected: np.ndarray, counts: np.ndarray, estimator: str) -> Score:
    if not np.nansum(counts) > 0:
        raise ComparisonError(
            f"{candidate.name!r}: the held-out entries hold no spike, so bits per spike do not exist; hold out more"
        )
    found = bits_per_spike_over_trials(expected, counts)
    pointwise = found.per_trial / len(found.per_trial)
    return Score(estimator, PREDICTED, "bits_per_spike", pointwise, "trial", scored.trial, scored)


def _with_units(score: Score, expected: np.ndarray, counts: np.ndarray, unit: np.ndarray, seen: np.ndarray) -> Score:
    """The score with the bits per spike of every unit that was held out, NaN for those without a spike."""
    value, error = np.full((2, len(unit)), np.nan)
    for u in np.flatnonzero(seen & (np.nansum(counts, (0, 1)) > 0)):
        found = bits_per_spike_over_trials(expected[..., [u]], counts[..., [u]])
        value[u], error[u] = found.value, found.standard_error
    details: Any = {
        name: xr.DataArray(array, dims="unit", coords={"unit": unit})
        for name, array in (("unit_bits_per_spike", value), ("unit_se", error))
    }
    return Score(**{**vars(score), "details": details})


def _density(
    candidate: Candidate,
    recording: Recording,
    visible: list[Recording],
    draws: int,
    estimator: str,
    scored: Recording | None = None,
) -> Score:
    """Log density of what ``recording`` holds beyond each of ``visible``, given that, summed over these."""
    sizes = candidate.posterior["posterior"].sizes
    chosen = thinned(sizes["chain"] * sizes["draw"], draws)

    def of(seen: Recording) -> np.ndarray:
        return evidence(candidate.model, candidate.globals_at, chosen, seen)

    whole, total = of(recording), np.zeros(recording.num_trials)
    for part in visible:
        total = total + logsumexp(whole - of(part), axis=0) - np.log(len(chosen))
    likelihood = treatment(candidate.model, recording)
    recording = recording if scored is None else scored
    return Score(estimator, likelihood, "elpd", total, "trial", recording.trial, recording)
