"""Scores beyond the likelihood: the Neural Latents Benchmark's, recovery of a truth, what a flow does, and probes."""

from pyrodyn.evaluation.fixed_points import find_fixed_points, fixed_points
from pyrodyn.evaluation.lyapunov import lyapunov_exponents
from pyrodyn.evaluation.nlb import nlb_scores, psth_r2, speed_correlation, velocity_r2
from pyrodyn.evaluation.probes import CycleConsistency, Leakage, cycle_consistency, input_leakage
from pyrodyn.evaluation.recovery import LatentR2, forecast_r2, latent_r2, rate_r2, state_space_divergence

__all__ = [
    "CycleConsistency",
    "LatentR2",
    "Leakage",
    "cycle_consistency",
    "find_fixed_points",
    "fixed_points",
    "forecast_r2",
    "input_leakage",
    "latent_r2",
    "lyapunov_exponents",
    "nlb_scores",
    "psth_r2",
    "rate_r2",
    "speed_correlation",
    "state_space_divergence",
    "velocity_r2",
]
