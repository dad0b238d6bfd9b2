r"""Does a model make data like those it was fitted to? Replicated data, and where the real ones lie among them.

For a statistic T and data :math:`y^{rep}` replicated from the posterior predictive, the Bayesian p-value is
:math:`P(T(y^{rep}) > T(y)) + \tfrac12 P(T(y^{rep}) = T(y))`: near zero or one, the model cannot make what was seen.

Reference: Gelman, Meng & Stern, Stat. Sinica 6:733 (1996).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine

from pyrodyn import statistics
from pyrodyn.errors import ModelError, RecordingError
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.posterior import (
    BATCH_NUMBERS,
    draw_local,
    latent_coordinates,
    model_of,
    parameters_at,
    recording_of,
    thinned,
)
from pyrodyn.program import IntegratedModel, LatentModel, StateSpaceModel, globals_given, is_random, trial_plate
from pyrodyn.recording import Recording

EXTREME = 0.01  # p-values below it, or above one minus it, are counted
REPLICATE_STREAM = 1_000_051  # a random stream that nothing else uses

Replicable = StateSpaceModel | IntegratedModel
Parameters = Callable[[np.ndarray], Any]  # positions of draws -> parameters


def posterior_predictive(
    posterior: xr.DataTree,
    recording: Recording | None = None,
    *,
    draws: int = 50,
    new_paths: bool = True,
    seed: int = 0,
    model: LatentModel | None = None,
) -> xr.DataArray:
    """Replicated observations under a posterior.

    Parameters
    ----------
    posterior : xarray.DataTree
    recording : Recording, optional
        Gives trials, bins, inputs and mask; by default the one that was fitted.
    draws : int
        Evenly thinned posterior draws, one replicate each.
    new_paths : bool
        True: new trials, with paths from their law given the globals. False: the same trials again, with paths drawn
        given their observations, so that only the noise of the readout is new.
    seed : int
    model : LatentModel, optional
        For a model that is not in `pyrodyn.models`.

    Returns
    -------
    xarray.DataArray, (replicate, trial, time, unit)
        NaN where the recording was not observed.
    """
    model, recording = _of_posterior(posterior, recording, model)
    parameters, chosen = _posterior_parameters(posterior, model, draws)
    parts = list(_replicates(model, parameters, chosen, recording, new_paths, seed))
    return _labelled(np.concatenate(parts), recording)


def prior_predictive(model: LatentModel, like: Recording, *, draws: int = 50, seed: int = 0) -> xr.DataArray:
    """Observations drawn from a model before it has seen any, (replicate, trial, time, unit); see `simulate`.

    ``like`` gives shape, labels, inputs, mask, and the channels' units.
    """
    model = _replicable(model)
    parameters = _prior_parameters(model, like, draws, seed)
    return _labelled(np.concatenate(list(_replicates(model, parameters, np.arange(draws), like, True, seed))), like)


def replicated_latents(
    posterior: xr.DataTree,
    recording: Recording | None = None,
    *,
    draws: int = 50,
    seed: int = 0,
    model: LatentModel | None = None,
) -> xr.Dataset:
    """What is latent in new trials under a posterior, such as ``mode_path`` (replicate, trial, time).

    Parameters are those of `posterior_predictive`; the observations of ``recording`` are not looked at.
    """
    model, recording = _of_posterior(posterior, recording, model)
    parameters, chosen = _posterior_parameters(posterior, model, draws)
    parts: dict[str, list[np.ndarray]] = {}
    dims: dict[str, tuple[str, ...]] = {}
    with random_stream(seed, REPLICATE_STREAM), numerics(), torch.no_grad():
        for some in _batches(chosen, recording):
            given = parameters(some)
            with trial_plate(recording):
                trace = poutine.trace(model.trials).get_trace(given, recording.blank())
            local: dict[str, Any] = {name: site["value"] for name, site in trace.nodes.items() if is_random(site)}
            for name, (names, value) in model.latents(given, local, recording.blank()).items():
                parts.setdefault(name, []).append(value.numpy())
                dims[name] = ("replicate", *names)
    found = {name: (dims[name], np.concatenate(values)) for name, values in parts.items()}
    return xr.Dataset(found, coords=latent_coordinates(recording, model, found))


def check(
    posterior: xr.DataTree | LatentModel,
    recording: Recording | None = None,
    *,
    draws: int = 200,
    window: float | None = None,
    lags: int = 10,
    new_paths: bool = True,
    seed: int = 0,
    model: LatentModel | None = None,
) -> xr.Dataset:
    """Compare statistics of the data with those of replicated data.

    Parameters
    ----------
    posterior : xarray.DataTree, or a model
        A model is checked by its prior, on ``recording``.
    recording : Recording, optional
        By default the one that was fitted.
    draws : int
        Replicates.
    window : float, optional
        Seconds over which counts are summed for their dispersion; by default a whole trial, or a tenth of the longest
        where there are fewer than ten.
    lags : int
        Of the autocorrelation, in bins.
    new_paths : bool
        See `posterior_predictive`.
    seed : int
    model : LatentModel, optional
        For a posterior of a model that is not in `pyrodyn.models`.

    Returns
    -------
    xarray.Dataset
        For each statistic, such as ``rate``, its value in the data, ``rate_replicated`` with a dim ``replicate`` in
        front, and ``rate_p``, the Bayesian p-value: ``rate`` (unit) and ``dispersion`` (unit), the Fano factor of
        counts in windows; ``correlation`` (unit, other_unit); ``autocorrelation`` (unit, lag); ``psth`` (condition,
        time), the mean over units; ``locking`` (unit), how far a unit's PSTH strays from its mean. ``extreme``
        (statistic) is the share of p-values outside .01 to .99; 2% would be in a model that is right.

    Raises
    ------
    RecordingError
        Where the recording has no observations.
    """
    if isinstance(posterior, LatentModel):
        if recording is None:
            raise ModelError("check of a model's prior needs a recording: check(model, recording)")
        model = _replicable(posterior)
        parameters, chosen = _prior_parameters(model, recording, draws, seed), np.arange(draws)
    else:
        model, recording = _of_posterior(posterior, recording, model)
        parameters, chosen = _posterior_parameters(posterior, model, draws)
    if recording.observations is None:
        raise RecordingError("recording has no observations to check a model against")
    length = _window(recording, window)
    lags = min(lags, recording.num_bins - 1)
    parts: dict[str, list[np.ndarray]] = {}
    for values in _replicates(model, parameters, chosen, recording, new_paths, seed):
        for name, found in _statistics(values, recording, length, lags).items():
            parts.setdefault(name, []).append(found)
    seen = _statistics(recording.to_xarray()["observations"].values[None], recording, length, lags)
    return _assembled(seen, {name: np.concatenate(found) for name, found in parts.items()}, recording, length, lags)


def _of_posterior(
    posterior: xr.DataTree, recording: Recording | None, model: LatentModel | None
) -> tuple[Replicable, Recording]:
    found = _replicable(model_of(posterior) if model is None else model)
    return found, recording_of(posterior) if recording is None else recording


def _replicable(model: LatentModel) -> Replicable:
    if not isinstance(model, (StateSpaceModel, IntegratedModel)):
        raise ModelError(f"replicated data need a StateSpaceModel or an IntegratedModel, got {type(model).__name__}")
    return model


def _posterior_parameters(posterior: xr.DataTree, model: Replicable, draws: int) -> tuple[Parameters, np.ndarray]:
    sizes = posterior["posterior"].sizes
    chosen = thinned(sizes["chain"] * sizes["draw"], draws)
    return lambda some: parameters_at(posterior, model, some), chosen


def _prior_parameters(model: Replicable, like: Recording, draws: int, seed: int) -> Parameters:
    with random_stream(seed), numerics(), torch.no_grad(), pyro.plate("draw", draws, dim=-2):
        trace = poutine.trace(model.sample_globals).get_trace(like)
    sites: dict[str, Any] = {name: site["value"] for name, site in trace.nodes.items() if is_random(site)}

    def parameters(chosen: np.ndarray) -> Any:
        some = torch.from_numpy(chosen)
        return globals_given(model, {name: value[some] for name, value in sites.items()}, like)

    return parameters


def _replicates(
    model: Replicable,
    parameters: Parameters,
    chosen: np.ndarray,
    recording: Recording,
    new_paths: bool,
    seed: int,
) -> Iterator[np.ndarray]:
    """Observations (some draws, trial, time, unit) in batches, NaN where the recording was not observed."""
    hidden = None if recording.mask is None else ~recording.mask.numpy()
    with random_stream(seed, REPLICATE_STREAM), numerics(), torch.no_grad():
        for some in _batches(chosen, recording):
            values = _replicated(model, parameters(some), len(some), recording, new_paths).numpy()
            yield values if hidden is None else np.where(hidden, np.nan, values)


def _batches(chosen: np.ndarray, recording: Recording) -> Iterator[np.ndarray]:
    """Positions of draws, few enough at a time for one call."""
    size = max(1, BATCH_NUMBERS // (recording.num_trials * recording.num_bins * recording.num_units))
    for start in range(0, len(chosen), size):
        yield chosen[start : start + size]


def _replicated(model: Replicable, given: Any, draws: int, recording: Recording, new_paths: bool) -> torch.Tensor:
    """Observations (draw, trial, time, unit), one replicate for every draw of the parameters."""
    local = {} if new_paths else draw_local(model, given, recording)
    if isinstance(model, IntegratedModel):
        with poutine.block(), poutine.condition(data=local), trial_plate(recording):
            return model.trials(given, recording.blank())
    path = local.get("latent")
    if path is None:
        path = model.latent_path(given, recording).expand(torch.Size((draws, recording.num_trials))).sample()
    return model.readout_law(given, path, recording).sample()


def _statistics(values: np.ndarray, recording: Recording, window: int, lags: int) -> dict[str, np.ndarray]:
    condition = recording.condition.astype(str)
    return {
        "rate": statistics.rate(values),
        "dispersion": statistics.dispersion(values, window, recording.counts),
        "correlation": statistics.correlation(values),
        "autocorrelation": statistics.autocorrelation(values, lags),
        "psth": statistics.psth(values, condition),
        "locking": statistics.locking(values, condition),
    }


DIMS = {
    "rate": ("unit",),
    "dispersion": ("unit",),
    "correlation": ("unit", "other_unit"),
    "autocorrelation": ("unit", "lag"),
    "psth": ("condition", "time"),
    "locking": ("unit",),
}


def _window(recording: Recording, seconds: float | None) -> int:
    if seconds is None:
        bins = int(recording.lengths.min())
        return bins if recording.num_trials >= 10 else max(1, int(recording.lengths.max()) // 10)
    found = round(seconds / recording.bin_width)
    if not 1 <= found <= recording.num_bins:
        raise RecordingError(
            f"window must lie between one bin ({recording.bin_width:g} s) and a trial "
            f"({recording.num_bins * recording.bin_width:g} s), got {seconds:g} s"
        )
    return found


def _assembled(
    seen: dict[str, np.ndarray], replicated: dict[str, np.ndarray], recording: Recording, window: int, lags: int
) -> xr.Dataset:
    units = {"rate", "psth", "locking"} if recording.counts else set()
    found: dict[str, Any] = {}
    shares = []
    for name, dims in DIMS.items():
        data, drawn = seen[name][0], replicated[name]
        with np.errstate(invalid="ignore"):
            place = (drawn > data).mean(0) + 0.5 * (drawn == data).mean(0)
        known = np.isfinite(data) & np.isfinite(drawn).all(0)
        if name == "correlation":
            known = known & np.tri(*known.shape, k=-1, dtype=bool)  # every pair once
        shares.append(((place < EXTREME) | (place > 1.0 - EXTREME))[known].mean() if known.any() else np.nan)
        per = 1.0 / recording.bin_width if name in units else 1.0
        attrs = {"units": "events/s"} if name in units else {}
        found[name] = (dims, per * data, attrs)
        found[f"{name}_replicated"] = (("replicate", *dims), per * drawn, attrs)
        found[f"{name}_p"] = (dims, np.where(np.isfinite(data), place, np.nan))
    found["extreme"] = ("statistic", np.array(shares))
    return xr.Dataset(
        found,
        coords={
            "unit": recording.unit,
            "region": ("unit", recording.region),
            "other_unit": recording.unit.copy(),
            "lag": np.arange(1, lags + 1),
            "condition": np.unique(recording.condition.astype(str)),
            "time": recording.time,
            "statistic": list(DIMS),
        },
        attrs={"window_seconds": window * recording.bin_width, "counts": int(recording.counts)},
    )


def _labelled(values: np.ndarray, recording: Recording) -> xr.DataArray:
    return xr.DataArray(
        values,
        dims=("replicate", "trial", "time", "unit"),
        coords={
            "trial": recording.trial,
            "time": recording.time,
            "unit": recording.unit,
            "region": ("unit", recording.region),
        },
        name="observations",
    )
