r"""What models of switching linear dynamics share: the prior of the modes' steps, and its coordinates."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.distributions import GaugedLoading, SwitchingPath
from pyrodyn.linalg.matrix import cholesky
from pyrodyn.linalg.taming import lagged_radius, log_tame_jacobian, tame, untame
from pyrodyn.models._modes import mode_contrasts, numbering
from pyrodyn.models._switching_blocks import Blocks
from pyrodyn.models._switching_steps import ModeSteps, process_noise
from pyrodyn.recording import Recording

SCALE = (0.5, 5.0)  # shape and rate of the prior of psi, the size of the process noise: mean .1, and small by habit
RECURRENCE = (1.0, 1.0)  # shape and rate of the inverse-gamma prior of the variance of a logit's slope
EXTRA_DEGREES = 2.0  # of freedom beyond the latents': the process noise has psi as its mean


class RegionSteps(NamedTuple):
    """The regression of a region's latents on what enters them: regions are independent given path and modes."""

    place: slice  # of the region's latents
    rows: Tensor  # (regressor,): which of the regressors of a step
    mean: Tensor  # (regressor, latent), of the prior
    sd: Tensor  # (regressor,)
    degrees: float  # of freedom of the Wishart prior


@dataclass(frozen=True)
class StepPrior:
    r"""Prior of switching steps.

    .. math::
        \pi &\sim \mathrm{Dir}(1), \qquad P_j \sim \mathrm{Dir}(\alpha + \kappa e_j), \\
        A_k &= \mathrm{tame}(\bar A_k), \qquad \bar A_{k,ij} \sim N(a \delta_{ij}, s_{ij}^2), \qquad
        b_k, B_k \sim N(0, s_b^2), \\
        Q_{k,r}^{-1} &\sim \mathrm{Wishart}(D_r + 2, I / \psi), \qquad \psi \sim \mathrm{Gamma}, \\
        (R, r) &= H v, \qquad v \sim N(0, \sigma_R^2), \qquad \sigma_R^2 \sim \mathrm{InverseGamma},

    with `tame` scaling a matrix by its spectral radius to one below ``max_radius`` (see `pyrodyn.linalg.taming`): it
    moves stable matrices hardly at all, and no draw of the prior explodes. With lags, entries of lag l have a standard
    deviation l times smaller and mean zero. H has orthonormal columns that sum to zero: of the slopes only differences
    between modes matter. Steep slopes need a large r wherever modes do not meet at the origin; rows of P alone could
    not give one, since a Dirichlet law hardly knows probabilities of exp(-10). All modes are exchangeable.
    :math:`Q_k` is block-diagonal over regions, and s is :math:`s / \sqrt{D_r}` within region r; between regions see
    `Blocks`.

    Attributes
    ----------
    modes : int
    blocks : Blocks
        The regions that the latents fall into: one, or several, then with one lag alone.
    lags, num_inputs : int
    concentration, stickiness : float
        :math:`\alpha` and :math:`\kappa`.
    persistence, dynamics_scale, bias_scale : float
        a, s and s_b.
    max_radius : float
    recurrent : bool
        Whether the state, and inputs, enter the transitions.
    """

    modes: int
    blocks: Blocks
    lags: int
    num_inputs: int
    concentration: float
    stickiness: float
    persistence: float
    dynamics_scale: float
    bias_scale: float
    max_radius: float
    recurrent: bool

    @property
    def latent_dim(self) -> int:
        return self.blocks.size

    @property
    def freedom(self) -> float:
        """Latents times their degrees of freedom, of all regions."""
        return sum(dim * (dim + EXTRA_DEGREES) for dim in self.blocks.dims)

    @property
    def switches(self) -> bool:
        """Whether there is more than one mode."""
        return self.modes > 1

    @property
    def counts(self) -> Tensor:
        """Parameters of the Dirichlet priors of transitions, (mode, mode_to)."""
        eye = torch.eye(self.modes, dtype=torch.float64)
        return self.concentration + self.stickiness * eye

    @cached_property
    def mean(self) -> Tensor:
        """Of the free dynamics, (latent, lag x latent)."""
        return self.persistence * torch.eye(self.latent_dim, self.lags * self.latent_dim, dtype=torch.float64)

    @cached_property
    def sd(self) -> Tensor:
        """Of the free dynamics, (latent, lag x latent); 0 where there is no edge."""
        lag = torch.arange(self.lags, dtype=torch.float64).repeat_interleave(self.latent_dim) + 1.0
        own = torch.where(self.blocks.within, self.dynamics_scale, 1.0)
        return (own * self.blocks.scale).repeat(1, self.lags) / lag

    def entries(self, dynamics: Tensor) -> Tensor:
        """What the dynamics (*batch, mode, latent, lag x latent) hold where they may, (*batch, mode, entry)."""
        return dynamics[..., self.sd > 0.0]

    def from_entries(self, entries: Tensor) -> Tensor:
        """The inverse of `entries`."""
        shape = (self.latent_dim, self.lags * self.latent_dim)
        where = (self.sd > 0.0).flatten().nonzero().squeeze(-1).to(entries.device)
        flat = entries.new_zeros(*entries.shape[:-1], shape[0] * shape[1])
        return flat.index_copy(-1, where, entries).unflatten(-1, shape)

    def regressions(self, input_scale: Tensor) -> list[RegionSteps]:
        """The regressions that the steps of a mode fall into, one for each region; inputs in their own units."""
        rest = torch.zeros(1 + self.num_inputs, self.latent_dim, dtype=torch.float64)
        mean, extra = torch.cat([self.mean.mT, rest]), self.lags * self.latent_dim + torch.arange(len(rest))
        bias = torch.full((1,), self.bias_scale, dtype=torch.float64)
        last = torch.cat([bias, self.bias_scale / input_scale[: self.num_inputs]])
        found = []
        for place, dim in zip(self.blocks.places, self.blocks.dims, strict=True):
            sd = self.sd[place.start]  # the same for all of a region's latents
            rows = torch.cat([sd.nonzero().squeeze(-1), extra])
            sd = torch.cat([sd[sd > 0.0], last])
            found.append(RegionSteps(place, rows, mean[rows, place], sd, dim + EXTRA_DEGREES))
        return found

    def log_normal(self, dynamics: Tensor) -> Tensor:
        """Log density (*batch, mode) of free dynamics, up to a constant."""
        return -0.5 * (self.entries(dynamics - self.mean) / self.entries(self.sd)).square().sum(-1)

    def log_dynamics(self, dynamics: Tensor) -> Tensor:
        """Log prior density (*batch, mode) of dynamics (*batch, mode, latent, lag x latent), up to a constant."""
        free = untame(dynamics, self.max_radius)
        found = self.log_normal(free) - log_tame_jacobian(free, self.max_radius, self.sd > 0.0)
        return torch.where(lagged_radius(dynamics) < self.max_radius, found, -torch.inf)

    @property
    def contrasts(self) -> Tensor:
        """H, (mode, mode - 1)."""
        return mode_contrasts(self.modes)

    def sample(self, recording: Recording) -> ModeSteps:
        """Place the priors."""
        modes, dim, device = self.modes, self.latent_dim, recording.device

        def normal(name: str, mean: Tensor | float, sd: Tensor | float, *shape: int) -> Tensor:
            law: Any = dist.Normal(
                torch.as_tensor(mean, dtype=torch.float64, device=device), torch.as_tensor(sd).to(device)
            )
            return pyro.sample(name, law.expand(torch.Size(shape)).to_event(len(shape)))

        one = torch.ones(1, dtype=torch.float64, device=device)
        initial = transition = one
        if self.switches:
            initial = pyro.sample("initial", dist.Dirichlet(one.expand(modes)))
            transition = pyro.sample("transition", dist.Dirichlet(self.counts.to(device)).to_event(1))
        entries = self.entries(self.mean)
        free = self.from_entries(normal("free_dynamics", entries, self.entries(self.sd), modes, len(entries)))
        bias = normal("bias", 0.0, self.bias_scale, modes, dim)
        if not self.switches:
            initial = torch.ones_like(bias[..., 0])
            transition = initial.unsqueeze(-1)
        gain = None
        if self.num_inputs:
            gain = normal("drive", 0.0, self.bias_scale, modes, dim, self.num_inputs) / recording.input_scale
        shape, rate = (one.squeeze(0) * part for part in SCALE)
        scale = pyro.sample("process_scale", dist.Gamma(shape, rate))
        roots = []
        for suffix, own in zip(self.blocks.suffixes, self.blocks.dims, strict=True):
            law = GaugedLoading(own, own, tuple(range(own)), degrees=own + EXTRA_DEGREES)
            roots.append(pyro.sample(f"precision_root{suffix}", law.expand((modes,)).to_event(1)))
        recurrence = border = mode_gain = None
        if self.recurrent and self.switches:
            shape, rate = (one.squeeze(0) * part for part in RECURRENCE)
            spread = pyro.sample("recurrence_variance", dist.InverseGamma(shape, rate)).sqrt()[..., None, None]
            slopes, borders = normal("slopes", 0.0, 1.0, modes - 1, dim), normal("borders", 0.0, 1.0, modes - 1, 1)
            inputs = [normal("input_slopes", 0.0, 1.0, modes - 1, self.num_inputs)] if self.num_inputs else []
            weights = spread * torch.cat([slopes, *inputs, borders], -1)
            recurrence, border, mode_gain = self.pushes(weights, recording.input_scale if self.num_inputs else one)
        return ModeSteps(
            initial, transition, tame(free, self.max_radius), bias,
            self.blocks.diagonal([process_noise(root, scale) for root in roots]), gain, recurrence, border, mode_gain,
        )  # fmt: skip

    def pushes(self, slopes: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """R, r and W from free weights (*batch, mode - 1, feature) of latents, inputs and a one."""
        whole, dim = self.contrasts.to(slopes.device) @ slopes, self.latent_dim
        gain = whole[..., dim:-1] / input_scale if self.num_inputs else None
        return whole[..., :dim], whole[..., -1], gain

    def sites(
        self, steps: ModeSteps, scale: Tensor, recurrence_variance: Tensor | None, input_scale: Tensor
    ) -> dict[str, Tensor]:
        """The program's sites that give these steps, each with the batch of the steps.

        ``scale`` and ``recurrence_variance`` are the sites ``process_scale`` and ``recurrence_variance``.
        """
        free = self.entries(untame(steps.dynamics, self.max_radius))
        found = {"free_dynamics": free, "bias": steps.bias, "process_scale": scale}
        for suffix, place in zip(self.blocks.suffixes, self.blocks.places, strict=True):
            precision = scale[..., None, None, None] * torch.linalg.inv(steps.process_noise[..., place, place])
            found[f"precision_root{suffix}"] = cholesky(0.5 * (precision + precision.mT))
        if self.switches:
            found |= {"initial": steps.initial, "transition": steps.transition}
        if steps.input_gain is not None:
            found["drive"] = steps.input_gain * input_scale
        if steps.recurrence is not None:
            assert recurrence_variance is not None and steps.recurrence_bias is not None
            spread = recurrence_variance.sqrt()[..., None, None]
            found |= {"recurrence_variance": recurrence_variance}
            found["slopes"] = self.contrasts.mT @ steps.recurrence / spread
            found["borders"] = self.contrasts.mT @ steps.recurrence_bias.unsqueeze(-1) / spread
            if steps.mode_gain is not None:
                found["input_slopes"] = self.contrasts.mT @ (steps.mode_gain * input_scale) / spread
        return found

    def nearest(self, values: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sites (*draw, 1, *event) with the modes numbered as lies nearest to those of ``reference``."""
        if not self.switches:
            return dict(values)

        def told(sites: Mapping[str, Tensor]) -> Tensor:  # (*draw, 1, mode, feature)
            size = sites["free_dynamics"] / self.entries(self.sd).to(sites["bias"].device)
            return torch.cat([size, sites["bias"] / self.bias_scale], -1)

        costs = (told(reference).unsqueeze(-2) - told(values).unsqueeze(-3)).square().sum(-1)
        return self.numbered(values, numbering(costs))

    def numbered(self, values: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
        """Sites (*draw, 1, *event) with mode ``order[..., k]`` (*draw, 1, mode) as the new mode k."""
        moved = dict(values)
        roots = [f"precision_root{suffix}" for suffix in self.blocks.suffixes]
        for name in ("initial", "transition", "free_dynamics", "bias", "drive", *roots):
            if name in values:
                index = order.reshape(*order.shape, *(1,) * (values[name].dim() - order.dim()))
                moved[name] = values[name].take_along_dim(index, order.dim() - 1)
        moved["transition"] = moved["transition"].take_along_dim(order.unsqueeze(-2), -1)
        basis = self.contrasts.to(order.device)
        for name in ("slopes", "borders", "input_slopes"):
            if name in values:
                moved[name] = basis.mT @ (basis @ values[name]).take_along_dim(order.unsqueeze(-1), -2)
        return moved

    def path(
        self, steps: ModeSteps, recording: Recording, inside: Tensor | None = None, start_scale: float = 1.0
    ) -> SwitchingPath:
        """Law of the path; its first bins are normal about zero with standard deviation ``start_scale``."""
        drift = steps.bias.unsqueeze(-3)
        push = None if steps.recurrence_bias is None else steps.recurrence_bias.unsqueeze(-2)  # the same in all bins
        if steps.input_gain is not None and recording.inputs is not None:
            later = recording.inputs[:, 1:]
            driven = later @ steps.input_gain.flatten(-3, -2).mT
            drift = drift + driven.unflatten(-1, steps.bias.shape[-2:])
            if steps.mode_gain is not None:
                driven = later @ steps.mode_gain.mT
                push = driven if push is None else driven + push
        tiny = torch.finfo(torch.float64).tiny
        eye = torch.eye(self.latent_dim, dtype=torch.float64, device=recording.device)
        return SwitchingPath(
            steps.initial.clamp(min=tiny).log(),
            steps.transition.clamp(min=tiny).log(),
            steps.dynamics,
            drift,
            steps.process_noise,
            torch.zeros_like(eye[0]),
            start_scale**2 * eye,
            num_bins=recording.num_bins,
            recurrence=steps.recurrence,
            push=push,
            inside=inside,
        )


class Renumbered:
    """Models of switching steps whose modes may be numbered in any order."""

    num_modes: int

    @abstractmethod
    def step_prior(self, recording: Recording) -> StepPrior:
        """Prior of the steps of the path."""

    def log_copies(self, recording: Recording) -> float:
        """Modes may be numbered in any order."""
        return math.lgamma(self.num_modes + 1)

    def nearest_copy(
        self, values: Mapping[str, Tensor], reference: Mapping[str, Tensor], recording: Recording
    ) -> dict[str, Tensor]:
        """Modes numbered such that their dynamics and biases lie nearest to those of the reference."""
        return self.step_prior(recording).nearest(values, reference)
