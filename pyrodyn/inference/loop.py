"""The loop that trains a guide: steps of Adam that can fail, be taken back, stop early, and go on after a kill."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyrodyn.checkpoint import StateStore
from pyrodyn.errors import ModelError, NonFiniteError
from pyrodyn.guides import AmortisedGuide
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.engine import random_stream, stream_seed
from pyrodyn.inference.training import HELD_OUT, Portion, Training, Weighted, dropped, ramp
from pyrodyn.networks.precision import network_precision
from pyrodyn.program import Program, is_random
from pyrodyn.progress import progress
from pyrodyn.recording import Recording

SNAPSHOT = 50  # steps between the states that a failed step falls back to
MAX_FAILURES = 3  # since one of these states, each with half the step of the one before
FORGETTING = 0.98  # of the running mean of the gradient's norm, for every step


class Pair(NamedTuple):
    """What the guide sees in a step, and what the program scores: the same without dropout."""

    seen: Recording
    scored: Recording


class Run:
    """The training loop with its state: guide, optimiser, schedule, losses, random numbers."""

    def __init__(
        self,
        program: Program,
        guide: nn.Module,
        recording: Recording,
        training: Training,
        *,
        steps: int,
        rate: float,
        particles: int,
        seed: int,
    ) -> None:
        if not isinstance(guide, AmortisedGuide) and training.by_trial:
            _refuse_local(program, recording)
        self.program, self.guide, self.training = program, guide, training
        self.steps, self.rate, self.particles, self.seed = steps, rate, particles, seed
        self.portion = Portion(training, recording, lambda stream: stream_seed(seed, stream))
        vectorised = particles > 1
        elbo: Any = Trace_ELBO(num_particles=particles, vectorize_particles=vectorised, max_plate_nesting=1)
        self.elbo = elbo(self._score, self._guess)
        self.weighting = Weighted(1.0, 1.0, 1.0, 1.0)
        self.parameters = dict(guide.named_parameters())
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=rate)
        self.losses, self.bounds = np.full(steps, np.nan), np.full(steps, np.nan)
        self.step, self.damping, self.failures, self.norm = 0, 1.0, 0, 0.0
        self.best: dict[str, np.ndarray] = {}  # the guide where held-out trials were explained best
        self.best_bound, self.misses = -np.inf, 0

    @property
    def history(self) -> dict[str, np.ndarray]:
        """Traces over the steps that were made."""
        found = {"loss": self.losses[: self.step]}
        if self.portion.held_out is not None:
            found["held_out_bound"] = self.bounds[: self.step]
        return found

    def train(self, checkpoint: StateStore | None) -> None:
        """Train to the end, from the checkpoint if it holds anything."""
        held = checkpoint.read() if checkpoint else None
        snapshot = self._state()
        if held is not None:
            self._restore(_part(held, "now/"))
            snapshot = _part(held, "good/")
            self.best = _part(held, "best/")
            self.best_bound, self.misses = float(held["best_bound"]), int(held["misses"])
        with warnings.catch_warnings(), progress(self.steps, "SVI", self.step) as bar:
            warnings.filterwarnings("ignore", "Encountered NaN", UserWarning)  # Pyro's; such a step is taken back
            while self.step < self.steps and not self._stopped:
                if self.step >= int(snapshot["step"][0]) + SNAPSHOT:
                    self.failures = 0
                    snapshot = self._state()
                if not self._advance():
                    self._fall_back(snapshot)
                    continue
                self._look()
                bar.update()
                if self.step % 20 == 0:
                    bar.set_postfix_str(self._shown(), refresh=False)
                if checkpoint and checkpoint.due():
                    # With the state that a failed step returns to: a resumed run has to return to the same one.
                    parts = {"now/": self._state(), "good/": snapshot, "best/": self.best}
                    whole = {place + key: v for place, state in parts.items() for key, v in state.items()}
                    whole |= {"best_bound": np.array(self.best_bound), "misses": np.array(self.misses)}
                    checkpoint.write(whole)
        if self.best:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(torch.from_numpy(self.best[name]))

    @property
    def _stopped(self) -> bool:
        return self.training.stopping is not None and self.misses >= self.training.stopping.patience

    def _shown(self) -> str:
        shown = f"loss {self.losses[self.step - 1]:.1f}"
        return shown if self.best_bound == -np.inf else f"{shown}, held-out bound {self.best_bound:.2f} a trial"

    def _guess(self, pair: Pair) -> Any:
        with self.weighting:
            return self.guide(pair.seen)

    def _score(self, pair: Pair) -> Any:
        with self.weighting:
            return self.program(pair.scored)

    def _loss(self) -> Tensor:
        recording = self.portion.at(self.step)
        pair, observed = Pair(recording, recording), 1.0
        if self.training.dropout:
            seen, scored, observed = dropped(recording, self.training.dropout)
            pair = Pair(seen, scored)
        self.weighting = Weighted(
            self.portion.rest.num_trials / recording.num_trials,
            ramp(self.step, self.training.latent_warm_up),
            ramp(self.step, self.training.weight_warm_up),
            observed,
        )
        return self.elbo(pair)

    def _advance(self) -> bool:
        """One step of Adam; False, and nothing changed but the random state, where loss or gradient is not finite."""
        rate = self.rate * self.training.schedule.factor(self.step, self.steps) * self.damping
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.zero_grad()
        with network_precision(torch.float32 if self.training.single_precision else torch.float64):
            loss = self._loss()
            if not bool(torch.isfinite(loss)):
                return False
            loss.backward()
        if not all(bool(torch.isfinite(p.grad).all()) for p in self.parameters.values() if p.grad is not None):
            return False
        if self.step < self.training.hold and isinstance(self.guide, AmortisedGuide):
            for parameter in self.guide.globals.parameters():
                parameter.grad = None  # Adam passes over it
        if self.training.clip is not None:
            self._clip(self.training.clip)
        self.optimiser.step()
        self.losses[self.step] = float(loss.detach())
        self.step += 1
        return True

    def _clip(self, most: float) -> None:
        norm = float(nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None]))
        limit = most * (self.norm or norm)
        if norm > limit:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(limit / norm)
        self.norm = FORGETTING * (self.norm or norm) + (1.0 - FORGETTING) * min(norm, limit)

    def _look(self) -> None:
        """Where it is time, see how well held-out trials are explained, and keep the best guide."""
        stopping, held_out = self.training.stopping, self.portion.held_out
        if stopping is None or held_out is None or self.step % stopping.every:
            return
        bound = self._held_out_bound(held_out)
        self.bounds[self.step - 1] = bound
        if bound > self.best_bound:
            self.best_bound, self.misses = bound, 0
            self.best = {name: parameter.detach().numpy().copy() for name, parameter in self.parameters.items()}
        elif ramp(self.step, self.training.latent_warm_up) == 1.0:  # before, it need not get better all the time
            self.misses += 1

    def _held_out_bound(self, held_out: Recording) -> float:
        """The trials' part of the bound, a trial; with the same random numbers in every look."""
        total = 0.0
        with torch.no_grad(), random_stream(self.seed, HELD_OUT):
            for _ in range(self.particles):
                guessed = poutine.trace(self.guide).get_trace(held_out)
                scored = poutine.trace(poutine.replay(self.program, guessed)).get_trace(held_out)
                total += _of_trials(scored) - _of_trials(guessed)
        return total / (self.particles * held_out.num_trials)

    def _fall_back(self, snapshot: dict[str, np.ndarray]) -> None:
        """Return to the last good state with half the step; the random numbers go on, so that the next try differs."""
        self.failures += 1
        if self.failures > MAX_FAILURES:
            raise NonFiniteError(
                f"SVI: the loss or its gradient was not finite at step {self.step}, for the {self.failures}th time "
                f"since step {int(snapshot['step'][0])}, at site {self._culprit()!r}; lower "
                f"learning_rate={self.rate}, or look at that site's prior"
            )
        failures, damping, random_state = self.failures, 0.5 * self.damping, torch.get_rng_state()
        self._restore(snapshot)
        self.failures, self.damping = failures, damping
        torch.set_rng_state(random_state)

    def _culprit(self) -> str:
        """The first site of guide or program that is not finite."""
        with torch.no_grad():
            recording = self.portion.at(self.step)
            guided = poutine.trace(self.guide).get_trace(recording)
            traced = poutine.trace(poutine.replay(self.program, guided)).get_trace(recording)
            for trace in (guided, traced):
                trace.compute_log_prob()
                nodes: Any = trace.nodes
                for name, site in nodes.items():
                    if is_random(site) and not (
                        bool(torch.isfinite(site["value"]).all()) and bool(torch.isfinite(site["log_prob"]).all())
                    ):
                        return name
        return "unknown (finite when drawn again)"

    def _state(self) -> dict[str, np.ndarray]:
        state = {
            "step": np.array([self.step, self.failures]),
            "damping": np.array([self.damping, self.norm]),
            "losses": self.losses.copy(),
            "bounds": self.bounds.copy(),
            "random": torch.get_rng_state().numpy().copy(),
        }
        for name, parameter in self.parameters.items():
            state[f"guide/{name}"] = parameter.detach().numpy().copy()
            for key, value in self.optimiser.state.get(parameter, {}).items():
                state[f"adam/{key}/{name}"] = value.numpy().copy()
        return state

    def _restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.step, self.failures = (int(v) for v in state["step"])
        self.damping, self.norm = (float(v) for v in state["damping"])
        self.losses[:], self.bounds[:] = state["losses"], state["bounds"]
        torch.set_rng_state(torch.from_numpy(np.array(state["random"])))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(state[f"guide/{name}"]))
                keys = [key for key in state if key.startswith("adam/") and key.split("/", 2)[2] == name]
                self.optimiser.state[parameter] = {
                    key.split("/")[1]: torch.from_numpy(np.array(state[key])) for key in keys
                }


def _part(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _of_trials(trace: Any) -> float:
    """The log density of the sites of trials."""
    trace.compute_log_prob()
    return sum(
        float(site["log_prob_sum"])
        for site in trace.nodes.values()
        if is_random(site) and any(frame.name == "trial" for frame in site["cond_indep_stack"])
    )


def _refuse_local(program: Program, recording: Recording) -> None:
    local = [site.name for site in LogDensity(program, recording).sites if site.local]
    if local:
        raise ModelError(
            "batches, dropout and early stopping need a guide without parameters of single trials, but this one has "
            f"some for {', '.join(local)}; use guides.Amortised(), or integrate the path out"
        )
