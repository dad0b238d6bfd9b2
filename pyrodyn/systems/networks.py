r"""A chaotic recurrent network seen through spikes, left alone or hit by a pulse at a random time."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyrodyn.systems._readout import observed
from pyrodyn.systems.system import System, number, whole

CONSTANT = 0.025  # seconds, the time constant of a unit


def chaotic_rnn(
    *,
    units: int = 50,
    conditions: int = 130,
    repeats: int = 10,
    bins: int = 100,
    gain: float = 1.5,
    start_sd: float = 1.0,
    peak_rate: float = 30.0,
    bin_width: float = 0.01,
    seed: int = 5,
) -> System:
    r"""A random network in its chaotic regime, its rates seen through Poisson spikes.

    .. math:: x_t = (1 - \tfrac{\Delta}{\tau}) x_{t-1} + \tfrac{\Delta}{\tau} g W \tanh x_{t-1}, \qquad
        W_{ij} \sim N(0, 1/N), \qquad \tau = 25\,\mathrm{ms} .

    In every trial a unit's :math:`\tanh x` is mapped linearly from its least and largest value onto 0 and
    ``peak_rate``.

    Parameters
    ----------
    units : int
    conditions, repeats : int
        Starts :math:`x_0 \sim N(0, s^2 I)`, and trials from each; the condition is a trial's label.
    bins : int
    gain, start_sd : float
        g and s.
    peak_rate : float
        Events a second.
    bin_width : float
        Seconds.
    seed : int
        Of `numpy.random.RandomState`; the default is the network of the LFADS papers, whose first weight is .06239899.

    Returns
    -------
    System
        The truth holds ``latents`` (trial, time, latent), the network's state x, ``rates`` (trial, time, unit) in
        events a bin, ``weights`` (unit, unit_from), without the gain. Four fifths of the repeats of each condition
        have the split "train", the others "valid".

    References
    ----------
    Sussillo et al., arXiv:1608.06315 (2016); Pandarinath et al., Nat. Methods 15:805 (2018).
    """
    return _network(dict(locals()) | {"system": "chaotic_rnn"}, pulse=None)


def pulsed_rnn(
    *,
    units: int = 50,
    conditions: int = 130,
    repeats: int = 10,
    bins: int = 100,
    gain: float = 1.5,
    start_sd: float = 1.0,
    pulse: float = 20.0,
    quiet: float = 0.0,
    peak_rate: float = 30.0,
    bin_width: float = 0.01,
    seed: int = 5,
) -> System:
    r"""`chaotic_rnn` with one pulse of input at a random bin between a quarter and three quarters of each trial.

    .. math:: x_t = (1 - \tfrac{\Delta}{\tau}) x_{t-1} + \tfrac{\Delta}{\tau} (g W \tanh x_{t-1} + b\, u_t), \qquad
        b \sim N(0, I)

    Parameters
    ----------
    pulse : float
        Size of :math:`u_t` in the bin of the pulse.
    quiet : float
        Share of the trials that get no pulse.
    units, conditions, repeats, bins, gain, start_sd, peak_rate, bin_width, seed : as in `chaotic_rnn`

    Returns
    -------
    System
        As of `chaotic_rnn`, and ``pulse`` (trial, time, input), ``pulse_bin`` (trial), -1 without a pulse, and
        ``entry`` (latent), b.
    """
    options = dict(locals()) | {"system": "pulsed_rnn"}
    number("quiet", quiet, least=0.0, most=1.0)
    return _network(options, pulse=number("pulse", pulse))


def _network(options: dict[str, Any], pulse: float | None) -> System:
    units, conditions, repeats, bins = (
        whole(key, options[key], 1) for key in ("units", "conditions", "repeats", "bins")
    )
    gain, spread = (number(key, options[key], least=0.0) for key in ("gain", "start_sd"))
    peak, width = (number(key, options[key], above=0.0) for key in ("peak_rate", "bin_width"))
    if width >= 2.0 * CONSTANT:
        raise ValueError(f"bin_width must be below {2.0 * CONSTANT:g} s, twice the time constant, got {width!r}")
    # The legacy generator, for its stream: the published network is a seed of it.
    rng = np.random.RandomState(whole("seed", options["seed"], 0))
    weights = rng.randn(units, units) / np.sqrt(units)
    entry = rng.randn(units)
    rng.randn(units)  # a second entry that the published script draws and does not use
    starts = spread * rng.randn(conditions, units)
    trials = conditions * repeats
    # Without a pulse repeats are one trial: as rows of one product they would differ by rounding.
    state = starts if pulse is None else np.repeat(starts, repeats, axis=0)
    drive = np.zeros((trials, bins))
    when = np.full(trials, -1)
    if pulse is not None:
        when = bins // 4 + rng.choice(max(1, bins // 2), size=trials)
        when[rng.permutation(trials)[: round(options["quiet"] * trials)]] = -1
        hit = np.flatnonzero(when >= 0)
        drive[hit, when[hit]] = pulse
    share = width / CONSTANT
    latents = np.empty((len(state), bins, units))
    for t in range(bins):
        recurrent = gain * np.tanh(state) @ weights.T
        state = (1.0 - share) * state + share * (recurrent + drive[: len(state), t, None] * entry)
        latents[:, t] = state
    latents = latents.repeat(trials // len(state), axis=0)
    activity = np.tanh(latents)
    least, most = activity.min(1, keepdims=True), activity.max(1, keepdims=True)
    rates = peak * width * (activity - least) / np.maximum(most - least, np.finfo(float).tiny)
    extra: dict[str, Any] = {"weights": (("unit", "unit_from"), weights)}
    if pulse is not None:
        extra |= {
            "pulse": (("trial", "time", "input"), drive[..., None]),
            "pulse_bin": ("trial", when),
            "entry": ("latent", entry),
        }
    condition = np.repeat([f"start {i}" for i in range(conditions)], repeats)
    made = observed(
        rng.poisson(rates), latents, rates, bin_width=width, condition=condition, extra=extra, options=options
    )
    split = np.where(np.arange(trials) % repeats < np.ceil(0.8 * repeats), "train", "valid")
    dataset = made.recording.to_xarray().assign_coords(split=("trial", split))
    return System(made.recording.from_xarray(dataset), made.truth)
