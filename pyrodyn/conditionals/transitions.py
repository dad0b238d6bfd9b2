r"""Transition probabilities of modes given their path: Dirichlet rows, and logits that depend on the state.

With rows :math:`P_j = g_j / \sum_k g_{jk}` of independent :math:`g_{jk} \sim \mathrm{Gamma}(\alpha_{jk}, 1)`, the
logits :math:`\log g_{jk} + (H v\, \xi_t)_k` of the next mode have a log-concave posterior without a flat direction. It
is approximated by a t law about its mode, and what that leaves over enters by elliptical slice sampling, so that the
draw is exact whatever the approximation. The logarithm of a rare transition is far from normal; so g is also drawn by
itself, exactly, beside the times :math:`u_t \sim \mathrm{Exp}(\sum_k g_{jk} e^{(H v\, \xi_t)_k})` of a race between the
modes that may come next.

References
----------
Murray, Adams & MacKay, AISTATS 2010, and Nishihara, Murray & Adams, JMLR 15:2087 (2014), on elliptical slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyrodyn.linalg.matrix import cholesky

NEWTON = 12  # steps towards the mode of the logits
TAIL = 5.0  # degrees of freedom of the t law that a draw of the logits starts from
SHRINKS = 200  # of the bracket of a slice: it halves or so each time


def transition_counts(modes: Tensor, num_modes: int, inside: Tensor | None = None) -> Tensor:
    """Numbers of transitions (chain, mode, mode) in paths of modes (chain, trial, time), up to a trial's end."""
    pairs = modes[..., :-1] * num_modes + modes[..., 1:]
    weight = torch.ones_like(pairs, dtype=torch.float64)
    if inside is not None:
        weight = weight * inside[:, 1:]
    found = torch.zeros(len(modes), num_modes**2, dtype=torch.float64)
    return found.scatter_add(1, pairs.flatten(1), weight.flatten(1)).unflatten(-1, (num_modes, num_modes))


def draw_dirichlet(concentration: Tensor) -> Tensor:
    """Probabilities (*batch, mode); one that underflows is kept at the smallest number."""
    gamma = torch._standard_gamma(concentration).clamp(min=torch.finfo(torch.float64).tiny)
    return gamma / gamma.sum(-1, keepdim=True)


def elliptical_slice(state: Tensor, centre: Tensor, apart: Tensor, rest: Callable[[Tensor], Tensor]) -> Tensor:
    """A move (chain, number) that leaves ``N(centre, S) exp(rest)`` as it is, ``apart`` being a draw of N(0, S)."""
    place = state - centre
    level = rest(state) + torch.rand(len(state), dtype=state.dtype).log()
    angle = 2.0 * math.pi * torch.rand(len(state), dtype=state.dtype)
    lower, upper = angle - 2.0 * math.pi, angle.clone()
    found, open_ = state.clone(), torch.ones(len(state), dtype=torch.bool)
    for _ in range(SHRINKS):
        turned = centre + angle.cos().unsqueeze(-1) * place + angle.sin().unsqueeze(-1) * apart
        hit = open_ & (rest(turned) > level)
        found = torch.where(hit.unsqueeze(-1), turned, found)
        open_ = open_ & ~hit
        if not bool(open_.any()):
            break
        lower = torch.where(angle < 0.0, angle, lower)
        upper = torch.where(angle >= 0.0, angle, upper)
        angle = torch.where(open_, lower + (upper - lower) * torch.rand(len(state), dtype=state.dtype), angle)
    return found


class StateLogits:
    r"""Logits of the next mode that depend on the state: :math:`\log g_{z_{t-1}} + H v\, \xi_t`.

    Parameters
    ----------
    before, after : Tensor of int, (chain, step)
        Modes of the bins before and after each step.
    seen : Tensor of bool, (step,) or None
        Steps that count.
    features : Tensor, (chain, step, feature)
        :math:`\xi`: the state before the step, the input into it, and a one.
    contrasts : Tensor, (mode, mode - 1)
        H, columns that sum to zero.
    concentration : Tensor, (mode, mode)
        :math:`\alpha`.
    precision : Tensor, (chain, feature)
        Of the normal prior of v, for each feature.
    """

    def __init__(
        self,
        before: Tensor,
        after: Tensor,
        seen: Tensor | None,
        features: Tensor,
        contrasts: Tensor,
        concentration: Tensor,
        precision: Tensor,
    ) -> None:
        modes = len(concentration)
        self.modes, self.width = modes, features.shape[-1]
        self.design = torch.cat([torch.nn.functional.one_hot(before, modes).to(features.dtype), features], -1)
        self.after = after
        self.seen = torch.ones(after.shape[-1], dtype=features.dtype) if seen is None else seen.to(features.dtype)
        self.contrasts, self.concentration, self.precision = contrasts, concentration, precision

    def pack(self, log_gamma: Tensor, weights: Tensor) -> Tensor:
        """One vector (chain, number) of log g (chain, mode, mode) and v (chain, mode - 1, feature)."""
        return torch.cat([log_gamma.flatten(1), weights.flatten(1)], -1)

    def unpack(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        table = vector[:, : self.modes**2].unflatten(-1, (self.modes, self.modes))
        return table, vector[:, self.modes**2 :].unflatten(-1, (self.modes - 1, self.width))

    def log_posterior(self, vector: Tensor) -> Tensor:
        """Log density (chain,) up to a constant."""
        return self._log_prior(vector) + self._fit(self._logits(vector))

    def draw(self, vector: Tensor) -> Tensor:
        """A move of the vector that leaves the posterior as it is."""
        centre, root = self.approximation()

        def distance(at: Tensor) -> Tensor:
            return (root.mT @ (at - centre).unsqueeze(-1)).squeeze(-1).square().sum(-1)

        def rest(at: Tensor) -> Tensor:
            weight = 0.5 * (TAIL + at.shape[-1]) * torch.log1p(distance(at) / TAIL)
            return torch.nan_to_num(self.log_posterior(at) + weight, nan=-torch.inf)

        # A t law about the mode in place of the Gaussian: given its scale it is one again, and no tail is beyond it.
        shape = torch.full_like(distance(vector), 0.5 * (TAIL + vector.shape[-1]))
        scale = 0.5 * (TAIL + distance(vector)) / torch._standard_gamma(shape)
        apart = torch.linalg.solve_triangular(root.mT, torch.randn_like(vector).unsqueeze(-1), upper=True).squeeze(-1)
        return self._race(elliptical_slice(vector, centre, scale.sqrt().unsqueeze(-1) * apart, rest))

    def _race(self, vector: Tensor) -> Tensor:
        """The table of log g anew."""
        table, weights = self.unpack(vector)
        before, features = self.design[..., : self.modes], self.design[..., self.modes :]
        push = features @ (self.contrasts @ weights).mT
        largest = push.amax(-1, keepdim=True)
        push = (push - largest).exp()
        speed = ((before @ table.exp()) * push).sum(-1)
        waited = torch.empty_like(speed).exponential_() / speed * self.seen
        after = torch.nn.functional.one_hot(self.after, self.modes) * self.seen.unsqueeze(-1)
        rate = 1.0 + before.mT @ (waited.unsqueeze(-1) * push)
        gamma = torch._standard_gamma(self.concentration + before.mT @ after) / rate
        return self.pack(gamma.clamp(min=torch.finfo(gamma.dtype).tiny).log(), weights)

    def approximation(self) -> tuple[Tensor, Tensor]:
        """Mode (chain, number) and root of the precision there, by Newton's method from a start that knows no chain's
        present place, so that a draw may be made with it."""
        start = self.concentration.log().expand(len(self.design), -1, -1)
        at = self.pack(start, self.design.new_zeros(len(self.design), self.modes - 1, self.width))
        value = self.log_posterior(at)
        for _ in range(NEWTON):
            slope, root = self._expansion(at)
            step = torch.cholesky_solve(slope.unsqueeze(-1), root).squeeze(-1)
            size = torch.ones_like(value)
            for _ in range(20):
                ahead = at + size.unsqueeze(-1) * step
                gained = self.log_posterior(ahead)
                worse = ~(gained >= value)
                if not bool(worse.any()):
                    break
                size = torch.where(worse, 0.5 * size, size)
            at, value = torch.where(worse.unsqueeze(-1), at, ahead), torch.where(worse, value, gained)
        return at, self._expansion(at)[1]

    def _logits(self, vector: Tensor) -> Tensor:
        table, weights = self.unpack(vector)
        return self.design @ torch.cat([table, (self.contrasts @ weights).mT], 1)

    def _fit(self, logits: Tensor) -> Tensor:
        chosen = logits.gather(-1, self.after.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, -1)
        return chosen @ self.seen

    def _log_prior(self, vector: Tensor) -> Tensor:
        table, weights = self.unpack(vector)
        of_table = (self.concentration * table - table.exp()).sum((-2, -1))
        return of_table - 0.5 * (self.precision.unsqueeze(1) * weights.square()).sum((-2, -1))

    def _expansion(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and the root of minus the Hessian."""
        table, weights = self.unpack(vector)
        share = torch.softmax(self._logits(vector), -1)
        apart = (torch.nn.functional.one_hot(self.after, self.modes) - share) * self.seen.unsqueeze(-1)
        pushed = self.design.mT @ apart  # (chain, feature, mode)
        slope = self.pack(
            pushed[:, : self.modes] + self.concentration - table.exp(),
            (pushed[:, self.modes :] @ self.contrasts).mT - self.precision.unsqueeze(1) * weights,
        )
        # Minus the Hessian in the whole weights (feature, mode), from every pair of modes; then to those that are free.
        wide = self.design.shape[-1]
        whole = share.new_empty(len(share), wide, self.modes, wide, self.modes)
        for k in range(self.modes):
            for other in range(k, self.modes):
                weight = -share[..., k] * share[..., other] + (share[..., k] if k == other else 0.0)
                block = (self.design * (weight * self.seen).unsqueeze(-1)).mT @ self.design
                whole[:, :, k, :, other] = whole[:, :, other, :, k] = block
        basis = self._basis(wide).to(whole.dtype)
        hessian = basis.mT @ whole.flatten(3).flatten(1, 2) @ basis
        prior = torch.cat([table.exp().flatten(1), self.precision.repeat(1, self.modes - 1)], -1)
        return slope, cholesky(hessian + torch.diag_embed(prior))

    def _basis(self, wide: int) -> Tensor:
        """Whole weights (feature x mode) from the vector."""
        free = self.modes**2
        basis = torch.zeros(wide * self.modes, free + (self.modes - 1) * self.width, dtype=self.contrasts.dtype)
        basis[:free, :free] = torch.eye(free, dtype=basis.dtype)
        for f in range(self.width):
            rows = slice((self.modes + f) * self.modes, (self.modes + f + 1) * self.modes)
            basis[rows, free + f :: self.width] = self.contrasts
        return basis
