"""Rival models of two regions: what differs, and that likelihoods tell them apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyrodyn as dyn
from pyrodyn import comparison, inference, models, readouts
from pyrodyn.errors import CouplingError

MODEL = models.MultiRegionLDS(1, time_bumps=0, trial_level=False, readout=readouts.Gaussian())


def blank(*regions: str) -> dyn.Recording:
    units = 3 * len(regions)
    return dyn.Recording.from_arrays(
        np.zeros((10, 30, units)),
        bin_width=0.05,
        counts=False,
        region=[name for name in regions for _ in range(3)],
        center=np.zeros(units),
        scale=np.ones(units),
    )


def test_hypotheses_differ_in_the_pair_alone():
    found = dyn.hypotheses(MODEL, blank("A", "B", "C"), source="A", target="C")
    assert list(found) == ["no coupling", "common input", "A -> C", "C -> A", "feedback loop"]
    others = {("A", "B"), ("B", "A"), ("B", "C"), ("C", "B")}
    edges = {name: {(edge.source, edge.target) for edge in model.edges} for name, model in found.items()}
    assert all(others <= edge for edge in edges.values())
    assert {name: len(edge - others) for name, edge in edges.items()} == dict(zip(found, (0, 0, 1, 1, 2), strict=True))
    assert edges["A -> C"] - others == {("A", "C")}
    assert all(edge.probability == 1.0 for model in found.values() for edge in model.edges)
    assert {n for n, m in found.items() if m.global_dim or m.shared_innovations} == {"common input"}
    assert all(m.readout == MODEL.readout and m.latent_dim == 1 for m in found.values())


def test_the_pair_must_be_known():
    for pair in ({}, {"source": "A", "target": "X"}, {"source": "A", "target": "A"}):
        with pytest.raises(CouplingError, match=r"two different regions .*'A', 'B', 'C'"):
            dyn.hypotheses(MODEL, blank("A", "B", "C"), **pair)


def test_the_direction_is_found():
    like = blank("A", "B")
    truth = dyn.hypotheses(MODEL, like)["A -> B"]
    recording, drawn = dyn.simulate(truth, like, seed=3, values={"noise_sd": torch.full((6,), 0.3)})
    assert abs(float(drawn["dynamics"][1, 0])) > 0.2  # the edge that was drawn is there
    engine = inference.Laplace(draws=200)
    rivals = {name: m for name, m in dyn.hypotheses(MODEL, recording).items() if name in ("A -> B", "B -> A")}
    table = dyn.compare(rivals, recording, comparison.KFold(2), engine=engine)
    assert list(table["model"].values) == ["A -> B", "B -> A"]
    assert float(table["difference"][1]) < -2.0 * float(table["dse"][1])
