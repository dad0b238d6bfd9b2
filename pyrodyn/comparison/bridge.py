r"""Bridge sampling: a normalising constant from draws of the density it normalises.

With draws :math:`\theta` of :math:`p^*(\theta) = p(y, \theta)` and :math:`\tilde\theta` of a Gaussian g,

.. math:: Z = \frac{E_g[p^* h]}{E_p[g\, h]}, \qquad h = \frac{1}{s_1 p^* + s_2 Z g},

where h, which has the least error, holds Z: iterated to a fixed point. The mean and covariance of g are those of the
first half of every chain, and the second halves are bridged, so that no draw is used for both.

References
----------
Meng & Wong, Stat. Sinica 6:831 (1996); Gronau et al., J. Math. Psychol. 81:80 (2017); Frühwirth-Schnatter, Econom. J.
7:143 (2004), for the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from pyrodyn.diagnostics import effective_share
from pyrodyn.errors import ComparisonError

STEPS, TOLERANCE = 1000, 1e-10


def bridge(log_density: Callable[[Tensor], Tensor], draws: Tensor) -> tuple[float, float]:
    """Log of the normalising constant, and its standard error.

    Parameters
    ----------
    log_density : callable
        From (sample, dimension) to (sample,).
    draws : Tensor, (chain, draw, dimension)
        Of that density. New ones, of the Gaussian, come from torch's random state.

    Raises
    ------
    ComparisonError
        Where there are too few draws for a covariance.
    """
    chains, length, size = draws.shape
    half = length // 2
    learned, bridged = draws[:, :half].reshape(-1, size), draws[:, half:]
    if len(learned) < 2 * size + 2:
        raise ComparisonError(
            f"bridge sampling in {size} dimensions needs {4 * size + 4} draws or more, got {chains * length}; fit with "
            "more draws"
        )
    centre = learned.mean(0)
    root = torch.linalg.cholesky(torch.cov(learned.mT).reshape(size, size))
    count = chains * (length - half)
    proposed = centre + torch.randn(count, size, dtype=draws.dtype) @ root.mT

    def excess(vectors: Tensor) -> np.ndarray:
        """log p* - log g."""
        standard = torch.linalg.solve_triangular(root, (vectors - centre).mT, upper=False)
        gaussian = -0.5 * standard.square().sum(0) - root.diagonal().log().sum() - 0.5 * size * math.log(2.0 * math.pi)
        return (log_density(vectors) - gaussian).numpy()

    own, other = excess(bridged.reshape(-1, size)), excess(proposed)
    effective = count * effective_share(own.reshape(chains, -1))
    log_own, log_other = math.log(effective / (effective + count)), math.log(count / (effective + count))
    value = float(np.median(own))
    for _ in range(STEPS):
        above = logsumexp(other - np.logaddexp(log_own + other, log_other + value)) - math.log(len(other))
        below = logsumexp(-np.logaddexp(log_own + own, log_other + value)) - math.log(len(own))
        before, value = value, float(above - below)
        if abs(value - before) < TOLERANCE * max(1.0, abs(value)):
            break
    first = np.exp(other - value - np.logaddexp(log_own + other - value, log_other))
    second = np.exp(-np.logaddexp(log_own + own - value, log_other))
    relative = first.var() / first.mean() ** 2 / len(first)
    relative += second.var() / second.mean() ** 2 / (count * effective_share(second.reshape(chains, -1)))
    return value, math.sqrt(relative)
