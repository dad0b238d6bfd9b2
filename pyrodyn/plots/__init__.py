"""Pictures of a posterior: latents beside the data, eigenvalues, traces, predicted rates, flows, forecasts, inferred
inputs, modes, the graph of regions, checks.

Every function returns a `matplotlib.figure.Figure` that belongs to the caller alone: pyplot is never touched, so
nothing needs closing and no screen is needed. Write one with ``figure.savefig("latents.png")``.
"""

from pyrodyn.plots.dynamics import flow_field, forecast, inferred_inputs, raster, trajectories
from pyrodyn.plots.figures import calibration, eigenvalues, latents, rates, summary, trace
from pyrodyn.plots.graphs import (
    plot_block_dynamics,
    plot_coupling_graph,
    plot_impulse_responses,
    plot_intervention,
    plot_strengths,
)
from pyrodyn.plots.judgement import checks, comparison
from pyrodyn.plots.modes import dwell_times, mode_flows, mode_raster, transition_graph

__all__ = [
    "calibration",
    "checks",
    "comparison",
    "dwell_times",
    "eigenvalues",
    "flow_field",
    "forecast",
    "inferred_inputs",
    "latents",
    "mode_flows",
    "mode_raster",
    "plot_block_dynamics",
    "plot_coupling_graph",
    "plot_impulse_responses",
    "plot_intervention",
    "plot_strengths",
    "raster",
    "rates",
    "summary",
    "trace",
    "trajectories",
    "transition_graph",
]
