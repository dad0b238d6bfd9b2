"""What the pictures of modes show are the posterior's own numbers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import xarray as xr
from _figures import leave_nothing
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.patches import FancyArrowPatch

import pyrodyn as dyn
from pyrodyn import inference, models, plots, systems
from pyrodyn.checks import replicated_latents
from pyrodyn.plots.panels import COLOURS
from pyrodyn.statistics import dwells, survival

BIN = 0.05
LENGTHS = (30, 18, 30, 25)


def fitted(model, recording: dyn.Recording, engine) -> xr.DataTree:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)  # a handful of draws cannot have converged
        return dyn.fit(model, recording, engine, seed=1)


@pytest.fixture(scope="module")
def levels() -> xr.DataTree:
    """Three levels of activity in four ragged trials of three units."""
    rng = np.random.default_rng(0)
    modes = np.repeat(rng.integers(3, size=(4, 10)), 3, axis=1)
    counts = rng.poisson(np.array([[1, 1, 6], [6, 1, 1], [1, 6, 1]])[modes])
    recording = dyn.Recording.from_arrays(counts, bin_width=BIN, lengths=LENGTHS, trial=[5, 6, 7, 8])
    return fitted(models.HMM(3), recording, inference.Laplace(draws=60))


@pytest.fixture(scope="module")
def attention() -> xr.DataTree:
    rng = np.random.default_rng(1)
    counts = rng.poisson(np.exp(0.4 * np.repeat([1, -1], 40))[None, :, None] * np.ones((2, 80, 8)))
    recording = dyn.Recording.from_arrays(counts, bin_width=BIN)
    return fitted(models.GainHMM(), recording, inference.SVI(steps=20, draws=30))


@pytest.fixture(scope="module")
def switching() -> xr.DataTree:
    """Three latents, so that a plane has to be chosen."""
    recording = systems.switching_rotations(modes=2, units=12, trials=2, bins=80, dwell=20.0, seed=0).recording
    return fitted(models.SwitchingLDS(2, 3), recording, inference.Gibbs(draws=12, warmup=5, chains=2))


@pytest.fixture(scope="module")
def observed() -> xr.DataTree:
    """The track seen as it is: observations are the path."""
    truth = systems.nascar(bins=300, seed=0).truth
    recording = dyn.Recording.from_arrays(
        10.0 + 3.0 * truth["latents"].values, bin_width=BIN, counts=False, unit=["x", "y"]
    )
    return fitted(models.ARHMM(4, recurrent=True), recording, inference.Gibbs(draws=12, warmup=5, chains=2))


# ---------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize(("chosen", "window"), [(None, None), ([7, 6], (0.2, 1.1))])
def test_raster_fades_where_modes_are_not_told_apart(levels: xr.DataTree, chosen, window) -> None:
    figure = plots.mode_raster(levels, trials=chosen, window=window)
    raster, mean = figure.axes
    image = np.asarray(raster.collections[0].get_array())
    probability = levels["latents"]["mode_probability"].values
    trials = [label - 5 for label in chosen or [5, 6, 7, 8]]
    bins = range(30) if window is None else range(4, 22)
    total, alive = np.zeros((len(bins), 3)), np.zeros(len(bins))
    for row, trial in enumerate(trials):
        for column, t in enumerate(bins):
            if t >= LENGTHS[trial]:
                assert np.allclose(image[row, column], to_rgb("#E8E8E8"))
                continue
            p = probability[trial, t]
            best = int(np.argmax(p))
            faded = [1.0 - (p[best] - 1 / 3) / (2 / 3) * (1.0 - part) for part in to_rgb(COLOURS[best])]
            assert np.allclose(image[row, column], faded)
            total[column] += p
            alive[column] += 1
    height = (total / alive[:, None]).cumsum(1)
    for k, area in enumerate(mean.collections):
        assert np.allclose(area.get_facecolor()[0], to_rgba(COLOURS[k]))
        corners = area.get_paths()[0].vertices
        assert corners[:, 1].max() == pytest.approx(height[:, k].max())
        assert corners[:, 0].min() == pytest.approx(bins[0] * BIN)
        assert corners[:, 0].max() == pytest.approx((bins[-1] + 1) * BIN)
    assert height[:, 2] == pytest.approx(1.0)
    assert 0.5 < probability.max(-1).mean() < 0.999  # not a trivial case


def test_modes_of_any_model_have_a_raster(attention, switching, observed) -> None:
    for posterior, modes in ((attention, 2), (switching, 2), (observed, 4)):
        figure = plots.mode_raster(posterior)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(k) for k in range(modes)]


def test_many_modes_have_many_colours(levels: xr.DataTree) -> None:
    tree = levels.copy()
    share = np.eye(9)[np.arange(30) % 9][None].repeat(4, 0)
    coords = {"trial": [5, 6, 7, 8], "time": levels["latents"]["time"].values, "mode": np.arange(9)}
    tree["latents"] = xr.DataTree(xr.Dataset({"mode_probability": (("trial", "time", "mode"), share)}, coords))
    image = np.asarray(plots.mode_raster(tree, trials=[5]).axes[0].collections[0].get_array())
    assert len(np.unique(image.reshape(-1, 3), axis=0)) == 9


# ---------------------------------------------------------------------------------------------- where to


def flow_of(panel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    arrows = panel.collections[2]
    return np.asarray(arrows.get_offsets()), np.stack([arrows.U, arrows.V], -1), arrows.get_facecolor()[:, 3]


def test_arrows_are_the_mean_drift_and_fade_where_draws_disagree(observed: xr.DataTree) -> None:
    figure = plots.mode_flows(observed)
    dynamics = observed["posterior"]["dynamics"].values[:, :, :, 0].reshape(-1, 4, 2, 2)
    bias = observed["posterior"]["bias"].values.reshape(-1, 4, 2)
    path = (observed["observed_data"]["observations"] - observed["constant_data"]["center"]).values[0]
    path = path / observed["constant_data"]["scale"].values
    modes = observed["latents"]["mode_probability"].values[0].argmax(-1)
    assert len(figure.axes) == 4
    for k, panel in enumerate(figure.axes):
        places, arrows, opacity = flow_of(panel)
        each = np.array([[a[k] @ x + b[k] - x for x in places] for a, b in zip(dynamics, bias, strict=True)])
        assert np.allclose(arrows, each.mean(0))
        agreement = np.linalg.norm(each.mean(0), axis=-1) / np.linalg.norm(each, axis=-1).mean(0)
        assert np.allclose(opacity, 0.12 + 0.88 * agreement)
        rest, own = (part.get_segments() for part in panel.collections[:2])
        expected = [path[t - 1 : t + 1] for t in range(1, 300) if modes[t] == k]
        assert len(own) == len(expected) and len(rest) == 299 - len(own)
        assert np.allclose(own, expected)
    assert figure.axes[0].figure.get_supxlabel() == "unit x"


def test_more_latents_are_seen_in_the_plane_of_the_path(switching: xr.DataTree) -> None:
    figure = plots.mode_flows(switching)
    path = switching["latents"]["mean"].values.reshape(-1, 3)
    values, vectors = np.linalg.eigh(np.cov(path.T))
    plane = vectors[:, np.argsort(values)[::-1][:2]]
    for panel in figure.axes[:2]:
        segments = np.concatenate([np.reshape(part.get_segments(), (-1, 2, 2)) for part in panel.collections[:2]])
        ends = np.abs(segments.reshape(-1, 2))
        shown = np.abs((path - path.mean(0)) @ plane)
        for corner in ends[:: len(ends) // 20]:
            assert np.abs(shown - corner).max(1).min() < 1e-9
    turn = np.linalg.lstsq((path - path.mean(0)) @ plane, _points(figure, path), rcond=None)[0]
    places, arrows, _ = flow_of(figure.axes[0])
    dynamics = switching["posterior"]["dynamics"].values[:, :, 0].reshape(-1, 3, 3).mean(0)
    bias = switching["posterior"]["bias"].values[:, :, 0].reshape(-1, 3).mean(0)
    axes = plane @ turn  # the picture's own signs
    for place, arrow in zip(places, arrows, strict=True):
        state = path.mean(0) + axes @ place
        assert np.allclose(axes.T @ (dynamics @ state + bias - state), arrow)


def _points(figure, path: np.ndarray) -> np.ndarray:
    """Where the picture puts the bins of the path: every step stands in the panels of its mode or of another."""
    panel = figure.axes[0]
    steps = [segment for part in panel.collections[:2] for segment in part.get_segments()]
    centred = path - path.mean(0)
    length = np.linalg.norm(np.diff(centred.reshape(2, -1, 3), axis=1), axis=-1)
    assert len(steps) == length.size
    known = {}
    basis = np.linalg.svd(centred, full_matrices=False)[2][:2].T
    for a, b in steps:
        for end in (a, b):
            distance = np.abs(np.abs(centred @ basis) - np.abs(end)).max(1)
            known[int(distance.argmin())] = end
    return np.array([known[i] for i in range(len(path))])


# ---------------------------------------------------------------------------------------------- how long


def test_visits_and_their_survival_by_hand() -> None:
    modes = np.array([[0, 0, 1, 1, 1, 0, 9, 9], [1, 0, 0, 0, 0, 0, 0, 1]])
    visited, bins, ended = dwells(modes, np.array([6, 8]))
    assert visited.tolist() == [0, 1, 0, 1, 0, 1]
    assert bins.tolist() == [2, 3, 1, 1, 6, 1]
    assert ended.tolist() == [True, True, False, True, True, False]
    # Mode 0: three visits last one bin or more and none ends then; one of two ends after two; the last after six.
    zero = visited == 0
    assert survival(bins[zero], ended[zero], 7) == pytest.approx([1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0])


def test_survival_of_a_markov_chain_is_geometric() -> None:
    rng = np.random.default_rng(0)
    modes = np.zeros((1000, 20), int)  # trials as short as visits: most are cut
    for t in range(1, 20):
        modes[:, t] = np.where(rng.random(1000) < 0.9, modes[:, t - 1], 1 - modes[:, t - 1])
    visited, bins, ended = dwells(modes, np.full(1000, 20))
    found = survival(bins[visited == 0], ended[visited == 0], 15)
    expected = 0.9 ** np.arange(16)
    error = np.sqrt(expected * (1.0 - expected) / (visited == 0).sum())
    assert (np.abs(found - expected) < 4.0 * error + 1e-12).all()
    naive = (bins[visited == 0][:, None] > np.arange(16)).mean(0)  # as if trials did not end
    assert np.abs(naive - expected)[10] > 4.0 * error[10]


@pytest.mark.parametrize("name", ["levels", "attention", "switching", "observed"])
def test_simulated_modes_follow_the_posterior(name: str, request: pytest.FixtureRequest) -> None:
    posterior = request.getfixturevalue(name)
    found = replicated_latents(posterior, draws=20, seed=2)["mode_path"]
    assert found.dims == ("replicate", "trial", "time")
    assert found.shape[1:] == posterior["latents"]["mode_probability"].shape[:2]
    modes = posterior["latents"].sizes["mode"]
    assert set(np.unique(found)) <= set(range(modes))
    if "recurrence" in posterior["posterior"].data_vars:
        return  # transitions have no closed form
    draws = posterior["posterior"].sizes["chain"] * posterior["posterior"].sizes["draw"]
    chosen = np.linspace(0, draws - 1, 20).round().astype(int)
    rows = posterior["posterior"]["transition"].values.reshape(draws, modes, modes)[chosen]
    before, after = found.values[..., :-1], found.values[..., 1:]
    chance = np.stack([row[path] for row, path in zip(rows, before, strict=True)])
    score = (np.eye(modes)[after] - chance).sum((0, 1, 2)) / np.sqrt((chance * (1.0 - chance)).sum((0, 1, 2)))
    assert np.abs(score).max() < 4.0


def test_dwell_times_inferred_and_simulated(levels: xr.DataTree) -> None:
    figure = plots.dwell_times(levels)
    drawn = levels["latents"]["mode_path_draws"].values
    for k, panel in enumerate(figure.axes):
        lasting, leaving, seen = [], 0, 0
        for paths in drawn:
            bins, ended = [], []
            for path, length in zip(paths, LENGTHS, strict=True):
                run = 0
                for t in range(length):
                    run += path[t] == k
                    last = t == length - 1
                    if path[t] == k and (last or path[t + 1] != k):
                        bins.append(run)
                        ended.append(not last)
                        run = 0
            lasting.append((np.array(bins), np.array(ended)))
            leaving += sum(ended)
            seen += sum(bins)
        (line,) = panel.lines
        rate = np.log(line.get_ydata()[1] / line.get_ydata()[0]) / (line.get_xdata()[1] / BIN)
        assert rate == pytest.approx(np.log(1.0 - leaving / seen))
        simulated, inferred = panel.collections
        assert np.allclose(inferred.get_facecolor()[0, :3], to_rgb(COLOURS[k]))
        corners = inferred.get_paths()[0].vertices
        at = 2
        share = [survival(bins, ended, 10)[at] for bins, ended in lasting]
        heights = corners[np.isclose(corners[:, 0], at * BIN), 1]
        assert [heights.min(), heights.max()] == pytest.approx(list(np.quantile(share, (0.05, 0.95))))
        assert simulated.get_paths()[0].vertices[:, 1].max() == 1.0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["simulated", "inferred", "geometric"]


def test_a_mode_that_is_never_visited_is_said_to_be(levels: xr.DataTree) -> None:
    tree = levels.copy()
    latents = levels["latents"].to_dataset()
    latents["mode_path_draws"] = latents["mode_path_draws"].where(latents["mode_path_draws"] != 1, 0)
    tree["latents"] = xr.DataTree(latents)
    panel = plots.dwell_times(tree).axes[1]
    assert panel.texts[0].get_text() == "never visited" and not panel.lines
    graph = plots.transition_graph(tree).axes[0]
    assert not any("1" in str(arrow.get_label()) for arrow in graph.patches)
    assert graph.collections[0].get_sizes()[1] == pytest.approx(160.0)


# ---------------------------------------------------------------------------------------------- what follows


def test_arrows_of_the_graph_are_shares_of_the_ways_out(levels: xr.DataTree) -> None:
    axes = plots.transition_graph(levels).axes[0]
    drawn = levels["latents"]["mode_path_draws"].values
    leaving, time = np.zeros((3, 3)), np.zeros(3)
    for paths in drawn:
        for path, length in zip(paths, LENGTHS, strict=True):
            for t in range(length):
                time[path[t]] += 1
                if t + 1 < length and path[t + 1] != path[t]:
                    leaving[path[t], path[t + 1]] += 1
    shares = leaving / leaving.sum(1, keepdims=True)
    arrows = {str(a.get_label()): a for a in axes.patches if isinstance(a, FancyArrowPatch)}
    assert set(arrows) == {f"{j} → {k}" for j, k in np.argwhere(shares >= 0.02)}
    for j, k in np.argwhere(shares >= 0.02):
        arrow = arrows[f"{j} → {k}"]
        assert arrow.get_linewidth() == pytest.approx(6.0 * shares[j, k])
        assert arrow.get_edgecolor()[:3] == pytest.approx(to_rgb(COLOURS[j]))
    sizes = axes.collections[0].get_sizes()
    assert sizes == pytest.approx(160.0 + 940.0 * time / time.max())
    texts = [text.get_text() for text in axes.texts]
    assert f"mode 0\n{BIN * time[0] / leaving[0].sum():.2g} s" in texts
    assert f"{shares[0, 1]:.2f}" in texts


# ---------------------------------------------------------------------------------------------- manners


def test_nothing_is_left_in_matplotlib(observed: xr.DataTree) -> None:
    leave_nothing(
        lambda: plots.mode_raster(observed),
        lambda: plots.mode_flows(observed),
        lambda: plots.dwell_times(observed),
        lambda: plots.transition_graph(observed),
    )


def cut(posterior: xr.DataTree, group: str, change) -> xr.DataTree:
    """The posterior with one group changed."""
    tree = posterior.copy()
    tree[group] = xr.DataTree(change(posterior[group].to_dataset()))
    return tree


MISSING = [
    ("levels", lambda p: plots.mode_raster(p, trials=[99]), "trials: there is no trial 99.*5, 6, 7, 8"),
    ("levels", lambda p: plots.mode_raster(p, window=(9.0, 10.0)), r"window: \(9.0, 10.0\) s holds fewer than two"),
    ("levels", plots.mode_flows, "no 'dynamics' in group 'posterior'"),
    (
        "switching",
        lambda p: plots.mode_flows(cut(p, "posterior", lambda d: d.isel(mode=0))),
        "its dynamics have no modes",
    ),
    (
        "switching",
        lambda p: plots.mode_flows(cut(p, "posterior", lambda d: d.isel(latent=[0], latent_from=[0]))),
        "has one latent",
    ),
    (
        "observed",
        lambda p: plots.mode_flows(cut(p, "posterior", lambda d: xr.concat([d, d], "lag", data_vars=["dynamics"]))),
        "dynamics of 2 lags",
    ),
] + [
    ("levels", lambda p, draw=draw: draw(p.drop_nodes("latents")), f"no '{name}' in group 'latents'")
    for draw, name in (
        (plots.mode_raster, "mode_probability"),
        (plots.dwell_times, "mode_path_draws"),
        (plots.transition_graph, "mode_path_draws"),
    )
]


@pytest.mark.parametrize(("name", "draw", "message"), MISSING)
def test_errors_name_what_is_missing(name: str, draw, message: str, request) -> None:
    with pytest.raises(ValueError, match=message):
        draw(request.getfixturevalue(name))
