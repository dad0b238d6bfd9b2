"""What stands in a posterior: each number against another route to it, and the verbs that read it again."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
import xarray as xr
import zoo

import pyrodyn as dyn
from pyrodyn import inference, models, readouts
from pyrodyn.conditioning import path_evidence
from pyrodyn.diagnostics import diagnose
from pyrodyn.errors import ModelError, RecordingError
from pyrodyn.inference import LogDensity, collapse
from pyrodyn.inference.engine import Draws
from pyrodyn.posterior import parameters_of, path_summary, thinned, to_datatree, trial_batches
from pyrodyn.program import IntegratedModel, globals_given, log_joint
from pyrodyn.recording import Recording

ROWS = [pytest.param(row, id=row.name) for row in zoo.MODELS if row.integrated]


def sites_of(tree: xr.DataTree, density: LogDensity) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The unconstrained vectors (draw, dimension) of a posterior, and the sites they stand for."""
    stored = tree["unconstrained_posterior"].to_dataset()
    parts = [torch.from_numpy(stored[site.name].values).flatten(0, 1) for site in density.sites]
    vectors = torch.cat(parts, -1)
    return vectors, density.constrain(vectors)


# ---------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("engine", ["Laplace", "NUTS"])
def test_the_groups_tell_the_same_story(row, engine):
    """Unconstrained vectors give the parameters; these give the invariants, the likelihood of each trial, and lp."""
    tree, model, recording = zoo.fitted(row.name, engine), row.model, row.recording
    density = LogDensity(collapse(model), recording)
    _, sites = sites_of(tree, density)
    parameters = globals_given(model, sites, recording)
    lead = (tree["posterior"].sizes["chain"], tree["posterior"].sizes["draw"])
    for group, labelled in (("posterior", model.label(parameters)), ("invariants", model.invariants(parameters))):
        stored = tree[group].to_dataset()
        assert set(stored.data_vars) == set(labelled)
        for name, (dims, value) in labelled.items():
            assert stored[name].dims == ("chain", "draw", *dims)
            np.testing.assert_allclose(
                stored[name].values, value.reshape(stored[name].shape).numpy(), rtol=1e-9, atol=1e-10
            )
    if isinstance(model, IntegratedModel):
        evidence = model.evidence(parameters, recording, recording.observations)
    else:
        evidence = path_evidence(*collapse(model).factors(parameters, recording), recording.observations)
    found = tree["log_likelihood"]["observations"].values
    np.testing.assert_allclose(found, evidence.reshape(*lead, -1).numpy(), rtol=1e-9, atol=1e-8)
    expected = log_joint(collapse(model), sites, recording).reshape(lead).numpy()
    np.testing.assert_allclose(tree["sample_stats"]["lp"].values, expected, rtol=1e-9, atol=1e-8)
    exact = isinstance(model, IntegratedModel) or model.readout.is_gaussian
    assert ("exactly" if exact else "Laplace") in tree.attrs["path_treatment"]
    assert tree.attrs["log_likelihood_estimator"] == ("exact" if exact else "Laplace")


@pytest.mark.parametrize("row", ROWS)
def test_parameters_come_back_from_a_posterior(row):
    tree = zoo.fitted(row.name, "Laplace")
    density = LogDensity(collapse(row.model), row.recording)
    _, sites = sites_of(tree, density)
    parameters = globals_given(row.model, sites, row.recording)
    back = parameters_of(tree, row.model, draws=30)
    for name, value in parameters._asdict().items():
        if value is not None:
            torch.testing.assert_close(
                getattr(back, name), value.expand(getattr(back, name).shape), rtol=1e-9, atol=1e-10
            )
    thinned = parameters_of(tree, row.model, draws=4)
    assert all(len(value) == 4 for value in thinned if value is not None)


def test_latents_are_the_mixture_over_draws():
    row = zoo.row("LDS-Gaussian")
    tree = zoo.fitted(row.name, "Laplace")
    parameters = parameters_of(tree, row.model, draws=30)
    law = collapse(row.model).path_posterior(parameters, row.recording)
    means, variances = law.mean.numpy(), law.variance.expand(law.mean.shape).numpy()
    latents = tree["latents"].to_dataset()
    np.testing.assert_allclose(latents["mean"], means.mean(0), rtol=1e-9, atol=1e-10)
    total = variances.mean(0) + means.var(0)  # the law of total variance
    np.testing.assert_allclose(np.square(latents["sd"]), total, rtol=1e-9, atol=1e-10)
    assert latents["draws"].dims == ("path_draw", "trial", "time", "latent") and latents.sizes["path_draw"] == 20
    spread = np.abs(latents["draws"] - latents["mean"]) / latents["sd"]
    assert float(spread.max()) < 6.0 and 0.3 < float(spread.mean()) < 1.3


def test_the_prediction_is_the_average_over_draws_and_paths():
    row = zoo.row("LDS-Poisson-inputs")
    tree, recording = zoo.fitted(row.name, "NUTS"), row.recording
    parameters = parameters_of(tree, row.model, draws=8)
    law = collapse(row.model).path_posterior(parameters, recording)
    torch.manual_seed(0)
    paths = law.expand(law.batch_shape).sample(torch.Size([4000]))
    rates = row.model.readout_law(parameters, paths, recording).mean  # (sample, draw, trial, time, unit)
    found = dyn.predict(tree, recording, draws=8)
    error = rates.std(0) / 4000**0.5
    gap = (torch.from_numpy(found["expected"].values) - rates.mean((0, 1))).abs()
    assert float((gap / error.square().mean(0).sqrt()).max()) < 6.0
    for name, (dims, value) in path_summary(law).items():
        assert found[name].dims == dims
        np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-10)
    assert found["expected"].attrs["units"] == "events per bin"


def test_hidden_entries_are_predicted_from_the_others_alone():
    row = zoo.row("LDS-Gaussian")
    tree, recording = zoo.fitted(row.name, "Laplace"), row.recording
    changed = recording.observations.numpy().copy()
    changed[:, :, 0] += 100.0
    hidden = [r.hide(unit=recording.unit[0]) for r in (recording, recording.with_observations(changed))]
    first, second = (dyn.predict(tree, r, draws=5) for r in hidden)
    np.testing.assert_array_equal(first["expected"], second["expected"])
    seen = dyn.predict(tree, recording.with_observations(changed), draws=5)
    assert not np.allclose(seen["expected"], first["expected"])


def test_long_recordings_are_predicted_in_parts(monkeypatch):
    row = zoo.row("LDS-Poisson-ragged-missing")
    tree, recording = zoo.fitted(row.name, "NUTS"), row.recording
    whole = dyn.predict(tree, recording, draws=5)
    monkeypatch.setattr("pyrodyn.posterior.BATCH_NUMBERS", 1)
    assert [part.num_trials for part in trial_batches(recording, 5)] == [1] * recording.num_trials
    parts = dyn.predict(tree, recording, draws=5)
    for name in ("expected", "path", "path_sd"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("total", "wanted"), [(1, 1), (1, 5), (10, 3), (10, 10), (7, 100), (1000, 20)])
def test_thinned_draws_are_spread_from_first_to_last(total, wanted):
    chosen = thinned(total, wanted)
    assert len(chosen) == min(total, wanted) and chosen[0] == 0 and (wanted == 1 or chosen[-1] == total - 1)
    assert len(chosen) < 3 or np.ptp(np.diff(chosen)) <= 1


# ---------------------------------------------------------------------------------------------- attributes, diagnostics


def test_attributes_say_how_it_was_made():
    row = zoo.row("LDS-Gaussian")
    tree = zoo.fitted(row.name, "SVI-structured")
    engine = json.loads(tree.attrs["engine"])
    assert engine["class"] == "SVI" and engine["steps"] == 4 and engine["guide"]["class"] == "Structured"
    assert json.loads(tree.attrs["model"])["readout"] == {"class": "Gaussian"}
    assert tree.attrs["seed"] == 0 and tree.attrs["wall_time_seconds"] > 0
    assert tree.attrs["path_treatment"] == "sampled by the structured guide"
    assert {"python", "torch", "pyro-ppl"} <= set(json.loads(tree.attrs["versions"]))
    loss = tree["sample_stats"]["loss"]
    assert loss.dims == ("step",) and len(loss) == 4 and bool(np.isfinite(loss).all())
    for key in ("notes", "diagnostics", "warnings"):
        json.loads(
            tree.attrs[key], parse_constant=lambda word, key=key: pytest.fail(f"{key} holds {word}, which is not JSON")
        )


def draws_of(row: zoo.Row, vectors: torch.Tensor, **options) -> Draws:
    """Draws as an engine would hand them on, from unconstrained vectors (chain, draw, dimension)."""
    density = LogDensity(collapse(row.model), row.recording)
    values = density.constrain(vectors)
    samples = {site.name: values[site.name].reshape(*vectors.shape[:2], *site.shape) for site in density.sites}
    return Draws(samples, "by hand", **options)


def around_the_start(row: zoo.Row, chains: int, draws: int, apart: float = 0.0) -> torch.Tensor:
    density = LogDensity(collapse(row.model), row.recording)
    start = density.unconstrain(row.model.initial_values(row.recording))
    noise = torch.randn(chains, draws, len(start), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return start + 0.1 * noise + apart * torch.arange(chains).reshape(-1, 1, 1)


def test_chains_that_disagree_are_reported_and_chains_that_agree_are_not():
    row = zoo.row("LDS-Gaussian")
    with pytest.warns(dyn.FitWarning, match="R-hat of the invariants reaches"):
        tree = to_datatree(row.model, row.recording, inference.NUTS(), draws_of(row, around_the_start(row, 2, 50, 1.0)),
                           seed=0, seconds=1.0)  # fmt: skip
    assert any("R-hat" in complaint for complaint in json.loads(tree.attrs["warnings"]))
    assert json.loads(tree.attrs["diagnostics"])["max_r_hat"] > 1.05
    quiet = to_datatree(row.model, row.recording, inference.NUTS(), draws_of(row, around_the_start(row, 2, 200)),
                        seed=0, seconds=1.0)  # fmt: skip
    assert json.loads(quiet.attrs["warnings"]) == [] and json.loads(quiet.attrs["diagnostics"])["max_r_hat"] < 1.05


def test_chains_in_different_gauges_agree_on_the_invariants():
    """What tells two chains apart must not be a rotation of the latents."""
    row = zoo.row("LDS-Gaussian")
    parameters = globals_given(row.model, zoo.prior_draws(row.model, row.recording, (2000,)), row.recording)
    turned = row.model.transformed(parameters, row.recording, 3)
    both = {}
    for name, (dims, value) in row.model.invariants(parameters).items():
        other = row.model.invariants(turned)[name][1]
        stacked = torch.stack([value.expand(2000, *value.shape[1:]), other.expand(2000, *value.shape[1:])]).squeeze(2)
        both[name] = (("chain", "draw", *dims), stacked.numpy())
    found = diagnose(xr.Dataset(both), xr.Dataset())
    assert found.values["max_r_hat"] <= 1.01 and found.complaints == ()


def test_the_engines_own_warnings_reach_the_user_and_the_file(tmp_path):
    row = zoo.row("LDS-Gaussian")
    draws = draws_of(row, around_the_start(row, 1, 5), warnings=("NUTS: 3 of 5 draws diverged",))
    with pytest.warns(dyn.FitWarning, match="3 of 5 draws diverged"):
        tree = to_datatree(row.model, row.recording, inference.NUTS(), draws, seed=0, seconds=1.0)
    loaded = dyn.load(dyn.save(tree, tmp_path / "fit.nc"))
    assert "NUTS: 3 of 5 draws diverged" in json.loads(loaded.attrs["warnings"])


# ---------------------------------------------------------------------------------------------- errors


def test_wrong_arguments_of_fit_are_named():
    row = zoo.row("LDS-Gaussian")
    with pytest.raises(RecordingError, match="recording must be a pyrodyn.Recording, got ndarray"):
        dyn.fit(row.model, np.zeros((2, 3, 4)))
    with pytest.raises(RecordingError, match="no observations to fit"):
        dyn.fit(row.model, row.like())
    with pytest.raises(ModelError, match="got Levels|got str|got object"):
        to_datatree(
            object(), row.recording, inference.NUTS(), draws_of(row, around_the_start(row, 1, 2)), seed=0, seconds=0.0
        )


def test_prediction_needs_the_units_it_was_fitted_to():
    tree, recording = zoo.fitted("LDS-Gaussian", "Laplace"), zoo.row("LDS-Gaussian").recording
    with pytest.raises(
        RecordingError, match=r"fitted to 4 units and the recording has 3; without \['0'\].*recording.hide"
    ):
        dyn.predict(tree, recording.isel(unit=[1, 2, 3]))
    with pytest.raises(RecordingError, match="in another order"):
        dyn.predict(tree, recording.isel(unit=[1, 0, 2, 3]))
    with pytest.raises(ModelError, match="fitted with 'LDS2', which is not in pyrodyn.models.*model="):
        dyn.predict(_renamed(tree.copy()), recording)


def _renamed(tree: xr.DataTree) -> xr.DataTree:
    tree.attrs["model"] = tree.attrs["model"].replace('"LDS"', '"LDS2"')
    return tree


def test_a_posterior_rebuilds_only_what_is_in_the_zoo():
    tree = xr.DataTree()
    for name in ("os.system", "Path", "AffineReadout", "Readout"):
        tree.attrs["model"] = json.dumps({"class": name, "latent_dim": 1})
        with pytest.raises((ModelError, TypeError)):
            dyn.model_of(tree)


def test_any_recording_is_stored_with_its_labels():
    rng = np.random.default_rng(0)
    recording = Recording.from_arrays(
        rng.poisson(2.0, size=(3, 6, 2)), bin_width=0.05, unit=["a", "b"], region=["V1", "V2"], trial=[7, 8, 9],
        condition=["x", "y", "x"], split=["train", "train", "test"], lengths=[6, 5, 6], session="monday",
        behaviour=rng.normal(size=(3, 6, 1)), inputs=rng.normal(size=(3, 6, 1)), heldout=[False, True],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        tree = dyn.fit(models.LDS(1, readouts.Poisson()), recording, inference.Laplace(draws=5), seed=0)
    back = dyn.recording_of(tree)
    assert back.digest() == recording.digest()
    assert list(back.condition) == ["x", "y", "x"] and back.session == "monday" and list(back.trial) == [7, 8, 9]


def test_expected_counts_beyond_belief_are_complained_of():
    """A unit that bursts makes its rate log-normal with a heavy tail, where nothing but its own counts tells of it."""
    rng = np.random.default_rng(0)
    burst = np.repeat(rng.random((6, 8)) < 0.15, 5, axis=1)
    counts = rng.poisson(np.where(burst[..., None], [6.0, 0.3, 0.3], [0.001, 0.3, 0.3]))
    recording = dyn.Recording.from_arrays(counts, bin_width=0.02, unit=["bursting", "steady", "other"])
    posterior = dyn.fit(models.LDS(1), recording, inference.Laplace(draws=50), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dyn.predict(posterior, recording)  # seen, it is no riddle
    shifted = posterior.copy(deep=True)
    shifted["posterior"]["loading"].loc[{"unit": "bursting"}] *= 2.0
    with pytest.warns(dyn.FitWarning, match=r"in units bursting \(\d+\).*NegativeBinomial"):
        dyn.predict(shifted, recording.hide(unit="bursting"))
