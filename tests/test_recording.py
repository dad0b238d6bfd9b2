"""A Recording refuses what cannot be used, by name, and its parts equal plain numpy."""

from __future__ import annotations

import csv
import pickle
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import xarray as xr

from pyrodyn.errors import RecordingError
from pyrodyn.recording import Recording

UNITS = [f"u{i}" for i in range(7)]
REGIONS = ["V2", "V1", "V1", "V2", "MT", "V1", "V2"]
CONDITIONS = ["left", "right", "left", "left", "right"]
LENGTHS = np.array([11, 4, 9, 11, 6])
WIDTH = 0.02
SHAPE = (5, 11, 7)


def counts_array(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    values = np.random.default_rng(seed).poisson(2.0, shape).astype(float)
    values[0, 0] += 1.0  # no unit is silent
    return values


def full(**changes: Any) -> Recording:
    """A recording that uses every argument."""
    rng = np.random.default_rng(3)
    options: dict[str, Any] = {
        "bin_width": WIDTH,
        "time": 1.5 + WIDTH * np.arange(11),
        "region": REGIONS,
        "unit": UNITS,
        "heldout": [False, True] * 3 + [False],
        "trial": [10, 11, 15, 12, 19],
        "condition": CONDITIONS,
        "split": ["train", "train", "test", "train", "test"],
        "session": "monkey A",
        "mask": rng.random(SHAPE) < 0.8,
        "lengths": LENGTHS,
        "inputs": rng.normal(size=(5, 11, 2)) * [1.0, 3.0],
        "input_names": ["go", "target"],
        "behaviour": rng.normal(size=(5, 11, 3)),
        "behaviour_names": ["x", "y", "speed"],
        "center": np.arange(7.0),
        "scale": np.arange(1.0, 8.0),
    }
    return Recording.from_arrays(rng.normal(size=SHAPE), **(options | changes))


def plain(recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """Observations and full mask as arrays."""
    assert recording.observations is not None
    values = recording.observations.numpy()
    return values, np.ones(values.shape, bool) if recording.mask is None else recording.mask.numpy()


# ------------------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "negative", "fraction", "overflow"])
def test_a_bad_value_is_named_where_it_first_occurs(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = counts_array(seed)
    number = int(rng.integers(1, 6))
    flat = rng.choice(values.size, number, replace=False)
    bad = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "negative": -3.0, "fraction": 0.5, "overflow": 2e9}[kind]
    values.ravel()[flat] = bad
    trial, time, unit = np.unravel_index(flat.min(), values.shape)
    place = f"trial {trial}, time {time * WIDTH:.3f} s, unit 'u{unit}'"
    expected, remedy = {
        "nan": (f"observations has {number} NaN (first: {place})", "pass missing='mask'"),
        "inf": (f"observations has {number} infinite values (first: {place})", "mask="),
        "-inf": (f"observations has {number} infinite values (first: {place})", "mask="),
        "negative": (f"{number} entries that are not event counts (first: -3, negative, at {place})", "counts=False"),
        "fraction": (
            f"{number} entries that are not event counts (first: 0.5, not an integer, at {place})",
            "Gaussian",
        ),
        "overflow": (f"{number} counts above 1e+09 (first: 2e+09 at {place})", "counts=False"),
    }[kind]
    with pytest.raises(RecordingError, match=f"{re.escape(expected)}.*{remedy}"):
        Recording.from_arrays(values, bin_width=WIDTH, unit=UNITS, counts=True)

    # The same values under a mask do no harm.
    mask = np.ones(values.shape, bool)
    mask.ravel()[flat] = False
    recording = Recording.from_arrays(values, bin_width=WIDTH, unit=UNITS, mask=mask)
    seen, observed = plain(recording)
    assert recording.counts
    assert np.array_equal(observed, mask)
    assert np.array_equal(seen, np.where(mask, values, 0.0))


def test_missing_mask_hides_nan_and_nothing_else() -> None:
    values = counts_array()
    values[1, 2, 3] = values[4, 10, 0] = np.nan
    recording = Recording.from_arrays(values, bin_width=WIDTH, missing="mask")
    assert np.array_equal(plain(recording)[1], ~np.isnan(values))
    assert np.array_equal(plain(recording)[0], np.nan_to_num(values))
    values[0, 0, 0] = np.inf
    with pytest.raises(RecordingError, match="1 infinite"):
        Recording.from_arrays(values, bin_width=WIDTH, missing="mask")
    with pytest.raises(RecordingError, match="missing is 'drop', expected 'raise' or 'mask'"):
        Recording.from_arrays(values, bin_width=WIDTH, missing="drop")


@pytest.mark.parametrize(
    ("values", "counts"), [(counts_array(), True), (counts_array() - 2, False), (counts_array() * 0.5, False)]
)
def test_counts_are_inferred(values: np.ndarray, counts: bool) -> None:
    assert Recording.from_arrays(values, bin_width=WIDTH).counts is counts
    assert Recording.from_arrays(values, bin_width=WIDTH, counts=False).counts is False


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8, np.int64, bool, torch.float32, torch.bfloat16])
def test_any_real_dtype_becomes_float64(dtype: Any) -> None:
    values = np.minimum(counts_array(), 1)
    given = torch.as_tensor(values).to(dtype) if isinstance(dtype, torch.dtype) else values.astype(dtype)
    recording = Recording.from_arrays(given, bin_width=WIDTH)
    assert recording.observations is not None
    assert recording.observations.dtype == torch.float64
    assert np.array_equal(recording.observations.numpy(), values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([["a", "b"]]), "dtype <U1, expected real numbers"),
        (counts_array().astype(complex), "dtype complex128"),
        (counts_array().astype(object), r"dtype object.*astype\(float\)"),
        ([[1.0, 2.0], [3.0]], "not a rectangular array"),
        (np.ma.masked_equal(counts_array(), 0), r"masked array; pass observations.data and mask=~"),
        (xr.DataArray(counts_array(), dims=("trial", "time", "unit")), "from_xarray"),
        (np.zeros(5), r"1 dimensions with shape \(5,\), expected \(trial, time, unit\)"),
        (np.zeros((2, 2, 2, 2)), "4 dimensions"),
        (np.zeros((0, 3, 2)), r"no trial: shape \(0, 3, 2\)"),
        (np.zeros((3, 0, 2)), "no time"),
        (np.zeros((3, 2, 0)), "no unit"),
        ([np.zeros((3, 2)), np.zeros((0, 2))], r"observations\[1\] has no time bins"),
        ([np.zeros((3, 2)), np.zeros((3, 4))], r"observations\[1\] has shape \(3, 4\), expected \(time, unit\)"),
        ([np.zeros((3, 2)), np.array([["a", "b"]])], r"observations\[1\] has dtype"),
    ],
)
def test_arrays_that_are_no_recording(values: object, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        Recording.from_arrays(values, bin_width=WIDTH)


@pytest.mark.parametrize("shape", [(1, 9, 4), (5, 1, 4), (5, 9, 1), (1, 1, 1)])
def test_axes_of_length_one_work(shape: tuple[int, int, int]) -> None:
    recording = Recording.from_arrays(counts_array(1, shape), bin_width=WIDTH, region=["A"] * shape[2])
    assert (recording.num_trials, recording.num_bins, recording.num_units) == shape
    assert recording.regular
    back = Recording.from_xarray(recording.to_xarray())
    assert back.digest() == recording.digest()
    assert recording.isel(trial=0, time=0, unit=0).num_units == 1


# ------------------------------------------------------------------------------------------- transposed, labels


@pytest.mark.parametrize("argument", ["region", "unit", "heldout"])
def test_labels_of_another_axis_say_transposed(argument: str) -> None:
    labels: Any = {"region": ["A"] * 11, "unit": list(range(11)), "heldout": [True] * 11}[argument]
    message = rf"{argument} has 11 entries.*7 along its unit axis.*time axis has 11.*swapaxes\(observations, 2, 1\)"
    with pytest.raises(RecordingError, match=message):
        Recording.from_arrays(counts_array(), bin_width=WIDTH, **{argument: labels})
    fixed = Recording.from_arrays(np.swapaxes(counts_array(), 2, 1), bin_width=WIDTH, **{argument: labels})
    assert fixed.num_units == 11


@pytest.mark.parametrize("argument", ["region", "unit", "heldout", "trial", "condition", "split", "time", "lengths"])
def test_labels_of_a_wrong_length_name_argument_and_axis(argument: str) -> None:
    axis = {"region": "unit", "unit": "unit", "heldout": "unit", "time": "time"}.get(argument, "trial")
    with pytest.raises(RecordingError, match=f"{argument} has .*{axis}"):
        changes: dict[str, Any] = {"bin_width": WIDTH, argument: np.arange(1, 4)}
        Recording.from_arrays(counts_array(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": ["a", "b", "c", "b", "e", "f", "g"]}, "unit labels must be unique, but 'b' occurs 2 times"),
        ({"trial": [0, 1, 2, 3, 3]}, "trial labels must be unique, but 3 occurs 2 times"),
        ({"trial": ["0", 1, 2, 3, 4]}, "trial labels must be all integers or all strings"),
        ({"region": "V1"}, "region is the single string 'V1'"),
        ({"region": ["A", None, "A", "A", "A", "A", "A"]}, r"region\[1\] is None, expected a name for every unit"),
        ({"heldout": [0, 1, 0, 1, 0, 1, 0]}, "heldout must be boolean"),
        ({"lengths": [1, 2, 3, 4, 12]}, r"lengths\[4\] is 12, expected 1 to 11"),
        ({"lengths": [0, 2, 3, 4, 5]}, r"lengths\[0\] is 0"),
        ({"lengths": [1.0, 2.0, 3.0, 4.0, 5.0]}, "dtype float64"),
        ({"mask": np.ones(SHAPE)}, "mask has dtype float64, expected bool"),
        (
            {"mask": np.ones((7, 11, 5), bool)},
            r"mask has shape \(7, 11, 5\), expected \(trial, time, unit\) = \(5, 11, 7\)",
        ),
        ({"inputs": np.zeros((5, 10, 1))}, r"inputs has shape \(5, 10, 1\), expected .* = \(5, 11, any\)"),
        ({"inputs": np.zeros((5, 11, 2)), "input_names": ["a"]}, "input_names has 1 names, but there are 2"),
        ({"inputs": np.zeros((5, 11, 2)), "input_names": ["a", "a"]}, "'a' occurs 2 times"),
        ({"behaviour": [np.zeros((3, 2))] * 5}, "behaviour has trials of 3, 3, 3, 3, 3 bins, expected .* 11, 11"),
        ({"input_names": ["a"]}, "without inputs"),
        ({"behaviour_names": ["a"]}, "without behaviour"),
        ({"center": np.zeros(3)}, r"center has shape \(3,\), expected \(unit,\) = \(7,\)"),
        ({"scale": np.zeros(7)}, "scale must be finite and positive"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        Recording.from_arrays(counts_array(), bin_width=WIDTH, **changes)


def test_only_truly_ambiguous_arrays_warn() -> None:
    with pytest.warns(UserWarning, match=r"fewer time bins \(7\) than units \(11\)"):
        Recording.from_arrays(counts_array(0, (7, 11)), bin_width=WIDTH)
    with pytest.warns(UserWarning, match="fewer time bins"):
        Recording.from_arrays(counts_array(0, (1, 7, 11)), bin_width=WIDTH)
    with pytest.warns(UserWarning, match=r"as many time bins as units \(8\)"):
        Recording.from_arrays(counts_array(0, (8, 8)), bin_width=WIDTH)
    # Warnings are errors in these tests: labels, several trials, or more bins than units settle it.
    Recording.from_arrays(counts_array(0, (7, 11)), bin_width=WIDTH, region=["A"] * 11)
    Recording.from_arrays(counts_array(0, (8, 8)), bin_width=WIDTH, unit=list("abcdefgh"))
    Recording.from_arrays(counts_array(0, (2, 8, 8)), bin_width=WIDTH)
    Recording.from_arrays(counts_array(0, (1, 8, 8)), bin_width=WIDTH)
    Recording.from_arrays(counts_array(0, (3, 7, 11)), bin_width=WIDTH)
    Recording.from_arrays(counts_array(0, (11, 7)), bin_width=WIDTH)


# ------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fault", ["duplicate", "backwards", "nan"])
def test_bad_times_are_named(fault: str, seed: int) -> None:
    i = int(np.random.default_rng(seed).integers(1, 11))
    time = np.arange(11) * 0.1
    time[i] = {"duplicate": time[i - 1], "backwards": time[i - 1] - 0.05, "nan": np.nan}[fault]
    expected = {"duplicate": f"time[{i}] = {time[i]:g} s duplicates time[{i - 1}]",
                "backwards": f"time[{i}] = {time[i]:g} s comes before time[{i - 1}]",
                "nan": f"time[{i}] is nan"}[fault]  # fmt: skip
    with pytest.raises(RecordingError, match=re.escape(expected)):
        Recording.from_arrays(counts_array(), time=time)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "bin_width or time is required"),
        ({"bin_width": 0.0}, "bin_width must be positive and finite, got 0.0"),
        ({"bin_width": np.nan}, "positive and finite"),
        ({"bin_width": "20 ms"}, "bin_width must be a positive number, got '20 ms'"),
        (
            {"bin_width": 0.02, "time": np.arange(11) * 20.0},
            "bin_width = 0.02 s disagrees with time.*median step is 20 s",
        ),
        ({"time": np.zeros((5, 11))}, r"time has shape \(5, 11\)"),
        ({"time": np.arange(11).astype("timedelta64[s]")}, "time has dtype timedelta64"),
    ],
)
def test_bin_width_and_time_must_agree(options: dict, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        Recording.from_arrays(counts_array(), **options)


def test_times_and_bin_width() -> None:
    recording = Recording.from_arrays(counts_array(), bin_width=0.02)
    assert np.array_equal(recording.time, np.arange(11) * 0.02)
    decimal = Recording.from_arrays(counts_array(), time=np.float32(100) + np.arange(11, dtype=np.float32) / 4)
    assert decimal.regular
    assert decimal.bin_width == 0.25
    uneven = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 20.0])
    irregular = Recording.from_arrays(counts_array(), time=uneven, bin_width=1.0)
    assert not irregular.regular
    assert irregular.bin_width == 1.0
    with pytest.raises(RecordingError, match="bin_width is required with a single time bin"):
        Recording.from_arrays(counts_array()[:, :1], time=[0.5])
    assert Recording.from_arrays(counts_array()[:, :1], time=[0.5], bin_width=0.1).time[0] == 0.5


# ------------------------------------------------------------------------------------------- ragged, masks


@pytest.mark.parametrize("seed", range(6))
def test_ragged_trials_equal_padded_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, 5)
    trials = [counts_array(seed + i, (1, n, 7))[0] for i, n in enumerate(lengths)]
    inputs = [rng.normal(size=(n, 2)) for n in lengths]
    behaviour = [rng.normal(size=(n, 1)) for n in lengths]
    seen = [rng.random((n, 7)) < 0.7 for n in lengths]
    for mask in seen:
        mask[0] = True
    ragged = Recording.from_arrays(trials, bin_width=WIDTH, mask=seen, inputs=inputs, behaviour=behaviour)

    size = lengths.max()
    values, mask = np.full((5, size, 7), -9.5), np.zeros((5, size, 7), bool)
    drive, hand = np.full((5, size, 2), np.nan), np.full((5, size, 1), 4.0)
    for i, n in enumerate(lengths):
        values[i, :n], mask[i, :n], drive[i, :n], hand[i, :n] = trials[i], seen[i], inputs[i], behaviour[i]
    padded = Recording.from_arrays(
        values, bin_width=WIDTH, mask=mask | (np.arange(size) >= lengths[:, None])[:, :, None], lengths=lengths,
        inputs=drive, behaviour=hand,
    )  # fmt: skip
    assert ragged.digest() == padded.digest()
    assert ragged.counts
    assert np.array_equal(ragged.lengths, lengths)
    assert np.array_equal(plain(ragged)[1], mask)
    assert ragged.behaviour is not None
    for i, n in enumerate(lengths):
        assert np.array_equal(plain(ragged)[0][i, :n], trials[i] * seen[i])
        assert np.array_equal(ragged.behaviour[i, :n], behaviour[i])
        assert np.isnan(ragged.behaviour[i, n:]).all()
    # sd over the bins that exist, not over padding
    assert np.allclose(ragged.input_scale.numpy(), np.concatenate(inputs).std(0), rtol=1e-13)


def test_masks_broadcast_and_the_full_mask_is_none() -> None:
    values = counts_array()
    by_bin = np.random.default_rng(0).random((5, 11)) < 0.5
    by_bin[0, 0] = True
    recording = Recording.from_arrays(values, bin_width=WIDTH, mask=by_bin)
    assert np.array_equal(plain(recording)[1], np.repeat(by_bin[:, :, None], 7, 2))
    one = Recording.from_arrays(values[0], bin_width=WIDTH, mask=np.ones((11, 7), bool), time=np.arange(11) * WIDTH)
    assert one.mask is None
    assert Recording.from_arrays(values, bin_width=WIDTH, mask=torch.ones(SHAPE, dtype=torch.bool)).mask is None
    # A part without hidden entries is on the fast path again.
    assert recording.sel(trial=[0], time=[0.0]).mask is None


def test_inputs_must_be_finite_inside_trials() -> None:
    inputs = np.zeros((5, 11, 2))
    inputs[1, LENGTHS[1] :] = np.nan
    recording = Recording.from_arrays(counts_array(), bin_width=WIDTH, lengths=LENGTHS, inputs=inputs)
    assert recording.inputs is not None
    assert torch.equal(recording.inputs, torch.zeros(5, 11, 2, dtype=torch.float64))
    assert recording.input_scale.tolist() == [1.0, 1.0]
    inputs[2, 3, 1] = np.nan
    with pytest.raises(RecordingError, match=r"inputs has 1 NaN.*trial 2, time 0.060 s, input 'go'"):
        Recording.from_arrays(
            counts_array(), bin_width=WIDTH, lengths=LENGTHS, inputs=inputs, input_names=["cue", "go"]
        )


# ------------------------------------------------------------------------------------------- channels


def test_center_and_scale_are_measured_over_observed_entries() -> None:
    rng = np.random.default_rng(5)
    values, mask = 1e4 + rng.normal(size=SHAPE), rng.random(SHAPE) < 0.6
    recording = Recording.from_arrays(values, bin_width=WIDTH, mask=mask)
    for i in range(7):
        entries = values[:, :, i][mask[:, :, i]]
        assert abs(float(recording.center[i]) - entries.mean()) < 1e-10
        assert abs(float(recording.scale[i]) - entries.std()) < 1e-10
    spikes = Recording.from_arrays(counts_array(), bin_width=WIDTH)
    assert spikes.center.tolist() == [0.0] * 7
    assert spikes.scale.tolist() == [1.0] * 7
    for part in (
        recording.sel(trial=[1, 2]), recording.isel(time=slice(3, 6)), recording.hide(trial=0),
        recording.with_observations(values * 3), recording.blank(), recording.to("cpu"),
        recording.split_trials({"a": 0.5, "b": 0.5}, seed=0), Recording.from_xarray(recording.to_xarray()),
    ):  # fmt: skip
        assert torch.equal(part.center, recording.center)
        assert torch.equal(part.scale, recording.scale)
    assert torch.equal(recording.isel(unit=[4, 2]).scale, recording.scale[[4, 2]])


def test_silent_constant_and_hidden_units_are_named_and_kept() -> None:
    values = counts_array()
    values[:, :, [1, 4]] = 0
    with pytest.warns(UserWarning, match="units 'u1', 'u4' are silent") as caught:
        recording = Recording.from_arrays(values, bin_width=WIDTH, unit=UNITS)
    assert caught[0].filename == __file__  # the warning points at the caller's line
    assert recording.num_units == 7
    values = np.random.default_rng(0).normal(size=SHAPE)
    values[:, :, 2] = 0.1
    with pytest.warns(UserWarning, match="unit 'u2' is constant"):
        recording = Recording.from_arrays(values, bin_width=WIDTH, unit=UNITS)
    assert recording.scale[2] == 1.0
    values[:, :, 2] = np.nan
    with pytest.warns(UserWarning, match="unit 'u2' is never observed"):
        recording = Recording.from_arrays(values, bin_width=WIDTH, unit=UNITS, missing="mask")
    assert recording.scale[2] == 1.0
    assert torch.isfinite(recording.center).all()


# ------------------------------------------------------------------------------------------- xarray


@pytest.mark.parametrize(
    "recording",
    [
        full(),
        full().sel(time=slice(1.5, 1.56)).isel(time=[0, 2], unit=[3, 1]),
        full().hide(region="V1"),
        full().blank(),
        Recording.from_arrays(counts_array(), bin_width=WIDTH),
        Recording.from_arrays(counts_array(), bin_width=WIDTH).blank(),
    ],
    ids=["full", "part", "hidden", "blank", "plain", "plain blank"],
)
def test_to_xarray_and_back_through_a_file(recording: Recording, tmp_path: Path) -> None:
    dataset = recording.to_xarray()
    dataset.to_netcdf(tmp_path / "recording.nc", engine="h5netcdf")
    for read in (dataset, xr.load_dataset(tmp_path / "recording.nc", engine="h5netcdf")):
        back = Recording.from_xarray(read)
        assert back.digest() == recording.digest()
        assert (back.bin_width, back.counts, back.session) == (recording.bin_width, recording.counts, recording.session)
        xr.testing.assert_identical(back.to_xarray(), dataset)
    assert all(isinstance(value, str | int | float) for value in dataset.attrs.values())
    # A copy: writing to it leaves the recording alone.
    before = recording.digest()
    if "observations" in dataset:
        dataset["observations"].values[:] = 77.0
    dataset["mask"].values[:] = False
    dataset["region"].values[:] = "?"
    assert Recording.from_xarray(recording.to_xarray()).digest() == before


def test_to_xarray_content() -> None:
    recording = full()
    dataset = recording.to_xarray()
    values, mask = plain(recording)
    assert np.array_equal(dataset["observations"].values, np.where(mask, values, np.nan), equal_nan=True)
    assert np.array_equal(dataset["mask"].values, mask)
    assert dataset["observations"].dims == ("trial", "time", "unit")
    for name, dim in [("region", "unit"), ("heldout", "unit"), ("condition", "trial"), ("split", "trial")]:
        assert dataset[name].dims == (dim,)
        assert np.array_equal(dataset[name].values, getattr(recording, name))
    assert np.array_equal(dataset["length"].values, LENGTHS)
    assert dataset.attrs == {"bin_width": WIDTH, "counts": 0, "session": "monkey A"}


@pytest.mark.parametrize("dims", [("trial", "time", "unit"), ("unit", "trial", "time"), ("time", "unit", "trial")])
def test_a_bare_data_array_in_any_order(dims: tuple[str, ...]) -> None:
    coords = {"time": 3.0 + np.arange(11) * WIDTH, "unit": UNITS, "region": ("unit", REGIONS)}
    array = xr.DataArray(counts_array(), dims=("trial", "time", "unit"), coords=coords).transpose(*dims)
    recording = Recording.from_xarray(array)
    assert np.array_equal(plain(recording)[0], counts_array())
    assert recording.region.tolist() == REGIONS
    assert recording.bin_width == pytest.approx(WIDTH, rel=1e-9)
    with pytest.raises(RecordingError, match=r"dims \(trial, time, unit\), got .*neuron.*rename"):
        Recording.from_xarray(array.rename(unit="neuron"))


def test_nan_padding_in_xarray_becomes_lengths() -> None:
    values = counts_array()
    for row, n in zip(values, LENGTHS, strict=True):
        row[n:] = np.nan
    array = xr.DataArray(values, dims=("trial", "time", "unit"), attrs={"bin_width": WIDTH})
    recording = Recording.from_xarray(array)
    assert np.array_equal(recording.lengths, LENGTHS)
    assert np.array_equal(plain(recording)[1], ~np.isnan(values))
    values[0, -1, :-1] = np.nan  # one unit still has a value: missing data, not the end of the trial
    with pytest.raises(RecordingError, match=r"6 NaN \(first: trial 0, time 0.200 s, unit 0\)"):
        Recording.from_xarray(array.copy(data=values))
    values[:] = counts_array()
    values[3] = np.nan
    with pytest.raises(RecordingError, match=r"lengths\[3\] is 0.*leave trials without bins out"):
        Recording.from_xarray(array.copy(data=values))


# ------------------------------------------------------------------------------------------- sel, hide, split


def same(part: Recording, whole: Recording, trials: list[int], bins: list[int], units: list[int]) -> None:
    """`part` is `whole` at these positions, in every array it has."""
    ix = np.ix_(trials, bins, units)
    for seen, expected in zip(plain(part), plain(whole), strict=True):
        assert np.array_equal(seen, expected[ix])
    assert part.inputs is not None and whole.inputs is not None
    assert np.array_equal(part.inputs.numpy(), whole.inputs.numpy()[np.ix_(trials, bins)])
    assert part.behaviour is not None and whole.behaviour is not None
    assert np.array_equal(part.behaviour, whole.behaviour[np.ix_(trials, bins)], equal_nan=True)
    for name, positions in [("trial", trials), ("condition", trials), ("split", trials), ("time", bins),
                            ("unit", units), ("region", units), ("heldout", units)]:  # fmt: skip
        assert getattr(part, name).tolist() == getattr(whole, name)[positions].tolist()
    assert part.lengths.tolist() == [sum(b < whole.lengths[i] for b in bins) for i in trials]
    assert torch.equal(part.input_scale, whole.input_scale)
    assert part.bin_width == whole.bin_width


ALL_TRIALS, ALL_BINS, ALL_UNITS = list(range(5)), list(range(11)), list(range(7))


@pytest.mark.parametrize(
    ("labels", "trials", "bins", "units"),
    [
        ({"trial": 15}, [2], ALL_BINS, ALL_UNITS),
        ({"trial": [19, 10]}, [4, 0], ALL_BINS, ALL_UNITS),
        ({"trial": np.array([True, False, False, True, False])}, [0, 3], ALL_BINS, ALL_UNITS),
        ({"condition": "right"}, [1, 4], ALL_BINS, ALL_UNITS),
        ({"condition": "left", "split": "train"}, [0, 3], ALL_BINS, ALL_UNITS),
        ({"trial": [12, 11, 10], "condition": ["left"]}, [3, 0], ALL_BINS, ALL_UNITS),
        ({"region": "V1"}, ALL_TRIALS, ALL_BINS, [1, 2, 5]),
        ({"region": ["V2", "MT"]}, ALL_TRIALS, ALL_BINS, [0, 3, 4, 6]),
        ({"unit": ["u6", "u1", "u0"], "region": "V2"}, ALL_TRIALS, ALL_BINS, [6, 0]),
        ({"unit": "u3"}, ALL_TRIALS, ALL_BINS, [3]),
        ({"time": slice(1.52, 1.56)}, ALL_TRIALS, [1, 2, 3], ALL_UNITS),
        ({"time": slice(None, 1.55)}, ALL_TRIALS, [0, 1, 2], ALL_UNITS),
        ({"time": [1.5, 1.58], "trial": [10, 19]}, [0, 4], [0, 4], ALL_UNITS),
        ({"time": np.arange(11) % 2 == 0, "region": "MT", "split": "test"}, [2, 4], [0, 2, 4, 6, 8, 10], [4]),
    ],
)
def test_sel_equals_numpy(labels: dict, trials: list[int], bins: list[int], units: list[int]) -> None:
    same(full().sel(**labels), full(), trials, bins, units)


@pytest.mark.parametrize("seed", range(10))
def test_isel_equals_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trials, units = rng.permutation(5)[: rng.integers(1, 6)], rng.permutation(7)[: rng.integers(1, 8)]
    bins = np.concatenate([[0], np.sort(rng.choice(np.arange(1, 11), rng.integers(0, 11), replace=False))])
    same(full().isel(trial=trials, time=bins, unit=units), full(), list(trials), list(bins), list(units))
    part = full().isel(trial=-1, time=slice(0, 6, 2), unit=slice(None, None, -1))
    same(part, full(), [4], [0, 2, 4], ALL_UNITS[::-1])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"region": "V4"}, "region 'V4' not found; this recording has 'V2', 'V1', 'MT'"),
        ({"trial": [10, 99]}, "trial 99 not found; this recording has 10, 11, 15, 12, 19"),
        ({"trial": "10"}, "trial '10' not found"),
        ({"condition": "up"}, "condition 'up' not found; this recording has 'left', 'right'"),
        ({"split": "val"}, "split 'val' not found; this recording has 'train', 'test'"),
        ({"unit": "u9"}, "unit 'u9' not found"),
        ({"unit": slice(0, 2)}, "not a slice; use isel"),
        ({"unit": ["u1", "u5", "u1"]}, "repeats unit position 1;"),
        ({"unit": [True, False]}, "boolean array of 2, expected one for each of 7"),
        ({"unit": "u0", "region": "V1"}, "leaves no unit"),
        ({"time": 1.509}, "time 1.509 s not found; bins run from 1.5 to 1.7 s, the nearest is 1.5 s"),
        ({"time": slice(9, 10)}, "leaves no time"),
        ({"time": slice(1, 2, 2)}, "without a step"),
        ({"time": [1.54, 1.52]}, "strictly increasing"),
        ({"time": slice(1.6, None)}, "trials 11 end before the times selected"),
    ],
)
def test_selections_that_do_not_exist(labels: dict, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        full().sel(**labels)


@pytest.mark.parametrize("position", [5, -6, 0.5, "a"])
def test_isel_positions_outside(position: object) -> None:
    with pytest.raises(RecordingError, match=r"isel trial position .* is not an integer in \[-5, 5\)"):
        full().isel(trial=position)


@pytest.mark.parametrize(
    ("labels", "trials", "bins", "units"),
    [
        ({"trial": 15}, [2], ALL_BINS, ALL_UNITS),
        ({"region": "V1"}, ALL_TRIALS, ALL_BINS, [1, 2, 5]),
        ({"trial": [10, 19], "unit": ["u0", "u4"], "time": slice(1.52, 1.56)}, [0, 4], [1, 2, 3], [0, 4]),
        ({"time": slice(1.6, None)}, ALL_TRIALS, [5, 6, 7, 8, 9, 10], ALL_UNITS),
    ],
)
def test_hide_equals_numpy(labels: dict, trials: list[int], bins: list[int], units: list[int]) -> None:
    whole, extra = full(), np.random.default_rng(1).random(SHAPE) < 0.1
    values, mask = plain(whole)
    kept = mask.copy()
    kept[np.ix_(trials, bins, units)] = False
    for hidden, expected in [(whole.hide(**labels), kept), (whole.hide(**labels, mask=extra), kept & ~extra)]:
        assert np.array_equal(plain(hidden)[1], expected)
        assert np.array_equal(plain(hidden)[0], np.where(expected, values, 0.0))
        assert np.array_equal(hidden.lengths, whole.lengths)
    assert np.array_equal(plain(whole)[1], mask)  # the original is as it was


def test_hide_refuses_to_guess() -> None:
    with pytest.raises(RecordingError, match="say what to hide"):
        full().hide()
    with pytest.raises(RecordingError, match="name no unit"):
        full().hide(unit="u0", region="V1")
    with pytest.raises(RecordingError, match="region 'V9' not found"):
        full().hide(region="V9")
    with pytest.raises(RecordingError, match="mask has dtype int64"):
        full().hide(mask=np.zeros(SHAPE, dtype=np.int64))


def test_with_observations_and_blank() -> None:
    whole = full()
    new = np.random.default_rng(9).normal(size=SHAPE)
    mask = plain(whole)[1]
    blank = whole.blank()
    assert blank.observations is None
    assert blank.mask is not None and np.array_equal(blank.mask.numpy(), mask)
    for start in (whole, blank):
        other = start.with_observations(torch.as_tensor(np.where(mask, new, np.nan)))
        assert np.array_equal(plain(other)[0], np.where(mask, new, 0.0))
        assert np.array_equal(plain(other)[1], mask)
        assert other.region.tolist() == REGIONS
    new[np.unravel_index(np.flatnonzero(mask)[5], SHAPE)] = np.nan
    with pytest.raises(RecordingError, match="observations has 1 NaN"):
        whole.with_observations(new)
    with pytest.raises(RecordingError, match=r"shape \(5, 11, 6\), expected \(trial, time, unit\) = \(5, 11, 7\)"):
        whole.with_observations(new[:, :, :6])
    spikes = Recording.from_arrays(counts_array(), bin_width=WIDTH)
    assert spikes.with_observations(counts_array(1)).counts
    assert not spikes.with_observations(counts_array(1) + 0.5).counts  # real values are never passed on as counts
    assert not whole.with_observations(counts_array(1)).counts


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fractions", [{"train": 0.8, "test": 0.2}, {"a": 0.5, "b": 0.25, "c": 0.25}, {"all": 1.0}])
def test_split_trials_is_stratified(fractions: dict[str, float], seed: int) -> None:
    sizes = {"x": 40, "y": 20, "z": 7}
    condition = np.random.default_rng(seed).permutation(np.repeat(list(sizes), list(sizes.values())))
    recording = Recording.from_arrays(counts_array(0, (67, 3, 2)), bin_width=WIDTH, condition=condition)
    split = recording.split_trials(fractions, seed=seed)
    for name, share in fractions.items():
        assert abs((split.split == name).sum() - 67 * share) < 1
        for group, size in sizes.items():
            assert abs(((split.split == name) & (split.condition == group)).sum() - size * share) < 1.5
    assert set(split.split) == set(fractions)
    again = recording.split_trials(fractions, seed=seed)
    assert np.array_equal(again.split, split.split)
    parts = [split.sel(split=name).trial.tolist() for name in fractions]
    assert sorted(trial for part in parts for trial in part) == list(range(67))
    assert set(recording.split) == {"all"}


def test_split_trials_is_uniform_over_trials_and_seeds_differ() -> None:
    recording = Recording.from_arrays(counts_array(0, (10, 3, 2)), bin_width=WIDTH)
    tests = np.array(
        [
            recording.split_trials({"train": 0.8, "test": 0.2}, seed=s, stratify=False).split == "test"
            for s in range(500)
        ]
    )
    assert (tests.sum(1) == 2).all()
    # Each trial is a test trial in 500 * .2 splits, sd 9: five sds.
    assert np.abs(tests.sum(0) - 100).max() < 45


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train": 0.8, "test": 0.1}, "fractions sum to 0.9, expected 1"),
        ({"train": 1.2, "test": -0.2}, r"fractions\['test'\] must be positive"),
        ({"train": 0.99, "test": 0.01}, "leave 'test' empty: 0.01 of 5 trials"),
        ({}, "sum to 0"),
    ],
)
def test_bad_fractions(fractions: dict[str, float], message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        full().split_trials(fractions, seed=0)


# ------------------------------------------------------------------------------------------- the object


def test_a_recording_is_immutable_and_has_an_identity() -> None:
    values, mask = counts_array(), np.ones(SHAPE, bool)
    mask[0, 0, 0] = False
    recording = Recording.from_arrays(values, bin_width=WIDTH, mask=mask, behaviour=np.zeros((5, 11, 1)))
    before = recording.digest()
    values[:], mask[:] = 99.0, False
    again = Recording.from_xarray(recording.to_xarray())
    assert again.digest() == before
    for name in ("observations", "bin_width", "counts", "anything"):
        with pytest.raises(AttributeError, match=f"immutable: cannot set {name}"):
            setattr(recording, name, 1)
    with pytest.raises(AttributeError, match="cannot delete"):
        del recording.time
    assert recording.behaviour is not None
    for array in (recording.trial, recording.time, recording.unit, recording.region, recording.heldout,
                  recording.condition, recording.split, recording.lengths, recording.behaviour):  # fmt: skip
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[0] = array[0]
    assert recording == recording and recording != again
    assert len({recording, again}) == 2
    assert weakref.ref(recording)() is recording
    assert recording.observations is recording.observations  # made once
    assert pickle.loads(pickle.dumps(recording)).digest() == before  # worker processes receive it this way
    with pytest.raises(TypeError, match="from_arrays"):
        Recording()


def test_parts_share_memory() -> None:
    recording = Recording.from_arrays(counts_array(), bin_width=WIDTH, unit=UNITS)
    part, blank = recording.isel(trial=slice(1, 3)), recording.blank()
    assert part.observations is not None and recording.observations is not None
    assert part.observations.data_ptr() == recording.observations[1:].data_ptr()
    filled = blank.with_observations(counts_array(2))
    assert np.shares_memory(filled.region, recording.region)


def test_digest_tells_values_mask_and_labels_apart() -> None:
    base = full()
    assert full().digest() == base.digest()
    changed = counts_array()
    others = [
        base.hide(unit="u0"), base.sel(trial=[11, 10, 15, 12, 19]), base.isel(unit=slice(0, 6)), base.blank(),
        base.with_observations(changed), base.split_trials({"train": 0.5, "test": 0.5}, seed=0),
        full(session="B"), full(bin_width=None, time=np.arange(11)), full(region=["A"] * 7), full(center=np.ones(7)),
        full(behaviour=None, behaviour_names=None), full(inputs=None, input_names=None), full(condition=["a"] * 5),
    ]  # fmt: skip
    digests = {other.digest() for other in others} | {base.digest()}
    assert len(digests) == len(others) + 1
    # What lies under the mask is no part of the data.
    mask = plain(base)[1]
    noise = np.where(mask, plain(base)[0], np.nan)
    assert base.with_observations(noise).digest() == base.digest()
    assert re.fullmatch("[0-9a-f]{64}", base.digest())


def test_repr_is_short() -> None:
    recording = Recording.from_arrays(np.ones((4, 10, 3)), bin_width=0.1, region=["V1", "V2", "V1"], session="day 3")
    text = repr(recording.hide(unit=0))
    for piece in ("day 3", "4 trials x 10 bins x 3 units", "100 ms", "V1 (2), V2 (1)", "33.3% hidden", "10 spikes/s"):
        assert piece in text
    assert len(text) < 250
    assert "blank" in repr(recording.blank())
    assert "irregular" in repr(full(bin_width=None, time=np.arange(11.0) ** 2))


# ------------------------------------------------------------------------------------------- real recordings


def test_reach_spikes(data_dir: Path) -> None:
    raw = scipy.io.loadmat(data_dir / "datahigh_reach" / "ex2_rawspiketrains.mat", squeeze_me=True)["D"]
    trials = []
    for spikes in raw["data"]:
        bins = spikes.shape[1] // 20
        trials.append(spikes[:, : bins * 20].reshape(61, bins, 20).sum(2, dtype=int).T)
    recording = Recording.from_arrays(trials, bin_width=0.02, condition=raw["condition"])
    assert (recording.num_trials, recording.num_bins, recording.num_units) == (112, 76, 61)
    assert recording.counts
    assert recording.lengths.tolist() == [spikes.shape[1] // 20 for spikes in raw["data"]]
    assert {name: (recording.condition == name).sum() for name in ("reach1", "reach2")} == {"reach1": 56, "reach2": 56}
    values, mask = plain(recording)
    total = sum(int(spikes[:, : spikes.shape[1] // 20 * 20].sum()) for spikes in raw["data"])
    assert values.sum() == total
    assert mask.sum() == 61 * recording.lengths.sum()
    rates = values.sum((0, 1)) / (recording.lengths.sum() * 0.02)
    assert rates.min() >= 0.2 and rates.max() <= 40.0  # the data's README: 0.2-39 Hz
    split = recording.split_trials({"train": 0.75, "test": 0.25}, seed=0)
    assert [split.sel(split="test", condition=c).num_trials for c in ("reach1", "reach2")] == [14, 14]


def test_continuous_motor_cortex(data_dir: Path) -> None:
    raw = scipy.io.loadmat(data_dir / "chestek_m1_contdata" / "contdata95.mat")
    recording = Recording.from_arrays(
        raw["Y"], bin_width=0.05, behaviour=raw["X"], behaviour_names=["x", "y", "vx", "vy"]
    )
    assert (recording.num_trials, recording.num_bins, recording.num_units) == (1, 31413, 95)
    assert recording.mask is None
    assert plain(recording)[0].mean() / 0.05 == pytest.approx(25.6, abs=0.05)  # the data's README
    assert recording.behaviour is not None and np.array_equal(recording.behaviour[0], raw["X"])
    assert recording.sel(time=slice(10.0, 20.0)).num_bins == 201


def test_resting_bold(data_dir: Path) -> None:
    with (data_dir / "nitime_fmri" / "fmri_timeseries.csv").open() as file:
        names, *rows = list(csv.reader(file))
    values = np.array(rows, dtype=float)
    recording = Recording.from_arrays(values, bin_width=1.89, unit=names, region=names)
    assert (recording.num_bins, recording.num_units, recording.counts) == (250, 31, False)
    assert recording.regions == names
    assert np.allclose(recording.scale.numpy(), values.std(0), rtol=1e-12)
    assert np.allclose(recording.sel(region="LCau").center.numpy(), values[:, 3].mean(), rtol=1e-12)
