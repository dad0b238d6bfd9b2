"""Save a posterior to one netCDF file, and load it again or refuse it.

The file is plain netCDF-4 (HDF5) with a manifest behind it, which HDF5 readers ignore: the sha256 of the bytes of every
variable and of everything between them (the metadata). So every byte is checked before HDF5 parses any, and a damaged
variable is named. A digest tells damage, not authorship: anybody can write a file whose digests are right. Such a file
is still refused when it points outside itself or declares absurd sizes, and nothing in it is ever executed.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import xarray as xr

from pyrodyn._files import write_atomically
from pyrodyn._hdf5_guard import check_hdf5
from pyrodyn._manifest import append_manifest, verify
from pyrodyn.errors import IntegrityError

_CHUNK_BYTES = 2**24
_SAMPLE = 2**16
_ATTRIBUTE_ITEMS = 3500  # HDF5 holds an attribute in a header of 64 KiB, at 16 bytes a string

# Attributes that netCDF, HDF5 or xarray's decoding keep for themselves: they would change or hide the data.
_RESERVED = frozenset(
    ("_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned", "_Encoding", "dtype", "coordinates")
    + ("CLASS", "NAME", "DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST")
    + ("_Netcdf4Dimid", "_Netcdf4Coordinates", "_NCProperties", "_nc3_strict")
)


def save(tree: xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a tree of ArviZ groups to one netCDF file, whole or not at all.

    Float, integer, boolean and string variables of any shape come back bit for bit (strings as numpy unicode of the
    smallest width that holds them), with dims, coordinates, attributes and empty groups.
    `xarray.open_datatree(path, engine="h5netcdf")` and h5py read the file as well.

    Parameters
    ----------
    tree
        The posterior. Attributes are str, int, float, or lists of one of them.
    path
        The file to make or to replace. A crash at any moment leaves the old file as it was.

    Returns
    -------
    pathlib.Path
        `path`.

    Raises
    ------
    TypeError
        When a variable or an attribute has a type that the file cannot hold; the message names group and entry.
    ValueError
        When a name, a string or an integer cannot be stored.
    FileNotFoundError
        When the folder does not exist.
    """
    if not isinstance(tree, xr.DataTree):
        raise TypeError(f"tree: got {type(tree).__name__}, expected an xarray.DataTree; see xarray.DataTree.from_dict.")
    groups = {node.path: _checked(node) for node in tree.subtree}
    encoding = {where: {name: _encoding(v) for name, v in group.variables.items()} for where, group in groups.items()}

    def write(file: BinaryIO) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            xr.DataTree.from_dict(groups).to_netcdf(file.name, engine="h5netcdf", encoding=encoding)
        append_manifest(file, tuple(_lists_of_one(groups)))

    return write_atomically(path, write)


def load(path: str | os.PathLike[str]) -> xr.DataTree:
    """Read a file that `save` wrote, all of it into memory.

    Every byte is compared with its digest before HDF5 sees any of them.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    xarray.DataTree
        Equal to the tree that was saved; the file is closed.

    Raises
    ------
    IntegrityError
        When the file is truncated or damaged (the message names the damaged entries), was not written by `save`, was
        written by a newer version of it, points outside itself, or declares absurd sizes.
    FileNotFoundError
        When there is no such file.
    """
    name = Path(path)
    if not name.is_file():
        if name.exists():
            raise IntegrityError(f"{name}: not a regular file; give the path of a file written by pyrodyn.save.")
        raise FileNotFoundError(f"{name}: there is no such file; give the path of a file written by pyrodyn.save.")
    lists_of_one = frozenset(verify(name).lists_of_one)
    check_hdf5(name, error=IntegrityError)
    try:
        _check_types(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Decoding of times and of fill values is off: the stored numbers are the numbers.
            opened = xr.open_datatree(
                os.path.realpath(name),
                engine="h5netcdf",
                mask_and_scale=False,
                decode_times=False,
                decode_timedelta=False,
            )
            with closing(opened):
                groups = {node.path: _plain(node, lists_of_one) for node in opened.subtree}
        return xr.DataTree.from_dict(groups)
    except Exception as cause:
        # The digests are right, so this file was made by hand: whatever breaks in it, it is refused.
        raise IntegrityError(f"{name}: not written by pyrodyn.save: {type(cause).__name__}: {cause}") from cause


def _checked(node: xr.DataTree) -> xr.Dataset:
    """The group's own variables, storable ones, free of the encoding of any former file."""
    group = node.to_dataset(inherit=False)
    where = node.path.strip("/")
    label = f"group {where!r}" if where else "the root group"
    if where:
        _check_name(node.name, label)
    _check_attributes(group.attrs, label)
    for dim in group.dims:
        _check_name(dim, f"{label}, dimension {dim!r}")
    for name, index in group.xindexes.items():
        if isinstance(index, xr.indexes.PandasMultiIndex):
            raise TypeError(f"variable {_joined(where, name)!r}: netCDF has no multi-index; call reset_index first.")
    variables = {}
    for name, variable in group.variables.items():
        label = f"variable {_joined(where, name)!r}"
        # netCDF lists the coordinates that are not dimensions in one attribute, separated by spaces.
        _check_name(name, label, spaces=name not in group.coords or name in group.dims)
        _check_attributes(variable.attrs, label)
        variables[name] = xr.Variable(variable.dims, _storable(variable.values, label), variable.attrs)
    return _dataset(variables, group, group.attrs)


def _dataset(variables: dict[Any, xr.Variable], like: xr.Dataset, attributes: Mapping[Any, Any]) -> xr.Dataset:
    data = {name: variable for name, variable in variables.items() if name not in like.coords}
    return xr.Dataset(data, {name: variables[name] for name in like.coords}, attributes)


def _joined(where: str, name: Any) -> str:
    return f"{where}/{name}" if where else f"{name}"


def _check_name(name: Any, label: str, spaces: bool = True) -> None:
    if not isinstance(name, str) or name != name.strip() or name in ("", ".", "..") or set(name) & {"/", "\0"}:
        raise ValueError(f"{label}: a name must be a string without '/' and without spaces around it; rename it.")
    if not spaces and " " in name:
        raise ValueError(f"{label}: the name of a coordinate must not hold a space; rename it.")


def _storable(values: np.ndarray, label: str) -> np.ndarray:
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b" or (kind in "iu" and size <= 8) or (kind == "f" and size in (4, 8)):
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    items = values.ravel().tolist()
    if kind not in "UO" or not all(isinstance(item, str) for item in items):
        raise TypeError(
            f"{label}: got dtype {values.dtype}, expected float32, float64, an integer, bool, or strings; convert it "
            "(times to seconds as float64)."
        )
    if any("\0" in item for item in items):
        raise ValueError(f"{label}: a string holds a NUL character, which ends a string in netCDF; remove it.")
    try:
        _characters(_unicode(values))
    except UnicodeEncodeError as cause:
        raise ValueError(f"{label}: a string is not valid Unicode ({cause}); replace the character.") from None
    return _unicode(values)


def _unicode(values: np.ndarray) -> np.ndarray:
    return np.array(values.ravel().tolist(), dtype=str).reshape(values.shape)


def _characters(values: np.ndarray) -> np.ndarray:
    """(...) strings as the (..., character) bytes of their UTF-8."""
    encoded = np.array([item.encode() for item in values.ravel().tolist()], dtype=bytes)
    return encoded.view("S1").reshape(*values.shape, encoded.itemsize)


def _check_attributes(attributes: Mapping[Any, Any], owner: str) -> None:
    for name, value in attributes.items():
        label = f"{owner}, attribute {name!r}"
        _check_name(name, label)
        if name in _RESERVED:
            raise ValueError(f"{label}: netCDF reserves this name; rename it.")
        items = value if isinstance(value, list) else [value]
        if not any(all(isinstance(i, kind) and not isinstance(i, bool) for i in items) for kind in (str, int, float)):
            raise TypeError(
                f"{label}: got {value!r:.80} ({type(value).__name__}), expected a str, int or float, or a list of one "
                "of them; store anything else as a JSON string."
            )
        if len(items) > _ATTRIBUTE_ITEMS:
            raise ValueError(f"{label}: got a list of {len(items)}, the most is {_ATTRIBUTE_ITEMS}; store a variable.")
        for item in items:
            if isinstance(item, str):
                _storable(np.array(item, dtype=object), label)
            elif isinstance(item, int) and not -(2**63) <= item < 2**63:
                raise ValueError(f"{label}: the integer {item} does not fit in 64 bits; store it as a string.")


def _lists_of_one(groups: Mapping[str, xr.Dataset]) -> Iterator[tuple[str, str]]:
    for path, group in groups.items():
        where = path.strip("/")
        owners = {where: group.attrs} | {_joined(where, name): v.attrs for name, v in group.variables.items()}
        for owner, attributes in owners.items():
            yield from ((owner, str(k)) for k, v in attributes.items() if isinstance(v, list) and len(v) == 1)


def _encoding(variable: xr.Variable) -> dict[str, Any]:
    values = variable.values
    encoding: dict[str, Any] = {"_FillValue": None}
    if values.dtype.kind == "U":
        # Characters, not HDF5's strings of variable length: those lie in a common heap, outside the checksums.
        encoding = {"dtype": "S1"}
        values = _characters(values)
    if variable.size == 0 or variable.ndim == 0:
        return encoding  # HDF5 has no chunks here, hence no filters; the manifest covers the bytes
    encoding |= {"fletcher32": True, "chunksizes": _chunks(values)}
    if _compresses(values):
        encoding |= {"zlib": True, "complevel": 1, "shuffle": True}
    return encoding


def _chunks(values: np.ndarray) -> tuple[int, ...]:
    """One chunk, or as many as keep each at 16 MiB: leading axes are cut first, trailing ones stay contiguous."""
    chunks, axis = list(values.shape), 0
    while np.prod(chunks, dtype=float) * values.itemsize > _CHUNK_BYTES:
        axis += chunks[axis] == 1
        chunks[axis] = -(-chunks[axis] // 2)
    return tuple(chunks)


def _compresses(values: np.ndarray) -> bool:
    """Whether a sample, its bytes shuffled as HDF5 does, shrinks by a fifth: draws of floats do not, counts do."""
    sample = np.ascontiguousarray(values.reshape(-1)[:_SAMPLE])  # a view of draws may have strides
    shuffled = sample.view(np.uint8).reshape(sample.size, -1).T.tobytes()
    return len(zlib.compress(shuffled, 1)) < 0.8 * len(shuffled)


def _check_types(path: Path) -> None:
    """Refuse types that `save` never writes: a few strings of variable length can unfold to any size in memory."""

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not (item.dtype.kind in "biuf" or item.dtype == "S1"):
            raise TypeError(f"{name!r} has dtype {item.dtype}")

    with h5py.File(path, "r") as file:
        file.visititems(visit)


def _plain(node: xr.DataTree, lists_of_one: frozenset[tuple[str, str]]) -> xr.Dataset:
    """A group in memory, its strings and attributes of plain types."""
    group = node.to_dataset(inherit=False)
    where = node.path.strip("/")
    variables = {}
    for name, variable in group.variables.items():
        values = variable.values
        attributes = _plain_attributes(variable.attrs, _joined(where, name), lists_of_one)
        variables[name] = xr.Variable(variable.dims, _unicode(values) if values.dtype == object else values, attributes)
    return _dataset(variables, group, _plain_attributes(group.attrs, where, lists_of_one))


def _plain_attributes(
    attributes: Mapping[Any, Any], owner: str, lists_of_one: frozenset[tuple[str, str]]
) -> dict[str, Any]:
    plain = {}
    for name, value in attributes.items():
        value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        plain[name] = [value] if (owner, name) in lists_of_one else value
    return plain
