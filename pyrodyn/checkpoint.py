"""Checkpoints of a running fit: a run killed at any moment resumes from the last one.

The file is a header and an uncompressed npz::

    magic, 8 bytes | sha256 of the rest | format version, uint32 | npz
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pyrodyn._files import remove_partial, write_atomically
from pyrodyn.errors import CheckpointError, IntegrityError

FORMAT_VERSION = 1

_MAGIC = b"\x89pyrockp"
_HEADER = struct.Struct("<8s32sI")
_FINGERPRINT = "fingerprint"
_STATE = "state/"


class StateStore(Protocol):
    """What a sampler sees of a checkpoint: the whole of it, or its own part."""

    def read(self) -> dict[str, np.ndarray] | None:
        """The state as it was last written, or None when there is none."""
        ...

    def write(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace the state."""
        ...

    def due(self) -> bool:
        """Whether it is time to write."""
        ...

    def scope(self, prefix: str) -> StateStore:
        """A part with keys of its own."""
        ...


class Checkpoint:
    """The state of one running fit, in one file that is always whole.

    Parameters
    ----------
    path
        The file. Only one run may use it at a time. Its folder must exist when the first state is written.
    fingerprint
        What makes the run this one (model, engine, seed, digest of the data), as a JSON object. A checkpoint whose
        fingerprint differs is neither read nor overwritten.
    every
        Seconds between two writes, for `due`.
    """

    def __init__(self, path: str | os.PathLike[str], *, fingerprint: str, every: float = 10.0) -> None:
        if not (math.isfinite(every) and every >= 0):
            raise ValueError(f"every: got {every}, expected a number of seconds of at least 0.")
        self.path = Path(path)
        self.fingerprint = fingerprint
        self.every = every
        # What stands in the file, once that is known. Scopes write their own part and keep the rest.
        self._state: dict[str, np.ndarray] | None = None
        self._known = False
        self._last = time.monotonic()

    def read(self) -> dict[str, np.ndarray] | None:
        """Read the state.

        Returns
        -------
        dict of numpy.ndarray, or None
            None when there is no checkpoint.

        Raises
        ------
        CheckpointError
            When the checkpoint belongs to another run; the message names what differs.
        IntegrityError
            When the file is damaged, truncated, no checkpoint, or of a newer format.
        """
        remove_partial(self.path)
        self._state = self._from_file()
        self._known = True
        return None if self._state is None else _copied(self._state)

    def write(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace the state; until the new one is on the disk, the file holds the previous one.

        Parameters
        ----------
        state
            Arrays of numbers, booleans or strings by name.

        Raises
        ------
        TypeError
            When a value is not an array, or is one of Python objects.
        CheckpointError
            When the file belongs to another run.
        IntegrityError
            When the file that stands there is damaged or is no checkpoint.
        """
        _check_state(state)
        if not self._known:
            self.read()
        held = io.BytesIO()
        arrays = {_FINGERPRINT: np.frombuffer(self.fingerprint.encode(), dtype=np.uint8)}
        np.savez(held, allow_pickle=False, **arrays, **{_STATE + key: value for key, value in state.items()})
        body = struct.pack("<I", FORMAT_VERSION) + held.getvalue()
        write_atomically(self.path, lambda file: _write_all(file, _MAGIC, hashlib.sha256(body).digest(), body))
        # Copies: the caller goes on filling its arrays, and a scope writes these again later.
        self._state = _copied(state)
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether `every` seconds have passed since the last write, or since the start."""
        return time.monotonic() - self._last >= self.every

    def remove(self) -> None:
        """Delete the file, when the run is complete."""
        self.path.unlink(missing_ok=True)
        remove_partial(self.path)
        self._state = None

    def scope(self, prefix: str) -> StateStore:
        """A view whose keys stand under `prefix` in this file.

        Parameters
        ----------
        prefix
            Its name, for example "chain0". Writing to one scope keeps the state of all others.
        """
        return _Scope(self, prefix)

    def _from_file(self) -> dict[str, np.ndarray] | None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        fingerprint, state = _parsed(content, self.path)
        if fingerprint != self.fingerprint:
            raise CheckpointError(
                f"{self.path}: this checkpoint belongs to another run: {_difference(fingerprint, self.fingerprint)}. "
                "Give another path, or delete the file to start afresh."
            )
        return state

    def _part(self, prefix: str) -> dict[str, np.ndarray] | None:
        if not self._known:
            self.read()
        part = {k.removeprefix(prefix): v for k, v in (self._state or {}).items() if k.startswith(prefix)}
        return _copied(part) if part else None

    def _replace_part(self, prefix: str, part: Mapping[str, np.ndarray]) -> None:
        if not self._known:
            self.read()
        rest = {k: v for k, v in (self._state or {}).items() if not k.startswith(prefix)}
        self.write(rest | {prefix + k: v for k, v in part.items()})


class _Scope:
    """A part of a checkpoint; see `Checkpoint.scope`."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        if not prefix or prefix.endswith("/"):
            raise ValueError(f"prefix: got {prefix!r}, expected a name, for example 'chain0'.")
        self._checkpoint = checkpoint
        self._prefix = prefix + "/"

    def read(self) -> dict[str, np.ndarray] | None:
        return self._checkpoint._part(self._prefix)

    def write(self, state: Mapping[str, np.ndarray]) -> None:
        self._checkpoint._replace_part(self._prefix, state)

    def due(self) -> bool:
        return self._checkpoint.due()

    def scope(self, prefix: str) -> StateStore:
        return _Scope(self._checkpoint, self._prefix + prefix)


def pack_rng(generator: torch.Generator) -> np.ndarray:
    """The state of a random generator as an array for a checkpoint.

    Parameters
    ----------
    generator
        For example `torch.default_generator`, from which Pyro draws.

    Returns
    -------
    numpy.ndarray
        Bytes, dtype uint8.
    """
    return generator.get_state().cpu().numpy().copy()


def unpack_rng(packed: np.ndarray, generator: torch.Generator) -> None:
    """Bring a generator of the same kind into the state that `pack_rng` gave."""
    generator.set_state(torch.from_numpy(np.array(packed, dtype=np.uint8)))


def _check_state(state: Mapping[str, np.ndarray]) -> None:
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(f"state: got the key {key!r} ({type(key).__name__}), expected a string.")
        if not isinstance(value, np.ndarray) or value.dtype.hasobject:
            got = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise TypeError(f"state[{key!r}]: got {got}, expected a numpy array of numbers, booleans or strings.")


def _copied(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value.copy() for key, value in state.items()}


def _write_all(file: Any, *parts: bytes) -> None:
    for part in parts:
        file.write(part)


def _parsed(content: bytes, path: Path) -> tuple[str, dict[str, np.ndarray]]:
    remedy = "Delete it to start afresh."
    if len(content) < _HEADER.size or not content.startswith(_MAGIC):
        raise IntegrityError(f"{path}: truncated, or not a checkpoint of pyrodyn. {remedy}")
    _, digest, version = _HEADER.unpack_from(content)
    if hashlib.sha256(memoryview(content)[_HEADER.size - 4 :]).digest() != digest:
        raise IntegrityError(f"{path}: this checkpoint is damaged or truncated: its sha256 does not match. {remedy}")
    if version != FORMAT_VERSION:
        raise IntegrityError(
            f"{path}: a checkpoint in format {version}; this pyrodyn reads format {FORMAT_VERSION}. Resume it with the "
            f"pyrodyn that wrote it. {remedy}"
        )
    try:
        with np.load(io.BytesIO(content[_HEADER.size :]), allow_pickle=False) as held:
            if any(member.compress_type != zipfile.ZIP_STORED for member in held.zip.infolist()):
                raise ValueError("it is compressed")  # and so could unfold to any size
            arrays = {key: held[key] for key in held.files}
        if not all(isinstance(value, np.ndarray) for value in arrays.values()):
            raise ValueError("it holds something else than arrays")
        fingerprint = arrays.pop(_FINGERPRINT).tobytes().decode()
    except Exception as cause:  # the digest is right, so this file was made by hand: whatever breaks, it is refused
        raise IntegrityError(f"{path}: not a checkpoint of pyrodyn ({cause}). {remedy}") from cause
    return fingerprint, {key.removeprefix(_STATE): value for key, value in arrays.items()}


def _difference(theirs: str, ours: str) -> str:
    """What differs between two fingerprints, entry by entry where both are JSON objects."""
    try:
        there, here = json.loads(theirs), json.loads(ours)
    except ValueError:
        there = here = None
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return f"its fingerprint is {theirs:.120}, that of this run is {ours:.120}"
    missing = "nothing"
    return (
        "; ".join(
            f"{key} is {json.dumps(there[key]) if key in there else missing:.120} there and "
            f"{json.dumps(here[key]) if key in here else missing:.120} here"
            for key in sorted(there.keys() | here.keys())
            if there.get(key, ...) != here.get(key, ...)
        )
        or "its fingerprint is spelled differently"
    )
