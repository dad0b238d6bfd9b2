"""pynapple objects (TsGroup, IntervalSet) become recordings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyrodyn.errors import RecordingError
from pyrodyn.readers.spikes import Population, TrialWindows, bin_recording, labels
from pyrodyn.recording import Recording

if TYPE_CHECKING:
    import pynapple as nap

# An IntervalSet takes one microsecond off the end of an interval whose neighbour begins there.
END_SLACK = 1.5e-6


def read_pynapple(
    spikes: nap.TsGroup,
    trials: nap.IntervalSet,
    *,
    bin_width: float,
    align_to: str | None = None,
    window: tuple[float, float] | None = None,
    region: str = "region",
    heldout: str = "heldout",
    condition: str | None = None,
    split: str = "split",
) -> Recording:
    """Bin the spikes of a pynapple TsGroup in the trials of an IntervalSet.

    Spikes are counted in half-open bins ``[t, t + bin_width)``. Skipping, repairing and the warning are those of
    `read_nwb`. The group's time support tells what was observed: bins outside it are unobserved in the mask. (A
    support that pynapple made up from the first to the last spike says nothing, and is not used.)

    Parameters
    ----------
    spikes : pynapple.TsGroup
        Units with their metadata.
    trials : pynapple.IntervalSet
        Trials with their metadata.
    bin_width
        Seconds.
    align_to
        Metadata column of `trials` with event times in seconds. None: the start of each trial.
    window
        (start, stop) in seconds around the event, whole bins long. None: each trial from start to end (ragged).
    region, heldout
        Metadata columns of `spikes`, used when present. pynapple drops boolean columns when it opens an NWB file:
        read those files with `read_nwb`.
    condition
        Metadata column of `trials`.
    split
        Metadata column of `trials`, used when present.

    Returns
    -------
    Recording
        Counts (trial, time, unit). Trials carry their row in `trials`, units their key in `spikes`.

    Raises
    ------
    RecordingError
        A column that was asked for is not there, or no unit or trial is left to read.
    ImportError
        pynapple is not installed.

    Warns
    -----
    ReadWarning
        Once (a `UserWarning`), when something was skipped or repaired. Its `report` is a `ReadReport`.
    """
    try:
        import pynapple as nap
    except ImportError:
        raise ImportError('read_pynapple needs pynapple: pip install "pyrodyn[nwb]"') from None
    for name, got, kind in (("spikes", spikes, nap.TsGroup), ("trials", trials, nap.IntervalSet)):
        if not isinstance(got, kind):
            raise RecordingError(f"{name} is a {type(got).__name__}; expected a pynapple {kind.__name__}.")
    if window is None and align_to is not None:
        raise RecordingError(f"align_to={align_to!r} needs a window, for example window=(-0.2, 0.8) seconds.")
    start, stop = np.asarray(trials.start, float), np.asarray(trials.end, float)
    names = list(spikes.keys())
    times = [np.array(spikes[name].t, float) for name in names]
    support = _support(spikes, times)
    held = _metadata(spikes, heldout, "spikes", required=False)
    regions = _metadata(spikes, region, "spikes", required=region != "region")
    event = start if align_to is None else np.asarray(_metadata(trials, align_to, "trials", required=True), float)
    return bin_recording(
        "pynapple.TsGroup",
        Population(
            names,
            times,
            [support] * len(names),
            None if regions is None else [str(name) for name in regions],
            None if held is None else held.astype(bool),
        ),
        TrialWindows(
            start,
            stop,
            event,
            event_name=align_to or "start",
            condition=None if condition is None else _metadata(trials, condition, "trials", required=True),
            split=_metadata(trials, split, "trials", required=False),
        ),
        bin_width=bin_width,
        window=window,
        session=None,
        slack=END_SLACK,
    )


def _support(spikes: nap.TsGroup, times: list[np.ndarray]) -> np.ndarray | None:
    support = np.column_stack([np.asarray(spikes.time_support.start), np.asarray(spikes.time_support.end)])
    pooled = np.concatenate(times) if times else np.zeros(0)
    made_up = len(support) == 1 and len(pooled) > 0 and tuple(support[0]) == (pooled.min(), pooled.max())
    return None if made_up or not len(support) else support.astype(float)


def _metadata(holder: Any, name: str, argument: str, required: bool) -> np.ndarray | None:
    # get_info, not attribute access: a column called "split" hides behind the method of that name.
    if name in holder.metadata_columns:
        return labels(np.asarray(holder.get_info(name)))
    if required:
        columns = ", ".join(map(str, holder.metadata_columns)) or "none"
        raise RecordingError(f"{name!r} is not a metadata column of {argument}; it has {columns}.")
    return None
