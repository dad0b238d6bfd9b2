"""A whole path of modes of a Markov chain as one random variable."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrodyn.linalg.markov import sample_modes


class MarkovModes(TorchDistribution):
    """Path of modes of a Markov chain: event (time), whole numbers from 0.

    Parameters
    ----------
    initial : Tensor, (*batch, mode)
        Probabilities of the first mode.
    transition : Tensor, (*batch, mode, mode)
        Probabilities, rows from a mode, columns to the next.
    num_bins : int
    """

    arg_constraints = {}

    def __init__(self, initial: Tensor, transition: Tensor, num_bins: int) -> None:
        self.initial, self.transition = initial, transition
        batch = torch.broadcast_shapes(initial.shape[:-1], transition.shape[:-2])
        super().__init__(batch, torch.Size((num_bins,)), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self):
        return constraints.independent(constraints.integer_interval(0, self.initial.shape[-1] - 1), 1)

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.expand(torch.broadcast_shapes(value.shape, (*self.batch_shape, 1)))
        first = self.initial.log().expand(*value.shape[:-1], -1)
        start = first.gather(-1, value[..., :1]).squeeze(-1)
        rows = self.transition.log().expand(*value.shape[:-1], *self.transition.shape[-2:]).flatten(-2)
        steps = value[..., :-1] * self.initial.shape[-1] + value[..., 1:]
        return start + rows.gather(-1, steps).sum(-1)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        shape = self._extended_shape(sample_shape)
        flat = self.initial.new_zeros(*shape, self.initial.shape[-1])  # no observations
        with torch.no_grad():
            return sample_modes(self.initial.log(), self.transition.log().unsqueeze(-3), flat).squeeze(-2)

    def expand(self, batch_shape, _instance=None) -> MarkovModes:
        batch = torch.Size(batch_shape)
        return MarkovModes(
            self.initial.expand(batch + self.initial.shape[-1:]),
            self.transition.expand(batch + self.transition.shape[-2:]),
            self.event_shape[0],
        )
