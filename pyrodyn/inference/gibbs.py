"""Blocked Gibbs sampling for models that declare their conditionals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pyrodyn.checkpoint import StateStore
from pyrodyn.errors import ModelError, NonFiniteError
from pyrodyn.inference._starts import starts
from pyrodyn.inference.collapse import Collapsed, collapse
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.engine import Draws, numerics, random_stream
from pyrodyn.program import Labelled, Program
from pyrodyn.progress import progress
from pyrodyn.recording import Recording

PATHS = 100  # drawn paths that are kept
SCOUTED, FEWEST = 16, 30  # sweeps before one of several starts is chosen, and of warm-ups that are worth a choice
HOPELESS = 50.0  # nats behind the best after half of them
MARGIN = 10.0  # nats by which a start has to be better than that of the simpler model
ALIKE = 40.0  # nats: two standard errors of the difference of two scouts' means, of two chains each
STATE = "state/"


class Sweep(Protocol):
    """What a model declares: how to start, one sweep over all unknowns, and its program's sites, global and local."""

    def start(self, values: dict[str, Tensor], chains: int) -> dict[str, Tensor]: ...

    def sweep(self, state: dict[str, Tensor], share: float) -> dict[str, Tensor]: ...

    def sites(self, state: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def local(self, state: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def entropy(self, state: dict[str, Tensor]) -> Tensor:
        """Of unknowns that some states lack, or know less of, (chain); asked of models that are `Nesting`."""
        ...

    def join(self, state: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
        """Half of the chains of two starts, each half as a group of its own; asked of models that are `Nesting`."""
        ...

    def divide(self, groups: int) -> None:
        """From now on chains come in so many groups."""
        ...


@runtime_checkable
class Detailed(Protocol):
    """A sweep that knows more of a state than its sites tell."""

    def details(self, state: dict[str, Tensor]) -> Labelled:
        """By name: the names of the axes behind the chain, and values (chain, ...)."""
        ...


@runtime_checkable
class Conditional(Protocol):
    """A model with conditionals to draw from."""

    def conditionals(self, recording: Recording, observations: Tensor | None = None) -> Sweep: ...


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
        Sweeps before the first; the reference of the path's move and step sizes adapt in them. Where a model offers
        several starts, as coupled regions do, and there are 30 or more, chains go through the first of them from each
        start and on from the best, or half of them from each of two that are as good. These halves count alike in the
        posterior, whose notes say under ``starts`` how many there were.
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
        with random_stream(seed), numerics(), torch.no_grad():
            sweep = model.conditionals(recording)
            held = checkpoint.read() if checkpoint else None
            run = (Run(self, sweep, {}) if held else self._begun(model, recording, sweep)).go(checkpoint)
        samples = {name: torch.stack(parts, 1) for name, parts in run.kept.items()}
        local = {name: torch.stack(parts, 1) for name, parts in run.local.items()}
        kept = None
        if local:
            kept = np.arange(run.every - 1, self.draws, run.every)
        notes: dict[str, Any] = {
            "globals": "draws of Gibbs sampling",
            "atoms": "sampled",
            "sweeps_per_chain": self.warmup + self.thin * self.draws,
            "starts": run.groups,
        }
        return Draws(samples, "sampled", details=run.labelled(), local=local, kept=kept, notes=notes | run.rates())

    def _begun(self, model: Any, recording: Any, sweep: Sweep) -> Run:
        """Chains from the best of a model's starts; of sessions, each session's own."""
        if isinstance(recording, Recording):
            return self._scouted(model, recording, sweep)[0]
        values = {}
        for name, own in recording.items():
            alone = model.of(own)
            values[name] = self._scouted(alone, own, alone.conditionals(own))[1]
        return Run(self, sweep, sweep.start(values, self.chains))

    def _scouted(self, model: Any, recording: Recording, sweep: Sweep) -> tuple[Run, dict[str, Tensor]]:
        """Chains from the best of a model's starts, half of them from the next where that is as good; and the best."""
        found = starts(model, recording, self.warmup >= FEWEST)
        runs = [Run(self, sweep, sweep.start(values, self.chains)) for values in found]
        if len(runs) == 1:
            return runs[0], found[0]
        density = LogDensity(collapse(model), recording)
        total = min(SCOUTED, 2 * self.warmup // 5)
        masses = {i: run.scout(density, total // 2) for i, run in enumerate(runs)}
        left = [i for i, mass in masses.items() if mass > max(masses.values()) - HOPELESS]
        if len(left) > 1:
            masses = {i: runs[i].scout(density, total) for i in left}
        ranked = sorted(left, key=lambda i: MARGIN * (i > 0) - masses[i])
        best = ranked[0]
        alike = ALIKE * math.sqrt(2.0 / self.chains)
        if len(ranked) > 1 and self.chains % 2 == 0 and masses[best] - masses[ranked[1]] < alike:
            return runs[best].joined(runs[ranked[1]]), found[best]
        return runs[best], found[best]

    def replicate(self, density: LogDensity, start: Tensor) -> Tensor:
        """Draws (replicate, chain x draw, dimension) from many posteriors at once, started at ``start``.

        The observations of ``density`` are (replicate, 1, trial, time, unit). Paths are drawn where it has them.
        """
        model = declared(density.plain)
        observations = density.observations
        assert observations is not None
        with torch.no_grad(), numerics():
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
        self.count, self.groups = 0, 1
        self.kept: dict[str, list[Tensor]] = {}
        self.local: dict[str, list[Tensor]] = {}
        self.details: dict[str, list[Tensor]] = {}
        self.sums: dict[str, Tensor] = {}

    def scout(self, density: LogDensity, total: int) -> float:
        """Warm up to sweep ``total``, and the mean over the second half of that of the log posterior mass about them.

        That is the log density with paths integrated out, and the entropy of unknowns that other states lack, or
        know less of: without it states with more unknowns, or better-known ones, would always seem better.
        """
        half, found = (self.count + total) // 2, []
        with progress(total, "Gibbs: scouts", self.count) as bar:
            while self.count < total:
                self._step()
                if self.count > half and (total - self.count) % 2 == 0:
                    sites = {name: value.unsqueeze(1) for name, value in self.sweep.sites(self.state).items()}
                    found.append(density(density.unconstrain(sites)) + self.sweep.entropy(self.state))
                bar.update()
        return float(torch.stack(found).mean())

    def joined(self, other: Run) -> Run:
        """Half of these chains and half of others that are as far on."""
        run = Run(self.options, self.sweep, self.sweep.join(self.state, other.state))
        run.count, run.groups = self.count, 2
        return run

    def go(self, store: StateStore | None) -> Run:
        """Run to the end, from where a checkpoint left off."""
        warmup, thin = self.options.warmup, self.options.thin
        total = warmup + thin * self.options.draws
        held = store.read() if store else None
        if held is not None:
            self._restore(held)
        with progress(total, "Gibbs", self.count) as bar:
            while self.count < total:
                self._step()
                if self.count > warmup and (self.count - warmup) % thin == 0:
                    self._keep()
                bar.update()
                if store and (store.due() or self.count == total):
                    store.write(self._state())
        return self

    def _step(self) -> None:
        warmup = self.options.warmup
        self.state = self.sweep.sweep(self.state, self.count / warmup if self.count < warmup else 1.0)
        self.count += 1
        self._check()

    def labelled(self) -> Labelled:
        """Details of all draws, (chain, draw, ...)."""
        if not isinstance(self.sweep, Detailed):
            return {}
        axes = {name: axes for name, (axes, _) in self.sweep.details(self.state).items()}
        return {name: (axes[name], torch.stack(parts, 1)) for name, parts in self.details.items()}

    def rates(self) -> dict[str, float]:
        """Mean acceptance of the moves that may be refused, over all draws."""
        return {name: round(float(value.mean() / max(1, self.options.draws)), 3) for name, value in self.sums.items()}

    def _keep(self) -> None:
        for name, value in self.sweep.sites(self.state).items():
            self.kept.setdefault(name, []).append(value)
        if isinstance(self.sweep, Detailed):
            for name, (_, value) in self.sweep.details(self.state).items():
                self.details.setdefault(name, []).append(value)
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
        held |= {f"details/{name}": torch.stack(parts).numpy() for name, parts in self.details.items()}
        return held | {"count": np.array([self.count, self.groups]), "random": torch.get_rng_state().numpy().copy()}

    def _restore(self, held: Any) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {
                n.removeprefix(prefix): torch.from_numpy(np.array(v)) for n, v in held.items() if n.startswith(prefix)
            }

        self.state, self.sums = part(STATE), part("sums/")
        self.kept = {name: list(values) for name, values in part("kept/").items()}
        self.local = {name: list(values) for name, values in part("local/").items()}
        self.details = {name: list(values) for name, values in part("details/").items()}
        self.count, self.groups = (int(v) for v in held["count"])
        if self.groups > 1:
            self.sweep.divide(self.groups)
        torch.set_rng_state(torch.from_numpy(np.array(held["random"])))
