"""Neural networks whose weights are sample sites, and recurrences written for speed."""

from pyrodyn.networks.cells import Cell, Gated, Leaky, LowRank

__all__ = ["Cell", "Gated", "Leaky", "LowRank"]
