"""Kill running fits at random moments, resume them, and compare the draws with those of runs that were left alone.

Run `python benchmarks/kill_resume.py`. Every run is a process of its own and is ended by SIGKILL, again and again, at
random moments, one in each part of the time that the undisturbed run took; after the last kill it may finish. The
exit code is 1 unless every run ends with the same bytes, in all groups of the posterior, as the undisturbed one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import pyrodyn as dyn
from pyrodyn import guides, inference, models, readouts
from pyrodyn.checkpoint import Checkpoint

EVERY = 0.2  # seconds between two writes; runs of a few seconds would end before the default of ten
ENGINES = {
    "SVI": inference.SVI(steps=400),
    "SVI, structured guide": inference.SVI(steps=200, guide=guides.Structured()),
    "Laplace": inference.Laplace(),
    "HMC": inference.HMC(chains=16, draws=100, warmup=100),
    "NUTS": inference.NUTS(draws=30, warmup=20, max_tree_depth=4),
}


def problem(engine: str) -> tuple[models.LDS, dyn.Recording]:
    """A small recording for each engine, larger for Laplace, which is the fastest."""
    trials, units, dim = (20, 16, 2) if engine == "Laplace" else (4, 6, 2)
    like = dyn.Recording.from_arrays(
        np.zeros((trials, 40, units)), bin_width=0.02, center=np.zeros(units), scale=np.ones(units), counts=False
    )
    model = models.LDS(dim, readout=readouts.Gaussian())
    return model, dyn.simulate(model, like, seed=1)[0]


def digest(posterior) -> str:
    """sha256 over all numbers of all groups."""
    sha = hashlib.sha256()
    for node in sorted(posterior.subtree, key=lambda node: node.path):
        for name, variable in sorted(node.to_dataset(inherit=False).data_vars.items()):
            sha.update(f"{node.path}/{name}{variable.shape}{variable.dtype}".encode())
            sha.update(np.ascontiguousarray(variable.values).tobytes())
    return sha.hexdigest()


def run(engine: str, checkpoint: str) -> None:
    """The process that is killed: says when it starts, fits, prints the digest."""
    torch.set_num_threads(1)
    model, recording = problem(engine)
    print("started", flush=True)
    posterior = dyn.fit(
        model, recording, ENGINES[engine], seed=3, checkpoint=checkpoint or None, checkpoint_every=EVERY
    )
    print(digest(posterior), flush=True)


class Child:
    """A run in a fresh process, past its imports."""

    def __init__(self, engine: str, checkpoint: str) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--run", engine, checkpoint]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.output = self.process.stdout
        if self.output.readline() != "started\n":
            raise RuntimeError(f"{engine}: the process failed before it started to fit")
        self.began = time.perf_counter()

    def result(self) -> tuple[str, float]:
        line = self.output.read().strip()
        if self.process.wait() != 0:
            raise RuntimeError(f"a resumed run failed with exit code {self.process.returncode}")
        return line, time.perf_counter() - self.began

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL after so long; False if the run was faster."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            return True
        return False


def progress_of(path: Path) -> str:
    """What a checkpoint holds, in words."""
    if not path.exists():
        return "nothing yet"
    fingerprint = _fingerprint(path)
    state = Checkpoint(path, fingerprint=fingerprint).read() or {}
    if "now/step" in state:
        return f"step {int(state['now/step'][0])}"
    if "mode" in state:
        return "mode and curvature" if "hessian" in state else "mode"
    if "ensemble/count" in state:
        return f"transition {int(state['ensemble/count'])}"
    done = [int(value[0]) for key, value in sorted(state.items()) if key.endswith("/counts")]
    return "transitions " + ", ".join(map(str, done))


def _fingerprint(path: Path) -> str:
    """The fingerprint in a checkpoint, which is a header and an npz."""
    with path.open("rb") as file:
        file.seek(44)
        with np.load(file, allow_pickle=False) as held:
            return held["fingerprint"].tobytes().decode()


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill fits, resume them, compare the draws.")
    parser.add_argument("--kills", type=int, default=25, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--run", nargs=2, metavar=("ENGINE", "CHECKPOINT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(*options.run)
        return 0
    random = np.random.default_rng(options.seed)
    command = " ".join(["python", *sys.argv])
    lines = ["# Killed and resumed fits", "", f"Made by `{command}`.", ""]

    def say(text: str = "") -> None:
        print(text, flush=True)
        lines.append(text)

    say("| engine | undisturbed run | killed after | checkpoint held | draws after the last resume |")
    say("| --- | --- | --- | --- | --- |")
    kills = bad = 0
    shares = [len(part) for part in np.array_split(np.arange(options.kills), len(ENGINES))]
    with tempfile.TemporaryDirectory() as folder:
        for (engine, _), share in zip(ENGINES.items(), shares, strict=True):
            Child(engine, "").result()  # compiles what it needs; the next one takes as long as those that are killed
            expected, seconds = Child(engine, "").result()
            path = Path(folder) / f"{len(lines)}.checkpoint"
            parts = random.permutation(share)  # one kill in each part of the run, in any order
            moments, states = [], []
            while len(moments) < share:
                moment = seconds * float(parts[len(moments)] + random.uniform()) / share
                if not Child(engine, str(path)).kill_after(moment):
                    path.unlink()  # it was faster than the kill: begin a new run
                    continue
                moments.append(f"{moment:.1f} s")
                states.append(progress_of(path))
            found, _ = Child(engine, str(path)).result()
            kills += len(moments)
            bad += found != expected
            verdict = "identical" if found == expected else "DIFFERENT"
            say(f"| {engine} | {seconds:.1f} s | {', '.join(moments)} | {'; '.join(states)} | {verdict} |")
    say()
    say(
        f"{kills} kills, {len(ENGINES)} runs, a checkpoint every {EVERY} s: "
        + ("all resumed, all draws identical to the bit." if not bad else f"{bad} runs DIFFER.")
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    say(f"{used.ru_utime + used.ru_stime:.0f} s of processor time on one 2.8 GHz core, imports included.")
    if options.table is not None:
        options.table.write_text("\n".join(lines) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
