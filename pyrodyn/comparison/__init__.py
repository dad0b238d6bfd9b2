"""Comparison of models on the data they were fitted to, by several estimators that say how far they can be trusted."""

from pyrodyn.comparison.evidence import Evidence
from pyrodyn.comparison.folds import KFold
from pyrodyn.comparison.future import LeaveFutureOut
from pyrodyn.comparison.heldout import HeldOutEntries, HeldOutUnits
from pyrodyn.comparison.loo import LOO
from pyrodyn.comparison.table import ComparisonWarning, as_table, compare
from pyrodyn.comparison.terms import Particles

__all__ = [
    "LOO",
    "ComparisonWarning",
    "Evidence",
    "HeldOutEntries",
    "HeldOutUnits",
    "KFold",
    "LeaveFutureOut",
    "Particles",
    "as_table",
    "compare",
]
