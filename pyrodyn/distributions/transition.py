r"""The step from bin to bin of a linear path, in parts that can be changed one by one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrodyn.distributions.gauss_markov import GaussMarkov
from pyrodyn.linalg.stationary import stationary_covariance


class Transition(NamedTuple):
    r"""What makes a linear path :math:`x_t = A x_{t-1} + b_t + \epsilon_t,\ \epsilon_t \sim N(0, Q),\ x_1 \sim N(0,
    \Sigma_1)`.
    """

    dynamics: Tensor  # (*draw, 1, latent, latent), A
    process_noise: Tensor  # (*draw, 1, latent, latent), Q
    initial_covariance: Tensor  # (*draw, 1, latent, latent)
    drift: Tensor | None  # (*draw, trial or 1, time - 1, latent), b from the second bin on

    def path(self, num_bins: int) -> GaussMarkov:
        """The law of the path."""
        return GaussMarkov.from_dynamics(
            self.dynamics,
            self.process_noise,
            num_bins=num_bins,
            initial_covariance=self.initial_covariance,
            drift=self.drift,
        )

    def stationary(self) -> Transition:
        """The same from equilibrium, as it is without drift."""
        return self._replace(initial_covariance=stationary_covariance(self.dynamics, self.process_noise))

    def shocks(self, path: Tensor) -> Tensor:
        r"""What a path did not get from its past, (*draw, trial, time, latent): :math:`x_1`, then :math:`b_t +
        \epsilon_t`."""
        ahead = path[..., 1:, :] - path[..., :-1, :] @ self.dynamics.mT
        return torch.cat([path[..., :1, :], ahead], -2)
