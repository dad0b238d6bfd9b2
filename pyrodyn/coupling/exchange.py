"""The graph in the form of networkx, and in the files that other programs read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import networkx as nx
import numpy as np
import xarray as xr

from pyrodyn._files import write_atomically
from pyrodyn.coupling.summary import SAMPLE, checked, edge_table

EDGE_NUMBERS = tuple("mean sd hdi_low hdi_high share p_present log_odds p_rope gain p_sign delay".split())


def to_networkx(graph: xr.Dataset, hdi_prob: float = 0.9) -> nx.DiGraph:
    """The posterior of the graph as one directed graph, in plain numbers.

    Parameters
    ----------
    graph : xarray.Dataset
        From `coupling_graph`.
    hdi_prob : float
        Probability of the highest-density interval of each strength.

    Returns
    -------
    networkx.DiGraph
        An edge from source to target, unless its strength is zero in every draw, with ``mean``, ``sd``, ``hdi_low``,
        ``hdi_high`` of the strength, ``share`` of the target's variance, ``p_present``, ``log_odds`` of that (see
        `coupling_graph`), ``p_rope`` (the probability that the strength exceeds the attribute ``rope`` of the graph),
        ``gain``, ``p_sign`` (the probability that the summed direct response is positive, given the edge) and ``delay``
        in seconds. What is unknown is left out. Nodes have ``units``, ``latents`` and ``self_share``, the share of a
        region's variance that stems from its own noise.

    Raises
    ------
    CouplingError
        For anything but a coupling graph, or a probability outside (0, 1).
    """
    regions = checked(graph)
    table = edge_table(graph, hdi_prob)
    built = nx.DiGraph(
        hdi_prob=float(hdi_prob),
        bin_width=float(graph.attrs["bin_width"]),
        rope=float(graph["exceeds_rope"].attrs["rope"]),
        p_present_estimator=str(graph["probability"].attrs.get("estimator", "")),
    )
    for name in regions:
        here = table.sel(target=name, source=name)
        built.add_node(
            name,
            units=int(graph["target_units"].sel(target=name)),
            latents=int(graph["target_latents"].sel(target=name)),
            self_share=float(here["share"]),
        )
    never = (graph["strength"].fillna(0.0) == 0.0).all(SAMPLE)
    for target in regions:
        for source in regions:
            if target == source or bool(never.sel(target=target, source=source)):
                continue
            here = table.sel(target=target, source=source)
            numbers = {name: float(here[name]) for name in EDGE_NUMBERS if name in here}
            built.add_edge(source, target, **{name: value for name, value in numbers.items() if np.isfinite(value)})
    return built


def write_graphml(graph: xr.Dataset, path: str | os.PathLike[str], hdi_prob: float = 0.9) -> Path:
    """Write `to_networkx` as GraphML, which Gephi, Cytoscape and igraph read; a crash leaves no half file.

    Parameters
    ----------
    graph : xarray.Dataset
        From `coupling_graph`.
    path : path of the file
    hdi_prob : float

    Returns
    -------
    pathlib.Path
        The path.
    """
    built = to_networkx(graph, hdi_prob)
    return write_atomically(path, lambda file: nx.write_graphml(built, file))


def node_link_json(graph: xr.Dataset, hdi_prob: float = 0.9) -> str:
    """`to_networkx` as node-link JSON, which D3 reads: ``nodes`` with an ``id``, ``links`` with source and target.

    ``networkx.node_link_graph(json.loads(text), edges="links")`` reads it back.
    """
    return json.dumps(nx.node_link_data(to_networkx(graph, hdi_prob), edges="links"), allow_nan=False)
