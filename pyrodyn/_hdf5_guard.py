"""Refuse HDF5 files that would make the reader read other files, or allocate far more than they hold.

An HDF5 file may name other files (external links, external storage, virtual datasets), and HDF5 opens them without
asking: their bytes come back as if they were this file's data. It may also declare terabytes in a kilobyte. Both are
found by walking the structure, without reading any data but object references.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5o, h5z  # pyright: ignore[reportAttributeAccessIssue]  # compiled modules without stubs

MAX_DECLARED_BYTES = 4 * 2**30
MAX_DECLARED_RATIO = 1000
MAX_REFERENCES = 1_000_000
# What h5py and the HDF5 library raise on a damaged structure.
HDF5_ERRORS = (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError, AttributeError)


class _Refused(Exception):
    """Internal: the reason, before it is raised as the caller's class of error."""


def open_hdf5(path: str | os.PathLike[str], *, error: type[Exception]) -> h5py.File:
    """Open an HDF5 file for reading; anything but a readable HDF5 file is an `error` that names it."""
    name = Path(path)
    # Only a regular file: opening a named pipe would wait for ever, a device might never end.
    if not name.is_file():
        kind = "is not a regular file" if name.exists() else "does not exist"
        raise error(f"{name}: the path {kind}; give the path of an HDF5 file.")
    try:
        return h5py.File(name, "r")
    except HDF5_ERRORS as cause:
        raise error(f"{name}: not a readable HDF5 file (truncated, damaged, or another format): {cause}") from None


def check_hdf5(path: str | os.PathLike[str], *, error: type[Exception]) -> None:
    """Check a file before another library opens it.

    Parameters
    ----------
    path
        The file.
    error
        The class of error to raise, for example `RecordingError` or `IntegrityError`.

    Raises
    ------
    error
        When the file is missing or not HDF5; is damaged; holds an external link, a dataset stored in another file, a
        virtual dataset, a link of an unknown kind or a filter that is not installed; or declares more than 4 GiB and
        more than 1000 times its own size. The message names the file and the entry.
    """
    with open_hdf5(path, error=error) as file:
        check_open_hdf5(file, path, error=error)


def check_open_hdf5(
    file: h5py.File,
    path: str | os.PathLike[str],
    *,
    error: type[Exception],
    allow_external: bool = False,
    remedy: str = "",
) -> None:
    """`check_hdf5` for a file that is open already, so that what was checked is what is read.

    `allow_external` lets links and data in other files pass; `remedy` ends the message that refuses them.
    """
    reason = None
    try:
        _walk(file, os.path.getsize(path), allow_external, remedy)
    except _Refused as refused:
        reason = str(refused)
    except HDF5_ERRORS as cause:
        reason = f"the HDF5 structure is damaged: {type(cause).__name__}: {cause}"
    if reason is not None:
        raise error(f"{Path(path)}: {reason}")


def _walk(file: h5py.File, stored: int, allow_external: bool, remedy: str) -> None:
    limit = max(MAX_DECLARED_BYTES, MAX_DECLARED_RATIO * stored)
    declared, references = 0, 0
    seen: set[tuple[int, int]] = set()
    # A stack, not recursion: the depth of the tree is the file's choice.
    pending: deque[tuple[str, Any]] = deque([("/", file["/"])])
    while pending:
        where, entry = pending.pop()
        if _identity(entry) in seen:
            continue
        seen.add(_identity(entry))
        if isinstance(entry, h5py.Dataset):
            declared += _count(entry) * entry.id.get_type().get_size()
            if declared > limit:
                raise _Refused(
                    f"the datasets up to {where!r} (shape {entry.shape}, {entry.dtype}) declare {declared:.3g} bytes, "
                    f"the file holds {stored}; refused as damaged or hostile."
                )
            _check_storage(where, entry, allow_external, remedy)
        elif isinstance(entry, h5py.Group):
            for name in map(str, entry):
                link, child = _link(entry, name, where), f"{where.rstrip('/')}/{name}"
                if isinstance(link, h5py.ExternalLink):
                    if not allow_external:
                        raise _Refused(f"{child!r} is a link into another file ({link.filename!r}). {remedy}".rstrip())
                elif isinstance(link, h5py.HardLink):
                    pending.append((child, entry[name]))
                # A soft link is a path inside this file. It could leave only through an external link, and those
                # are refused wherever they stand; so there is nothing to check on the path itself.
        for child, reference in _references(entry, where):
            references += 1
            if references > MAX_REFERENCES:
                raise _Refused(f"more than {MAX_REFERENCES} object references (at {child!r}).")
            # A reference reaches objects that no link leads to, so they must be walked as well; last, so that
            # whatever has a path is named by it. One that leads nowhere can be followed by nobody.
            with suppress(*HDF5_ERRORS):
                pending.appendleft((child, file[reference]))


def _identity(entry: Any) -> tuple[int, int]:
    info = h5o.get_info(entry.id)
    return info.fileno, info.addr


def _link(group: h5py.Group, name: str, where: str) -> Any:
    try:
        return group.get(name, getlink=True)
    except TypeError:
        raise _Refused(f"{where!r} holds a link {name!r} of an unknown kind.") from None


def _count(dataset: h5py.Dataset) -> int:
    return 0 if dataset.shape is None else math.prod(dataset.shape)


def _check_storage(where: str, dataset: h5py.Dataset, allow_external: bool, remedy: str) -> None:
    properties = dataset.id.get_create_plist()
    if not allow_external:
        if properties.get_external_count():
            other = properties.get_external(0)[0].decode(errors="replace")
            raise _Refused(f"the data of {where!r} lie in another file ({other!r}). {remedy}".rstrip())
        if dataset.is_virtual:
            raise _Refused(f"{where!r} is a virtual dataset, assembled from other files. {remedy}".rstrip())
    for number in range(properties.get_nfilters()):
        code, _, _, label = properties.get_filter(number)
        if not h5z.filter_avail(code):
            named = label.decode(errors="replace") or "without a name"
            raise _Refused(f"{where!r} needs the HDF5 filter {code} ({named}), which is not installed.")


def _references(entry: Any, where: str) -> Iterator[tuple[str, Any]]:
    for name in entry.attrs:
        if _holds_references(entry.attrs.get_id(name).dtype):
            for reference in _flat(entry.attrs[name]):
                yield f"{where}@{name}", reference
    if isinstance(entry, h5py.Dataset) and _holds_references(entry.dtype) and entry.id.get_storage_size():
        if _count(entry) > MAX_REFERENCES:
            raise _Refused(f"{where!r} declares {_count(entry)} object references, more than {MAX_REFERENCES}.")
        for reference in _flat(entry[()]):
            yield where, reference


def _holds_references(dtype: np.dtype) -> bool:
    if dtype.subdtype is not None:
        return _holds_references(dtype.subdtype[0])
    if dtype.fields is not None:
        return any(_holds_references(field[0]) for field in dtype.fields.values())
    inner = h5py.check_vlen_dtype(dtype)
    if isinstance(inner, np.dtype):
        return _holds_references(inner)
    return h5py.check_ref_dtype(dtype) is not None


def _flat(value: Any) -> Iterator[Any]:
    """The object references inside a scalar, an array, a compound or a ragged value; null references left out."""
    if isinstance(value, h5py.Reference):  # region references are a subclass
        if value:
            yield value
    elif isinstance(value, np.void):
        for field in value.dtype.names or ():
            yield from _flat(value[field])
    elif isinstance(value, np.ndarray):
        for item in value.reshape(-1) if value.dtype.fields else value.ravel().tolist():
            yield from _flat(item)
