"""The table: what it holds, what it refuses, what it warns of; held-out units; the choice from a grid."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import xarray as xr
from _toy import Toy, toy_recording

import pyrodyn as dyn
from pyrodyn import comparison, inference, models, readouts
from pyrodyn.comparison.weights import model_weights
from pyrodyn.errors import CheckpointError, ComparisonError
from pyrodyn.scoring import bits_per_spike

QUICK = inference.Laplace(draws=400)


@pytest.fixture(scope="module")
def fits() -> dict[str, xr.DataTree]:
    """The true model, and one whose latent forgets at once."""
    recording = toy_recording("Gaussian", 12, 10)
    return {name: dyn.fit(model, recording, inference.HMC(), seed=0) for name, model in TOYS.items()}


TOYS = {"forgets": Toy(persistence=0.0), "true": Toy()}


def silent(*args, **options) -> xr.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("error", dyn.ComparisonWarning)
        return dyn.compare(*args, models=TOYS, **options)


def test_the_table_ranks_with_paired_errors(fits):
    table = silent(fits)
    assert list(table["model"].values) == ["true", "forgets"] and list(table["rank"].values) == [0, 1]
    points = table["pointwise"].values
    np.testing.assert_allclose(table["elpd"], points.sum(1))
    np.testing.assert_allclose(table["difference"], table["elpd"] - table["elpd"][0])
    np.testing.assert_allclose(table["dse"], [0.0, np.sqrt(12) * (points[1] - points[0]).std(ddof=1)])
    np.testing.assert_allclose(table["se"], np.sqrt(12) * points.std(1, ddof=1))
    assert float(table["difference"][1]) < -2 * float(table["dse"][1])
    assert float(table["weight_stacking"].sel(model="true")) > 0.9
    assert float(table["weight_pseudo_bma"].sum()) == pytest.approx(1.0)
    assert (table["seconds"] > 0).all() and json.loads(table.attrs["warnings"]) == []
    assert json.loads(table.attrs["method"])["class"] == "LOO"
    frame = comparison.as_table(table)
    assert list(frame.index) == ["true", "forgets"] and "pointwise" not in frame and "likelihood" in frame


def test_models_are_fitted_first_and_the_seed_decides():
    recording = toy_recording("Gaussian", 12, 10)
    tables = [dyn.compare(TOYS, recording, engine=QUICK, seed=seed) for seed in (0, 0, 1)]
    assert tables[0].drop_vars("seconds").identical(tables[1].drop_vars("seconds"))
    assert not np.array_equal(tables[0]["elpd"], tables[2]["elpd"])
    with pytest.raises(ComparisonError, match="'true' is a model: say by recording="):
        dyn.compare({"true": Toy()})


def test_weights_prefer_by_terms():
    """Two models that are each better on half of the terms share the weight; one that is worse everywhere has none."""
    half = np.where(np.arange(40) < 20, 0.0, -3.0) - 2000.0
    stacking, pseudo = model_weights(np.stack([half, half[::-1], np.full(40, -2010.0)]))
    np.testing.assert_allclose(stacking, [0.5, 0.5, 0.0], atol=0.01)
    assert pseudo[2] < 1e-6 and pseudo.sum() == pytest.approx(1.0)
    # With two models and two terms the best mixture has a closed form.
    gains = np.log(np.array([[0.8, 0.3], [0.2, 0.6]]))
    grid = np.linspace(0.0, 1.0, 100_001)
    best = grid[np.log(np.outer(grid, [0.8, 0.3]) + np.outer(1 - grid, [0.2, 0.6])).sum(1).argmax()]
    np.testing.assert_allclose(model_weights(gains)[0], [best, 1 - best], atol=1e-3)


def test_other_data_are_not_compared(fits):
    other = dyn.fit(Toy(), toy_recording("Gaussian", 12, 10, seed=1), QUICK, seed=0)
    with pytest.warns(dyn.ComparisonWarning, match="not scored on the same data"):
        table = dyn.compare(fits | {"other": other}, models=TOYS | {"other": Toy()})
    assert np.isnan(table["difference"]).all() and np.isnan(table["rank"]).all()
    assert "weight_stacking" not in table and np.isfinite(table["elpd"]).all()
    with pytest.raises(ComparisonError, match="'forgets' was fitted to other data"):
        dyn.compare(fits, toy_recording("Gaussian", 12, 10, seed=1), comparison.LOO(), models=TOYS)


def test_a_density_beside_a_probability_is_warned_of():
    counts = toy_recording("Poisson")
    both = {"Poisson": Toy(readouts.Poisson()), "Gaussian": Toy()}
    with pytest.warns(dyn.ComparisonWarning, match="densities .* beside probabilities"):
        dyn.compare(both, counts, engine=QUICK)


def test_laplace_beside_exact_is_warned_of(fits):
    scores = [
        comparison.LOO().score(_candidate("true", fits["true"]), None, 0),
        comparison.LOO().score(_candidate("forgets", fits["forgets"]), None, 0),
    ]
    from pyrodyn.comparison.table import _complaints

    found = [_candidate(name, fits[name]) for name in ("true", "forgets")]
    mixed = [scores[0], type(scores[1])(**{**vars(scores[1]), "likelihood": "Laplace"})]
    assert _complaints(found, scores) == ([], True)
    complaints, comparable = _complaints(found, mixed)
    assert comparable and "not of one kind ('true' exact, 'forgets' Laplace)" in complaints[0]


def _candidate(name: str, posterior: xr.DataTree) -> comparison.Candidate:
    return comparison.Candidate(name, TOYS[name], posterior, dyn.recording_of(posterior))


def test_weights_that_fail_are_warned_of_and_replaced_by_folds(fits):
    """One trial that no draw explains: its weights are ruled by a few draws."""
    values = toy_recording("Gaussian", 12, 10).to_xarray()["observations"].values.copy()
    values[3] += 40.0
    recording = toy_recording("Gaussian", 12, 10).with_observations(values)
    fitted = {name: dyn.fit(model, recording, inference.HMC(), seed=0) for name, model in TOYS.items()}
    with pytest.warns(dyn.ComparisonWarning, match=r"k-hat exceeds 0.70 in 8.33% .* method=comparison.KFold"):
        dyn.compare(fitted, None, comparison.LOO(), models=TOYS)
    table = silent(fitted)
    assert all("5-fold" in name for name in table["estimator"].values)
    assert (table["bad_k_share"] == 0.0).all()


def test_methods_that_contradict_each_other_are_named(fits):
    @dataclass(frozen=True)
    class Reversed:
        """An estimator that is wrong."""

        def score(self, candidate, recording, seed):
            score = comparison.LOO().score(candidate, recording, seed)
            return type(score)(**{**vars(score), "pointwise": -score.pointwise})

    with pytest.warns(dyn.ComparisonWarning, match="Reversed prefers 'forgets' to 'true' .* LOO the reverse"):
        table = dyn.compare(fits, None, [comparison.LOO(), Reversed()], models=TOYS)
    assert table.sizes == {"criterion": 2, "model": 2} and list(table["criterion"].values) == ["LOO", "Reversed"]
    assert list(table["rank"].sel(criterion="Reversed").values) == [1, 0]


def test_what_cannot_be_left_out_is_refused(fits):
    @dataclass(frozen=True)
    class Drifting(Toy):
        trials_independent: ClassVar[bool] = False

    with pytest.raises(ComparisonError, match="trials of Drifting are not independent given its globals"):
        dyn.compare({"a": fits["true"]}, models={"a": Drifting()})
    single = dyn.fit(Toy(), toy_recording("Gaussian", 1, 40), QUICK, seed=0)
    with pytest.raises(ComparisonError, match="a single trial, .*LeaveFutureOut"):
        dyn.compare({"a": single}, None, comparison.LOO(), models={"a": Toy()})
    assert "LFO" in str(dyn.compare({"a": single}, models={"a": Toy()})["estimator"].values[0])
    by_bin = fits["true"].copy()
    stored = by_bin["log_likelihood"]["observations"].expand_dims(time=3)
    by_bin["log_likelihood"] = xr.DataTree(xr.Dataset({"observations": stored}))
    with pytest.raises(ComparisonError, match="bins and units of one trial share its path"):
        dyn.compare({"a": by_bin}, models={"a": Toy()})
    without = fits["true"].copy()
    del without["log_likelihood"]
    with pytest.raises(ComparisonError, match="no group log_likelihood"):
        dyn.compare({"a": without}, models={"a": Toy()})
    few = dyn.fit(Toy(), toy_recording("Gaussian", 12, 10), inference.Laplace(draws=10), seed=0)
    with pytest.raises(ComparisonError, match="10 draws with a log likelihood, expected 25 or more"):
        dyn.compare({"a": few}, models={"a": Toy()})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: dyn.compare({}), "candidates must be a mapping"),
        (lambda: dyn.compare({"a": 3}), "'a' must be a posterior"),
        (lambda: comparison.KFold(1), "folds must be 2 or more"),
        (lambda: comparison.LeaveFutureOut(first=1.5), "first must be a share"),
        (lambda: comparison.LeaveFutureOut(ahead=0), "ahead must be 1 bin or more"),
        (lambda: comparison.Particles(1), "particles and draws must be 2 or more"),
        (lambda: dyn.select(models.LDS, [], toy_recording("Poisson")), "grid must name different points"),
    ],
)
def test_bad_options_are_named(call, said):
    with pytest.raises(ComparisonError, match=said):
        call()


# ---------------------------------------------------------------------------------------------- held-out entries


@pytest.fixture(scope="module")
def counted() -> tuple[dyn.Recording, dict[str, xr.DataTree]]:
    """Counts driven by one latent, and fits to two thirds of the trials with and without a memory."""
    whole = toy_recording("Poisson", 24, 20, 5)
    train = whole.isel(trial=slice(0, 16))
    toys = {"forgets": Toy(readouts.Poisson(), persistence=0.0), "true": Toy(readouts.Poisson())}
    return whole.isel(trial=slice(16, 24)), {n: dyn.fit(m, train, QUICK, seed=0) for n, m in toys.items()}


def test_units_are_predicted_from_others(counted):
    test, fitted = counted
    toys = {"forgets": Toy(readouts.Poisson(), persistence=0.0), "true": Toy(readouts.Poisson())}
    method = comparison.HeldOutUnits(groups=5, draws=30)
    table = dyn.compare(fitted, test, method, models=toys)
    assert list(table["model"].values) == ["true", "forgets"] and float(table["bits_per_spike"][0]) > 0.1
    assert str(table["estimator"].values[0]) == "held-out units in new trials, 5 groups"
    expected = np.stack(
        [
            dyn.predict(fitted["true"], test.hide(unit=u), draws=30, model=toys["true"])["expected"].sel(unit=u)
            for u in test.unit
        ],
        -1,
    )
    counts = test.to_xarray()["observations"].values
    assert float(table["bits_per_spike"].sel(model="true")) == pytest.approx(bits_per_spike(expected, counts))
    for u in range(5):
        alone = bits_per_spike(expected[..., [u]], counts[..., [u]])
        assert float(table["unit_bits_per_spike"].sel(model="true").isel(unit=u)) == pytest.approx(alone)
    assert (table["unit_se"] > 0.0).all()
    seen = dyn.compare(fitted, None, method, models=toys)
    assert str(seen["estimator"].values[0]) == "held-out units in trials of the fit, 5 groups"
    flagged = dyn.Recording.from_xarray(
        test.to_xarray().assign_coords(heldout=("unit", [True, False, False, True, False]))
    )
    only = dyn.compare(fitted, flagged, method, models=toys)
    assert np.isfinite(only["unit_bits_per_spike"].values[0]).tolist() == [True, False, False, True, False]


def test_bins_hidden_from_the_fit_are_predicted():
    whole = toy_recording("Poisson", 24, 20, 5)
    hidden = np.random.default_rng(0).random((24, 20)) < 0.1
    toys = {"forgets": Toy(readouts.Poisson(), persistence=0.0), "true": Toy(readouts.Poisson())}
    fitted = {n: dyn.fit(m, whole.hide(mask=hidden), QUICK, seed=0) for n, m in toys.items()}
    method = comparison.HeldOutEntries(draws=30)
    table = dyn.compare(fitted, whole, method, models=toys)
    assert list(table["model"].values) == ["true", "forgets"] and float(table["bits_per_spike"][0]) > 0.05
    expected = dyn.predict(fitted["true"], whole.hide(mask=hidden), draws=30, model=toys["true"])["expected"].values
    counts = np.where(hidden[..., None], whole.to_xarray()["observations"].values, np.nan)
    assert float(table["bits_per_spike"].sel(model="true")) == pytest.approx(bits_per_spike(expected, counts))
    with pytest.raises(ComparisonError, match="say recording="):
        dyn.compare(fitted, None, method, models=toys)
    with pytest.raises(ComparisonError, match="no entry of recording was hidden from the fit"):
        dyn.compare(fitted, whole.hide(mask=hidden), method, models=toys)


# ---------------------------------------------------------------------------------------------- grids


def test_a_grid_is_fitted_compared_and_resumed(tmp_path):
    recording, _ = dyn.simulate(models.LDS(1, readouts.Gaussian()), _blank(), seed=2)
    grid = {"latent_dim": [1, 2], "dynamics_scale": [1.0, 3.0]}

    def factory(latent_dim: int, dynamics_scale: float) -> models.LDS:
        return models.LDS(latent_dim, readouts.Gaussian(), dynamics_scale)

    method = comparison.KFold(2)
    engine = inference.Laplace(draws=100)
    table = dyn.select(factory, grid, recording, engine, method=method, folder=tmp_path)
    assert table.sizes["model"] == 4 and set(table["latent_dim"].values) == {1, 2}
    assert str(table["model"].values[0]).startswith(f"latent_dim={int(table['latent_dim'][0])}, dynamics_scale=")
    assert comparison.fewest(table, "latent_dim") == 1  # the data are from one latent
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 4 and all(path.suffix == ".nc" for path in files)
    (tmp_path / "latent_dim=2,_dynamics_scale=3.0.nc").unlink()
    again = dyn.select(factory, grid, recording, engine, method=method, folder=tmp_path, workers=2)
    kept = [path for path, written in files.items() if path.exists() and path.stat().st_mtime_ns == written]
    assert len(kept) == 3 and len(list(tmp_path.iterdir())) == 4
    assert again.drop_vars("seconds").identical(table.drop_vars("seconds"))  # a process fits as we do, to the bit
    with pytest.raises(CheckpointError, match="holds a fit of another seed: 0 where 1"):
        dyn.select(factory, grid, recording, engine, method=method, folder=tmp_path, seed=1)
    with pytest.raises(ComparisonError, match="another process cannot build"):
        dyn.select(lambda p: Toy(persistence=p), {"p": [0.5]}, recording, engine, workers=2)


def _judged(behind: list[float], error: list[float]) -> xr.Dataset:
    """A comparison of 4, 2, 3 and 1 modes, in order of rank."""
    table = xr.Dataset({"difference": ("model", -np.array(behind)), "dse": ("model", np.array(error))})
    return table.assign_coords(num_modes=("model", [4, 2, 3, 1]), how=("model", list("abcd")))


def test_the_fewest_not_clearly_worse_are_chosen():
    table = _judged([0.0, 3.0, 5.0, 90.0], [0.0, 2.0, 1.0, 4.0])
    assert comparison.fewest(table, "num_modes") == 2  # 3 is clearly worse, by 5 of 1
    assert comparison.fewest(table, "num_modes", clear=1.0) == 4
    assert comparison.fewest(table, "num_modes", clear=0.0) == 4
    assert comparison.fewest(table, "num_modes", clear=30.0) == 1
    for changed, name, clear, said in (
        (table, "latent_dim", 2.0, r"one of the grid whose values are numbers, \['num_modes'\], got 'latent_dim'"),
        (table, "how", 2.0, "whose values are numbers"),
        (table, "num_modes", -1.0, "clear must be 0 standard errors or more, got -1.0"),
        (_judged([0.0, 3.0, 5.0, 90.0], [0.0, np.nan, 1.0, 4.0]), "num_modes", 2.0, "no standard error"),
        (xr.concat([table, table], xr.Variable("criterion", ["KFold", "LOO"])), "num_modes", 2.0, "'KFold', 'LOO'"),
    ):
        with pytest.raises(ComparisonError, match=said):
            comparison.fewest(changed, name, clear)


def test_a_worker_that_dies_is_named(tmp_path):
    recording, _ = dyn.simulate(models.LDS(1, readouts.Gaussian()), _blank(), seed=2)
    bad = inference.HMC(draws=2, warmup=0, chains=4, collapse=None, target_acceptance=float("nan"))
    (tmp_path / "latent_dim=1.checkpoint").write_bytes(b"not a checkpoint")
    with pytest.raises(
        ComparisonError, match=r"the process that fitted 'latent_dim=1' ended with code 1: .*checkpoint"
    ):
        dyn.select(lambda latent_dim: models.LDS(latent_dim, readouts.Gaussian()), {"latent_dim": [1]}, recording, bad,
                   folder=tmp_path, workers=2)  # fmt: skip


def _blank() -> dyn.Recording:
    like = np.zeros((6, 8, 3))
    return dyn.Recording.from_arrays(like, bin_width=0.1, counts=False, center=np.zeros(3), scale=np.ones(3))
