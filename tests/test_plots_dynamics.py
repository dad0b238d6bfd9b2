"""Rates beside spikes, trajectories, inputs, flows and forecasts: what is drawn are the posterior's own numbers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import xarray as xr
import zoo
from _figures import leave_nothing

import pyrodyn as dyn
from pyrodyn import plots
from pyrodyn.evaluation import fixed_points
from pyrodyn.posterior import parameters_of

BIN = 0.05
LENGTHS = [12, 9, 12, 11]
CONDITIONS = ["left", "right", "left", "right"]


def recording() -> dyn.Recording:
    rng = np.random.default_rng(5)
    slow = np.cumsum(rng.normal(size=(4, 12, 1)), 1) * 0.4
    values = rng.poisson(np.exp(0.5 * slow * np.array([1.0, -1.0, 0.5, 0.8]))).astype(float)
    return dyn.Recording.from_arrays(
        values, bin_width=BIN, unit=["a", "b", "c", "d"], region=["V1", "V2", "V1", "V2"], trial=[10, 11, 12, 13],
        lengths=LENGTHS, condition=CONDITIONS, counts=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def spikes() -> xr.DataTree:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        return dyn.fit(dyn.models.LDS(3), recording(), dyn.inference.SVI(steps=20, draws=10), seed=3)


@pytest.fixture(scope="module")
def driven() -> xr.DataTree:
    return zoo.fitted("LFADS-Poisson-controller-inputs-missing", "SVI")


@pytest.fixture(scope="module")
def flowing() -> xr.DataTree:
    return zoo.fitted("NeuralSDE-Poisson-MLP-ragged", "NaturalGradient")


def heat(collection) -> np.ndarray:
    return np.ma.filled(collection.get_array(), np.nan)


def edges_of(collection) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge of what fill_between drew."""
    vertices = collection.get_paths()[0].vertices
    ends = [np.sort(vertices[vertices[:, 0] == time, 1])[[0, -1]] for time in np.unique(vertices[:, 0])]
    return np.array(ends)[:, 0], np.array(ends)[:, 1]


def plane_of(states: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Coordinates in the first two principal components, with the signs that a picture gave to ``points``."""
    centred = states - states.mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    plane = vectors[:, np.argsort(values)[::-1][:2]]
    return plane * np.sign((centred[: len(points)] @ plane * points).sum(0))


def test_rates_stand_beside_the_spikes_of_the_same_units(spikes: xr.DataTree) -> None:
    figure = plots.raster(spikes, trial=11, draws=5)
    left, right = figure.axes
    rows = ["a", "c", "b", "d"]
    counts = recording().to_xarray()["observations"].sel(trial=11, unit=rows).values[:9]
    assert np.array_equal(heat(left.collections[0]), counts.T)
    expected = dyn.predict(spikes, recording().sel(trial=[11]), draws=5)["expected"].sel(trial=11, unit=rows)
    assert np.allclose(heat(right.collections[0]), expected.values[:9].T / BIN)
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim() == (4.0, 0.0)


def test_signals_stand_beside_what_is_expected_of_them_in_their_own_sd() -> None:
    tree = zoo.fitted("LDS-Gaussian", "SVI")
    data = dyn.recording_of(tree)
    figure = plots.raster(tree, draws=5)
    expected = dyn.predict(tree, data.isel(trial=[0]), draws=5)["expected"].values[0]
    assert np.allclose(heat(figure.axes[1].collections[0]), ((expected - data.center.numpy()) / data.scale.numpy()).T)


def test_trajectories_are_mean_paths_in_the_plane_of_their_components(spikes: xr.DataTree) -> None:
    figure = plots.trajectories(spikes)
    (axes,) = figure.axes
    paths = [spikes["latents"]["mean"].values[i, :length] for i, length in enumerate(LENGTHS)]
    every = np.concatenate(paths)
    lines = [np.stack(line.get_data(), -1) for line in axes.lines]
    plane = plane_of(every, lines[0])
    points = [(path - every.mean(0)) @ plane for path in paths]
    for place, (trials, shortest) in enumerate((((0, 2), 12), ((1, 3), 9))):
        own = lines[4 * place : 4 * place + 4]
        for drawn, trial in zip(own, trials, strict=False):
            assert np.allclose(drawn, points[trial])
        mean = (points[trials[0]][:shortest] + points[trials[1]][:shortest]) / 2
        assert np.allclose(own[2], mean) and np.allclose(own[3], mean[0])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["left", "right"]


def test_inferred_inputs_with_their_size_in_every_trial(driven: xr.DataTree) -> None:
    latents = driven["latents"].to_dataset()
    mean, sd = (latents[f"inferred_inputs{end}"].values for end in ("", "_sd"))
    lengths = driven["constant_data"].to_dataset()["length"].values
    trials = latents["trial"].values.tolist()
    figure = plots.inferred_inputs(driven, trials=trials[1:])
    left, *panels = (axes for axes in figure.axes if axes.get_label() != "<colorbar>")
    drawn = heat(left.collections[0])
    for trial, length in enumerate(lengths):
        assert np.allclose(drawn[trial, :length], np.linalg.norm(mean[trial, :length], axis=-1))
        assert np.isnan(drawn[trial, length:]).all()
    assert len(panels) == len(trials) - 1
    for panel, trial in zip(panels, range(1, len(trials)), strict=True):
        for k in range(mean.shape[-1]):
            level, spread = mean[trial, : lengths[trial], k], sd[trial, : lengths[trial], k]
            assert np.allclose(panel.lines[k].get_ydata(), level)
            lower, upper = edges_of(panel.collections[k])
            assert np.allclose(lower, level - 1.645 * spread) and np.allclose(upper, level + 1.645 * spread)


def test_arrows_are_the_mean_flow_and_circles_its_fixed_points(flowing: xr.DataTree) -> None:
    figure = plots.flow_field(flowing)
    (axes,) = figure.axes
    model = dyn.model_of(flowing)
    path = flowing["latents"]["mean"]
    lengths = flowing["constant_data"].to_dataset()["length"].values
    every = np.concatenate([path.values[i, :length] for i, length in enumerate(lengths)])
    dim = path.sizes["latent"]
    first = np.stack(axes.lines[0].get_data(), -1)
    plane = np.eye(2) if dim == 2 else plane_of(every, first)
    centre = np.zeros(2) if dim == 2 else every.mean(0)
    assert np.allclose(first, (path.values[0, : lengths[0]] - centre) @ plane)
    (arrows,) = (part for part in axes.collections if type(part).__name__ == "Quiver")
    places = np.stack([arrows.X, arrows.Y], -1)
    parameters = parameters_of(flowing, model, 50)
    with torch.no_grad():
        each = np.stack(
            [
                model.flow(parameters)(torch.from_numpy(centre + place @ plane.T).expand(30, 1, -1))[:, 0].numpy()
                for place in places
            ]
        )  # (place, draw, latent)
    assert np.allclose(np.stack([arrows.U, arrows.V], -1), each.mean(1) @ plane)
    flow = each @ plane
    agreement = np.linalg.norm(flow.mean(1), axis=-1) / np.linalg.norm(flow, axis=-1).mean(1)
    assert np.allclose(arrows.get_facecolor()[:, 3], 0.12 + 0.88 * agreement)
    found = fixed_points(flowing, draws=50)
    circles = [np.ravel(line.get_data()) for line in axes.lines if line.get_markersize() == 7.0]
    assert len(circles) == found.sizes["fixed_point"] > 0
    assert np.allclose(circles, (found["location"].values - centre) @ plane)


def test_a_forecast_sees_nothing_of_what_it_forecasts(spikes: xr.DataTree) -> None:
    figure = plots.forecast(spikes, recording(), start=7 * BIN, units=["d", "a"], trial=12, draws=6)
    hidden = recording().sel(trial=[12]).hide(time=np.arange(7, 12) * BIN)
    found = dyn.predict(spikes, hidden, draws=6).sel(trial=12)
    counts = recording().to_xarray()["observations"].sel(trial=12)
    assert len(figure.axes) == 2
    for panel, unit in zip(figure.axes, ["d", "a"], strict=True):
        own = found.sel(unit=unit) / BIN
        seen, level, now = panel.lines
        assert np.array_equal(seen.get_ydata(), counts.sel(unit=unit).values / BIN)
        assert np.allclose(level.get_ydata(), own["expected"]) and now.get_xdata()[0] == 7 * BIN
        lower, upper = edges_of(panel.collections[0])
        assert np.allclose(lower, own["expected_lower"]) and np.allclose(upper, own["expected_upper"])
        lower, upper = edges_of(panel.collections[1])
        assert np.allclose(upper - lower, 2.0 * own["expected_sd"])
    changed = recording().to_xarray()["observations"].fillna(0.0).values
    changed[:, 7:] += 5.0
    other = plots.forecast(
        spikes, recording().with_observations(changed), start=7 * BIN, units=["d"], trial=12, draws=6
    )
    assert np.array_equal(other.axes[0].lines[1].get_ydata(), figure.axes[0].lines[1].get_ydata())


def test_nothing_is_left_in_matplotlib(spikes: xr.DataTree, driven: xr.DataTree, flowing: xr.DataTree) -> None:
    leave_nothing(
        lambda: plots.raster(spikes, draws=4),
        lambda: plots.trajectories(spikes),
        lambda: plots.inferred_inputs(driven),
        lambda: plots.flow_field(flowing),
        lambda: plots.forecast(spikes, recording(), start=7 * BIN, draws=4),
    )


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda p: plots.raster(p, trial=99), "trials: there is no trial 99.*10, 11, 12"),
        (lambda p: plots.inferred_inputs(p), "no 'inferred_inputs' in group 'latents'"),
        (lambda p: plots.flow_field(p), "LDS declares no flow"),
        (lambda p: plots.forecast(p, recording(), start=9.0), "no bin to forecast; bins begin at 0 to 0.55 s"),
        (lambda p: plots.forecast(p, recording(), start=0.0), "no bin to forecast from"),
        (lambda p: plots.forecast(p, recording(), start=0.3, units=["z"]), "units: 'z' is not in the recording"),
        (lambda p: plots.trajectories(p.drop_nodes("latents")), "no 'mean' in group 'latents'"),
    ],
)
def test_errors_name_what_is_missing(spikes: xr.DataTree, draw, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(spikes)
