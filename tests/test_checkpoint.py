"""A checkpoint gives back the last state that was written, whatever happened in between, or says why not."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
import torch

from pyrodyn import checkpoint as module
from pyrodyn.checkpoint import Checkpoint, pack_rng, unpack_rng
from pyrodyn.errors import CheckpointError, IntegrityError

FINGERPRINT = json.dumps({"model": "LDS", "seed": 0, "data": "ab12"})


def state(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "draws": rng.normal(size=(10, 3)),
        "step size": np.array(0.1, dtype=np.float32),
        "accepted": rng.random(10) < 0.8,
        "warm-up/step": np.array(7),
        "file": np.zeros((0, 2)),
        "names": np.array(["a", "é"]),
        "rng": pack_rng(torch.Generator().manual_seed(seed)),
    }


def assert_same(got: dict[str, np.ndarray] | None, expected: dict[str, np.ndarray]) -> None:
    assert got is not None
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape)
        assert got[key].tobytes() == value.tobytes()


def made(path, seed: int = 0) -> Checkpoint:
    checkpoint = Checkpoint(path, fingerprint=FINGERPRINT)
    checkpoint.write(state(seed))
    return checkpoint


def test_the_last_state_comes_back(tmp_path):
    path = tmp_path / "run.ckpt"
    first = Checkpoint(path, fingerprint=FINGERPRINT)
    assert first.read() is None
    for seed in range(3):
        first.write(state(seed))
        assert_same(Checkpoint(path, fingerprint=FINGERPRINT).read(), state(seed))
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.ckpt"]
    first.remove()
    assert list(tmp_path.iterdir()) == []
    assert first.read() is None
    first.remove()
    first.write({})
    assert Checkpoint(path, fingerprint=FINGERPRINT).read() == {}


def test_a_generator_goes_on_where_it_stood(tmp_path):
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, generator=generator)
    checkpoint = Checkpoint(tmp_path / "run.ckpt", fingerprint=FINGERPRINT)
    checkpoint.write({"rng": pack_rng(generator)})
    expected = torch.randn(7, generator=generator)
    resumed = torch.Generator()
    held = checkpoint.read()
    assert held is not None
    unpack_rng(held["rng"], resumed)
    assert torch.equal(torch.randn(7, generator=resumed), expected)


def test_due_follows_the_clock(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    checkpoint = Checkpoint(tmp_path / "run.ckpt", fingerprint=FINGERPRINT, every=10.0)
    scope = checkpoint.scope("chain0")
    for at, write, due in [(100, False, False), (109.9, False, False), (110, True, True), (119, False, False)]:
        now[0] = float(at)
        assert (checkpoint.due(), scope.due()) == (due, due)
        if write:
            scope.write(state())
    now[0] = 125.0
    assert checkpoint.due()
    assert Checkpoint(tmp_path / "b", fingerprint="", every=0.0).due()
    for every in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="every: got"):
            Checkpoint(tmp_path / "b", fingerprint="", every=every)


def test_scopes_keep_their_states_apart(tmp_path):
    path = tmp_path / "run.ckpt"
    checkpoint = Checkpoint(path, fingerprint=FINGERPRINT)
    one, ten = checkpoint.scope("chain1"), checkpoint.scope("chain10")
    assert one.read() is None
    one.write(state(1))
    ten.write(state(10))
    ten.scope("pilot").write({"x": np.ones(2)})
    one.write({"done": np.array(True)})
    resumed = Checkpoint(path, fingerprint=FINGERPRINT)
    assert_same(resumed.scope("chain1").read(), {"done": np.array(True)})
    assert_same(resumed.scope("chain10").read(), state(10) | {"pilot/x": np.ones(2)})
    assert resumed.scope("chain").read() is None
    # A run that writes before it reads must not lose what the others wrote.
    Checkpoint(path, fingerprint=FINGERPRINT).scope("chain2").write(state(2))
    whole = Checkpoint(path, fingerprint=FINGERPRINT).read()
    assert whole is not None
    assert {key.split("/")[0] for key in whole} == {"chain1", "chain10", "chain2"}
    for prefix in ("", "chain/"):
        with pytest.raises(ValueError, match="prefix: got"):
            checkpoint.scope(prefix)


def test_arrays_that_are_filled_further_do_not_reach_the_checkpoint(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run.ckpt", fingerprint=FINGERPRINT)
    buffer = np.zeros(3)
    checkpoint.scope("a").write({"draws": buffer})
    buffer[:] = 1
    checkpoint.scope("b").write({"draws": buffer})
    held = checkpoint.scope("a").read()
    assert held is not None
    held["draws"][:] = 2
    checkpoint.scope("b").write({"draws": buffer})
    again = Checkpoint(tmp_path / "run.ckpt", fingerprint=FINGERPRINT).read()
    assert again is not None
    assert (again["a/draws"].tolist(), again["b/draws"].tolist()) == ([0, 0, 0], [1, 1, 1])


def test_another_run_is_neither_read_nor_overwritten(tmp_path):
    path = tmp_path / "run.ckpt"
    made(path)
    before = path.read_bytes()
    other = json.dumps({"model": "LDS", "seed": 1, "device": "cpu"})
    message = 'belongs to another run: data is "ab12" there and nothing here; device is nothing there and "cpu" here; '
    message += "seed is 0 there and 1 here. Give another path, or delete"
    for act in (Checkpoint.read, lambda c: c.write(state()), lambda c: c.scope("a").write(state())):
        with pytest.raises(CheckpointError, match=message):
            act(Checkpoint(path, fingerprint=other))
    with pytest.raises(CheckpointError, match="that of this run is no json"):
        Checkpoint(path, fingerprint="no json").read()
    with pytest.raises(CheckpointError, match="spelled differently"):
        Checkpoint(path, fingerprint=FINGERPRINT + " ").read()
    assert path.read_bytes() == before


def test_only_plain_arrays_are_taken(tmp_path):
    checkpoint = made(tmp_path / "run.ckpt")
    for value, got in [(1.0, "float"), ([1], "list"), (np.array([None]), "object"), (torch.ones(2), "Tensor")]:
        with pytest.raises(TypeError, match=rf"state\['x'\]: got .*{got}"):
            checkpoint.write({"x": value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="state: got the key 1"):
        checkpoint.write({1: np.ones(1)})  # pyright: ignore[reportArgumentType]
    assert_same(checkpoint.read(), state())


def test_damage_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    made(path)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    mutants = [content[:length] for length in (0, 7, 8, 43, 44, 100, len(content) - 1)] + [content + b"\0"]
    mutants += [content[:length] for length in random.integers(len(content), size=50)]
    for offset in [*range(50), *random.integers(len(content), size=250).tolist()]:
        mutant = bytearray(content)
        mutant[offset] ^= 1 << int(random.integers(8))
        mutants.append(bytes(mutant))
    for mutant in mutants:
        path.write_bytes(mutant)
        checkpoint = Checkpoint(path, fingerprint=FINGERPRINT)
        with pytest.raises(IntegrityError, match="run.ckpt.*Delete it"):
            checkpoint.read()
        with pytest.raises(IntegrityError):
            checkpoint.write(state())


def signed(body: bytes, version: int = 1) -> bytes:
    rest = struct.pack("<I", version) + body
    return b"\x89pyrockp" + hashlib.sha256(rest).digest() + rest


def archive(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return held.getvalue()


def test_files_made_by_hand_are_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    objects, good = io.BytesIO(), io.BytesIO()
    np.save(objects, np.array([print], dtype=object), allow_pickle=True)
    np.save(good, np.frombuffer(FINGERPRINT.encode(), dtype=np.uint8))
    lying = good.getvalue().replace(b"(%d,)" % len(FINGERPRINT), b"(10000000000000,)")[: len(good.getvalue())]
    bodies = [b"", b"hello", good.getvalue(), archive(), archive(fingerprint=b"x"), archive(fingerprint=lying)]
    bodies += [archive(fingerprint=good.getvalue(), x=objects.getvalue())]
    bodies += [archive(zipfile.ZIP_DEFLATED, fingerprint=good.getvalue())]
    for body in bodies:
        path.write_bytes(signed(body))
        with pytest.raises(IntegrityError, match="not a checkpoint"):
            Checkpoint(path, fingerprint=FINGERPRINT).read()
    path.write_bytes(signed(archive(fingerprint=good.getvalue())))
    assert Checkpoint(path, fingerprint=FINGERPRINT).read() == {}  # the route itself makes files that are read
    path.write_bytes(signed(b"", version=9))
    with pytest.raises(IntegrityError, match="format 9.*format 1"):
        Checkpoint(path, fingerprint=FINGERPRINT).read()


def test_a_failed_write_leaves_the_previous_state(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    checkpoint = made(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            checkpoint.write(state(1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.ckpt"]
    assert_same(Checkpoint(path, fingerprint=FINGERPRINT).read(), state())


def test_kills_lose_nothing_and_leave_nothing(tmp_path):
    """A counter that is written without pause, killed and resumed, never goes back behind what was on the disk."""
    program = """
        import os, signal, sys, time
        import numpy as np
        from pyrodyn.checkpoint import Checkpoint

        path = sys.argv[1]
        folder, cut = os.path.dirname(path), 0

        def count(pipe):
            checkpoint = Checkpoint(path, fingerprint="{}")
            chain = checkpoint.scope("chain0")
            held = chain.read()
            number = 0 if held is None else int(held["number"])
            assert held is None or (held["draws"] == number).all()
            while True:
                number += 1
                chain.write({"number": np.array(number), "draws": np.full(100_000, number)})
                os.write(pipe, number.to_bytes(8, "little"))

        reached = 0
        for kill in range(40):
            if kill >= 8 and cut:
                break
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(read)
                count(write)
            os.close(write)
            first = os.read(read, 8)  # one state is on the disk
            time.sleep(0.01 + 0.007 * (kill % 8))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with os.fdopen(read, "rb") as pipe:
                told = int.from_bytes((first + pipe.read())[-8:], "little")
            cut += any(name.endswith(".partial") for name in os.listdir(folder))
            held = Checkpoint(path, fingerprint="{}").scope("chain0").read()
            number = int(held["number"])
            assert number in (told, told + 1) and number > reached, (number, told, reached)
            assert (held["draws"] == number).all()
            reached = number
        assert os.listdir(folder) == [os.path.basename(path)]
        print(reached, cut)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "run.ckpt")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    reached, cut = map(int, done.stdout.split())
    # Otherwise no run went on from the one before, or no write was cut.
    assert reached >= 8
    assert cut > 0
