r"""Probes that tell real dynamics from overfit, without a known truth.

A flexible network can reproduce a recording by copying it: its rates follow the spikes that it reads, and its latents
hold what no spike depends on. Both are seen without knowing true rates. A probe asks an inference, any function from a
recording to what `pyrodyn.predict` returns, about recordings that were changed on purpose::

    def inference(recording):
        return dyn.predict(posterior, recording)

Where a recognition network is to be probed rather than the model, the function runs that network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import xarray as xr

from pyrodyn.errors import RecordingError
from pyrodyn.evaluation.recovery import rate_r2
from pyrodyn.recording import Recording
from pyrodyn.scoring import BitsPerSpike, bits_per_spike_over_trials

Inference = Callable[[Recording], xr.Dataset]


class Leakage(NamedTuple):
    """How much better entries are predicted that were seen.

    Attributes
    ----------
    seen, hidden : BitsPerSpike
        Of all observed entries, each predicted once from everything and once from all but its own fold.
    gap : BitsPerSpike
        Their paired difference: near zero where an entry says little that others do not, large where it is copied.
    """

    seen: BitsPerSpike
    hidden: BitsPerSpike
    gap: BitsPerSpike


class CycleConsistency(NamedTuple):
    """What an inference finds again of its own findings.

    Attributes
    ----------
    rates : float
        R2 of the rates inferred from simulated counts, about the rates that simulated them; mean over units.
    latents : float
        The same of the latents, NaN where the inference returns none. A latent that no unit depends on, or less than
        it seems, is not found again.
    copying : float
        What ``rates`` would be of an inference that takes the counts themselves for rates,
        :math:`1 - \\bar y / \\mathrm{var}(y)`.
    """

    rates: float
    latents: float
    copying: float


def input_leakage(inference: Inference, recording: Recording, *, folds: int = 5, seed: int = 0) -> Leakage:
    r"""Whether predictions lean on the very entries that they predict.

    Entries are dealt into folds at random. Every fold is predicted from the others, and once more from all entries, its
    own included:

    .. math:: \mathrm{gap} = \mathrm{bits}(\hat y_{tn} \mid y) - \mathrm{bits}(\hat y_{tn} \mid y_{-\mathrm{fold}(tn)})

    A posterior has some gap, as an entry is evidence of its own rate, and one that shrinks with the number of entries
    that a latent is seen through. An inference that copies has all of its score from it.

    Parameters
    ----------
    inference : callable
        From a recording, parts of which are hidden, to a dataset with ``expected`` (trial, time, unit).
    recording : Recording
        Counts; trials that the fit has not seen.
    folds : int
        One more call of the inference than this.
    seed : int

    References
    ----------
    Keshtkaran & Pandarinath, NeurIPS 2019: what coordinated dropout guards against.
    """
    _counts_only(recording, "input_leakage")
    if folds < 2:
        raise ValueError(f"folds must be at least 2, so that something is left to predict from, got {folds!r}")
    observed = recording.to_xarray()["observations"].values
    fold = np.random.default_rng(seed).integers(folds, size=observed.shape)
    hidden = np.full(observed.shape, np.nan)
    for k in range(folds):
        expected = _expected(inference(recording.hide(mask=fold == k)), recording)
        hidden[fold == k] = expected[fold == k]
    seen = bits_per_spike_over_trials(_expected(inference(recording), recording), observed)
    left = bits_per_spike_over_trials(hidden, observed)
    return Leakage(seen, left, seen - left)


def cycle_consistency(inference: Inference, recording: Recording, *, seed: int = 0) -> CycleConsistency:
    r"""Infer rates, simulate counts from them, and infer again: is the second answer the first?

    .. math:: y \to (\hat x, \hat\lambda) \to y' \sim \mathrm{Poisson}(\hat\lambda) \to (\hat x', \hat\lambda')

    Rates that follow dynamics which many entries share are found again, because the simulated noise is averaged over.
    Rates that hold the noise of single entries are not, since the simulated counts have another noise; and a latent is
    not whose part in the rates is small beside what it takes to infer it.

    Parameters
    ----------
    inference : callable
        From a recording to a dataset with ``expected`` (trial, time, unit) and, where it has latents, ``path``
        (trial, time, latent).
    recording : Recording
        Counts; trials that the fit has not seen.
    seed : int
        Of the simulated counts.

    References
    ----------
    After the cycle consistency of Versteeg et al., "Computation-through-Dynamics Benchmark" (2025), which regresses
    latents on the rates that they make; superfluous latents: Versteeg, Sedler, McCart & Pandarinath, arXiv:2309.06402.
    """
    _counts_only(recording, "cycle_consistency")
    first = inference(recording)
    rates = _expected(first, recording)
    counts = np.random.default_rng(seed).poisson(np.where(np.isfinite(rates), rates, 0.0)).astype(float)
    observed = recording.to_xarray()["observations"].values
    again = inference(recording.with_observations(counts))
    inside = np.isfinite(observed).any(-1)
    latents = np.nan
    if "path" in first:
        latents = rate_r2(first["path"].values[inside], again["path"].values[inside])
    copying = 1.0 - np.nanmean(observed, (0, 1)) / np.nanvar(observed, (0, 1))
    return CycleConsistency(rate_r2(rates[inside], _expected(again, recording)[inside]), latents, float(copying.mean()))


def _expected(found: xr.Dataset, recording: Recording) -> np.ndarray:
    values = found["expected"].transpose("trial", "time", "unit").values
    shape = (recording.num_trials, recording.num_bins, recording.num_units)
    if values.shape != shape:
        raise ValueError(f"inference returned expected (trial, time, unit) = {values.shape} for a recording of {shape}")
    return values


def _counts_only(recording: Recording, probe: str) -> None:
    if not recording.counts:
        raise RecordingError(f"{probe} scores and simulates counts, and the recording holds real values")
