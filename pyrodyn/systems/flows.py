r"""Strange attractors seen through counts: Lorenz, Arneodo, Rössler."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyrodyn.systems._readout import observed
from pyrodyn.systems.fields import Field, field, start_of
from pyrodyn.systems.system import System, number, whole

SUBSTEPS = 2000  # steps of the fourth-order scheme in one period: an error below 1e-8 over a window
SETTLE = 30.0  # periods after which all that is left of the start is its place on the attractor


def lorenz(
    *,
    sigma: float = 10.0,
    rho: float = 28.0,
    beta: float = 2.667,
    units: int = 10,
    trials: int = 2000,
    bins: int = 70,
    points_per_period: int = 100,
    log_rate_mean: float = 0.0,
    log_rate_sd: float = 1.0,
    seed: int = 0,
) -> System:
    r"""The Lorenz attractor, :math:`\dot x = \sigma (y - x),\ \dot y = x (\rho - z) - y,\ \dot z = x y - \beta z`.

    .. math:: y_{tn} \sim \mathrm{Poisson}\big(\exp(m + s\,(c_n^\top x_t - \mu_n) / \sigma_n)\big),
        \qquad c_n \sim U(-\tfrac12, \tfrac12)^3,

    with :math:`\mu_n, \sigma_n` the mean and standard deviation of :math:`c_n^\top x` over all trials and bins. Units
    are sorted by their first loading.

    Parameters
    ----------
    sigma, rho, beta : float
    units, trials, bins : int
    points_per_period : int
        Bins in one period of 1.5008 seconds.
    log_rate_mean, log_rate_sd : float
        m and s: log of events a bin.
    seed : int

    Returns
    -------
    System
        The truth holds ``latents`` (trial, time, latent), ``rates`` (trial, time, unit) in events a bin, ``loading``
        (unit, latent) and ``offset`` (unit) of the log rate, and the flow's ``fixed_points`` (fixed_point, latent) with
        the eigenvalues of its Jacobian there, ``eigenvalues_real`` and ``eigenvalues_imag`` (fixed_point, mode).
        `field_of` makes its vector field.

    Notes
    -----
    Trials start anywhere on the attractor and end after ``bins``: each from a state of its own that ran for 30 periods.
    In law they are windows of one long trajectory.

    References
    ----------
    Lorenz, J. Atmos. Sci. 20:130 (1963). Readout after Sedler, Versteeg & Pandarinath, "Expressive architectures
    enhance interpretability of dynamics-based neural population models" (2023).
    """
    return _attractor("lorenz", dict(locals()), ("sigma", "rho", "beta"))


def arneodo(
    *,
    a: float = -5.5,
    b: float = 4.5,
    c: float = 1.0,
    d: float = -1.0,
    units: int = 10,
    trials: int = 2000,
    bins: int = 70,
    points_per_period: int = 35,
    log_rate_mean: float = 0.0,
    log_rate_sd: float = 1.0,
    seed: int = 0,
) -> System:
    r"""The Arneodo attractor, :math:`\dot x = y,\ \dot y = z,\ \dot z = -a x - b y - c z + d x^3`.

    Its fixed points are the origin and :math:`x = \pm\sqrt{a / d}, y = z = 0`, all unstable. Readout, other parameters
    and truth are those of `lorenz`; the period is 3.1641 seconds.

    References
    ----------
    Arneodo, Coullet & Tresser, Commun. Math. Phys. 79:573 (1981).
    """
    return _attractor("arneodo", dict(locals()), ("a", "b", "c", "d"))


def rossler(
    *,
    a: float = 0.2,
    b: float = 0.2,
    c: float = 5.7,
    units: int = 10,
    trials: int = 2000,
    bins: int = 70,
    points_per_period: int = 35,
    log_rate_mean: float = 0.0,
    log_rate_sd: float = 1.0,
    seed: int = 0,
) -> System:
    r"""The Rössler attractor, :math:`\dot x = -y - z,\ \dot y = x + a y,\ \dot z = b + z (x - c)`.

    Readout, other parameters and truth are those of `lorenz`; the period is 5.9086 seconds.

    References
    ----------
    Rössler, Phys. Lett. A 57:397 (1976).
    """
    return _attractor("rossler", dict(locals()), ("a", "b", "c"))


def _attractor(name: str, options: dict[str, Any], parameters: tuple[str, ...]) -> System:
    flow = field(name, **{key: number(key, options[key]) for key in parameters})
    units, trials, bins, density = (
        whole(key, options[key], 1) for key in ("units", "trials", "bins", "points_per_period")
    )
    mean = number("log_rate_mean", options["log_rate_mean"])
    sd = number("log_rate_sd", options["log_rate_sd"], above=0.0)
    rng = np.random.default_rng(whole("seed", options["seed"], 0))
    bin_width = flow.period / density
    latents = windows(flow, rng, trials, bins, bin_width)
    loading = rng.uniform(-0.5, 0.5, (flow.dim, units))
    loading = loading[:, np.argsort(loading[0])].T
    drive = latents @ loading.T
    centre, spread = drive.mean((0, 1)), drive.std((0, 1))
    rates = np.exp(mean + sd * (drive - centre) / spread)
    extra = {
        "loading": (("unit", "latent"), sd * loading / spread[:, None]),
        "offset": ("unit", mean - sd * centre / spread),
    }
    return observed(
        rng.poisson(rates),
        latents,
        rates,
        bin_width=bin_width,
        field=flow,
        extra=extra,
        options={"system": name} | options,
    )


def windows(flow: Field, rng: np.random.Generator, trials: int, bins: int, bin_width: float) -> np.ndarray:
    """Pieces of the attractor (trial, time, latent), by the classical Runge-Kutta scheme."""
    state = start_of(flow.name) + 0.1 * rng.standard_normal((trials, flow.dim))
    # Trials part from their common start at the pace of the flow's instability; waits of their own part them at once.
    wait = rng.uniform(1.0, 2.0, (trials, 1)) * SETTLE * flow.period / 2.0
    rough = int(SETTLE * 100)  # far fewer steps: on the way to the attractor errors do not matter
    for _ in range(rough):
        state = _step(flow, state, wait / rough)
    fine = max(1, int(np.ceil(bin_width * SUBSTEPS / flow.period)))
    found = np.empty((trials, bins, flow.dim))
    for t in range(bins):
        found[:, t] = state
        for _ in range(fine):
            state = _step(flow, state, bin_width / fine)
    if not np.isfinite(found).all():
        raise ValueError(f"the {flow.name} flow runs off to infinity at these parameters: {dict(flow.parameters)}")
    return found


def _step(flow: Field, state: np.ndarray, step: Any) -> np.ndarray:
    first = flow(state)
    second = flow(state + 0.5 * step * first)
    third = flow(state + 0.5 * step * second)
    fourth = flow(state + step * third)
    return state + step / 6.0 * (first + 2.0 * second + 2.0 * third + fourth)
