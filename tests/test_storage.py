"""A stored posterior comes back bit for bit, or is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
import xarray as xr

from pyrodyn import _manifest
from pyrodyn.errors import IntegrityError
from pyrodyn.storage import load, save


def posterior(seed: int = 0) -> xr.DataTree:
    rng = np.random.default_rng(seed)
    loading = rng.normal(size=(2, 30, 5, 3))
    loading[0, 3, 1] = np.nan
    unit = {"unit": np.array([f"u{i}" for i in range(5)]), "region": ("unit", ["V1", "V1", "V2", "V2", "éß"])}
    draws = {"chain": [0, 1], "draw": np.arange(30)}
    sites = xr.Dataset(
        {
            "loading": (("chain", "draw", "unit", "latent"), loading, {"symmetries": ["rotation"], "bin_width": 0.02}),
            "scale": (("chain", "draw"), rng.gamma(2.0, size=(2, 30)).astype(np.float32)),
            "label": ((), "LDS"),
        },
        {**draws, **unit, "latent": [0, 1, 2]},
        {"engine": json.dumps({"name": "NUTS", "draws": 30}), "seed": 3, "seconds": 1.5, "levels": [0.5], "none": []},
    )
    counts = rng.poisson(1.0, size=(4, 40, 5))
    data = xr.Dataset(
        {"counts": (("trial", "time", "unit"), counts), "mask": (("trial", "time"), rng.random((4, 40)) < 0.9)},
        {**unit, "time": np.arange(40) * 0.02, "heldout": ("unit", [True, False, False, True, False])},
    )
    data["time"].attrs["units"] = "seconds"  # must not turn into a timedelta
    groups = {"posterior": sites, "observed_data": data, "sample_stats": xr.Dataset(attrs={"note": ""})}
    return xr.DataTree.from_dict(groups)


def assert_same(got: xr.DataTree, expected: xr.DataTree) -> None:
    """Equal in values, dtypes, bits, coordinates and attributes with their types."""
    assert [node.path for node in got.subtree] == [node.path for node in expected.subtree]
    for here, there in zip(got.subtree, expected.subtree, strict=True):
        a, b = here.to_dataset(inherit=False), there.to_dataset(inherit=False)
        assert (set(a.data_vars), set(a.coords), dict(a.sizes)) == (set(b.data_vars), set(b.coords), dict(b.sizes))
        assert repr(a.attrs) == repr(b.attrs)
        for name in a.variables:
            x, y = a[name], b[name]
            assert (x.dims, x.shape, repr(x.attrs)) == (y.dims, y.shape, repr(y.attrs)), name
            assert x.dtype == (y.dtype if y.dtype != object else x.values.astype(str).dtype), name
            assert x.values.tobytes() == y.values.astype(x.dtype).tobytes(), name
            assert (name in a.xindexes) == (name in b.xindexes)


def resigned(path, change) -> None:
    """Change the HDF5 part of a stored file by `change(path)`, then give it a manifest whose digests are right."""
    content = path.read_bytes()
    size = int.from_bytes(content[-16:-8], "little")
    path.write_bytes(content[: -48 - size])
    change(path)
    with open(path, "r+b") as file:
        _manifest.append_manifest(file, ())


VALUES = {
    "float64": np.array([0.0, -0.0, np.inf, -np.inf, 5e-324, np.pi]),
    "nan payload": np.array([0x7FF8000000000001, 0xFFF0000000000123], dtype=np.uint64).view(np.float64),
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "big endian": np.arange(4.0).astype(">f8"),
    "not contiguous": np.arange(24.0).reshape(4, 6)[::2, ::-3],
    "int64": np.array([-(2**63), 2**63 - 1]),
    "int8": np.arange(-3, 3, dtype=np.int8),
    "uint8": np.array([0, 255], dtype=np.uint8),
    "bool": np.array([[True, False], [False, False]]),
    "scalar": np.array(2.5),
    "scalar bool": np.array(True),
    "scalar string": np.array("LDS"),
    "empty scalar string": np.array(""),
    "strings": np.array([["V1", "", "大脑"], ["é", " a ", "x" * 300]]),
    "object strings": np.array(["a", "bc"], dtype=object),
    "empty strings": np.array(["", ""]),
    "no element": np.zeros((0, 3)),
    "no string": np.zeros((2, 0), dtype="U1"),
    "no bool": np.zeros(0, dtype=bool),
    "long and compressible": np.zeros((3, 1_000_000), dtype=np.int64),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("group", ["/", "/posterior", "/a/b"])
def test_values_come_back_bit_for_bit(tmp_path, values, group):
    dims = [f"axis{i}" for i in range(values.ndim)]
    tree = xr.DataTree.from_dict({group: xr.Dataset({"x": (dims, values)})})
    native = xr.DataTree.from_dict({group: xr.Dataset({"x": (dims, values.astype(values.dtype.newbyteorder("=")))})})
    assert_same(load(save(tree, tmp_path / "x.nc")), native)


def test_a_posterior_comes_back(tmp_path):
    path = tmp_path / "fit.nc"
    assert save(posterior(), path) == path
    assert_same(load(path), posterior())
    assert_same(load(save(load(path), path)), posterior())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["fit.nc"]
    open_files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert str(path) not in open_files


def test_inherited_and_odd_coordinates_come_back(tmp_path):
    root = xr.Dataset(coords={"chain": ["a", "b"], "flag": ("chain", [True, False]), "run": "first"})
    child = xr.Dataset({"x": ("chain", [1.0, 2.0])}, {"name": ("chain", ["a", "b"])}, {"many": list(range(3000))})
    tree = xr.DataTree.from_dict({"/": root, "/c": child, "/c/d": xr.Dataset({"y": ("flag", [1])}, {"flag": [True]})})
    again = load(save(tree, tmp_path / "x.nc"))
    assert_same(again, tree)
    assert again.identical(tree)
    assert again["c"].coords["chain"].values.tolist() == ["a", "b"]  # of the root: a group inherits indexes


@pytest.mark.parametrize(
    "value",
    ["", "é\n", "x" * 200_000, 0, -(2**63), 1.0, float("nan"), [], [1], [1.5], ["a"], [""], [1, 2], ["a", "", "é"]],
    ids=lambda value: repr(value)[:12],
)
def test_attributes_keep_their_python_type(tmp_path, value):
    variable = ("t", [1.0], {"key": value})
    tree = xr.DataTree.from_dict({"/": xr.Dataset(attrs={"key": value}), "/g": xr.Dataset({"x": variable, "y": 1})})
    tree["g"].attrs = {f"key{i}": value for i in range(20)}
    assert_same(load(save(tree, tmp_path / "x.nc")), tree)


def test_other_readers_open_the_file(tmp_path):
    path = save(posterior(), tmp_path / "fit.nc")
    with xr.open_datatree(path, engine="h5netcdf", decode_timedelta=False) as tree:
        xr.testing.assert_equal(tree.load(), posterior())
    with h5py.File(path) as file:
        stored = [file[name] for name in ("posterior/loading", "posterior/region", "observed_data/counts")]
        datasets = [entry for entry in stored if isinstance(entry, h5py.Dataset)]
        np.testing.assert_array_equal(datasets[0][()], posterior()["posterior/loading"].values)
        assert [dataset.fletcher32 for dataset in datasets] == [True] * 3
        assert (datasets[0].compression, datasets[2].compression) == (None, "gzip")


def test_what_cannot_be_stored_is_refused_by_name(tmp_path):
    path = save(posterior(), tmp_path / "fit.nc")
    before = path.read_bytes()
    stacked = xr.Dataset(coords={"a": [0, 1], "b": [0, 1]}).stack(ab=["a", "b"])
    cases = [
        (TypeError, "group 'g', attribute 'k'", xr.Dataset(attrs={"k": None})),
        (TypeError, "group 'g', attribute 'k'", xr.Dataset(attrs={"k": True})),
        (TypeError, "group 'g', attribute 'k'.*JSON", xr.Dataset(attrs={"k": {"a": 1}})),
        (TypeError, "group 'g', attribute 'k'", xr.Dataset(attrs={"k": [1, "a"]})),
        (TypeError, "group 'g', attribute 'k'", xr.Dataset(attrs={"k": np.arange(2)})),
        (TypeError, "variable 'g/x', attribute 'k'", xr.Dataset({"x": ((), 1.0, {"k": (1, 2)})})),
        (ValueError, "variable 'g/x', attribute '_FillValue'", xr.Dataset({"x": ((), 1.0, {"_FillValue": 1.0})})),
        (ValueError, "attribute 'k'.*64 bits", xr.Dataset(attrs={"k": 2**63})),
        (ValueError, "attribute 'k'.*4000", xr.Dataset(attrs={"k": ["a"] * 4000})),
        (ValueError, "attribute 'k'.*NUL", xr.Dataset(attrs={"k": "a\0b"})),
        (TypeError, "'g/x'.*complex128", xr.Dataset({"x": ("t", [1j])})),
        (TypeError, "'g/x'.*seconds", xr.Dataset({"x": ("t", np.array([0, 1], dtype="timedelta64[ns]"))})),
        (TypeError, "'g/x'.*object", xr.Dataset({"x": ("t", np.array(["a", 1], dtype=object))})),
        (ValueError, "'g/x'.*NUL", xr.Dataset({"x": ("t", np.array(["a\0b"]))})),
        (ValueError, "'g/x'.*Unicode", xr.Dataset({"x": ("t", np.array(["\ud800"], dtype=object))})),
        (ValueError, "'g/5'.*rename", xr.Dataset({5: 1.0})),
        (ValueError, "'g/ a'.*rename", xr.Dataset({" a": 1.0})),
        (ValueError, "'g/a b'.*rename", xr.Dataset(coords={"a b": ("t", [1.0])})),
        (TypeError, "'g/ab'.*reset_index", stacked),
    ]
    for error, message, group in cases:
        with pytest.raises(error, match=message):
            save(xr.DataTree.from_dict({"g": group}), path)
    with pytest.raises(TypeError, match="tree: got Dataset"):
        save(xr.Dataset(), path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileNotFoundError, match="make it first"):
        save(posterior(), tmp_path / "absent" / "fit.nc")
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_to_the_file_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "fit.nc"
    link.symlink_to(tmp_path / "disk" / "real.nc")
    save(posterior(), link)
    assert link.is_symlink()
    assert_same(load(tmp_path / "disk" / "real.nc"), posterior())


# Damage.


def test_truncation_at_any_length_is_refused(tmp_path):
    content = save(posterior(), tmp_path / "fit.nc").read_bytes()
    cut = tmp_path / "cut.nc"
    lengths = {0, 1, 7, 8, 47, 48, 49, 512, len(content) // 2, *range(len(content) - 60, len(content))}
    for length in sorted(lengths | set(np.random.default_rng(0).integers(len(content), size=100).tolist())):
        cut.write_bytes(content[:length])
        with pytest.raises(IntegrityError, match="cut.nc.*truncated"):
            load(cut)


def test_random_damage_is_refused_and_named(tmp_path):
    path = save(posterior(), tmp_path / "fit.nc")
    content = path.read_bytes()
    # The oracle asks HDF5 for the places, one dataset at a time.
    places = {}
    with h5py.File(path) as file:
        for name in ("posterior/loading", "posterior/scale", "posterior/region", "observed_data/counts"):
            found = file[name].id.get_chunk_info(0)
            places[name] = range(found.byte_offset, found.byte_offset + found.size)
        end = file.id.get_filesize()
    random = np.random.default_rng(1)
    offsets = random.integers(len(content), size=260).tolist() + [p[len(p) // 2] for p in places.values()] * 10
    for number, offset in enumerate(offsets):
        mutant = bytearray(content)
        if number % 2:
            mutant[offset] ^= 1 << int(random.integers(8))
        else:
            mutant[offset] = (mutant[offset] + int(random.integers(1, 256))) % 256
        path.write_bytes(mutant)
        with pytest.raises(IntegrityError) as refused:
            load(path)
        message = str(refused.value)
        named = [name for name, place in places.items() if offset in place]
        assert str(path) in message
        assert all(f"damaged entry: {name}." in message for name in named), (offset, message)
        if offset >= end:
            assert "manifest" in message


def test_bytes_added_or_taken_are_refused(tmp_path):
    path = save(posterior(), tmp_path / "fit.nc")
    content = path.read_bytes()
    tail = len(content) - 48 - int.from_bytes(content[-16:-8], "little")
    for changed in (content + b"\0", content + content, content[100:], content[:tail] + b"\0" + content[tail:]):
        path.write_bytes(changed)
        with pytest.raises(IntegrityError, match="truncated|damaged"):
            load(path)


def test_damage_to_the_metadata_and_to_two_entries_is_named(tmp_path):
    path = save(posterior(), tmp_path / "fit.nc")
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        offsets = [file[name].id.get_chunk_info(0).byte_offset for name in ("posterior/loading", "posterior/scale")]
    for offset in (40, *offsets):
        content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged entry: posterior/loading, posterior/scale, metadata"):
        load(path)


def test_files_of_others_are_refused(tmp_path):
    foreign = tmp_path / "foreign.nc"
    for content in (b"", b"hello", os.urandom(10_000)):
        foreign.write_bytes(content)
        with pytest.raises(IntegrityError, match="not written by pyrodyn.save"):
            load(foreign)
    foreign.unlink()
    posterior().to_netcdf(foreign, engine="h5netcdf")
    with pytest.raises(IntegrityError, match="not written by pyrodyn.save"):
        load(foreign)
    with pytest.raises(IntegrityError, match="not a regular file"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load(tmp_path / "absent.nc")


def with_manifest(path, body: bytes) -> None:
    content = path.read_bytes()
    start = len(content) - 48 - int.from_bytes(content[-16:-8], "little")
    tail = hashlib.sha256(body).digest() + len(body).to_bytes(8, "little") + content[-8:]
    path.write_bytes(content[:start] + body + tail)


def test_a_newer_format_is_refused_with_both_versions(tmp_path):
    path = save(posterior(), tmp_path / "fit.nc")
    with_manifest(path, b'{"format": 7, "whatever": []}')
    with pytest.raises(IntegrityError, match="format 7.*up to format 1"):
        load(path)


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"[]", b'{"format": 1}', b'{"format": 1e999}', b"\xff"])
def test_a_senseless_manifest_is_refused(tmp_path, body):
    path = save(posterior(), tmp_path / "fit.nc")
    with_manifest(path, body)
    with pytest.raises(IntegrityError, match="damaged entry: manifest"):
        load(path)


@pytest.mark.parametrize("ranges", [[[0, 10], [5, 10]], [[0, 10**9]], [[-5, 10]], [[3, 0]], [[0]], "ab", [["a", "b"]]])
def test_impossible_ranges_are_refused(tmp_path, ranges):
    path = save(posterior(), tmp_path / "fit.nc")
    entries = {"x": {"ranges": ranges, "sha256": ""}}
    manifest = {"format": 1, "length": 5000, "metadata": "", "entries": entries, "lists_of_one": []}
    with_manifest(path, json.dumps(manifest).encode())
    with pytest.raises(IntegrityError, match="damaged entry: manifest"):
        load(path)


# Files made by hand, with digests that are right.


def _external_link(file):
    file["posterior/stolen"] = h5py.ExternalLink("secret.nc", "/secret")


def _external_data(file):
    file.create_dataset("posterior/stolen", (8,), "u1", external=[("secret.nc", 0, 8)])


def _virtual(file):
    layout = h5py.VirtualLayout(shape=(3,), dtype="f8")
    layout[:] = h5py.VirtualSource("secret.nc", "secret", shape=(3,))
    file.create_virtual_dataset("posterior/stolen", layout)


def _huge(file):
    file.create_dataset("posterior/stolen", (10**12,), "f8", chunks=(1000,))


def _strings(file):
    file["posterior/stolen"] = np.array(["a" * 1000] * 10, dtype=object)


def _opaque(file):
    file["posterior/stolen"] = np.array([b"12"], dtype="V2")


@pytest.mark.parametrize("plant", [_external_link, _external_data, _virtual, _huge, _strings, _opaque])
def test_hostile_files_are_refused(tmp_path, plant):
    with h5py.File(tmp_path / "secret.nc", "w") as secret:
        secret["secret"] = [1.0, 2.0, 3.0]
    path = save(posterior(), tmp_path / "fit.nc")

    def change(path):
        with h5py.File(path, "a") as file:
            plant(file)

    resigned(path, lambda path: None)
    assert load(path)["posterior/loading"].shape == (2, 30, 5, 3)  # the route itself makes files that load
    resigned(path, change)
    with pytest.raises(IntegrityError, match="fit.nc.*posterior/stolen"):
        load(path)


def run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loading_executes_nothing(tmp_path):
    warm, path = save(posterior(1), tmp_path / "warm.nc"), save(posterior(), tmp_path / "fit.nc")
    program = """
        import os, sys
        from pyrodyn import storage
        storage.load(sys.argv[1])  # imports what reading needs
        seen, opened = set(), set()

        def note(event, arguments):
            seen.add(event)
            if event == "open":
                opened.add(os.path.basename(str(arguments[0])))

        sys.addaudithook(note)
        storage.load(sys.argv[2])
        print(opened)
        print(*seen)
    """
    opened, seen = run(program, str(warm), str(path)).splitlines()
    assert opened == "{'fit.nc'}"
    assert "open" in seen.split()
    forbidden = ("pickle.", "exec", "compile", "import", "subprocess.", "os.system", "os.exec", "socket.", "ctypes.")
    assert not [event for event in seen.split() if event.startswith(forbidden)]


def test_a_kill_while_saving_never_destroys_the_file(tmp_path):
    program = """
        import os, signal, sys, time
        import numpy as np, xarray as xr
        from pyrodyn import storage

        path = sys.argv[1]
        values = [np.full(200_000, 1.0) / 7, np.arange(200_000) / 3.0]
        trees = [xr.DataTree.from_dict({"posterior": xr.Dataset({"x": ("n", value)})}) for value in values]
        storage.save(trees[0], path)
        times, cut, kills = {os.stat(path).st_mtime_ns}, 0, 0
        while kills < 6 or (kills < 40 and (len(times) == 1 or not cut)):
            child = os.fork()
            if child == 0:
                while True:
                    for tree in trees:
                        storage.save(tree, path)
            time.sleep(0.05 + 0.013 * kills)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found = storage.load(path)
            assert any(found.identical(tree) for tree in trees)
            times.add(os.stat(path).st_mtime_ns)
            cut = sum(name.endswith(".partial") for name in os.listdir(os.path.dirname(path)))
            kills += 1
        print(len(times), cut)
    """
    replaced, interrupted = map(int, run(program, str(tmp_path / "fit.nc")).split())
    # Otherwise nothing was saved, or no save was cut.
    assert replaced > 1
    assert interrupted > 0
