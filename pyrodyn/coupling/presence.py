"""The probability that an edge is there."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit, log_expit, logit, logsumexp

from pyrodyn.errors import CouplingError


def savage_dickey(
    blocks: np.ndarray, prior_sd: float | np.ndarray, prior_probability: float | np.ndarray
) -> np.ndarray:
    r"""Probability that a block of the dynamics is not zero, from draws of a posterior that keeps every edge.

    The Bayes factor for absence is the ratio of posterior to prior density of the block's entries b at zero,

    .. math::
        B_{01} = \frac{N(0; m, S)}{N(0; 0, \sigma^2 I)}, \qquad
        P(\text{present}) = \frac{\pi}{\pi + (1 - \pi) B_{01}},

    with m and S the mean and covariance of the draws: the posterior density is taken as normal. The normal's tail is
    only as good as its first two moments, so a probability near zero or one is a rough number; one in between is not.

    Parameters
    ----------
    blocks : ndarray, (chain, draw, ..., latent, latent_from)
        Draws of blocks, in the coordinates in which the prior was put on them.
    prior_sd : float or ndarray (...)
        :math:`\sigma`, the standard deviation of the independent normal prior of every entry.
    prior_probability : float or ndarray (...)
        :math:`\pi`, the prior probability that the edge is there. At 1 no draw is asked, and the answer is 1.

    Returns
    -------
    ndarray (...)
        NaN where there are not more draws than entries plus one, so that S cannot be estimated.

    Raises
    ------
    CouplingError
        For a prior that is none, or that has another shape than the blocks.

    References
    ----------
    Dickey, "The weighted likelihood ratio, linear hypotheses on normal location parameters", Annals of Mathematical
    Statistics, 1971; Wagenmakers et al., Cognitive Psychology, 2010.
    """
    chains, draws, *batch, rows, columns = blocks.shape
    size = rows * columns
    sd, prior = checked_prior(("prior_sd", "prior_probability"), (prior_sd, prior_probability), tuple(batch))
    entries = np.moveaxis(blocks.reshape(chains * draws, *batch, size), 0, -2)  # (..., sample, entry)
    if chains * draws <= size + 1:
        return np.where(prior == 1.0, 1.0, np.nan)
    mean = entries.mean(-2)
    centred = entries - mean[..., None, :]
    covariance = np.swapaxes(centred, -1, -2) @ centred / (chains * draws - 1)
    sign, log_det = np.linalg.slogdet(covariance)
    safe = np.where((sign > 0)[..., None, None], covariance, np.eye(size))
    distance = (mean * np.linalg.solve(safe, mean[..., None])[..., 0]).sum(-1)
    log_factor = -0.5 * (log_det + distance) + size * np.log(sd)
    # By logits: a factor too large for a float, times no doubt at all, would be a NaN.
    found = expit(logit(prior) - np.where(sign > 0, log_factor, np.nan))
    return np.where(prior == 1.0, 1.0, found)


def mean_log_odds(log_odds: np.ndarray) -> np.ndarray:
    """Log odds (...) of the mean of probabilities whose log odds are (chain, draw, ...).

    Draws that leave no doubt cannot be told from each other by a share of them; their odds can (Rao and Blackwell).

    References
    ----------
    Ghosh & Clyde, J. Am. Stat. Assoc. 106:1041 (2011), on such estimates of the inclusion of variables.
    """
    there, absent = (log_expit(side * log_odds) for side in (1.0, -1.0))
    return logsumexp(there, (0, 1)) - logsumexp(absent, (0, 1))


def checked_prior(names: tuple[str, str], given: tuple[Any, Any], shape: tuple[int, ...]) -> list[np.ndarray]:
    """A prior's standard deviation and probability, one for each block of ``shape``; anything else is refused."""
    found = [np.asarray(value, dtype=float) for value in given]
    if any(value.shape not in ((), shape) for value in found):
        raise CouplingError(
            f"{', '.join(names)}: got arrays of shape {' and '.join(str(value.shape) for value in found)}; expected "
            f"numbers, or one for each block, {shape}"
        )
    sd, prior = found
    if not (np.all((sd > 0.0) & np.isfinite(sd)) and np.all((prior > 0.0) & (prior <= 1.0))):
        raise CouplingError(
            f"{', '.join(names)}: got {given[0]!r} and {given[1]!r}; expected a positive standard deviation and a "
            "probability above 0 and at most 1"
        )
    return [np.broadcast_to(value, shape) for value in found]
