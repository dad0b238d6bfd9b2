"""Pictures of a posterior: latents beside the data, eigenvalues, traces, rates, the graph of regions, interventions.

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

__all__ = [
    "calibration",
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
