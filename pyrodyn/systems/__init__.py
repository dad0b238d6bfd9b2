"""Synthetic systems with known truth: each a `Recording`, and beside it everything that made it."""

from __future__ import annotations

from pyrodyn.systems.controls import shuffle_trials
from pyrodyn.systems.fields import Field, field, field_of
from pyrodyn.systems.flows import arneodo, lorenz, rossler
from pyrodyn.systems.networks import chaotic_rnn, pulsed_rnn
from pyrodyn.systems.regions import coupled_regions, feedback_loop, uncoupled_regions
from pyrodyn.systems.stochastic import duffing, linear_spiral, van_der_pol
from pyrodyn.systems.switching import nascar, switching_rotations, switching_routes
from pyrodyn.systems.system import System

__all__ = [
    "Field",
    "System",
    "arneodo",
    "chaotic_rnn",
    "coupled_regions",
    "duffing",
    "feedback_loop",
    "field",
    "field_of",
    "linear_spiral",
    "lorenz",
    "nascar",
    "pulsed_rnn",
    "rossler",
    "shuffle_trials",
    "switching_rotations",
    "switching_routes",
    "uncoupled_regions",
    "van_der_pol",
]
