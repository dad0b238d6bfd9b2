"""Pictures of a posterior: latents beside the data, eigenvalues, traces, predicted rates, the graph of regions, checks.

Every function returns a `matplotlib.figure.Figure` that belongs to the caller alone: pyplot is never touched, so
nothing needs closing and no screen is needed. Write one with ``figure.savefig("latents.png")``.
"""

from pyrodyn.plots.figures import calibration, eigenvalues, latents, rates, summary, trace
from pyrodyn.plots.graphs import (
    plot_block_dynamics,
    plot_coupling_graph,
    plot_impulse_responses,
    plot_intervention,
    plot_strengths,
)
from pyrodyn.plots.judgement import checks, comparison

__all__ = [
    "calibration",
    "checks",
    "comparison",
    "eigenvalues",
    "latents",
    "plot_block_dynamics",
    "plot_coupling_graph",
    "plot_impulse_responses",
    "plot_intervention",
    "plot_strengths",
    "rates",
    "summary",
    "trace",
]
