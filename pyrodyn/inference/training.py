"""How a guide is trained: which trials a step sees, what of the bound counts when, how fast, and when to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger

from pyrodyn.errors import ModelError
from pyrodyn.recording import Recording

SHUFFLES, HELD_OUT = 2_000_003, 2_000_005  # random streams of the order of trials, and of those held out


@dataclass(frozen=True)
class Cosine:
    """The learning rate rises over ``warm_up`` steps and then falls along a half cosine to a share ``final`` of it."""

    final: float = 0.01
    warm_up: int = 0

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at a step."""
        share = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / (self.warm_up + 1)) * (self.final + (1.0 - self.final) * share)


@dataclass(frozen=True)
class Constant:
    """The learning rate rises over ``warm_up`` steps and stays."""

    warm_up: int = 0

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at a step."""
        del steps
        return min(1.0, (step + 1) / (self.warm_up + 1))


@dataclass(frozen=True)
class EarlyStopping:
    """Keep some trials back, look at their part of the bound now and then, and return to where it was best.

    Parameters
    ----------
    share : float
        Of the trials, kept back; which ones depends on the seed alone.
    every : int
        Steps between two looks.
    patience : int
        Looks without a new best after which training stops; the state that was best is taken.
    """

    share: float = 0.2
    every: int = 25
    patience: int = 12

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ModelError(f"share of the trials kept back must lie between 0 and 1, got {self.share!r}")
        if self.every < 1 or self.patience < 1:
            raise ModelError(f"every and patience must be at least 1, got {self.every!r} and {self.patience!r}")


@dataclass(frozen=True)
class Training:
    r"""How a guide is trained. The defaults are those of small models: all trials in every step, nothing held back.

    Parameters
    ----------
    batch : int, optional
        Trials in a step, their terms scaled up to all trials; None takes all. Trials go round in a new order each time.
        Needs a guide without parameters of single trials: one of the globals alone, or `guides.Amortised`.
    schedule : Cosine or Constant
        Of the learning rate.
    clip : float, optional
        A gradient whose norm is more than so many times its running mean is scaled down to that.
    latent_warm_up, weight_warm_up : int
        Steps over which the KL terms of what is latent in trials, and of the globals, rise from nothing to what they
        are: first learn to explain the data, then to do it sparingly. With weights as sites, the latter is the penalty
        (L2) on weights.
    hold : int
        Steps in which the guide of the globals stays where it started, while a recognition network finds its way. For
        globals that start near the mode: an untrained network would drive them off.
    dropout : float
        Coordinated dropout: in every step a share of the entries is hidden from the guide, and these alone are scored.
        A network that could copy its input into its output gains nothing by it. The bound becomes that of the hidden
        entries, scaled up to all of them.
    stopping : EarlyStopping, optional
    single_precision : bool
        Recurrent networks compute in float32 during training; weights, their gradients and densities do not.

    References
    ----------
    Keshtkaran & Pandarinath, NeurIPS 2019 (coordinated dropout); Bowman et al., CoNLL 2016 (KL schedule); Keshtkaran et
    al., Nat. Methods 19:1572 (2022).
    """

    batch: int | None = None
    schedule: Cosine | Constant = field(default_factory=Cosine)
    clip: float | None = None
    latent_warm_up: int = 0
    weight_warm_up: int = 0
    hold: int = 0
    dropout: float = 0.0
    stopping: EarlyStopping | None = None
    single_precision: bool = False

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise ModelError(f"batch must be at least 1 trial, or None for all, got {self.batch!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ModelError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if self.clip is not None and not self.clip > 0:
            raise ModelError(f"clip must be positive, or None, got {self.clip!r}")

    @property
    def by_trial(self) -> bool:
        """Whether trials are seen apart, so that no parameter of the guide may belong to one."""
        return self.batch is not None or self.dropout > 0.0 or self.stopping is not None


class Portion:
    """Which trials the steps see: a part held back, and batches of the rest.

    Attributes
    ----------
    held_out : Recording or None
    positions : ndarray
        Of the trials held back.
    """

    def __init__(self, options: Training, recording: Recording, seed_of: Any) -> None:
        self.options, self.seed_of = options, seed_of
        self.total = recording.num_trials
        self.positions, self.held_out = np.zeros(0, dtype=int), None
        self.rest = recording.batch(np.arange(self.total)) if options.by_trial else recording
        if options.stopping is not None:
            size = max(1, round(options.stopping.share * self.total))
            if size >= self.total:
                raise ModelError(
                    f"early stopping would hold back {size} of {self.total} trials; lower share, or train without it"
                )
            order = np.random.default_rng(seed_of(HELD_OUT)).permutation(self.total)
            self.positions = np.sort(order[:size])
            self.held_out = recording.batch(self.positions)
            self.rest = recording.batch(np.sort(order[size:]))
        self.size = min(options.batch or self.rest.num_trials, self.rest.num_trials)
        self._round, self._order = -1, np.zeros(0, dtype=int)

    def at(self, step: int) -> Recording:
        """The trials of a step."""
        return self.rest if self.size == self.rest.num_trials else self.rest.batch(self.positions_at(step))

    def positions_at(self, step: int) -> np.ndarray:
        """Positions of the trials of a step among those that are not held back."""
        trials = self.rest.num_trials
        if self.size == trials:
            return np.arange(trials)
        batches = trials // self.size
        if step // batches != self._round:
            self._round = step // batches
            self._order = np.random.default_rng([self.seed_of(SHUFFLES), self._round]).permutation(trials)
        place = step % batches * self.size
        return self._order[place : place + self.size]


class Weighted(Messenger):
    """Scales the log densities of a program's or a guide's sites.

    Parameters
    ----------
    trials : float
        What terms of trials stand for: trials of the recording over trials of the batch.
    latent, weights : float
        The share of the KL terms of trials and of globals that counts.
    observed : float
        What the terms of observations are multiplied by besides.
    """

    def __init__(self, trials: float, latent: float, weights: float, observed: float) -> None:
        super().__init__()
        self.trials, self.latent, self.weights, self.observed = trials, latent, weights, observed

    def _pyro_sample(self, msg: Any) -> None:
        kind = type(msg["fn"]).__name__
        if kind == "_Subsample":
            return
        if not any(frame.name == "trial" for frame in msg["cond_indep_stack"]):
            factor = self.weights
        elif msg["is_observed"] and kind != "Unit":  # a factor corrects the density of what is latent
            factor = self.trials * self.observed
        else:
            factor = self.trials * self.latent
        if factor != 1.0:
            msg["scale"] = factor if msg["scale"] is None else msg["scale"] * factor


def ramp(step: int, length: int) -> float:
    """From near zero to one over ``length`` steps."""
    return min(1.0, (step + 1) / (length + 1))


def dropped(recording: Recording, share: float) -> tuple[Recording, Recording, float]:
    """What coordinated dropout shows the guide, what it scores, and how many times that must count for all entries."""
    observed = torch.ones_like(recording.values, dtype=torch.bool) if recording.mask is None else recording.mask
    hidden = torch.rand(recording.values.shape) < share
    scored = observed & hidden
    factor = float(observed.sum()) / max(1.0, float(scored.sum()))
    return recording.hide(mask=hidden.numpy()), recording.hide(mask=(~hidden).numpy()), factor
