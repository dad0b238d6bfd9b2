"""Five real recordings, each loaded by one public call, fitted, and predicted; a warning is a failure here."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import xarray as xr

import pyrodyn as dyn
from pyrodyn import inference, models, readouts
from pyrodyn.scoring import bits_per_spike

ENGINES = {"Laplace": inference.Laplace(draws=60), "SVI": inference.SVI(steps=20, draws=60)}


def reach(folder: Path) -> dyn.Recording:
    """Ragged trials of spikes at 1 ms, binned to 20 ms."""
    raw = scipy.io.loadmat(folder / "datahigh_reach" / "ex2_rawspiketrains.mat", squeeze_me=True)["D"]
    bins = [spikes.shape[1] // 20 for spikes in raw["data"]]
    counts = [s[:, : 20 * n].reshape(61, n, 20).sum(2).T for s, n in zip(raw["data"], bins, strict=True)]
    return dyn.Recording.from_arrays(counts, bin_width=0.02, condition=raw["condition"], session="reach")


def steinmetz(folder: Path) -> dyn.Recording:
    """Spikes at 10 ms in ten areas; a Recording warns of silent units, so those stay behind."""
    with np.load(folder / "steinmetz2019_multiregion" / "session1.npz", allow_pickle=False) as held:
        fires = held["spikes"].any((0, 2))
        return dyn.Recording.from_arrays(
            held["spikes"][:, fires].transpose(0, 2, 1), bin_width=0.01, region=held["brain_area"][fires]
        )


def medial_temporal_lobe(folder: Path) -> dyn.Recording:
    return dyn.readers.read_nwb(
        folder / "zheng_human_mtl_nwb" / "sub-4_ses-4_ecephys+image.nwb",
        bin_width=0.05,
        trials="encoding_table",
        window=(0.0, 1.5),
    )


def resting_bold(folder: Path) -> dyn.Recording:
    with (folder / "nitime_fmri" / "fmri_timeseries.csv").open() as file:
        names, *rows = list(csv.reader(file))
    return dyn.Recording.from_arrays(np.array(rows, dtype=float), bin_width=1.89, unit=names, region=names)


def motor_cortex(folder: Path) -> dyn.Recording:
    """Rows are pieces of trials strung together: a new one begins wherever the hand jumps."""
    raw = scipy.io.loadmat(folder / "chestek_m1_contdata" / "contdata95.mat")
    hand = raw["X"].astype(float)
    begins = 1 + np.flatnonzero(np.hypot(*np.diff(hand[:, :2], axis=0).T) > 20.0)
    pieces = [rows for rows in np.split(np.arange(len(hand)), begins) if len(rows) >= 15]
    return dyn.Recording.from_arrays(
        [raw["Y"][rows] for rows in pieces],
        bin_width=0.05,
        behaviour=[hand[rows] for rows in pieces],
        behaviour_names=["x", "y", "vx", "vy"],
    )


def busiest(recording: dyn.Recording, trials: int, units: int) -> dyn.Recording:
    """The first trials of the units with the most spikes, so that a fit takes seconds."""
    assert recording.observations is not None
    order = recording.observations.sum((0, 1)).argsort(descending=True)[:units]
    return recording.isel(trial=slice(0, trials), unit=sorted(order.tolist()))


RECORDINGS: dict[str, tuple[Callable[[Path], dyn.Recording], tuple[int, int, int]]] = {
    "datahigh_reach": (reach, (112, 76, 61)),
    "steinmetz2019_multiregion": (steinmetz, (114, 40, 720)),
    "zheng_human_mtl_nwb": (medial_temporal_lobe, (90, 30, 35)),
    "nitime_fmri": (resting_bold, (1, 250, 31)),
    "chestek_m1_contdata": (motor_cortex, (1456, 25, 95)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", RECORDINGS)
def test_loads_fits_and_predicts(name: str, engine: str, data_dir: Path) -> None:
    load, shape = RECORDINGS[name]
    whole = load(data_dir)
    assert (whole.num_trials, whole.num_bins, whole.num_units) == shape
    recording = busiest(whole, trials=8, units=8)
    readout = readouts.Poisson() if recording.counts else readouts.Gaussian()
    posterior = dyn.fit(models.LDS(latent_dim=2, readout=readout), recording, ENGINES[engine], seed=0)
    for group in ("posterior", "invariants", "unconstrained_posterior", "latents", "log_likelihood"):
        for variable in posterior[group].data_vars.values():
            assert np.isfinite(variable.values).all(), f"{group}/{variable.name}"

    predicted = dyn.predict(posterior, recording, draws=20, seed=0)
    observed = recording.to_xarray()["observations"]
    assert predicted["expected"].dims == observed.dims and predicted["expected"].shape == observed.shape
    seen = observed.notnull().values
    for variable in ("expected", "expected_sd", "expected_lower", "expected_upper"):
        assert np.isfinite(predicted[variable].values[seen]).all()
    if recording.counts:
        assert bits_per_spike(predicted["expected"], observed) > 0.0
    else:
        assert xr.corr(predicted["expected"], observed, "time").mean() > 0.5
