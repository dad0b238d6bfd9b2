"""Every measure of an edge against another route to it, and its indifference to latent coordinates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import xarray as xr
from _coupling import BIN, DIMS, changed, mapped, random_posterior, with_posterior, with_presence
from scipy.special import expit

import pyrodyn as dyn
from pyrodyn.coupling import aligned_dynamics, coupling_graph, savage_dickey
from pyrodyn.coupling.presence import mean_log_odds
from pyrodyn.coupling.spectra import granger_geweke
from pyrodyn.errors import CouplingError
from pyrodyn.linalg.stationary import filter_covariance, stationary_covariance

REGIONS = list(DIMS)
# Rounding, 1e-16, through a covariance of memory 1/(1 - .9) and its inverse, of condition below 1e4.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(scope="module")
def posterior() -> xr.DataTree:
    return random_posterior(seed=3)


@pytest.fixture(scope="module")
def graph(posterior: xr.DataTree) -> xr.Dataset:
    return dyn.coupling_graph(posterior)


def one_draw(posterior: xr.DataTree, chain: int = 1, draw: int = 4) -> dict[str, np.ndarray]:
    """The matrices of one draw with where each region's latents and units are."""
    held = posterior["posterior"].to_dataset().isel(chain=chain, draw=draw)
    values = {name: variable.values for name, variable in held.data_vars.items()}
    values["region"], values["unit_region"] = held["latent_region"].values, held["region"].values
    values["covariance"] = scipy.linalg.solve_discrete_lyapunov(values["dynamics"], values["process_noise"])
    return values


def block(values: dict[str, np.ndarray], name: str, target: str, source: str) -> np.ndarray:
    return values[name][np.ix_(values["region"] == target, values["region"] == source)]


def readout(values: dict[str, np.ndarray], region: str) -> np.ndarray:
    return values["loading"][np.ix_(values["unit_region"] == region, values["region"] == region)]


# ---------------------------------------------------------------------------------------------- matrix equations


@pytest.mark.parametrize("radius", [0.0, 0.5, 0.99, 0.99999])
def test_doubling_solves_the_lyapunov_equation(radius: float) -> None:
    rng = np.random.default_rng(0)
    dynamics = rng.normal(size=(3, 4, 4))
    dynamics *= (radius / np.abs(np.linalg.eigvals(dynamics)).max(-1))[:, None, None]
    noise = np.eye(4) + np.ones((4, 4))
    found = stationary_covariance(torch.from_numpy(dynamics), torch.from_numpy(noise)).numpy()
    for a, sigma in zip(dynamics, found, strict=True):
        dense = scipy.linalg.solve_discrete_lyapunov(a, noise)
        # An error of rounding grows with the memory, in both routes.
        np.testing.assert_allclose(sigma, dense, rtol=1e-12 / (1.0 - radius), atol=1e-12)


def test_doubling_solves_the_riccati_equation_with_correlated_noises() -> None:
    rng = np.random.default_rng(1)
    for dynamics in (0.4 * rng.normal(size=(3, 3)), 1.3 * np.eye(3)):  # a filter also follows what is not stable
        readout = rng.normal(size=(5, 3))
        joint = np.cov(rng.normal(size=(8, 40)))
        parts = (dynamics, joint[:3, :3], readout, joint[3:, 3:], joint[:3, 3:])
        found = filter_covariance(*(torch.from_numpy(part) for part in parts)).numpy()
        dense = scipy.linalg.solve_discrete_are(dynamics.T, readout.T, joint[:3, :3], joint[3:, 3:], s=joint[:3, 3:])
        np.testing.assert_allclose(found, dense, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------------------------------------- the graph


def test_labels_of_the_graph(graph: xr.Dataset) -> None:
    assert graph["strength"].dims == ("chain", "draw", "target", "source")
    assert graph["target"].values.tolist() == graph["source"].values.tolist() == REGIONS
    assert graph["origin"].values.tolist() == [*REGIONS, "global", "shared innovations"]
    assert graph["target_units"].values.tolist() == [5, 4, 3] and graph["target_latents"].values.tolist() == [3, 2, 1]
    np.testing.assert_allclose(graph["lag"], BIN * np.arange(1, 21))
    np.testing.assert_allclose(graph["frequency"][[0, -1]], [0.0, 0.5 / BIN])
    assert graph.attrs["unstable_draws"] == 0


def test_nothing_depends_on_latent_coordinates(posterior: xr.DataTree, graph: xr.Dataset) -> None:
    other = coupling_graph(mapped(posterior))
    assert not np.allclose(mapped(posterior)["posterior"]["dynamics"], posterior["posterior"]["dynamics"])
    for name in graph.data_vars:
        np.testing.assert_allclose(other[name], graph[name], rtol=1e-8, atol=1e-8, err_msg=str(name))


def test_strengths_and_subspaces_against_dense_algebra(posterior: xr.DataTree, graph: xr.Dataset) -> None:
    values, here = one_draw(posterior), graph.isel(chain=1, draw=4)
    for target in REGIONS:
        for source in REGIONS:
            root = {name: scipy.linalg.sqrtm(block(values, "covariance", name, name)).real for name in (target, source)}
            scaled = np.linalg.solve(root[target], block(values, "dynamics", target, source) @ root[source])
            edge = here.sel(target=target, source=source)
            np.testing.assert_allclose(edge["strength"], np.linalg.norm(scaled), **CLOSE)
            found = edge["singular_values"].values
            size = min(scaled.shape)
            np.testing.assert_allclose(found[:size], scipy.linalg.svdvals(scaled), **CLOSE)
            assert np.isnan(found[size:]).all()
            # The patterns put the block together again: C_r A_rs Sigma_s C_s' is a sum over channels.
            sent = here["source_pattern"].sel(target=target, unit=here["region"] == source).values[:size]
            received = here["target_pattern"].sel(source=source, unit=here["region"] == target).values[:size]
            whole = readout(values, target) @ block(values, "dynamics", target, source)
            whole = whole @ block(values, "covariance", source, source) @ readout(values, source).T
            np.testing.assert_allclose(np.einsum("k,ku,kv->uv", found[:size], received, sent), whole, **CLOSE)
            assert (sent.sum(-1) > 0.0).all()


def test_shares_of_variance(posterior: xr.DataTree, graph: xr.Dataset) -> None:
    np.testing.assert_allclose(graph["variance_share"].sum("origin"), 1.0, rtol=1e-12)
    assert float(graph["variance_share"].min()) >= 0.0
    values = one_draw(posterior)
    gamma, region = values["innovation_loading"], values["region"]
    common = gamma @ gamma.T
    for origin in (*REGIONS, "global", "shared innovations"):
        mask = np.outer(region == origin, region == origin)
        noise = common if origin == "shared innovations" else (values["process_noise"] - common) * mask
        part = scipy.linalg.solve_discrete_lyapunov(values["dynamics"], noise)
        for target in REGIONS:
            own = np.ix_(region == target, region == target)
            share = np.trace(np.linalg.inv(values["covariance"][own]) @ part[own]) / DIMS[target]
            found = graph["variance_share"].isel(chain=1, draw=4).sel(target=target, origin=origin)
            np.testing.assert_allclose(found, share, **CLOSE)


def test_without_global_or_innovations_their_shares_are_zero() -> None:
    bare = random_posterior(shared=0)
    dataset = bare["posterior"].to_dataset()
    gamma = dataset["innovation_loading"].values
    bare = with_posterior(bare, dataset.drop_vars("innovation_loading"))
    bare = changed(bare, process_noise=dataset["process_noise"].values - gamma @ np.swapaxes(gamma, -1, -2))
    shares = coupling_graph(bare)["variance_share"]
    assert not shares.sel(origin=["global", "shared innovations"]).any()
    np.testing.assert_allclose(shares.sum("origin"), 1.0, rtol=1e-12)


def test_impulse_responses_against_two_runs(posterior: xr.DataTree) -> None:
    """Two runs with the same noise, one of them kicked; for the direct response, with all other edges cut."""
    graph = coupling_graph(posterior, lags=7)
    values, rng = one_draw(posterior), np.random.default_rng(2)
    region, size = values["region"], len(values["region"])
    noise = rng.normal(size=(7, size))
    for source in REGIONS:
        own = region == source
        c = readout(values, source).mean(0)
        # What a rise of the mean readout by one sd says of the latent: its regression on the mean readout.
        covariance = block(values, "covariance", source, source)
        kick = np.zeros(size)
        kick[own] = covariance @ c / np.sqrt(c @ covariance @ c)
        for target in REGIONS:
            kept = np.equal.outer(region, region) | np.outer(region == target, own)
            for name, dynamics in (
                ("impulse_response", values["dynamics"] * kept),
                ("impulse_response_total", values["dynamics"]),
            ):
                start = rng.normal(size=size)
                runs = [start, start + kick]
                gap = []
                for shock in noise:
                    runs = [dynamics @ run + shock for run in runs]
                    rates = [readout(values, target) @ run[region == target] for run in runs]
                    gap.append((rates[1] - rates[0]).mean())
                found = graph[name].isel(chain=1, draw=4).sel(target=target, source=source)
                np.testing.assert_allclose(found, gap, rtol=1e-9, atol=1e-11)


def test_cut_edges_are_nothing_in_every_measure() -> None:
    graph = coupling_graph(random_posterior(absent=(("V1", "LM"), ("PM", "V1"))))
    for source, target in (("V1", "LM"), ("PM", "V1")):
        edge = graph.sel(source=source, target=target)
        for name in ("strength", "impulse_response", "granger", "granger_geweke"):
            assert not edge[name].any()
        assert not edge["singular_values"].fillna(0.0).any()
    # But a path through others remains.
    assert float(abs(graph["impulse_response_total"].sel(source="V1", target="LM")).max()) > 1e-3


def test_unstable_draws_are_nan_and_counted(posterior: xr.DataTree, graph: xr.Dataset) -> None:
    dynamics = posterior["posterior"]["dynamics"].values.copy()
    dynamics[0, 2] *= 2.0
    with pytest.warns(dyn.FitWarning, match="1 of 30 draws are not stable"):
        found = coupling_graph(changed(posterior, dynamics=dynamics))
    assert found.attrs["unstable_draws"] == 1
    wild = xr.zeros_like(graph["strength"].isel(target=0, source=0, drop=True), dtype=bool)
    wild[0, 2] = True
    for name in graph.data_vars:
        if "chain" in graph[name].dims:
            assert bool(found[name].where(wild, drop=True).isnull().all())
            np.testing.assert_array_equal(found[name].where(~wild), graph[name].where(~wild))
    edges = dyn.to_networkx(found).edges
    np.testing.assert_allclose(edges["V1", "LM"]["mean"], found["strength"].sel(source="V1", target="LM").mean())
    metrics = dyn.graph_metrics(found)
    assert bool(metrics["receiver_rank"].isel(chain=0, draw=2).isnull().all())
    assert np.isfinite(dyn.compare_edges(found, ("V1", "LM"), ("LM", "V1")))


def test_aligned_dynamics_do_not_depend_on_coordinates(posterior: xr.DataTree) -> None:
    found = aligned_dynamics(posterior)
    np.testing.assert_allclose(aligned_dynamics(mapped(posterior)), found, rtol=1e-8, atol=1e-8)
    strengths = coupling_graph(posterior)["strength"]
    for target in REGIONS:
        for source in REGIONS:
            part = found.isel(
                latent=found["latent_region"].values == target, latent_from=found["latent_from_region"].values == source
            )
            norm = np.sqrt(np.square(part).sum(("latent", "latent_from")))
            np.testing.assert_allclose(norm, strengths.sel(target=target, source=source), **CLOSE)


# ---------------------------------------------------------------------------------------------- Granger and Geweke


def of_two(dynamics, noise) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    turns = np.arange(512) / 512  # the whole circle, where the mean of a smooth periodic function is its integral
    return turns, *granger_geweke(np.array(dynamics), np.array(noise), [np.array([0]), np.array([1])], turns)


def test_scalar_causality_in_closed_form() -> None:
    a, b, c, own, other = 0.7, 0.4, 0.9, 1.3, 0.6  # x <- a x + b y, y <- c y
    turns, total, spectrum = of_two([[a, b], [0.0, c]], np.diag([own, other]))
    z = np.exp(-2j * np.pi * turns)
    np.testing.assert_allclose(spectrum[0, 1], np.log1p(b**2 * other / (own * np.abs(1.0 - c * z) ** 2)), rtol=1e-10)
    # The forecast of x from its own past: the filter's variance of y is the root of a quadratic.
    linear = own * (1.0 - c**2) - b**2 * other
    hidden = (-linear + np.sqrt(linear**2 + 4.0 * b**2 * other * own)) / (2.0 * b**2)
    np.testing.assert_allclose(total[0, 1], np.log((b**2 * hidden + own) / own), rtol=1e-12)
    np.testing.assert_allclose(spectrum[0, 1].mean(), total[0, 1], rtol=1e-12)  # Geweke's integral
    assert total[1, 0] == 0.0 and not spectrum[1, 0].any()
    assert np.isnan(total[[0, 1], [0, 1]]).all()


def test_two_regions_have_gewekes_unconditional_measure() -> None:
    """With feedback and correlated noise, from spectra alone: ln |S_rr| - ln |H Q_rr H*|, H after his normalisation."""
    dynamics, noise = np.array([[0.6, 0.3], [-0.5, 0.5]]), np.array([[1.0, 0.5], [0.5, 2.0]])
    turns, total, spectrum = of_two(dynamics, noise)
    for r, s in ((0, 1), (1, 0)):
        for f, turn in enumerate(turns):
            transfer = np.linalg.inv(np.eye(2) - dynamics * np.exp(-2j * np.pi * turn))
            density = (transfer @ noise @ transfer.conj().T)[r, r].real
            own = transfer[r, r] + transfer[r, s] * noise[s, r] / noise[r, r]
            expected = np.log(density / (np.abs(own) ** 2 * noise[r, r]))
            np.testing.assert_allclose(spectrum[r, s, f], expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(spectrum[r, s].mean(), total[r, s], rtol=1e-10)


def test_conditional_causality_against_a_long_autoregression(posterior: xr.DataTree) -> None:
    """The reduced model by Yule and Walker's equations instead of a filter; its order, 200, forgets .9^200 = 1e-9."""
    order = 200
    values = one_draw(posterior)
    dynamics, noise, region = values["dynamics"], values["process_noise"], values["region"]
    turns = np.array([0.0, 0.07, 0.31, 0.5])
    total, spectrum = granger_geweke(dynamics, noise, [np.flatnonzero(region == name) for name in REGIONS], turns)
    lagged = [values["covariance"]]
    for _ in range(order):
        lagged.append(dynamics @ lagged[-1])
    for s, source in enumerate(REGIONS):
        rest = np.flatnonzero(region != source)
        auto = [one[np.ix_(rest, rest)] for one in lagged]  # E y_t y_{t-k}'
        toeplitz = np.block([[auto[j - i] if j >= i else auto[i - j].T for j in range(order)] for i in range(order)])
        weights = np.linalg.solve(toeplitz, np.hstack(auto[1:]).T).T
        residual = auto[0] - weights @ np.hstack(auto[1:]).T
        for r, target in enumerate(REGIONS):
            if r == s:
                continue
            place, own = np.flatnonzero(region[rest] == target), np.flatnonzero(region == target)
            reduced = np.linalg.det(residual[np.ix_(place, place)])
            full = noise[np.ix_(own, own)]
            np.testing.assert_allclose(total[r, s], np.log(reduced / np.linalg.det(full)), rtol=1e-6, atol=1e-7)
            for f, turn in enumerate(turns):
                z = np.exp(-2j * np.pi * turn)
                whitening = np.eye(len(rest)) - sum(
                    weights[:, k * len(rest) : (k + 1) * len(rest)] * z ** (k + 1) for k in range(order)
                )
                transfer = np.linalg.inv(np.eye(len(region)) - dynamics * z)[rest]
                mine = (whitening @ transfer @ noise[:, own] @ np.linalg.inv(full))[place]
                explained = np.linalg.det(mine @ full @ mine.conj().T).real
                np.testing.assert_allclose(spectrum[r, s, f], np.log(reduced / explained), rtol=1e-5, atol=1e-6)


def test_frequencies_are_in_hertz(posterior: xr.DataTree, graph: xr.Dataset) -> None:
    found = coupling_graph(posterior, frequencies=[0.0, 12.5, 25.0])["granger_geweke"]
    np.testing.assert_allclose(found, graph["granger_geweke"].sel(frequency=[0.0, 12.5, 25.0]), rtol=1e-12)


# ---------------------------------------------------------------------------------------------- presence


@pytest.mark.parametrize("effect", [0.0, 0.3, 1.0])
def test_savage_dickey_is_the_ratio_of_evidences(effect: float) -> None:
    """Regression with known noise: with and without the entries, both evidences are normal densities of the data."""
    rng, sd, prior = np.random.default_rng(4), 0.5, 0.2
    design = rng.normal(size=(30, 4))
    data = design @ np.full(4, effect) * 0.5 + rng.normal(size=30)
    covariance = np.linalg.inv(design.T @ design + np.eye(4) / sd**2)
    mean = covariance @ design.T @ data
    # Draws whose first two moments are the posterior's exactly.
    normal = rng.normal(size=(500, 4))
    normal -= normal.mean(0)
    white = normal @ np.linalg.inv(np.linalg.cholesky(np.cov(normal.T))).T
    draws = mean + white @ np.linalg.cholesky(covariance).T
    found = savage_dickey(draws.reshape(2, 250, 2, 2), sd, prior)
    present = scipy.stats.multivariate_normal(np.zeros(30), np.eye(30) + sd**2 * design @ design.T).pdf(data)
    absent = scipy.stats.multivariate_normal(np.zeros(30), np.eye(30)).pdf(data)
    np.testing.assert_allclose(found, prior * present / (prior * present + (1 - prior) * absent), rtol=1e-8)


def test_odds_of_a_mean_probability_also_where_no_float_tells_it_from_one() -> None:
    odds = np.array([[[-1.0, 40.0, 700.0], [2.0, 60.0, 900.0]]])  # (chain, draw, edge)
    mean = expit(odds[..., 0]).mean()
    doubt = math.exp(-40.0) / 2.0  # the other draw leaves next to none
    expected = [math.log(mean / (1.0 - mean)), -math.log(doubt), 700.0 + math.log(2.0)]
    np.testing.assert_allclose(mean_log_odds(odds), expected, rtol=1e-9)
    np.testing.assert_allclose(mean_log_odds(-odds), [-value for value in expected], rtol=1e-9)


def test_presence_of_the_model_is_taken_as_it_is(posterior: xr.DataTree) -> None:
    sampled = with_presence(posterior, {("V1", "LM"): 0.5, ("PM", "LM"): 0.1})
    graph = coupling_graph(sampled)
    assert graph["probability"].attrs["estimator"] == "share of the draws that have the edge"
    stored = sampled["posterior"]["presence"]
    np.testing.assert_array_equal(graph["presence"], stored)
    for source, target in (("V1", "LM"), ("PM", "LM"), ("LM", "V1")):
        share = float((graph["strength"].sel(source=source, target=target) > 0.0).mean())
        assert float(graph["probability"].sel(source=source, target=target)) == pytest.approx(share)
    turned = sampled["posterior"].to_dataset().isel(target=[2, 0, 1])
    xr.testing.assert_identical(coupling_graph(with_posterior(sampled, turned)), graph)


@pytest.mark.parametrize("where", ["argument", "attribute", "json"])
def test_savage_dickey_where_the_engine_keeps_every_edge(where: str) -> None:
    # 40 draws: more than the six entries of the largest block.
    posterior = random_posterior(draws=20, absent=(("V1", "PM"),))
    sd = np.full((3, 3), 0.7)
    given = {}
    if where == "argument":
        given = {"edge_prior_sd": sd, "edge_prior_probability": 0.3}
    else:
        posterior.attrs["edge_prior_sd"] = 0.7 if where == "attribute" else str(sd.tolist())
        posterior.attrs["edge_prior_probability"] = 0.3
    probability = coupling_graph(posterior, **given)["probability"]
    assert "Savage-Dickey" in probability.attrs["estimator"]
    np.testing.assert_array_equal(np.diag(probability), 1.0)
    assert float(probability.sel(source="V1", target="PM")) == 0.0
    dynamics, region = (posterior["posterior"][name].values for name in ("dynamics", "latent_region"))
    block = dynamics[..., (region == "LM")[:, None] & (region == "V1")].reshape(40, 6)
    at_zero = scipy.stats.multivariate_normal(block.mean(0), np.cov(block.T)).logpdf(np.zeros(6))
    odds = 0.7 / 0.3 * np.exp(at_zero - scipy.stats.norm(0.0, 0.7).logpdf(0.0) * 6)
    np.testing.assert_allclose(probability.sel(source="V1", target="LM"), 1.0 / (1.0 + odds), rtol=1e-8)


def test_presence_is_unknown_without_prior_or_with_few_draws(posterior: xr.DataTree, graph: xr.Dataset) -> None:
    assert bool(graph["probability"].isnull().all()) and "none" in graph["probability"].attrs["estimator"]
    assert np.isnan(savage_dickey(np.ones((1, 5, 2, 2)), 1.0, 0.5))


def test_an_edge_that_must_be_there_is_there_whatever_the_draws_say() -> None:
    """Draws so near zero that the Bayes factor for absence is no float; then too few draws."""
    rng = np.random.default_rng(0)
    tight = 1e-80 * rng.normal(size=(1, 50, 2, 2, 3))
    np.testing.assert_array_equal(savage_dickey(tight, 1.0, 1.0), [1.0, 1.0])
    np.testing.assert_array_equal(savage_dickey(tight, 1.0, 0.999), [0.0, 0.0])
    np.testing.assert_array_equal(savage_dickey(tight[:, :3], 1.0, np.array([1.0, 0.5])), [1.0, np.nan])


# ---------------------------------------------------------------------------------------------- bad input


def without(posterior: xr.DataTree, *names: str) -> xr.DataTree:
    return with_posterior(posterior, posterior["posterior"].to_dataset().drop_vars(names))


def relabelled(posterior: xr.DataTree, **coords) -> xr.DataTree:
    return with_posterior(posterior, posterior["posterior"].to_dataset().assign_coords(**coords))


def test_the_regions_may_stand_in_other_places(posterior: xr.DataTree, graph: xr.Dataset) -> None:
    """Labels of latents instead of latent_region, unit_region instead of region, bin_width in the root."""
    held = posterior["posterior"].to_dataset()
    moved = held.rename(region="unit_region").drop_vars("latent_region")
    tree = xr.DataTree.from_dict({"posterior": moved})
    tree.attrs["bin_width"] = BIN
    xr.testing.assert_identical(coupling_graph(tree), graph)
    constant = (
        posterior["constant_data"].to_dataset().assign_coords(region=held["region"]).isel(unit=slice(None, None, -1))
    )
    tree = xr.DataTree.from_dict({"posterior": held.drop_vars("region"), "constant_data": constant})
    xr.testing.assert_identical(coupling_graph(tree), graph)
    named = relabelled(
        posterior, latent_region=("latent", np.where(held["latent_region"] == "global", "all", held["latent_region"]))
    )
    named.attrs["global_name"] = "all"
    assert coupling_graph(named)["origin"].values.tolist() == [*REGIONS, "all", "shared innovations"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p["posterior"].to_dataset(), "posterior: got Dataset without a group 'posterior'"),
        (lambda p: without(p, "dynamics"), "posterior: has no 'dynamics' among .*MultiRegionLDS"),
        (lambda p: without(p, "latent_region", "latent"), "does not say whose its latents are.*latent_region"),
        (lambda p: without(p, "region"), "does not say in which region its units lie.*Recording.from_arrays"),
        (lambda p: random_posterior(dims={"V1": 2}), "latents belong to 'V1', and a graph needs two"),
        (lambda p: relabelled(p, region=("unit", ["V1"] * 12)), "region 'LM', 'PM' has latents but no units"),
        (lambda p: without(p, "innovation_loading"), "process_noise has a covariance of .* between regions"),
        (lambda p: changed(p, dynamics=4.0 * p["posterior"]["dynamics"].values), "none of its 30 draws are stable"),
        (lambda p: xr.DataTree.from_dict({"posterior": p["posterior"].to_dataset()}), "lack 'bin_width'"),
    ],
)  # fmt: skip
def test_errors_name_what_the_posterior_lacks(posterior: xr.DataTree, damage, message: str) -> None:
    with pytest.raises(CouplingError, match=message):
        coupling_graph(damage(posterior))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lags": 0}, "lags: got 0; expected a whole number"),
        ({"frequencies": [30.0]}, "frequencies: got .30.0.; expected numbers in Hz from 0 to 25"),
        ({"frequencies": []}, "frequencies: got"),
        ({"edge_prior_sd": -1.0, "edge_prior_probability": 0.5}, "edge_prior_sd.*got -1.0 and 0.5"),
        ({"edge_prior_sd": 1.0, "edge_prior_probability": 0.0}, "above 0 and at most 1"),
        ({"edge_prior_sd": 1.0, "edge_prior_probability": np.nan}, "above 0 and at most 1"),
        ({"edge_prior_sd": np.inf, "edge_prior_probability": 0.5}, "positive standard deviation"),
        ({"edge_prior_sd": np.ones(3), "edge_prior_probability": 0.5}, r"shape \(3,\) and \(\); expected numbers"),
    ],
)
def test_errors_name_the_option(posterior: xr.DataTree, options, message: str) -> None:
    with pytest.raises(CouplingError, match=message):
        coupling_graph(posterior, **options)
