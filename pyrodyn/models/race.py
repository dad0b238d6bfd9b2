r"""A decision as a race: several accumulators of evidence run side by side, and the first at its bound decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.distributions.race import StoppedRace
from pyrodyn.errors import ModelError
from pyrodyn.models._conditioned import early_and_late
from pyrodyn.models._modes import numbering
from pyrodyn.models._ramps import MAX_DRIFT, STARTS, Ramps, log_softplus
from pyrodyn.program import Labelled, globals_given
from pyrodyn.readouts import Poisson
from pyrodyn.recording import Recording

MOST_STATES = 20_000  # positions of all accumulators together


class RaceParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event)."""

    drift: Tensor  # (condition, accumulator): per second
    diffusion: Tensor  # (): per root of a second
    start: Tensor  # ()
    offset: Tensor  # (unit): log of the gain, the expected count of a bin with all accumulators at 1
    share: Tensor  # (unit, accumulator): of the gain; sums to one


@dataclass(frozen=True)
class Race(Ramps):
    r"""Accumulators of evidence that run until the first of them reaches its bound.

    .. math::
        x_{t,d} = x_{t-1,d} + \beta_{c,d} \Delta + \sigma \sqrt{\Delta}\, \epsilon_{t,d}, \quad x_{0,d} = s, \qquad
        y_{t,n} \sim \mathrm{Poisson}\Big(\Delta\, \mathrm{softplus}\big(C_n \textstyle\sum_d w_{n,d} x_{t,d}\big)\Big)

    in condition c, with bins of :math:`\Delta` seconds, gains :math:`C_n = e^{d_n} / \Delta` in events a second, and
    weights w that sum to one. From the bin on in which the first of them passes 1, where it stays, all are held. Which
    accumulator is which is a matter of numbering.

    Positions are summed out on the product of one grid for each accumulator. While the race lasts they move apart, so
    that a step is a small product of matrices for each; `Ramps` says how exact it is.

    Parameters
    ----------
    conditions, grid, lower, drift_scale, diffusion
        As in `Ramps`; ``diffusion`` is the middle of the prior of :math:`\sigma`.
    accumulators : int
        Two, or three on a coarse grid: the number of joint positions is a power of it.

    References
    ----------
    Zoltowski, Pillow & Linderman, ICML 2020; of races: Vickers, Ergonomics 13:37 (1970).
    """

    grid: int = 30
    accumulators: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.accumulators, int) or self.accumulators < 2:
            raise ModelError(
                f"accumulators must be a whole number of at least 2, got {self.accumulators!r}; models.Accumulator has "
                "one"
            )
        if self.num_states > MOST_STATES:
            fits = int(MOST_STATES ** (1.0 / self.accumulators)) - 1
            raise ModelError(
                f"grid={self.grid} for each of {self.accumulators} accumulators makes {self.num_states} joint "
                f"positions, expected {MOST_STATES} at most: set grid to {fits} or less"
            )

    @property
    def num_states(self) -> int:
        return (self.grid + 1) ** self.accumulators

    def coordinates(self, recording: Recording) -> dict[str, np.ndarray]:
        names = np.array([str(d) for d in range(1, self.accumulators + 1)])
        outcomes = np.array(["none", *names, "tie"])
        return super().coordinates(recording) | {"accumulator": names, "winner": outcomes, "race": np.array(["x"])}

    def sample_globals(self, recording: Recording) -> RaceParameters:
        zeros = torch.zeros(self.num_conditions, self.accumulators, dtype=torch.float64, device=recording.device)
        one = zeros[0, :1]
        drift = pyro.sample("drift", dist.Normal(zeros, self.drift_scale).to_event(2))
        diffusion = pyro.sample("diffusion", dist.LogNormal(one + math.log(self.diffusion), 0.5).to_event(1))
        start = pyro.sample("start", dist.Beta(one + 2.0, one + 2.0).to_event(1))
        offset = Poisson().sample_offset(recording)
        weight = one.new_ones(recording.num_units, self.accumulators)
        return RaceParameters(drift, diffusion, start, offset, pyro.sample("share", dist.Dirichlet(weight).to_event(1)))

    def chain(self, parameters: RaceParameters, recording: Recording) -> tuple[Tensor, Tensor]:
        """Those of every accumulator by itself, (*draw, 1, condition, accumulator, ...)."""
        positions = self.positions[: self.grid].to(recording.device)
        start = parameters.start[..., None, None]  # (*draw, 1, condition or 1, accumulator or 1, position)
        drift = (parameters.drift * recording.bin_width).unsqueeze(-1)
        sd = (parameters.diffusion * math.sqrt(recording.bin_width))[..., None, None]
        return self.steps(start + drift, sd).squeeze(-2), self.steps(positions + drift, sd)

    def law(self, parameters: RaceParameters, recording: Recording) -> StoppedRace:
        return StoppedRace(
            *self.chain(parameters, recording), torch.from_numpy(self.which(recording)), recording.num_bins
        )

    def _numbers(self, recording: Recording) -> int:
        return self.num_states * recording.num_trials * recording.num_bins

    def joint(self, device: torch.device | None = None) -> Tensor:
        """Positions of all accumulators in every state, (state, accumulator)."""
        return torch.cartesian_prod(*[self.positions.to(device)] * self.accumulators)

    def predictor(self, parameters: RaceParameters, recording: Recording) -> Tensor:
        gain = (parameters.offset.exp() / recording.bin_width).unsqueeze(-2)
        mixed = self.joint(gain.device) @ parameters.share.mT
        return log_softplus(gain * mixed) + math.log(recording.bin_width)

    def latents(self, parameters: RaceParameters, local: Mapping[str, Tensor], recording: Recording) -> Labelled:
        position = self.joint(recording.device)[local["state"]]
        arrived = position == 1.0
        winner = torch.where(arrived.sum(-1) > 1, self.accumulators, arrived.to(torch.long).argmax(-1)) + 1
        winner = torch.where(arrived.any(-1), winner, 0)
        axes = ("trial", "time")
        return {"position": ((*axes, "accumulator"), position), "winner_path": (axes, winner)}

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        """Of first guesses that start at several positions, the most probable."""
        zeros = torch.zeros(self.num_conditions, self.accumulators, dtype=torch.float64)
        if recording.observations is None:
            # Accumulators that were all alike would stay so under any climb.
            tilt = torch.linspace(1.0, 2.0, self.accumulators, dtype=torch.float64)
            return {
                "drift": zeros,
                "diffusion": zeros[0, :1] + self.diffusion,
                "start": zeros[0, :1] + 0.5,
                "offset": zeros.new_zeros(recording.num_units),
                "share": (tilt / tilt.sum()).expand(recording.num_units, -1).clone(),
            }
        guesses = [self._started(recording, start) for start in STARTS]
        scores = [
            float(self.evidence(globals_given(self, guess, recording), recording, recording.values).sum())
            for guess in guesses
        ]
        return guesses[int(np.argmax(scores))]

    def _started(self, recording: Recording, start: float) -> dict[str, Tensor]:
        """Trials are told apart by their late counts: a cluster for each accumulator, at its bound."""
        from sklearn.cluster import KMeans

        early, late = early_and_late(recording)
        ratio = start * late / early  # (trial, unit): what the accumulators that a unit reads add up to
        groups = min(self.accumulators, recording.num_trials)
        clusters = KMeans(groups, n_init=4, random_state=0)  # pyright: ignore[reportArgumentType]
        won = clusters.fit_predict(np.log(ratio))
        middle, which = 0.5 * (1.0 + start), self.which(recording)
        share = np.ones((recording.num_units, self.accumulators))
        reached = np.full((recording.num_trials, self.accumulators), start)
        for d in range(groups):
            # The winner stands at 1, the others about where they started.
            share[:, d] = (ratio[won == d].mean(0) - start) / (1.0 - start)
            reached[won == d, d] = middle
        share = share.clip(0.1, 0.9)
        seconds = 0.8 * (recording.lengths * recording.bin_width)[:, None]
        speed = 2.0 * (reached - start) / seconds
        drift = [
            speed[which == c].mean(0) if (which == c).any() else np.zeros(self.accumulators)
            for c in range(self.num_conditions)
        ]
        one = torch.ones(1, dtype=torch.float64)
        return {
            "drift": torch.from_numpy(np.clip(drift, -MAX_DRIFT, MAX_DRIFT)),
            "diffusion": self.diffusion * one,
            "start": start * one,
            "offset": torch.from_numpy(np.log(early / start)),
            "share": torch.from_numpy(share / share.sum(-1, keepdims=True)),
        }

    def label(self, parameters: RaceParameters) -> Labelled:
        return {
            "drift": (("condition", "accumulator"), parameters.drift),
            "diffusion": (("race",), parameters.diffusion),
            "start": (("race",), parameters.start),
            "offset": (("unit",), parameters.offset),
            "share": (("unit", "accumulator"), parameters.share),
        }

    def unlabel(self, values: Mapping[str, Tensor]) -> RaceParameters:
        return RaceParameters(*(values[name] for name in RaceParameters._fields))

    def invariants(self, parameters: RaceParameters) -> Labelled:
        return {
            "mean_drift": (("condition",), parameters.drift.mean(-1)),
            "largest_drift": (("condition",), parameters.drift.amax(-1)),
            "drift_of_unit": (("condition", "unit"), parameters.drift @ parameters.share.mT),
            "largest_share": (("unit",), parameters.share.amax(-1)),
            "diffusion": (("race",), parameters.diffusion),
            "start": (("race",), parameters.start),
            "offset": (("unit",), parameters.offset),
        }

    def transformed(self, parameters: RaceParameters, recording: Recording, seed: int) -> RaceParameters:
        """Number the accumulators anew at random."""
        order = torch.randperm(self.accumulators, generator=torch.Generator().manual_seed(seed))
        return parameters._replace(drift=parameters.drift[..., order], share=parameters.share[..., order])

    def log_copies(self, recording: Recording) -> float:
        """Accumulators may be numbered in any order."""
        return math.lgamma(self.accumulators + 1)

    def nearest_copy(
        self, values: Mapping[str, Tensor], reference: Mapping[str, Tensor], recording: Recording
    ) -> dict[str, Tensor]:
        """Accumulators numbered such that their drifts and shares lie nearest to those of the reference."""

        def told(sites: Mapping[str, Tensor]) -> Tensor:  # (*draw, 1, accumulator, feature)
            return torch.cat([sites["drift"] / self.drift_scale, sites["share"]], -2).mT

        costs = (told(reference).unsqueeze(-2) - told(values).unsqueeze(-3)).square().sum(-1)
        order = numbering(costs).unsqueeze(-2)
        return dict(values) | {name: values[name].take_along_dim(order, -1) for name in ("drift", "share")}
