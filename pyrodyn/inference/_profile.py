r"""The globals of a diffusion beside its drift, with the path integrated out under the drift expanded along its law.

About a law q of the path with mean parameters :math:`\mu`,

.. math:: E_{q'}[\log p(y, x \mid \theta)] \approx E_q[\log p(y, x \mid \theta)] +
    \langle \mu' - \mu, \lambda(\theta) \rangle, \qquad \lambda(\theta) = \nabla_\mu E_q[\log p(y, x \mid \theta)],

and the best :math:`q'` has a log normaliser for its value:

.. math:: S(\theta) = E_q[\log p(y, x \mid \theta)] - \langle \mu, \lambda(\theta) \rangle + \log Z(\lambda(\theta)) .

Where q is at its optimum, S has the value and the gradient of the bound; its curvature holds what the path takes with
it. Climbing S is what a slow alternation of path and noise would come to: on a fine grid a path says of its noise
what it was told.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrodyn.diffusion import DiffusionModel
from pyrodyn.expectations import Diffusion, Moments, Rule, expected_start, expected_steps, step_volume
from pyrodyn.inference._weights import WeightStatistics
from pyrodyn.inference.density import LogDensity
from pyrodyn.linalg import log_normaliser
from pyrodyn.program import globals_given
from pyrodyn.recording import Recording
from pyrodyn.smoothing import Potential, natural_gradient, observed_potential


class _Density:
    """A log density of some coordinates of a vector; the others are held."""

    def __init__(self, density: LogDensity, held: Tensor, names: tuple[str, ...]) -> None:
        self.density, self.held = density, held
        places = [torch.arange(s.place.start, s.place.stop) for s in density.sites if s.name in names]
        self.index = torch.cat(places) if places else torch.zeros(0, dtype=torch.long)

    def full(self, vector: Tensor) -> Tensor:
        """The whole vector (*draw, dimension)."""
        whole = self.held.expand(*vector.shape[:-1], -1)
        return whole.index_copy(-1, self.index, vector)

    def log_prob(self, values: dict[str, Tensor], full: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Value (*draw) and gradient; a failed element is -inf with a zero gradient."""
        vector = vector.detach().requires_grad_()
        with torch.enable_grad():
            full = self.full(vector)
            value = self.log_prob(self.density.constrain(full), full)
            (slope,) = torch.autograd.grad(value.sum(), vector)
        bad = ~(torch.isfinite(value) & torch.isfinite(slope).all(-1))
        return torch.where(bad, -torch.inf, value.detach()), torch.where(bad.unsqueeze(-1), 0.0, slope)

    def culprit(self, vector: Tensor) -> str:
        """For the error of a start that is not finite."""
        return self.density.culprit(self.full(vector))


class Profile(_Density):
    """S of the globals that the drift does not depend on, with their prior."""

    def __init__(
        self,
        density: LogDensity,
        held: Tensor,
        names: tuple[str, ...],
        model: DiffusionModel,
        recording: Recording,
        diffusion: Diffusion,
        moments: Moments,
        rule: Rule,
    ) -> None:
        super().__init__(density, held, names)
        self.model, self.recording, self.moments = model, recording, moments
        dim = model.latent_dim
        size = moments.mean.shape[-2] * len(rule.weights) * diffusion.weights.shape[-2]
        self.pairs = [(i, j) for i in range(dim) for j in range(i, dim)]
        values, potentials = [], []
        for i, j in self.pairs:  # the expected log density of a path is linear in the precision of its noise
            unit = torch.zeros(1, dim, dim, dtype=torch.float64)
            unit[0, i, j] = unit[0, j, i] = 1.0
            along = diffusion._replace(precision=unit)
            value, potential, _ = natural_gradient(lambda part, d=along: expected_steps(d, part, rule), moments, size)
            values.append(value)
            potentials.append(potential)
        self.values = torch.stack(values)  # (pair, trial)
        self.potentials = Potential(*(torch.stack(parts) for parts in zip(*potentials, strict=True)))
        self.start, self.first, _ = natural_gradient(lambda part: expected_start(diffusion, part), moments, 1)

    def log_prob(self, values: dict[str, Tensor], full: Tensor) -> Tensor:
        draws = full.dim() > 1
        parameters = globals_given(self.model, values, self.recording)
        if not draws:
            parameters = type(parameters)(*(None if part is None else part.unsqueeze(0) for part in parameters))
        target = self.model.target(parameters, self.recording)
        precision = target.diffusion.precision.squeeze(-3)  # (*draw, latent, latent)
        shares = torch.stack([precision[..., i, j] for i, j in self.pairs], -1)
        toward = self.first + Potential(*(_along(shares, part) for part in self.potentials))
        value = shares @ self.values + self.start + step_volume(target.diffusion)
        terms = target.seen(self.moments)
        assert terms is not None
        value, toward = value + terms.value, toward + observed_potential(terms, toward, target.bins)
        profile = value - toward.inner(self.moments) + log_normaliser(toward.diagonal, toward.upper, toward.linear)
        return profile.sum(-1) + self.density(full)


def _along(shares: Tensor, parts: Tensor) -> Tensor:
    """Sum over the first axis of ``parts`` (pair, ...), weighted by ``shares`` (*draw, pair): (*draw, ...)."""
    return (shares @ parts.flatten(1)).unflatten(-1, parts.shape[1:])


class WeightPrior(_Density):
    """Evidence of the regression of the drift's weights, in what their prior depends on."""

    def __init__(
        self,
        density: LogDensity,
        held: Tensor,
        names: tuple[str, ...],
        model: DiffusionModel,
        recording: Recording,
        statistics: WeightStatistics,
        precision: Tensor,
    ) -> None:
        super().__init__(density, held, names)
        self.model, self.recording, self.statistics, self.precision = model, recording, statistics, precision

    def log_prob(self, values: dict[str, Tensor], full: Tensor) -> Tensor:
        parameters = globals_given(self.model, values, self.recording)
        own = self.model.drift_parameters(parameters)
        sd = self.model.drift.prior_sd(own, self.model.latent_dim, self.model.pace(self.recording))
        sd = sd.squeeze(-2) if full.dim() > 1 else sd
        return self.statistics.log_evidence(self.precision, sd) + self.density(full)
