"""Every estimator of the comparison against quadrature, on a model with two parameters."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
import xarray as xr
from _toy import Quadrature, Toy, toy_recording
from scipy.special import logsumexp

import pyrodyn as dyn
from pyrodyn import inference, readouts
from pyrodyn.comparison import LOO, Evidence, HeldOutEntries, KFold, LeaveFutureOut, Particles
from pyrodyn.comparison.bridge import bridge
from pyrodyn.comparison.folds import _fold_of
from pyrodyn.comparison.future import _until
from pyrodyn.errors import ComparisonError
from pyrodyn.inference.engine import random_stream
from pyrodyn.recording import Recording

ENGINES = {
    "HMC": inference.HMC(draws=50),
    "SVI": inference.SVI(steps=800, draws=2000),
    "Laplace": inference.Laplace(draws=4000),
}
KINDS = ("Gaussian", "Poisson")
SIZE = 61  # nodes along either parameter: log evidences are then right to 1e-6


def model(kind: str) -> Toy:
    return Toy(getattr(readouts, kind)())


@cache
def posterior(kind: str, engine: str) -> xr.DataTree:
    return dyn.fit(model(kind), toy_recording(kind), ENGINES[engine], seed=0)


@cache
def exact(kind: str) -> Quadrature:
    """Path and parameters by quadrature."""
    return Quadrature(model(kind), toy_recording(kind), SIZE, states=0 if kind == "Gaussian" else 161)


def compare(kind: str, method, engines=tuple(ENGINES), recording: Recording | None = None) -> xr.Dataset:
    posteriors = {name: posterior(kind, name) for name in engines}
    return dyn.compare(posteriors, recording, method, models=dict.fromkeys(posteriors, model(kind)))


def test_quadrature_over_paths_is_the_kalman_filter():
    few = toy_recording("Gaussian", trials=2, bins=4)
    by_chain, by_grid = (Quadrature(Toy(), few, 21, states=n) for n in (0, 401))
    # Elsewhere the posterior of the path leaves the grid of states; the posterior of the parameters is far from there.
    near = (by_chain.grid - torch.tensor([0.3, 0.8])).abs().amax(-1) < 0.8
    assert int(near.sum()) >= 30
    torch.testing.assert_close(by_chain.of_trials[near], by_grid.of_trials[near], rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_loo_is_exact_leave_one_trial_out_from_every_engine(kind):
    table = compare(kind, LOO())
    truth = np.array([exact(kind).left_out([i])[0] for i in range(toy_recording(kind).num_trials)])
    for engine in ENGINES:
        row = table.sel(model=engine)
        assert (row["k_hat"] < 0.7).all() and float(row["bad_k_share"]) == 0.0
        assert np.abs(row["pointwise"] - truth).max() < 0.1, engine
        assert abs(float(row["elpd"]) - truth.sum()) < min(0.5, 4.0 * float(row["mc_error"])), engine
    assert float(abs(table["elpd"].sel(model="SVI") - table["elpd"].sel(model="HMC"))) < 0.5
    assert (table["likelihood"] == ("exact" if kind == "Gaussian" else "Laplace + particles")).all()


def test_what_particles_take_out_is_there():
    """The Laplace evidence of single trials is off by more than what is left after the correction."""
    truth = np.array([exact("Poisson").left_out([i])[0] for i in range(8)])
    plain, mended = (compare("Poisson", LOO(p), ("HMC",)) for p in (None, Particles(200, 100)))
    error = {"plain": (plain["pointwise"] - truth).sum(), "mended": (mended["pointwise"] - truth).sum()}
    assert abs(error["plain"]) > 0.15 > 0.12 > abs(error["mended"])
    np.testing.assert_allclose(mended["elpd_uncorrected"], plain["elpd"])
    assert float(plain["mc_error"][0]) < float(mended["mc_error"][0]) < 0.1
    assert str(plain["likelihood"].values[0]) == "Laplace"


@pytest.mark.parametrize(
    "refit", [None, inference.Laplace(draws=1000), inference.SVI(steps=200, draws=600)], ids=["HMC", "Laplace", "SVI"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_folds_are_left_out_exactly(kind, refit):
    table = compare(kind, KFold(4, refit), ("HMC",))
    fold, truth = _fold_of(toy_recording(kind), 4, 0), np.full(8, np.nan)
    for k in range(4):
        truth[fold == k] = exact(kind).left_out(np.flatnonzero(fold == k).tolist())
    assert np.bincount(fold).tolist() == [2, 2, 2, 2]
    assert np.abs(table["pointwise"].values[0] - truth).max() < 0.1
    assert abs(float(table["elpd"][0]) - truth.sum()) < 0.4
    assert str(table["estimator"].values[0]).startswith(f"4-fold, refits by {'HMC' if refit is None else ''}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_left_out_exactly(kind):
    session = toy_recording(kind, 1, 40)
    method = LeaveFutureOut(first=0.25, ahead=5)
    fitted = dyn.fit(model(kind), session, ENGINES["Laplace"], seed=0)
    table = dyn.compare({"a": fitted}, None, method, models={"a": model(kind)})
    states = 0 if kind == "Gaussian" else 121
    known = [
        Quadrature(model(kind), _until(session, int(cut)), 41, states=states).log_evidence()
        for cut in method.cuts(session)
    ]
    truth = np.diff(known)
    assert table.sizes["cut"] == len(truth) == 6
    np.testing.assert_allclose(table["cut"], session.time[10:40:5])
    assert np.abs(table["pointwise"].values[0] - truth).max() < 0.1
    assert abs(float(table["elpd"][0]) - truth.sum()) < 0.5
    assert "1 refits" in str(table["estimator"].values[0])


def test_the_future_is_refitted_where_weights_fail():
    """A level that jumps: no draw of the first half's posterior predicts the second."""
    values = toy_recording("Gaussian", 1, 40).to_xarray()["observations"].values.copy()
    values[:, 15:] += 6.0
    session = toy_recording("Gaussian", 1, 40).with_observations(values)
    fitted = dyn.fit(Toy(), session, ENGINES["Laplace"], seed=0)
    method = LeaveFutureOut(first=0.25, ahead=5, refit=inference.HMC(chains=16, draws=100, warmup=60))
    table = dyn.compare({"a": fitted}, None, method, models={"a": Toy()})
    known = [Quadrature(Toy(), _until(session, int(cut)), 161).log_evidence() for cut in method.cuts(session)]
    assert "1 refits" not in str(table["estimator"].values[0])
    # The jump itself is a surprise that few draws allow for: the table says how little is known of that term.
    error = np.abs(table["pointwise"].values[0] - np.diff(known))
    assert np.sort(error)[-2] < 0.1 and error.argmax() == 1
    assert error[1] < 4.0 * float(table["mc_error"][0]) < 2.0


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_is_the_integral(kind):
    table = compare(kind, Evidence())
    truth = exact(kind).log_evidence()
    for engine in ENGINES:
        row = table.sel(model=engine)
        assert abs(float(row["log_evidence"]) - truth) < 4.0 * float(row["se"]) + 0.003, engine
        assert float(row["se"]) < 0.05
    assert str(table["estimator"].sel(model="HMC").values) == "bridge sampling"
    assert float(table["probability"].sum()) == pytest.approx(1.0)
    if kind == "Poisson":
        laplace = Quadrature(model(kind), toy_recording(kind), SIZE).log_evidence()
        np.testing.assert_allclose(table["log_evidence_uncorrected"], laplace, atol=0.03)
        assert abs(laplace - truth) > 0.1


def test_bridge_sampling_of_a_gaussian_with_correlated_draws():
    size, chains, draws = 4, 8, 400
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64).tril() + 2.0 * torch.eye(size).double()
    noise = torch.randn(chains, draws, size, generator=generator, dtype=torch.float64)
    for i in range(1, draws):  # an AR(1), standard normal at every step
        noise[:, i] = 0.5 * noise[:, i - 1] + math.sqrt(0.75) * noise[:, i]
    truth = 3.0 + 0.5 * size * math.log(2.0 * math.pi) + float(root.diagonal().log().sum())

    def log_density(vectors: torch.Tensor) -> torch.Tensor:
        return 3.0 - 0.5 * torch.linalg.solve_triangular(root, vectors.mT, upper=False).square().sum(0)

    with random_stream(1):
        value, error = bridge(log_density, noise @ root.mT)
    assert abs(value - truth) < 4.0 * error < 0.2
    with pytest.raises(ComparisonError, match="needs 20 draws or more, got 16"):
        bridge(log_density, noise[:, :2])


def test_the_standard_error_of_an_evidence_is_honest():
    """Over repetitions, estimates spread as their standard errors say."""
    evidence, tables = Evidence(Particles(30, 20)), []
    for seed in range(12):
        posteriors = {"a": posterior("Poisson", "HMC")}
        tables.append(dyn.compare(posteriors, None, evidence, models={"a": model("Poisson")}, seed=seed))
    values = np.array([float(t["log_evidence"][0]) for t in tables])
    claimed = math.sqrt(np.mean([float(t["se"][0]) ** 2 for t in tables]))
    # The bridge's draws of the posterior are the same in all: they do not spread.
    assert 0.3 < values.std(ddof=1) / claimed < 1.5
    assert abs(values.mean() - exact("Poisson").log_evidence()) < 2.0 * claimed


def test_entries_hidden_from_the_fit_have_their_exact_density():
    whole = toy_recording("Gaussian")
    hidden = whole.hide(mask=np.random.default_rng(0).random((8, 6, 2)) < 0.2)
    fitted = dyn.fit(Toy(), hidden, ENGINES["HMC"], seed=0)
    table = dyn.compare({"a": fitted}, whole, HeldOutEntries(draws=1000), models={"a": Toy()})
    visible, every = Quadrature(Toy(), hidden, SIZE), Quadrature(Toy(), whole, SIZE)
    base = (visible.log_prior + visible.of_trials.sum(-1)).numpy()[:, None]
    gained = (every.of_trials - visible.of_trials).numpy()
    truth = logsumexp(base + gained, axis=0) - logsumexp(base, axis=0)
    assert np.abs(table["pointwise"].values[0] - truth).max() < 0.05
