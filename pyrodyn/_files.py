"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_SUFFIX = ".partial"


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> Path:
    """Write a file so that a crash at any moment leaves either the old content or the new, never a mixture.

    `write` fills a new file in the same folder, which is flushed to the disk and then renamed over `path`. If `write`
    fails, the new file is removed and the old one stands. A symbolic link is followed: its target is replaced.

    Parameters
    ----------
    path
        The file to make or to replace. Its folder must exist.
    write
        Gets the new file, open for reading and writing in binary; its `name` is its path.

    Returns
    -------
    pathlib.Path
        `path`.

    Raises
    ------
    FileNotFoundError
        When the folder does not exist.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {target.parent} does not exist; make it first.")
    # The random part keeps two writers of one path apart: the last to finish wins, and both files are whole.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}{_SUFFIX}")
    try:
        with open(partial, "x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)
    return Path(path)


def remove_partial(path: str | os.PathLike[str]) -> None:
    """Remove what killed writers of `path` left behind. Only for a path that has one writer."""
    target = Path(os.path.realpath(path))
    prefix = f".{target.name}."
    if target.parent.is_dir():
        for entry in target.parent.iterdir():
            if entry.name.startswith(prefix) and entry.name.endswith(_SUFFIX):
                entry.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    # The rename itself is durable only once the folder is; Windows has no handle on a folder to flush.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
