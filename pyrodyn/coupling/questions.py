"""Questions to the posterior of a graph, answered over its draws."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations
from typing import Any

import numpy as np
import xarray as xr

from pyrodyn.coupling.summary import SAMPLE, checked, edge_of, edge_table
from pyrodyn.coupling.system import known_regions
from pyrodyn.errors import CouplingError

DAMPING = 0.85  # Brin and Page's


def compare_edges(graph: xr.Dataset, first: tuple[str, str], second: tuple[str, str]) -> float:
    """Posterior probability that one edge is stronger than another.

    ``compare_edges(graph, ("V1", "V2"), ("V2", "V1"))`` is the probability that V1 drives V2 more than V2 drives V1.

    Parameters
    ----------
    graph : xarray.Dataset
        From `coupling_graph`.
    first, second : pairs (source, target)

    Returns
    -------
    float
        The share of draws in which the first strength exceeds the second. Draws without either edge count for neither,
        so the two directions may add up to less than one.

    Raises
    ------
    CouplingError
        For a name that is not a region of the graph.
    """
    regions = checked(graph)
    one, other = (graph["strength"].sel(edge_of(n, e, regions)) for n, e in (("first", first), ("second", second)))
    gap = (one.drop_vars(("source", "target"), errors="ignore") - other.drop_vars(("source", "target"))).values
    return float((gap[np.isfinite(gap)] > 0.0).mean())


def edges_into(graph: xr.Dataset, region: str, hdi_prob: float = 0.9) -> Any:
    """Everything that drives a region, strongest first.

    Parameters
    ----------
    graph : xarray.Dataset
        From `coupling_graph`.
    region : str
    hdi_prob : float
        Probability of the highest-density interval.

    Returns
    -------
    pandas.DataFrame
        A row for every other region, with the columns of `to_networkx`'s edges.

    Raises
    ------
    CouplingError
        For a name that is not a region of the graph.
    """
    regions = checked(graph)
    known_regions("region", [region], regions)
    others = [name for name in regions if name != region]
    table = edge_table(graph, hdi_prob).sel(target=region, source=others).reset_coords(drop=True)
    return table.to_dataframe().sort_values("mean", ascending=False)


def graph_metrics(graph: xr.Dataset) -> xr.Dataset:
    r"""Measures of the whole graph, draw by draw, from the strengths :math:`w_{rs}` between different regions.

    .. math::
        \mathrm{reciprocity} = \frac{\sum_{r \ne s} \min(w_{rs}, w_{sr})}{\sum_{r \ne s} w_{rs}}, \qquad
        p = \tfrac{1 - a}{R} 1 + a M p, \quad M_{rs} = w_{rs} / \sum_q w_{qs}

    with a = .85, and 1 / R in the column of a region that drives none.

    Parameters
    ----------
    graph : xarray.Dataset
        From `coupling_graph`.

    Returns
    -------
    xarray.Dataset
        - ``out_strength``, ``in_strength`` (chain, draw, region): sums over the edges out of and into a region.
        - ``reciprocity`` (chain, draw): from 0, no edge is answered, to 1, all are answered equally; NaN without edges.
        - ``receiver_rank`` (chain, draw, region): PageRank p, high where strong drive arrives from regions that are
          driven themselves; ``driver_rank``: the same with all edges turned round, high at the origins of drive.
        - ``loop_probability`` (loop), where the model sampled presence: of each cycle of two and of three regions,
          labelled such as ``V1→V2→V1``.

    References
    ----------
    Squartini, Picciolo, Ruzzenenti & Garlaschelli, "Reciprocity of weighted networks", Scientific Reports, 2013; Page,
    Brin, Motwani & Winograd, Stanford InfoLab, 1999.
    """
    regions = checked(graph)
    weights = graph["strength"].transpose(*SAMPLE, "target", "source").values * (1.0 - np.eye(len(regions)))
    turned = np.swapaxes(weights, -1, -2)
    whole = weights.sum((-2, -1))
    per_region = (*SAMPLE, "region")
    answered = np.minimum(weights, turned).sum((-2, -1))
    found: dict[str, Any] = {
        "out_strength": (per_region, weights.sum(-2)),
        "in_strength": (per_region, weights.sum(-1)),
        "reciprocity": (SAMPLE, answered / np.where(whole > 0.0, whole, np.nan)),
        "receiver_rank": (per_region, _page_rank(weights)),
        "driver_rank": (per_region, _page_rank(turned)),
    }
    coords: dict[str, Any] = {name: graph[name].values for name in SAMPLE} | {"region": regions}
    if "presence" in graph:
        loops = loops_of(regions)
        seen = [
            np.prod([graph["presence"].sel(source=a, target=b).values for a, b in pairwise(loop)], 0) for loop in loops
        ]
        found["loop_probability"] = (("loop",), np.array([one.mean() for one in seen]))
        coords["loop"] = ["→".join(loop) for loop in loops]
    return xr.Dataset(found, coords=coords)


def loops_of(regions: list[str]) -> list[tuple[str, ...]]:
    """Every cycle of two and of three regions, once, from its first region back to it."""
    if len(set(regions)) < len(regions):
        raise CouplingError(f"regions: got {regions!r}; expected different names")
    pairs = [(a, b, a) for a, b in combinations(regions, 2)]
    order = {name: i for i, name in enumerate(regions)}
    triples = [(a, b, c, a) for a, b, c in permutations(regions, 3) if order[a] < order[b] and order[a] < order[c]]
    return [*pairs, *triples]


def _page_rank(weights: np.ndarray) -> np.ndarray:
    """Stationary probabilities (..., region) of a walk along weights (..., target, source)."""
    count = weights.shape[-1]
    sums = weights.sum(-2, keepdims=True)
    lost = np.isnan(sums).any((-2, -1))
    steps = np.where(sums > 0.0, weights / np.where(sums > 0.0, sums, 1.0), 1.0 / count)
    steps = np.where(lost[..., None, None], 0.0, steps)
    start = np.full((*weights.shape[:-1], 1), (1.0 - DAMPING) / count)
    found = np.linalg.solve(np.eye(count) - DAMPING * steps, start)[..., 0]
    return np.where(lost[..., None], np.nan, found)
