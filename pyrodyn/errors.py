"""Errors a user can act on. Each message names the argument, what was got, what was expected, and the remedy."""

from __future__ import annotations


class RecordingError(ValueError):
    """The data handed to a Recording, or to a reader, cannot be used as they are."""


class ReadoutError(ValueError):
    """The observations lie outside the support of the chosen readout."""


class ModelError(ValueError):
    """A model's options do not fit the recording."""


class CouplingError(ValueError):
    """A posterior or a graph does not hold what a question about coupling between regions needs."""


class ComparisonError(ValueError):
    """A comparison was asked for that its posteriors or its data cannot answer."""


class CollapseError(TypeError):
    """The path of this model cannot be integrated out."""


class NonFiniteError(ArithmeticError):
    """A loss or a density stayed NaN or infinite; the message names the step and the site."""


class SolverError(ArithmeticError):
    """A differential equation could not be solved; the message names the trial and the time."""


class PrecisionError(TypeError):
    """Numbers too coarse for the computation: it would be wrong, and nothing would show it."""


class IntegrityError(ValueError):
    """A stored file was changed, truncated, or not written by this library."""


class CheckpointError(ValueError):
    """A checkpoint belongs to another run than the one that is being resumed."""
