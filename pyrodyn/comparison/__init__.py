"""Comparison of models on the data they were fitted to, by several estimators that say how far they can be trusted."""

from pyrodyn.comparison.evidence import Evidence
from pyrodyn.comparison.folds import KFold
from pyrodyn.comparison.future import LeaveFutureOut
from pyrodyn.comparison.grid import fewest, select
from pyrodyn.comparison.halving import tune
from pyrodyn.comparison.heldout import HeldOutEntries, HeldOutUnits
from pyrodyn.comparison.loo import LOO
from pyrodyn.comparison.table import ComparisonWarning, as_table, compare
from pyrodyn.comparison.terms import Candidate, Particles, Score

__all__ = [
    "LOO",
    "Candidate",
    "ComparisonWarning",
    "Evidence",
    "HeldOutEntries",
    "HeldOutUnits",
    "KFold",
    "LeaveFutureOut",
    "Particles",
    "Score",
    "as_table",
    "compare",
    "fewest",
    "select",
    "tune",
]
