"""Draws become one labelled posterior: an xarray.DataTree in ArviZ's schema, the same from every engine."""

from __future__ import annotations

import dataclasses
import json
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyrodyn import drifts, guides, inference, integrators, models, networks, readouts
from pyrodyn.diagnostics import diagnose
from pyrodyn.distributions import GaussMarkov
from pyrodyn.errors import ModelError
from pyrodyn.inference import LocalInference, LogDensity, collapse, collapses
from pyrodyn.inference.collapse import Collapsed
from pyrodyn.inference.engine import Draws, Engine, numerics, random_stream
from pyrodyn.program import (
    DrawsLocal,
    Labelled,
    LatentModel,
    Program,
    StateSpaceModel,
    draws_of,
    globals_given,
    log_terms,
    specification,
)
from pyrodyn.recording import Recording

PATH_DRAWS = 100  # draws of the globals over which a path's mean and sd are taken
STORED_PATHS = 20  # of these, paths kept whole
BATCH_NUMBERS = 4_000_000  # (draw, trial, time, unit) entries in one batched call: 32 MB a tensor
SCORED_NUMBERS = 30_000_000  # observed entries in all draws of a path-sampling engine whose evidence is computed
IN_LATENTS = {"path": "mean", "path_sd": "sd", "path_draws": "draws"}  # names in the group `latents`
SESSIONS = "sessions"  # the group of the posteriors of several sessions
PATH_STREAM = 1_000_003  # a random stream that no chain uses


class FitWarning(UserWarning):
    """The engine finished, and its posterior should not be trusted as it is."""


def to_datatree(
    model: Program, recording: Recording, engine: Any, draws: Draws, *, seed: int, seconds: float, label: str = ""
) -> xr.DataTree:
    """Assemble the posterior of one fit.

    Groups, each with labelled dims and coordinates: ``posterior`` (chain, draw, ...), ``invariants`` (what no symmetry
    of the model changes), ``unconstrained_posterior``, ``latents`` (mean, sd, and thinned draws of the path),
    ``sample_stats``, ``log_likelihood`` (chain, draw, trial; the path integrated out), ``observed_data``,
    ``constant_data``. Warnings begin with ``label``.
    """
    base = model.model if isinstance(model, Collapsed) else model
    if not isinstance(base, LatentModel):
        raise ModelError(
            f"fit takes a model of pyrodyn.models or a LatentModel of your own, got {type(model).__name__}"
        )
    lead = next(iter(draws.samples.values())).shape[:2]
    flat = {name: value.flatten(0, 1).unsqueeze(1) for name, value in draws.samples.items()}  # (draw, 1, *event)
    stats = {name: value.numpy() for name, value in draws.stats.items()}
    groups: dict[str, xr.Dataset] = {}
    with torch.no_grad(), numerics():
        parameters = globals_given(base, flat, recording)
        labelled, invariants = base.label(parameters), base.invariants(parameters)
        coords = coordinates(recording, labelled | invariants | draws.details, base)
        groups["posterior"] = _dataset(labelled, lead, coords).assign_attrs(base.attributes(recording))
        groups["invariants"] = _dataset(invariants, lead, coords)
        groups["unconstrained_posterior"] = _unconstrained(base, recording, flat, lead)
        estimator = "none"
        if collapses(base, recording):
            estimator = "exact" if collapse(base).is_exact else "Laplace"
            chosen = np.arange(lead[1])
            if draws.local and estimator == "Laplace":
                # The engine did not need it, and each takes a search for the path: as many as are worth waiting for.
                cost = lead[0] * recording.num_trials * recording.num_bins * recording.num_units
                chosen = thinned(lead[1], max(5, SCORED_NUMBERS // cost))
            some = {n: v.unflatten(0, lead)[:, chosen].flatten(0, 1) for n, v in flat.items()}
            shared, of_trials = _scores(base, recording, some)
            if len(chosen) == lead[1]:
                stats["lp"] = (shared + of_trials.sum(-1)).reshape(lead).numpy()
            groups["log_likelihood"] = xr.Dataset(
                {"observations": (("chain", "draw", "trial"), of_trials.reshape(lead[0], len(chosen), -1).numpy())},
                coords={"chain": np.arange(lead[0]), "draw": chosen, "trial": recording.trial},
            )
        groups["latents"] = _latents(base, recording, flat, draws, seed)
    history = {name: (("step",), value) for name, value in draws.history.items()}
    details = {name: (axes, value.flatten(0, 1).unsqueeze(1)) for name, (axes, value) in draws.details.items()}
    groups["sample_stats"] = _dataset(details, lead, coords).assign(
        {name: (("chain", "draw"), value) for name, value in stats.items()} | history
    )
    data = recording.to_xarray()
    groups["observed_data"] = data[["observations"]].drop_attrs()
    groups["constant_data"] = data.drop_vars("observations")
    found = diagnose(groups["invariants"], groups["sample_stats"], draws.notes.get("superchains"))
    warn_of((*draws.warnings, *found.complaints), label, stacklevel=4)
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {
        "pyrodyn_version": version("pyrodyn"),
        "model": json.dumps(specification(base)),
        "engine": json.dumps(specification(engine), default=name_of),
        "seed": int(seed),
        "path_treatment": draws.treatment,
        "log_likelihood_estimator": estimator,
        "wall_time_seconds": float(seconds),
        "notes": json.dumps(draws.notes),
        "diagnostics": json.dumps(found.values),
        "warnings": json.dumps([*draws.warnings, *found.complaints, *found.remarks]),
        "versions": json.dumps({"python": platform.python_version()} | {p: version(p) for p in _PACKAGES}),
    }
    return tree


def warn_of(complaints: Iterable[str], label: str = "", *, stacklevel: int) -> None:
    """Warn of what is wrong with a posterior, ``stacklevel`` calls up from the caller."""
    for complaint in complaints:
        warnings.warn(f"{label}: {complaint}" if label else complaint, FitWarning, stacklevel=stacklevel + 1)


def recording_of(posterior: xr.DataTree) -> Recording:
    """The recording a posterior was fitted to."""
    observed = posterior["observed_data"].to_dataset()
    return Recording.from_xarray(posterior["constant_data"].to_dataset().assign(observations=observed["observations"]))


def model_of(posterior: xr.DataTree) -> LatentModel:
    """The model a posterior was fitted with, rebuilt from its specification; only classes of the zoo are known."""
    return build_model(json.loads(posterior.attrs["model"]))


def engine_of(posterior: xr.DataTree) -> Engine:
    """The engine a posterior was fitted with, rebuilt from its specification; only the library's own are known."""
    return build_engine(json.loads(posterior.attrs["engine"]))


def build_model(spec: Any) -> LatentModel:
    """The model of a `specification`."""
    kinds = {name: getattr(models, name) for name in models.__all__}
    for options in (readouts, networks, drifts, integrators):
        kinds |= {name: getattr(options, name) for name in options.__all__}
    return _build(spec, kinds)


def build_engine(spec: Any) -> Engine:
    """The engine of a `specification`."""
    kinds = {name: getattr(inference, name) for name in inference.__all__}
    kinds |= {name: item for name, item in vars(guides).items() if dataclasses.is_dataclass(item)}
    if spec.get("class") not in kinds or isinstance(spec.get("guide"), str):
        raise ModelError(
            f"the engine {spec.get('class')!r} (guide {spec.get('guide')!r}) is not one of pyrodyn's with one of its "
            "guides; say what to refit with, such as refit=inference.HMC()"
        )
    return _build(spec, kinds)


def parameters_of(posterior: xr.DataTree, model: LatentModel, draws: int) -> Any:
    """Parameters of ``draws`` evenly thinned posterior draws, each (draw, 1, *event)."""
    sizes = posterior["posterior"].sizes
    return parameters_at(posterior, model, thinned(sizes["chain"] * sizes["draw"], draws))


def parameters_at(posterior: xr.DataTree, model: LatentModel, chosen: np.ndarray) -> Any:
    """Parameters of the draws at these positions in (chain x draw), each (draw, 1, *event)."""
    dataset = posterior["posterior"].to_dataset()
    total = dataset.sizes["chain"] * dataset.sizes["draw"]
    values = {
        str(name): torch.from_numpy(variable.values.reshape(total, 1, *variable.shape[2:])[chosen])
        for name, variable in dataset.data_vars.items()
    }
    return model.unlabel(values)


def thinned(total: int, wanted: int) -> np.ndarray:
    """Positions of ``wanted`` draws spread evenly over ``total``."""
    return np.unique(np.linspace(0, total - 1, min(total, wanted)).round().astype(int))


def trial_batches(recording: Recording, draws: int) -> Iterator[Recording]:
    """The recording in parts of whole trials, small enough for ``draws`` draws in one call."""
    share = draws * recording.num_bins * recording.num_units
    size = max(1, BATCH_NUMBERS // share)
    for start in range(0, recording.num_trials, size):
        yield recording.isel(trial=slice(start, start + size))


def path_summary(law: GaussMarkov) -> Labelled:
    """Mean and sd of a mixture of paths over draws, in closed form."""
    mean, variance = law.mean, law.variance
    axes = ("trial", "time", "latent")
    return {
        "path": (axes, mean.mean(0)),
        "path_sd": (axes, (variance.mean(0) + mean.var(0, correction=0)).sqrt()),
    }


def over_draws(latents: Labelled, model: LatentModel, recording: Recording) -> Labelled:
    """Means and sds over the first axis of what `LatentModel.latents` gives; probabilities of whole numbers."""
    found: Labelled = {}
    for name, (dims, value) in latents.items():
        if value.is_floating_point():
            found |= {name: (dims, value.mean(0)), f"{name}_sd": (dims, value.std(0, correction=0))}
            continue
        dim = name.removesuffix("_path")
        each = torch.arange(len(model.coordinates(recording)[dim]))
        share = torch.stack([(value == k).double().mean(0) for k in each], -1)
        found[f"{dim}_probability"] = (*dims, dim), share
    return found


def draw_local(model: LatentModel, parameters: Any, recording: Recording, repeats: int = 1) -> dict[str, Tensor]:
    """The sites of trials, each (draw, trial, *event), given observations and the parameters of every draw.

    ``repeats`` is how many are drawn for every draw of the parameters, unless the path is integrated out: of a point
    estimate there is but one.
    """
    if isinstance(model, DrawsLocal):
        draws = len(next(part for part in parameters if part is not None))
        every = np.repeat(np.arange(draws), repeats)
        return model.draw_local(draws_of(parameters, every) if repeats > 1 else parameters, recording)
    if collapses(model, recording):
        return {"latent": collapse(model).path_posterior(parameters, recording).sample()}
    return LocalInference().infer(model, parameters, recording).sample(repeats)


def coordinates(recording: Recording, labelled: Labelled, model: LatentModel) -> dict[str, Any]:
    """Coordinates for every dim that the labelled values use."""
    known: dict[str, Any] = {
        "unit": recording.unit,
        "region": ("unit", recording.region),
        "trial": recording.trial,
        "input": np.asarray(recording.input_names, dtype=str),
    } | model.coordinates(recording)
    used = {
        dim: size
        for dims, value in labelled.values()
        for dim, size in zip(dims, value.shape[value.dim() - len(dims) :], strict=True)
    }
    found = {dim: known.get(dim, np.arange(size)) for dim, size in used.items()}
    # Coordinates along a dim that is used, such as the region of every unit.
    return found | {n: c for n, c in known.items() if isinstance(c, tuple) and c[0] in used}


def latent_coordinates(recording: Recording, model: LatentModel, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Coordinates of what is latent in trials, given as name -> (dims, values)."""
    sizes = {dim: size for dims, values in variables.values() for dim, size in zip(dims, values.shape, strict=True)}
    known = {"trial": recording.trial, "time": recording.time} | model.coordinates(recording)
    of_dims = {n: c for n, c in known.items() if (c[0] if isinstance(c, tuple) else n) in sizes}
    return {dim: np.arange(size) for dim, size in sizes.items() if dim != "path_draw"} | of_dims


def _scores(model: LatentModel, recording: Recording, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log prior (draw,) and log likelihood (draw, trial), the path integrated out, in batches of draws."""
    program = collapse(model)
    draws = len(next(iter(values.values())))
    share = recording.num_trials * recording.num_bins * recording.num_units
    size = max(1, BATCH_NUMBERS // share)
    parts = [
        log_terms(program, {name: value[start : start + size] for name, value in values.items()}, recording)
        for start in range(0, draws, size)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _latents(
    model: LatentModel, recording: Recording, values: Mapping[str, Tensor], draws: Draws, seed: int
) -> xr.Dataset:
    """Mean, sd and some whole draws of what is latent in the trials."""
    chains, number = next(iter(draws.samples.values())).shape[:2]
    if draws.local:
        positions = np.arange(number) if draws.kept is None else draws.kept
        chosen = (np.arange(chains)[:, None] * number + positions).reshape(-1)
        local = {name: value.flatten(0, 1) for name, value in draws.local.items()}
    elif collapses(model, recording):
        chosen = thinned(chains * number, PATH_DRAWS)
        local = None
    else:
        return xr.Dataset()
    parameters = globals_given(model, {name: value[chosen] for name, value in values.items()}, recording)
    stored = torch.from_numpy(thinned(len(chosen), STORED_PATHS))
    dims: dict[str, tuple[str, ...]] = {}
    parts: dict[str, list[Tensor]] = {}
    start = 0
    with random_stream(seed, PATH_STREAM):
        for part in trial_batches(recording, len(chosen)):
            own = None if local is None else {n: v[:, start : start + part.num_trials] for n, v in local.items()}
            shown, whole = _of_part(model, parameters, part, own)
            shown |= {f"{name}_draws": (("path_draw", *names), v[stored]) for name, (names, v) in whole.items()}
            for name, (names, value) in shown.items():
                parts.setdefault(name, []).append(value)
                dims[name] = names
            start += part.num_trials
    found = {
        IN_LATENTS.get(name, name): (dims[name], torch.cat(batches, dims[name].index("trial")).numpy())
        for name, batches in parts.items()
    }
    return xr.Dataset(found, coords=latent_coordinates(recording, model, found))


def _of_part(
    model: LatentModel, parameters: Any, part: Recording, local: dict[str, Tensor] | None
) -> tuple[Labelled, Labelled]:
    """Means and sds over draws, and the draws, of what is latent; drawn anew where ``local`` is None."""
    if local is None and isinstance(model, StateSpaceModel):
        law = collapse(model).path_posterior(parameters, part)
        return path_summary(law), model.latents(parameters, {"latent": law.sample()}, part)
    whole = model.latents(parameters, draw_local(model, parameters, part) if local is None else local, part)
    return over_draws(whole, model, part), whole


def _dataset(labelled: Labelled, lead: torch.Size, coords: Mapping[str, Any]) -> xr.Dataset:
    """Values (draw, 1, *event) as variables (chain, draw, *event)."""
    variables = {}
    for name, (dims, value) in labelled.items():
        event = value.shape[value.dim() - len(dims) :]
        full = value.expand(
            lead.numel(), *(value.shape[value.dim() - len(dims) - 1 :] if value.dim() > len(dims) else (1, *event))
        )
        variables[name] = (("chain", "draw", *dims), full.reshape(*lead, *event).numpy())
    used = {dim for dims, _ in variables.values() for dim in dims}
    kept = {n: c for n, c in coords.items() if n in used or (isinstance(c, tuple) and c[0] in used)}
    return xr.Dataset(variables, coords=_index(lead) | kept)


def _unconstrained(
    model: LatentModel, recording: Recording, values: Mapping[str, Tensor], lead: torch.Size
) -> xr.Dataset:
    program = collapse(model) if collapses(model, recording) else model
    sites = [site for site in LogDensity(program, recording).sites if not site.local and site.name in values]
    return xr.Dataset(
        {
            site.name: (
                ("chain", "draw", f"{site.name}_coordinate"),
                site.transform.inv(values[site.name]).reshape(*lead, -1).numpy(),
            )
            for site in sites
        },
        coords=_index(lead),
    )


def _index(lead: torch.Size) -> dict[str, Any]:
    return {"chain": np.arange(lead[0]), "draw": np.arange(lead[1])}


def _build(spec: Any, kinds: Mapping[str, Any]) -> Any:
    if isinstance(spec, dict) and "class" in spec:
        if spec["class"] not in kinds:
            raise ModelError(
                f"this posterior was fitted with {spec['class']!r}, which is not in pyrodyn.models; "
                "hand your own model over as predict(..., model=...)"
            )
        return kinds[spec["class"]](**{name: _build(value, kinds) for name, value in spec.items() if name != "class"})
    return [_build(part, kinds) for part in spec] if isinstance(spec, list) else spec


def name_of(something: Any) -> str:
    """Callables among an engine's options are named, never stored."""
    return f"{getattr(something, '__module__', '?')}.{getattr(something, '__qualname__', type(something).__name__)}"


_PACKAGES = ("torch", "pyro-ppl", "numpy", "xarray")


def to_inferencedata(posterior: xr.DataTree) -> Any:
    """The posterior for users of ArviZ 0.x, as an ``arviz.InferenceData``.

    Raises
    ------
    ImportError
        Where ArviZ 0.x is not installed; ArviZ 1.x reads the DataTree as it is.
    """
    import arviz  # pyright: ignore[reportMissingImports]

    if not hasattr(arviz, "InferenceData"):
        raise ImportError("this arviz is 1.x and has no InferenceData: hand it the DataTree itself")
    return arviz.InferenceData.from_datatree(posterior)
