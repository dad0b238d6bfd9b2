"""Neurodata Without Borders files (through pynwb) become recordings.

pynwb accepts NaN, negative and unsorted spike times and broken indices without a word, and it follows an HDF5 file
into other files. So the file's structure is checked before pynwb opens it, and everything this reader uses is checked
here.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pyrodyn._hdf5_guard import check_open_hdf5, open_hdf5
from pyrodyn.errors import RecordingError
from pyrodyn.readers.spikes import Population, TrialWindows, bin_recording, check_bins, labels, select
from pyrodyn.recording import Recording


def read_nwb(
    path: str | os.PathLike[str],
    *,
    bin_width: float,
    trials: str = "trials",
    align_to: str = "start_time",
    window: tuple[float, float] | None = None,
    region: str | None = None,
    heldout: str = "heldout",
    condition: str | None = None,
    split: str = "split",
    units: Sequence[int] | None = None,
    strict: bool = False,
    allow_external: bool = False,
) -> Recording:
    """Read the spike times of an NWB file as binned counts, trial by trial.

    Spikes are counted in half-open bins ``[t, t + bin_width)`` that begin at the start of the window. What cannot be
    read as it stands is skipped or repaired, and one warning says so:

    - NaN or infinite spike times are dropped, unsorted ones sorted;
    - times before the session's start are not counted (with observation intervals, those decide);
    - a unit is skipped when its part of ``spike_times_index`` decreases or ends beyond the spike times;
    - bins not wholly inside a unit's ``obs_intervals`` are unobserved in the mask;
    - a trial is skipped when its event time is NaN or its window leaves the recording.

    A unit without spikes is data, and is kept.

    Parameters
    ----------
    path
        The file. `list_nwb` shows what there is to ask for.
    bin_width
        Seconds.
    trials
        Name of a table of intervals: ``"trials"``, ``"epochs"``, or any other in the file.
    align_to
        Column of that table with event times in seconds; time zero of the recording.
    window
        (start, stop) in seconds around the event, whole bins long: all trials equally long. None: each trial from its
        start_time to its stop_time (ragged trials; a last bin that is not whole is left out).
    region
        None: the location of each unit's electrodes. Otherwise a column of the units table.
    heldout, split
        Columns of the units table (boolean) and of the trial table; used when the file has them.
    condition
        A column of the trial table.
    units
        Ids of the units to read, in this order. None: all.
    strict
        True: whatever would be skipped or repaired is an error instead.
    allow_external
        True: let the file name other files that hold part of its data. Only for files you trust.

    Returns
    -------
    Recording
        Counts (trial, time, unit). Trials carry their row in the trial table, units their id. Times (s) are the
        beginnings of the bins relative to the event.

    Raises
    ------
    RecordingError
        The file is not readable NWB, lies about its size, refers to other files, or lacks what was asked for. The
        message names the file and what it does contain.
    ImportError
        pynwb is not installed.

    Warns
    -----
    ReadWarning
        Once (a `UserWarning`), when something was skipped or repaired. Its `report` is a `ReadReport`.
    """
    check_bins(bin_width, window)
    if window is None and align_to != "start_time":
        raise RecordingError(
            f"align_to={align_to!r} needs a window, for example window=(-0.2, 0.8) seconds around the event; "
            "without one, trials run from start_time to stop_time."
        )
    source = str(Path(path))
    with _opened(path, allow_external) as nwb:
        population = _read_units(nwb, source, region, heldout, units)
        windows = _read_trials(nwb, source, trials, align_to, condition, split)
        session = str(nwb.session_id or nwb.identifier or Path(path).stem)
    return bin_recording(
        source, population, windows, bin_width=bin_width, window=window, session=session, strict=strict
    )


def list_nwb(path: str | os.PathLike[str], *, allow_external: bool = False) -> str:
    """Describe what `read_nwb` can read from a file: units and their columns, regions, trial tables and columns.

    Raises
    ------
    RecordingError
        As `read_nwb`.
    """
    with _opened(path, allow_external) as nwb:
        lines = [f"{Path(path)}: {nwb.session_description}"]
        if nwb.units is None:
            lines.append("units: none")
        else:
            lines.append(f"units: {len(nwb.units)}; columns: {', '.join(nwb.units.colnames)}")
            regions = _electrode_regions(nwb.units, range(len(nwb.units)), [])
            if regions is not None:
                lines.append("regions: " + ", ".join(f"{name} ({n})" for name, n in sorted(Counter(regions).items())))
        tables = _interval_tables(nwb)
        lines.append("trial tables:" if tables else "trial tables: none")
        lines += [f"  {name} ({len(table)} trials): {', '.join(table.colnames)}" for name, table in tables.items()]
    return "\n".join(lines)


@contextmanager
def _opened(path: str | os.PathLike[str], allow_external: bool) -> Iterator[Any]:
    """The NWB file, checked; whatever pynwb, hdmf or h5py raise over its content is a RecordingError."""
    try:
        import pynwb
    except ImportError:
        raise ImportError('reading NWB files needs pynwb: pip install "pyrodyn[nwb]"') from None
    remedy = "Pass allow_external=True if you trust this file and the files it names."
    with open_hdf5(path, error=RecordingError) as file, warnings.catch_warnings():
        check_open_hdf5(file, path, error=RecordingError, allow_external=allow_external, remedy=remedy)
        # While building its objects pynwb warns about any part of the file that breaks the schema, mostly parts that
        # are not read here (a stimulus series, an older cached namespace). What is read here is checked here.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(pynwb|hdmf)\b")
        try:
            # The handle that was checked is the one that is read: nobody can swap the file in between.
            with pynwb.NWBHDF5IO(file=file, mode="r", load_namespaces=True) as reader:
                yield reader.read()
        except RecordingError:
            raise
        # Any class of error: a damaged file surfaces as whatever the code that stumbles over it happens to raise.
        except Exception as error:
            raise RecordingError(
                f"{Path(path)}: pynwb cannot read this file as NWB ({_root_cause(error)}). If it uses an "
                "extension, install that ndx package; if it is damaged or not NWB, export it again."
            ) from None


def _root_cause(error: BaseException) -> str:
    """hdmf wraps an error once for every level of the file: the innermost one says what is wrong, the wraps where."""
    place = ""
    while error.__cause__ is not None:
        place = str(getattr(error.args[0], "path", "")) if error.args else ""
        error = error.__cause__
    text = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {text}" + (f", at {place}" if place else "")


def _read_units(nwb: Any, source: str, region: str | None, heldout: str, wanted: Sequence[int] | None) -> Population:
    table = nwb.units
    if table is None:
        raise RecordingError(f"{source}: the file has no Units table, so no spike times. It contains {_contents(nwb)}.")
    columns = ", ".join(table.colnames)
    if "spike_times" not in table.colnames:
        raise RecordingError(f"{source}: the Units table has no spike_times; its columns are {columns}.")
    reports: list[tuple[str, str]] = []
    names = [int(name) for name in table.id[:]]
    rows = select(names, wanted, source)
    if table.spike_times_index is None:
        raise RecordingError(f"{source}: spike_times has no spike_times_index, so no spike belongs to a unit.")
    times, broken = _ragged(table.spike_times_index, len(names), source, dimensions=1)
    kept = []
    for row in rows:
        if row in broken:
            reports.append((str(names[row]), f"skipped: {broken[row]}"))
        else:
            kept.append(row)
    observed: list[np.ndarray | None] = [None] * len(kept)
    if table.obs_intervals_index is not None:
        intervals, broken = _ragged(table.obs_intervals_index, len(names), source, dimensions=2)
        for index, row in enumerate(kept):
            if row in broken:
                reports.append((str(names[row]), f"taken as observed throughout: obs_intervals: {broken[row]}"))
                continue
            good = np.isfinite(intervals[row]).all(axis=1) & (intervals[row][:, 1] >= intervals[row][:, 0])
            if not good.all():
                reports.append((str(names[row]), "obs_intervals that are NaN or end before they start: left out"))
            # No interval at all means "not stated"; all of them broken means that nothing is known to be observed.
            observed[index] = intervals[row][good] if len(good) else None
    if region is None:
        regions = _electrode_regions(table, kept, reports)
    elif region in table.colnames:
        regions = [str(name) or "unknown" for name in labels(_column(table, region, source))[kept]]
    else:
        raise RecordingError(f"{source}: region={region!r} is not a column of the Units table; it has {columns}.")
    held = None
    if heldout in table.colnames:
        held = labels(_column(table, heldout, source))[kept]
        if held.dtype.kind not in "biu" or not np.isin(held, (0, 1)).all():
            raise RecordingError(f"{source}: the units column {heldout!r} is not boolean (heldout= names another).")
        held = held.astype(bool)
    return Population([names[row] for row in kept], [times[row] for row in kept], observed, regions, held, reports)


def _ragged(index: Any, count: int, source: str, dimensions: int) -> tuple[list[np.ndarray], dict[int, str]]:
    """Each row's part of an indexed column, and the rows whose part cannot be trusted, with the reason."""
    name = index.target.name
    values = np.asarray(index.target.data[:])
    stops = np.asarray(index.data[:])
    if values.size == 0:
        values = np.zeros((0, 2)[:dimensions])
    if values.dtype.kind not in "fiu" or values.ndim != dimensions or (dimensions == 2 and values.shape[1] != 2):
        raise RecordingError(f"{source}: {name} has shape {values.shape}, type {values.dtype}; expected times (s).")
    if stops.dtype.kind not in "iu" or stops.shape != (count,):
        raise RecordingError(f"{source}: {name}_index has shape {stops.shape}, type {stops.dtype}, for {count} units.")
    stops = stops.astype(np.int64)
    bounds = np.r_[0, stops]
    beyond = (bounds < 0) | (bounds > len(values))
    # Of two bounds out of order either may be the wrong one, so every unit that touches one of them is in doubt.
    sound = np.flatnonzero(~beyond)
    fall = np.flatnonzero(np.diff(bounds[sound]) < 0)
    disordered = np.zeros_like(beyond)
    disordered[np.r_[sound[fall], sound[fall + 1]]] = True
    broken, parts = {}, []
    for row in range(count):
        ends = slice(row, row + 2)
        if beyond[ends].any():
            broken[row] = f"{name}_index points beyond the {len(values)} stored values"
        elif disordered[ends].any():
            broken[row] = f"{name}_index decreases here"
        parts.append(np.array(values[bounds[row] : bounds[row + 1]], float) if row not in broken else values[:0])
    return parts, broken


def _electrode_regions(table: Any, rows: Sequence[int], reports: list[tuple[str, str]]) -> list[str] | None:
    """Location of each unit's electrodes (the commonest of several), or None when the file does not link them."""
    if "electrodes" in table.colnames:
        column = table["electrodes"]
        link = getattr(column, "target", column)  # indexed when a unit has several electrodes
        places = _electrode_locations(link.table)
        pointers = np.asarray(link.data[:]).astype(np.int64)
        stops = np.asarray(column.data[:]).astype(np.int64) if link is not column else np.arange(1, len(pointers) + 1)
        bounds = np.r_[0, stops]
    elif "electrode_group" in table.colnames:
        places = [str(group.location) for group in table["electrode_group"].data[:]]
        pointers, bounds = np.arange(len(places)), np.arange(len(places) + 1)
    else:
        return None
    names = np.asarray(table.id[:])
    regions = []
    for row in rows:
        chosen = pointers[max(bounds[row], 0) : max(bounds[row + 1], 0)]
        found = Counter(places[pointer] or "unknown" for pointer in chosen if 0 <= pointer < len(places))
        if sum(found.values()) < len(chosen):
            reports.append((str(names[row]), "its electrodes are not all in the electrodes table"))
        if len(found) > 1:
            reports.append((str(names[row]), f"its electrodes lie in {', '.join(sorted(found))}: the commonest taken"))
        regions.append(found.most_common(1)[0][0] if found else "unknown")
    return regions


def _electrode_locations(electrodes: Any) -> list[str]:
    if "location" in electrodes.colnames:
        places = [str(place) for place in labels(electrodes["location"].data[:])]
        if any(place not in ("", "unknown") for place in places) or "group" not in electrodes.colnames:
            return places
    return [str(group.location) for group in electrodes["group"].data[:]]


def _read_trials(nwb: Any, source: str, name: str, align_to: str, condition: str | None, split: str) -> TrialWindows:
    tables = _interval_tables(nwb)
    if name not in tables:
        raise RecordingError(
            f"{source}: trials={name!r} is not a table of intervals; the file has {', '.join(tables) or 'none'}."
        )
    table = tables[name]
    columns = ", ".join(table.colnames)
    for asked in (align_to, condition):
        if asked is not None and asked not in table.colnames:
            raise RecordingError(f"{source}: {asked!r} is not a column of {name!r}; it has {columns}.")
    times = {}
    for column in ("start_time", "stop_time", align_to):
        values = _column(table, column, source)
        if values.dtype.kind not in "fiu":
            raise RecordingError(f"{source}: column {column!r} of {name!r} holds {values.dtype}; expected seconds.")
        times[column] = values.astype(float)
    return TrialWindows(
        start=times["start_time"],
        stop=times["stop_time"],
        event=times[align_to],
        event_name=align_to,
        condition=None if condition is None else labels(_column(table, condition, source)),
        split=labels(_column(table, split, source)) if split in table.colnames else None,
    )


def _column(table: Any, name: str, source: str) -> np.ndarray:
    values = np.asarray(table[name][:])
    if values.shape != (len(table),):
        raise RecordingError(f"{source}: column {name!r} of {table.name!r} does not hold one value a row.")
    return values


def _interval_tables(nwb: Any) -> dict[str, Any]:
    named = {"trials": nwb.trials, "epochs": nwb.epochs, **dict(nwb.intervals or {})}
    return {name: table for name, table in named.items() if table is not None}


def _contents(nwb: Any) -> str:
    found = [f"acquisition {name!r}" for name in nwb.acquisition]
    found += [f"processing module {name!r}" for name in nwb.processing]
    found += [f"trial table {name!r}" for name in _interval_tables(nwb)]
    return ", ".join(found) or "neither acquisitions, processing modules nor trial tables"
