r"""How latents of a variational autoencoder go together over time, each with mean zero and unit variance."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.distributions import GaussMarkov
from pyrodyn.distributions.gaussian_process import GaussianProcess
from pyrodyn.distributions.varying import varying_chain
from pyrodyn.recording import Recording

JITTER = 1e-6  # of a unit variance, added to a smooth process whose covariance would else be singular in rounding


class TimePrior(ABC):
    """The law of latents over time, around a mean and in units of a standard deviation."""

    has_time_constant: bool = True

    def sample(self, latent_dim: int, recording: Recording) -> Tensor | None:
        """The site ``time_constant``, (latent), in seconds: about ten bins, within a factor of seven."""
        if not self.has_time_constant:
            return None
        typical = torch.full((latent_dim,), math.log(10.0 * recording.bin_width), dtype=torch.float64)
        return pyro.sample("time_constant", dist.LogNormal(typical.to(recording.device), 1.0).to_event(1))

    def initial_values(self, latent_dim: int, recording: Recording) -> dict[str, Tensor]:
        """Where the site starts: time constants spread about ten bins, so that latents differ."""
        if not self.has_time_constant:
            return {}
        spread = torch.linspace(-0.5, 0.5, latent_dim, dtype=torch.float64) if latent_dim > 1 else torch.zeros(1)
        return {"time_constant": 10.0 * recording.bin_width * spread.to(torch.float64).exp()}

    @abstractmethod
    def law(
        self, time_constant: Tensor | None, mean: Tensor, sd: Tensor, recording: Recording
    ) -> GaussMarkov | GaussianProcess:
        """Paths (time, latent); the arguments are (*draw, 1 or trial, latent)."""


@dataclass(frozen=True)
class StaticPrior(TimePrior):
    """Every bin by itself: a static model, in which neither the order of bins nor their spacing means anything."""

    has_time_constant = False

    def law(self, time_constant, mean, sd, recording) -> GaussMarkov:
        del time_constant
        return _chain(torch.zeros_like(sd).unsqueeze(-2), mean, sd, recording)


@dataclass(frozen=True)
class MarkovPrior(TimePrior):
    r"""Ornstein-Uhlenbeck processes: correlation :math:`e^{-|t - t'| / \tau}`, each latent with its own constant."""

    def law(self, time_constant: Any, mean, sd, recording) -> GaussMarkov:
        steps = recording.time[1:] - recording.time[:-1]
        steps = torch.tensor(steps[:1] if recording.regular else steps, device=recording.device)
        if not len(steps):
            steps = torch.ones(1, dtype=torch.float64, device=recording.device)
        return _chain(torch.exp(-steps[:, None] / time_constant.unsqueeze(-2)), mean, sd, recording)


@dataclass(frozen=True)
class SmoothPrior(TimePrior):
    r"""Gaussian processes with correlation :math:`e^{-(t - t')^2 / 2 \tau^2}`, each latent with its own constant.

    Dense matrices over time: for trials of up to some hundred bins.

    References
    ----------
    Casale et al., NeurIPS 2018; Fortuin et al., AISTATS 2020 (autoencoders with such priors).
    """

    def law(self, time_constant: Any, mean, sd, recording) -> GaussianProcess:
        time = torch.tensor(recording.time, device=recording.device)
        apart = (time[:, None] - time) / time_constant[..., None, None]
        eye = torch.eye(len(time), dtype=torch.float64, device=recording.device)
        correlation = torch.exp(-0.5 * apart.square()) + JITTER * eye
        return GaussianProcess(mean.unsqueeze(-2), sd.square()[..., None, None] * correlation)


def _chain(kept: Tensor, mean: Tensor, sd: Tensor, recording: Recording) -> GaussMarkov:
    """A stationary chain; ``kept`` is the share of a latent (*draw, 1, step or 1, latent) kept from bin to bin."""
    variance = sd.square()
    noise = variance.unsqueeze(-2) * (1.0 - kept.square())
    drift = (1.0 - kept) * mean.unsqueeze(-2)
    bins = recording.num_bins
    drift = drift.expand(*drift.shape[:-2], bins - 1, drift.shape[-1])
    start = torch.diag_embed(variance)
    if kept.shape[-2] == 1:
        dynamics, noise = torch.diag_embed(kept.squeeze(-2)), torch.diag_embed(noise.squeeze(-2))
        return GaussMarkov.from_dynamics(
            dynamics, noise, num_bins=bins, initial_covariance=start, initial_mean=mean, drift=drift
        )
    return varying_chain(
        torch.diag_embed(kept), torch.diag_embed(noise), initial_covariance=start, initial_mean=mean, drift=drift
    )
