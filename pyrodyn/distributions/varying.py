"""Gauss-Markov paths whose steps differ: unequal times, and nonlinear flows made linear."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrodyn.distributions.gauss_markov import GaussMarkov
from pyrodyn.linalg.matrix import broadcast_shapes, precision_of


def varying_chain(
    dynamics: Tensor,
    process_noise: Tensor,
    *,
    initial_covariance: Tensor,
    initial_mean: Tensor | None = None,
    drift: Tensor | None = None,
) -> GaussMarkov:
    r"""A linear Gaussian path whose steps differ.

    .. math:: x_1 \sim N(\mu_1, \Sigma_1), \qquad x_t = A_t x_{t-1} + b_t + \epsilon_t, \quad \epsilon_t \sim N(0, Q_t)

    Parameters
    ----------
    dynamics, process_noise : Tensor, (*batch, time - 1, latent, latent)
        :math:`A_t` and :math:`Q_t` for t = 2 ... T.
    initial_covariance : Tensor, (*batch, latent, latent)
    initial_mean : Tensor, (*batch, latent), optional
        Zero by default.
    drift : Tensor, (*batch, time - 1, latent), optional
        :math:`b_t`.

    See `GaussMarkov.from_dynamics` for steps that are all the same.
    """
    later, dim = dynamics.shape[-3], dynamics.shape[-1]
    batch = broadcast_shapes(dynamics.shape[:-3], process_noise.shape[:-3], initial_covariance.shape[:-2])
    precision, log_det = precision_of(process_noise)
    first_precision, first_log_det = precision_of(initial_covariance)
    pushed = dynamics.mT @ precision
    shape = (*batch, later, dim, dim)
    first = first_precision.unsqueeze(-3).expand(*batch, 1, dim, dim)
    behind = torch.cat([first, precision.expand(shape)], -3)
    ahead = torch.cat([(pushed @ dynamics).expand(shape), torch.zeros_like(first)], -3)
    normaliser = 0.5 * ((later + 1) * dim * math.log(2.0 * math.pi) + first_log_det + log_det.sum(-1))
    linear = torch.zeros(later + 1, dim, dtype=dynamics.dtype, device=dynamics.device)
    if drift is not None:
        pulled = (precision @ drift.unsqueeze(-1)).squeeze(-1)
        back = -(pushed @ drift.unsqueeze(-1)).squeeze(-1)
        normaliser = normaliser + 0.5 * (pulled * drift).sum((-2, -1))
        none = torch.zeros_like(pulled[..., :1, :]) if later else drift.new_zeros(*drift.shape[:-2], 1, dim)
        linear = torch.cat([none, pulled], -2) + torch.cat([back, none], -2)
    if initial_mean is not None:
        pull = (first_precision @ initial_mean.unsqueeze(-1)).squeeze(-1)
        normaliser = normaliser + 0.5 * (pull * initial_mean).sum(-1)
        rest = pull.new_zeros(*pull.shape[:-1], later, dim)
        linear = linear + torch.cat([pull.unsqueeze(-2), rest], -2)
    return GaussMarkov(behind + ahead, -pushed.expand(shape), linear, normaliser=normaliser)
