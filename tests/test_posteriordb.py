"""Reference posteriors of posteriordb against HMC: a variance that follows its past, and modes summed out."""

import importlib
from pathlib import Path

import pytest

from pyrodyn import inference


@pytest.mark.parametrize("data", ["garch", "hmm_example"])
def test_means_and_spreads_are_those_of_reference_draws(data, data_dir, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    script = importlib.import_module("posteriordb")
    case = next(case for case in script.CASES if case.data == data)
    found = script.compared(case, inference.HMC(warmup=100, draws=60), data_dir, seed=0)
    # About 2000 effective draws: the standard error of a mean is .022 sds, that of a ratio of sds .016.
    assert found.effective > 1000
    assert found.agrees
