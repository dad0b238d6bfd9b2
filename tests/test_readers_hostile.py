"""Broken and hostile NWB files: each loads with a report or is refused by name; none hangs or reads another file."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import h5py
import numpy as np
import pytest

from pyrodyn import readers
from pyrodyn._hdf5_guard import check_hdf5
from pyrodyn.errors import IntegrityError, RecordingError

pynwb = pytest.importorskip("pynwb")

SECONDS = 10
# What another file on the machine holds: spike times that no file below holds itself.
CANARY = np.linspace(4.0, 4.9, 40)
TIMES = [np.array([0.5, 1.5, 2.25, 4.5, 9.5]), np.array([0.25, 2.5, 6.5]), np.array([1.0, 6.25, 6.75, 9.0])]


@pytest.fixture(autouse=True)
def no_hang():
    """Interrupt a test that waits for ever."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"still reading after {SECONDS} s"))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    """The bytes of a sound file: three units with regions and observation intervals, trials 2 s apart."""
    path = tmp_path_factory.mktemp("sound") / "sound.nwb"
    nwb = pynwb.NWBFile("made for a test", "made", datetime(2020, 1, 1, tzinfo=UTC))
    group = nwb.create_electrode_group("shank", "shank", "V1", nwb.create_device("probe"))
    nwb.add_electrode(location="V1", group=group)
    for row in range(5):
        nwb.add_trial(start_time=2.0 * row, stop_time=2.0 * row + 1)
    for times in TIMES:
        nwb.add_unit(spike_times=times, electrodes=[0])
    nwb.add_acquisition(pynwb.TimeSeries(name="running", data=np.arange(5.0), unit="m/s", rate=1.0))
    with pynwb.NWBHDF5IO(path, "w") as writer:
        writer.write(nwb)
    return path.read_bytes()


@pytest.fixture
def canary(tmp_path) -> Path:
    """Another file, once as raw bytes and once as HDF5."""
    CANARY.tofile(tmp_path / "canary.raw")
    with h5py.File(tmp_path / "canary.h5", "w") as file:
        file["spike_times"] = CANARY
        file["index"] = np.array([10, 20, 40])
    return tmp_path


def replace(file: h5py.File, name: str, **options) -> None:
    """Put another dataset in the place of one, with its attributes."""
    attributes = dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, **options).attrs.update(attributes)


def edited(edit: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            edit(file)

    return apply


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def set_values(name: str, position: int, value: float) -> Callable[[Path], None]:
    return edited(lambda file: file[name].__setitem__(position, value))


def put(name: str, value) -> Callable[[Path], None]:
    return edited(lambda file: replace(file, name, data=value))


def external_link(file):
    """The units are those of another NWB file, which holds the canary's spike times."""
    other = Path(file.filename).parent / "other.nwb"
    file.flush()
    other.write_bytes(Path(file.filename).read_bytes())
    put("units/spike_times", CANARY[:12])(other)
    del file["units"]
    file["units"] = h5py.ExternalLink("other.nwb", "/units")


def external_link_to_group(file):
    """Only the first component of the path leaves the file."""
    file["scratch_link"] = h5py.ExternalLink("canary.h5", "/")
    del file["units/spike_times_index"]
    file["units/spike_times_index"] = h5py.SoftLink("/scratch_link/index")


def external_storage(file):
    raw = str(Path(file.filename).parent / "canary.raw")
    replace(file, "units/spike_times", shape=(12,), dtype="f8", external=[(raw, 0, 12 * 8)])


def virtual(file):
    layout = h5py.VirtualLayout((12,), "f8")
    layout[:] = h5py.VirtualSource(str(Path(file.filename).parent / "canary.h5"), "spike_times", (40,))[:12]
    attributes = dict(file["units/spike_times"].attrs)
    del file["units/spike_times"]
    file.create_virtual_dataset("units/spike_times", layout).attrs.update(attributes)


def hidden_behind_reference(path: Path) -> None:
    """A dataset in another file, which no link leads to: only an object reference does."""
    with h5py.File(path, "r+") as file:
        raw = str(path.parent / "canary.raw")
        hidden = file.create_dataset("hidden", shape=(12,), dtype="f8", external=[(raw, 0, 12 * 8)])
        rows = np.zeros(2, dtype=[("start", "i4"), ("place", h5py.ref_dtype)])
        rows["place"] = [hidden.ref, hidden.ref]
        file.create_dataset("table", data=rows)
        address = h5py.h5o.get_info(hidden.id).addr.to_bytes(8, "little")
        decoy = h5py.h5o.get_info(file["units/id"].id).addr.to_bytes(8, "little")
    data = path.read_bytes()
    # In the symbol table of the root group a link is (name offset, address); in the table's rows the address comes
    # after the integer and is left alone.
    nodes = [i for i in range(len(data)) if data.startswith(b"SNOD", i)]
    for node in nodes:
        at = data.find(address, node, node + 328)
        if at >= 0:
            data = data[:at] + decoy + data[at + 8 :]
    path.write_bytes(data)
    with h5py.File(path) as file:
        assert file["hidden"] == file["units/id"] and file["table"][0]["place"]


def many_large(file):
    for k in range(30):
        file.create_dataset(f"acquisition/running/large{k}", (10**8,), "f4", chunks=(1000,))


def cycle(file):
    file["acquisition/running/up"] = h5py.SoftLink("/acquisition")
    file["loop"] = h5py.SoftLink("/loop")
    file["scratch_group/self"] = file.create_group("scratch_group")


def deep(file):
    group = file.create_group("deep")
    for _ in range(3000):
        group = group.create_group("g")


def unknown_filter(data: bytes) -> bytes:
    """The filter's number in the pipeline message becomes one that nobody registered."""
    at = data.rindex((1).to_bytes(2, "little") + (8).to_bytes(2, "little") + (1).to_bytes(2, "little"))
    return data[:at] + (31999).to_bytes(2, "little") + data[at + 2 :]


def gzipped(path: Path) -> None:
    edited(lambda f: replace(f, "units/spike_times", data=np.concatenate(TIMES), chunks=True, compression="gzip"))(path)
    rewritten(unknown_filter)(path)


def no_units(file):
    del file["units"]


def no_spike_times(file):
    del file["units/spike_times"], file["units/spike_times_index"]
    file["units"].attrs["colnames"] = ["electrodes"]


def missing_extension(file):
    del file["specifications"]
    del file.attrs[".specloc"]
    file["units"].attrs.update(neurodata_type="SortedUnits", namespace="ndx-sorting")


def broken_namespace(file):
    version = next(iter(file["specifications/core"]))
    replace(file, f"specifications/core/{version}/namespace", data="{not JSON")


def foreign_namespace(file):
    """A cached namespace, of an extension, that asks for types no one defines."""
    text = '{"namespaces": [{"name": "ndx-x", "version": "0.1", "doc": "x", "author": "x", "contact": "x", ' \
           '"schema": [{"namespace": "core"}, {"source": "absent"}]}]}'  # fmt: skip
    file["specifications"].create_group("ndx-x/0.1")["namespace"] = text


INDEX, VALUES = "units/spike_times_index", "units/spike_times"

REFUSED = {
    "truncated": (rewritten(lambda data: data[: len(data) // 2]), "not a readable HDF5 file"),
    "empty file": (rewritten(lambda _: b""), "not a readable HDF5 file"),
    "text": (rewritten(lambda _: b"unit,time\n1,0.5\n"), "not a readable HDF5 file"),
    "plain HDF5": (lambda path: h5py.File(path, "w").close(), "cannot read this file as NWB"),
    "no such file": (lambda path: path.unlink(), "does not exist"),
    "directory": (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
    "named pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    "external link": (edited(external_link), "'/units' is a link into another file.*allow_external=True"),
    "external link below": (edited(external_link_to_group), "link into another file"),
    "external storage": (edited(external_storage), "'/units/spike_times' lie in another file.*allow_external=True"),
    "virtual dataset": (edited(virtual), "'/units/spike_times' is a virtual dataset.*allow_external=True"),
    "hidden by reference": (hidden_behind_reference, "'/table' lie in another file"),
    "declares 8 TB": (
        edited(lambda f: replace(f, VALUES, shape=(10**12,), dtype="f8", chunks=(1000,))),
        "declare 8e.12 bytes",
    ),
    "many large": (edited(many_large), "declare .* bytes"),
    "deep": (edited(deep), "cannot read this file as NWB"),
    "loops": (edited(cycle), "cannot read this file as NWB"),
    "unknown filter": (gzipped, "filter 31999"),
    "no units": (edited(no_units), "no Units table.*acquisition 'running'.*trial table 'trials'"),
    "no spike times": (edited(no_spike_times), "no spike_times; its columns are electrodes"),
    "no index": (edited(lambda f: f.__delitem__(INDEX)), "Columns must be the same length, at root/units"),
    "short index": (put(INDEX, np.array([5, 8])), "Columns must be the same length, at root/units"),
    "text for times": (put(VALUES, ["a"] * 12), "expected times|cannot read"),
    "two-dimensional times": (put(VALUES, np.zeros((12, 2))), "expected times|cannot read"),
    "fractional index": (put(INDEX, np.array([5.0, 8.5, 12.0])), "spike_times_index|cannot read"),
    "all indices beyond": (put(INDEX, np.array([50, 80, 120])), "no unit to read(.|\n)*points beyond the 12 stored"),
    "missing extension": (edited(missing_extension), "SortedUnits|ndx-sorting"),
    "broken namespace": (edited(broken_namespace), "cannot read this file as NWB"),
    "absent schema": (edited(foreign_namespace), "cannot read this file as NWB"),
    "no trial has a time": (put("intervals/trials/start_time", np.full(5, np.nan)), "no trial is left"),
    "short column": (put("intervals/trials/start_time", np.zeros(3)), "same length, at root/intervals/trials"),
    "text for trial times": (put("intervals/trials/start_time", ["a"] * 5), "expected seconds|cannot read"),
    "same unit id twice": (put("units/id", np.array([0, 1, 1])), "unique"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(sound, canary, name):
    make, message = REFUSED[name]
    path = canary / "session.nwb"
    path.write_bytes(sound)
    make(path)
    with pytest.raises(RecordingError, match=message) as caught:
        readers.read_nwb(path, bin_width=0.5)
    assert "session.nwb" in str(caught.value), "the error must name the file"
    assert caught.value.__cause__ is None and len(str(caught.value)) < 1500, "one readable message, no deep traceback"
    if path.is_file():
        assert_closed(path)


def assert_closed(path: Path) -> None:
    """HDF5 refuses to open for writing what is still open for reading in this process."""
    data = path.read_bytes()
    if data.startswith(b"\x89HDF") and len(data) == int.from_bytes(data[40:48], "little"):
        h5py.File(path, "r+").close()


LOADED = {
    # name: (edit, units left, total count, what the report says)
    "sound": (lambda _: None, [0, 1, 2], 8, ""),
    "NaN time": (set_values(VALUES, 3, np.nan), [0, 1, 2], 7, "unit 0: 1 of 5 spike times are NaN or infinite"),
    "infinite time": (set_values(VALUES, 11, np.inf), [0, 1, 2], 8, "unit 2: 1 of 4 spike times are NaN or infinite"),
    "unsorted times": (put(VALUES, np.concatenate([TIMES[0][::-1], *TIMES[1:]])), [0, 1, 2], 8, "unit 0: .*: sorted"),
    "negative time": (set_values(VALUES, 0, -0.5), [0, 1, 2], 7, "unit 0: 1 of 5 spike times lie before the start"),
    "decreasing index": (put(INDEX, np.array([5, 3, 12])), [], None, None),
    "decreasing last": (put(INDEX, np.array([5, 12, 8])), [0], 3, "units 1, 2: skipped: spike_times_index decreases"),
    "wrapped index": (put(INDEX, np.array([5, 8, 12 - 2**32])), [0, 1], 6, "unit 2: skipped: .* beyond the 12 stored"),
    "beyond the end": (put(INDEX, np.array([5, 8, 40])), [0, 1], 6, "unit 2: skipped: .* points beyond the 12 stored"),
    "dangling electrode": (put("units/electrodes", np.array([0, 7, 0])), [0, 1, 2], 8, "unit 1: its electrodes"),
    "event is NaN": (put("intervals/trials/start_time", [0, np.nan, 4, 6, 8]), [0, 1, 2], 6, "trial 1: skipped: start"),
    "stops before start": (put("intervals/trials/stop_time", [1, 3, 3, 7, 9]), [0, 1, 2], 7, "trial 2: skipped: short"),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in LOADED if LOADED[name][1]])
def test_loaded_with_a_report(sound, tmp_path, name):
    make, units, total, message = LOADED[name]
    path = tmp_path / "session.nwb"
    path.write_bytes(sound)
    make(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = readers.read_nwb(path, bin_width=0.5)
    assert got.unit.tolist() == units and got.observations.sum() == total
    assert_closed(path)
    reports = [w.message.report for w in caught if isinstance(w.message, readers.ReadWarning)]
    if not message:
        assert not caught
        return
    assert len(reports) == 1 and str(path) in str(reports[0])
    with pytest.raises(RecordingError, match=message):
        readers.read_nwb(path, bin_width=0.5, strict=True)
    with pytest.warns(readers.ReadWarning, match=message), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(silent|constant)")
        readers.read_nwb(path, bin_width=0.5)


def test_every_unit_that_touches_a_wrong_bound_is_in_doubt(sound, tmp_path):
    """Index (5, 3, 12): either 5 or 3 is wrong, so no unit's part is certain."""
    path = tmp_path / "session.nwb"
    path.write_bytes(sound)
    LOADED["decreasing index"][0](path)
    with pytest.raises(RecordingError, match=r"no unit to read(.|\n)*units 0, 1, 2: skipped"):
        readers.read_nwb(path, bin_width=0.5)


@pytest.mark.parametrize("make", [external_link, external_storage, virtual])
def test_another_files_bytes_come_only_when_allowed(sound, canary, make):
    """The positive control of the refusals above: with allow_external the canary's spike times are counted."""
    path = canary / "session.nwb"
    path.write_bytes(sound)
    edited(make)(path)
    before = {other: other.read_bytes() for other in canary.iterdir()}
    with pytest.raises(RecordingError, match=r"another file|other files"):
        readers.read_nwb(path, bin_width=0.5)
    with pytest.raises(RecordingError, match=r"another file|other files"):
        readers.list_nwb(path)
    assert before == {other: other.read_bytes() for other in canary.iterdir()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*silent")
        got = readers.read_nwb(path, bin_width=0.5, allow_external=True)
    assert got.observations[2].sum() == np.sum(CANARY[:12] < 5) and got.observations.sum() == 12


def test_the_guard_raises_the_callers_class_of_error(sound, canary):
    path = canary / "posterior.nc"
    path.write_bytes(sound)
    check_hdf5(path, error=IntegrityError)
    edited(external_storage)(path)
    with pytest.raises(IntegrityError, match=r"posterior\.nc: the data of '/units/spike_times' lie in another file"):
        check_hdf5(path, error=IntegrityError)


@pytest.mark.parametrize("make", [cycle, deep])
def test_the_guard_passes_odd_but_harmless_structures(sound, tmp_path, make):
    path = tmp_path / "odd.h5"
    path.write_bytes(sound)
    edited(make)(path)
    check_hdf5(path, error=IntegrityError)


def test_the_guard_bounds_object_references(tmp_path, monkeypatch):
    path = tmp_path / "references.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("many", data=[file.ref] * 50, dtype=h5py.ref_dtype)
        file.create_dataset("empty", (10**8,), h5py.ref_dtype, chunks=(1000,))  # nothing stored, nothing to follow
    check_hdf5(path, error=IntegrityError)
    monkeypatch.setattr("pyrodyn._hdf5_guard.MAX_REFERENCES", 49)
    with pytest.raises(IntegrityError, match="'/many' declares 50 object references"):
        check_hdf5(path, error=IntegrityError)
