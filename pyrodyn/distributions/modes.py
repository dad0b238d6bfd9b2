"""A whole path of modes of a Markov chain as one random variable."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrodyn.linalg.markov import mode_log_normaliser, sample_modes
from pyrodyn.linalg.matrix import broadcast_shapes

FEW = 10  # modes, up to which a transition for each trial costs less than a call for each condition


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
        batch = broadcast_shapes(initial.shape[:-1], transition.shape[:-2])
        super().__init__(batch, torch.Size((num_bins,)), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self):
        return constraints.independent(constraints.integer_interval(0, self.initial.shape[-1] - 1), 1)

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.expand(broadcast_shapes(value.shape, (*self.batch_shape, 1)))
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


class ConditionedModes(TorchDistribution):
    """Paths of modes whose Markov chain depends on the condition of a trial: event (time), batch (*draw, trial).

    Up to ten modes, all draws and trials go through the filter in one call, each trial with a transition of its own.
    With more, as on a grid of positions, trials of one condition are filtered together with the transition that they
    share, and conditions and draws are taken one after another.

    Parameters
    ----------
    initial : Tensor, (*draw, 1, condition, mode)
        Log probabilities of the first mode.
    transition : Tensor, (*draw, 1, condition, step, mode, mode)
        Log probabilities, rows from a mode, columns to the next; of every step from bin to bin, or one for all.
    which : Tensor of int, (trial,)
        Condition of every trial.
    num_bins : int
    """

    arg_constraints = {}

    def __init__(self, initial: Tensor, transition: Tensor, which: Tensor, num_bins: int) -> None:
        self.initial, self.transition, self.which = initial, transition, which
        batch = broadcast_shapes(initial.shape[:-2], transition.shape[:-4], which.shape)
        super().__init__(batch, torch.Size((num_bins,)), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self):
        return constraints.independent(constraints.integer_interval(0, self.initial.shape[-1] - 1), 1)

    def log_prob(self, value: Tensor) -> Tensor:
        modes = self.initial.shape[-1]
        value = value.expand(broadcast_shapes(value.shape, (*self.batch_shape, 1)))
        which = self.which.unsqueeze(-1)
        first = self.initial.flatten(-2).expand(*value.shape[:-1], -1)
        start = first.gather(-1, which * modes + value[..., :1]).squeeze(-1)
        rows, times = self.transition.flatten(-4).expand(*value.shape[:-1], -1), self.transition.shape[-3]
        time = torch.arange(value.shape[-1] - 1, device=value.device).clamp(max=times - 1)
        steps = ((which * times + time) * modes + value[..., :-1]) * modes + value[..., 1:]
        return start + rows.gather(-1, steps).sum(-1)

    def log_normaliser(self, likelihood: Tensor) -> Tensor:
        """Log of the sum over all paths of what was observed, (*draw, trial).

        ``likelihood`` (*draw, trial, time, mode) is logarithmic.
        """
        return self._of_groups(mode_log_normaliser, likelihood)

    def sample_given(self, likelihood: Tensor) -> Tensor:
        """Paths (*draw, trial, time) drawn from the posterior; ``likelihood`` as in `log_normaliser`."""
        return self._of_groups(lambda *potentials: sample_modes(*potentials).squeeze(-2), likelihood)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            return self.sample_given(self.initial.new_zeros(*shape, self.initial.shape[-1]))  # no observations

    def _of_groups(self, function, likelihood: Tensor) -> Tensor:
        """What a function of (initial, transition, likelihood) gives for every draw and condition, put together."""
        lead = broadcast_shapes(self.batch_shape[:-1], likelihood.shape[:-3])
        initial, transition = (
            part.squeeze(-part_dims)
            .expand(*lead, *part.shape[1 - part_dims :])
            .reshape(-1, *part.shape[1 - part_dims :])
            for part, part_dims in ((self.initial, 3), (self.transition, 5))
        )
        likelihood = likelihood.expand(*lead, *likelihood.shape[-3:]).reshape(-1, *likelihood.shape[-3:])
        if likelihood.shape[-1] <= FEW:
            own = function(initial[:, self.which], transition[:, self.which], likelihood)
            return own.reshape(*lead, *own.shape[1:])
        groups = list(self._groups())
        back = torch.cat([trials for _, trials in groups]).argsort()
        found = [
            torch.cat([function(start[c], links[c], seen[trials]) for c, trials in groups])[back]
            for start, links, seen in zip(initial, transition, likelihood, strict=True)
        ]
        return torch.stack(found).reshape(*lead, *found[0].shape)

    def _groups(self) -> Iterator[tuple[int, Tensor]]:
        """Conditions that occur, each with the positions of its trials."""
        for condition in self.which.unique().tolist():
            yield condition, (self.which == condition).nonzero().squeeze(-1)

    def expand(self, batch_shape, _instance=None) -> ConditionedModes:
        lead = torch.Size(batch_shape)[:-1]
        return ConditionedModes(
            self.initial.expand(*lead, 1, *self.initial.shape[-2:]),
            self.transition.expand(*lead, 1, *self.transition.shape[-4:]),
            self.which.expand(batch_shape[-1]),
            self.event_shape[0],
        )
