"""The verbs: fit, simulate, predict."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from pyrodyn.checkpoint import Checkpoint
from pyrodyn.errors import ModelError, RecordingError
from pyrodyn.inference import SVI, collapse, collapses
from pyrodyn.inference.collapse import Collapsed
from pyrodyn.inference.engine import Engine, numerics, random_stream
from pyrodyn.posterior import (
    coordinates,
    draw_local,
    latent_coordinates,
    model_of,
    over_draws,
    parameters_of,
    path_summary,
    to_datatree,
    trial_batches,
    warn_of,
)
from pyrodyn.program import Labelled, LatentModel, StateSpaceModel, globals_given, is_random, specification
from pyrodyn.recording import Recording
from pyrodyn.sessions import pool, pooled_datatree, refuse_pooled

INTERVAL = (0.05, 0.95)
BEYOND = 100  # times the largest fitted count of a unit, from which an expected one is not believed
EXPECTED = ("expected", "expected_sd", "expected_lower", "expected_upper")


def fit(
    model: LatentModel | Collapsed,
    recording: Recording | Mapping[str, Recording],
    engine: Engine | None = None,
    *,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 10.0,
) -> xr.DataTree:
    """Fit a model to a recording.

    Parameters
    ----------
    model : LatentModel
        One of `pyrodyn.models`, or `inference.collapse` of one.
    recording : Recording, or mapping of session to Recording
        Several sessions at once pool what they have in common, partially: the edges of `models.MultiRegionLDS`, under
        `inference.Gibbs`. See `models.pooled_regions.PooledRegions` and `pyrodyn.sessions.pooled_datatree`.
    engine : Engine
        One of `pyrodyn.inference`; `SVI()` by default. Every engine returns the same variables, dims and coordinates.
    seed : int
        All randomness comes from it: the same seed, machine and versions give the same draws.
    checkpoint : path, optional
        A file in which the run keeps its state. A run that was killed and is called again with the same arguments
        resumes from it and ends with the same draws to the bit. The file stays until you delete it.
    checkpoint_every : float
        Seconds between two writes of that file: the most work that a kill can cost.

    Returns
    -------
    xarray.DataTree
        Groups ``posterior``, ``invariants``, ``unconstrained_posterior``, ``latents``, ``sample_stats``,
        ``log_likelihood``, ``observed_data``, ``constant_data``; see `pyrodyn.posterior.to_datatree`.

    Raises
    ------
    ModelError, ReadoutError
        Where the model does not fit the recording.
    NonFiniteError
        Where the density stays infinite or NaN; names the step and the site.
    """
    engine = SVI() if engine is None else engine
    base = model.model if isinstance(model, Collapsed) else model
    if not isinstance(base, LatentModel):
        raise ModelError(f"model must be one of pyrodyn.models, such as models.LDS(latent_dim=3), got {model!r}")
    described = _described(base)
    if isinstance(recording, Mapping):
        pooled = pool(base, recording, engine)
        for name, session in recording.items():
            _check_fittable(session, f"recording[{name!r}]")
        pooled.check(recording)
        digest: Any = {name: session.digest() for name, session in recording.items()}
    else:
        _check_fittable(recording, "recording")
        base.check(recording)
        digest = recording.digest()
    store = None
    if checkpoint is not None:
        fingerprint = {
            "model": described,
            "engine": specification(engine),
            "seed": seed,
            "recording": digest,
            "version": version("pyrodyn"),
        }
        store = Checkpoint(checkpoint, fingerprint=json.dumps(fingerprint, default=str), every=checkpoint_every)
    began = time.perf_counter()
    if isinstance(recording, Mapping):
        program: Any = pooled
        draws = engine.run(program, dict(recording), seed=seed, checkpoint=store)  # type: ignore[arg-type]
        return pooled_datatree(pooled, recording, engine, draws, seed=seed, seconds=time.perf_counter() - began)
    draws = engine.run(model, recording, seed=seed, checkpoint=store)
    return to_datatree(model, recording, engine, draws, seed=seed, seconds=time.perf_counter() - began)


def _check_fittable(recording: Any, name: str) -> None:
    if not isinstance(recording, Recording):
        raise RecordingError(
            f"{name} must be a pyrodyn.Recording, got {type(recording).__name__}; make one with "
            "Recording.from_arrays(values, bin_width=...), values being (trial, time, unit)"
        )
    if recording.observations is None:
        raise RecordingError(
            f"{name} has no observations to fit; give it some with recording.with_observations(values)"
        )


def _described(model: LatentModel) -> Any:
    """The model's specification; an hour's fit must not end in finding that its posterior cannot be labelled."""
    try:
        described = specification(model)
        json.dumps(described)
    except TypeError as error:
        raise ModelError(
            f"{type(model).__name__} must be a frozen dataclass whose options are plain values (numbers, strings, "
            f"tuples, other dataclasses), so that its posterior can say what was fitted; {error}"
        ) from error
    return described


def simulate(
    model: LatentModel, like: Recording, *, seed: int = 0, values: Mapping[str, Tensor] | None = None
) -> tuple[Recording, xr.Dataset]:
    """Draw parameters, paths and observations from a model.

    Parameters
    ----------
    model : LatentModel
    like : Recording
        Gives the shape, labels, inputs, mask, and the channels' units; its observations are not looked at, except for
        the choice of the gauge.
    seed : int
    values : mapping of site to Tensor, optional
        Sites held at a value instead of drawn from their prior.

    Returns
    -------
    recording : Recording
    truth : xarray.Dataset
        The parameters, and what is latent, such as ``path`` (trial, time, latent).
    """
    held = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in (values or {}).items()}
    with random_stream(seed), torch.no_grad(), numerics():
        drawn = poutine.trace(poutine.condition(model.sample_globals, data=held)).get_trace(like)
        sites: dict[str, Any] = {name: site["value"] for name, site in drawn.nodes.items() if is_random(site)}
        trace = poutine.trace(poutine.condition(model, data=sites)).get_trace(like.blank())
        parameters = globals_given(model, sites, like)
        labelled = model.label(parameters)
        values_of: dict[str, Any] = {name: site["value"] for name, site in trace.nodes.items() if is_random(site)}
        simulated = like.with_observations(values_of["observations"])
        local = {name: value for name, value in values_of.items() if name not in sites and name != "observations"}
        # A model may draw here what its program sums out, such as modes given a path.
        latents = model.latents(parameters, local, simulated)
    truth = xr.Dataset(
        {name: (dims, value.numpy()) for name, (dims, value) in labelled.items()},
        coords=coordinates(like, labelled, model),
    )
    shown = {name: (dims, value.numpy()) for name, (dims, value) in latents.items()}
    truth = truth.assign(shown).assign_coords(latent_coordinates(like, model, shown))
    return simulated, truth


def predict(
    posterior: xr.DataTree,
    recording: Recording,
    *,
    draws: int = 100,
    seed: int = 0,
    model: LatentModel | None = None,
) -> xr.Dataset:
    """Latents and expected observations of a recording, old or new, under a posterior.

    The path of every trial is inferred from that trial's own observed entries, with the globals held at posterior
    draws. To predict units from others, or bins from earlier ones, hide them first: ``predict(posterior,
    recording.hide(unit=...))``.

    Parameters
    ----------
    posterior : xarray.DataTree
        From `fit` or `load`.
    recording : Recording
        With the units of the posterior, in their order; any trials, of any length. Without observations, it is the
        prior of the path that is predicted.
    draws : int
        Evenly thinned posterior draws of the globals.
    seed : int
    model : LatentModel, optional
        Needed only for a model that is not in `pyrodyn.models`.

    Returns
    -------
    xarray.Dataset
        ``expected`` (trial, time, unit), the posterior mean of the expected observation, for counts in events a bin,
        with ``expected_sd`` and the 90% interval ``expected_lower``, ``expected_upper``; and what is latent, such as
        ``path`` and ``path_sd`` (trial, time, latent) or ``mode_probability`` (trial, time, mode).

    Warns
    -----
    FitWarning
        Where expected counts are beyond belief, by unit.
    """
    refuse_pooled(posterior, "predict")
    model = model_of(posterior) if model is None else model
    same_units(posterior, recording)
    parameters = parameters_of(posterior, model, draws)
    sizes = posterior["posterior"].sizes
    repeats = draws if sizes["chain"] * sizes["draw"] == 1 else 1
    parts: dict[str, list[np.ndarray]] = {}
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(EXPECTED, ("trial", "time", "unit"))
    with random_stream(seed), torch.no_grad(), numerics():
        for part in trial_batches(recording, draws):
            integrated = isinstance(model, StateSpaceModel) and collapses(model, part)
            of_part = _of_path(model, parameters, part) if integrated else _of_trials(model, parameters, part, repeats)
            for name, (names, value) in of_part.items():
                parts.setdefault(name, []).append(value.numpy())
                dims[name] = names
    found = {name: (dims[name], np.concatenate(values)) for name, values in parts.items()}
    coords = {"unit": recording.unit, "region": ("unit", recording.region)}
    dataset = xr.Dataset(found, coords=latent_coordinates(recording, model, found) | coords)
    dataset["expected"].attrs["units"] = "events per bin" if recording.counts else "units of the recording"
    _warn_of_tails(posterior, dataset, recording)
    return dataset


def _warn_of_tails(posterior: xr.DataTree, found: xr.Dataset, recording: Recording) -> None:
    """Complain of expected counts far beyond all that were fitted: the mean of a log-normal rate lies in its tail."""
    if not recording.counts:
        return
    seen = posterior["observed_data"]["observations"].max(("trial", "time")).fillna(0.0).values
    most = found["expected"].max(("trial", "time")).values
    far = most > BEYOND * np.maximum(seen, 1.0)
    if far.any():
        named = ", ".join(f"{unit} ({count:.0f})" for unit, count in zip(recording.unit[far], most[far], strict=True))
        warn_of(
            [
                f"expected counts a bin are more than {BEYOND} times the largest that was fitted, in units {named}: "
                "where a unit bursts or trials are few, a latent that is not known well makes its rate log-normal with "
                "a heavy tail; take readout=NegativeBinomial(), to which bursts are noise, leave these units out, or "
                "fit more trials"
            ],
            "predict",
            stacklevel=3,
        )


def _of_path(model: Any, parameters: Any, part: Recording) -> Labelled:
    """What `predict` returns of a Gauss-Markov path, means and variances in closed form."""
    law = collapse(model).path_posterior(parameters, part)
    readout = model.readout_law(parameters, law.mean, part)
    spread = readout.spread(law.covariance)
    expected = readout.law.marginal_mean(readout.predictor, spread, readout.noise).mean(0)
    drawn = readout.law.mean(readout.predict(law.sample()), readout.noise)
    return _bands(expected, drawn) | path_summary(law)


def _of_trials(model: LatentModel, parameters: Any, part: Recording, repeats: int) -> Labelled:
    """What `predict` returns of draws of what is latent."""
    local = draw_local(model, parameters, part, repeats)
    drawn = model.expected(parameters, local, part)
    return _bands(drawn.mean(0), drawn) | over_draws(model.latents(parameters, local, part), model, part)


def _bands(expected: Tensor, drawn: Tensor) -> Labelled:
    axes = ("trial", "time", "unit")
    lower, upper = np.quantile(drawn.numpy(), INTERVAL, axis=0)
    values = (expected, drawn.std(0, correction=0), torch.from_numpy(lower), torch.from_numpy(upper))
    return {name: (axes, value) for name, value in zip(EXPECTED, values, strict=True)}


def same_units(posterior: xr.DataTree, recording: Recording) -> None:
    """Refuse a recording whose units are not those of the posterior, in their order."""
    fitted: Any = posterior["constant_data"].coords["unit"].values
    if len(fitted) != recording.num_units or not np.array_equal(fitted.astype(str), recording.unit.astype(str)):
        missing = sorted(set(fitted.astype(str).tolist()) - set(recording.unit.astype(str).tolist()))[:5]
        raise RecordingError(
            f"the posterior was fitted to {len(fitted)} units and the recording has {recording.num_units}"
            + (f"; without {missing}" if missing else " in another order")
            + "; pass a recording with the same units, and hide those that were not observed: recording.hide(unit=...)"
        )
