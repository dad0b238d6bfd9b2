r"""A trajectory of a nonlinear network with Gaussian noise, as one random variable."""

from __future__ import annotations

import copy
import math
from typing import Protocol

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrodyn.linalg.matrix import broadcast_shapes


class Recurrence(Protocol):
    """What carries a state from bin to bin, its weights and inputs bound.

    Attributes
    ----------
    batch_shape : torch.Size
        (*draw, trial) or (*draw, 1): what weights and inputs broadcast to.
    """

    batch_shape: torch.Size

    def advance(self, states: Tensor) -> Tensor:
        """F of the states (*batch, time - 1, latent) of all bins but the last, all of them at once."""
        ...

    def scan(self, initial: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        """The states (*batch, time - 1, latent) after ``initial`` (*batch, latent): gain * F(state before) + shift.

        ``gain`` and ``shift`` are (*batch, time - 1, latent).
        """
        ...


class NonlinearMarkov(TorchDistribution):
    r"""A path :math:`x_1 \sim N(\mu, s_1^2), \; x_t \sim N(a_t \odot F_t(x_{t-1}) + b_t, \; s_t^2)`, s diagonal.

    With a of one and b of zero it is a noisy network; what `filtered` makes of it has the same form.

    Parameters
    ----------
    transition : Recurrence
        F.
    initial_mean, initial_sd : Tensor, (*batch, latent)
    noise_sd : Tensor, (*batch, time - 1, latent)
        Axes may have size one.
    num_bins : int
    gain, shift : Tensor, (*batch, time - 1, latent), optional
        a and b.

    Notes
    -----
    Event shape (time, latent). The density of a path needs F at all bins at once and no recurrence; a draw needs one.
    Sampling is reparametrised.
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        transition: Recurrence,
        initial_mean: Tensor,
        initial_sd: Tensor,
        noise_sd: Tensor,
        *,
        num_bins: int,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        self.transition, self.initial_mean, self.initial_sd = transition, initial_mean, initial_sd
        self.noise_sd, self.gain, self.shift = noise_sd, gain, shift
        shapes = [initial_mean.shape[:-1], initial_sd.shape[:-1], transition.batch_shape, noise_sd.shape[:-2]]
        shapes += [part.shape[:-2] for part in (gain, shift) if part is not None]
        latent = max(initial_mean.shape[-1], noise_sd.shape[-1])
        super().__init__(broadcast_shapes(*shapes), torch.Size((num_bins, latent)), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of paths (*batch, time, latent), (*batch)."""
        first = _log_normal(value[..., 0, :], self.initial_mean, self.initial_sd).sum(-1)
        later = _log_normal(value[..., 1:, :], self._centre(value[..., :-1, :]), self.noise_sd)
        return first + later.sum((-2, -1))

    def _centre(self, before: Tensor) -> Tensor:
        centre = self.transition.advance(before)
        if self.gain is not None:
            centre = self.gain * centre
        return centre if self.shift is None else centre + self.shift

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        shape = self._extended_shape(sample_shape)
        return self.transform(torch.randn(shape, dtype=self.initial_mean.dtype, device=self.initial_mean.device))

    def transform(self, noise: Tensor) -> Tensor:
        """Map iid standard normal ``noise`` (*sample, *batch, time, latent) to paths."""
        first = self.initial_mean + self.initial_sd * noise[..., 0, :]
        shift = self.noise_sd * noise[..., 1:, :]
        if self.shift is not None:
            shift = shift + self.shift
        return torch.cat([first.unsqueeze(-2), self.transition.scan(first, self.gain, shift)], -2)

    def noise_of(self, path: Tensor) -> Tensor:
        """The noise that `transform` maps to ``path``."""
        first = (path[..., 0, :] - self.initial_mean) / self.initial_sd
        later = (path[..., 1:, :] - self._centre(path[..., :-1, :])) / self.noise_sd
        return torch.cat([first.unsqueeze(-2), later], -2)

    def filtered(self, precision: Tensor, linear: Tensor) -> NonlinearMarkov:
        r"""The chain whose every step is multiplied by a potential and normalised.

        .. math:: q(x_t \mid x_{t-1}) \propto p(x_t \mid x_{t-1}) \, \exp(-\tfrac12 \lambda_t x_t^2 + \eta_t x_t)

        Every step is drawn towards its potential by a gain of its own, so that errors do not add up along the path;
        with potentials of zero it is the prior. Unlike a product of the whole densities it needs no pass back in time:
        what later bins say has to stand in the earlier potentials, where a recognition network can put it.

        Parameters
        ----------
        precision, linear : Tensor, (*batch, time, latent)
            :math:`\lambda`, not negative, and :math:`\eta`.

        References
        ----------
        Krishnan, Shalit & Sontag, AAAI 2017 (structured inference networks).
        """
        own = self.initial_sd.square().reciprocal()
        first = (own + precision[..., 0, :]).reciprocal()
        weight = self.noise_sd.square().reciprocal()
        later = (weight + precision[..., 1:, :]).reciprocal()
        gain, shift = later * weight, later * linear[..., 1:, :]
        if self.shift is not None:
            shift = shift + gain * self.shift
        return NonlinearMarkov(
            self.transition,
            first * (own * self.initial_mean + linear[..., 0, :]),
            first.sqrt(),
            later.sqrt(),
            num_bins=self.event_shape[0],
            gain=gain if self.gain is None else gain * self.gain,
            shift=shift,
        )

    def pulled(self, ratio: Tensor, level: Tensor) -> NonlinearMarkov:
        """`filtered` by potentials about ``level`` whose precision is ``ratio`` times that of the step itself.

        Both are (*batch, time, latent); a step goes a share ratio / (1 + ratio) of the way to its level.
        """
        first, later = ratio[..., 0, :] / self.initial_sd.square(), ratio[..., 1:, :] / self.noise_sd.square()
        lead = broadcast_shapes(first.shape[:-1], later.shape[:-2])
        bins, latent = later.shape[-2:]
        parts = [first.expand(lead + (latent,)).unsqueeze(-2), later.expand(lead + (bins, latent))]
        precision = torch.cat(parts, -2)
        return self.filtered(precision, precision * level)

    def expand(self, batch_shape, _instance=None) -> NonlinearMarkov:
        expanded = copy.copy(self)
        expanded._batch_shape = torch.Size(batch_shape)
        return expanded


def _log_normal(value: Tensor, centre: Tensor, sd: Tensor) -> Tensor:
    return -0.5 * ((value - centre) / sd).square() - sd.log() - 0.5 * math.log(2.0 * math.pi)
