r"""Paths that may jump: each step is a draw of Student's t."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import StudentT, constraints

from pyrodyn.linalg.matrix import broadcast_shapes


class StudentSteps(TorchDistribution):
    r"""Independent autoregressive paths with heavy-tailed steps; event (time, latent).

    .. math::
        x_1 = s \epsilon_1, \qquad x_t = a x_{t-1} + s (1 - a^2)^{1/2} \epsilon_t, \qquad \epsilon_t \sim t_\nu .

    Under a Gaussian law many small steps cost less than a large one that leads to the same place; under this one a jump
    costs about its logarithm.

    Parameters
    ----------
    persistence, scale : Tensor, (*batch, latent)
        a, at least 0 and below 1, and s.
    degrees : float
        :math:`\nu`.
    num_bins : int
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, persistence: Tensor, scale: Tensor, degrees: float, *, num_bins: int) -> None:
        self.persistence, self.scale, self.degrees = persistence, scale, degrees
        batch = broadcast_shapes(persistence.shape[:-1], scale.shape[:-1])
        super().__init__(batch, torch.Size((num_bins, persistence.shape[-1])), validate_args=False)

    @property
    def _step(self) -> Tensor:
        """Scale of the steps, (*batch, 1, latent)."""
        return (self.scale * (1.0 - self.persistence.square()).sqrt()).unsqueeze(-2)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        drawn = StudentT(self.scale.new_tensor(self.degrees)).rsample(self._extended_shape(sample_shape))
        first, later = self.scale.unsqueeze(-2) * drawn[..., :1, :], self._step * drawn[..., 1:, :]
        path, left, reach = torch.cat([first, later], -2), self.persistence.unsqueeze(-2), 1
        while reach < self.event_shape[0]:  # each bin holds what is left of its last ``reach`` steps
            path = path + left * torch.nn.functional.pad(path[..., :-reach, :], (0, 0, reach, 0))
            left, reach = left.square(), 2 * reach
        return path

    def log_prob(self, value: Tensor) -> Tensor:
        steps = value[..., 1:, :] - self.persistence.unsqueeze(-2) * value[..., :-1, :]
        law = StudentT(self.scale.new_tensor(self.degrees), scale=self.scale.unsqueeze(-2))
        later = StudentT(self.scale.new_tensor(self.degrees), scale=self._step)
        return law.log_prob(value[..., :1, :]).sum((-2, -1)) + later.log_prob(steps).sum((-2, -1))

    def expand(self, batch_shape, _instance=None) -> StudentSteps:
        batch = torch.Size(batch_shape)
        return StudentSteps(
            self.persistence.expand(*batch, -1), self.scale.expand(*batch, -1), self.degrees,
            num_bins=self.event_shape[0],
        )  # fmt: skip
