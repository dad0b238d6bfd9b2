"""Spikes of a reaching monkey, as the benchmarks of deep models use them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io

import pyrodyn as dyn


class Reaches(NamedTuple):
    """Trials to fit and to predict in, and the units that are hidden in the latter."""

    train: dyn.Recording
    test: dyn.Recording
    hidden: np.ndarray


def reaches() -> Reaches:
    """The 40 busiest units in 50 bins of 20 ms, three quarters of the trials to fit, ten units hidden in the others.

    PYRODYN_DATA is the folder that holds datahigh_reach (Yu et al., J. Neurophysiol. 102:614, 2009).
    """
    file = Path(os.environ["PYRODYN_DATA"]) / "datahigh_reach" / "ex2_rawspiketrains.mat"
    raw = scipy.io.loadmat(file, squeeze_me=True)["D"]
    counts = [trial[:, :1000].reshape(len(trial), 50, 20).sum(-1).T.astype(float) for trial in raw["data"]]
    whole = dyn.Recording.from_arrays(counts, bin_width=0.02, condition=raw["condition"])
    busiest = whole.values.sum((0, 1)).argsort(descending=True)[:40].tolist()
    spikes = whole.isel(unit=sorted(busiest)).split_trials({"train": 0.75, "test": 0.25}, seed=0)
    train, test = spikes.sel(split="train"), spikes.sel(split="test")
    return Reaches(train, test, np.sort(np.random.default_rng(0).permutation(test.unit)[:10]))
