r"""Path and modes of switching dynamics given the parameters, as a product of two laws.

.. math:: \log q(x) = E_{q(z)}[\log p(y, x, z)] + c, \qquad \log q(z) = E_{q(x)}[\log p(y, x, z)] + c,

in turn: each round raises a bound of the evidence. The first is a Gauss-Markov chain, the second a hidden Markov chain.

Reference: Ghahramani & Hinton, Neural Comput. 12:831 (2000).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrodyn.conditionals.paths import Reference, settled
from pyrodyn.conditioning import gaussian_potential
from pyrodyn.distributions import GaussMarkov, SwitchingPath
from pyrodyn.linalg import mode_log_normaliser, mode_marginals
from pyrodyn.readouts import AffineReadout

FIRST = 5  # rounds in which counts find a first path


class Expected(NamedTuple):
    """Law of path and modes given the parameters, as a product."""

    chain: GaussMarkov  # of the path, batch (*draw, trial)
    weight: Tensor  # (*draw, trial, time, mode), probabilities of modes
    pairs: Tensor  # (*draw, trial, mode, mode), expected numbers of transitions
    bound: Tensor  # (*draw, trial), of the log evidence


def expect(law: SwitchingPath, readout: AffineReadout, observations: Tensor, weight: Tensor) -> Expected:
    """The path given probabilities of modes (*draw, trial, time, mode), then these given the path.

    A likelihood that is not Gaussian is expanded about the readout's path; then the bound holds to second order, as it
    does for modes that depend on the state.
    """
    chain = law.given_modes(weight)
    if readout.law.is_gaussian:
        chain = chain.condition(*gaussian_potential(readout, observations))
    else:
        about = Reference.about(readout, readout.predictor, observations)
        chain = chain.condition(*settled(chain, readout, observations, about, 1).potential(readout))
    potentials = law.initial, law.transitions(chain.mean), law.expected_likelihood(chain)
    bound = mode_log_normaliser(*potentials) + _rest_of_bound(law, chain, readout, observations)
    return Expected(chain, *mode_marginals_and_counts(*potentials), bound)


def settle(
    law: SwitchingPath, readout: AffineReadout, observations: Tensor, batch: tuple[int, ...], rounds: int
) -> Expected:
    """As many rounds of `expect` from a first guess, for a batch (*draw, trial).

    The guess is a path under `SwitchingPath.averaged`, and the modes given it. The bound has many maxima: from modes
    that are all as probable, under which the steps of all have their own small noise, rounds end far below.
    """
    bins, dim = law.event_shape
    still = _about(readout, torch.zeros(*batch, bins, dim, dtype=torch.float64))
    one = torch.ones(*batch, bins, 1, dtype=torch.float64)
    chain = settle_from(law.averaged(), still, observations, one, 1 if readout.law.is_gaussian else FIRST).chain
    blurred = law.blurred_likelihood(chain)
    weight, _ = mode_marginals_and_counts(law.initial, law.transitions(chain.mean), blurred)
    return settle_from(law, _about(readout, chain.mean), observations, weight, rounds)


def settle_from(
    law: SwitchingPath, readout: AffineReadout, observations: Tensor, weight: Tensor, rounds: int
) -> Expected:
    """As many rounds of `expect`, from the path of ``readout`` and the probabilities ``weight`` of modes."""
    found = expect(law, readout, observations, weight)
    for _ in range(rounds - 1):
        found = expect(law, _about(readout, found.chain.mean), observations, found.weight)
    return found


def _about(readout: AffineReadout, path: Tensor) -> AffineReadout:
    """The readout of another path."""
    noise = None if readout.noise is None else readout.noise.squeeze(-2)
    return AffineReadout(readout.law, path, readout.loading, readout.offset.squeeze(-2), noise, readout.observed)


def mode_marginals_and_counts(initial: Tensor, transition: Tensor, likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of modes (*batch, time, mode), and expected numbers of transitions (*batch, mode, mode)."""
    batch, modes = likelihood.shape[:-2], likelihood.shape[-1]
    # One copy of the transitions for each element: those of elements that share one would come out summed.
    own = transition.expand(*batch, *transition.shape[-3:])
    weight, pairs = mode_marginals(initial.expand(*batch, modes), own, likelihood)
    return weight, pairs.sum(-3)


def _rest_of_bound(law: SwitchingPath, chain: GaussMarkov, readout: AffineReadout, observations: Tensor) -> Tensor:
    """What observations and the start expect under the path's law, and its entropy, (*draw, trial)."""
    predictor = readout.predict(chain.mean)
    fit = readout.log_likelihood(predictor, observations)
    fit = fit - 0.5 * (readout.curvature(predictor, observations) * readout.spread(chain.covariance)).sum((-2, -1))
    start = torch.cholesky_inverse(torch.linalg.cholesky(law.start_covariance))
    first = (start * chain.covariance[..., 0, :, :]).sum((-2, -1))
    return fit + law.log_start(chain.mean) - 0.5 * first + chain.entropy()
