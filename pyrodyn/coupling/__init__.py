"""Who drives whom: the posterior of a directed graph of regions, its measures, and questions to it."""

from pyrodyn.coupling.exchange import node_link_json, to_networkx, write_graphml
from pyrodyn.coupling.graph import coupling_graph
from pyrodyn.coupling.hypotheses import hypotheses
from pyrodyn.coupling.intervention import intervene
from pyrodyn.coupling.presence import savage_dickey
from pyrodyn.coupling.questions import compare_edges, edges_into, graph_metrics
from pyrodyn.coupling.summary import edge_table
from pyrodyn.coupling.system import aligned_dynamics

__all__ = [
    "aligned_dynamics",
    "compare_edges",
    "coupling_graph",
    "edge_table",
    "edges_into",
    "graph_metrics",
    "hypotheses",
    "intervene",
    "node_link_json",
    "savage_dickey",
    "to_networkx",
    "write_graphml",
]
