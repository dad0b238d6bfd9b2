"""Batch elements divided among threads, for functions that let go of the interpreter's lock."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

WORTH = 1 << 16  # numbers of the largest array that are worth another thread, which takes up to .1 ms to wake


def shared_out(run: Callable[..., None], arrays: Sequence[np.ndarray], common: Sequence[bool]) -> None:
    """Call ``run`` with the elements of all arrays but those in ``common``, in as many shares as torch has threads."""
    own = [array for array, whole in zip(arrays, common, strict=True) if not whole]
    count = len(own[0])
    shares = min(torch.get_num_threads(), count, max(array.size for array in own) // WORTH)
    if shares < 2:
        run(*arrays)
        return
    edges = np.linspace(0, count, shares + 1).astype(int).tolist()
    first, *others = (
        [array if whole else array[start:stop] for array, whole in zip(arrays, common, strict=True)]
        for start, stop in itertools.pairwise(edges)
    )
    running = [_pool(os.getpid(), shares).submit(run, *part) for part in others]
    run(*first)
    for other in running:
        other.result()


@functools.lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: those of the one that it was forked from do not come along."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix=f"pyrodyn-{process}")
