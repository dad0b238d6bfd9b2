"""Whole trajectories, gauged matrices, and networks of dynamics, as single random variables."""

from pyrodyn.distributions.gauss_markov import GaussMarkov
from pyrodyn.distributions.loading import GaugedLoading
from pyrodyn.distributions.network import NetworkLayout, NetworkPrior, network_layout

__all__ = ["GaugedLoading", "GaussMarkov", "NetworkLayout", "NetworkPrior", "network_layout"]
