r"""Many Hamiltonian Monte Carlo chains as one tensor, adapted across chains.

The chains of a group have one posterior, one step size :math:`\epsilon`, one trajectory length and one mass matrix
:math:`(L L^\top)^{-1}`; in the coordinates :math:`z = L^{-1} q` that posterior is nearly standard normal. Groups, as
the replicates of a calibration, share nothing but the calls of the density.

The trajectory length follows the gradient of the ChEES criterion: a quarter of the expected squared change of
:math:`\lVert z - E z \rVert^2` in a transition. A trajectory of length t is a share u of the longest one, with u from a
van der Corput sequence, so that no frequency of the posterior is met in every trajectory.

References
----------
Hoffman, Radul & Sountsov, AISTATS 2021 (ChEES-HMC); Hoffman & Gelman, JMLR 15:1593 (2014), on dual averaging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

DIVERGENCE = 1000.0  # error of the energy that counts as a divergence
WINDOWS = (0.1, 0.22, 0.42, 0.7)  # shares of the warm-up after which the mass matrix is renewed
MAX_STEPS = 256  # leapfrog steps in a trajectory
RATE = 0.05  # of Adam on the log trajectory length
SHRINKAGE = 5.0  # weight of the mass matrix so far, in draws beside one for each dimension

Gradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Ensemble:
    """The state of all chains, and how it moves on.

    Parameters
    ----------
    gradient : callable
        From positions (some group, chain, dimension), and which groups these are, to log densities (some group, chain)
        and their gradients; where it fails, minus infinity and zeros.
    position : Tensor, (group, chain, dimension)
    root : Tensor, (group, dimension, dimension) or (group, dimension)
        Lower triangular L, or the diagonal of one: a first guess at a root of the posterior covariance.
    warmup : int
        Transitions in which everything adapts; all later ones leave the posterior invariant.
    target_acceptance : float
        Mean over chains and transitions.
    """

    _COUNTERS = ("count", "restarted", "seen")
    _TENSORS = tuple(
        "position value slope root aim log_step log_step_mean error log_length log_length_mean steepness "
        "centre first second".split()
    )

    def __init__(
        self, gradient: Gradient, position: Tensor, root: Tensor, *, warmup: int, target_acceptance: float
    ) -> None:
        groups, _, dimension = position.shape
        self.gradient, self.warmup, self.target = gradient, warmup, target_acceptance
        self.position, self.root = position, root
        self.value, self.slope = gradient(position, torch.arange(groups, device=position.device))
        none = position.new_zeros(groups)
        self.count = 0  # transitions so far
        self.log_step = self.log_step_mean = none + math.log(0.6 * dimension**-0.25)
        self.log_length = self.log_length_mean = none  # of the longest trajectory, in units of the posterior sd
        self.steepness = none  # mean square of the gradient of the criterion
        self._begin_step_search()
        self._begin_window()

    @property
    def step_size(self) -> Tensor:
        return (self.log_step if self.count < self.warmup else self.log_step_mean).exp()

    @property
    def length(self) -> Tensor:
        return (self.log_length if self.count < self.warmup else self.log_length_mean).exp()

    def advance(self) -> tuple[Tensor, Tensor, int]:
        """One transition of every chain: acceptance probability and divergence (group, chain), gradients taken."""
        share = _van_der_corput(int(self.count) + 1)
        step = self.step_size
        steps = (share * self.length / step).ceil().clamp(1, MAX_STEPS)  # (group)
        momentum = drawn(torch.randn, self.position)
        place, value, slope = self.position.clone(), self.value.clone(), self.slope.clone()
        kicked = momentum + (0.5 * step)[:, None, None] * self._pull(slope)
        total = int(steps.max())
        for done in range(1, total + 1):
            live = (steps >= done).nonzero().squeeze(-1)  # groups whose trajectory has not ended
            place[live] += step[live, None, None] * self._push(kicked[live], live)
            value[live], slope[live] = self.gradient(place[live], live)
            kick = torch.where(steps[live] == done, 0.5, 1.0) * step[live]
            kicked[live] += kick[:, None, None] * self._pull(slope[live], live)
        change = (value - 0.5 * kicked.square().sum(-1)) - (self.value - 0.5 * momentum.square().sum(-1))
        change = torch.where(torch.isfinite(change), change, -torch.inf)
        acceptance = change.clamp(max=0.0).exp()
        accepted = drawn(torch.rand, acceptance) < acceptance
        if self.count < self.warmup:
            self._adapt(place, kicked, acceptance, steps * step)
        self.position = torch.where(accepted.unsqueeze(-1), place, self.position)
        self.value = torch.where(accepted, value, self.value)
        self.slope = torch.where(accepted.unsqueeze(-1), slope, self.slope)
        self.count = self.count + 1
        if self.count <= self.warmup:
            self._learn()
        return acceptance, change < -DIVERGENCE, total

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next transition depends on but the random numbers."""
        counters = {name: np.array(getattr(self, name)) for name in self._COUNTERS}
        return counters | {name: getattr(self, name).cpu().numpy().copy() for name in self._TENSORS}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a `state`."""
        for name in self._COUNTERS:
            setattr(self, name, int(state[name]))
        for name in self._TENSORS:
            setattr(self, name, torch.from_numpy(np.array(state[name])).to(self.position.device))

    def _push(self, momentum: Tensor, groups: Any = slice(None)) -> Tensor:
        """L p: from the coordinates z to positions."""
        root = self.root[groups]
        return momentum @ root.mT if root.dim() == 3 else momentum * root.unsqueeze(1)

    def _pull(self, slope: Tensor, groups: Any = slice(None)) -> Tensor:
        """L' g: gradients in the coordinates z."""
        root = self.root[groups]
        return slope @ root if root.dim() == 3 else slope * root.unsqueeze(1)

    def _whiten(self, difference: Tensor) -> Tensor:
        """L^-1 d: differences of positions in the coordinates z."""
        if self.root.dim() == 3:
            return torch.linalg.solve_triangular(self.root, difference.mT, upper=False).mT
        return difference / self.root.unsqueeze(1)

    def _adapt(self, place: Tensor, momentum: Tensor, acceptance: Tensor, time: Tensor) -> None:
        """Step size by dual averaging, trajectory length by Adam on the gradient of the ChEES criterion."""
        now = self.count - self.restarted + 1
        self.error = self.error + (self.target - acceptance.mean(-1) - self.error) / (now + 10)
        self.log_step = self.aim - math.sqrt(now) / 0.05 * self.error
        self.log_step_mean = torch.lerp(self.log_step_mean, self.log_step, now**-0.75)

        share = acceptance / acceptance.sum(-1, keepdim=True).clamp(min=1e-300)
        before = self._whiten(self.position - self.position.mean(1, keepdim=True))
        after = self._whiten(place - (share.unsqueeze(-1) * place).sum(1, keepdim=True))
        gain = (after.square().sum(-1) - before.square().sum(-1)) * (after * momentum).sum(-1)
        rise = torch.nan_to_num(time * torch.where(share > 0.0, share * gain, 0.0).sum(-1), 0.0, 0.0, 0.0)
        self.steepness = torch.lerp(self.steepness, rise.square(), 0.05)
        size = (self.steepness / (1.0 - 0.95 ** (self.count + 1))).sqrt()
        shortest = self.log_step_mean
        moved = self.log_length + RATE * rise / size.clamp(min=1e-300)
        self.log_length = torch.minimum(torch.maximum(moved, shortest), shortest + math.log(MAX_STEPS))
        self.log_length_mean = torch.lerp(self.log_length_mean, self.log_length, (self.count + 1) ** -0.6)

    def _learn(self) -> None:
        """Take up the positions of all chains; at the end of a window they are the new mass matrix."""
        apart = self._whiten(self.position - self.centre)
        self.seen = self.seen + apart.shape[1]
        self.first = self.first + apart.sum(1)
        dense = self.root.dim() == 3
        self.second = self.second + (apart.mT @ apart if dense else apart.square().sum(1))
        if self.count not in {max(1, round(share * self.warmup)) for share in WINDOWS}:
            return
        mean = self.first / self.seen
        trust = self.seen / (self.seen + SHRINKAGE + self.position.shape[-1])
        if dense:
            spread = self.second / self.seen - mean.unsqueeze(-1) * mean.unsqueeze(-2)
            identity = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
            self.root = self.root @ torch.linalg.cholesky(trust * spread + (1.0 - trust) * identity)
        else:
            spread = self.second / self.seen - mean.square()
            self.root = self.root * (trust * spread + (1.0 - trust)).sqrt()
        self._begin_step_search()
        self._begin_window()

    def _begin_step_search(self) -> None:
        """Forget what was learned of the step size but its value."""
        self.restarted = self.count
        self.aim = self.log_step_mean + math.log(2.0)
        self.error = torch.zeros_like(self.aim)

    def _begin_window(self) -> None:
        """Forget the moments of the positions: in the coordinates z, about where the chains are now."""
        self.centre = self.position.mean(1, keepdim=True)
        self.seen = 0
        self.first = torch.zeros_like(self.position[:, 0])
        self.second = torch.zeros_like(self.root)


def drawn(law: Callable[..., Tensor], like: Tensor) -> Tensor:
    """Random numbers of a tensor's shape, on its device; drawn on the CPU, whose stream a checkpoint keeps."""
    return law(like.shape, dtype=like.dtype, device="cpu").to(like.device)


def _van_der_corput(number: int) -> float:
    """The digits of ``number`` in base two, mirrored at the point: evenly spread over (0, 1)."""
    value, digit = 0.0, 0.5
    while number:
        value, digit, number = value + digit * (number & 1), 0.5 * digit, number >> 1
    return value
