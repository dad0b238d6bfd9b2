r"""Any linear dynamics to bounded ones: scaled down as a whole, by their spectral radius.

.. math:: \phi(\rho) = \rho \, (1 + \rho^p)^{-1/p} < 1

moves small radii hardly at all, and has a known inverse. The radius is homogeneous, so that the Jacobian is known too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrodyn.linalg.stationary import spectral_radius

POWER = 20  # it moves a spectral radius of .8 by .0005 and one of .95 to .936


def shrinkage(radius: Tensor) -> Tensor:
    r""":math:`\phi(\rho) / \rho`."""
    return (-torch.log1p(radius**POWER) / POWER).exp()


def growth(radius: Tensor) -> Tensor:
    r""":math:`\phi^{-1}(\rho) / \rho`; a radius of one and above counts as one just below."""
    return (1.0 - radius.clamp(max=1.0 - 1e-12) ** POWER) ** (-1.0 / POWER)


def log_slope(radius: Tensor) -> Tensor:
    r""":math:`\log \phi'(\rho)`."""
    return -(1.0 + 1.0 / POWER) * torch.log1p(radius**POWER)


def lagged_radius(dynamics: Tensor) -> Tensor:
    """Spectral radius (*batch) of dynamics (*batch, latent, lag x latent), those of the last bin first."""
    return spectral_radius(companion(dynamics))


def companion(dynamics: Tensor) -> Tensor:
    """The same dynamics (*batch, latent, lag x latent) as those of a state that holds all lags, one step long."""
    latent, width = dynamics.shape[-2:]
    if width == latent:
        return dynamics
    below = torch.eye(width - latent, width, dtype=dynamics.dtype, device=dynamics.device)
    return torch.cat([dynamics, below.expand(*dynamics.shape[:-2], *below.shape)], -2)


def tame(free: Tensor, limit: float) -> Tensor:
    """Dynamics (*batch, latent, lag x latent) with a radius below ``limit``, from any such matrix."""
    return _scaled(free, shrinkage(lagged_radius(free) / limit))


def untame(dynamics: Tensor, limit: float) -> Tensor:
    """The inverse of `tame`."""
    return _scaled(dynamics, growth(lagged_radius(dynamics) / limit))


def log_tame_jacobian(free: Tensor, limit: float, present: Tensor | None = None) -> Tensor:
    """Log Jacobian determinant of `tame`, (*batch), in the entries that are ``present`` (latent, lag x latent).

    By default in all of them. The others are zero, before and after.
    """
    latent, width = free.shape[-2:]
    lag = (torch.arange(width) // latent + 1).expand(latent, -1)
    # Scaled radially by s = (1 + u^p)^(-1/p), lag by lag in powers of s, and d phi / du = s^(p + 1).
    powers = int((lag if present is None else lag[present]).sum())
    return -(powers / POWER + 1.0) * torch.log1p((lagged_radius(free) / limit) ** POWER)


def _scaled(dynamics: Tensor, factor: Tensor) -> Tensor:
    """What enters from ``lag`` bins ago times that power of the factor: all eigenvalues times the factor."""
    latent, width = dynamics.shape[-2:]
    lag = torch.arange(width, device=dynamics.device) // latent + 1
    return dynamics * factor[..., None, None] ** lag
