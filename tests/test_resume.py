"""A run that stops at any moment goes on from its checkpoint and ends with the same draws to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo

import pyrodyn as dyn
from pyrodyn import guides, inference
from pyrodyn.checkpoint import Checkpoint, StateStore
from pyrodyn.errors import CheckpointError, IntegrityError
from pyrodyn.inference.engine import Draws

ROW = zoo.row("LDS-Gaussian")
# Of engines that do not take every model.
ROWS = {
    "Gibbs": zoo.row("MultiRegionLDS-Poisson-inputs-one-edge"),
    "SVI-amortised": zoo.row("LFADS-Poisson-controller-inputs-missing"),
    "NaturalGradient": zoo.row("NeuralSDE-Poisson-MLP-ragged"),
}
ENGINES = {
    "Gibbs": inference.Gibbs(draws=4, warmup=10, chains=2),
    "SVI": inference.SVI(steps=60, draws=20, particles=2),
    "SVI-structured": inference.SVI(
        steps=8, draws=20, particles=1, guide=guides.Structured(globals=guides.MeanField())
    ),
    "SVI-amortised": inference.SVI(
        steps=12,
        draws=20,
        particles=1,
        guide=guides.Amortised(hidden_dim=3),
        training=inference.Training(
            batch=1, clip=2.0, dropout=0.3, latent_warm_up=3, stopping=inference.EarlyStopping(share=0.34, every=2)
        ),
    ),
    "Laplace": inference.Laplace(draws=20, max_steps=20),
    "NaturalGradient": inference.NaturalGradient(rounds=3, draws=20, rest=2),
    "SGLD": inference.SGLD(draws=4, thin=2, warmup=12, chains=2, batch=1),
    "HMC": inference.HMC(draws=4, warmup=20, chains=4, superchains=2),
    "HMC-path": inference.HMC(draws=2, warmup=5, chains=4, superchains=2, collapse=False, dense_mass=False),
    "NUTS": inference.NUTS(draws=3, warmup=22, chains=2, max_tree_depth=2),
    "NUTS-diagonal": inference.NUTS(draws=2, warmup=5, chains=1, max_tree_depth=2, dense_mass=False),
    "NUTS-path": inference.NUTS(draws=3, warmup=3, chains=2, max_tree_depth=2, collapse=False),
}
# How many states are written before the run is killed; the last of these writes is the one that is kept.
KILLS = {
    # Before and after the reference is averaged and the curvature learned, and among the draws.
    "Gibbs": (1, 3, 6, 9, 12),
    "SVI": (1, 50, 59),
    "SVI-structured": (5,),
    "SVI-amortised": (1, 5, 11),
    "Laplace": (1, 2),
    "NaturalGradient": (2,),
    # In the climb, while the preconditioner is learned, at the end of the warm-up, among the draws.
    "SGLD": (1, 5, 9, 12, 15),
    # Before, at and after a new mass matrix, at the end of the warm-up, among the draws.
    "HMC": (1, 7, 8, 9, 19, 20, 21, 23),
    "HMC-path": (2, 6),
    # In the adaptation of the step, at the end of a window of the mass matrix and inside it, at the end of the warm-up,
    # among the draws, between the chains, and in the second chain.
    "NUTS": (1, 9, 20, 21, 22, 23, 25, 26, 49),
    "NUTS-diagonal": (4, 6),
    "NUTS-path": (2, 6, 10),
}


class Killed(Exception):
    """Stands for a SIGKILL: nothing may catch it."""


class Fragile:
    """A checkpoint that is always due, and kills the run once it has written ``lives`` states."""

    def __init__(self, store: StateStore, lives: list[int]) -> None:
        self.store, self.lives = store, lives

    def read(self):
        return self.store.read()

    def due(self) -> bool:
        return True

    def write(self, state) -> None:
        self.store.write(state)
        self.lives[0] -= 1
        if self.lives[0] == 0:
            raise Killed

    def scope(self, prefix: str) -> StateStore:
        return Fragile(self.store.scope(prefix), self.lives)


def run(engine: str, store: StateStore | None = None) -> Draws:
    row = ROWS.get(engine, ROW)
    return ENGINES[engine].run(row.model, row.recording, seed=4, checkpoint=store)


@pytest.fixture(scope="module")
def uninterrupted() -> Callable[[str], Draws]:
    known: dict[str, Draws] = {}

    def draws(engine: str) -> Draws:
        if engine not in known:
            known[engine] = run(engine)
        return known[engine]

    return draws


def assert_same_bits(found: Draws, expected: Draws) -> None:
    assert found.samples.keys() == expected.samples.keys() and found.stats.keys() == expected.stats.keys()
    for name, value in [*found.samples.items(), *found.stats.items()]:
        assert torch.equal(value, {**expected.samples, **expected.stats}[name]), name
    assert found.local.keys() == expected.local.keys()
    assert all(torch.equal(found.local[name], expected.local[name]) for name in expected.local)
    for name, trace in found.history.items():
        assert np.array_equal(trace, expected.history[name], equal_nan=True), name
    assert found.notes == expected.notes and found.warnings == expected.warnings


def killed_after(engine: str, path: Path, writes: int) -> None:
    with pytest.raises(Killed):
        run(engine, Fragile(Checkpoint(path, fingerprint="{}", every=0), [writes]))


@pytest.mark.parametrize(("engine", "writes"), [(engine, n) for engine, kills in KILLS.items() for n in kills])
def test_a_killed_run_resumes_to_the_same_bits(engine, writes, tmp_path, uninterrupted):
    path = tmp_path / "run.ckpt"
    killed_after(engine, path, writes)
    torch.manual_seed(99)  # another process would have another state
    assert_same_bits(run(engine, Checkpoint(path, fingerprint="{}", every=0)), uninterrupted(engine))


@pytest.mark.parametrize("engine", ["SVI", "NUTS"])
def test_a_run_killed_again_and_again_resumes_to_the_same_bits(engine, tmp_path, uninterrupted):
    path = tmp_path / "run.ckpt"
    for _ in range(3):
        killed_after(engine, path, 11)
    assert_same_bits(run(engine, Checkpoint(path, fingerprint="{}", every=0)), uninterrupted(engine))


@pytest.mark.parametrize("engine", ["SVI", "Laplace", "NUTS"])
def test_writing_checkpoints_changes_nothing_and_a_finished_one_is_read_back(engine, tmp_path, uninterrupted):
    path = tmp_path / "run.ckpt"
    store = Checkpoint(path, fingerprint="{}", every=0)
    assert_same_bits(run(engine, store), uninterrupted(engine))
    assert_same_bits(run(engine, Checkpoint(path, fingerprint="{}", every=0)), uninterrupted(engine))


@pytest.mark.parametrize("writes", [20, 53])
def test_a_failed_step_after_the_resume_falls_back_to_the_same_state(writes, tmp_path, monkeypatch):
    """The state that a failed step returns to is older than the checkpoint, and has to be in it."""
    from pyrodyn.inference import svi

    original = svi._Run._advance

    def advance(self):
        if self.step == 57 and self.damping == 1.0:
            return False
        return original(self)

    monkeypatch.setattr(svi._Run, "_advance", advance)
    expected = run("SVI")
    path = tmp_path / "run.ckpt"
    killed_after("SVI", path, writes)
    assert_same_bits(run("SVI", Checkpoint(path, fingerprint="{}", every=0)), expected)


# ---------------------------------------------------------------------------------------------- through fit


def fit(path: Path, *, seed: int = 4, engine=None, row=ROW):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        return dyn.fit(row.model, row.recording, engine or ENGINES["NUTS-path"], seed=seed, checkpoint=path)


def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path):
    path = tmp_path / "run.ckpt"
    fit(path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="another run: seed is 4 there and 5 here"):
        fit(path, seed=5)
    with pytest.raises(CheckpointError, match="engine is .*there and .*here"):
        fit(path, engine=inference.Laplace(draws=20))
    with pytest.raises(CheckpointError, match="recording is .*there and .*here"):
        fit(path, row=zoo.row("LDS-Gaussian-inputs-missing"))
    with pytest.raises(CheckpointError, match="model is .*there and .*here"):
        dyn.fit(
            zoo.models.LDS(1, zoo.readouts.Gaussian()), ROW.recording, ENGINES["NUTS-path"], seed=4, checkpoint=path
        )
    assert path.read_bytes() == before


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    fit(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match="run.ckpt.*damaged"):
        fit(path)


SCRIPT = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import pyrodyn as dyn, test_resume
row = test_resume.ROW
tree = dyn.fit(row.model, row.recording, test_resume.LONGER, seed=4, checkpoint=sys.argv[2], checkpoint_every=0.0)
dyn.save(tree, sys.argv[3])
"""
LONGER = inference.NUTS(draws=20, warmup=20, chains=2, max_tree_depth=3)


def test_a_process_killed_by_the_system_resumes_in_another(tmp_path):
    checkpoint = tmp_path / "run.ckpt"

    def start(result: str) -> subprocess.Popen:
        arguments = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(checkpoint), str(tmp_path / result)]
        return subprocess.Popen(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"})

    process = start("never.nc")
    deadline = time.monotonic() + 120.0
    while not checkpoint.exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL, "the run was over before it could be killed: make it longer"
    assert not (tmp_path / "never.nc").exists()
    assert start("resumed.nc").wait(240) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        expected = dyn.fit(ROW.model, ROW.recording, LONGER, seed=4)
    resumed = dyn.load(tmp_path / "resumed.nc")
    for group in ("posterior", "invariants", "latents", "log_likelihood", "sample_stats"):
        assert resumed[group].identical(expected[group]), group
