"""What is drawn are the posterior's own numbers, and nothing is left behind in matplotlib."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import xarray as xr
from _figures import leave_nothing

import pyrodyn as dyn
from pyrodyn import plots

BIN = 0.05
LENGTHS = (12, 9, 12)


def recording(counts: bool) -> dyn.Recording:
    """Three ragged trials, units of two regions that take turns, one hidden entry."""
    rng = np.random.default_rng(5)
    slow = np.cumsum(rng.normal(size=(3, 12, 1)), 1) * 0.4
    values = slow * np.array([1.0, -1.0, 0.5, 0.8])
    values = rng.poisson(np.exp(0.5 * values)) if counts else values + rng.normal(size=values.shape)
    return dyn.Recording.from_arrays(
        values.astype(float),
        bin_width=BIN,
        unit=["a", "b", "c", "d"],
        region=["V1", "V2", "V1", "V2"],
        trial=[10, 11, 12],
        lengths=LENGTHS,
        counts=counts,
    ).hide(trial=10, time=[0.0], unit="c")


def fitted(counts: bool, engine) -> xr.DataTree:
    readout = dyn.readouts.Poisson() if counts else dyn.readouts.Gaussian()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)  # a handful of draws cannot have converged
        return dyn.fit(dyn.models.LDS(latent_dim=2, readout=readout), recording(counts), engine, seed=3)


@pytest.fixture(scope="module")
def signal() -> xr.DataTree:
    return fitted(False, dyn.inference.SVI(steps=30, draws=12))


@pytest.fixture(scope="module")
def spikes() -> xr.DataTree:
    return fitted(True, dyn.inference.NUTS(draws=5, warmup=3, chains=2, max_tree_depth=3))


def heat(axes) -> np.ndarray:
    return np.ma.filled(axes.collections[0].get_array(), np.nan)


def band(collection) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge of what fill_between drew."""
    vertices = collection.get_paths()[0].vertices
    times = np.unique(vertices[:, 0])
    edges = [np.sort(vertices[vertices[:, 0] == time, 1])[[0, -1]] for time in times]
    return np.array(edges)[:, 0], np.array(edges)[:, 1]


@pytest.mark.parametrize("chosen", [None, [12], [11, 10]])
def test_latents_beside_the_data(spikes: xr.DataTree, chosen: list[int] | None) -> None:
    figure = plots.latents(spikes, trials=chosen)
    trials = chosen or [10, 11, 12]
    assert len(figure.axes) == 2 * len(trials)
    counts = recording(True).to_xarray()["observations"]
    for column, trial in enumerate(trials):
        length = LENGTHS[trial - 10]
        data, paths = figure.axes[column], figure.axes[len(trials) + column]
        by_region = counts.sel(trial=trial, unit=["a", "c", "b", "d"]).values[:length]
        assert np.array_equal(heat(data), by_region.T, equal_nan=True)
        assert data.collections[0].get_clim() == figure.axes[0].collections[0].get_clim()
        for latent in (0, 1):
            line, drawn = paths.lines[latent], paths.collections[latent]
            mean, sd = (spikes["latents"][name].values[trial - 10, :length, latent] for name in ("mean", "sd"))
            assert np.array_equal(line.get_ydata(), mean)
            assert np.allclose(line.get_xdata(), (np.arange(length) + 0.5) * BIN)
            lower, upper = band(drawn)
            assert np.allclose(lower, mean - 1.645 * sd) and np.allclose(upper, mean + 1.645 * sd)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["V1", "V2"]
    assert figure.axes[-1].get_xlabel() == "time (s)"


def test_signals_are_shown_in_their_own_sd(signal: xr.DataTree) -> None:
    figure = plots.latents(signal, trials=[10])
    held = recording(False)
    scaled = ((held.observations - held.center) / held.scale).numpy()[0]
    scaled[0, 2] = np.nan
    assert np.allclose(heat(figure.axes[0]), scaled[:, [0, 2, 1, 3]].T, equal_nan=True)


@pytest.mark.parametrize("name", ["signal", "spikes"])
def test_eigenvalues_of_every_draw(name: str, request: pytest.FixtureRequest) -> None:
    posterior = request.getfixturevalue(name)
    figure = plots.eigenvalues(posterior)
    (axes,) = figure.axes
    points = np.asarray(axes.collections[0].get_offsets()).reshape(-1, 2, 2)  # (draw, latent, part)
    # Another route to them: the invariants of the posterior, and trace and determinant.
    moduli = posterior["invariants"]["eigenvalue_modulus"].values.reshape(-1, 2)
    assert np.allclose(np.sort(np.hypot(points[..., 0], points[..., 1])), np.sort(moduli))
    dynamics = posterior["posterior"]["dynamics"].values.reshape(-1, 2, 2)
    assert np.allclose(points[..., 0].sum(1), dynamics.trace(axis1=1, axis2=2))
    assert np.allclose(points[..., 1].sum(1), 0.0)
    circle = axes.lines[-1]
    assert np.allclose(np.hypot(circle.get_xdata(), circle.get_ydata()), 1.0)
    assert axes.get_aspect() == 1.0


def test_loss_and_its_running_mean(signal: xr.DataTree) -> None:
    figure = plots.trace(signal)
    (axes,) = figure.axes
    loss = signal["sample_stats"]["loss"].values
    steps, smooth = axes.lines
    assert np.array_equal(steps.get_ydata(), loss)
    assert np.allclose(smooth.get_ydata(), [loss[i : i + 25].mean() for i in range(6)])
    assert np.array_equal(smooth.get_xdata(), np.arange(25, 31))


def test_traces_by_chain(spikes: xr.DataTree) -> None:
    figure = plots.trace(spikes)
    modulus = spikes["invariants"]["eigenvalue_modulus"].values
    expected = [spikes["sample_stats"]["lp"].values, modulus[..., 0], modulus[..., 1]]
    assert len(figure.axes) == 4
    for axes, values in zip(figure.axes, expected, strict=False):
        assert np.array_equal([line.get_ydata() for line in axes.lines], values)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:2] == ["log density", "eigenvalue modulus [0]"]


@pytest.mark.parametrize(("name", "counts"), [("spikes", True), ("signal", False)])
def test_predicted_against_observed(name: str, counts: bool, request: pytest.FixtureRequest) -> None:
    posterior = request.getfixturevalue(name)
    prediction = dyn.predict(posterior, recording(counts), draws=6, seed=1)
    figure = plots.rates(posterior, prediction, units=["d", "a"], trial=12)
    calibration, *courses = figure.axes
    assert len(courses) == 2
    per_second = 1.0 / BIN if counts else 1.0
    word = "rate (spikes/s)" if counts else "signal (units of the recording)"
    assert calibration.get_xlabel() == f"predicted {word}"

    observed = recording(counts).to_xarray()["observations"].values
    pairs = sorted((e, o) for e, o in zip(prediction["expected"].values.flat, observed.flat, strict=True) if o == o)
    pairs = per_second * np.array(pairs)
    assert len(pairs) == 4 * sum(LENGTHS) - 1
    (container,) = calibration.containers
    x, y = container.lines[0].get_data()
    assert len(x) == 12
    sizes = [len(part) for part in np.array_split(pairs, 12)]
    assert np.allclose(np.average(x, weights=sizes), pairs[:, 0].mean())
    assert np.allclose(np.average(y, weights=sizes), pairs[:, 1].mean())
    assert np.allclose([x[0], y[0]], pairs[: sizes[0]].mean(0))
    lowest, highest = container.lines[2][0].get_segments()[0][:, 1]
    assert np.allclose(0.5 * (highest - lowest), pairs[: sizes[0], 1].std() / np.sqrt(sizes[0]))

    for axes, unit in zip(courses, ["d", "a"], strict=True):
        here = prediction.sel(trial=12, unit=unit)
        seen, predicted = axes.lines
        assert np.allclose(seen.get_ydata(), per_second * observed[2, :, "abcd".index(unit)])
        assert np.allclose(predicted.get_ydata(), per_second * here["expected"].values)
        lower, upper = band(axes.collections[0])
        assert np.allclose(lower, per_second * here["expected_lower"].values)
        assert np.allclose(upper, per_second * here["expected_upper"].values)


def test_rates_of_hidden_units_of_a_new_recording(spikes: xr.DataTree) -> None:
    new = recording(True).isel(trial=[1, 2])
    prediction = dyn.predict(spikes, new.hide(unit="b"), draws=4).sel(unit=["b"])
    figure = plots.rates(spikes, prediction, recording=new)
    assert len(figure.axes) == 2
    seen = new.to_xarray()["observations"].sel(unit="b").values[0] / BIN
    assert np.array_equal(figure.axes[1].lines[0].get_ydata(), seen, equal_nan=True)
    assert figure.axes[1].get_title(loc="left") == "unit b, trial 11"


def test_rates_predict_by_themselves(signal: xr.DataTree) -> None:
    figure = plots.rates(signal)
    prediction = dyn.predict(signal, dyn.recording_of(signal))
    liveliest = str(prediction["expected"].var(("trial", "time")).idxmax("unit").values)
    assert len(figure.axes) == 4
    assert np.allclose(figure.axes[1].lines[1].get_ydata(), prediction["expected"].sel(unit=liveliest).values[0])


def test_summary_overlays_the_engines(signal: xr.DataTree) -> None:
    other = fitted(False, dyn.inference.Laplace(draws=9))
    figure = plots.summary({"SVI": signal, "Laplace": other})
    data, *paths, circle, moduli = figure.axes
    assert len(paths) == 2
    assert heat(data).shape == (4, LENGTHS[0])
    for latent, axes in enumerate(paths):
        for line, posterior in zip(axes.lines, (signal, other), strict=True):
            assert np.array_equal(line.get_ydata(), posterior["latents"]["mean"].values[0, :, latent])
    assert [text.get_text() for text in paths[0].get_legend().get_texts()] == ["SVI", "Laplace"]
    for points, posterior in zip(circle.collections, (signal, other), strict=True):
        drawn = np.hypot(*np.asarray(points.get_offsets()).T)
        assert np.allclose(np.sort(drawn), np.sort(posterior["invariants"]["eigenvalue_modulus"].values.ravel()))
    for outline in moduli.patches:  # a density integrates to one: the area under the outline
        corners = outline.get_xy()
        steps = np.diff(corners[:, 0])
        assert np.isclose((steps * corners[:-1, 1])[steps > 0].sum(), 1.0)


def test_nothing_is_left_in_matplotlib(signal: xr.DataTree, spikes: xr.DataTree) -> None:
    leave_nothing(
        lambda: plots.latents(spikes),
        lambda: plots.eigenvalues(signal),
        lambda: plots.trace(signal),
        lambda: plots.rates(signal),
        lambda: plots.summary({"a": spikes}),
    )


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda p: plots.latents(p, trials=[99]), "trials: there is no trial 99.*10, 11, 12"),
        (lambda p: plots.rates(p, units=["z"]), "units: 'z' is not in the prediction.*'a', 'b'"),
        (lambda p: plots.rates(p, trial=99), "trial: 99 is not in the prediction"),
        (lambda p: plots.rates(p, dyn.predict(p, recording(True), draws=2), recording=recording(True).isel(trial=[0])),
         "recording: lacks trial 11, 12"),
        (lambda p: plots.summary({}), "posteriors: got none"),
        (lambda p: plots.latents(p.drop_nodes("latents")), "no 'mean' in group 'latents'"),
        (lambda p: plots.eigenvalues(p.drop_nodes("posterior")), "no 'dynamics' in group 'posterior'"),
    ],
)  # fmt: skip
def test_errors_name_what_is_missing(spikes: xr.DataTree, draw, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(spikes)
