"""Fixtures for every test: the place of the real recordings, and a guard on global state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

# Pictures are drawn without a screen.
os.environ.setdefault("MPLBACKEND", "Agg")
# The tests' tensors are small: a second thread costs more than it brings, and the order of sums would depend on it.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real recordings: $PYRODYN_DATA, or shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PYRODYN_DATA", beside))
    if not folder.is_dir():
        pytest.fail(
            f"no recordings in {folder}: set PYRODYN_DATA to the folder that holds datahigh_reach and the others"
        )
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Global random streams start alike in every test, whichever tests ran before it in the same process."""
    pyro.set_rng_seed(0)


@pytest.fixture(autouse=True)
def global_state_untouched() -> Iterator[None]:
    """Fail a test that leaves parameters in Pyro's global store, or another default dtype, to the tests after it."""
    dtype = torch.get_default_dtype()
    yield
    stored, found = sorted(pyro.get_param_store().keys()), torch.get_default_dtype()
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    assert not stored, f"the test left parameters in Pyro's global store: {stored}"
    assert found == dtype, f"the test changed torch's default dtype from {dtype} to {found}"
