r"""Systems that switch between linear dynamics: a race track, rotations seen through spikes, and routes of regions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from pyrodyn.recording import Recording
from pyrodyn.systems._linear import Regions
from pyrodyn.systems.system import System, number, whole

TURN_CENTRES = (2.0, -2.0)  # on the first axis: where the bends of the track lie
SPEEDS = (0.1, -0.25)  # along the straights, a bin
RADIUS, TURN = 0.9, 0.15  # of the rotation within a region, and radians a bin
SHARP, SOFT = 100.0, 10.0  # slopes of the logits that tell bends from straights, and one straight from the other


def nascar(
    *,
    bins: int = 10_000,
    units: int = 10,
    trials: int = 1,
    process_variance: float = 1e-4,
    noise_variance: float = 1e-2,
    bin_width: float = 0.02,
    seed: int = 0,
) -> System:
    r"""A point that drives round a race track: two bends and two straights, each its own linear dynamics.

    .. math::

        z_t &\sim \mathrm{softmax}(R x_{t-1} + r), \qquad
        x_t = A_{z_t} x_{t-1} + b_{z_t} + \epsilon_t, \qquad \epsilon_t \sim N(0, \sigma_x^2 I), \\
        y_t &= C x_t + d + \eta_t, \qquad \eta_t \sim N(0, \sigma_y^2 I).

    The bends rotate clockwise about (2, 0) and (-2, 0) by :math:`\pi/24` and :math:`\pi/48` a bin; the straights drift
    by (.1, 0) and (-.25, 0). The sense of rotation matters: anticlockwise, the point never comes round.

    Parameters
    ----------
    bins, units, trials : numbers of bins, units and trials
    process_variance, noise_variance : :math:`\sigma_x^2` and :math:`\sigma_y^2`
    bin_width : seconds
    seed : every part of the system follows from it; C has orthonormal columns, uniform over all such

    Returns
    -------
    System
        Its truth holds ``mode`` (trial, time), ``latents`` (trial, time, latent), ``dynamics`` (mode, latent,
        latent_from), ``bias`` (mode, latent), ``recurrence`` (mode, latent) and ``recurrence_bias`` (mode): R and r,
        ``loading`` (unit, latent) and ``offset`` (unit).

    Raises
    ------
    ValueError
        For an option out of its range.

    References
    ----------
    Linderman et al., AISTATS 2017.
    """
    whole("bins", bins, 2)
    whole("units", units, 2)
    whole("trials", trials, 1)
    number("process_variance", process_variance, above=0.0)
    number("noise_variance", noise_variance, above=0.0)
    rng = np.random.default_rng([seed, 1])
    turns = np.stack([_rotation(-math.pi / 24), _rotation(-math.pi / 48)])
    dynamics = np.concatenate([turns, np.tile(np.eye(2), (2, 1, 1))])
    bias = np.zeros((4, 2))
    bias[:2, 0] = TURN_CENTRES
    bias[:2] -= np.einsum("kij,kj->ki", turns, bias[:2])
    bias[2:, 0] = SPEEDS
    recurrence = np.array([[SHARP, 0.0], [-SHARP, 0.0], [0.0, SOFT], [0.0, -SOFT]])
    logit_bias = np.array([-SHARP * TURN_CENTRES[0], SHARP * TURN_CENTRES[1], 0.0, 0.0])

    latents, modes = np.empty((trials, bins, 2)), np.empty((trials, bins), np.int64)
    state = rng.uniform((-2.0, 0.8), (2.0, 1.2), (trials, 2))  # on the upper straight
    for t in range(bins):
        logit = state @ recurrence.T + logit_bias
        modes[:, t] = (logit + rng.gumbel(size=logit.shape)).argmax(-1)
        if t:
            step = np.einsum("bij,bj->bi", dynamics[modes[:, t]], state) + bias[modes[:, t]]
            state = step + math.sqrt(process_variance) * rng.standard_normal(state.shape)
        latents[:, t] = state
    basis, triangle = np.linalg.qr(rng.standard_normal((units, 2)))
    loading, offset = basis * np.sign(np.diagonal(triangle)), rng.standard_normal(units)
    values = latents @ loading.T + offset + math.sqrt(noise_variance) * rng.standard_normal((trials, bins, units))
    recording = Recording.from_arrays(values, bin_width=bin_width, counts=False, unit=range(units), session="nascar")
    options = {"system": "nascar", "process_variance": process_variance, "noise_variance": noise_variance, "seed": seed}
    extra = {"recurrence": (("mode", "latent"), recurrence), "recurrence_bias": ("mode", logit_bias)}
    return System(recording, _truth(recording, modes, latents, dynamics, bias, loading, offset, extra, options))


def switching_rotations(
    *,
    modes: int = 5,
    units: int = 100,
    trials: int = 1,
    bins: int = 1000,
    dwell: float = 50.0,
    mean_count: float = 1.0,
    modulation: float = 0.6,
    process_sd: float = 0.3,
    bin_width: float = 0.02,
    seed: int = 0,
) -> System:
    r"""A latent in the plane that turns at another speed in every mode, read out by Poisson units.

    .. math:: A_k = .95 \, \mathrm{Rot}((k + 1) \pi / 20), \qquad x_t = A_{z_t} x_{t-1} + b_{z_t} + \epsilon_t, \qquad
        y_{nt} \sim \mathrm{Poisson}(\exp(c_n^\top x_t + d_n))

    for k = 0, 1, ...; modes last ``dwell`` bins on average, and the fixed points of modes lie evenly on a circle of
    radius 2.

    Parameters
    ----------
    modes, units, trials, bins : numbers of modes, units, trials and bins
    dwell : mean number of bins that a mode lasts
    mean_count : mean number of events of a unit in a bin, the average over bins
    modulation : root mean square of the log rate's variation in every unit
    process_sd : standard deviation of :math:`\epsilon`
    bin_width : seconds
    seed : every part of the system follows from it

    Returns
    -------
    System
        Its truth holds ``mode`` (trial, time), ``latents`` (trial, time, latent), ``dynamics`` (mode, latent,
        latent_from), ``bias`` (mode, latent), ``loading`` (unit, latent), ``offset`` (unit), and ``rates`` (trial,
        time, unit) in events a bin.

    Raises
    ------
    ValueError
        For an option out of its range.
    """
    for name, value, least in (("modes", modes, 1), ("units", units, 2), ("trials", trials, 1), ("bins", bins, 2)):
        whole(name, value, least)
    number("dwell", dwell, above=1.0)
    for name, value in (("mean_count", mean_count), ("modulation", modulation), ("process_sd", process_sd)):
        number(name, value, above=0.0)
    rng = np.random.default_rng([seed, 2])
    dynamics = np.stack([0.95 * _rotation((k + 1) * math.pi / 20) for k in range(modes)])
    angle = 2.0 * math.pi * np.arange(modes) / modes
    fixed = 2.0 * np.stack([np.cos(angle), np.sin(angle)], -1)
    bias = fixed - np.einsum("kij,kj->ki", dynamics, fixed)
    latents, chosen = np.empty((trials, bins, 2)), np.empty((trials, bins), np.int64)
    mode = rng.integers(modes, size=trials)
    state = fixed[mode] + rng.standard_normal((trials, 2))
    for t in range(bins):
        if t:
            leave = (rng.random(trials) < 1.0 / dwell) & (modes > 1)
            mode = np.where(leave, (mode + rng.integers(1, max(2, modes), size=trials)) % modes, mode)
            step = np.einsum("bij,bj->bi", dynamics[mode], state) + bias[mode]
            state = step + process_sd * rng.standard_normal(state.shape)
        latents[:, t], chosen[:, t] = state, mode
    loading, offset, rates = _log_rates(latents, rng.standard_normal((units, 2)), mean_count, modulation)
    recording = Recording.from_arrays(
        rng.poisson(rates), bin_width=bin_width, counts=True, unit=range(units), session="switching_rotations"
    )
    options = {"system": "switching_rotations", "dwell": dwell, "process_sd": process_sd, "seed": seed}
    extra = {"rates": (("trial", "time", "unit"), rates, {"units": "events a bin"})}
    return System(recording, _truth(recording, chosen, latents, dynamics, bias, loading, offset, extra, options))


def switching_routes(
    *,
    regions: int = 2,
    units: int = 30,
    trials: int = 10,
    bins: int = 500,
    dwell: float = 50.0,
    coupling: float = 0.5,
    mean_count: float = 0.5,
    modulation: float = 0.6,
    process_sd: float = 0.3,
    bin_width: float = 0.02,
    seed: int = 0,
) -> System:
    r"""Regions in a row that drive each other forwards in one mode and backwards in the other, read out by spikes.

    .. math:: x^r_t = A_{rr} x^r_{t-1} + A^{z_t}_{rs} x^s_{t-1} + \epsilon^r_t, \qquad
        s = r - 1 \text{ in mode 0}, \quad s = r + 1 \text{ in mode 1}, \qquad
        y_{nt} \sim \mathrm{Poisson}(\exp(c_n^\top x^r_t + d_n)) .

    Within every region :math:`A_{rr} = .9 \, \mathrm{Rot}(.15)`, in both modes: these differ in nothing but their
    routes. Neither has a loop, so that the spectral radius is .9. Modes last ``dwell`` bins on average.

    Parameters
    ----------
    regions, units, trials, bins : numbers of regions, of units in each, of trials and of bins; two latents a region
    dwell : mean number of bins that a mode lasts
    coupling : Frobenius norm of the block :math:`A_{rs}` of an edge; its entries are iid normal before
    mean_count : mean number of events of a unit in a bin, the average over bins
    modulation : root mean square of the log rate's variation in every unit
    process_sd : standard deviation of :math:`\epsilon`
    bin_width : seconds
    seed : every part of the system follows from it

    Returns
    -------
    System
        Its truth holds what that of `switching_rotations` does, and ``adjacency`` and ``strength`` (mode, target,
        source), as `coupled_regions` has them, of each mode as if it went on for ever.

    Raises
    ------
    ValueError
        For an option out of its range.
    """
    for name, value, least in (("regions", regions, 2), ("units", units, 2), ("trials", trials, 1), ("bins", bins, 2)):
        whole(name, value, least)
    number("dwell", dwell, above=1.0)
    number("coupling", coupling, least=0.0)
    for name, value in (("mean_count", mean_count), ("modulation", modulation), ("process_sd", process_sd)):
        number(name, value, above=0.0)
    rng = np.random.default_rng([seed, 3])
    names, owner = [f"R{r + 1}" for r in range(regions)], np.repeat(np.arange(regions), 2)
    adjacency = np.stack([np.eye(regions, k=-1), np.eye(regions, k=1)]).astype(bool)
    dynamics = np.tile(np.kron(np.eye(regions), RADIUS * _rotation(TURN)), (2, 1, 1))
    for mode, target, source in np.argwhere(adjacency):
        block = rng.standard_normal((2, 2))
        place = np.ix_([mode], owner == target, owner == source)
        dynamics[place] = block * coupling / np.linalg.norm(block)
    noise = {"own": process_sd**2 * np.eye(2 * regions)}
    strength = [Regions(names, owner, adjacency[k], dynamics[k : k + 1], noise).strength() for k in range(2)]
    latents, modes = np.empty((trials, bins, 2 * regions)), np.empty((trials, bins), np.int64)
    mode = rng.integers(2, size=trials)
    state = process_sd / math.sqrt(1.0 - RADIUS**2) * rng.standard_normal((trials, 2 * regions))
    for t in range(bins):
        if t:
            mode = np.where(rng.random(trials) < 1.0 / dwell, 1 - mode, mode)
            state = np.einsum("bij,bj->bi", dynamics[mode], state) + process_sd * rng.standard_normal(state.shape)
        latents[:, t], modes[:, t] = state, mode
    of_unit = np.repeat(np.arange(regions), units)
    loading = rng.standard_normal((len(of_unit), 2 * regions)) * (of_unit[:, None] == owner)
    loading, offset, rates = _log_rates(latents, loading, mean_count, modulation)
    recording = Recording.from_arrays(
        rng.poisson(rates), bin_width=bin_width, counts=True, unit=range(len(of_unit)), session="switching_routes",
        region=[names[r] for r in of_unit],
    )  # fmt: skip
    options = {"system": "switching_routes", "dwell": dwell, "coupling": coupling, "process_sd": process_sd}
    pairs = ("mode", "target", "source")
    extra = {
        "rates": (("trial", "time", "unit"), rates, {"units": "events a bin"}),
        "adjacency": (pairs, adjacency),
        "strength": (pairs, np.stack(strength)),
    }
    bias, options = np.zeros((2, 2 * regions)), options | {"seed": seed}
    truth = _truth(recording, modes, latents, dynamics, bias, loading, offset, extra, options)
    return System(recording, truth.assign_coords(target=names, source=names))


def _log_rates(
    latents: np.ndarray, loading: np.ndarray, mean_count: float, modulation: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The loading (unit, latent) with rows scaled to the modulation, the offset (unit), and the rates."""
    seen = latents - latents.mean((0, 1))
    loading = loading * modulation / np.sqrt(np.square(seen @ loading.T).mean((0, 1)))[:, None]
    offset = np.log(mean_count) - np.log(np.exp(latents @ loading.T).mean((0, 1)))
    return loading, offset, np.exp(latents @ loading.T + offset)


def _rotation(angle: float) -> np.ndarray:
    """Anticlockwise by ``angle``, acting on column vectors."""
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _truth(
    recording: Recording,
    modes: np.ndarray,
    latents: np.ndarray,
    dynamics: np.ndarray,
    bias: np.ndarray,
    loading: np.ndarray,
    offset: np.ndarray,
    extra: dict[str, Any],
    options: dict[str, Any],
) -> xr.Dataset:
    data = {
        "mode": (("trial", "time"), modes),
        "latents": (("trial", "time", "latent"), latents),
        "dynamics": (("mode", "latent", "latent_from"), dynamics),
        "bias": (("mode", "latent"), bias),
        "loading": (("unit", "latent"), loading),
        "offset": ("unit", offset),
    }
    coords = {"trial": recording.trial, "time": ("time", recording.time, {"units": "s"}), "unit": recording.unit}
    return xr.Dataset(data | extra, coords, options | {"bin_width": recording.bin_width})
