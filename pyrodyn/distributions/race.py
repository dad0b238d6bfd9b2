"""Several Markov chains that all stop when the first of them reaches its last state, as one random variable."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrodyn.linalg.matrix import broadcast_shapes


class StoppedRace(TorchDistribution):
    """Joint path of independent Markov chains up to the first that reaches its end: event (time), batch (*draw, trial).

    From the bin on in which one of the chains is in its last state, all stay where they are. A joint state is one whole
    number, that of the last chain running fastest. Chains move apart, so that a step costs as many products of small
    matrices as there are chains, and the matrix of joint states is never made.

    Parameters
    ----------
    initial : Tensor, (*draw, 1, condition, chain, state)
        Log probabilities of the first state of every chain.
    transition : Tensor, (*draw, 1, condition, chain, state - 1, state)
        Log probabilities, rows from all states but the last, columns to the next.
    which : Tensor of int, (trial,)
        Condition of every trial.
    num_bins : int
    """

    arg_constraints = {}

    def __init__(self, initial: Tensor, transition: Tensor, which: Tensor, num_bins: int) -> None:
        self.initial, self.transition, self.which = initial, transition, which
        self.chains, self.size = initial.shape[-2:]
        batch = broadcast_shapes(initial.shape[:-3], transition.shape[:-4], which.shape)
        super().__init__(batch, torch.Size((num_bins,)), validate_args=False)

    @property
    def num_states(self) -> int:
        """Of all chains together."""
        return self.size**self.chains

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self):
        return constraints.independent(constraints.integer_interval(0, self.num_states - 1), 1)

    def places(self, value: Tensor) -> Tensor:
        """The state of every chain, (*value, chain)."""
        power = self.size ** torch.arange(self.chains - 1, -1, -1, device=value.device)
        return value.unsqueeze(-1) // power % self.size

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.expand(broadcast_shapes(value.shape, (*self.batch_shape, 1)))
        places, which = self.places(value), self.which[:, None, None]
        chain = torch.arange(self.chains, device=value.device)
        first = self.initial.flatten(-3).expand(*value.shape[:-1], -1)
        start = first.gather(-1, ((which * self.chains + chain) * self.size + places[..., :1, :]).flatten(-2)).sum(-1)
        before, after = places[..., :-1, :], places[..., 1:, :]
        stopped = (before == self.size - 1).any(-1)
        rows = self.transition.flatten(-4).expand(*value.shape[:-1], -1)
        row = (which * self.chains + chain) * (self.size - 1) + before.clamp(max=self.size - 2)
        moved = rows.gather(-1, (row * self.size + after).flatten(-2)).unflatten(-1, before.shape[-2:]).sum(-1)
        stay = torch.where((before == after).all(-1), 0.0, -torch.inf).to(moved.dtype)
        return start + torch.where(stopped, stay, moved).sum(-1)

    def log_normaliser(self, likelihood: Tensor) -> Tensor:
        """Log of the sum over all paths of what was observed, (*draw, trial).

        ``likelihood`` (*draw, trial, time, state) is logarithmic.
        """
        lead, *parts = self._flat(likelihood)
        total, _ = self._filter(*parts, keep=False)
        return total.reshape(*lead, -1)

    def sample_given(self, likelihood: Tensor) -> Tensor:
        """Paths (*draw, trial, time) drawn from the posterior; ``likelihood`` as in `log_normaliser`."""
        with torch.no_grad():
            lead, initial, transition, likelihood = self._flat(likelihood)
            _, filtered = self._filter(initial, transition, likelihood, keep=True)
            joint = filtered[-1].flatten(2)
            drawn = [_pick(joint)]
            for belief in reversed(filtered[:-1]):
                places = self.places(drawn[0])
                columns = [
                    transition[:, :, d].take_along_dim(places[..., None, None, d], -1).squeeze(-1)
                    for d in range(self.chains)
                ]
                weight = torch.nn.functional.pad(_outer(columns), (0, 1) * self.chains).flatten(2)
                stopped = (places == self.size - 1).any(-1, keepdim=True).to(weight.dtype)
                weight = weight.scatter_add(-1, drawn[0].unsqueeze(-1), stopped)
                drawn.insert(0, _pick(weight * belief.flatten(2)))
            return torch.stack(drawn, -1).reshape(*lead, *self.which.shape, -1)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        shape = self._extended_shape(sample_shape)
        return self.sample_given(self.initial.new_zeros(1).expand(*shape, self.num_states))  # no observations

    def _filter(
        self, initial: Tensor, transition: Tensor, likelihood: Tensor, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Log likelihood (draw, trial), and, to keep, what is known of the state in each bin (draw, trial, *state)."""
        tiny = torch.finfo(initial.dtype).tiny
        place = torch.arange(self.size, device=initial.device) == self.size - 1
        stopped = (1.0 - _outer([(~place).to(initial.dtype)[None, None]] * self.chains)).squeeze(0)
        belief = _outer([initial[:, :, d] for d in range(self.chains)])
        total, kept = initial.new_zeros(()), []
        for t in range(self.event_shape[0]):
            if t:
                belief = self._moved(belief, transition) + stopped * belief
            # From the largest term of those that paths reach: what none does may be by far the likeliest.
            known = torch.where(belief > 0.0, belief.clamp(min=tiny).log(), -torch.inf).flatten(2)
            scores = known + likelihood[:, :, t]
            top = scores.detach().amax(-1, keepdim=True)
            weight = (scores - top).exp()
            total = total + (weight.sum(-1).log() + top.squeeze(-1))
            belief = (weight / weight.sum(-1, keepdim=True)).reshape(belief.shape)
            if keep:
                kept.append(belief)
        return total, kept

    def _moved(self, belief: Tensor, transition: Tensor) -> Tensor:
        """What runs on, a step later."""
        found = belief[(..., *[slice(-1)] * self.chains)]
        for d in range(self.chains):
            last = found.movedim(2 + d, -1)
            ahead = last.flatten(2, -2) @ transition[:, :, d]
            found = ahead.reshape(*last.shape[:-1], -1).movedim(-1, 2 + d)
        return found

    def _flat(self, likelihood: Tensor) -> tuple[torch.Size, Tensor, Tensor, Tensor]:
        """Draw dimensions, and with one for all: probabilities of every trial and chain, and log likelihoods."""
        lead = broadcast_shapes(self.batch_shape[:-1], likelihood.shape[:-3])

        def of_trials(value: Tensor, event: int) -> Tensor:
            own = value.squeeze(-event - 2).index_select(-event - 1, self.which)
            return own.expand(*lead, *own.shape[-event - 1 :]).reshape(-1, *own.shape[-event - 1 :]).exp()

        flat = likelihood.expand(*lead, *likelihood.shape[-3:]).reshape(-1, *likelihood.shape[-3:])
        return lead, of_trials(self.initial, 2), of_trials(self.transition, 3), flat

    def expand(self, batch_shape, _instance=None) -> StoppedRace:
        lead = torch.Size(batch_shape)[:-1]
        return StoppedRace(
            self.initial.expand(*lead, 1, *self.initial.shape[-3:]),
            self.transition.expand(*lead, 1, *self.transition.shape[-4:]),
            self.which.expand(batch_shape[-1]),
            self.event_shape[0],
        )


def _outer(parts: list[Tensor]) -> Tensor:
    """Outer product of (draw, trial, size) along their last dims."""
    found = parts[0]
    for part in parts[1:]:
        found = found.unsqueeze(-1) * part.reshape(*part.shape[:2], *[1] * (found.dim() - 2), -1)
    return found


def _pick(weight: Tensor) -> Tensor:
    """Positions (draw, trial) drawn with weights (draw, trial, state)."""
    return torch.multinomial(weight.flatten(0, 1), 1).reshape(weight.shape[:2])
