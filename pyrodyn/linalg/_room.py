"""Large arrays in memory that earlier ones left behind.

Pages touched for the first time are zeroed by the operating system, which can take longer than all arithmetic on them.
What is freed is handed back to it, so that every call would pay again.
"""

from __future__ import annotations

import math
import weakref

import numpy as np

SMALL = 1 << 16  # bytes below which memory is not handed back to the system anyway
KEPT = 1 << 27  # bytes that wait at most

_waiting: dict[int, list[np.ndarray]] = {}  # by their number of bytes, powers of two


def room(shape: tuple[int, ...]) -> np.ndarray:
    """An array of float64 to be filled. Its memory waits for the next one when no array refers to it any more."""
    count = math.prod(shape)
    if not SMALL <= 8 * count <= KEPT:
        return np.empty(shape)
    size = 1 << (8 * count - 1).bit_length()
    try:
        memory = _waiting[size].pop()
    except (KeyError, IndexError):
        memory = np.empty(size, np.uint8)
    # Views refer to the last array on the way to their memory that is not itself a view of an array: to this one.
    owner = np.frombuffer(memory.data, np.float64, count)
    weakref.finalize(owner, _keep, memory).atexit = False
    return owner.reshape(shape)


def _keep(memory: np.ndarray) -> None:
    if memory.nbytes + sum(size * len(left) for size, left in list(_waiting.items())) <= KEPT:
        _waiting.setdefault(memory.nbytes, []).append(memory)
