"""A drift that is a Gaussian process, by eigenfunctions of a box."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.drifts.drift import AFFINE_SD, Drift, DriftParameters, affine_features, affine_turned
from pyrodyn.errors import ModelError
from pyrodyn.program import Labelled

MOST_FEATURES = 2000


@dataclass(frozen=True)
class GaussianProcess(Drift):
    r"""An affine drift and a Gaussian process with a squared-exponential kernel, by eigenfunctions of a box.

    .. math:: \phi_j(x) = \prod_d L^{-1/2} \sin \frac{\pi j_d (x_d + L)}{2 L}, \qquad
        v_j = a^2 (2\pi)^{D/2} \ell^D e^{-\ell^2 |\omega_j|^2 / 2}, \quad \omega_{jd} = \frac{\pi j_d}{2 L} .

    Inside the box, away from its walls, this is the process itself up to frequencies that v makes small; beyond it the
    affine part goes on alone, and states that far out are not what it is for. Length scale and amplitude enter the
    prior of the weights only, not the features.

    Parameters
    ----------
    functions : int, optional
        Frequencies in each dimension; of their products those inside an ellipsoid are kept. By default 24, 12 and 8 in
        one, two and three dimensions.
    box : float
        L, in the latent's units, in which paths have a standard deviation of about one.
    length_scale : float
        Median of the prior of :math:`\ell`, whose logarithm has a standard deviation of one half.
    amplitude : float
        Median of the prior of a, in units of the pace, whose logarithm has a standard deviation of one.

    References
    ----------
    Solin & Särkkä, Stat. Comput. 30:419 (2020).
    """

    prior_sites = ("length_scale", "amplitude")

    functions: int | None = None
    box: float = 4.0
    length_scale: float = 1.0
    amplitude: float = 1.0

    def __post_init__(self) -> None:
        for name in ("box", "length_scale", "amplitude"):
            if not getattr(self, name) > 0:
                raise ModelError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.functions is not None and (not isinstance(self.functions, int) or self.functions < 1):
            raise ModelError(f"functions must be a whole number of at least 1, got {self.functions!r}")

    def check(self, latent_dim: int) -> None:
        count = self.num_features(latent_dim) if latent_dim <= 4 else math.inf
        if count > MOST_FEATURES:
            raise ModelError(
                f"a GaussianProcess drift of {latent_dim} latents would need more than {MOST_FEATURES} functions; use "
                "drifts.MLP(), or lower functions or latent_dim"
            )

    def num_features(self, latent_dim: int) -> int:
        return 1 + latent_dim + len(self._orders(latent_dim))

    def _orders(self, latent_dim: int) -> Tensor:
        return _ellipsoid(self.functions or {1: 24, 2: 12, 3: 8}.get(latent_dim, 5), latent_dim)

    def sample_features(self, latent_dim: int, pace: float) -> DriftParameters:
        def around(name: str, median: float, spread: float) -> Tensor:
            centre = torch.tensor(math.log(median), dtype=torch.float64)
            return pyro.sample(name, dist.LogNormal(centre, spread))

        scale = around("length_scale", self.length_scale, 0.5)
        return DriftParameters(torch.empty(0), scale, around("amplitude", self.amplitude / pace, 1.0))

    def features(self, parameters: DriftParameters, state: Tensor) -> Tensor:
        dim = state.shape[-1]
        orders = self._orders(dim).to(state.device)
        most = int(orders.max())
        angle = (state.unsqueeze(-1) + self.box) * (math.pi / (2.0 * self.box))
        waves = (angle * torch.arange(1, most + 1, dtype=state.dtype, device=state.device)).sin() / self.box**0.5
        product = waves[..., 0, :].index_select(-1, orders[:, 0] - 1)
        for axis in range(1, dim):
            product = product * waves[..., axis, :].index_select(-1, orders[:, axis] - 1)
        # A wave goes on for ever outside its box; a fall to zero there leaves the affine part alone.
        outside = (state.abs() - self.box).clamp(min=0.0).square().sum(-1, keepdim=True)
        return torch.cat([affine_features(state), product * torch.exp(-outside)], -1)

    def prior_sd(self, parameters: DriftParameters, latent_dim: int, pace: float) -> Tensor:
        assert parameters.length_scale is not None and parameters.amplitude is not None
        scale, size = parameters.length_scale.unsqueeze(-1), parameters.amplitude.unsqueeze(-1)
        squared = self._orders(latent_dim).to(scale).square().sum(-1) * (math.pi / (2.0 * self.box)) ** 2
        log_sd = size.log() + 0.5 * latent_dim * (0.5 * math.log(2.0 * math.pi) + scale.log())
        waves = (log_sd - 0.25 * scale.square() * squared).exp()
        affine = torch.full((1 + latent_dim,), AFFINE_SD / pace, dtype=waves.dtype, device=waves.device)
        return torch.cat([affine.expand(*waves.shape[:-1], -1), waves], -1)

    def initial_features(self, latent_dim: int, pace: float) -> dict[str, Tensor]:
        return {
            "length_scale": torch.tensor(self.length_scale, dtype=torch.float64),
            "amplitude": torch.tensor(self.amplitude / pace, dtype=torch.float64),
        }

    def labelled(self, parameters: DriftParameters) -> Labelled:
        assert parameters.length_scale is not None and parameters.amplitude is not None
        return {"length_scale": ((), parameters.length_scale), "amplitude": ((), parameters.amplitude)}

    def unlabelled(self, values: Mapping[str, Tensor]) -> DriftParameters:
        return DriftParameters(torch.empty(0), values["length_scale"], values["amplitude"])

    def turned(self, parameters: DriftParameters, turn: Tensor) -> DriftParameters:
        dim = len(turn)
        orders = self._orders(dim)
        source, sign = turn.abs().argmax(1), turn.sum(1)
        moved = orders[:, source]
        # sin(pi j (L - x) / 2 L) = (-1)^(j + 1) sin(pi j (x + L) / 2 L)
        flips = torch.where((sign < 0) & (moved % 2 == 0), -1.0, 1.0).prod(-1).to(turn.dtype)
        place = {tuple(order): i for i, order in enumerate(orders.tolist())}
        target = torch.tensor([place[tuple(order)] for order in moved.tolist()])
        waves = (flips.unsqueeze(-1) * parameters.weights[..., 1 + dim :, :])[..., target.argsort(), :]
        affine = affine_turned(parameters.weights[..., : 1 + dim, :], turn)
        return parameters._replace(weights=torch.cat([affine, waves], -2) @ turn.mT)


@lru_cache(maxsize=32)
def _ellipsoid(functions: int, dim: int) -> Tensor:
    """Orders (function, latent) of the products of waves that are kept, lowest first."""
    found = [
        order
        for order in itertools.product(range(1, functions + 1), repeat=dim)
        if sum((j - 1) ** 2 for j in order) <= (functions - 1) ** 2
    ]
    found.sort(key=lambda order: (sum(j**2 for j in order), order))
    return torch.tensor(found)
