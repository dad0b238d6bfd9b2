"""Recording: binned observations with their labels, the one form in which data reach a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyrodyn import _recording_checks as checks
from pyrodyn import _recording_selection as selection
from pyrodyn import _recording_values as contents
from pyrodyn._recording_checks import Labels
from pyrodyn.errors import RecordingError


def _array(name: str) -> cached_property[np.ndarray]:
    """An attribute that is a variable of the dataset, as a read-only array."""
    return cached_property(lambda recording: recording._read_only(name))


def _tensor(name: str) -> cached_property[Tensor | None]:
    """An attribute that is a variable of the dataset, where there is one, as a tensor that shares its memory."""

    def made(recording: Recording) -> Tensor | None:
        if name not in recording._dataset:
            return None
        return torch.from_numpy(np.ascontiguousarray(recording._dataset[name].values)).to(recording.device)

    return cached_property(made)


class Recording:
    """An immutable, labelled, binned recording of one session.

    Observations have the axes (trial, time, unit): event counts, or real values such as fluorescence. Times are in
    seconds and shared by all trials; a trial may end before the time axis does (`lengths`). Entries may be unobserved
    (`mask`). Build one with `from_arrays`, `from_xarray` or a reader. Recordings compare by identity; `digest` tells
    whether two hold the same data.

    Attributes
    ----------
    num_trials, num_bins, num_units, num_inputs : int
    trial, unit : (trial,) and (unit,) unique integers or strings
    time : (time,) seconds
    region, heldout : (unit,) name of the region, and whether the unit is kept back for co-smoothing
    condition, split : (trial,) names
    lengths : (trial,) number of bins before the trial's end
    regions : names of the regions, in order of first appearance
    bin_width : float, seconds
    regular : bool, whether the bins are equally spaced
    counts : bool, whether the observations are event counts
    session : str
    observations : (trial, time, unit) float64 tensor, 0 where hidden; None for a blank recording
    mask : (trial, time, unit) bool tensor, True = observed; None when every entry is observed
    inputs : (trial, time, input) float64 tensor, 0 behind a trial's end; or None
    behaviour : (trial, time, behaviour) float64 array, NaN behind a trial's end; or None
    input_names, behaviour_names : 1-d arrays of names
    center, scale : (unit,) float64 tensors, where and in what unit each channel is measured
    input_scale : (input,) float64 tensor, sd of each input (1 where constant)
    device : torch.device of the tensors

    Notes
    -----
    Arrays are read-only. Tensors are kept and share their memory with recordings derived from this one: never write
    to them. `center`, `scale` and `input_scale` are measured once, by `from_arrays`, and pass unchanged to every
    derived recording, so that parts of a recording (training and test trials) share one set of units.
    """

    _dataset: xr.Dataset  # hidden entries hold 0; no variable `mask` when every entry is observed
    device: torch.device

    def __init__(self) -> None:
        raise TypeError("a Recording is built by Recording.from_arrays or Recording.from_xarray")

    @classmethod
    def _wrap(cls, dataset: xr.Dataset, device: torch.device) -> Recording:
        if "mask" in dataset and bool(dataset["mask"].values.all()):
            dataset = dataset.drop_vars("mask")
        recording = cls.__new__(cls)
        recording.__dict__.update(_dataset=dataset, device=device)
        return recording

    def _derive(self, dataset: xr.Dataset) -> Recording:
        derived = self._wrap(dataset, self.device)
        if "_whole" in self.__dict__:
            derived.__dict__["_whole"] = self.whole
        return derived

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"a Recording is immutable: cannot set {name}; use sel, hide, with_observations, ...")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Recording is immutable: cannot delete {name}")

    # ------------------------------------------------------------------------------------------ building

    @classmethod
    def from_arrays(
        cls,
        observations: Any,
        *,
        bin_width: float | None = None,
        time: Any = None,
        region: Labels | None = None,
        unit: Labels | None = None,
        heldout: Labels | None = None,
        trial: Labels | None = None,
        condition: Labels | None = None,
        split: Labels | None = None,
        session: str | None = None,
        counts: bool | None = None,
        mask: Any = None,
        lengths: Labels | None = None,
        missing: str = "raise",
        inputs: Any = None,
        input_names: Labels | None = None,
        behaviour: Any = None,
        behaviour_names: Labels | None = None,
        center: Any = None,
        scale: Any = None,
    ) -> Recording:
        """A recording from arrays or tensors of any real dtype, which are copied.

        Parameters
        ----------
        observations : (trial, time, unit), or (time, unit) for one trial, or a list of (time_i, unit) for ragged trials
        bin_width : seconds; required unless `time` is given
        time : (time,) seconds, strictly increasing; default `arange(num_bins) * bin_width`. Without `bin_width`, the
            median step is the bin width.
        region : (unit,) names; default "all"
        unit, trial : unique integers or strings; default 0, 1, ...
        heldout : (unit,) booleans; default False
        condition, split : (trial,) names; default "all"
        session : name; default "session"
        counts : whether the observations are event counts; default: whether all observed values are non-negative
            integers
        mask : booleans (trial, time, unit) or (trial, time), or a list like ragged observations; True = observed.
            Values where it is False may be anything.
        lengths : (trial,) number of bins of each trial where padded observations are given
        missing : "raise" to refuse NaN, "mask" to take NaN as unobserved
        inputs, behaviour : (trial, time, input) and (trial, time, behaviour), or lists of ragged trials. Inputs must be
            finite up to each trial's end; behaviour may hold NaN.
        input_names, behaviour_names : unique names
        center, scale : (unit,); default 0 and 1 for counts, else mean and standard deviation over observed entries

        Raises
        ------
        RecordingError
            Where the data cannot be used; the message names the argument, the place and the remedy.

        Warns
        -----
        UserWarning
            For a silent or constant unit (kept, with scale 1), and where one trial without labels looks transposed.
        """
        values, ragged, flat = checks.observation_array(observations)
        shape = (values.shape[0], values.shape[1], values.shape[2])
        sizes: dict[str, int] = dict(zip(checks.AXES, shape, strict=True))
        if missing not in ("raise", "mask"):
            raise RecordingError(f"missing is {missing!r}, expected 'raise' or 'mask'")
        if ragged is not None and lengths is not None:
            raise RecordingError("lengths is given by the list of trials in observations; leave the argument out")

        def labels(name: str, given: Any, axis: str, kind: str, default: Any) -> np.ndarray:
            given = [default] * sizes[axis] if given is None else given
            return checks.label_array(name, given, axis, sizes, kind=kind)

        unit_ids = labels("unit", range(shape[2]) if unit is None else unit, "unit", "id", None)
        trial_ids = labels("trial", range(shape[0]) if trial is None else trial, "trial", "id", None)
        regions = labels("region", region, "unit", "name", "all")
        times, width = checks.time_axis(time, bin_width, sizes)
        named = unit is not None or region is not None
        contents.warn_transposed(shape, flat=flat, units_named=named, time_named=time is not None)

        if ragged is None:
            ragged = checks.length_array([shape[1]] * shape[0] if lengths is None else lengths, shape[0], shape[1])
        inside = np.arange(shape[1]) < ragged[:, None]
        observed = np.repeat(inside[:, :, None], shape[2], axis=2)
        if mask is not None:
            observed &= checks.mask_array(mask, shape, ragged)
        if missing == "mask":
            observed &= ~np.isnan(values)
        axes = (trial_ids, times, unit_ids)
        contents.check_finite(values, observed, axes)
        values[~observed] = 0.0
        counts = contents.are_counts(values) if counts is None else bool(counts)
        if counts:
            contents.check_counts(values, axes)
        if center is None or scale is None:
            center_, scale_ = contents.measured(values, observed, counts, unit_ids)
            center, scale = (center_ if center is None else center), (scale_ if scale is None else scale)

        data: dict[str, Any] = {"observations": (checks.AXES, values), "mask": (checks.AXES, observed)}
        coords: dict[str, Any] = {
            "trial": trial_ids,
            "time": times,
            "unit": unit_ids,
            "region": ("unit", regions),
            "heldout": ("unit", labels("heldout", heldout, "unit", "flag", False)),
            "condition": ("trial", labels("condition", condition, "trial", "name", "all")),
            "split": ("trial", labels("split", split, "trial", "name", "all")),
            "length": ("trial", ragged),
            "center": ("unit", contents.channel_vector("center", center, shape[2])),
            "scale": ("unit", contents.channel_vector("scale", scale, shape[2])),
        }
        if inputs is not None:
            array, names, sds = contents.input_data(inputs, input_names, ragged, trial_ids, times)
            data["inputs"] = (("trial", "time", "input"), array)
            coords |= {"input": names, "input_scale": ("input", sds)}
        elif input_names is not None:
            raise RecordingError("input_names is given without inputs")
        if behaviour is not None:
            array, names = contents.behaviour_data(behaviour, behaviour_names, ragged, shape[1])
            data["behaviour"] = (("trial", "time", "behaviour"), array)
            # xarray keeps one name for one thing: `behaviour` is the variable, so its labels need another.
            coords["behaviour_name"] = ("behaviour", names)
        elif behaviour_names is not None:
            raise RecordingError("behaviour_names is given without behaviour")
        attrs = {"bin_width": width, "counts": int(counts), "session": "session" if session is None else str(session)}
        return cls._wrap(xr.Dataset(data, coords, attrs), torch.device("cpu"))

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset | xr.DataArray) -> Recording:
        """The inverse of `to_xarray`; also takes observations alone, with dims (trial, time, unit) in any order.

        Only the variable `observations` (or `mask`, for a blank recording) and either the coordinate `time` or the
        attribute `bin_width` are required. Where neither `mask` nor `length` is given, bins at the end of a trial in
        which every unit is NaN are taken as lying behind the trial's end.
        """
        if isinstance(dataset, xr.DataArray):
            dataset = dataset.to_dataset(name="observations").assign_attrs(dataset.attrs)
        recording = cls.from_arrays(**contents.arguments(dataset))
        # Both may have been measured on a recording of which this one is a part.
        kept = recording._dataset
        if "bin_width" in dataset.attrs:
            kept = kept.assign_attrs(bin_width=checks.positive("bin_width", dataset.attrs["bin_width"]))
        if "inputs" in dataset and "input_scale" in dataset:
            kept = kept.assign_coords(input_scale=("input", dataset["input_scale"].values.astype(np.float64)))
        recording = recording._derive(kept)
        return recording if "observations" in dataset else recording.blank()

    def to_xarray(self) -> xr.Dataset:
        """A copy as a dataset that can be written to netCDF.

        Variables `observations` (NaN where hidden; absent for a blank recording), `mask`, `inputs` and `behaviour`
        with its names in `behaviour_name`; coordinates as the attributes of the same names, with `length` for
        `lengths`; attributes `bin_width`, `counts` (0 or 1) and `session`.
        """
        dataset = self._dataset.copy(deep=True)
        mask = self._observed
        if "observations" in dataset:
            dataset["observations"] = dataset["observations"].where(mask)
        return dataset.assign(mask=(checks.AXES, mask.copy()))

    # ------------------------------------------------------------------------------------------ sizes and labels

    def _read_only(self, name: str) -> np.ndarray:
        array = self._dataset[name].values.view()
        array.flags.writeable = False
        return array

    @property
    def num_trials(self) -> int:
        return self._dataset.sizes["trial"]

    @property
    def num_bins(self) -> int:
        return self._dataset.sizes["time"]

    @property
    def num_units(self) -> int:
        return self._dataset.sizes["unit"]

    @property
    def num_inputs(self) -> int:
        return self._dataset.sizes.get("input", 0)

    trial = _array("trial")
    time = _array("time")
    unit = _array("unit")
    region = _array("region")
    heldout = _array("heldout")
    condition = _array("condition")
    split = _array("split")
    lengths = _array("length")

    @cached_property
    def input_names(self) -> np.ndarray:
        return self._read_only("input") if self.num_inputs else np.array([], dtype=str)

    @cached_property
    def behaviour_names(self) -> np.ndarray:
        return self._read_only("behaviour_name") if "behaviour" in self._dataset else np.array([], dtype=str)

    @cached_property
    def behaviour(self) -> np.ndarray | None:
        return self._read_only("behaviour") if "behaviour" in self._dataset else None

    @property
    def regions(self) -> list[str]:
        return list(dict.fromkeys(self.region.tolist()))

    @property
    def bin_width(self) -> float:
        return self._dataset.attrs["bin_width"]

    @property
    def regular(self) -> bool:
        return checks.equally_spaced(self.time)

    @property
    def counts(self) -> bool:
        return bool(self._dataset.attrs["counts"])

    @property
    def session(self) -> str:
        return self._dataset.attrs["session"]

    # ------------------------------------------------------------------------------------------ tensors

    observations = _tensor("observations")
    mask = _tensor("mask")
    inputs = _tensor("inputs")

    @property
    def values(self) -> Tensor:
        """`observations`, where there must be some."""
        if self.observations is None:
            raise RecordingError("this recording is blank; give it observations by recording.with_observations(values)")
        return self.observations

    @cached_property
    def center(self) -> Tensor:
        return torch.tensor(self._dataset["center"].values, device=self.device)

    @cached_property
    def scale(self) -> Tensor:
        return torch.tensor(self._dataset["scale"].values, device=self.device)

    @cached_property
    def input_scale(self) -> Tensor:
        values = self._dataset["input_scale"].values if self.num_inputs else np.zeros(0)
        return torch.tensor(values, device=self.device)

    @property
    def _observed(self) -> np.ndarray:
        """The mask as a (trial, time, unit) array, also where it is all True."""
        if "mask" in self._dataset:
            return self._dataset["mask"].values
        return np.broadcast_to(True, (self.num_trials, self.num_bins, self.num_units))

    # ------------------------------------------------------------------------------------------ derived recordings

    def sel(
        self,
        *,
        trial: Any = None,
        time: Any = None,
        unit: Any = None,
        region: Any = None,
        condition: Any = None,
        split: Any = None,
    ) -> Recording:
        """The part of the recording with these labels; conditions on one axis must all hold.

        Parameters
        ----------
        trial, unit : a label, several (which set the order), or a boolean array over the axis
        time : a slice in seconds with both ends included, times of bins, or a boolean array
        region, condition, split : a name or several

        Raises
        ------
        RecordingError
            For a label that does not exist, a selection without entries, or trials that end before the times selected.
        """
        return self._take(self._positions(trial, time, unit, region, condition, split))

    def isel(self, *, trial: Any = None, time: Any = None, unit: Any = None) -> Recording:
        """The part of the recording at these positions: an integer, several, a slice, or a boolean array."""
        given = {"trial": trial, "time": time, "unit": unit}
        sizes = self._dataset.sizes
        return self._take({a: selection.by_position(a, v, sizes[a]) for a, v in given.items() if v is not None})

    def batch(self, trial: Any) -> Recording:
        """The trials at these positions, seen by one step of an engine: still a part of this recording, its `whole`.

        A model that reads off the data what fixes its latent coordinates reads it off the whole, or it would have
        another prior in every step. Trials chosen by `isel` or `sel` are a recording of their own.
        """
        part = self.isel(trial=trial)
        part.__dict__["_whole"] = self.whole
        return part

    @property
    def whole(self) -> Recording:
        """The recording that this is a `batch` of, or was derived from a batch of; elsewhere the recording itself."""
        return self.__dict__.get("_whole", self)

    def _positions(
        self, trial: Any, time: Any, unit: Any, region: Any, condition: Any = None, split: Any = None
    ) -> dict[str, np.ndarray]:
        """Positions along each axis of which something is asked."""
        found: dict[str, np.ndarray] = {}
        if time is not None:
            found["time"] = selection.by_time(time, self.time, self.bin_width)
        asked = {"trial": {"trial": trial, "condition": condition, "split": split}}
        asked["unit"] = {"unit": unit, "region": region}
        for axis, values in asked.items():
            for name, value in values.items():
                if value is None:
                    continue
                positions = selection.by_label(name, value, getattr(self, name))
                if name != axis:  # names shared by several trials or units keep the order of the recording
                    positions = np.unique(positions)
                found[axis] = found[axis][np.isin(found[axis], positions)] if axis in found else positions
        return found

    def _take(self, positions: Mapping[str, np.ndarray]) -> Recording:
        sizes = self._dataset.sizes
        dataset = self._dataset.isel({a: selection.as_index(a, p, sizes[a]) for a, p in positions.items()})
        if "time" in positions:
            kept = (positions["time"] < dataset["length"].values[:, None]).sum(1)
            if (kept == 0).any():
                ended = dataset["trial"].values[kept == 0]
                raise RecordingError(
                    f"trials {checks.listed(ended)} end before the times selected; leave them out by trial=..., "
                    "e.g. sel(trial=recording.lengths > ...)"
                )
            dataset = dataset.assign_coords(length=("trial", kept))
        return self._derive(dataset)

    def hide(
        self, *, trial: Any = None, time: Any = None, unit: Any = None, region: Any = None, mask: Any = None
    ) -> Recording:
        """The same recording with some entries unobserved.

        Parameters
        ----------
        trial, time, unit, region : as in `sel`; the entries at all of these labels at once are hidden
        mask : booleans (trial, time, unit) or (trial, time); entries where it is True are hidden, too
        """
        hidden = np.zeros((self.num_trials, self.num_bins, self.num_units), dtype=bool)
        positions = self._positions(trial, time, unit, region)
        if positions:
            where = [positions.get(axis, np.arange(self._dataset.sizes[axis])) for axis in checks.AXES]
            for axis, chosen in zip(checks.AXES, where, strict=True):
                if len(chosen) == 0:
                    raise RecordingError(f"hide: the labels name no {axis} of this recording")
            hidden[np.ix_(*where)] = True
        elif mask is None:
            raise RecordingError("hide: say what to hide, by trial, time, unit, region or mask")
        if mask is not None:
            hidden |= checks.mask_array(mask, hidden.shape, self.lengths)
        observed = self._observed & ~hidden
        data: dict[str, Any] = {"mask": (checks.AXES, observed)}
        if "observations" in self._dataset:
            data["observations"] = (checks.AXES, np.where(observed, self._dataset["observations"].values, 0.0))
        return self._derive(self._dataset.assign(data))

    def with_observations(self, observations: Any) -> Recording:
        """The same labels, mask, center and scale with other values, (trial, time, unit), copied.

        `counts` stays as it is, unless values that are not counts are put into a recording of counts.
        """
        values = checks.real_array("observations", observations)
        shape = (self.num_trials, self.num_bins, self.num_units)
        if values.shape != shape:
            raise RecordingError(f"observations has shape {values.shape}, expected (trial, time, unit) = {shape}")
        observed = self._observed
        contents.check_finite(values, observed, (self.trial, self.time, self.unit))
        values[~observed] = 0.0
        dataset = self._dataset.assign(observations=(checks.AXES, values))
        return self._derive(dataset.assign_attrs(counts=int(self.counts and contents.are_counts(values))))

    def blank(self) -> Recording:
        """The same recording without observations, for simulation; labels and mask are kept."""
        return self._derive(self._dataset.drop_vars("observations", errors="ignore"))

    def split_trials(self, fractions: Mapping[str, float], *, seed: int, stratify: bool = True) -> Recording:
        """The same recording with trials assigned at random to the parts of a split.

        Parameters
        ----------
        fractions : share of the trials for each name, such as {"train": 0.8, "test": 0.2}; they sum to one
        seed : of the assignment, which depends on nothing else
        stratify : spread every condition over the parts as evenly as its number of trials allows

        Raises
        ------
        RecordingError
            Where the fractions are not positive or do not sum to one, or where a part would be empty.
        """
        names = selection.split_names(fractions, self.num_trials)
        rng = np.random.default_rng(seed)
        order = rng.permutation(self.num_trials)
        if stratify:
            # `names` spreads the parts evenly over its length, so trials of a condition must be neighbours.
            rank = {name: i for i, name in enumerate(rng.permutation(np.unique(self.condition)).tolist())}
            order = order[np.argsort([rank[name] for name in self.condition[order].tolist()], kind="stable")]
        split = np.empty_like(names)
        split[order] = names
        return self._derive(self._dataset.assign_coords(split=("trial", split)))

    def to(self, device: torch.device | str) -> Recording:
        """The same recording with its tensors on another device."""
        return self._wrap(self._dataset, torch.device(device))

    # ------------------------------------------------------------------------------------------ identity

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of values, mask, labels, times and units of measurement."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        dataset = self._dataset
        digest = hashlib.sha256(json.dumps([self.bin_width, self.counts, self.session]).encode())
        for name in sorted(str(name) for name in dataset.variables):
            array = dataset[name].values
            # The width of a fixed-width string depends on its neighbours before a selection: hash strings, not bytes.
            content = array.tobytes() if array.dtype.kind in "biuf" else json.dumps(array.tolist()).encode()
            digest.update(json.dumps([name, array.dtype.kind, array.shape]).encode() + content)
        return digest.hexdigest()

    def __repr__(self) -> str:
        hidden = 1.0 - float(self._observed.mean())
        lines = [
            f"Recording {self.session!r}: {self.num_trials} trials x {self.num_bins} bins x {self.num_units} units, "
            f"{1e3 * self.bin_width:g} ms bins" + ("" if self.regular else " (irregular times)"),
            "  regions: " + ", ".join(f"{name} ({(self.region == name).sum()})" for name in self.regions),
        ]
        kind = "event counts" if self.counts else "real values"
        if "observations" not in self._dataset:
            kind += ", blank"
        elif self.counts and hidden < 1.0:
            rate = self._dataset["observations"].values.sum() / self._observed.sum() / self.bin_width
            kind += f", {rate:.3g} spikes/s a unit"
        return "\n".join([*lines, f"  {kind}, {100 * hidden:.3g}% hidden"])
