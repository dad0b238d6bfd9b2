"""Latent dynamics of neural populations as Pyro programs, with labelled posteriors.

A model is a generative program, an engine reads it, a labelled posterior comes out::

    recording = Recording.from_arrays(counts, bin_width=0.02)
    posterior = fit(models.LDS(latent_dim=3), recording, inference.SVI(), seed=0)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrodyn import (
        comparison,
        drifts,
        evaluation,
        guides,
        inference,
        integrators,
        models,
        readers,
        readouts,
        systems,
    )
    from pyrodyn.calibration import calibrate
    from pyrodyn.checks import check, posterior_predictive, prior_predictive
    from pyrodyn.comparison import ComparisonWarning, compare, select
    from pyrodyn.coupling import (
        compare_edges,
        coupling_graph,
        edges_into,
        graph_metrics,
        hypotheses,
        intervene,
        node_link_json,
        to_networkx,
        write_graphml,
    )
    from pyrodyn.fitting import fit, predict, simulate
    from pyrodyn.posterior import FitWarning, model_of, recording_of, to_inferencedata
    from pyrodyn.recording import Recording
    from pyrodyn.storage import load, save

__version__ = version("pyrodyn")

__all__ = [
    "ComparisonWarning",
    "FitWarning",
    "Recording",
    "calibrate",
    "check",
    "compare",
    "compare_edges",
    "comparison",
    "coupling_graph",
    "drifts",
    "edges_into",
    "evaluation",
    "fit",
    "graph_metrics",
    "guides",
    "hypotheses",
    "inference",
    "integrators",
    "intervene",
    "load",
    "model_of",
    "models",
    "node_link_json",
    "posterior_predictive",
    "predict",
    "prior_predictive",
    "readers",
    "readouts",
    "recording_of",
    "save",
    "select",
    "simulate",
    "systems",
    "to_inferencedata",
    "to_networkx",
    "write_graphml",
]

# Imported at first use: torch takes seconds, and `pyrodyn --help` needs none of it.
_HOMES = {
    "Recording": "recording",
    "calibrate": "calibration",
    **dict.fromkeys(("check", "posterior_predictive", "prior_predictive"), "checks"),
    **dict.fromkeys(("ComparisonWarning", "compare", "select"), "comparison"),
    **dict.fromkeys(("compare_edges", "coupling_graph", "edges_into", "graph_metrics", "hypotheses"), "coupling"),
    **dict.fromkeys(("intervene", "node_link_json", "to_networkx", "write_graphml"), "coupling"),
    **dict.fromkeys(("FitWarning", "model_of", "recording_of", "to_inferencedata"), "posterior"),
    **dict.fromkeys(("fit", "predict", "simulate"), "fitting"),
    **dict.fromkeys(("load", "save"), "storage"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pyrodyn' has no attribute {name!r}")
    home = import_module(f"pyrodyn.{_HOMES.get(name, name)}")
    value = getattr(home, name) if name in _HOMES else home
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
