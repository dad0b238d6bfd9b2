r"""Regions that drive each other, loops included, and what imitates them: common drives without any coupling."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg

from pyrodyn.systems._linear import Regions, observe
from pyrodyn.systems.system import System, number, whole

RADIUS = 0.93  # of the rotation within a region
TURNS = (0.08, 0.3)  # range of its angle, radians a bin
MOST = 0.985  # spectral radius of all regions together
ENTRY_SD = 0.3  # of the global latent's entries into the regions, before `global_input` scales them


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

    Raises
    ------
    ValueError
        For an option out of its range.

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
    size = whole("regions", regions, 1)
    number("density", density, least=0.0, most=1.0)
    _check(options)
    if loop and size < 2:
        raise ValueError(f"loop=True needs two regions, got regions={regions}; pass loop=False")
    rng = np.random.default_rng(seed)
    adjacency = rng.random((size, size)) < density
    if loop:
        adjacency[0, 1] = adjacency[1, 0] = True
    np.fill_diagonal(adjacency, False)
    system = _regions(rng, adjacency, options)
    return _observed(system, rng, "coupled_regions", options)


def _check(options: dict[str, Any]) -> None:
    """The options that all systems of regions share."""
    for name in ("latents", "units", "trials", "bins"):
        whole(name, options[name], 1)
    whole("seed", options["seed"], 0)
    for name in ("process_sd", "mean_count", "modulation", "bin_width"):
        number(name, options[name], above=0.0)
    for name in ("coupling", "global_input"):
        if name in options:
            number(name, options[name], least=0.0)
    if "global_persistence" in options and not -1.0 < number("global_persistence", options["global_persistence"]) < 1.0:
        raise ValueError(f"global_persistence must lie between -1 and 1, got {options['global_persistence']!r}")


def _regions(rng: np.random.Generator, adjacency: np.ndarray, options: dict[str, Any]) -> Regions:
    """Dynamics and noise for a graph, with the global latent where it has an input."""
    size, dim = len(adjacency), options["latents"]
    blocks = [_rotations(rng, dim) for _ in range(size)]
    dynamics = scipy.linalg.block_diag(*blocks)
    for r, s in zip(*np.nonzero(adjacency), strict=True):
        block = rng.standard_normal((dim, dim))
        scaled = block * options["coupling"] / np.linalg.norm(block)
        dynamics[r * dim : (r + 1) * dim, s * dim : (s + 1) * dim] = scaled
    dynamics *= min(1.0, MOST / np.abs(np.linalg.eigvals(dynamics)).max())
    owner = np.repeat(np.arange(size), dim)
    names = [f"R{r + 1}" for r in range(size)]
    origins = dict(enumerate(names))
    if options.get("global_input", 0.0) > 0.0:
        entry = ENTRY_SD * options["global_input"] * rng.standard_normal((size * dim, 1))
        persistence = np.full((1, 1), options["global_persistence"])
        dynamics = np.block([[dynamics, entry], [np.zeros((1, size * dim)), persistence]])
        owner = np.append(owner, -1)
        origins[-1] = "global"
    variance = options["process_sd"] ** 2
    noise = {name: variance * np.diag((owner == index).astype(float)) for index, name in origins.items()}
    return Regions(names, owner, adjacency, dynamics, noise)


def _rotations(rng: np.random.Generator, dim: int) -> np.ndarray:
    """Rotations of `RADIUS` by angles in `TURNS`, one for each pair of latents; what is left over decays."""
    blocks = []
    for angle in rng.uniform(*TURNS, dim // 2):
        blocks.append([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return RADIUS * scipy.linalg.block_diag(*blocks, *[[[1.0]]] * (dim % 2))


def _observed(system: Regions, rng: np.random.Generator, name: str, options: dict[str, Any]) -> System:
    taken = {key: options[key] for key in ("units", "trials", "bins", "mean_count", "modulation", "bin_width")}
    return observe(system, rng, **taken, options={"system": name} | options)
