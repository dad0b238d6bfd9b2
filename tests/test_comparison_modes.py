"""Comparison of models that sum out modes, against sums over every path of modes."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
import xarray as xr
from pyro import poutine
from scipy.special import gammaln, logsumexp

import pyrodyn as dyn
from pyrodyn import comparison, inference, models, readouts
from pyrodyn.comparison.evidence import _NearOneCopy, _vectors
from pyrodyn.inference.engine import random_stream
from pyrodyn.models._modes import mode_contrasts
from pyrodyn.program import globals_given
from pyrodyn.recording import Recording

MODEL = models.HMM(2, stickiness=2.0)
ENGINES = {
    "HMC": inference.HMC(draws=100, warmup=100, chains=24),
    "SVI": inference.SVI(steps=400, draws=3000),
    "Laplace": inference.Laplace(draws=4000),
}
COUNTS = [[0, 1, 0, 9, 12], [8, 11, 1, 0, 0], [0, 1, 10, 8, 9]]  # (trial, time)


@cache
def recording() -> Recording:
    return Recording.from_arrays(np.array(COUNTS, dtype=float)[..., None], bin_width=0.1)


@cache
def posterior(engine: str) -> xr.DataTree:
    return dyn.fit(MODEL, recording(), ENGINES[engine], seed=0)


@cache
def exact(trials: tuple[int, ...]) -> float:
    """log p of some trials: probabilities of mode paths in closed form, predictors of both modes by quadrature."""
    counts = np.array(COUNTS)[list(trials)]
    paths = np.array(list(itertools.product((0, 1), repeat=counts.size))).reshape(-1, *counts.shape)
    first = np.stack([(paths[:, :, 0] == k).sum(-1) for k in (0, 1)], -1)
    log_paths = _dirichlet(first, np.ones(2))
    for k in (0, 1):
        steps = [((paths[:, :, :-1] == k) & (paths[:, :, 1:] == to)).sum((1, 2)) for to in (0, 1)]
        log_paths += _dirichlet(np.stack(steps, -1), 1.0 + 2.0 * np.eye(2)[k])
    grid = torch.linspace(-9.0, 9.0, 241, dtype=torch.float64), torch.linspace(-5.0, 5.0, 241, dtype=torch.float64)
    offset, contrast = torch.cartesian_prod(*grid).T
    values = {"offset": offset[:, None, None], "contrasts": contrast[:, None, None, None]}
    values |= {"initial": torch.full((2,), 0.5).double(), "transition": torch.full((2, 2), 0.5).double()}
    trace = poutine.trace(poutine.condition(MODEL.sample_globals, data=values)).get_trace(recording())
    trace.compute_log_prob()
    log_prior = sum(trace.nodes[name]["log_prob"].squeeze(-1) for name in ("offset", "contrasts")).numpy()
    predictor = globals_given(MODEL, values, recording()).predictor[:, 0, :, 0].numpy()  # (node, mode)
    # Counts in a mode and their sum are all that a path says of its mode's rate.
    size, total = (np.stack([((paths == k) * w).sum((1, 2)) for k in (0, 1)]) for w in (np.ones_like(counts), counts))
    log_cell = math.log(float((grid[0][1] - grid[0][0]) * (grid[1][1] - grid[1][0])))
    kinds, place = np.unique(np.concatenate([size, total]), axis=1, return_inverse=True)
    weight = np.full(kinds.shape[1], -np.inf)
    np.logaddexp.at(weight, place.ravel(), log_paths)
    fit = predictor @ kinds[2:] - np.exp(predictor) @ kinds[:2] - gammaln(counts + 1.0).sum()
    return float(logsumexp(fit + weight + log_prior[:, None])) + log_cell


def _dirichlet(counts: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Log probability of a sequence with such counts (path, kind), its probabilities integrated out."""
    total = gammaln(prior.sum()) - gammaln(prior.sum() + counts.sum(-1))
    return total + (gammaln(prior + counts) - gammaln(prior)).sum(-1)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_evidence_counts_every_numbering_of_modes(engine):
    table = dyn.compare({"a": posterior(engine)}, None, comparison.Evidence())
    truth, error = exact((0, 1, 2)), float(table["se"][0])
    assert abs(float(table["log_evidence"][0]) - truth) < 4.0 * error + 0.003 and error < 0.05
    assert str(table["likelihood"].values[0]) == "exact"


def test_chains_in_other_numberings_give_the_same_evidence():
    tree = posterior("HMC")
    candidate = comparison.Candidate("a", MODEL, tree, recording())
    vectors, density = _vectors(candidate)
    values = density.constrain(vectors[1::2])
    swapped = dict(values) | {
        "initial": values["initial"].flip(-1),
        "transition": values["transition"].flip(-1, -2),
        "contrasts": -values["contrasts"],
    }
    moved = vectors.clone()
    moved[1::2] = density.unconstrain(swapped)
    torch.testing.assert_close(density(moved), density(vectors))
    assert not _NearOneCopy(candidate, density, vectors).holds(moved[1])[0]
    stored = tree["unconstrained_posterior"].to_dataset()
    for site in density.sites:
        stored[site.name] = stored[site.name].copy(data=moved[..., site.place].numpy())
    other = tree.copy()
    other["unconstrained_posterior"] = xr.DataTree(stored)
    table = dyn.compare({"one": tree, "some": other}, None, comparison.Evidence())
    assert abs(float(table["difference"][1])) < 4.0 * float(table["dse"][1]) < 0.1


@pytest.mark.parametrize("modes", [1, 2, 4])
def test_the_nearest_copy_undoes_any_numbering(modes):
    model = models.HMM(modes, readouts.Gaussian())
    like = Recording.from_arrays(np.random.default_rng(0).normal(size=(2, 6, 3)), bin_width=0.1, counts=False)
    start = model.initial_values(like)
    if modes > 1:
        start["contrasts"] = 10.0 * start["contrasts"]  # far apart, beside what draws differ by
    with random_stream(1):
        values = {n: v + 0.1 * torch.rand(5, 1, *v.shape).double() for n, v in start.items()}
    parameters = globals_given(model, values, like)
    permuted = model.transformed(parameters, like, seed=3)
    apart = (permuted.predictor - values["offset"].unsqueeze(-2)) / like.scale
    sites = dict(values)
    if modes > 1:
        sites |= {
            "initial": permuted.initial,
            "transition": permuted.transition,
            "contrasts": mode_contrasts(modes).mT @ apart,
        }
        assert modes < 4 or not torch.allclose(sites["contrasts"], values["contrasts"])
    back = model.nearest_copy(sites, {n: v[2] for n, v in values.items()}, like)
    for name, value in values.items():
        torch.testing.assert_close(back[name], value)
    assert model.log_copies(like) == pytest.approx(math.log(math.factorial(modes)))


@pytest.mark.parametrize("method", [comparison.LOO(), comparison.KFold(3, ENGINES["HMC"])], ids=["LOO", "KFold"])
def test_trials_are_left_out_exactly(method):
    truth = np.array([exact((0, 1, 2)) - exact(tuple(j for j in range(3) if j != i)) for i in range(3)])
    table = dyn.compare({"a": posterior("HMC")}, None, method)
    error = table["pointwise"].values[0] - truth
    assert np.abs(error).max() < 0.15 and abs(error.sum()) < 4.0 * float(table["mc_error"][0]) < 0.5
    assert float(table["bad_k_share"][0]) == 0.0 and str(table["likelihood"].values[0]) == "exact"


def planted(modes: int, seed: int) -> Recording:
    like = Recording.from_arrays(np.ones((6, 60, 6)), bin_width=0.05)
    rates = np.array([[8, 8, 1, 1, 1, 1], [1, 1, 8, 8, 1, 1], [1, 1, 1, 1, 8, 8]])[:modes]
    apart = torch.from_numpy(np.log(rates))
    values = {
        "offset": apart.mean(0),
        "contrasts": mode_contrasts(modes).mT @ apart,
        "transition": 0.9 * torch.eye(modes).double() + 0.1 / modes,
    }
    return dyn.simulate(models.HMM(modes), like, seed=seed, values=values)[0]


def test_the_number_of_modes_is_chosen():
    grid = {"num_modes": [1, 2, 3, 4]}
    table = dyn.select(models.HMM, grid, planted(3, 1), inference.Laplace(draws=400), method=comparison.KFold(3))
    assert table["num_modes"].values[0] == 3
    assert float(table["difference"].sel(model="num_modes=2")) < -5.0 * float(table["dse"].sel(model="num_modes=2"))


def test_replicated_data_have_the_rates_of_the_modes():
    seen = planted(2, 0)
    tree = dyn.fit(models.HMM(2), seen, inference.Laplace(draws=200), seed=0)
    found = dyn.check(tree, draws=100)
    assert (found["extreme"] < 0.15).all() and (found["rate_p"] > 0.02).all()
    again = dyn.posterior_predictive(tree, draws=100, new_paths=False)
    expected = dyn.predict(tree, seen, draws=100)["expected"]
    spread = np.sqrt(expected / 100)  # of Poisson counts, means over replicates
    assert float((abs(again.mean("replicate") - expected) < 4.5 * spread + 0.05).mean()) > 0.995
    alone = dyn.check(models.HMM(1), seen, draws=50)
    assert set(alone["dispersion"].dims) == {"unit"}
    flat = dyn.check(dyn.fit(models.HMM(1), seen, inference.Laplace(draws=100), seed=0), draws=100)
    assert (flat["dispersion_p"][:4] < 0.05).all()  # constant rates cannot make counts so uneven
