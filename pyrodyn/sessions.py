"""Several sessions in one fit: what they share, and a posterior for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from pyrodyn.diagnostics import diagnose
from pyrodyn.errors import ModelError, RecordingError
from pyrodyn.inference import Gibbs
from pyrodyn.inference.engine import Draws
from pyrodyn.models.pooled_regions import PooledRegions
from pyrodyn.posterior import SESSIONS, to_datatree, warn_of
from pyrodyn.program import LatentModel, specification
from pyrodyn.recording import Recording

EDGE = ("chain", "draw", "target", "source")


def pool(model: LatentModel, recordings: Mapping[str, Recording], engine: Any) -> PooledRegions:
    """The model of several sessions.

    Raises
    ------
    ModelError, RecordingError
        Where the model or the engine does not pool sessions, or a session's name cannot be one.
    """
    if not recordings:
        raise RecordingError("recording is a mapping without sessions; pass {name: Recording, ...}")
    wrong = [name for name in recordings if not isinstance(name, str) or not name or "/" in name]
    if wrong:
        raise RecordingError(f"names of sessions must be strings without '/', got {wrong}")
    pooled = PooledRegions(model)  # type: ignore[arg-type]
    if not isinstance(engine, Gibbs):
        raise ModelError(
            f"several sessions at once need inference.Gibbs(), got {type(engine).__name__}; with it, or one session "
            "at a time"
        )
    return pooled


def pooled_datatree(
    pooled: PooledRegions, recordings: Mapping[str, Recording], engine: Any, draws: Draws, *, seed: int, seconds: float
) -> xr.DataTree:
    """Posterior of several sessions.

    The group ``posterior`` holds what they share: ``edge_rate`` (chain, draw, target, source), the share of sessions in
    which an edge is there; ``edge_size`` (chain, draw, target, source), the root mean square of the norm of its block
    where it is; and ``size_spread`` (chain, draw), the standard deviation of a session's log size about it. Pairs that
    cannot have an edge are NaN. ``sessions/<name>`` is a posterior like that of one session: predict, save, or ask
    it for its coupling graph. What it lacks is ``lp``, which belongs to all sessions together.
    """
    law = pooled.law(recordings)
    names = list(dict.fromkeys(name for edge in law.edges for name in edge))
    target = [names.index(edge[1]) for edge in law.edges]
    source = [names.index(edge[0]) for edge in law.edges]

    def matrix(value: Tensor) -> tuple[tuple[str, ...], np.ndarray]:
        wide = np.full((*value.shape[:2], len(names), len(names)), np.nan)
        wide[..., target, source] = value.numpy()
        return EDGE, wide

    shared = {name: draws.samples[name] for name in ("rate", "log_size", "log_spread")}
    variables = {
        "edge_rate": matrix(shared["rate"]),
        "edge_size": matrix(shared["log_size"].exp()),
        "size_spread": (EDGE[:2], shared["log_spread"].exp().numpy()),
    }
    chains, number = shared["rate"].shape[:2]
    coords = {"chain": np.arange(chains), "draw": np.arange(number), "target": names, "source": names}
    free = (~law.certain).numpy()
    index = {name: coords[name] for name in EDGE[:2]}
    seen = {
        "edge_rate": ((*EDGE[:2], "edge"), shared["rate"].numpy()[..., free]),
        "edge_log_size": ((*EDGE[:2], "edge_of_all"), shared["log_size"].numpy()),
    }
    found = diagnose(xr.Dataset(seen, coords=index), xr.Dataset(coords=index))
    warn_of(found.complaints, "what sessions share", stacklevel=4)
    children = {}
    for name, recording in recordings.items():
        own = replace(
            draws,
            samples=_of(name, draws.samples, "log_size"),
            local=_of(name, draws.local),
            details=_of(name, draws.details),
        )
        model = pooled.of(recording)
        child = to_datatree(model, recording, engine, own, seed=seed, seconds=seconds, label=f"session {name!r}")
        child["sample_stats"] = child["sample_stats"].to_dataset().drop_vars("lp", errors="ignore")
        children[name] = child
    tree = xr.DataTree(
        children={
            "posterior": xr.DataTree(xr.Dataset(variables, coords=coords)),
            SESSIONS: xr.DataTree(children=children),
        }
    )
    first = next(iter(children.values())).attrs
    tree.attrs = first | {
        "model": json.dumps(specification(pooled.model)),
        SESSIONS: json.dumps(list(recordings)),
        "diagnostics": json.dumps(found.values),
        "warnings": json.dumps([*found.complaints, *found.remarks]),
    }
    return tree


def refuse_pooled(posterior: xr.DataTree, verb: str) -> None:
    """Raise an error where a verb for one session is given the posterior of several."""
    if SESSIONS in posterior.children:
        names = list(posterior[SESSIONS].children)
        raise ModelError(
            f"{verb} takes the posterior of one session, and this one is of {names}; pass "
            f"posterior['{SESSIONS}/{names[0]}']"
        )


def _of(name: str, held: Mapping[str, Any], *without: str) -> dict[str, Any]:
    """A session's own part."""
    inside = {n.removeprefix(f"{name}/"): v for n, v in held.items() if n.startswith(f"{name}/")}
    return {n: v for n, v in inside.items() if n not in without}
