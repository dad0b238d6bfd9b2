"""A state-space model with two parameters: whatever is asked of its posterior, quadrature answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyrodyn as dyn
from pyrodyn import readouts
from pyrodyn.distributions import GaussMarkov
from pyrodyn.inference import LogDensity, collapse
from pyrodyn.inference.engine import numerics
from pyrodyn.program import Labelled, StateSpaceModel, globals_given, log_terms
from pyrodyn.readouts import AffineReadout, Readout
from pyrodyn.recording import Recording

PERSISTENCE, NOISE = 0.8, 0.7


class ToyParameters(NamedTuple):
    level: Tensor  # (1)
    gain: Tensor  # (1)


@dataclass(frozen=True)
class Toy(StateSpaceModel):
    """An AR(1) latent seen by all units through one gain about one level."""

    readout: Readout = field(default_factory=readouts.Gaussian)
    persistence: float = PERSISTENCE

    def check(self, recording: Recording) -> None:
        self.readout.check(recording)

    def sample_globals(self, recording: Recording) -> ToyParameters:
        zero = torch.zeros(1, dtype=torch.float64)
        level = pyro.sample("level", dist.Normal(zero, 1.0).to_event(1))
        gain = pyro.sample("gain", dist.LogNormal(zero, 0.5).to_event(1))
        return ToyParameters(level, gain)

    def latent_path(self, parameters: ToyParameters, recording: Recording) -> GaussMarkov:
        one = torch.ones_like(parameters.gain).unsqueeze(-1)
        return GaussMarkov.from_dynamics(
            self.persistence * one,
            (1.0 - self.persistence**2) * one,
            num_bins=recording.num_bins,
            initial_covariance=one,
        )

    def readout_law(self, parameters: ToyParameters, path: Tensor, recording: Recording) -> AffineReadout:
        ones = torch.ones(recording.num_units, dtype=torch.float64)
        noise = None if self.readout.noise_name is None else NOISE * ones * torch.ones_like(parameters.level)
        loading = (parameters.gain * ones).unsqueeze(-1)
        return AffineReadout(self.readout, path, loading, parameters.level * ones, noise, recording.mask)

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        return {"level": torch.zeros(1, dtype=torch.float64), "gain": torch.ones(1, dtype=torch.float64)}

    def label(self, parameters: ToyParameters) -> Labelled:
        return {"level": (("level_of",), parameters.level), "gain": (("level_of",), parameters.gain)}

    def unlabel(self, values: Mapping[str, Tensor]) -> ToyParameters:
        return ToyParameters(values["level"], values["gain"])

    def invariants(self, parameters: ToyParameters) -> Labelled:
        return self.label(parameters)

    def transformed(self, parameters: ToyParameters, recording: Recording, seed: int) -> ToyParameters:
        return parameters


@cache
def toy_recording(kind: str = "Gaussian", trials: int = 8, bins: int = 6, units: int = 2, seed: int = 0) -> Recording:
    """Trials of the toy model at level .3 and gain 1.2."""
    like = Recording.from_arrays(
        np.zeros((trials, bins, units)),
        bin_width=0.1,
        counts=kind != "Gaussian",
        center=np.zeros(units),
        scale=np.ones(units),
    )
    values = {"level": torch.tensor([0.3]), "gain": torch.tensor([1.2])}
    return dyn.simulate(Toy(getattr(readouts, kind)()), like, seed=seed, values=values)[0]


class Quadrature:
    """Exact answers for the toy model from a grid over its two unconstrained parameters."""

    def __init__(self, model: Toy, recording: Recording, size: int = 121, *, states: int = 0) -> None:
        self.model, self.recording = model, recording
        self.density = LogDensity(collapse(model), recording)
        level, log_gain = torch.linspace(-3.0, 3.0, size), torch.linspace(-2.5, 2.0, size)
        self.grid = torch.cartesian_prod(level, log_gain).double()
        self.log_cell = math.log(float((level[1] - level[0]) * (log_gain[1] - log_gain[0])))
        with torch.no_grad(), numerics():
            values = self.density.constrain(self.grid)
            self.shared, self.of_trials = log_terms(self.density.program, values, recording)
            self.log_prior = self.shared + self.density.log_jacobian(self.grid)
            if states:  # the path, too, by quadrature, and not by Laplace
                self.of_trials = path_quadrature(model, globals_given(model, values, recording), recording, states)

    def log_evidence(self, trials: list[int] | None = None) -> float:
        """log p of some trials."""
        chosen = self.of_trials if trials is None else self.of_trials[:, trials]
        return float((self.log_prior + chosen.sum(-1)).logsumexp(0)) + self.log_cell

    def left_out(self, trials: list[int]) -> np.ndarray:
        """log p(each of these trials | all others but these)."""
        rest = [i for i in range(self.recording.num_trials) if i not in trials]
        base = self.log_prior + self.of_trials[:, rest].sum(-1)
        joint = (base.unsqueeze(-1) + self.of_trials[:, trials]).logsumexp(0)
        return (joint - base.logsumexp(0)).numpy()


def path_quadrature(model: Toy, parameters: ToyParameters, recording: Recording, states: int) -> Tensor:
    """log p(y | parameters) of every trial, (draw, trial), by a forward recursion over a grid of states."""
    grid = torch.linspace(-5.5, 5.5, states, dtype=torch.float64)
    weight = float(grid[1] - grid[0])
    innovation = math.sqrt(1.0 - model.persistence**2)
    stationary = torch.distributions.Normal(0.0, 1.0).log_prob(grid)
    step = torch.distributions.Normal(model.persistence * grid[:, None], innovation).log_prob(grid).exp() * weight
    predictor = (parameters.level + parameters.gain * grid).squeeze(1)  # (draw, state)
    values = recording.values  # (trial, time, unit)
    predictor = predictor[:, None, :, None]
    alpha, total = None, 0.0
    for bin_ in range(recording.num_bins):
        seen = values[None, :, bin_, None, :]
        noise = None if model.readout.noise_name is None else torch.tensor(NOISE)
        fit = model.readout.log_prob(predictor.expand(-1, -1, -1, seen.shape[-1]), noise, seen).sum(-1)
        ahead = stationary.exp() * weight if alpha is None else alpha @ step
        if recording.mask is not None:
            fit = torch.where(recording.mask[:, bin_].all(-1)[None, :, None], fit, 0.0)  # bins are hidden whole
        top = fit.amax(-1, keepdim=True)
        alpha = ahead * (fit - top).exp()
        mass = alpha.sum(-1, keepdim=True)
        alpha, total = alpha / mass, total + (mass.log() + top).squeeze(-1)
    return total
