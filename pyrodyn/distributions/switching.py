r"""A trajectory whose linear dynamics switch, with the modes summed out: one random variable.

.. math::
    z_1 &\sim \pi, \qquad
    z_t \mid z_{t-1}, x_{t-1} \sim \mathrm{softmax}\big(\log P_{z_{t-1}} + R x_{t-1} + w_t\big), \\
    x_t &= A_{z_t} (x_{t-1}, \ldots, x_{t-L}) + c_{t, z_t} + \epsilon_t, \qquad \epsilon_t \sim N(0, Q_{z_t}),

with :math:`x_1 \ldots x_L \sim N(m, S)` whatever the mode. Given the path the modes are a hidden Markov chain, so that
the density is one pass of the forward algorithm, and given the modes the path is Gauss-Markov.

References
----------
Ackerson & Fu, IEEE Trans. Autom. Control 15:10 (1970); Linderman et al., AISTATS 2017 (modes that depend on the path).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrodyn.distributions.gauss_markov import GaussMarkov
from pyrodyn.linalg import mode_log_normaliser, mode_marginals, sample_modes
from pyrodyn.linalg.matrix import broadcast_shapes, cholesky

_LOG_ROOT = 0.5 * math.log(2.0 * math.pi)


class ModePotentials(NamedTuple):
    """What `pyrodyn.linalg.mode_log_normaliser` takes: the hidden Markov chain of the modes given a path."""

    initial: Tensor  # (*batch, mode)
    transition: Tensor  # (*batch, time - 1 or 1, mode, mode)
    likelihood: Tensor  # (*batch, time, mode)


class GivenModes(TorchDistribution):
    """Modes given what was observed: event (time), whole numbers from 0.

    Parameters
    ----------
    potentials : ModePotentials
    """

    arg_constraints = {}

    def __init__(self, potentials: ModePotentials) -> None:
        self.potentials = potentials
        initial, transition, likelihood = potentials
        batch = broadcast_shapes(initial.shape[:-1], transition.shape[:-3], likelihood.shape[:-2])
        super().__init__(batch, likelihood.shape[-2:-1], validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self):
        return constraints.independent(constraints.integer_interval(0, self.potentials.initial.shape[-1] - 1), 1)

    def log_prob(self, value: Tensor) -> Tensor:
        initial, transition, likelihood = self.potentials
        modes, bins, lead = initial.shape[-1], value.shape[-1], value.shape[:-1]
        first = initial.expand(*lead, modes).gather(-1, value[..., :1]).squeeze(-1)
        seen = likelihood.expand(*lead, bins, modes).gather(-1, value.unsqueeze(-1)).sum((-2, -1))
        pairs = (value[..., :-1] * modes + value[..., 1:]).unsqueeze(-1)
        steps = transition.flatten(-2).expand(*lead, bins - 1, modes**2).gather(-1, pairs).sum((-2, -1))
        return first + seen + steps - mode_log_normaliser(*self.potentials)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        shape = self._extended_shape(sample_shape)
        initial, transition, likelihood = self.potentials
        with torch.no_grad():
            likelihood = likelihood.expand(*shape, likelihood.shape[-1])
            return sample_modes(initial, transition, likelihood).squeeze(-2)

    def expand(self, batch_shape, _instance=None) -> GivenModes:
        initial, transition, likelihood = self.potentials
        wide = likelihood.expand(*batch_shape, *likelihood.shape[-2:])
        return GivenModes(ModePotentials(initial, transition, wide))


class SwitchingPath(TorchDistribution):
    r"""A path under switching linear dynamics, modes summed out.

    Parameters
    ----------
    initial : Tensor, (*batch, mode)
        Log probabilities of the mode of the first bin.
    transition : Tensor, (*batch, mode, mode)
        Log probabilities from the first mode to the second.
    dynamics : Tensor, (*batch, mode, latent, lag x latent)
        A, the columns of the last bin first.
    drift : Tensor, (*batch, time - 1 or 1, mode, latent)
        c, from the second bin on.
    process_noise : Tensor, (*batch, mode, latent, latent)
        Q, covariances.
    start_mean, start_covariance : Tensor, (*batch, latent) and (*batch, latent, latent)
        Of each of the first ``lag`` bins.
    num_bins : int
    recurrence : Tensor, (*batch, mode, latent), optional
        R: what the state adds to the logit of the next mode.
    push : Tensor, (*batch, time - 1 or 1, mode), optional
        w: what an input adds to it.
    inside : Tensor of bool, (trial, time), optional
        False behind a trial's end. Such bins count for nothing.

    Notes
    -----
    Event shape (time, latent). `log_prob` is differentiable once, in the path as in the parameters.
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        dynamics: Tensor,
        drift: Tensor,
        process_noise: Tensor,
        start_mean: Tensor,
        start_covariance: Tensor,
        *,
        num_bins: int,
        recurrence: Tensor | None = None,
        push: Tensor | None = None,
        inside: Tensor | None = None,
    ) -> None:
        self.initial, self.transition, self.dynamics, self.drift = initial, transition, dynamics, drift
        self.process_noise, self.recurrence, self.push = process_noise, recurrence, push
        self.start_mean, self.start_covariance, self.inside = start_mean, start_covariance, inside
        latent = dynamics.shape[-2]
        self.num_modes, self.lags = dynamics.shape[-3], dynamics.shape[-1] // latent
        if num_bins < self.lags:
            raise ValueError(f"num_bins must be at least the number of lags, {self.lags}, got {num_bins}")
        lead = [initial.shape[:-1], transition.shape[:-2], dynamics.shape[:-3], drift.shape[:-3]]
        lead += [process_noise.shape[:-3], start_mean.shape[:-1], start_covariance.shape[:-2]]
        lead += [recurrence.shape[:-2]] if recurrence is not None else []
        lead += [push.shape[:-2]] if push is not None else []
        super().__init__(broadcast_shapes(*lead), torch.Size((num_bins, latent)), validate_args=False)

    # ------------------------------------------------------------------------------------------ modes given the path

    def mode_potentials(self, path: Tensor) -> ModePotentials:
        """The hidden Markov chain of the modes given paths (*batch, time, latent), without the density of the start."""
        return ModePotentials(self.initial, self.transitions(path), self.likelihood(path))

    def transitions(self, path: Tensor) -> Tensor:
        """Log probabilities (*batch, time - 1 or 1, mode, mode) of the next mode given mode and path."""
        if self.recurrence is None and self.push is None:
            return self.transition.unsqueeze(-3)
        logit = torch.zeros((), dtype=path.dtype, device=path.device)
        if self.recurrence is not None:
            logit = path[..., :-1, :] @ self.recurrence.mT
        if self.push is not None:
            logit = logit + self.push
        return torch.log_softmax(self.transition.unsqueeze(-3) + logit.unsqueeze(-2), -1)

    def likelihood(self, path: Tensor) -> Tensor:
        """Log density (*batch, time, mode) of the step into each bin under each mode; zero in the first bins."""
        inverse, log_scale = self._whitening
        white = self._residual(path, inverse)
        each = -0.5 * white.square().sum(-1) - (log_scale + self.event_shape[-1] * _LOG_ROOT).unsqueeze(-2)
        if self.inside is not None:
            each = torch.where(self.inside[:, self.lags :].unsqueeze(-1), each, 0.0)
        none = each.new_zeros(*each.shape[:-2], self.lags, self.num_modes)
        return torch.cat([none, each], -2)

    def step_means(self, path: Tensor) -> Tensor:
        """Mean (*batch, time - lag, mode, latent) of the step into each bin but the first under each mode."""
        drift = self.drift if self.drift.shape[-3] == 1 else self.drift[..., self.lags - 1 :, :, :]
        moved = self._past(path) @ self.dynamics.flatten(-3, -2).mT
        return moved.unflatten(-1, self.dynamics.shape[-3:-1]) + drift

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (*batch); -inf where a path, or the parameters, overflow, as on a diverging trajectory of HMC."""
        initial, transition, likelihood = self.mode_potentials(value)
        lost = [part.isnan().flatten(part.dim() - event).any(-1) for part, event in ((transition, 3), (likelihood, 2))]
        if not any(bool(part.any()) for part in lost):
            return self.log_start(value) + mode_log_normaliser(initial, transition, likelihood)
        found = self.log_start(value) + mode_log_normaliser(initial, transition.nan_to_num(), likelihood.nan_to_num())
        return torch.where(lost[0] | lost[1], -torch.inf, found)

    def log_start(self, path: Tensor) -> Tensor:
        """Log density of the first bins, (*batch)."""
        root = cholesky(self.start_covariance)
        apart = path[..., : self.lags, :] - self.start_mean.unsqueeze(-2)
        white = torch.linalg.solve_triangular(root, apart.mT, upper=False)
        scale = root.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
        each = -0.5 * white.square().sum(-2) - scale - self.event_shape[-1] * _LOG_ROOT
        if self.inside is not None:
            each = torch.where(self.inside[:, : self.lags], each, 0.0)
        return each.sum(-1)

    def mode_probabilities(self, path: Tensor) -> Tensor:
        """Posterior probabilities (*batch, time, mode) of the modes given paths."""
        return mode_marginals(*self.mode_potentials(path))[0]

    def sample_modes(self, path: Tensor) -> Tensor:
        """Modes (*batch, time) from their posterior given paths."""
        return sample_modes(*self.mode_potentials(path)).squeeze(-2)

    # ------------------------------------------------------------------------------------------ the path given modes

    def given_modes(self, weight: Tensor) -> GaussMarkov:
        """The path given its modes, but for what modes that depend on the path say of it.

        Parameters
        ----------
        weight : Tensor, (*batch, time, mode)
            One for the mode of the bin, zero for the others. Probabilities give the Gaussian whose log density is the
            expected one: the best factor of the path beside independent modes.

        Raises
        ------
        ValueError
            With more than one lag, where the path is no chain of its own bins.
        """
        if self.lags != 1:
            raise ValueError(f"the path given its modes is a Gauss-Markov chain with one lag alone, got {self.lags}")
        inverse, _ = self._whitening
        weight = weight[..., 1:, :]
        moved = inverse @ self.dynamics
        precision, cross = inverse.mT @ inverse, moved.mT @ inverse

        def mixed(blocks: Tensor) -> Tensor:
            return (weight @ blocks.flatten(-2)).unflatten(-1, blocks.shape[-2:])

        own, back = mixed(precision), mixed(moved.mT @ moved)
        drift = self.drift
        if drift.shape[-3] == 1:
            pulled = weight @ (precision @ drift.squeeze(-3).unsqueeze(-1)).squeeze(-1)
            pushed = weight @ (cross @ drift.squeeze(-3).unsqueeze(-1)).squeeze(-1)
        else:
            each = weight.unsqueeze(-1) * drift
            pulled = torch.einsum("...kij,...tkj->...ti", precision, each)
            pushed = torch.einsum("...kij,...tkj->...ti", cross, each)
        start = torch.cholesky_inverse(cholesky(self.start_covariance))
        first = (start @ self.start_mean.unsqueeze(-1)).squeeze(-1)
        batch = broadcast_shapes(own.shape[:-3], start.shape[:-2])
        start = start.expand(*batch, *start.shape[-2:]).unsqueeze(-3)
        own, back = own.expand(*batch, *own.shape[-3:]), back.expand(*batch, *back.shape[-3:])
        diagonal = torch.cat([start, own], -3) + torch.cat([back, torch.zeros_like(start)], -3)
        batch = broadcast_shapes(pulled.shape[:-2], first.shape[:-1])
        first = first.expand(*batch, first.shape[-1]).unsqueeze(-2)
        pulled, pushed = pulled.expand(*batch, *pulled.shape[-2:]), pushed.expand(*batch, *pushed.shape[-2:])
        linear = torch.cat([first, pulled], -2) - torch.cat([pushed, torch.zeros_like(first)], -2)
        return GaussMarkov(diagonal, -mixed(cross), linear)

    def expected_likelihood(self, law: GaussMarkov) -> Tensor:
        """`likelihood` (*batch, time, mode), expected under a Gauss-Markov law of the path."""
        inverse, _ = self._whitening
        moved = inverse @ self.dynamics
        covariance, cross = law.covariance.flatten(-2), law.cross_covariance.flatten(-2)

        def traces(blocks: Tensor) -> Tensor:
            return blocks.flatten(-2).mT

        spread = (
            covariance[..., 1:, :] @ traces(inverse.mT @ inverse)
            + covariance[..., :-1, :] @ traces(moved.mT @ moved)
            - 2.0 * cross @ traces(moved.mT @ inverse)
        )
        found = self.likelihood(law.mean)
        return torch.cat([found[..., :1, :], found[..., 1:, :] - 0.5 * spread], -2)

    def averaged(self) -> SwitchingPath:
        """One mode in place of all: its steps have the mean and the covariance of those of a mode drawn at random.

        What the modes' steps differ by depends on the state; it is taken where the state has the start's spread.
        """
        dynamics, drift = self.dynamics.mean(-3, keepdim=True), self.drift.mean(-2, keepdim=True)
        turned, pushed = self.dynamics - dynamics, self.drift - drift
        apart = turned @ self.start_covariance.unsqueeze(-3) @ turned.mT
        apart = apart + (pushed.unsqueeze(-1) * pushed.unsqueeze(-2)).mean(-4)
        none = self.initial.new_zeros(1)
        return SwitchingPath(
            none, none.unsqueeze(-1), dynamics, drift, (self.process_noise + apart).mean(-3, keepdim=True),
            self.start_mean, self.start_covariance, num_bins=self.event_shape[0], inside=self.inside,
        )  # fmt: skip

    def blurred_likelihood(self, law: GaussMarkov) -> Tensor:
        """`likelihood` (*batch, time, mode) at the mean of a Gauss-Markov path, with what its law leaves open as noise.

        Where `expected_likelihood` holds a step that is not known against every mode, this finds none worse.
        """
        dynamics, covariance = self.dynamics.unsqueeze(-4), law.covariance.unsqueeze(-3)
        crossed = dynamics @ law.cross_covariance.unsqueeze(-3)
        moved = dynamics @ covariance[..., :-1, :, :, :] @ dynamics.mT
        spread = self.process_noise.unsqueeze(-4) + covariance[..., 1:, :, :, :] + moved - crossed - crossed.mT
        apart = law.mean[..., 1:, :].unsqueeze(-2) - self.step_means(law.mean)
        root = cholesky(0.5 * (spread + spread.mT))
        white = torch.linalg.solve_triangular(root, apart.unsqueeze(-1), upper=False).squeeze(-1)
        scale = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + self.event_shape[-1] * _LOG_ROOT
        each = -0.5 * white.square().sum(-1) - scale
        if self.inside is not None:
            each = torch.where(self.inside[:, 1:].unsqueeze(-1), each, 0.0)
        return torch.cat([torch.zeros_like(each[..., :1, :]), each], -2)

    # ------------------------------------------------------------------------------------------ forward in time

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        return self.sample_jointly(torch.Size(sample_shape))[0]

    def sample_jointly(self, sample_shape=torch.Size()) -> tuple[Tensor, Tensor]:  # noqa: B008
        """Paths (*sample, *batch, time, latent), and the modes (*sample, *batch, time) that made them."""
        from pyrodyn.linalg import _switching_kernels

        shape = self._extended_shape(sample_shape)
        lead, (bins, latent) = shape[:-2], self.event_shape
        like = self.initial

        def spread(part: Tensor | None, event: int) -> np.ndarray:
            """One copy for every path; what is missing adds nothing."""
            if part is None:
                part = like.new_zeros(*like.shape[:-1], *((1, self.num_modes) if event == 2 else (1,)))
            wide = part.detach().expand(*lead, *part.shape[part.dim() - event :])
            return np.ascontiguousarray(wide.reshape(-1, *wide.shape[len(lead) :]).cpu().double().numpy())

        with torch.no_grad():
            recurrence = self.recurrence
            if recurrence is None:
                recurrence = like.new_zeros(self.num_modes, latent)
            noise = torch.randn(shape, dtype=torch.float64)
            root = cholesky(self.start_covariance).cpu()
            first = self.start_mean.cpu().unsqueeze(-2) + noise[..., : self.lags, :] @ root.mT
            path = torch.cat([first, torch.zeros_like(noise[..., self.lags :, :])], -2).reshape(-1, bins, latent)
            uniform = torch.rand(path.shape[:-1], dtype=torch.float64)
            modes = np.empty(path.shape[:-1], np.int64)
            path = np.ascontiguousarray(path.numpy())
            _switching_kernels.simulate(
                spread(self.initial, 1),
                spread(self.transition, 2),
                spread(recurrence, 2),
                spread(self.push, 2),
                spread(self.dynamics, 3),
                spread(self.drift, 3),
                spread(cholesky(self.process_noise), 3),
                uniform.numpy(),
                noise.reshape(-1, bins, latent).numpy(),
                modes,
                path,
            )
        drawn = torch.from_numpy(path).reshape(shape).to(like.device)
        return drawn, torch.from_numpy(modes).reshape(shape[:-1]).to(like.device)

    def expand(self, batch_shape, _instance=None) -> SwitchingPath:
        # The start alone is expanded: what the modes share goes on being shared.
        return SwitchingPath(
            self.initial,
            self.transition,
            self.dynamics,
            self.drift,
            self.process_noise,
            self.start_mean.expand(*batch_shape, self.event_shape[-1]),
            self.start_covariance,
            num_bins=self.event_shape[0],
            recurrence=self.recurrence,
            push=self.push,
            inside=self.inside,
        )

    # ------------------------------------------------------------------------------------------ shared parts

    @property
    def _whitening(self) -> tuple[Tensor, Tensor]:
        """Inverse roots of the process noise (*batch, mode, latent, latent), and the logs of their determinants."""
        root = cholesky(self.process_noise)
        eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
        inverse = torch.linalg.solve_triangular(root, eye.expand_as(root), upper=False)
        return inverse, root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _past(self, path: Tensor) -> Tensor:
        """The bins before each but the first, the last one first: (*batch, time - lag, lag x latent)."""
        bins, lags = self.event_shape[0], self.lags
        return torch.cat([path[..., lags - 1 - lag : bins - 1 - lag, :] for lag in range(lags)], -1)

    def _residual(self, path: Tensor, inverse: Tensor) -> Tensor:
        """Whitened innovations (*batch, time - lag, mode, latent) under each mode."""
        lags = self.lags
        both = torch.cat([path[..., lags:, :], self._past(path)], -1)
        # Each mode's own step, side by side: one product for all.
        step = torch.cat([inverse, -(inverse @ self.dynamics)], -1)
        drift = (inverse.unsqueeze(-4) @ self.drift.unsqueeze(-1)).squeeze(-1)
        drift = drift if drift.shape[-3] == 1 else drift[..., lags - 1 :, :, :]
        return (both @ step.flatten(-3, -2).mT).unflatten(-1, step.shape[-3:-1]) - drift
