"""Choose among many models: every point of a grid fitted, in parallel and resumably, and compared."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pyrodyn.comparison.table import CLEAR, Method, compare
from pyrodyn.errors import CheckpointError, ComparisonError, ModelError
from pyrodyn.fitting import fit
from pyrodyn.inference import SVI
from pyrodyn.inference.engine import Engine
from pyrodyn.posterior import build_engine, build_model, name_of, recording_of
from pyrodyn.program import LatentModel, specification
from pyrodyn.progress import progress
from pyrodyn.recording import Recording
from pyrodyn.storage import load, save

POLL = 0.1  # seconds between two looks at the workers
WORKER = "pyrodyn.comparison._worker"
PACKAGE = Path(__file__).resolve().parents[2]


def select(
    model_factory: Callable[..., LatentModel],
    grid: Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Any]],
    recording: Recording,
    engine: Engine | None = None,
    *,
    method: Method | Sequence[Method] | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    workers: int = 1,
) -> xr.Dataset:
    """Fit a model at every point of a grid, and compare the fits.

    Parameters
    ----------
    model_factory : callable
        From the values of a point, by keyword, to a model, such as ``models.LDS``.
    grid : mapping of name to values, or sequence of points
        All combinations of the values; or the points themselves, each a mapping.
    recording : Recording
    engine : Engine
        `SVI` by default.
    method : of `pyrodyn.comparison`, optional
        See `compare`.
    seed : int
        Of every fit, and of the comparison.
    folder : path, optional
        Keeps the posterior of every point, ``latent_dim=3.nc``. Called again with the same arguments, `select` goes on
        where it was stopped, in the middle of a fit or between two.
    workers : int
        Processes that fit at the same time, for models of `pyrodyn.models`.

    Returns
    -------
    xarray.Dataset
        As from `compare`, with the values of the grid as coordinates of ``model``.

    Raises
    ------
    ComparisonError
        Where the grid is empty, or a worker fails; what others finished stays in ``folder``.
    CheckpointError
        Where ``folder`` holds a fit of another model, engine, seed or recording under the same name.
    """
    points = points_of(grid)
    engine = SVI() if engine is None else engine
    fitted = {name: model_factory(**point) for name, point in points.items()}
    for model in fitted.values():
        model.check(recording)
    if folder is None and workers == 1:
        posteriors = {name: fit(model, recording, engine, seed=seed) for name, model in fitted.items()}
    else:
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch if folder is None else folder)
            place.mkdir(parents=True, exist_ok=True)
            posteriors = _fit_all(fitted, recording, engine, seed, place, workers)
    table = compare(posteriors, None, method, seed=seed, models=fitted)
    names = list(dict.fromkeys(name for point in points.values() for name in point))
    order = [str(name) for name in table["model"].values]
    return table.assign_coords({n: ("model", column([points[m].get(n) for m in order])) for n in names})


def fewest(comparison: xr.Dataset, name: str, clear: float = CLEAR) -> Any:
    r"""The least value of a grid, such as the fewest modes, that is not clearly worse than the best.

    A mode or latent that is not needed costs a held-out score little, so that the best of several scores often lies
    beyond what the data call for, by less than chance. The least value v is taken for which

    .. math:: \mathrm{elpd}_{best} - \mathrm{elpd}_v \le c \, \mathrm{se}(\mathrm{elpd}_{best} - \mathrm{elpd}_v),

    with the standard error of the paired difference: the "1 SE rule" of Breiman et al., for differences, at c.

    Parameters
    ----------
    comparison : xarray.Dataset
        From `select`, by one method whose scores are sums over trials.
    name : str
        Of the grid, with numbers as values. Of several models with the same value the best counts.
    clear : float
        c, in standard errors: 2 by default; 0 takes the best.

    Returns
    -------
    int or float
        One of the values of the grid.

    Raises
    ------
    ComparisonError
        Where the comparison has no such grid, its values are no numbers, or differences have no standard error.

    References
    ----------
    Breiman, Friedman, Olshen & Stone, Classification and Regression Trees (1984), section 3.4.3.
    """
    if (
        name not in comparison.coords
        or "model" not in comparison[name].dims
        or comparison[name].dtype.kind not in "iuf"
    ):
        known = [str(n) for n, c in comparison.coords.items() if c.dims == ("model",) and c.dtype.kind in "iuf"]
        raise ComparisonError(f"name must be one of the grid whose values are numbers, {known}, got {name!r}")
    if not np.isfinite(clear) or clear < 0.0:
        raise ComparisonError(f"clear must be 0 standard errors or more, got {clear}")
    if "criterion" in comparison.dims:
        methods = [str(criterion) for criterion in comparison["criterion"].values]
        raise ComparisonError(f"say which of the methods is to choose, by comparison.sel(criterion=...): {methods}")
    behind, error = -comparison["difference"].values, comparison["dse"].values
    if not np.isfinite(error).all():
        raise ComparisonError(
            "some differences have no standard error, so that none can be called clear; score by a method that sums "
            "over trials, such as KFold or LOO"
        )
    return comparison[name].values[behind <= clear * error].min().item()


def points_of(grid: Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Points by the name that says what they are."""
    if isinstance(grid, Mapping):
        values = [list(column) for column in grid.values()]
        points = [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*values)]
    else:
        points = [dict(point) for point in grid]
    named = {", ".join(f"{key}={value}" for key, value in point.items()): point for point in points}
    if not named or len(named) < len(points):
        raise ComparisonError(f"grid must name different points, such as {{'latent_dim': [2, 4, 8]}}, got {grid!r}")
    return named


def column(values: list[Any]) -> np.ndarray:
    """Numbers and strings as they are, all else in words."""
    if all(isinstance(value, (int, float, str)) for value in values):
        return np.array(values)
    return np.array([str(value) for value in values])


def _fit_all(
    fitted: Mapping[str, LatentModel], recording: Recording, engine: Engine, seed: int, folder: Path, workers: int
) -> dict[str, xr.DataTree]:
    paths = {name: folder / f"{re.sub(r'[^A-Za-z0-9_.=,+-]+', '_', name)}.nc" for name in fitted}
    if len(set(paths.values())) < len(paths):
        raise ComparisonError(f"points of the grid share a file name: {sorted(path.name for path in paths.values())}")
    found = {name: load(path) for name, path in paths.items() if path.exists()}
    for name, posterior in found.items():
        check_stored(posterior, paths[name], fitted[name], recording, engine, seed)
    missing = [name for name in fitted if name not in found]
    if workers > 1:
        _fit_in_processes({n: fitted[n] for n in missing}, recording, engine, seed, paths, workers)
        found |= {name: load(paths[name]) for name in missing}
    else:
        for name in missing:
            found[name] = fit(
                fitted[name], recording, engine, seed=seed, checkpoint=paths[name].with_suffix(".checkpoint")
            )
            save(found[name], paths[name])
            paths[name].with_suffix(".checkpoint").unlink(missing_ok=True)
    return {name: found[name] for name in fitted}


def check_stored(
    posterior: xr.DataTree, path: Path, model: LatentModel, recording: Recording, engine: Engine, seed: int
) -> None:
    expected = {
        "model": json.dumps(specification(model)),
        "engine": json.dumps(specification(engine), default=name_of),
        "seed": str(seed),
        "recording": recording.digest(),
    }
    got = {
        "model": posterior.attrs["model"],
        "engine": posterior.attrs["engine"],
        "seed": str(posterior.attrs["seed"]),
        "recording": recording_of(posterior).digest(),
    }
    for what, wanted in expected.items():
        if got[what] != wanted:
            raise CheckpointError(
                f"{path} holds a fit of another {what}: {got[what]} where {wanted} is asked for; choose another "
                "folder, or move the file away"
            )


def _fit_in_processes(
    fitted: Mapping[str, LatentModel],
    recording: Recording,
    engine: Engine,
    seed: int,
    paths: Mapping[str, Path],
    workers: int,
) -> None:
    """One process a fit. They are told by files what to do: nothing is pickled, and no script needs a main guard."""
    engine_spec = specification(engine)
    try:
        build_engine(engine_spec)
        for model in fitted.values():
            build_model(specification(model))
    except (ModelError, TypeError) as error:
        raise ComparisonError(
            f"workers={workers}: another process cannot build this model or engine ({error}); say workers=1"
        ) from None
    with tempfile.TemporaryDirectory() as scratch:
        data = save(xr.DataTree(recording.to_xarray()), Path(scratch) / "recording.nc")
        waiting, running, jobs = list(fitted), {}, {}
        try:
            with progress(len(fitted), "select") as bar:
                while waiting or running:
                    while waiting and len(running) < workers:
                        name = waiting.pop(0)
                        job = {
                            "model": specification(fitted[name]),
                            "engine": engine_spec,
                            "seed": seed,
                            "recording": str(data),
                            "output": str(paths[name].resolve()),
                        }
                        jobs[name] = Path(scratch) / f"{len(waiting)}.json"
                        running[name] = _start(job, jobs[name], workers)
                    time.sleep(POLL)
                    for name in [name for name, process in running.items() if process.poll() is not None]:
                        process = running.pop(name)
                        if process.returncode:
                            raise ComparisonError(
                                f"the process that fitted {name!r} ended with code {process.returncode}: "
                                f"{_last_line(jobs[name])}"
                            )
                        bar.update()
        finally:
            for process in running.values():
                process.kill()
                process.wait()


def _start(job: Mapping[str, Any], path: Path, workers: int) -> subprocess.Popen[bytes]:
    path.write_text(json.dumps(job), encoding="utf-8")
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    known = [str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(known)}
    command = [sys.executable, "-m", WORKER, str(path)]
    with path.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)


def _last_line(job: Path) -> str:
    said = job.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return said[-1] if said else "it said nothing"
