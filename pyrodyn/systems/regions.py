r"""Regions that drive each other, loops included, and what imitates them: common drives without any coupling.

An option out of its range is a ValueError that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d

from pyrodyn.systems._linear import Regions, observe
from pyrodyn.systems.system import System, number, one_of, whole

RADIUS = 0.93  # of the rotation within a region
TURNS = (0.08, 0.3)  # range of its angle, radians a bin
MOST = 0.985  # spectral radius of all regions together
ENTRY_SD = 0.3  # of the global latent's entries into the regions, before `global_input` scales them
DRIVE_WIDTH = 5.0  # sd of the kernel that smooths a time-locked drive, bins


def coupled_regions(
    *,
    regions: int = 4,
    latents: int = 2,
    units: int = 30,
    trials: int = 20,
    bins: int = 500,
    density: float = 0.35,
    coupling: float = 0.22,
    global_input: float = 0.3,
    global_persistence: float = 0.97,
    process_sd: float = 0.3,
    mean_count: float = 0.15,
    modulation: float = 0.55,
    loop: bool = True,
    bin_width: float = 0.02,
    seed: int = 0,
) -> System:
    r"""Regions with rotating latents, a random directed graph between them, and a slow latent that enters them all.

    .. math::

        x^r_t &= A_{rr} x^r_{t-1} + \sum_{s \to r} A_{rs} x^s_{t-1} + b_r g_{t-1} + \epsilon^r_t,
        \qquad g_t = \rho g_{t-1} + \epsilon^g_t, \qquad \epsilon_t \sim N(0, \sigma^2 I), \\
        y_{nt} &\sim \mathrm{Poisson}(\exp(c_n^\top x^r_t + d_n)) .

    Parameters
    ----------
    regions, latents, units, trials, bins : numbers of regions, of latents and units in each, of trials and of bins
    density : probability of an edge, for every ordered pair of regions
    coupling : Frobenius norm of the block :math:`A_{rs}` of an edge; its entries are iid normal before
    global_input : the entries of :math:`b_r` are this times :math:`N(0, .3^2)`; at 0 there is no global latent
    global_persistence : :math:`\rho`
    process_sd : :math:`\sigma`, of the global latent, too
    mean_count : expected number of events of every unit in a bin
    modulation : stationary sd of the log rate of every unit
    loop : whether the first two regions drive each other in any case
    bin_width : seconds
    seed : every part of the system follows from it

    Returns
    -------
    System
        Its truth holds, with the global latent last along (latent):

        - ``dynamics``, ``process_noise`` and ``stationary_covariance``, (latent, latent_from);
        - ``loading`` (unit, latent), ``offset`` (unit);
        - ``adjacency`` (target, source) and ``strength`` (target, source), the Frobenius norm of
          :math:`\Sigma_r^{-1/2} A_{rs} \Sigma_s^{1/2}` with :math:`\Sigma_r` the stationary covariance of region r;
        - ``variance_share`` (target, origin): :math:`\mathrm{tr}(\Sigma_r^{-1} \Sigma_r^{(o)}) / d_r`, with
          :math:`\Sigma^{(o)}` the stationary covariance under noise in the origin o alone; rows sum to one;
        - ``latents`` (trial, time, latent) and ``rates`` (trial, time, unit), in events a bin.

    Notes
    -----
    Within a region :math:`A_{rr}` consists of rotations of radius .93 by .08 to .3 radians a bin, one for every pair
    of latents; an odd latent decays by .93. All blocks between and within regions are multiplied by a common factor
    where that is needed for a spectral radius of .985. Paths start in equilibrium.

    Entries of the loading are iid normal, then each row is scaled to :math:`c_n^\top \Sigma_r c_n = m^2` with m the
    ``modulation``. The log rate is then :math:`N(d_n, m^2)`, its exponential log-normal with mean
    :math:`\exp(d_n + m^2 / 2)`, so that :math:`d_n = \log(\text{mean count}) - m^2 / 2` makes the mean count right.
    """
    options = dict(locals())
    size = _check(options)
    number("density", density, least=0.0, most=1.0)
    if loop and size < 2:
        raise ValueError(f"loop=True needs two regions, got regions={regions}; pass loop=False")
    rng = np.random.default_rng(seed)
    adjacency = rng.random((size, size)) < density
    if loop:
        adjacency[0, 1] = adjacency[1, 0] = True
    np.fill_diagonal(adjacency, False)
    system = _regions(rng, adjacency.astype(int), options)
    return _observed(system, rng, "coupled_regions", options)


def feedback_loop(
    kind: str = "two",
    *,
    control: bool = False,
    delays: Sequence[int] | None = None,
    latents: int = 2,
    units: int = 30,
    trials: int = 20,
    bins: int = 500,
    coupling: float = 0.22,
    process_sd: float = 0.3,
    mean_count: float = 0.15,
    modulation: float = 0.55,
    bin_width: float = 0.02,
    seed: int = 0,
) -> System:
    r"""A loop of two or three regions, or its control: as many edges, all from one further region.

    The equations are those of `coupled_regions` without the global latent, with a delay :math:`\tau_{rs}` for every
    edge:

    .. math:: x^r_t = A_{rr} x^r_{t-1} + \sum_{s \to r} A_{rs} x^s_{t-\tau_{rs}} + \epsilon^r_t .

    Parameters
    ----------
    kind : "two" for R1 -> R2 -> R1, "three" for R1 -> R2 -> R3 -> R1
    control : whether the regions of the loop, instead of driving each other, are driven by one more region, the last,
        which is recorded, too: a graph without cycles in which they are as correlated
    delays : of every edge in bins, in the order R1 -> R2, R2 -> ...; with ``control`` those of the edges into R1, R2,
        ...; default 1
    latents, units, trials, bins, coupling, process_sd, mean_count, modulation, bin_width, seed : as in
        `coupled_regions`

    Returns
    -------
    System
        The truth is that of `coupled_regions`. With a delay above 1, ``dynamics`` is (lag, latent, latent_from), and
        the strength of an edge is that of its block at its lag.
    """
    options = dict(locals())
    _check(options)
    size = {"two": 2, "three": 3}[one_of("kind", kind, ("two", "three"))]
    lags = [1] * size if delays is None else [whole(f"delays[{i}]", lag, 1) for i, lag in enumerate(delays)]
    if len(lags) != size:
        raise ValueError(f"delays has {len(lags)} entries, expected one for each of {size} edges")
    wait = np.zeros((size + control, size + control), dtype=int)
    for edge, lag in enumerate(lags):
        if control:
            wait[edge, size] = lag
        else:
            wait[(edge + 1) % size, edge] = lag
    rng = np.random.default_rng(seed)
    return _observed(_regions(rng, wait, options), rng, "feedback_loop", options | {"delays": lags})


def uncoupled_regions(
    drive: str = "none",
    *,
    drive_size: float = 1.0,
    regions: int = 4,
    latents: int = 2,
    units: int = 30,
    trials: int = 20,
    bins: int = 500,
    process_sd: float = 0.3,
    mean_count: float = 0.15,
    modulation: float = 0.55,
    bin_width: float = 0.02,
    seed: int = 0,
) -> System:
    r"""Regions that do not drive each other, under a common drive that makes it seem as if they did.

    Parameters
    ----------
    drive : what the regions have in common

        - "none";
        - "white": innovations, :math:`Q = \sigma^2 (I + \gamma \gamma^\top)` with :math:`\gamma \sim N(0, I)`;
        - "slow": the global latent of `coupled_regions`, with its ``global_input`` of .3;
        - "time-locked": a drift :math:`b_t = \sigma \beta u_t`, the same in all trials, with :math:`\beta \sim N(0,
          I)` and u white noise under a Gaussian kernel of sd 5 bins, scaled to mean 0 and variance 1 over the bins.
    drive_size : factor of :math:`\gamma`, of the global input, or of :math:`\beta`
    regions, latents, units, trials, bins, process_sd, mean_count, modulation, bin_width, seed : as in
        `coupled_regions`

    Returns
    -------
    System
        The truth is that of `coupled_regions`, without edges. ``variance_share`` has the origin "shared" for white
        common innovations. A time-locked drive adds ``drive`` (time) and ``drift`` (time, latent); variances and shares
        are then about the mean path, which starts at zero and is the same in all trials.

    Notes
    -----
    With a time-locked drive each row of the loading is scaled by the variance over trials and time together, and the
    offset is such that the expected count, averaged over the bins, is ``mean_count``.
    """
    options = dict(locals())
    size = _check(options)
    one_of("drive", drive, ("none", "white", "slow", "time-locked"))
    number("drive_size", drive_size, above=0.0)
    rng = np.random.default_rng(seed)
    slow = {"global_input": 0.3 * drive_size, "global_persistence": 0.97} if drive == "slow" else {}
    system = _regions(rng, np.zeros((size, size), dtype=int), options | slow)
    weight = process_sd * drive_size * rng.standard_normal(size * latents)
    if drive == "white":
        system = replace(system, noise=system.noise | {"shared": np.outer(weight, weight)})
    if drive == "time-locked":
        course = gaussian_filter1d(rng.standard_normal(bins), DRIVE_WIDTH, mode="wrap")
        course = (course - course.mean()) / max(course.std(), np.finfo(float).tiny)
        system = replace(system, drift=course[:, None] * weight, extra={"drive": ("time", course)})
    return _observed(system, rng, "uncoupled_regions", options)


def _check(options: dict[str, Any]) -> int:
    """The options that systems of regions share; returns the number of regions, 0 where they follow from the kind."""
    for name in ("latents", "units", "trials", "bins"):
        whole(name, options[name], 1)
    whole("seed", options["seed"], 0)
    for name in ("process_sd", "mean_count", "modulation", "bin_width"):
        number(name, options[name], above=0.0)
    for name in ("coupling", "global_input"):
        if name in options:
            number(name, options[name], least=0.0)
    if not -1.0 < number("global_persistence", options.get("global_persistence", 0.0)) < 1.0:
        raise ValueError(f"global_persistence must lie between -1 and 1, got {options['global_persistence']!r}")
    return whole("regions", options["regions"], 1) if "regions" in options else 0


def _regions(rng: np.random.Generator, delays: np.ndarray, options: dict[str, Any]) -> Regions:
    """Dynamics and noise for a graph, given as the delay of every edge in bins (target, source), 0 where there is none.

    There is a global latent where it has an input.
    """
    size, dim = len(delays), options["latents"]
    total = size * dim
    dynamics = np.zeros((max(1, delays.max()), total, total))
    for r in range(size):
        dynamics[0, r * dim : (r + 1) * dim, r * dim : (r + 1) * dim] = _rotations(rng, dim)
    for r, s in zip(*np.nonzero(delays), strict=True):
        block = rng.standard_normal((dim, dim))
        scaled = block * options["coupling"] / np.linalg.norm(block)
        dynamics[delays[r, s] - 1, r * dim : (r + 1) * dim, s * dim : (s + 1) * dim] = scaled
    names = [f"R{r + 1}" for r in range(size)]
    system = Regions(names, np.repeat(np.arange(size), dim), delays > 0, dynamics, {})
    shrink = min(1.0, MOST / np.abs(np.linalg.eigvals(system.companion)).max())
    # A_l times f^l multiplies all eigenvalues of the companion matrix by f.
    dynamics *= shrink ** np.arange(1, len(dynamics) + 1)[:, None, None]
    owner, origins = system.owner, dict(enumerate(names))
    if options.get("global_input", 0.0) > 0.0:
        entry = ENTRY_SD * options["global_input"] * rng.standard_normal(total)
        dynamics = np.pad(dynamics, ((0, 0), (0, 1), (0, 1)))
        dynamics[0, :-1, -1], dynamics[0, -1, -1] = entry, options["global_persistence"]
        owner = np.append(owner, -1)
        origins[-1] = "global"
    variance = options["process_sd"] ** 2
    noise = {name: variance * np.diag((owner == index).astype(float)) for index, name in origins.items()}
    return Regions(names, owner, delays > 0, dynamics, noise)


def _rotations(rng: np.random.Generator, dim: int) -> np.ndarray:
    """Rotations of `RADIUS` by angles in `TURNS`, one for each pair of latents; what is left over decays."""
    found = np.eye(dim)
    for first, angle in zip(range(0, dim - 1, 2), rng.uniform(*TURNS, dim // 2), strict=True):
        turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        found[first : first + 2, first : first + 2] = turn
    return RADIUS * found


def _observed(system: Regions, rng: np.random.Generator, name: str, options: dict[str, Any]) -> System:
    taken = {key: options[key] for key in ("units", "trials", "bins", "mean_count", "modulation", "bin_width")}
    return observe(system, rng, **taken, options={"system": name} | options)
