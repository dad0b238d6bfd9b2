"""Moves of blocked Gibbs sampling: each draws a part of a model's unknowns given the rest, for many chains at once."""
