"""The trailer of a stored file: where each variable's bytes lie, and the sha256 of all of them.

::

    HDF5 bytes | manifest, JSON | sha256 of the manifest | length of the manifest, uint64 | magic, 8 bytes

It stands at the end because HDF5 readers ignore what follows their bytes, and is found from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py

from pyrodyn.errors import IntegrityError

FORMAT_VERSION = 1

_MAGIC = b"\x89pyrodyn"
_TAIL = struct.Struct("<32sQ8s")
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_BLOCK = 2**20
_REMEDY = "Restore it from a copy, or fit again."

Ranges = tuple[tuple[int, int], ...]  # (offset, size) in bytes


@dataclass(frozen=True)
class Entry:
    """Where the bytes of one variable lie in the file, and their sha256."""

    ranges: Ranges
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a file must hold.

    Attributes
    ----------
    length
        Of the HDF5 part, in bytes.
    metadata
        sha256 of all bytes of the HDF5 part that belong to no entry.
    entries
        By the variable's path, for example "posterior/loading".
    lists_of_one
        (path, attribute) of the attributes that are lists of one element: netCDF does not tell them from the element.
    """

    length: int
    metadata: str
    entries: Mapping[str, Entry]
    lists_of_one: tuple[tuple[str, str], ...]


def append_manifest(file: BinaryIO, lists_of_one: tuple[tuple[str, str], ...]) -> None:
    """Add the trailer to a complete HDF5 file, open for reading and writing."""
    length = file.seek(0, os.SEEK_END)
    ranges = _stored_ranges(file.name)
    digests, metadata = _digests(file, length, ranges)
    body = json.dumps(
        {
            "format": FORMAT_VERSION,
            "length": length,
            "metadata": metadata,
            "entries": {name: {"ranges": ranges[name], "sha256": digests[name]} for name in ranges},
            "lists_of_one": lists_of_one,
        }
    ).encode()
    file.seek(length)
    file.write(body + _TAIL.pack(hashlib.sha256(body).digest(), len(body), _MAGIC))


def verify(path: Path) -> Manifest:
    """Compare every byte of a file with its manifest; nothing but the trailer is parsed.

    Raises
    ------
    IntegrityError
        When the file is truncated or damaged (the message names the damaged entries), has no manifest, or one of a
        newer format.
    """
    with open(path, "rb") as file:
        total = file.seek(0, os.SEEK_END)
        file.seek(max(total - _TAIL.size, 0))
        tail = file.read()
        if len(tail) < _TAIL.size or not tail.endswith(_MAGIC):
            file.seek(0)
            start = file.read(len(_HDF5_SIGNATURE))
            reason = "truncated, or " if start == _HDF5_SIGNATURE[: len(start)] else ""
            raise IntegrityError(f"{path}: {reason}not written by pyrodyn.save (no manifest at its end). {_REMEDY}")
        digest, size, _ = _TAIL.unpack(tail)
        length = total - _TAIL.size - size
        body = b""
        if length >= 0:
            file.seek(length)
            body = file.read(size)
        if hashlib.sha256(body).digest() != digest:
            raise IntegrityError(f"{path}: damaged entry: manifest. {_REMEDY}")
        manifest = _parsed(body, path)
        if manifest.length != length:
            raise IntegrityError(f"{path}: truncated: {length} bytes of data, expected {manifest.length}. {_REMEDY}")
        digests, metadata = _digests(file, length, {name: entry.ranges for name, entry in manifest.entries.items()})
    damaged = [name for name, entry in manifest.entries.items() if digests[name] != entry.sha256]
    if metadata != manifest.metadata:
        damaged.append("metadata")
    if damaged:
        raise IntegrityError(f"{path}: damaged entry: {', '.join(damaged)}. {_REMEDY}")
    return manifest


def _parsed(body: bytes, path: Path) -> Manifest:
    try:
        raw = json.loads(body)
        version = int(raw["format"])
        if version > FORMAT_VERSION:
            raise IntegrityError(
                f"{path}: written in format {version}, this pyrodyn reads up to format {FORMAT_VERSION}; update it."
            )
        entries = {
            name: Entry(tuple((int(start), int(size)) for start, size in held["ranges"]), str(held["sha256"]))
            for name, held in raw["entries"].items()
        }
        lists_of_one = tuple((str(owner), str(name)) for owner, name in raw["lists_of_one"])
        manifest = Manifest(int(raw["length"]), str(raw["metadata"]), entries, lists_of_one)
        # Disjoint and inside the file, so that a made-up manifest cannot ask for a byte twice or for one beyond it.
        end = 0
        for start, size in sorted(piece for entry in entries.values() for piece in entry.ranges):
            if start < end or size <= 0 or start + size > manifest.length:
                raise ValueError("its ranges overlap or leave the file")
            end = start + size
    except IntegrityError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as cause:
        raise IntegrityError(f"{path}: damaged entry: manifest ({type(cause).__name__}: {cause}). {_REMEDY}") from cause
    return manifest


def _stored_ranges(path: str) -> dict[str, Ranges]:
    """The byte ranges of every dataset that has any."""
    ranges: dict[str, Ranges] = {}

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        found: list[tuple[int, int]] = []
        if item.chunks is not None:
            item.id.chunk_iter(lambda chunk: found.append((chunk.byte_offset, chunk.size)))
        elif item.id.get_offset() is not None:
            found.append((item.id.get_offset(), item.id.get_storage_size()))
        if found:
            ranges[name] = tuple(sorted(found))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return ranges


def _digests(file: BinaryIO, length: int, ranges: Mapping[str, Ranges]) -> tuple[dict[str, str], str]:
    """One pass over the first `length` bytes: the sha256 of each entry, and that of all that lies between them."""
    entries = {name: hashlib.sha256() for name in ranges}
    metadata = hashlib.sha256()
    file.seek(0)
    position = 0
    for start, size, name in sorted((start, size, name) for name, found in ranges.items() for start, size in found):
        _feed(file, start - position, metadata)
        _feed(file, size, entries[name])
        position = start + size
    _feed(file, length - position, metadata)
    return {name: digest.hexdigest() for name, digest in entries.items()}, metadata.hexdigest()


def _feed(file: BinaryIO, size: int, digest: Any) -> None:
    while size > 0:
        block = file.read(min(size, _BLOCK))
        if not block:
            raise OSError("the file shrank while it was read")
        digest.update(block)
        size -= len(block)
