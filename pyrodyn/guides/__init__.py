"""Variational families: a frozen set of options that builds a Pyro guide for a program on a recording.

Any callable with the same three arguments serves as well, so a user's own guide is a function.
"""

from pyrodyn.guides.amortised import Amortised, AmortisedGuide, recognised
from pyrodyn.guides.base import GuideFactory, Start
from pyrodyn.guides.draws import draw_globals, draw_trials
from pyrodyn.guides.gaussian import FullRank, LowRank, MeanField, PointEstimate
from pyrodyn.guides.last_layer import LastLayer, LastLayerGuide
from pyrodyn.guides.structured import Structured, StructuredGuide

__all__ = [
    "Amortised",
    "AmortisedGuide",
    "FullRank",
    "GuideFactory",
    "LastLayer",
    "LastLayerGuide",
    "LowRank",
    "MeanField",
    "PointEstimate",
    "Start",
    "Structured",
    "StructuredGuide",
    "draw_globals",
    "draw_trials",
    "recognised",
]
