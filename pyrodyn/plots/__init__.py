"""Pictures of a posterior: latents beside the data, eigenvalues of the dynamics, traces, predicted against observed.

Every function returns a `matplotlib.figure.Figure` that belongs to the caller alone: pyplot is never touched, so
nothing needs closing and no screen is needed. Write one with ``figure.savefig("latents.png")``.
"""

from pyrodyn.plots.figures import calibration, eigenvalues, latents, rates, summary, trace

__all__ = ["calibration", "eigenvalues", "latents", "rates", "summary", "trace"]
