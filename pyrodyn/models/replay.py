r"""Replay: which place a population speaks of, and by which dynamics it moves there, where no animal moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from pyrodyn.errors import ModelError
from pyrodyn.linalg import mode_marginals
from pyrodyn.models._conditioned import RAREST, ConditionedChain
from pyrodyn.program import Labelled
from pyrodyn.recording import Recording

DYNAMICS = ("stationary", "continuous", "fragmented")
# By speed: what dynamics are called that are probable alone, or two together.
CATEGORIES = ("stationary", "stationary-continuous", "continuous", "fragmented-continuous", "fragmented")
COHERENT = CATEGORIES[:3]  # those that keep a place, or go on from it


class ReplayParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event)."""

    gain: Tensor  # (event): what the units' gains scatter about
    unit_gain: Tensor  # (unit)
    walk: Tensor  # (event): standard deviation of the random walk, per root of a second
    stay: Tensor  # (dynamics): probability that the next bin has the same dynamics


@dataclass(frozen=True)
class Replay(ConditionedChain):
    r"""A place that is held, walked through or jumped about, read from cells of known place fields.

    .. math::
        z_t \mid z_{t-1} \sim \mathrm{Categorical}(P_{z_{t-1}}), \qquad
        x_t \mid x_{t-1}, z_{t-1}, z_t \sim K_{z_{t-1} z_t}(x_{t-1}, \cdot), \qquad
        y_{t,n} \sim \mathrm{Poisson}(\gamma_n \, f_n(x_t) \, \Delta)

    on a grid of positions. The kernel K is the identity for stationary, a Gaussian step of variance
    :math:`w^2 \Delta` for continuous, and uniform for fragmented dynamics; it is that of the later bin, and uniform
    where the dynamics before were fragmented. Dynamics that are left are followed by each of the others alike. The
    first place and the first dynamics are uniform. Position and dynamics together are one hidden Markov chain, summed
    out exactly. Gains :math:`\gamma_n` scatter by ``gain_spread`` on the log scale about one that all units share.

    Parameters
    ----------
    fields : (unit, position) rates in events a second
        As `place_fields` gives them; nested tuples or an array. They must be positive.
    spacing : float
        Distance between two positions.
    walk : float
        Middle of the prior of w, in units of distance per root of a second.
    stay : float
        Mean of the prior of the probability to stay with the dynamics for another bin.
    gain : float
        Middle of the prior of the common gain: rates in replay are higher than in running.
    gain_spread : float

    References
    ----------
    Denovellis et al., eLife 10:e64505 (2021).
    """

    fields: tuple[tuple[float, ...], ...] = ()
    spacing: float = 1.0
    walk: float = 50.0
    stay: float = 0.98
    gain: float = 3.0
    gain_spread: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conditions:
            raise ModelError(f"conditions must be (): replay does not depend on them, got {self.conditions!r}")
        fields = np.asarray(self.fields, dtype=float)
        if fields.ndim != 2 or fields.shape[1] < 2 or not np.isfinite(fields).all() or not (fields > 0).all():
            raise ModelError(
                f"fields must be (unit, position) rates above 0 at two positions or more, got shape {fields.shape}; "
                "models.place_fields gives such"
            )
        object.__setattr__(self, "fields", tuple(tuple(row) for row in fields.tolist()))
        for name in ("spacing", "walk", "gain", "gain_spread"):
            if not getattr(self, name) > 0:
                raise ModelError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not 0 < self.stay < 1:
            raise ModelError(f"stay must lie between 0 and 1, got {self.stay!r}")

    @property
    def num_positions(self) -> int:
        return len(self.fields[0])

    @property
    def num_states(self) -> int:
        return len(DYNAMICS) * self.num_positions

    def check(self, recording: Recording) -> None:
        super().check(recording)
        if recording.num_units != len(self.fields):
            raise ModelError(
                f"fields are those of {len(self.fields)} units, but the recording has {recording.num_units}; select "
                "the same units, in the same order"
            )

    def coordinates(self, recording: Recording) -> dict[str, np.ndarray]:
        return {"dynamics": np.array(DYNAMICS), "event": np.array(["all"])}

    def sample_globals(self, recording: Recording) -> ReplayParameters:
        one = torch.zeros(1, dtype=torch.float64, device=recording.device)
        gain = pyro.sample("gain", dist.LogNormal(one + math.log(self.gain), 1.0).to_event(1))
        middle = gain.log().expand(*gain.shape[:-1], recording.num_units)
        unit_gain = pyro.sample("unit_gain", dist.LogNormal(middle, self.gain_spread).to_event(1))
        walk = pyro.sample("walk", dist.LogNormal(one + math.log(self.walk), 0.5).to_event(1))
        weight = one.new_full((len(DYNAMICS),), 20.0)
        stay = pyro.sample("stay", dist.Beta(weight * self.stay, weight * (1.0 - self.stay)).to_event(1))
        return ReplayParameters(gain, unit_gain, walk, stay)

    def chain(self, parameters: ReplayParameters, recording: Recording) -> tuple[Tensor, Tensor]:
        places, kinds = self.num_positions, len(DYNAMICS)
        place = self.spacing * torch.arange(places, dtype=torch.float64, device=recording.device)
        step = (parameters.walk * math.sqrt(recording.bin_width)).unsqueeze(-1)
        walked = (-0.5 * ((place - place.unsqueeze(-1)) / step).square()).log_softmax(-1)
        held = torch.where(torch.eye(places, dtype=torch.bool, device=place.device), 0.0, RAREST)
        jumped = torch.full((places, places), -math.log(places), dtype=place.dtype, device=place.device)
        kernels = torch.stack([part.expand(walked.shape) for part in (held.to(place.dtype), walked, jumped)], -3)
        from_any = kernels.unsqueeze(-4).expand(*kernels.shape[:-3], kinds - 1, *kernels.shape[-3:])
        uniform = jumped.expand(*kernels.shape[:-3], 1, kinds, places, places)
        moves = torch.cat([from_any, uniform], -4)  # (*draw, 1, dynamics, dynamics_to, position, position_to)
        same = torch.eye(kinds, dtype=torch.bool, device=place.device)
        stay = parameters.stay.unsqueeze(-1)
        switch = torch.where(same, stay.log(), (-stay).log1p() - math.log(kinds - 1))
        links = (switch[..., None, None] + moves).transpose(-3, -2).flatten(-2).flatten(-3, -2)
        states = kinds * places
        initial = links.new_full((*links.shape[:-2], 1, states), -math.log(states))
        return initial, links.clamp(min=RAREST)[..., None, None, :, :]

    def predictor(self, parameters: ReplayParameters, recording: Recording) -> Tensor:
        fields = torch.tensor(self.fields, dtype=torch.float64, device=recording.device).mT
        logs = (fields.repeat(len(DYNAMICS), 1) * recording.bin_width).log()
        return logs + parameters.unit_gain.log().unsqueeze(-2)

    def latents(self, parameters: ReplayParameters, local: Mapping[str, Tensor], recording: Recording) -> Labelled:
        axes = ("trial", "time")
        return {
            "dynamics_path": (axes, local["state"] // self.num_positions),
            "position": (axes, self.spacing * (local["state"] % self.num_positions).double()),
        }

    def decode(self, parameters: ReplayParameters, recording: Recording) -> Tensor:
        """Exact posterior of dynamics and position in every bin, (trial, time, dynamics, position).

        ``parameters`` are without draws.
        """
        with torch.no_grad():
            initial, transition = self.chain(parameters, recording)
            seen = self._seen(parameters, recording, recording.observations)
            seen = seen.reshape(recording.num_trials, recording.num_bins, self.num_states)
            states, _ = mode_marginals(initial.flatten(0, -2)[0], transition.flatten(0, -3)[:1], seen)
        return states.unflatten(-1, (len(DYNAMICS), self.num_positions))

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        one = torch.ones(1, dtype=torch.float64)
        units = one.new_ones(recording.num_units)
        values = {"gain": self.gain * one, "unit_gain": self.gain * units, "walk": self.walk * one}
        values["stay"] = self.stay * one.new_ones(len(DYNAMICS))
        if recording.observations is None:
            return values
        observed = torch.ones_like(recording.values) if recording.mask is None else recording.mask.double()
        usual = torch.tensor(self.fields, dtype=torch.float64).mean(-1) * recording.bin_width
        gain = (recording.values.sum() + 1.0) / ((observed * usual).sum() + 1.0 / self.gain)
        return values | {"gain": gain * one, "unit_gain": gain * units}

    def label(self, parameters: ReplayParameters) -> Labelled:
        return {
            "gain": (("event",), parameters.gain),
            "unit_gain": (("unit",), parameters.unit_gain),
            "walk": (("event",), parameters.walk),
            "stay": (("dynamics",), parameters.stay),
        }

    def unlabel(self, values: Mapping[str, Tensor]) -> ReplayParameters:
        return ReplayParameters(*(values[name] for name in ReplayParameters._fields))

    def invariants(self, parameters: ReplayParameters) -> Labelled:
        return self.label(parameters)

    def transformed(self, parameters: ReplayParameters, recording: Recording, seed: int) -> ReplayParameters:
        """Nothing: place fields tell positions and their units."""
        return parameters


def place_fields(
    recording: Recording,
    position: Sequence[float] | np.ndarray,
    edges: Sequence[float] | np.ndarray,
    prior: float = 0.5,
    smoothing: float = 0.0,
) -> np.ndarray:
    r"""Rates at positions from a run, (unit, position), in events a second.

    The posterior mean of a Poisson rate in each place under a Gamma prior about the unit's mean rate,

    .. math:: f_n(x) = \frac{\sum_t k(x - x_t) \, y_{t,n} + a \bar f_n}{\sum_t k(x - x_t) \, \Delta + a}

    with ``prior`` a in seconds, so that places hardly visited have the mean rate. The kernel k counts what happened at
    x, or near it, where events and seconds are smoothed by a Gaussian alike.

    Parameters
    ----------
    recording : Recording
    position : (trial, time)
        NaN where it is not to be used.
    edges : (position + 1,)
        Increasing ends of the bins of position.
    prior : float
    smoothing : float
        Standard deviation of the Gaussian, in bins of position; 0 for none.

    Raises
    ------
    ModelError
        Where shapes do not fit, edges do not increase, or a unit is silent.
    """
    place, ends = np.asarray(position, dtype=float), np.asarray(edges, dtype=float)
    expected = (recording.num_trials, recording.num_bins)
    if place.shape != expected:
        raise ModelError(f"position has shape {place.shape}, expected (trial, time) = {expected}")
    if ends.ndim != 1 or len(ends) < 3 or not (np.diff(ends) > 0).all():
        raise ModelError(f"edges must be three or more increasing numbers, got {edges!r}")
    if not prior > 0:
        raise ModelError(f"prior must be positive, got {prior!r}")
    if not smoothing >= 0:
        raise ModelError(f"smoothing must be 0 or more, in bins of position, got {smoothing!r}")
    which = np.digitize(place, ends) - 1
    counts = recording.values.numpy()
    seen = np.ones(counts.shape) if recording.mask is None else recording.mask.numpy().astype(float)
    at = [(which == k) & ~np.isnan(place) for k in range(len(ends) - 1)]
    events = np.stack([counts[here].sum(0) for here in at], -1)
    seconds = np.stack([seen[here].sum(0) for here in at], -1) * recording.bin_width
    mean = events.sum(-1, keepdims=True) / np.maximum(seconds.sum(-1, keepdims=True), 1e-12)
    if not (mean > 0).all():
        silent = recording.unit[~(mean[:, 0] > 0)].tolist()
        raise ModelError(
            f"recording: units {silent[:5]} are silent in the run and have no field; drop them by sel(unit=...)"
        )
    if smoothing:
        # What lies beyond the ends was not visited, and counts for nothing in either.
        events, seconds = (gaussian_filter1d(part, smoothing, axis=-1, mode="constant") for part in (events, seconds))
    return (events + prior * mean) / (seconds + prior)


def replay_categories(probability: np.ndarray | Tensor, threshold: float = 0.8) -> np.ndarray:
    """Which of five categories of dynamics a bin belongs to, if any: whole numbers (...), places in `CATEGORIES`.

    Where one of the dynamics has at least ``threshold``, that one; else where two that are neighbours in speed have it
    together, their mixture; else -1.

    Parameters
    ----------
    probability : (..., dynamics)
        Posterior probabilities, such as ``posterior["latents"]["dynamics_probability"]``, or `Replay.decode` summed
        over positions.
    threshold : float
        Above one half.

    References
    ----------
    Denovellis et al., eLife 10:e64505 (2021).
    """
    given = np.asarray(probability, dtype=float)
    if given.shape[-1:] != (len(DYNAMICS),):
        raise ModelError(f"probability must be (..., dynamics) with {len(DYNAMICS)} dynamics, got shape {given.shape}")
    if not 0.5 < threshold <= 1:
        raise ModelError(f"threshold must lie above .5 and be 1 or less, got {threshold!r}")
    # To the rounding of a sum: three probabilities of a decoder that is sure may fall short of 1.
    alone, together = given >= threshold - 1e-12, given[..., :-1] + given[..., 1:]
    found = np.where((together >= threshold - 1e-12).any(-1), 2 * together.argmax(-1) + 1, -1)
    return np.where(alone.any(-1), 2 * given.argmax(-1), found)
