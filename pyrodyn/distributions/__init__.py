"""Whole trajectories, and gauged matrices, as single random variables."""

from pyrodyn.distributions.gauss_markov import GaussMarkov
from pyrodyn.distributions.loading import GaugedLoading

__all__ = ["GaugedLoading", "GaussMarkov"]
