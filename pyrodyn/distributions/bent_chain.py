r"""A Gauss-Markov law bent bin by bin in the coordinates that it whitens.

.. math:: x = m + L\,(\mu + S \epsilon), \qquad \epsilon \sim N(0, I),

with mean m and root L of the chain, and S block-diagonal over bins. With :math:`\mu = 0` and S the identity it is the
chain. So a guide keeps how the chain moves with the parameters, and learns what the chain gets wrong.
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrodyn.distributions.gauss_markov import GaussMarkov


class BentChain(TorchDistribution):
    """See the module.

    Parameters
    ----------
    chain : GaussMarkov
        Batch (*draw, trial).
    shift : Tensor, (trial, time, latent)
    root : Tensor, (trial, time, latent, latent)
        S, lower triangular with a positive diagonal.

    Notes
    -----
    Event shape (time, latent). Sampling is reparametrised.
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, chain: GaussMarkov, shift: Tensor, root: Tensor) -> None:
        self.chain, self.shift, self.root = chain, shift, root
        super().__init__(chain.batch_shape, chain.event_shape, validate_args=False)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.shift.dtype, device=self.shift.device)
        return self.chain.transform(self.shift + (self.root @ noise.unsqueeze(-1)).squeeze(-1))

    def log_prob(self, value: Tensor) -> Tensor:
        apart = (self.chain.whiten(value) - self.shift).unsqueeze(-1)
        noise = torch.linalg.solve_triangular(self.root.expand(*apart.shape[:-1], -1), apart, upper=False)
        log_root = self.root.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
        size = self.event_shape.numel()
        density = -0.5 * noise.square().sum((-3, -2, -1)) - 0.5 * size * math.log(2.0 * math.pi)
        return density - log_root - self.chain.log_whitening_jacobian

    def expand(self, batch_shape, _instance=None) -> BentChain:
        return BentChain(self.chain.expand(batch_shape), self.shift, self.root)
