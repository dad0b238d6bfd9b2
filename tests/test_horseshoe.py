"""Edges that are shrunk: the prior by quadrature and rejection, its coordinates, and two engines on one posterior."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import biject_to

import pyrodyn as dyn
from pyrodyn import inference, models, readouts
from pyrodyn.distributions import HorseshoeNetwork, network_layout
from pyrodyn.distributions.horseshoe import log_half_cauchy, log_reach
from pyrodyn.distributions.network import log_stability
from pyrodyn.errors import CouplingError, ModelError
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.systems import coupled_regions

LAYOUT = network_layout((2, 1), 1, True, ((0, 1), (1, 0)))
PLAIN = {"global_dim": 0, "shared_innovations": 0, "time_bumps": 0, "trial_level": False}


def law(probability: tuple[float, float] = (0.4, 1.0), sd: float = 0.2) -> HorseshoeNetwork:
    size = len(LAYOUT.edge)
    return HorseshoeNetwork(
        LAYOUT,
        torch.where(LAYOUT.slow, 0.95, torch.zeros(size, dtype=torch.float64)),
        torch.full((size,), sd, dtype=torch.float64),
        torch.tensor(probability, dtype=torch.float64),
    )


def test_an_edge_is_at_the_slab_scale_with_its_prior_probability():
    rng = np.random.default_rng(0)
    product = np.abs(scipy.stats.cauchy.rvs(size=(2, 400_000), random_state=rng)).prod(0)
    for probability in (0.02, 0.3, 0.5, 0.9):
        assert np.mean(math.exp(log_reach(probability)) * product > 1.0) == pytest.approx(probability, abs=0.004)
    assert log_reach(0.5) == pytest.approx(0.0, abs=1e-9) and log_reach(1.0) == math.inf


def test_the_scales_have_the_half_cauchy_density():
    points = torch.tensor([-3.0, 0.0, 0.7, 40.0], dtype=torch.float64)
    expected = scipy.stats.halfcauchy.logpdf(points.exp().numpy()) + points.numpy()
    np.testing.assert_allclose(log_half_cauchy(points), expected, rtol=1e-12)


def test_the_density_is_that_of_its_parts():
    prior = law()
    with random_stream(0):
        value = prior.sample((5,))
    entries, log_scales = prior.split(value)
    scale = (log_scales[:, :1] + log_scales[:, 1:2] + prior.log_reach[0]).exp()
    sd = torch.where(LAYOUT.edge == 0, 0.2 * scale / (1.0 + scale.square()).sqrt(), 0.2)
    expected = torch.distributions.Normal(prior.mean_entry, sd).log_prob(entries).sum(-1)
    expected = expected + log_half_cauchy(log_scales).sum(-1) + log_stability(LAYOUT.matrix(entries), LAYOUT)
    torch.testing.assert_close(prior.log_prob(value), expected)
    assert prior.log_prob(value.unsqueeze(1)).shape == (5, 1)


def test_coordinates_cover_what_is_stable_and_carry_their_jacobian():
    prior = law()
    change = biject_to(prior.support)
    with random_stream(1):
        free = torch.randn(3, prior.event_shape[0], dtype=torch.float64)
    value = change(free)
    assert bool(prior.support.check(value).all())
    torch.testing.assert_close(change.inv(value), free, rtol=1e-9, atol=1e-9)
    for point, found in zip(free, change.log_abs_det_jacobian(free, value), strict=True):
        dense = torch.autograd.functional.jacobian(change, point)
        assert float(torch.linalg.slogdet(dense)[1]) == pytest.approx(float(found), rel=1e-8)


def test_draws_are_rejected_whole():
    """Scales of what is unstable go, too: the marginal of the scales is that of weighted free draws."""
    prior = law(sd=0.9)
    with random_stream(2):
        drawn = prior.split(prior.sample((20_000,)))
        scales = torch.distributions.HalfCauchy(1.0).sample((200_000, 3)).double().log()
        sd = prior.sd_entry * prior.spread(scales).exp()
        weight = log_stability(LAYOUT.matrix(prior.mean_entry + sd * torch.randn_like(sd)), LAYOUT).exp()
    assert 0.05 < float(weight.mean()) < 0.9  # the restriction matters
    for bound in (-1.0, 0.0, 1.0):
        for place in (0, 1):
            expected = float((weight * (scales[:, place] > bound)).sum() / weight.sum())
            assert float((drawn[1][:, place] > bound).double().mean()) == pytest.approx(expected, abs=0.015)


def recording(trials: int = 4, bins: int = 40) -> dyn.Recording:
    return dyn.Recording.from_arrays(
        np.zeros((trials, bins, 6)), bin_width=0.05, region=["A"] * 3 + ["B"] * 3, counts=False,
        center=np.zeros(6), scale=np.ones(6),
    ).blank()  # fmt: skip


@pytest.mark.long
def test_gibbs_and_hmc_agree():
    model = models.MultiRegionLDS(1, edge_prior="horseshoe", readout=readouts.Gaussian(), **PLAIN)
    # Own blocks of .6, one edge of .4, one of .05: far from the border of stability, where chains are slow.
    entries = model.layout(recording()).vector(torch.tensor([[0.6, 0.4], [0.05, 0.6]], dtype=torch.float64))
    truth = torch.cat([entries, torch.zeros(3, dtype=torch.float64)])
    seen, _ = dyn.simulate(model, recording(), seed=3, values={"network": truth})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        gibbs = dyn.fit(model, seen, inference.Gibbs(draws=300, warmup=100, thin=2, chains=8), seed=0)
        hmc = dyn.fit(model, seen, inference.HMC(draws=80, warmup=120, chains=16), seed=0)
    for name in ("coupling_strength", "variance_share", "spectral_radius", "signal_sd"):
        ours, theirs = (p["invariants"][name].stack(sample=("chain", "draw")) for p in (gibbs, hmc))
        apart = abs(ours.mean("sample") - theirs.mean("sample")) / theirs.std("sample")
        assert float(apart.max()) < 0.35, name
        # Of 80% of the draws: near the border of stability a draw in a thousand decides a standard deviation.
        wide = [part.quantile(0.9, "sample") - part.quantile(0.1, "sample") for part in (ours, theirs)]
        spread = wide[0] / wide[1]
        assert float(spread.min()) > 0.7 and float(spread.max()) < 1.4, name
    one, other = (dyn.coupling_graph(p)["probability"] for p in (gibbs, hmc))
    assert abs(one - other).max() < 0.1
    assert "above 0.05" in one.attrs["estimator"] and "above 0.05" in other.attrs["estimator"]


def test_ranks_of_truths_are_uniform():
    """A short simulation-based calibration, whose simulations share no code with the sampler."""
    model = models.MultiRegionLDS(1, edge_prior="horseshoe", readout=readouts.Gaussian(), **PLAIN)
    engine = inference.Gibbs(draws=50, warmup=50, thin=3, chains=2)
    found = dyn.calibrate(model, recording(2, 25), engine, replicates=60, seed=4)
    assert not bool(found["flagged"].any()), found["quantity"].values[found["flagged"].values]


def test_a_graph_is_found_and_says_what_it_counts_as_an_edge():
    system = coupled_regions(regions=3, units=12, trials=6, bins=120, mean_count=0.8, coupling=0.35, seed=4)
    model = models.MultiRegionLDS(2, edge_prior="horseshoe", time_bumps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        posterior = dyn.fit(model, system.recording, inference.Gibbs(draws=80, warmup=60, chains=2), seed=0)
    graph = dyn.coupling_graph(posterior, rope=0.08)
    there, off = system.truth["adjacency"].values, ~np.eye(3, dtype=bool)
    strength = graph["strength"].mean(("chain", "draw")).values
    assert strength[there].min() > strength[off & ~there].max(initial=0.0)
    exceeds = (graph["strength"].values > 0.08).mean((0, 1))
    np.testing.assert_allclose(graph["exceeds_rope"], exceeds)
    np.testing.assert_allclose(graph["probability"].values[off], exceeds[off])
    np.testing.assert_array_equal(np.diag(graph["probability"]), 1.0)
    net = dyn.to_networkx(graph)
    assert net.graph["rope"] == 0.08 and "above 0.08" in net.graph["p_present_estimator"]
    for source, target, edge in net.edges(data=True):
        assert (
            edge["p_rope"]
            == edge["p_present"]
            == pytest.approx(float(graph["exceeds_rope"].sel(source=source, target=target)))
        )
    assert json.loads(dyn.node_link_json(graph))["graph"]["rope"] == 0.08
    with pytest.raises(CouplingError, match="rope: got -1"):
        dyn.coupling_graph(posterior, rope=-1)


def test_an_unknown_prior_of_edges_is_refused():
    with pytest.raises(ModelError, match="edge_prior must be 'spike-and-slab' or 'horseshoe', got 'lasso'"):
        models.MultiRegionLDS(1, edge_prior="lasso")


def test_without_edges_the_horseshoe_has_nothing_to_shrink():
    model = models.MultiRegionLDS(1, edges=(), edge_prior="horseshoe", **PLAIN)
    like = recording()
    with random_stream(0), numerics(), torch.no_grad():
        parameters = model.sample_globals(like)
    assert bool((parameters.dynamics == torch.diag_embed(parameters.dynamics.diagonal(dim1=-2, dim2=-1))).all())
