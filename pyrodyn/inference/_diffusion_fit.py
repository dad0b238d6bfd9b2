r"""The state of natural-gradient inference for a diffusion, and its moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrodyn.checkpoint import StateStore
from pyrodyn.diffusion import DiffusionModel
from pyrodyn.distributions import GaussMarkov
from pyrodyn.errors import NonFiniteError
from pyrodyn.expectations import Moments, gauss_hermite, moments_of
from pyrodyn.inference._profile import Profile, WeightPrior
from pyrodyn.inference._weights import Weights, WeightStatistics, weight_statistics
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.mode import ascend
from pyrodyn.program import globals_given
from pyrodyn.progress import progress
from pyrodyn.recording import Recording
from pyrodyn.smoothing import Climb, Target, bound, chosen, climb, expand, first_law, judged, stepped

FIRST_STEPS = 20  # careful ones of the first path, where the observations are not Gaussian
INNER = 10  # steps of L-BFGS of the other globals in one round
WEIGHTS = "drift_weights"


@dataclass(frozen=True)
class Schedule:
    """The options of `NaturalGradient` that a fit needs, of the same names."""

    rounds: int
    path_steps: int
    path_rate: float
    nodes: int
    learning_rate: float
    tolerance: float


class Sites(NamedTuple):
    """Names of the global sites, by how they are treated."""

    prior: tuple[str, ...]  # the weights' prior depends on them alone
    features: tuple[str, ...]
    others: tuple[str, ...]


class DiffusionFit:
    """Laws of path and weights, and a point of the other globals.

    ``start`` holds values for the globals of the model's linear relative.
    """

    def __init__(
        self, options: Schedule, model: DiffusionModel, recording: Recording, start: Mapping[str, Tensor]
    ) -> None:
        self.options, self.model, self.recording = options, model, recording
        self.rule = gauss_hermite(model.latent_dim, options.nodes)
        values = model.values_from_relative(start, recording)
        self.density = LogDensity(model.sample_globals, recording)
        names = [site.name for site in self.density.sites if site.name != WEIGHTS]
        prior = tuple(name for name in names if name in model.drift.prior_sites)
        features = tuple(name for name in names if name in model.drift.feature_sites)
        self.sites = Sites(prior, features, tuple(name for name in names if name not in (*prior, *features)))
        own = model.drift_parameters(globals_given(model, values, recording))
        self.place = self.density.unconstrain(values | {WEIGHTS: torch.zeros_like(own.weights)})
        self.weights = Weights.known(own.weights)
        shape = torch.Size((recording.num_trials, len(model.grid(recording).steps) + 1, model.latent_dim))
        self.law = first_law(self.target(), self.rule, shape, FIRST_STEPS)
        self.rate = torch.full(shape[:1], options.path_rate)
        self.adam = torch.zeros(2, len(self.place))
        self.round, self.steps = 0, 0
        self.bounds = np.full(options.rounds, np.nan)

    # ------------------------------------------------------------------------------------------ what follows from it

    def parameters(self) -> Any:
        """The globals (1, *event), with the mean weights."""
        values = globals_given(self.model, self.density.constrain(self.place), self.recording)
        lifted = type(values)(*(None if part is None else part.unsqueeze(0) for part in values))
        return lifted._replace(drift_weights=self.weights.mean.unsqueeze(0))

    def target(self, parameters: Any = None) -> Target:
        target = self.model.target(self.parameters() if parameters is None else parameters, self.recording)
        return target._replace(diffusion=target.diffusion._replace(spread=self.weights.spread))

    def prior_sd(self) -> Tensor:
        """Prior standard deviations of the weights, (feature)."""
        own = self.model.drift_parameters(self.parameters())
        sd = self.model.drift.prior_sd(own, self.model.latent_dim, self.model.pace(self.recording))
        return sd.reshape(-1)

    def moments(self) -> Moments:
        return moments_of(self.law)

    # ------------------------------------------------------------------------------------------ moves

    def train(self, checkpoint: StateStore | None) -> None:
        held = checkpoint.read() if checkpoint else None
        if held is not None:
            self._restore(held)
        with progress(self.options.rounds, "NaturalGradient", self.round) as bar:
            while self.round < self.options.rounds and not self.at_rest():
                self._advance()
                bar.update()
                bar.set_postfix_str(f"bound {self.bounds[self.round - 1]:.1f}", refresh=False)
                if checkpoint and checkpoint.due():
                    checkpoint.write(self._state())

    def _advance(self) -> None:
        """One round."""
        for _ in range(self.options.path_steps):
            statistics = self.move_weights()
            reached = self.move_path()
        self.bounds[self.round] = reached
        if not math.isfinite(reached):
            raise NonFiniteError(
                f"NaturalGradient: the bound was not finite in round {self.round}; lower "
                f"path_rate={self.options.path_rate}, or raise steps_per_bin of the model"
            )
        self.move_prior(statistics)
        self.move_others()
        self.round += 1

    def at_rest(self) -> bool:
        gains = np.diff(self.bounds[max(0, self.round - 3) : self.round])
        enough = self.options.tolerance * self.recording.num_trials
        return len(gains) == 2 and bool((np.abs(gains) < enough).all())

    def move_weights(self) -> WeightStatistics:
        """Set the law of the weights to its optimum."""
        diffusion = self.target().diffusion
        with torch.no_grad():
            statistics = weight_statistics(
                diffusion.features, len(self.weights.mean), self.moments(), diffusion.steps, self.rule
            )
            self.weights = statistics.regress(
                diffusion.precision.reshape(diffusion.precision.shape[-2:]), self.prior_sd()
            )
        return statistics

    def move_path(self) -> float:
        """A natural step of the paths, and one of Adam of the features; returns the bound before them."""
        parameters = self.parameters()
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in parameters._asdict().items()
            if name in self.model.drift.feature_sites and value is not None
        }
        found = expand(self.target(parameters._replace(**leaves)), self.law, self.rule, tuple(leaves.values()))
        value = float(found.value.sum() - self.weights.divergence(self.prior_sd()))
        ahead = stepped(self.law, found.toward, self.rate)
        won, rate = judged(found.value, bound(self.target(parameters), ahead, self.rule), self.rate)
        self.law, self.rate = chosen(won, ahead, self.law), rate.clamp(max=self.options.path_rate)
        if leaves:
            self._move_features(dict(zip(leaves, found.slopes, strict=True)))
        return value

    def _move_features(self, slopes: Mapping[str, Tensor]) -> None:
        self.steps += 1
        for site in self.density.sites:
            if site.name in slopes:
                # Their sites are the parameters themselves, with a normal prior.
                _, slope = self.density.gradient(self.place)
                slope = slope[site.place] + slopes[site.name].reshape(-1)
                first, second = self.adam[:, site.place]
                first.mul_(0.9).add_(0.1 * slope)
                second.mul_(0.999).add_(0.001 * slope.square())
                move = first / (1.0 - 0.9**self.steps) / ((second / (1.0 - 0.999**self.steps)).sqrt() + 1e-8)
                share = 0.5 * (1.0 + math.cos(math.pi * self.round / self.options.rounds))
                self.place[site.place] += self.options.learning_rate * (0.05 + 0.95 * share) * move

    def move_prior(self, statistics: WeightStatistics) -> None:
        """Climb the evidence of the regression in what the prior of the weights depends on."""
        if self.sites.prior:
            self._climb(self.weight_prior(statistics))

    def move_others(self) -> None:
        self._climb(self.profile())

    def _climb(self, own: Profile | WeightPrior) -> None:
        # Far from the optimum a unit step of the path may end at no law, and then there is no profile yet.
        if not self.defined(own):
            return
        place, _ = ascend(own, self.place[own.index], INNER, "NaturalGradient: globals")
        self.place = own.full(place)

    def defined(self, own: Profile | WeightPrior) -> bool:
        """Whether it is finite where the globals are."""
        return bool(torch.isfinite(own.gradient(self.place[own.index])[0]))

    def weight_prior(self, statistics: WeightStatistics) -> WeightPrior:
        precision = self.target().diffusion.precision
        return WeightPrior(
            self.density, self.place, self.sites.prior, self.model, self.recording, statistics,
            precision.reshape(precision.shape[-2:]),
        )  # fmt: skip

    def profile(self) -> Profile:
        return Profile(
            self.density, self.place, self.sites.others, self.model, self.recording, self.target().diffusion,
            self.moments(), self.rule,
        )  # fmt: skip

    def settle(self, steps: int) -> Climb:
        """Natural steps of the paths alone, each no worse than the one before."""
        found = climb(self.target(), self.law, self.rate, self.rule, steps)
        self.law = found.law
        return found

    # ------------------------------------------------------------------------------------------ checkpoints

    def _state(self) -> dict[str, np.ndarray]:
        arrays = {
            "place": self.place, "adam": self.adam, "diagonal": self.law.diagonal, "upper": self.law.upper,
            "linear": self.law.linear, "mean": self.weights.mean, "basis": self.weights.basis,
            "covariance": self.weights.covariance, "rate": self.rate, "random": torch.get_rng_state(),
        }  # fmt: skip
        counts = {
            "round": np.array([self.round, self.steps]),
            "bounds": self.bounds.copy(),
        }
        return {name: value.numpy().copy() for name, value in arrays.items()} | counts

    def _restore(self, state: Mapping[str, np.ndarray]) -> None:
        held = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        self.place, self.adam = held["place"], held["adam"]
        self.law = GaussMarkov(held["diagonal"], held["upper"], held["linear"])
        self.weights = Weights(held["mean"], held["basis"], held["covariance"])
        self.round, self.steps = (int(value) for value in state["round"])
        self.rate, self.bounds = held["rate"], np.array(state["bounds"])
        torch.set_rng_state(held["random"])
