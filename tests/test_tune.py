"""Successive halving: who goes on, for how long, and what survives a stop."""

from __future__ import annotations

import numpy as np
import pytest

import pyrodyn as dyn
from pyrodyn import guides, inference, models, readouts
from pyrodyn.comparison import halving, tune
from pyrodyn.errors import ComparisonError
from pyrodyn.inference import SVI, EarlyStopping, Training
from pyrodyn.recording import Recording

HELD = Training(stopping=EarlyStopping(share=0.25, every=2))


def recording() -> Recording:
    like = Recording.from_arrays(np.zeros((8, 6, 3)), bin_width=0.1, counts=False, center=np.zeros(3), scale=np.ones(3))
    return dyn.simulate(models.LDS(1, readouts.Gaussian()), like.blank(), seed=0)[0]


def candidate(rate: float, steps: int = 36) -> tuple[models.LDS, SVI]:
    engine = inference.SVI(
        steps=steps, learning_rate=rate, draws=5, particles=1, guide=guides.MeanField(), training=HELD
    )
    return models.LDS(1, readouts.Gaussian()), engine


def test_the_best_of_each_rung_goes_on_with_more_steps(monkeypatch):
    steps = []
    fit = halving.fit

    def watched(model, data, engine, **options):
        steps.append(engine.steps)
        return fit(model, data, engine, **options)

    monkeypatch.setattr(halving, "fit", watched)
    rates = [1e-4, 1e-3, 0.01, 0.05]
    posterior, table = tune(candidate, {"rate": rates}, recording(), rungs=2, factor=3)
    assert steps == [12] * 4 + [36] * 2
    bounds = table["held_out_bound"].values
    gone_on = np.isfinite(bounds[1])
    assert set(np.flatnonzero(gone_on)) == set(np.argsort(-bounds[0])[:2])
    assert list(table["rate"].values) == rates
    alone = dyn.fit(*_with(recording(), rates[int(np.nanargmax(bounds[1]))]), seed=0)
    assert posterior["posterior"].equals(alone["posterior"])


def _with(data: Recording, rate: float):
    model, engine = candidate(rate)
    return model, data, engine


def test_a_search_that_was_stopped_goes_on(tmp_path, monkeypatch):
    data, calls = recording(), []
    fit = halving.fit

    def fragile(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    monkeypatch.setattr(halving, "fit", fragile)
    grid = {"rate": [0.001, 0.01, 0.05]}
    with pytest.raises(KeyboardInterrupt):
        tune(candidate, grid, data, rungs=2, folder=tmp_path)
    resumed, table = tune(candidate, grid, data, rungs=2, folder=tmp_path)
    assert len(calls) == 5  # two before the stop, the one that was stopped, and two after
    whole, expected = tune(candidate, grid, data, rungs=2)
    assert table.equals(expected) and resumed["posterior"].equals(whole["posterior"])


def test_what_cannot_be_tuned_is_refused():
    with pytest.raises(ComparisonError, match="holds none back"):
        tune(lambda rate: (models.LDS(1), inference.SVI(learning_rate=rate)), {"rate": [0.1]}, recording())
    with pytest.raises(ComparisonError, match="factor at least 2"):
        tune(candidate, {"rate": [0.1]}, recording(), factor=1)
