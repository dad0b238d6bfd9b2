"""Real recordings as the benchmarks of dynamics use them; PYRODYN_DATA is the folder that holds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
from sessions_steinmetz import session

import pyrodyn as dyn

LAG = 1  # bins of 50 ms by which spikes lead the hand


class Real(NamedTuple):
    """Trials to fit and to predict in, the units that are hidden in the latter, and what to decode."""

    train: dyn.Recording
    test: dyn.Recording
    hidden: np.ndarray
    wanted: tuple[np.ndarray, np.ndarray]
    """Of the two: a label (trial,), "" where there is none, or a velocity (trial, time, axis), NaN where it is not."""


def _data() -> Path:
    return Path(os.environ["PYRODYN_DATA"])


def _some(units: np.ndarray, share: float) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(units)[: round(share * len(units))])


def reaches() -> Real:
    """Yu et al. (2009): the 40 busiest units in 50 bins of 20 ms, three quarters of the trials to fit; which target."""
    raw = scipy.io.loadmat(_data() / "datahigh_reach" / "ex2_rawspiketrains.mat", squeeze_me=True)["D"]
    counts = [trial[:, :1000].reshape(len(trial), 50, 20).sum(-1).T.astype(float) for trial in raw["data"]]
    whole = dyn.Recording.from_arrays(counts, bin_width=0.02, condition=raw["condition"])
    busiest = whole.values.sum((0, 1)).argsort(descending=True)[:40].tolist()
    spikes = whole.isel(unit=sorted(busiest)).split_trials({"train": 0.75, "test": 0.25}, seed=0)
    train, test = spikes.sel(split="train"), spikes.sel(split="test")
    assert train.condition is not None and test.condition is not None
    return Real(train, test, _some(test.unit, 0.25), (train.condition, test.condition))


def decisions() -> Real:
    """Steinmetz et al. (2019), session 12: 15 units in four regions each, 20 20 ms bins; side with more contrast."""
    trials, new = 150, 60
    whole = session(_data(), 12, 15, trials, new)
    with np.load(_data() / "steinmetz2019_multiregion" / "session12.npz", allow_pickle=False) as held:
        apart = held["contrast_left"] - held["contrast_right"]
    chosen = np.linspace(0, len(apart) - 1, trials + new).round().astype(int)
    side = np.array(["right", "", "left"])[np.sign(apart[chosen]).astype(int) + 1]
    train, test = whole.sel(split="train"), whole.sel(split="test")
    return Real(train, test, _some(test.unit, 0.25), (side[train.trial], side[test.trial]))


def movements() -> Real:
    """Threshold crossings and hand velocity of a monkey: 200 movements of some 22 bins of 50 ms, 60 channels.

    A movement begins where the file has a velocity of exactly zero though the position has jumped.
    """
    raw = scipy.io.loadmat(_data() / "chestek_m1_contdata" / "contdata95.mat")
    position, velocity, counts = raw["X"][:, :2], raw["X"][:, 2:], raw["Y"].astype(float)
    still = (velocity[1:] == 0.0).all(1) & (np.diff(position, axis=0) != 0.0).any(1)
    pieces = np.split(np.arange(len(counts)), np.flatnonzero(still) + 1)[:200]
    busiest = np.sort(counts.sum(0).argsort()[::-1][:60])
    whole = dyn.Recording.from_arrays([counts[piece][:, busiest] for piece in pieces], bin_width=0.05)
    hand = np.full((len(pieces), whole.num_bins, 2), np.nan)
    for row, piece in zip(hand, pieces, strict=True):
        row[: len(piece) - LAG] = velocity[piece[LAG:]]
    spikes = whole.split_trials({"train": 0.75, "test": 0.25}, seed=0)
    train, test = spikes.sel(split="train"), spikes.sel(split="test")
    return Real(train, test, _some(test.unit, 0.25), (hand[train.trial], hand[test.trial]))


REAL = {"reaches": reaches, "decisions": decisions, "movements": movements}
