"""A path that is carried along when its Gaussian law changes, and the log evidence that such moves compare."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrodyn.conditionals.metropolis import acceptance_of
from pyrodyn.conditionals.paths import Leftover
from pyrodyn.distributions import GaussMarkov
from pyrodyn.readouts import AffineReadout

_LOG_ROOT = 0.5 * math.log(2.0 * math.pi)


def log_evidence(prior: GaussMarkov, near: GaussMarkov) -> Tensor:
    """Log evidence (chain) of the potential that makes ``near`` of ``prior``, both (chain, trial).

    The difference of their log normalisers, from the factor that draws of ``near`` need, too.
    """
    evidence = 0.5 * (near.linear * near.mean).sum((-2, -1)) + near.log_whitening_jacobian - prior.log_normaliser
    return evidence.sum(-1) + near.batch_shape[-1] * near.event_shape.numel() * _LOG_ROOT


class Along:
    """A path whose noise is held while its Gaussian law changes, and what the potential leaves over of counts along it.

    Parameters
    ----------
    readout : AffineReadout
    observations : Tensor, (chain or 1, trial, time, unit)
    potential : tuple of Tensor
        Precision and linear part of the reference that stands for the observations.
    path : Tensor, (chain, trial, time, latent)
    near : GaussMarkov
        The law of the path under its prior and the potential.
    """

    def __init__(
        self,
        readout: AffineReadout,
        observations: Tensor,
        potential: tuple[Tensor, Tensor],
        path: Tensor,
        near: GaussMarkov,
    ) -> None:
        self.rest = Leftover(readout, observations, *potential)
        self.path, self.noise = path, near.noise_of(path)
        self.left = self._left(path)

    def move(self, near: GaussMarkov, passed: Tensor) -> tuple[Tensor, Tensor]:
        """Offer the path under ``near`` to the chains that ``passed``: which accept it, and with what probability."""
        if not bool(passed.any()):
            return passed, torch.zeros_like(self.left)
        path = near.draw(self.noise)
        left = self._left(path)
        probability = torch.where(passed, acceptance_of(left - self.left), 0.0)
        accepted = torch.rand_like(probability) < probability
        self.path = torch.where(accepted[:, None, None, None], path, self.path)
        self.left = torch.where(accepted, left, self.left)
        return accepted, probability

    def _left(self, path: Tensor) -> Tensor:
        return self.rest.value(path).sum((-2, -1))
