"""Spike times and trial windows become binned counts; shared by every reader of spike times."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyrodyn.errors import RecordingError
from pyrodyn.recording import Recording

MAX_BYTES = 8 * 2**30
SHOWN = 8  # names listed in a report before "and n more"


@dataclass(frozen=True)
class ReadReport:
    """What a reader skipped or repaired, and why.

    A reader that has something to report emits one `ReadWarning`, which carries the report. With ``strict=True`` the
    same text is a `RecordingError`.

    Attributes
    ----------
    source
        The file or object that was read.
    units
        Pairs (unit, reason). Unit ids as text.
    trials
        Pairs (trial, reason). Trials are named by their row in the trial table, from 0.
    """

    source: str
    units: tuple[tuple[str, str], ...] = ()
    trials: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.units or self.trials)

    def __str__(self) -> str:
        lines = [f"{self.source}: read with reservations."]
        for kind, entries in (("unit", self.units), ("trial", self.trials)):
            by_reason: dict[str, list[str]] = {}
            for name, reason in entries:
                by_reason.setdefault(reason, []).append(name)
            for reason, names in by_reason.items():
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(f"  {kind}{'s' * (len(names) > 1)} {', '.join(names[:SHOWN])}{more}: {reason}")
        return "\n".join(lines)


class ReadWarning(UserWarning):
    """A reader skipped or repaired something; `report` says what."""

    def __init__(self, report: ReadReport):
        super().__init__(str(report))
        self.report = report


@dataclass
class Population:
    """Units as a reader found them: one entry of each list a unit. Times in seconds on the clock of the source."""

    names: list[Any]
    times: list[np.ndarray]
    observed: list[np.ndarray | None]  # (interval, 2), None: observed throughout
    region: list[str] | None = None
    heldout: np.ndarray | None = None
    reports: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class TrialWindows:
    """Trials as a reader found them: one entry of each array a trial. Times in seconds on the clock of the source."""

    start: np.ndarray
    stop: np.ndarray
    event: np.ndarray
    event_name: str
    condition: np.ndarray | None = None
    split: np.ndarray | None = None


def count_spikes(times: np.ndarray, starts: np.ndarray, num_bins: int, bin_width: float) -> np.ndarray:
    """Count spikes in half-open bins ``[start + k * bin_width, start + (k + 1) * bin_width)``.

    A spike time that equals an edge up to the rounding of float64 counts as being on the edge, so it falls into the
    bin that begins there: widths such as 0.02 s, which no binary number equals, bin as they do on paper.

    Parameters
    ----------
    times : array, (spike,)
        Spike times of one unit in seconds, ascending.
    starts : array, (trial,)
        Where each trial's first bin begins, in seconds on the same clock.
    num_bins
        Bins in each trial.
    bin_width
        Seconds.

    Returns
    -------
    array, (trial, time)
        Integer counts.
    """
    return np.diff(np.searchsorted(times, bin_edges(starts, num_bins, bin_width)), axis=1)


def bin_edges(starts: np.ndarray, num_bins: int, bin_width: float) -> np.ndarray:
    """Edges (trial, time + 1), lowered by the rounding error that a spike time on the edge may carry."""
    edges = np.asarray(starts, float)[:, None] + bin_width * np.arange(num_bins + 1)
    # start, k * bin_width, their sum and the spike time are each rounded at the scale of the largest of them.
    scale = np.maximum(np.abs(edges), np.abs(starts)[:, None]) + bin_width * num_bins
    return edges - 4 * np.spacing(scale)


def bin_recording(
    source: str,
    population: Population,
    trials: TrialWindows,
    *,
    bin_width: float,
    window: tuple[float, float] | None,
    session: str | None,
    strict: bool = False,
    slack: float = 0.0,
) -> Recording:
    """Clean the spike times, choose the trials, count, and report.

    `slack` (seconds) is how much too early the source may say that a trial stops.
    """
    check_bins(bin_width, window)
    if not population.names:
        raise RecordingError(f"{source}: no unit to read.\n{ReadReport(source, tuple(population.reports))}")
    begin, end = _extent(population, trials)
    unit_reports = [*population.reports, *_clean(population, begin)]
    keep, starts, lengths, trial_reports = _choose_trials(trials, begin, end, population, bin_width, window, slack)
    if keep.any():
        _check_size(source, int(keep.sum()), int(lengths[keep].max()), len(population.names))
        inside = np.arange(lengths[keep].max()) < lengths[keep][:, None]  # (trial, time)
        observed = _observed_bins(population, starts[keep], inside, bin_width, (begin, end))
        if observed is not None:
            unseen = ~observed.any(axis=(1, 2))
            rows = np.flatnonzero(keep)[unseen]
            trial_reports += [(str(row), "skipped: no unit is observed in any whole bin of its window") for row in rows]
            keep[rows] = False
            observed = observed[~unseen]
    report = ReadReport(source, tuple(unit_reports), tuple(sorted(trial_reports, key=lambda pair: int(pair[0]))))
    if not keep.any():
        remedy = "choose another window, align_to or trial table."
        raise RecordingError(f"{source}: no trial is left to read; {remedy}\n{report}")
    if report and strict:
        raise RecordingError(f"{report}\nstrict=False reads the rest.")

    starts, lengths = starts[keep], lengths[keep]
    num_bins = int(lengths.max())
    inside = np.arange(num_bins) < lengths[:, None]
    counts = np.empty((len(starts), num_bins, len(population.names)))
    for column, times in enumerate(population.times):
        counts[:, :, column] = count_spikes(times, starts, num_bins, bin_width)
    if observed is not None:
        observed = observed[:, :num_bins]
    try:
        recording = Recording.from_arrays(
            counts,
            bin_width=bin_width,
            # Rounded to a picosecond, so that the bin at the event begins at 0 and not at 5.6e-17.
            time=np.round((0.0 if window is None else window[0]) + bin_width * np.arange(num_bins), 12),
            region=population.region,
            unit=population.names,
            heldout=population.heldout,
            trial=np.flatnonzero(keep),
            condition=None if trials.condition is None else trials.condition[keep],
            split=None if trials.split is None else trials.split[keep],
            session=session,
            counts=True,
            mask=None if observed is None or bool((observed | ~inside[:, :, None]).all()) else observed,
            lengths=None if bool(inside.all()) else lengths,
        )
    except RecordingError as cause:
        raise RecordingError(f"{source}: {cause}") from None
    if report:
        warnings.warn(ReadWarning(report), stacklevel=3)  # at the line that called the reader
    return recording


def check_bins(bin_width: float, window: tuple[float, float] | None) -> None:
    """Refuse a bin width that is not a positive number of seconds, or a window that is not whole bins long."""
    if not np.isfinite(bin_width) or bin_width <= 0:
        raise RecordingError(f"bin_width is {bin_width}; expected a positive number of seconds, for example 0.02.")
    if window is None:
        return
    if len(window) != 2 or not np.all(np.isfinite(window)) or window[1] <= window[0]:
        raise RecordingError(f"window is {window}; expected (start, stop) in seconds around the event, start < stop.")
    bins = (window[1] - window[0]) / bin_width
    if round(bins) < 1 or abs(bins - round(bins)) > 1e-6:
        raise RecordingError(
            f"window {window} s is {bins:.6g} bins of bin_width {bin_width} s; expected a whole number: change either."
        )


def labels(values: Any) -> np.ndarray:
    """A column of a table as a one-dimensional array; bytes become text."""
    array = np.asarray(values)
    if array.dtype.kind in "SO":
        return np.array([_text(value) for value in array.ravel().tolist()], dtype=np.str_).reshape(array.shape)
    return array


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _extent(population: Population, trials: TrialWindows) -> tuple[float, float]:
    """First and last time of which the source shows that it was recorded. Time zero is the start of the session."""
    intervals = [interval for interval in population.observed if interval is not None and len(interval)]
    begins, ends = [trials.start, np.zeros(1)], [trials.stop, *population.times]
    begins += [interval[:, 0] for interval in intervals]
    ends += [interval[:, 1] for interval in intervals]
    start, stop = np.concatenate(begins), np.concatenate(ends)
    stop = stop[np.isfinite(stop)]
    return float(np.min(start[np.isfinite(start)])), float(np.max(stop)) if len(stop) else 0.0


def _clean(population: Population, begin: float) -> list[tuple[str, str]]:
    """Make all times finite and ascending, in place; say what was done to which unit."""
    reports = []
    for index, (name, times) in enumerate(zip(population.names, population.times, strict=True)):
        notes = []
        finite = np.isfinite(times)
        if not finite.all():
            notes.append(f"{np.sum(~finite)} of {len(times)} spike times are NaN or infinite: dropped")
            times = times[finite]
        if np.any(np.diff(times) < 0):
            notes.append("its spike times are not ascending: sorted")
            times = np.sort(times)
        interval = population.observed[index]
        early = int(np.searchsorted(times, begin))
        if interval is not None:
            outside = int(np.sum(~_within(times, times, interval)))
            if outside:
                notes.append(f"{outside} of {len(times)} spikes lie outside its observation intervals: not counted")
        elif early:
            where = f"before the start of the session ({begin:g} s)"
            notes.append(f"{early} of {len(times)} spike times lie {where}: not counted")
        population.times[index] = times
        reports += [(str(name), note) for note in notes]
    return reports


def _choose_trials(
    trials: TrialWindows,
    begin: float,
    end: float,
    population: Population,
    bin_width: float,
    window: tuple[float, float] | None,
    slack: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """Which trials can be read, where each begins, how many bins each has, and why the others are left out."""
    reports: list[tuple[str, str]] = []
    if window is None:
        starts = np.asarray(trials.start, float)
        durations = np.asarray(trials.stop, float) - starts + slack
        # 0.3 s in bins of 0.1 s are 2.9999999999999996 bins to float64, three on paper.
        bins = np.floor(np.where(np.isfinite(durations), durations, 0.0) / bin_width + 1e-6)
        faults = [
            (~np.isfinite(durations), "skipped: start_time or stop_time is NaN or infinite"),
            (bins < 1, f"skipped: shorter than one bin of {bin_width:g} s"),
        ]
    else:
        starts = np.asarray(trials.event, float) + window[0]
        bins = np.full(len(starts), float(round((window[1] - window[0]) / bin_width)))
        faults = [(~np.isfinite(starts), f"skipped: {trials.event_name} is NaN or infinite")]
    if all(interval is None for interval in population.observed):
        # Without observation intervals nothing says that silence there is silence; with them, the mask says it.
        margin = 1e-6 * bin_width + slack
        off = (starts < begin - margin) | (starts + bins * bin_width > end + margin)
        faults.append((off, f"skipped: its window leaves the recording ({begin:g} s to {end:g} s)"))
    keep = np.ones(len(starts), dtype=bool)
    for fault, reason in faults:
        reports += [(str(row), reason) for row in np.flatnonzero(keep & fault)]
        keep &= ~fault
    return keep, starts, np.where(keep, bins, 0).astype(np.int64), reports


def _observed_bins(
    population: Population, starts: np.ndarray, inside: np.ndarray, bin_width: float, extent: tuple[float, float]
) -> np.ndarray | None:
    """Whether each bin lies wholly inside the unit's observation intervals, (trial, time, unit); None: no intervals."""
    if all(interval is None for interval in population.observed):
        return None
    edges = starts[:, None] + bin_width * np.arange(inside.shape[1] + 1)
    margin = 1e-6 * bin_width
    seen: dict[bytes, np.ndarray] = {}  # units of one probe share their intervals
    columns = []
    for interval in population.observed:
        interval = np.array([extent]) if interval is None else interval
        key = interval.tobytes()
        if key not in seen:
            seen[key] = _within(edges[:, :-1] + margin, edges[:, 1:] - margin, interval) & inside
        columns.append(seen[key])
    return np.stack(columns, axis=-1)


def _within(first: np.ndarray, last: np.ndarray, intervals: np.ndarray) -> np.ndarray:
    """Whether [first, last] lies inside one of the intervals (interval, 2), overlapping and touching ones merged."""
    if not len(intervals):
        return np.zeros(np.shape(first), dtype=bool)
    ordered = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ordered[:, 1])
    fresh = np.r_[True, ordered[1:, 0] > reach[:-1]]
    start, stop = ordered[fresh, 0], reach[np.r_[np.flatnonzero(fresh)[1:] - 1, len(reach) - 1]]
    index = np.searchsorted(start, first, side="right") - 1
    return (index >= 0) & (last <= stop[np.maximum(index, 0)])


def _check_size(source: str, num_trials: int, num_bins: int, num_units: int) -> None:
    size = 8 * num_trials * num_bins * num_units
    if size > MAX_BYTES:
        raise RecordingError(
            f"{source}: {num_trials} trials of up to {num_bins} bins and {num_units} units would take "
            f"{size / 2**30:.3g} GiB; widen bin_width, shorten window, or choose fewer units."
        )


def select(names: Sequence[Any], wanted: Sequence[Any] | None, source: str) -> list[int]:
    """Rows of the wanted unit ids, in the order asked for; all rows when nothing is asked for."""
    if wanted is None:
        return list(range(len(names)))
    rows = {name: row for row, name in enumerate(names)}
    unknown = [name for name in wanted if name not in rows]
    if unknown:
        raise RecordingError(f"{source}: units asks for {unknown[:SHOWN]}; the ids begin {list(names)[:SHOWN]}.")
    return [rows[name] for name in wanted]
