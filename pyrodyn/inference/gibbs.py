"""Blocked Gibbs sampling for models that declare their conditionals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pyrodyn.checkpoint import StateStore
from pyrodyn.conditionals.paths import levelled
from pyrodyn.errors import ModelError, NonFiniteError
from pyrodyn.inference.collapse import Collapsed, collapse, collapses
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.engine import NEAR, Draws, double_precision, random_stream
from pyrodyn.inference.mode import Rescaled, ascend
from pyrodyn.program import IntegratedModel, Program, globals_given
from pyrodyn.progress import progress
from pyrodyn.recording import Recording

ROUNDS, CLIMB = 5, 200  # renewals of the pseudo-observations, and steps of L-BFGS in all, on the way to the start
PATHS = 100  # drawn paths that are kept
STATE = "state/"


class Sweep(Protocol):
    """What a model declares: how to start, one sweep over all unknowns, and its program's sites, global and local."""

    def start(self, values: dict[str, Tensor], chains: int) -> dict[str, Tensor]: ...

    def sweep(self, state: dict[str, Tensor], share: float) -> dict[str, Tensor]: ...

    def sites(self, state: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def local(self, state: dict[str, Tensor]) -> dict[str, Tensor]: ...


@runtime_checkable
class Conditional(Protocol):
    """A model with conditionals to draw from."""

    def conditionals(self, recording: Recording, observations: Tensor | None = None) -> Sweep: ...


@runtime_checkable
class Nesting(Protocol):
    """A model around a simpler one, from whose mode chains start."""

    def simpler(self, recording: Recording) -> tuple[Any, Callable[[dict[str, Tensor]], dict[str, Tensor]]] | None:
        """The simpler model, and what makes of its values those of this model; None where there is none."""
        ...


@dataclass(frozen=True)
class Gibbs:
    """Blocked Gibbs sampling: every block of unknowns in turn from its conditional; exact but for Monte Carlo error.

    It draws what has no gradient, such as the edges of a region graph, and samples the path, so that no Laplace
    approximation stands in the way of counts.

    Parameters
    ----------
    draws : int
        Kept of each chain.
    warmup : int
        Sweeps before the first; the reference of the path's move and step sizes adapt in them.
    thin : int
        Sweeps from one draw to the next.
    chains : int
        Started apart, moved as one batch.

    Raises
    ------
    ModelError
        For a model that declares no conditionals.

    References
    ----------
    Geman & Geman, IEEE PAMI 6:721 (1984); Carter & Kohn, Biometrika 81:541 (1994), on drawing a path at once.
    """

    draws: int = 250
    warmup: int = 250
    thin: int = 1
    chains: int = 4

    def __post_init__(self) -> None:
        if self.draws < 1 or self.warmup < 0 or self.thin < 1 or self.chains < 1:
            raise ModelError(
                "draws, thin and chains must be 1 or more and warmup 0 or more, got "
                f"{self.draws}, {self.thin}, {self.chains} and {self.warmup}"
            )

    def run(self, program: Program, recording: Recording, *, seed: int, checkpoint: StateStore | None = None) -> Draws:
        model = declared(program)
        with random_stream(seed), double_precision(), torch.no_grad():
            sweep = model.conditionals(recording)
            held = checkpoint.read() if checkpoint else None
            start = {} if held else sweep.start(_start(model, recording), self.chains)
            run = Run(self, sweep, start).go(checkpoint)
        samples = {name: torch.stack(parts, 1) for name, parts in run.kept.items()}
        local = {name: torch.stack(parts, 1) for name, parts in run.local.items()}
        kept = None
        if local:
            kept = np.arange(run.every - 1, self.draws, run.every)
        notes: dict[str, Any] = {
            "globals": "draws of Gibbs sampling",
            "atoms": "sampled",
            "sweeps_per_chain": self.warmup + self.thin * self.draws,
        }
        return Draws(samples, "sampled", local=local, kept=kept, notes=notes | run.rates())

    def replicate(self, density: LogDensity, start: Tensor) -> Tensor:
        """Draws (replicate, chain x draw, dimension) from many posteriors at once, started at ``start``.

        The observations of ``density`` are (replicate, 1, trial, time, unit). Paths are drawn where it has them.
        """
        model = declared(density.plain)
        observations = density.observations
        assert observations is not None
        with torch.no_grad(), double_precision():
            sweep = model.conditionals(density.recording, observations.squeeze(1))
            given, local = density.constrain(start), [site.name for site in density.sites if site.local]
            values = {name: value.squeeze(1) for name, value in given.items() if name not in local}
            paths = self.draws * self.chains if local else 0
            run = Run(self, sweep, sweep.start(values, self.chains), paths).go(None)

            def flat(parts: list[Tensor]) -> Tensor:
                """(replicate, chain x draw, *event) of draws that are (replicate x chain, *event)."""
                return torch.stack(parts, 1).unflatten(0, (len(start), self.chains)).flatten(1, 2)

            drawn = {name: flat(parts).unsqueeze(2) for name, parts in run.kept.items()}
            return density.unconstrain(drawn | {name: flat(run.local[name]) for name in local})


def _start(model: Any, recording: Any) -> Any:
    """Values to start from; of every session, where ``recording`` is a mapping of session to Recording."""
    if isinstance(recording, Recording):
        return climb(model, recording)
    return {name: climb(model.of(own), own) for name, own in recording.items()}


def climb(model: Any, recording: Recording) -> dict[str, Tensor]:
    """Values of the globals near the posterior mode, counts taken as Gaussian about a path that follows.

    Of a model that nests a simpler one the mode is that one's. A model whose path cannot be integrated out brings a
    start that is good enough as it is.
    """
    around: Any = model
    simpler = around.simpler(recording) if isinstance(around, Nesting) else None
    if simpler is not None:
        inner, widened = simpler
        return widened(climb(inner, recording))
    values = model.initial_values(recording)
    if not collapses(model, recording):
        return values
    if isinstance(model, IntegratedModel) or model.readout.is_gaussian:
        density = LogDensity(collapse(model), recording)
        return density.constrain(ascend(density, density.unconstrain(values), CLIMB, "Gibbs: start", NEAR)[0])
    centre = None
    for turn in range(ROUNDS):
        parameters = globals_given(model, values, recording)
        program, centre = levelled(model, parameters, recording, centre, 2 if turn else 4)
        density = LogDensity(program, recording)
        vector = density.unconstrain(values)
        # The curvature is read where the first steps lead: that of the first guess may point to another mode.
        if turn:
            vector = Rescaled(density, vector).ascend(vector, CLIMB // ROUNDS, "Gibbs: start", NEAR)
        else:
            vector = ascend(density, vector, CLIMB // ROUNDS, "Gibbs: start", NEAR)[0]
        values = density.constrain(vector)
    return values


def declared(program: Program) -> Any:
    """The model of a program, which must declare its conditionals."""
    model = program.model if isinstance(program, Collapsed) else program
    if not isinstance(model, Conditional):
        raise ModelError(
            f"Gibbs needs a model that declares its conditionals, and {type(model).__name__} declares none; use "
            "inference.HMC(), or a model such as models.MultiRegionLDS or models.SwitchingLDS"
        )
    return model


class Run:
    """Sweeps of all chains, with what a checkpoint needs."""

    def __init__(self, options: Gibbs, sweep: Sweep, state: dict[str, Tensor], paths: int = PATHS) -> None:
        self.options, self.sweep, self.state = options, sweep, state
        self.every = min(options.draws, max(1, options.draws * options.chains // paths)) if paths else 0
        self.count = 0
        self.kept: dict[str, list[Tensor]] = {}
        self.local: dict[str, list[Tensor]] = {}
        self.sums: dict[str, Tensor] = {}

    def go(self, store: StateStore | None) -> Run:
        """Run to the end, from where a checkpoint left off."""
        warmup, thin = self.options.warmup, self.options.thin
        total = warmup + thin * self.options.draws
        held = store.read() if store else None
        if held is not None:
            self._restore(held)
        with progress(total, "Gibbs", self.count) as bar:
            while self.count < total:
                self.state = self.sweep.sweep(self.state, self.count / warmup if self.count < warmup else 1.0)
                self.count += 1
                self._check()
                if self.count > warmup and (self.count - warmup) % thin == 0:
                    self._keep()
                bar.update()
                if store and (store.due() or self.count == total):
                    store.write(self._state())
        return self

    def rates(self) -> dict[str, float]:
        """Mean acceptance of the moves that may be refused, over all draws."""
        return {name: round(float(value.mean() / max(1, self.options.draws)), 3) for name, value in self.sums.items()}

    def _keep(self) -> None:
        for name, value in self.sweep.sites(self.state).items():
            self.kept.setdefault(name, []).append(value)
        number = len(next(iter(self.kept.values())))
        if self.every and number % self.every == 0:
            for name, value in self.sweep.local(self.state).items():
                self.local.setdefault(name, []).append(value)
        for name, value in self.state.items():
            if name.endswith("_acceptance"):
                self.sums[name] = self.sums.get(name, 0.0) + value.mean()

    def _check(self) -> None:
        for name, value in self.state.items():
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(
                    f"Gibbs: {name} is not finite after sweep {self.count}; check the recording with "
                    "model.check(recording), and for units with extreme counts"
                )

    def _state(self) -> dict[str, np.ndarray]:
        held = {STATE + name: value.numpy().copy() for name, value in self.state.items()}
        held |= {f"kept/{name}": torch.stack(parts).numpy() for name, parts in self.kept.items()}
        held |= {f"sums/{name}": value.numpy() for name, value in self.sums.items()}
        held |= {f"local/{name}": torch.stack(parts).numpy() for name, parts in self.local.items()}
        return held | {"count": np.array(self.count), "random": torch.get_rng_state().numpy().copy()}

    def _restore(self, held: Any) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {
                n.removeprefix(prefix): torch.from_numpy(np.array(v)) for n, v in held.items() if n.startswith(prefix)
            }

        self.state, self.sums = part(STATE), part("sums/")
        self.kept = {name: list(values) for name, values in part("kept/").items()}
        self.local = {name: list(values) for name, values in part("local/").items()}
        self.count = int(held["count"])
        torch.set_rng_state(torch.from_numpy(np.array(held["random"])))
