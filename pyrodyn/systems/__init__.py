"""Synthetic systems with known truth: each a `Recording`, and beside it everything that made it."""

from __future__ import annotations

from pyrodyn.systems.controls import shuffle_trials
from pyrodyn.systems.regions import coupled_regions, feedback_loop, uncoupled_regions
from pyrodyn.systems.system import System

__all__ = ["System", "coupled_regions", "feedback_loop", "shuffle_trials", "uncoupled_regions"]
