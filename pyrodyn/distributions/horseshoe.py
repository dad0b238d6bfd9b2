r"""Coupled dynamics whose edges are shrunk instead of taken out: a group horseshoe over blocks."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to
from torch.distributions.constraints import Constraint
from torch.nn.functional import softplus

from pyrodyn.distributions.network import NetworkLayout, NetworkPrior, StableNetwork, log_stability, sample_stable

MOST = 60.0  # of the logarithm of a scale, beyond which no probability of an edge leads


class HorseshoeNetwork(TorchDistribution):
    r"""Regularised group horseshoe over the blocks of coupled dynamics, jointly restricted to stable ones.

    .. math::
        a_e \sim N(0, \tilde s_e^2 I), \qquad \tilde s_e = \frac{\sigma_e\, s_e}{(1 + s_e^2)^{1/2}}, \qquad
        s_e = t_e \tau \lambda_e, \qquad \tau, \lambda_e \sim \mathrm{Cauchy}^+(1),

    for the entries :math:`a_e` of edge e; all other entries are normal, as in `NetworkPrior`, and the whole is
    multiplied by :math:`h(\rho(A))`. An edge is thus near zero, or nearly the slab :math:`N(0, \sigma_e^2)`.
    :math:`t_e` is such that :math:`P(s_e > 1)`, which is that an edge has at least the slab's scale over root two,
    equals its prior probability; an edge with a prior probability of one has the slab's own scale.

    Parameters
    ----------
    layout : NetworkLayout
    mean, sd : Tensor, (entry,)
        As in `NetworkPrior`; ``sd`` of an edge's entries is :math:`\sigma_e`.
    probability : Tensor, (edge,)

    Notes
    -----
    A value is one vector: the entries, then :math:`\log \tau`, then :math:`\log \lambda_e` of every edge. It is one
    site because the restriction to stable systems is joint: with a site for the scales, the density of the entries
    would have a normalising constant that depends on them. Unconstrained coordinates are entries over their scales
    (not centred), tamed as those of `NetworkPrior` are.

    References
    ----------
    Carvalho, Polson & Scott, Biometrika 97:465 (2010); Piironen & Vehtari, Electronic Journal of Statistics 11:5018
    (2017), on the regularised form.
    """

    arg_constraints = {}
    has_rsample = False

    def __init__(self, layout: NetworkLayout, mean: Tensor, sd: Tensor, probability: Tensor, batch_shape=()) -> None:
        self.layout, self.mean_entry, self.sd_entry, self.probability = layout, mean, sd, probability
        # Of every entry the place of its edge among (edges, none).
        self.owner = torch.where(layout.edge < 0, len(layout.edges), layout.edge).to(mean.device)
        self.log_reach = torch.tensor([log_reach(float(p)) for p in probability], dtype=mean.dtype, device=mean.device)
        size = len(layout.edge) + 1 + len(layout.edges)
        super().__init__(torch.Size(batch_shape), torch.Size((size,)), validate_args=False)

    @property
    def support(self) -> Constraint:
        return _Shrunk(self)

    def expand(self, batch_shape, _instance=None) -> HorseshoeNetwork:
        return HorseshoeNetwork(self.layout, self.mean_entry, self.sd_entry, self.probability, batch_shape)

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Entries (*batch, entry), and the logarithms of the scales (*batch, 1 + edge)."""
        size = len(self.layout.edge)
        return value[..., :size], value[..., size:]

    def log_share(self, log_scales: Tensor) -> Tensor:
        r"""Logarithm of :math:`\tilde s_e / \sigma_e`, (*batch, edge)."""
        return -0.5 * softplus(-2.0 * (log_scales[..., :1] + log_scales[..., 1:] + self.log_reach))

    def spread(self, log_scales: Tensor) -> Tensor:
        """Logarithm of what every entry's sd is multiplied with, (*batch, entry); 0 where it belongs to no edge."""
        share = self.log_share(log_scales)
        return torch.cat([share, torch.zeros_like(log_scales[..., :1])], -1)[..., self.owner]

    @property
    def slab(self) -> NetworkPrior:
        """Law of the entries where nothing is shrunk."""
        return NetworkPrior(self.layout, self.mean_entry, self.sd_entry, torch.ones_like(self.probability))

    def given(self, log_scales: Tensor) -> NetworkPrior:
        """Law of the entries given the scales: normal, but for the restriction; every edge is there."""
        sd = self.sd_entry * self.spread(log_scales).exp()
        return NetworkPrior(self.layout, self.mean_entry.expand_as(sd), sd, torch.ones_like(self.probability))

    def log_prob(self, value: Tensor) -> Tensor:
        entries, log_scales = self.split(value)
        return log_half_cauchy(log_scales).sum(-1) + self.given(log_scales).log_prob(entries)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        def draw(lead: tuple[int, ...]) -> Tensor:
            # The ratio of two normals is Cauchy.
            pair = torch.randn(2, *lead, 1 + len(self.layout.edges), dtype=torch.float64)
            log_scales = (pair[0] / pair[1]).abs().log()
            noise = torch.randn(*lead, len(self.layout.edge), dtype=torch.float64)
            entries = self.mean_entry + self.sd_entry * self.spread(log_scales).exp() * noise
            return torch.cat([entries, log_scales], -1)

        def log_kept(value: Tensor) -> Tensor:
            return log_stability(self.layout.matrix(self.split(value)[0]), self.layout)

        return sample_stable(torch.Size(sample_shape) + self.batch_shape, draw, log_kept)


def log_half_cauchy(log_scale: Tensor) -> Tensor:
    """Log density of the logarithm of a standard half-Cauchy variable."""
    return -math.log(0.5 * math.pi) - torch.logaddexp(log_scale, -log_scale)


@lru_cache(maxsize=256)
def log_reach(probability: float) -> float:
    r"""log t with :math:`P(t \tau \lambda > 1)` of two half-Cauchy variables equal to ``probability``.

    The logarithm of one has the density :math:`\mathrm{sech}(x) / \pi`, that of a product of two :math:`2 x / (\pi^2
    \sinh x)`.
    """
    if probability == 1.0:
        return math.inf

    def density(x: float) -> float:
        return 2.0 / math.pi**2 * (1.0 if abs(x) < 1e-8 else x / np.sinh(x))

    def excess(bound: float) -> float:
        """P(log of the product > bound) less the probability; symmetric about zero."""
        inner = quad(density, 0.0, abs(bound), epsabs=1e-13)[0]
        return 0.5 - math.copysign(inner, bound) - probability

    bound: Any = brentq(excess, -MOST, MOST, xtol=1e-12)
    return -float(bound)


class _Shrunk(Constraint):
    """Vectors of a `HorseshoeNetwork` whose dynamics are stable."""

    is_discrete = False
    event_dim = 1

    def __init__(self, law: HorseshoeNetwork) -> None:
        self.law = law

    def check(self, value: Tensor) -> Tensor:
        return StableNetwork(self.law.layout).check(self.law.split(value)[0])


class _Widen(Transform):
    """Entries over their scales to entries, and these to stable ones; the scales pass through."""

    domain = constraints.real_vector
    bijective = True

    def __init__(self, constraint: _Shrunk, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.codomain, self.target, self.law = constraint, constraint, constraint.law
        self.tame: Any = biject_to(StableNetwork(self.law.layout))

    def with_cache(self, cache_size: int = 1) -> _Widen:
        return _Widen(self.target, cache_size=cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Widen) and other.law is self.law

    def _call(self, x: Tensor) -> Tensor:
        standard, log_scales = self.law.split(x)
        return torch.cat([self.tame(self.law.spread(log_scales).exp() * standard), log_scales], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        entries, log_scales = self.law.split(y)
        return torch.cat([self.tame.inv(entries) * (-self.law.spread(log_scales)).exp(), log_scales], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        standard, log_scales = self.law.split(x)
        spread = self.law.spread(log_scales)
        wide = spread.exp() * standard
        return spread.sum(-1) + self.tame.log_abs_det_jacobian(wide, self.law.split(y)[0])


@biject_to.register(_Shrunk)
@transform_to.register(_Shrunk)
def _widen(constraint: _Shrunk) -> _Widen:
    return _Widen(constraint)
