"""Readers of spike times: real and made NWB files and pynapple objects against direct counting."""

from __future__ import annotations

import builtins
import warnings
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import h5py
import numpy as np
import pytest

from pyrodyn import readers
from pyrodyn.errors import RecordingError

pynwb = pytest.importorskip("pynwb")
nap = pytest.importorskip("pynapple")


@pytest.fixture
def real_file(data_dir) -> Path:
    return data_dir / "zheng_human_mtl_nwb" / "sub-4_ses-4_ecephys+image.nwb"


def write_nwb(path, times, starts, stops, *, obs=None, trial_columns=None, unit_columns=None, region=None) -> Path:
    """A small NWB file: one list of spike times a unit, one start and stop a trial."""
    nwb = pynwb.NWBFile("made for a test", "made", datetime(2020, 1, 1, tzinfo=UTC), session_id="day 1")
    if region is not None:
        device = nwb.create_device("probe")
        for name in dict.fromkeys(region):
            group = nwb.create_electrode_group(f"group {name}", "shank", name, device)
            nwb.add_electrode(location=name, group=group)
    for name in trial_columns or {}:
        nwb.add_trial_column(name, name)
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        nwb.add_trial(start_time=start, stop_time=stop, **{k: v[row] for k, v in (trial_columns or {}).items()})
    for name in unit_columns or {}:
        nwb.add_unit_column(name, name)
    for row, spikes in enumerate(times):
        extra = {name: values[row] for name, values in (unit_columns or {}).items()}
        if obs is not None:
            extra["obs_intervals"] = obs[row]
        if region is not None:
            extra["electrodes"] = [list(dict.fromkeys(region)).index(region[row])]
        nwb.add_unit(spike_times=np.asarray(spikes, float), id=10 + row, **extra)
    with pynwb.NWBHDF5IO(path, "w") as writer:
        writer.write(nwb)
    return path


def brute(times, start, num_bins, bin_width):
    """Half-open bins, spike by spike."""
    counts = np.zeros(num_bins)
    for time in times:
        for k in range(num_bins):
            counts[k] += start + k * bin_width <= time < start + (k + 1) * bin_width
    return counts


def report_of(caught) -> readers.ReadReport:
    """The one report among the warnings."""
    found = [w.message.report for w in caught if isinstance(w.message, readers.ReadWarning)]
    assert len(found) == 1
    return found[0]


# ------------------------------------------------------------------------------------------------ binning


@pytest.mark.parametrize("samples", [1, 3, 7, 600, 2100])  # 600 of 30 kHz: 0.02 s
def test_counts_on_edges_equal_integer_arithmetic(samples):
    """Times on a 30 kHz clock, many on edges: binning in float64 equals binning of the integer sample numbers."""
    rng = np.random.default_rng(samples)
    starts = rng.integers(0, 3_000_000, 40)
    spikes = np.sort(np.concatenate([starts + k * samples for k in range(-1, 12)] + [rng.integers(0, 3_030_000, 3000)]))
    got = readers.count_spikes(spikes / 30_000, starts / 30_000, 10, samples / 30_000)
    expected = np.zeros((40, 10), int)
    for trial, start in enumerate(starts):
        bins = (spikes - start) // samples
        expected[trial] = [np.sum(bins == k) for k in range(10)]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("width", ["0.1", "0.02", "0.005", "0.3"])
@pytest.mark.parametrize("start", ["0", "0.7", "1234.56", "-0.3"])
def test_decimal_edges_open_their_bin(width, start):
    """A spike written in decimal at an edge lies in the bin that begins there; width and edge are rounded apart."""
    edges = [float(Decimal(start) + k * Decimal(width)) for k in range(51)]
    got = readers.count_spikes(np.array(edges), np.array([float(start)]), 50, float(width))
    np.testing.assert_array_equal(got, np.ones((1, 50)))


def test_counts_equal_brute_force():
    rng = np.random.default_rng(1)
    times, starts = np.sort(rng.uniform(0, 20, 400)), rng.uniform(-1, 20, 7)
    got = readers.count_spikes(times, starts, 13, 0.137)
    np.testing.assert_array_equal(got, [brute(times, start, 13, 0.137) for start in starts])
    assert readers.count_spikes(np.zeros(0), starts, 13, 0.137).sum() == 0


# ------------------------------------------------------------------------------------------------ the real file


TICKS = 4_000_000  # the file's clock: all its times are multiples of 0.25 us, so counting can be done in integers


def direct(path: Path, column: str):
    """By h5py alone, in ticks: spike times of each unit, regions, a column of the encoding table, starts, stops."""
    with h5py.File(path) as file:
        stops = file["units/spike_times_index"][:]
        times = np.split(ticks(file["units/spike_times"][:]), stops[:-1])
        places = file["general/extracellular_ephys/electrodes/location"].asstr()[:]
        region = places[file["units/electrodes"][:]]
        table = file["intervals/encoding_table"]
        return times, region, *(ticks(table[name][:]) for name in (column, "start_time", "stop_time"))


def ticks(seconds) -> np.ndarray:
    whole = np.rint(seconds * TICKS)
    assert np.abs(whole - seconds * TICKS).max() < 1e-3
    return whole.astype(np.int64)


def count_ticks(times, starts, num_bins, bin_ticks) -> np.ndarray:
    return np.array([np.bincount(k[(k >= 0) & (k < num_bins)], minlength=num_bins)
                     for k in ((times - start) // bin_ticks for start in starts)])  # fmt: skip


def test_real_file_windows_equal_direct_counting(real_file):
    got = readers.read_nwb(
        real_file, bin_width=0.05, trials="encoding_table", align_to="boundary1_time", window=(-0.5, 1.0),
        condition="stimCategory",
    )  # fmt: skip
    times, region, event, *_ = direct(real_file, "boundary1_time")
    assert (got.num_trials, got.num_bins, got.num_units) == (90, 30, 35)
    expected = np.stack([count_ticks(t, event - TICKS // 2, 30, TICKS // 20) for t in times], axis=2)
    assert expected.sum() > 5000
    np.testing.assert_array_equal(got.observations.numpy(), expected)
    np.testing.assert_array_equal(got.region, region)
    np.testing.assert_allclose(got.time, np.arange(-10, 20) * 0.05, atol=1e-12)
    assert sorted(got.regions) == ["amygdala_right", "hippocampus_right"] and got.mask is None
    assert set(got.condition) == {"0", "1", "2"} and got.session == "4"


def test_real_file_ragged_trials_equal_direct_counting(real_file):
    got = readers.read_nwb(real_file, bin_width=0.1, trials="encoding_table", units=[3, 0, 20])
    with h5py.File(real_file) as file:
        ids = file["units/id"][:].tolist()
    times, region, _, start, stop = direct(real_file, "start_time")
    rows, lengths = [ids.index(name) for name in (3, 0, 20)], (stop - start) // (TICKS // 10)
    np.testing.assert_array_equal(got.lengths, lengths)
    np.testing.assert_array_equal(got.region, region[rows])
    assert len(set(lengths)) > 1 and got.unit.tolist() == [3, 0, 20]
    inside = np.arange(got.num_bins) < lengths[:, None]
    for unit, row in enumerate(rows):
        expected = count_ticks(times[row], start, got.num_bins, TICKS // 10) * inside
        np.testing.assert_array_equal(got.observations[:, :, unit].numpy(), expected)


def test_list_nwb_shows_what_to_ask_for(real_file):
    text = readers.list_nwb(real_file)
    for wanted in ("units: 35", "hippocampus_right (25)", "encoding_table (90 trials)", "boundary1_time"):
        assert wanted in text


# ------------------------------------------------------------------------------------------------ made files

STARTS, STOPS = np.arange(5) * 2.0, np.arange(5) * 2.0 + 1.0


def spikes(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.sort(rng.uniform(0, 10, 200)) for _ in range(count)]


def test_labels_come_through(tmp_path):
    path = write_nwb(
        tmp_path / "a.nwb", spikes(3), STARTS, STOPS, region=["V1", "V2", "V1"],
        unit_columns={"heldout": [True, False, True], "area": ["x", "y", "x"]},
        trial_columns={"split": ["train"] * 3 + ["test"] * 2, "kind": [1, 2, 1, 2, 1]},
    )  # fmt: skip
    got = readers.read_nwb(path, bin_width=0.1, condition="kind")
    assert got.region.tolist() == ["V1", "V2", "V1"] and got.heldout.tolist() == [True, False, True]
    assert got.split.tolist() == ["train"] * 3 + ["test"] * 2 and got.condition.tolist() == ["1", "2", "1", "2", "1"]
    assert got.unit.tolist() == [10, 11, 12] and got.session == "day 1" and got.lengths.tolist() == [10] * 5
    assert readers.read_nwb(path, bin_width=0.1, region="area").region.tolist() == ["x", "y", "x"]
    for times, column in zip(spikes(3), got.observations.numpy().transpose(2, 0, 1), strict=True):
        np.testing.assert_array_equal(column, [brute(times, start, 10, 0.1) for start in STARTS])


def test_bins_outside_observation_intervals_are_hidden(tmp_path):
    obs = [[[0.0, 2.6], [2.6, 3.0], [4.0, 20.0]], [[0.0, 20.0]]]  # 2.6 s, where two touch, lies inside a bin
    path = write_nwb(tmp_path / "a.nwb", spikes(2), STARTS, STOPS, obs=obs)
    with pytest.warns(UserWarning, match="outside its observation intervals") as caught:
        got = readers.read_nwb(path, bin_width=0.25, align_to="start_time", window=(-0.5, 1.5))
    outside = np.sum((spikes(2)[0] > 3.0) & (spikes(2)[0] < 4.0))
    assert f"{outside} of 200" in report_of(caught).units[0][1] and report_of(caught).units[0][0] == "10"
    edges = STARTS[:, None] + np.arange(-2, 7) * 0.25  # all exact in binary
    first, last = edges[:, :-1], edges[:, 1:]
    expected = (first >= 0) & ((last <= 3) | (first >= 4))
    mask = got.mask.numpy()
    np.testing.assert_array_equal(mask[:, :, 0], expected)
    np.testing.assert_array_equal(mask[:, :, 1], first >= 0)
    full = np.array([brute(spikes(2)[0], start - 0.5, 8, 0.25) for start in STARTS])
    np.testing.assert_array_equal(got.observations.numpy()[:, :, 0], full * expected)


def test_observation_intervals_end_on_a_bins_edge(tmp_path):
    """1.0 + 0.7 > 1.7 to float64, yet the seventh bin is observed; what is observed behind a trial's end is no bin."""
    obs = [[[0.3, 0.5], [1.0, 1.7]]]
    path = write_nwb(tmp_path / "a.nwb", [[0.35, 1.0, 1.65, 1.7]], [0.0, 1.0], [0.2, 2.0], obs=obs)
    with pytest.warns(readers.ReadWarning, match="trial 0: skipped: no unit is observed") as caught:
        got = readers.read_nwb(path, bin_width=0.1)
    assert report_of(caught).units == (), "a spike at either end of an interval lies inside"
    assert got.trial.tolist() == [1] and got.observations[0, :, 0].tolist() == [1, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert got.mask[0, :, 0].tolist() == [True] * 7 + [False] * 3


def test_trials_without_event_or_recording_are_skipped_and_named(tmp_path):
    event = [0.1, 2.5, np.nan, 6.5, 9.8]
    path = write_nwb(tmp_path / "a.nwb", spikes(1), STARTS, STOPS, trial_columns={"go": event})
    with pytest.warns(UserWarning) as caught:
        got = readers.read_nwb(path, bin_width=0.1, align_to="go", window=(-0.5, 0.5))
    assert got.trial.tolist() == [1, 3]
    reasons = dict(report_of(caught).trials)
    assert set(reasons) == {"0", "2", "4"} and "go is NaN" in reasons["2"]
    assert "leaves the recording" in reasons["0"] and "leaves the recording" in reasons["4"]
    with pytest.raises(RecordingError, match=r"a\.nwb(.|\n)*trial 2: skipped: go is NaN(.|\n)*strict=False"):
        readers.read_nwb(path, bin_width=0.1, align_to="go", window=(-0.5, 0.5), strict=True)


def test_trial_lengths_are_whole_bins_as_on_paper(tmp_path):
    """2.3 - 2.0 is 0.2999999999999998 to float64, which is three bins of 0.1 s all the same; 0.29 s are two."""
    starts = np.array([2.0, 4.0, 6.0])
    path = write_nwb(tmp_path / "a.nwb", spikes(1), starts, [2.3, 4.29, 6.35])
    got = readers.read_nwb(path, bin_width=0.1)
    assert got.lengths.tolist() == [3, 2, 3]
    expected = np.array([brute(spikes(1)[0], start, 3, 0.1) for start in starts])
    expected[1, 2] = 0
    np.testing.assert_array_equal(got.observations[:, :, 0].numpy(), expected)


def test_an_empty_unit_is_kept(tmp_path):
    path = write_nwb(tmp_path / "a.nwb", [*spikes(1), []], STARTS, STOPS)
    with pytest.warns(UserWarning, match="silent"):  # the Recording's own warning, and no report
        got = readers.read_nwb(path, bin_width=0.1)
    assert got.num_units == 2 and got.observations[:, :, 1].sum() == 0


WRONG = [
    ({"trials": "reaches"}, "'reaches' is not a table of intervals; the file has trials"),
    ({"align_to": "go", "window": (0, 1)}, "'go' is not a column of 'trials'; it has start_time, stop_time"),
    ({"align_to": "go"}, "needs a window"),
    ({"condition": "kind"}, "'kind' is not a column"),
    ({"region": "area"}, "region='area' is not a column of the Units table; it has spike_times"),
    ({"units": [10, 99]}, r"units asks for \[99\]"),
    ({"units": []}, "no unit to read"),
    ({"bin_width": 0.0}, "bin_width is 0.0"),
    ({"bin_width": float("nan")}, "bin_width is nan"),
    ({"window": (0, 0.25)}, "whole number"),
    ({"window": (1, 0)}, "start < stop"),
    ({"window": (50, 51)}, "no trial is left"),
    ({"bin_width": 5.0}, "no trial is left(.|\n)*shorter than one bin"),
    ({"bin_width": 1e-10}, "GiB"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_requests_say_what_there_is(tmp_path, options, message):
    path = write_nwb(tmp_path / "a.nwb", spikes(1), STARTS, STOPS)
    with pytest.raises(RecordingError, match=message):
        readers.read_nwb(path, **{"bin_width": 0.1, **options})


def test_missing_optional_package_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("pynwb", "pynapple"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "pyrodyn\[nwb\]"'):
        readers.read_nwb(tmp_path / "a.nwb", bin_width=0.1)
    with pytest.raises(ImportError, match=r'pip install "pyrodyn\[nwb\]"'):
        readers.read_pynapple(None, None, bin_width=0.1)


# ------------------------------------------------------------------------------------------------ pynapple


def pynapple_twin(times, support, *, trial_metadata=None, **unit_metadata):
    group = {10 + row: nap.Ts(np.asarray(t)) for row, t in enumerate(times)}
    with warnings.catch_warnings():
        # pynapple: a column named "split" hides behind the method of that name. It is read by get_info.
        warnings.filterwarnings("ignore", message="Metadata name 'split' overlaps", category=UserWarning)
        trials = nap.IntervalSet(STARTS, STOPS, metadata=trial_metadata)
    return nap.TsGroup(group, time_support=support, metadata=unit_metadata), trials


@pytest.mark.parametrize("options", [{}, {"align_to": "go", "window": (-0.3, 0.6)}])
def test_pynapple_equals_nwb(tmp_path, options):
    go = STARTS + np.array([0.5, 0.61, 0.37, 0.4, 0.9])
    split, kind = ["train", "test"] * 2 + ["test"], ["a", "b", "a", "b", "a"]
    path = write_nwb(
        tmp_path / "a.nwb", spikes(3), STARTS, STOPS, region=["V1", "V2", "V1"],
        unit_columns={"heldout": [False, True, False]}, trial_columns={"go": go, "split": split, "kind": kind},
    )  # fmt: skip
    group, trials = pynapple_twin(
        spikes(3), nap.IntervalSet(0, 10), trial_metadata={"go": go, "split": split, "kind": kind},
        region=["V1", "V2", "V1"], heldout=[False, True, False],
    )  # fmt: skip
    ours = readers.read_nwb(path, bin_width=0.1, condition="kind", **options)
    theirs = readers.read_pynapple(group, trials, bin_width=0.1, condition="kind", **options)
    np.testing.assert_array_equal(ours.observations.numpy(), theirs.observations.numpy())
    for name in ("unit", "trial", "time", "region", "heldout", "split", "condition", "lengths"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert ours.observations.sum() > 100 and ours.mask is None and theirs.mask is None


def test_pynapple_counts_equal_its_own_tensor():
    group, trials = pynapple_twin(spikes(3), nap.IntervalSet(0, 10))
    ours = readers.read_pynapple(group, trials, bin_width=0.25).observations.numpy()
    np.testing.assert_array_equal(ours, nap.build_tensor(group, trials, bin_size=0.25).transpose(1, 2, 0))


def test_pynapple_time_support_becomes_the_mask():
    group, trials = pynapple_twin(spikes(2), nap.IntervalSet([0, 4.5], [2.5, 8.0]))
    with pytest.warns(UserWarning, match=r"trial 4: skipped: no unit is observed") as caught:
        got = readers.read_pynapple(group, trials, bin_width=0.25)
    assert [name for name, _ in report_of(caught).trials] == ["4"]
    expected = np.ones((4, 4), bool)
    expected[1, 2:], expected[2, :2] = False, False  # trial 1: 2 to 3 s, trial 2: 4 to 5 s
    np.testing.assert_array_equal(got.mask.numpy(), np.repeat(expected[:, :, None], 2, axis=2))
    # A support from the first spike to the last is pynapple's default, not a statement about the recording.
    everything = nap.TsGroup({0: nap.Ts(spikes(1)[0])})
    assert readers.read_pynapple(everything, trials, bin_width=0.25).mask is None


def test_pynapple_neighbouring_trials_keep_their_last_bin():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some starts and ends are equal", category=UserWarning)
        trials = nap.IntervalSet([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    assert trials.end[0] < 1.0  # the microsecond that pynapple takes
    got = readers.read_pynapple(nap.TsGroup({0: nap.Ts(spikes(1)[0])}), trials, bin_width=0.02)
    assert got.lengths.tolist() == [50, 50, 50]


def test_pynapple_wrong_requests():
    group, trials = pynapple_twin(spikes(2), nap.IntervalSet(0, 10))
    with pytest.raises(RecordingError, match="'go' is not a metadata column of trials"):
        readers.read_pynapple(group, trials, bin_width=0.1, align_to="go", window=(0, 1))
    with pytest.raises(RecordingError, match="'area' is not a metadata column of spikes; it has rate"):
        readers.read_pynapple(group, trials, bin_width=0.1, region="area")
    with pytest.raises(RecordingError, match="spikes is a IntervalSet; expected a pynapple TsGroup"):
        readers.read_pynapple(trials, trials, bin_width=0.1)
