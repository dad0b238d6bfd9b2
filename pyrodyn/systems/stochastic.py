r"""Stochastic flows :math:`dx = f(x)\,dt + \sigma\,dW` seen at some times: Duffing, van der Pol, a linear spiral."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyrodyn.systems._readout import observed
from pyrodyn.systems.fields import Field, field
from pyrodyn.systems.system import System, number, one_of, whole


def duffing(
    *,
    alpha: float = 2.0,
    beta: float = 1.0,
    gamma: float = 0.1,
    sigma: float = 0.2,
    units: int = 10,
    trials: int = 4,
    bins: int = 1000,
    seen: int | None = 300,
    bin_width: float = 0.015,
    noise_variance: float = 0.1,
    start: str = "both",
    readout: str = "gaussian",
    mean_count: float = 0.3,
    substeps: int = 10,
    seed: int = 0,
) -> System:
    r"""A Duffing oscillator in two wells.

    .. math:: dx = v\,dt + \sigma\,dW_1, \qquad dv = (\alpha x - \beta x^3 - \gamma v)\,dt + \sigma\,dW_2

    Parameters
    ----------
    alpha, beta, gamma, sigma : float
    units, trials, bins : int
    seen : int, optional
        Bins observed in each trial, at random; None for all.
    bin_width : float
        Seconds.
    noise_variance : float
        Of Gaussian observations.
    start : "both" or "right"
        Trials start .1 off a stable fixed point :math:`(\pm\sqrt{\alpha / \beta}, 0)`: of either in turn, or all of the
        right one, from which most never see the other well.
    readout : "gaussian" or "poisson"
        :math:`y = C x + d + \epsilon`, or counts with the log rate :math:`C x / 2 + d`; the entries of C are standard
        normal, those of d too for a Gaussian, and such that the mean count is ``mean_count`` for counts.
    mean_count : float
        Events a bin.
    substeps : int
        Euler-Maruyama steps in a bin.
    seed : int

    Returns
    -------
    System
        The truth holds ``latents`` (trial, time, latent), ``rates`` (trial, time, unit), ``loading`` (unit, latent),
        ``offset`` (unit), ``diffusion`` (latent, latent_from), a Cholesky factor in latent units per square root of a
        second, and ``fixed_points`` with their eigenvalues; see `lorenz`.

    References
    ----------
    The settings are those of the demonstration of SING (Hu, Smith & Linderman, 2025).
    """
    options = dict(locals())
    flow = field("duffing", **{key: number(key, options[key]) for key in ("alpha", "beta", "gamma")})
    one_of("start", start, ("both", "right"))
    if not alpha / beta > 0.0:
        raise ValueError(f"alpha / beta must be positive for a system of two wells, got alpha={alpha}, beta={beta}")
    rng = np.random.default_rng(whole("seed", seed, 0))
    well = np.sqrt(alpha / beta)
    sides = np.ones(whole("trials", trials, 1))
    if start == "both":
        sides[1::2] = -1.0
    first = sides[:, None] * np.array([well - 0.1, 0.1])
    return _seen(flow, rng, first, options | {"system": "duffing"})


def van_der_pol(
    *,
    mu: float = 2.0,
    tau: float = 10.0,
    sigma: float = 1.0,
    units: int = 8,
    trials: int = 30,
    bins: int = 200,
    bin_width: float = 0.01,
    seen: int | None = None,
    readout: str = "place",
    noise_variance: float = 0.1,
    mean_count: float = 0.3,
    peak_count: float = 1.0,
    field_width: float = 0.7,
    substeps: int = 10,
    seed: int = 0,
) -> System:
    r"""A noisy van der Pol oscillator.

    .. math:: dx = \tau\mu (x - x^3/3 - y)\,dt + \sigma\,dW_1, \qquad dy = \tau x / \mu\,dt + \sigma\,dW_2

    Trials start uniformly in :math:`[-3, 3]^2`.

    Parameters
    ----------
    mu, tau, sigma : float
    units, trials, bins : int
    readout : "place", "gaussian" or "poisson"
        For "place" the rate is a bump, :math:`p \exp(-|x - c_n|^2 / 2 w^2)`, with centres spread evenly over a circle
        of radius 2, p the ``peak_count`` and w the ``field_width``: no model of the zoo has this readout.
    bin_width, seen, noise_variance, mean_count, substeps, seed : as in `duffing`

    Returns
    -------
    System
        As of `duffing`; for "place", ``centres`` (unit, latent) in place of loading and offset.
    """
    options = dict(locals())
    flow = field("van_der_pol", mu=number("mu", mu, above=0.0), tau=number("tau", tau, above=0.0))
    rng = np.random.default_rng(whole("seed", seed, 0))
    first = rng.uniform(-3.0, 3.0, (whole("trials", trials, 1), 2))
    return _seen(flow, rng, first, options | {"system": "van_der_pol"}, ("place", "gaussian", "poisson"))


def linear_spiral(
    *,
    decay: float = 3.0,
    frequency: float = 4.0 * np.pi,
    sigma: float = 1.0,
    units: int = 10,
    trials: int = 30,
    bins: int = 200,
    bin_width: float = 0.005,
    seen: int | None = None,
    readout: str = "gaussian",
    noise_variance: float = 0.1,
    mean_count: float = 0.3,
    substeps: int = 10,
    seed: int = 0,
) -> System:
    r"""A linear spiral, :math:`dx = A x\,dt + \sigma dW`, A with the eigenvalues :math:`-\lambda \pm i \omega`.

    What a smoother gives here is exact: the ground on which other inference is held to it. Trials start uniformly in
    :math:`[-2, 2]^2`.

    Parameters
    ----------
    decay, frequency : float
        :math:`\lambda` and :math:`\omega`, a second.
    sigma : float
    units, trials, bins, bin_width, seen, readout, noise_variance, mean_count, substeps, seed : as in `duffing`

    Returns
    -------
    System
        As of `duffing`.
    """
    options = dict(locals())
    flow = field("spiral", decay=number("decay", decay), frequency=number("frequency", frequency))
    rng = np.random.default_rng(whole("seed", seed, 0))
    first = rng.uniform(-2.0, 2.0, (whole("trials", trials, 1), 2))
    return _seen(flow, rng, first, options | {"system": "linear_spiral"})


def _seen(
    flow: Field,
    rng: np.random.Generator,
    first: np.ndarray,
    options: dict[str, Any],
    kinds: tuple[str, ...] = ("gaussian", "poisson"),
) -> System:
    """Draw paths, readout and mask in this order, so that a change of the readout leaves the paths alone."""
    kind = one_of("readout", options["readout"], kinds)
    units, bins, substeps = (whole(key, options[key], 1) for key in ("units", "bins", "substeps"))
    sigma, width = (number(key, options[key], above=0.0) for key in ("sigma", "bin_width"))
    noise = number("noise_variance", options["noise_variance"], above=0.0)
    mean_count = number("mean_count", options["mean_count"], above=0.0)
    latents = _paths(flow, rng, first, sigma, bins, width, substeps)
    extra: dict[str, Any] = {"diffusion": (("latent", "latent_from"), sigma * np.eye(flow.dim))}
    if kind == "place":
        angle = 2.0 * np.pi * np.arange(units) / units
        centres = 2.0 * np.stack([np.cos(angle), np.sin(angle)], -1)
        distance = ((latents[..., None, :] - centres) ** 2).sum(-1)
        peak, spread = (number(key, options[key], above=0.0) for key in ("peak_count", "field_width"))
        rates = peak * np.exp(-0.5 * distance / spread**2)
        extra["centres"] = (("unit", "latent"), centres)
    else:
        loading, offset = rng.standard_normal((units, flow.dim)), rng.standard_normal(units)
        if kind == "poisson":
            loading = 0.5 * loading
            offset = np.log(mean_count) - np.log(np.exp(latents @ loading.T).mean((0, 1)))
        rates = latents @ loading.T + offset
        rates = np.exp(rates) if kind == "poisson" else rates
        extra |= {"loading": (("unit", "latent"), loading), "offset": ("unit", offset)}
    if kind == "gaussian":
        values = rates + np.sqrt(noise) * rng.standard_normal(rates.shape)
        extra["noise_sd"] = ("unit", np.full(units, np.sqrt(noise)))
    else:
        values = rng.poisson(rates).astype(np.float64)
    mask = None
    if options["seen"] is not None:
        count = whole("seen", options["seen"], 1)
        if count > bins:
            raise ValueError(f"seen is {count}, but a trial has {bins} bins")
        mask = np.zeros((len(first), bins), dtype=bool)
        for row in mask:
            row[rng.choice(bins, count, replace=False)] = True
    return observed(values, latents, rates, bin_width=width, field=flow, mask=mask, extra=extra, options=options)


def _paths(
    flow: Field, rng: np.random.Generator, first: np.ndarray, sigma: float, bins: int, width: float, substeps: int
) -> np.ndarray:
    """Euler-Maruyama paths (trial, time, latent) that start at ``first``."""
    step = width / substeps
    found = np.empty((len(first), bins, flow.dim))
    state = first
    for t in range(bins):
        found[:, t] = state
        for kick in rng.standard_normal((substeps, *first.shape)):
            state = state + step * flow(state) + sigma * np.sqrt(step) * kick
    if not np.isfinite(found).all():
        raise ValueError(
            f"the {flow.name} flow ran off to infinity; raise substeps={substeps}, or lower sigma or bin_width"
        )
    return found
