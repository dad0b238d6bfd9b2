"""Choose what to train with: many short runs, of which the best go on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pyrodyn.comparison.grid import check_stored, column, points_of
from pyrodyn.errors import ComparisonError, NonFiniteError
from pyrodyn.fitting import fit
from pyrodyn.inference import SVI
from pyrodyn.program import LatentModel
from pyrodyn.recording import Recording
from pyrodyn.storage import load, save


def tune(
    candidate: Callable[..., tuple[LatentModel, SVI]],
    grid: Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Any]],
    recording: Recording,
    *,
    rungs: int = 3,
    factor: int = 3,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> tuple[xr.DataTree, xr.Dataset]:
    """Find by successive halving the options that explain held-out trials best.

    On the first rung every point of the grid is trained for a share of its steps; the best, one in ``factor``, are
    trained again with ``factor`` times as many, until those of the last rung have all their steps. Every run starts
    anew, so that its schedules are whole. All hold back the same trials, as the engine's `EarlyStopping` says.

    Parameters
    ----------
    candidate : callable
        From the values of a point, by keyword, to a model and an `SVI` engine that stops early.
    grid : mapping of name to values, or sequence of points
        All combinations of the values; or the points themselves, each a mapping.
    recording : Recording
    rungs : int
    factor : int
        At least 2.
    seed : int
        Of every run.
    folder : path, optional
        Keeps the state of the run that is under way and the posteriors of those that ended: called again with the same
        arguments, the search goes on where it was stopped.

    Returns
    -------
    posterior : xarray.DataTree
        Of the best point with all its steps.
    table : xarray.Dataset
        ``held_out_bound`` (rung, point), a trial; NaN where a point was no longer in the race, and minus infinity where
        its training failed. The values of the grid are coordinates of ``point``.

    Raises
    ------
    ComparisonError
        Where the grid is empty, an engine holds no trials back, or every run of a rung failed.

    References
    ----------
    Jamieson & Talwalkar, AISTATS 2016.
    """
    if rungs < 1 or factor < 2:
        raise ComparisonError(f"rungs must be at least 1 and factor at least 2, got {rungs!r} and {factor!r}")
    points = points_of(grid)
    built = {name: candidate(**point) for name, point in points.items()}
    for name, (_, engine) in built.items():
        if not isinstance(engine, SVI) or engine.training is None or engine.training.stopping is None:
            raise ComparisonError(
                f"tune compares held-out trials, and the engine of {name} holds none back: give it "
                "SVI(training=Training(stopping=EarlyStopping()))"
            )
    place = None if folder is None else Path(folder)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    names = list(points)
    bounds = np.full((rungs, len(names)), np.nan)
    racing, best = list(range(len(names))), None
    for rung in range(rungs):
        share = float(factor) ** (rung + 1 - rungs)
        for position in racing:
            model, engine = built[names[position]]
            engine = replace(engine, steps=max(1, round(share * engine.steps)))
            path = None if place is None else place / f"rung {rung}, point {position}.nc"
            found, bounds[rung, position] = _run(model, recording, engine, seed, path)
            if rung == rungs - 1 and bounds[rung, position] == np.nanmax(bounds[rung]):
                best = found
        if not np.isfinite(bounds[rung, racing]).any():
            raise ComparisonError(f"no run of rung {rung} ended with a finite bound; lower the learning rate")
        order = sorted(racing, key=lambda position: -bounds[rung, position])
        racing = sorted(order[: max(1, math.ceil(len(order) / factor))])
    assert best is not None
    values = {name: column([point.get(name) for point in points.values()]) for name in next(iter(points.values()))}
    table = xr.Dataset(
        {"held_out_bound": (("rung", "point"), bounds)},
        coords={"point": names} | {name: ("point", found) for name, found in values.items()},
    )
    return best, table


def _run(
    model: LatentModel, recording: Recording, engine: SVI, seed: int, path: Path | None
) -> tuple[xr.DataTree | None, float]:
    """A posterior and its bound; None and minus infinity where training failed."""
    try:
        if path is None:
            found = fit(model, recording, engine, seed=seed)
        elif path.exists():
            found = load(path)
            check_stored(found, path, model, recording, engine, seed)
        else:
            found = fit(model, recording, engine, seed=seed, checkpoint=path.with_suffix(".checkpoint"))
            save(found, path)
            path.with_suffix(".checkpoint").unlink(missing_ok=True)
    except NonFiniteError:
        return None, -np.inf
    return found, float(json.loads(found.attrs["notes"])["held_out_bound"])
