"""Recordings from which coupling has been removed, and nothing else."""

from __future__ import annotations

import numpy as np

from pyrodyn.errors import RecordingError
from pyrodyn.recording import Recording
from pyrodyn.systems.system import one_of, whole


def shuffle_trials(recording: Recording, by: str = "region", seed: int = 0) -> Recording:
    """The recording with the trials of each region permuted within their condition.

    What regions share in every trial of a condition, such as a response locked to a stimulus, is kept; what one region
    says of another in a single trial is lost. Coupling that is found nevertheless is false.

    Parameters
    ----------
    recording : Recording
    by : "region" to move the units of a region together, "unit" to move each by itself
    seed : int

    Returns
    -------
    Recording
        Observations and mask are moved; inputs, behaviour, lengths and all labels stay. Where a longer trial takes the
        place of a shorter one its last bins are dropped; where a shorter one takes that of a longer one the rest is
        unobserved.

    Raises
    ------
    RecordingError
        For a blank recording, for a single region (or unit), and for a condition with fewer trials than regions.

    Notes
    -----
    Permutations are drawn so that no two regions keep a trial in common: in every condition all follow one random
    order, each shifted by another number of trials.
    """
    whole("seed", seed, 0)
    labels = recording.region if one_of("by", by, ("region", "unit")) == "region" else recording.unit
    groups = list(dict.fromkeys(labels.tolist()))
    values = recording.values.numpy()
    if len(groups) < 2:
        raise RecordingError(f"shuffle_trials needs at least two {by}s, this recording has {groups}")
    rng = np.random.default_rng(seed)
    source = np.empty((recording.num_trials, len(groups)), dtype=np.int64)  # the trial that each group takes
    for condition in dict.fromkeys(recording.condition.tolist()):
        trials = np.flatnonzero(recording.condition == condition)
        if len(trials) < len(groups):
            raise RecordingError(
                f"condition {condition!r} has {len(trials)} trials for {len(groups)} {by}s: some would stay together; "
                "leave it out by sel(condition=...), or give several conditions one name"
            )
        order = rng.permutation(trials)
        shifts = rng.permutation(len(trials))[: len(groups)]
        places = np.arange(len(trials))
        source[order] = order[(places[:, None] + shifts) % len(trials)]
    taken = source[:, [groups.index(label) for label in labels.tolist()]]  # (trial, unit)
    dataset = recording.to_xarray()
    observed = np.take_along_axis(dataset["mask"].values, taken[:, None, :], 0)
    observed &= (np.arange(recording.num_bins) < recording.lengths[:, None])[..., None]
    moved = np.where(observed, np.take_along_axis(values, taken[:, None, :], 0), np.nan)
    dataset["observations"] = (("trial", "time", "unit"), moved)
    dataset["mask"] = (("trial", "time", "unit"), observed)
    return Recording.from_xarray(dataset)
