r"""Independent Gaussian processes as one path: smooth priors over time, at the cost of dense matrices."""

from __future__ import annotations

import copy
import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrodyn.linalg.matrix import broadcast_shapes, cholesky


class GaussianProcess(TorchDistribution):
    r"""Paths whose latents are independent Gaussian processes seen at some times.

    Parameters
    ----------
    mean : Tensor, (*batch, time, latent)
    covariance : Tensor, (*batch, latent, time, time)
        Batches broadcast.

    Notes
    -----
    Event shape (time, latent). Sampling is reparametrised. A path of T bins costs :math:`T^3` for each latent; chains
    (`GaussMarkov`) are for long ones.
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self._mean, self.covariance = mean, covariance
        self._root: Tensor | None = None
        batch = broadcast_shapes(mean.shape[:-2], covariance.shape[:-3])
        event = torch.Size((covariance.shape[-1], covariance.shape[-3]))
        super().__init__(batch, event, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Means (*batch, time, latent)."""
        return self._mean

    @property
    def root(self) -> Tensor:
        """Lower Cholesky factors (*batch, latent, time, time)."""
        if self._root is None:
            self._root = cholesky(self.covariance)
        return self._root

    @property
    def variance(self) -> Tensor:
        """Marginal variances (*batch, time, latent)."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).mT

    def log_prob(self, value: Tensor) -> Tensor:
        noise = torch.linalg.solve_triangular(self.root, (value - self.mean).mT.unsqueeze(-1), upper=False)
        volume = self.root.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
        size = self.event_shape.numel()
        return -0.5 * noise.square().sum((-3, -2, -1)) - volume - 0.5 * size * math.log(2.0 * math.pi)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        shape = self._extended_shape(sample_shape)
        return self.transform(torch.randn(shape, dtype=self.mean.dtype, device=self.mean.device))

    def transform(self, noise: Tensor) -> Tensor:
        """Map iid standard normal ``noise`` (*sample, *batch, time, latent) to paths."""
        return self.mean + (self.root @ noise.mT.unsqueeze(-1)).squeeze(-1).mT

    def condition(self, precision: Tensor, linear: Tensor) -> GaussianProcess:
        r"""Multiply by potentials :math:`\exp(-\tfrac12 \lambda_t x_t^2 + \eta_t x_t)` and renormalise.

        Both are (*batch, time, latent), and the precision is not negative. With W the diagonal of its root and K the
        covariance, the new covariance is :math:`K - K W (I + W K W)^{-1} W K`, which no precision of zero harms.
        """
        weight = precision.mT.sqrt().unsqueeze(-1)
        scaled = weight * self.covariance
        inner = scaled * weight.mT + torch.eye(self.event_shape[0], dtype=scaled.dtype, device=scaled.device)
        half = torch.linalg.solve_triangular(cholesky(inner), scaled, upper=False)
        covariance = self.covariance - half.mT @ half
        pull = (linear - precision * self.mean).mT.unsqueeze(-1)
        jitter = 1e-10 * torch.eye(self.event_shape[0], dtype=scaled.dtype, device=scaled.device)
        return GaussianProcess(self.mean + (covariance @ pull).squeeze(-1).mT, covariance + jitter)

    def expand(self, batch_shape, _instance=None) -> GaussianProcess:
        expanded = copy.copy(self)
        expanded._batch_shape = torch.Size(batch_shape)
        return expanded
