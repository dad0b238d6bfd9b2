"""Latent dynamics of neural populations as Pyro programs, with labelled posteriors.

A model is a generative program, an engine reads it, a labelled posterior comes out::

    recording = Recording.from_arrays(counts, bin_width=0.02)
    posterior = fit(models.LDS(latent_dim=3), recording, inference.SVI(), seed=0)
"""

from importlib.metadata import version

from pyrodyn import guides, inference, models, readers, readouts
from pyrodyn.fitting import fit, predict, simulate
from pyrodyn.posterior import FitWarning, model_of, recording_of, to_inferencedata
from pyrodyn.recording import Recording
from pyrodyn.storage import load, save

__version__ = version("pyrodyn")

__all__ = [
    "FitWarning",
    "Recording",
    "fit",
    "guides",
    "inference",
    "load",
    "model_of",
    "models",
    "predict",
    "readers",
    "readouts",
    "recording_of",
    "save",
    "simulate",
    "to_inferencedata",
]
