"""Damage stored posteriors and checkpoints in many ways, and count what reading them does.

Run `python benchmarks/fuzz_files.py --mutants 2000`. Each kind of damage gets that many mutants of a posterior and of a
checkpoint. A mutant must be refused with an IntegrityError, or read back equal to the original (a damage that changed
nothing). The exit code is 1 if one read back different, raised anything else, took more than ten seconds, or if a
changed byte of a variable was not blamed on that variable.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import xarray as xr

from pyrodyn.checkpoint import Checkpoint
from pyrodyn.errors import IntegrityError
from pyrodyn.storage import load, save

TOO_SLOW = 10.0  # seconds
Random = np.random.Generator


def flip_bit(content: bytearray, random: Random) -> None:
    content[random.integers(len(content))] ^= 1 << int(random.integers(8))


def set_byte(content: bytearray, random: Random) -> None:
    content[random.integers(len(content))] = int(random.integers(256))


def truncate(content: bytearray, random: Random) -> None:
    del content[random.integers(len(content)) :]


def zero_block(content: bytearray, random: Random) -> None:
    start = int(random.integers(len(content)))
    stop = min(len(content), start + int(random.integers(1, 4096)))
    content[start:stop] = bytes(stop - start)


def delete_block(content: bytearray, random: Random) -> None:
    start = int(random.integers(len(content)))
    del content[start : start + int(random.integers(1, 4096))]


def insert_block(content: bytearray, random: Random) -> None:
    start = int(random.integers(len(content) + 1))
    content[start:start] = random.bytes(int(random.integers(1, 4096)))


def copy_block(content: bytearray, random: Random) -> None:
    size = int(random.integers(1, 512))
    source, target = random.integers(len(content) - size, size=2).tolist()
    content[target : target + size] = content[source : source + size]


DAMAGES = (flip_bit, set_byte, truncate, zero_block, delete_block, insert_block, copy_block)


def make_posterior(random: Random) -> xr.DataTree:
    draws, unit = {"chain": [0, 1], "draw": np.arange(50)}, {"unit": [f"u{i}" for i in range(6)]}
    loading = (("chain", "draw", "unit", "latent"), random.normal(size=(2, 50, 6, 3)))
    sites = xr.Dataset({"loading": loading, "lp": (("chain", "draw"), random.normal(size=(2, 50)))}, {**draws, **unit})
    sites.attrs = {"engine": json.dumps({"name": "NUTS"}), "seed": 0}
    counts = (("trial", "time", "unit"), random.poisson(1.0, size=(5, 60, 6)))
    data = xr.Dataset({"counts": counts, "mask": ("trial", [True] * 4 + [False])}, unit)
    return xr.DataTree.from_dict({"posterior": sites, "observed_data": data, "sample_stats": xr.Dataset()})


def bytes_of_variables(path: Path) -> dict[int, str]:
    """Which variable each byte of the file belongs to, as HDF5 tells."""
    owner = {}
    with h5py.File(path) as file:
        for name in ("posterior/loading", "posterior/lp", "observed_data/counts"):
            chunk = file[name].id.get_chunk_info(0)
            owner |= dict.fromkeys(range(chunk.byte_offset, chunk.byte_offset + chunk.size), name)
    return owner


def try_mutant(path: Path, mutant: bytes, same: Callable[[], bool], blamed: set[str], counts: Counter[str]) -> float:
    """Read a mutant, count the outcome, and return the seconds it took."""
    path.write_bytes(mutant)
    start = time.perf_counter()
    try:
        outcome = "equal" if same() else "SILENT"
    except IntegrityError as refused:
        outcome = "refused"
        counts["UNNAMED"] += str(path) not in str(refused) or not all(name in str(refused) for name in blamed)
    except Exception as crash:
        outcome = "CRASHED"
        print(f"{type(crash).__name__}: {crash}", file=sys.stderr)
    counts[outcome] += 1
    seconds = time.perf_counter() - start
    counts["SLOW"] += seconds > TOO_SLOW
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage stored files and count what reading them does.")
    parser.add_argument("--mutants", type=int, default=2000, help="of each file by each kind of damage")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random = np.random.default_rng(options.seed)
    bad = Counter[str]()
    columns = ("refused", "equal", "SILENT", "CRASHED", "UNNAMED", "SLOW")
    print(f"{'file':<12}{'damage':<14}" + "".join(f"{c:>9}" for c in columns) + f"{'ms each':>9}{'ms worst':>10}")
    with tempfile.TemporaryDirectory() as folder:
        tree = make_posterior(random)
        state = {"draws": random.normal(size=(100, 20)), "step": np.array(3)}
        fit, run = save(tree, Path(folder) / "fit.nc"), Path(folder) / "run.ckpt"
        Checkpoint(run, fingerprint="{}").write(state)

        def same_state() -> bool:
            held = Checkpoint(run, fingerprint="{}").read()
            return held is not None and all(np.array_equal(held[k], state[k]) for k in held.keys() | state.keys())

        files = ((fit, lambda: load(fit).identical(tree), bytes_of_variables(fit)), (run, same_state, {}))
        for path, same, owner in files:
            content = path.read_bytes()
            assert same(), "the file as written must read back equal"
            for damage in DAMAGES:
                counts, seconds = Counter[str](), []
                for _ in range(options.mutants):
                    mutant = bytearray(content)
                    damage(mutant, random)
                    changed: set[str] = set()
                    if len(mutant) == len(content):
                        # Where the manifest itself is hit, nothing can be said of the variables.
                        places = np.flatnonzero(np.frombuffer(mutant, np.uint8) != np.frombuffer(content, np.uint8))
                        if owner and places.size and places[-1] <= max(owner):
                            changed = {owner[place] for place in places.tolist() if place in owner}
                    seconds.append(try_mutant(path, bytes(mutant), same, changed, counts))
                bad += counts
                print(
                    f"{path.name:<12}{damage.__name__:<14}"
                    + "".join(f"{counts[c]:>9}" for c in columns)
                    + f"{1e3 * np.mean(seconds):>9.2f}{1e3 * max(seconds):>10.1f}"
                )
    failed = sum(bad[c] for c in ("SILENT", "CRASHED", "UNNAMED", "SLOW"))
    print("every mutant was refused or equal" if not failed else f"{failed} failures")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
