"""Moves that take up and drop edges under a quadratic: densities, and how often edges come, beside all graphs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from pyrodyn.conditionals.edges import EdgeToggle
from pyrodyn.conditionals.surrogate import Quadratic, blocks, drawn
from pyrodyn.distributions import NetworkPrior
from pyrodyn.distributions.network import network_layout
from pyrodyn.inference.engine import random_stream

EDGES = ((0, 1), (1, 0), (1, 2), (2, 0))
CHAINS = 300


def target() -> tuple[NetworkPrior, Quadratic]:
    """A prior over three regions of one and two latents with a global one, and a quadratic that couples all rows."""
    layout = network_layout((1, 2, 1), 1, False, EDGES)
    size = len(layout.edge)
    generator = torch.Generator().manual_seed(4)
    mean = torch.where(layout.edge < 0, 0.2, 0.0).double()
    sd = 0.3 + 0.2 * torch.rand(size, generator=generator, dtype=torch.float64)
    for i in range(len(EDGES)):
        sd[layout.edge == i] = float(sd[layout.edge == i][0])
    prior = NetworkPrior(layout, mean, sd, torch.tensor([0.5, 0.3, 0.7, 0.4], dtype=torch.float64))
    mixed = torch.randn(size, 2 * size, generator=generator, dtype=torch.float64)
    information = 12.0 * (mixed @ mixed.mT) / size
    centre = 0.25 * torch.randn(size, generator=generator, dtype=torch.float64)
    return prior, Quadratic(centre, torch.zeros(size, dtype=torch.float64), information)


def log_density(prior: NetworkPrior, quadratic: Quadratic, vector: torch.Tensor) -> torch.Tensor:
    """Of the quadratic and the prior without its restriction to stable systems."""
    apart = vector - quadratic.centre
    value = -0.5 * (apart @ quadratic.information * apart).sum(-1)
    return value + prior.log_prob(vector) - prior.log_stability(vector)


def slope(quadratic: Quadratic, vector: torch.Tensor) -> torch.Tensor:
    return -(vector - quadratic.centre) @ quadratic.information


def graphs(prior: NetworkPrior, quadratic: Quadratic) -> np.ndarray:
    """Probability of every edge from the dense evidence of every graph."""
    layout, information = prior.layout, quadratic.information.numpy()
    # exp of the quadratic is a density of the centre given the entries, up to a constant.
    logs, sets = [], list(itertools.product((False, True), repeat=len(EDGES)))
    for there in sets:
        kept = np.array([edge < 0 or there[edge] for edge in layout.edge.tolist()])
        spread = np.diag(np.where(kept, prior.sd_entry.numpy() ** 2, 0.0)) + np.linalg.inv(information)
        mean = np.where(kept, prior.mean_entry.numpy(), 0.0)
        share = prior.probability.numpy()
        weight = np.where(there, np.log(share), np.log1p(-share)).sum()
        logs.append(multivariate_normal(mean, spread).logpdf(quadratic.centre.numpy()) + weight)
    weights = np.exp(np.array(logs) - max(logs))
    return (np.array(sets, dtype=float) * weights[:, None]).sum(0) / weights.sum()


def begun(prior: NetworkPrior) -> torch.Tensor:
    """Networks (chain, entry) with some of the edges."""
    there = torch.rand(CHAINS, len(EDGES)) < 0.5
    kept = torch.cat([there, torch.ones(CHAINS, 1, dtype=torch.bool)], -1)[:, prior.layout.edge]
    return torch.where(kept, 0.3 * torch.randn(CHAINS, len(prior.layout.edge), dtype=torch.float64), 0.0)


def moved(
    moves, prior: NetworkPrior, quadratic: Quadratic, information: torch.Tensor, vector: torch.Tensor, sweeps: int
) -> np.ndarray:
    """How often each edge is there along Metropolis-Hastings chains that propose with ``information``, (edge)."""
    information = information.expand(CHAINS, -1, -1)
    seen, count = torch.zeros(len(EDGES)), 0
    for sweep in range(sweeps):
        for move in moves:
            there, ahead = move.step(vector, slope(quadratic, vector), information, prior)
            behind = move.log_density(there, slope(quadratic, there), information, prior, vector, ahead)
            ratio = log_density(prior, quadratic, there) - log_density(prior, quadratic, vector)
            accepted = torch.rand(CHAINS).log() < ratio + behind - ahead.log_density
            vector = torch.where(accepted[:, None], there, vector)
        if sweep >= sweeps // 4:
            seen, count = seen + prior.present(vector).float().mean(0), count + 1
    return (seen / count).numpy()


def test_a_toggle_and_the_one_back_are_inverse_and_its_ratio_is_that_of_two_graphs():
    """Where the target is the quadratic, the ratio does not depend on the block that was drawn."""
    prior, quadratic = target()
    toggle = EdgeToggle(prior)
    information = quadratic.information.expand(CHAINS, -1, -1)
    with random_stream(0):
        begin = begun(prior)[:1].expand(CHAINS, -1)
        there, ahead = toggle.step(begin, slope(quadratic, begin), information, prior)
        behind = toggle.log_density(there, slope(quadratic, there), information, prior, begin, ahead)
        again, back = toggle.step(there, slope(quadratic, there), information, prior)
    assert ((prior.present(begin) != prior.present(there)).sum(-1) == 1).all()
    value = log_density(prior, quadratic, there) - log_density(prior, quadratic, begin)
    # Without the choice of the edge, which differs with where one is.
    choice = toggle._laws(there, slope(quadratic, there), information, prior).log_choice
    chosen = toggle._laws(begin, slope(quadratic, begin), information, prior).log_choice
    step = ahead.source
    assert isinstance(step, torch.Tensor)
    ratio = value + behind - choice.gather(-1, step[:, None])[:, 0] - ahead.log_density
    ratio = ratio + chosen.gather(-1, step[:, None])[:, 0]
    assert len(step.unique()) > 1
    for edge in step.unique():
        at = ratio[step == edge]
        torch.testing.assert_close(at, at[:1].expand_as(at), rtol=0.0, atol=1e-9)
    came = ~prior.present(begin).gather(-1, torch.tensor(prior.uncertain)[step][:, None])[:, 0]
    returned = came & (back.source == step)
    assert returned.sum() > 10
    torch.testing.assert_close(again[returned], begin[returned], rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("toggles", [0, 1])
def test_edges_come_as_often_as_all_graphs_say(toggles):
    prior, quadratic = target()
    with random_stream(1):
        moves = [*blocks(prior), *[EdgeToggle(prior)] * toggles]
        found = moved(moves, prior, quadratic, quadratic.information, begun(prior), 80)
    expected = graphs(prior, quadratic)
    assert ((expected > 0.05) & (expected < 0.95)).any()
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_runs_under_the_quadratic_find_its_edges():
    prior, quadratic = target()
    many = Quadratic(*(part.expand(CHAINS, *part.shape) for part in quadratic))
    with random_stream(2):
        vector, seen = begun(prior), torch.zeros(len(EDGES))
        for run in range(120):
            vector = drawn(blocks(prior), many, vector, prior)
            seen = seen + prior.present(vector).float().mean(0) * (run >= 20)
    np.testing.assert_allclose(seen.numpy() / 100, graphs(prior, quadratic), atol=0.02)


def test_a_wrong_curvature_costs_acceptance_and_no_exactness():
    """As if learned elsewhere: half of the curvature there is, and nothing of how entries go together."""
    prior, quadratic = target()
    wrong = 0.5 * torch.diag(quadratic.information.diagonal())
    with random_stream(3):
        found = moved([*blocks(prior), EdgeToggle(prior)], prior, quadratic, wrong, begun(prior), 120)
    np.testing.assert_allclose(found, graphs(prior, quadratic), atol=0.02)


def test_log_odds_of_an_edge_are_the_ratio_of_the_evidences_of_two_graphs():
    """Whatever the values of the entries: all others are integrated out, given which edges are there."""
    prior, quadratic = target()
    with random_stream(3):
        vector = begun(prior)[:20]
    found = EdgeToggle(prior).log_odds(
        vector, slope(quadratic, vector), quadratic.information.expand(20, -1, -1), prior
    )
    information, share = quadratic.information.numpy(), prior.probability.numpy()
    for there, odds in zip(prior.present(vector).numpy(), found.numpy(), strict=True):
        for i in range(len(EDGES)):
            logs = []
            for present in (False, True):
                kept = np.array([e < 0 or (present if e == i else there[e]) for e in prior.layout.edge.tolist()])
                spread = np.diag(np.where(kept, prior.sd_entry.numpy() ** 2, 0.0)) + np.linalg.inv(information)
                mean = np.where(kept, prior.mean_entry.numpy(), 0.0)
                logs.append(multivariate_normal(mean, spread).logpdf(quadratic.centre.numpy()))
            expected = logs[1] - logs[0] + np.log(share[i] / (1.0 - share[i]))
            assert odds[i] == pytest.approx(expected, rel=1e-8, abs=1e-8)
