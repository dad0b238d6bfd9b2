"""Hamiltonian Monte Carlo on many chains at once: the default sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrodyn.checkpoint import StateStore
from pyrodyn.errors import ModelError, NonFiniteError
from pyrodyn.inference.collapse import collapse, collapses
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.engine import (
    Draws,
    numerics,
    random_stream,
    split_local,
    starting_values,
    treat_path,
    vector_of,
)
from pyrodyn.inference.ensemble import Ensemble, drawn
from pyrodyn.inference.mode import ascend, covariance_root, negative_hessian
from pyrodyn.program import Program
from pyrodyn.progress import progress
from pyrodyn.recording import Recording

CLIMB = 200  # steps of L-BFGS towards the mode, about which the superchains start
CURVATURE_LIMIT = 300  # coordinates up to which the first mass matrix is the curvature at that mode
WIDE, NARROW = 2.0, 0.1  # spread of the starts: in posterior sds where these are known, in coordinates otherwise


@dataclass(frozen=True)
class HMC:
    """Hamiltonian Monte Carlo, all chains in one batched call, adapted across chains: exact but for Monte Carlo error.

    Parameters
    ----------
    draws : int
        In each chain, after the warm-up. Many short chains: 64 x 50 draws by default.
    warmup : int
        Transitions in which step size, trajectory length (by the ChEES criterion, which needs two chains or more) and
        mass matrix adapt.
    chains : int
    superchains : int
        Groups of chains. All chains of a group start at one point, the groups start far from each other: so that nested
        R-hat can tell whether short chains have forgotten where they started.
    target_acceptance : float
        Mean over chains.
    dense_mass : bool, optional
        None: dense up to 300 coordinates; replicates of a calibration always have a dense one.
    collapse : bool, optional
        None integrates the path out where it can be; False samples it, in whitened coordinates.

    Notes
    -----
    Adaptation ties the chains together: results are the same for the same seed and number of chains; with another
    number of chains they agree within Monte Carlo error.

    References
    ----------
    Hoffman, Radul & Sountsov, AISTATS 2021 (ChEES-HMC); Margossian et al., Bayesian Anal. 2024 (nested R-hat).
    """

    draws: int = 50
    warmup: int = 150
    chains: int = 64
    superchains: int = 4
    target_acceptance: float = 0.8
    dense_mass: bool | None = None
    collapse: bool | None = None

    def __post_init__(self) -> None:
        if self.draws < 1 or self.warmup < 0:
            raise ModelError(f"draws must be 1 or more and warmup 0 or more, got {self.draws} and {self.warmup}")
        if self.superchains < 1 or self.chains < 1 or self.chains % self.superchains:
            raise ModelError(
                f"chains must be a multiple of superchains, got chains={self.chains} and superchains="
                f"{self.superchains}; try chains={max(1, self.chains // max(1, self.superchains)) * self.superchains}"
            )

    def run(self, program: Program, recording: Recording, *, seed: int, checkpoint: StateStore | None = None) -> Draws:
        with random_stream(seed), numerics():
            values = starting_values(program, recording, CLIMB, "HMC: start")
            treated, treatment = treat_path(program, recording, self.collapse, values)
            density = LogDensity(treated, recording)
            start = vector_of(values, density)
            root, spread = self._first_root(program, density, start, values)
            position = self._scatter(density, start.unsqueeze(0), root.unsqueeze(0), spread)
            run = Run(self, density, position, root.unsqueeze(0)).go(checkpoint)
            vectors = run.vectors.squeeze(1).movedim(0, 1)  # (chain, draw, dimension)
            values = density.constrain(vectors.flatten(0, 1))
            lead = vectors.shape[:2]
            samples = {site.name: values[site.name].reshape(*lead, *site.shape) for site in density.sites}
            samples, local = split_local(treated, recording, samples)
        diverging = run.diverging.squeeze(1).mT
        warnings = []
        if bool(diverging.any()):
            warnings.append(f"HMC: {int(diverging.sum())} of {diverging.numel()} draws diverged")
        return Draws(
            samples,
            treatment,
            local=local,
            stats={"diverging": diverging, "acceptance_rate": run.acceptance.squeeze(1).mT},
            notes={
                "globals": "draws of Hamiltonian Monte Carlo",
                "superchains": self.superchains,
                "step_size": float(run.ensemble.step_size),
                "longest_trajectory": float(run.ensemble.length),
                "gradients_per_chain": run.gradients,
            },
            warnings=tuple(warnings),
        )

    def replicate(self, density: LogDensity, start: Tensor) -> Tensor:
        """Draws (replicate, chain x draw, dimension) from many posteriors, from starts (replicate, dimension).

        The observations of ``density`` are (replicate, 1, trial, time, unit). Replicates share calls of the density and
        nothing else: each has its own mode, step size, trajectory length and mass matrix.
        """
        mode = ascend(density, start.unsqueeze(1), CLIMB, "HMC: start")[0]
        root, _ = covariance_root(negative_hessian(density, mode, "HMC: curvature"), 1.0)
        position = self._scatter(density, mode.squeeze(1), root, WIDE)
        return Run(self, density, position, root).go(None).vectors.movedim(0, 2).flatten(1, 2)

    def refit(self, density: LogDensity, start: Tensor) -> tuple[Tensor, None]:
        """`replicate`; no density of the draws is known."""
        return self.replicate(density, start), None

    def _first_root(
        self, program: Program, density: LogDensity, start: Tensor, values: dict[str, Tensor]
    ) -> tuple[Tensor, float]:
        """A first root of the posterior covariance, dense or its diagonal, and how wide to start on its scale."""
        dense = density.dimension <= CURVATURE_LIMIT if self.dense_mass is None else self.dense_mass
        sds = torch.ones_like(start)
        if collapses(program, density.recording):
            of_globals = LogDensity(collapse(program), density.recording)
            if of_globals.dimension <= CURVATURE_LIMIT:
                place = of_globals.unconstrain(values)
                root, _ = covariance_root(negative_hessian(of_globals, place, "HMC: curvature"), 1.0)
                if dense and density.dimension == of_globals.dimension:
                    return root, WIDE
                for site in of_globals.sites:
                    own = next(s for s in density.sites if s.name == site.name)
                    sds[own.place] = root[site.place].norm(dim=-1)
                return (sds.diag() if dense else sds), WIDE
        return (sds.diag() if dense else sds), NARROW

    def _scatter(self, density: LogDensity, start: Tensor, root: Tensor, spread: float) -> Tensor:
        """One start for every superchain, given to each of its chains: (group, chain, dimension)."""
        groups, dimension = start.shape
        noise = spread * drawn(torch.randn, start.new_empty(groups, self.superchains, dimension))
        noise = noise @ root.mT if root.dim() == 3 else noise * root.unsqueeze(1)
        position, fine = start.unsqueeze(1) + noise, torch.tensor(False, device=start.device)
        for _ in range(20):
            fine = torch.isfinite(density.gradient(position)[0])
            if bool(fine.all()):
                return position.repeat_interleave(self.chains // self.superchains, 1)
            noise = torch.where(fine.unsqueeze(-1), noise, 0.5 * noise)
            position = start.unsqueeze(1) + noise
        raise NonFiniteError(
            "HMC: the log density is not finite anywhere near the initial values (step 0), at site "
            f"{density.culprit(position[~fine][0])!r}; check the recording with model.check(recording) and the scale "
            "of that site's prior"
        )


class Run:
    """Warm-up and draws of one or more groups of chains, with what a checkpoint needs."""

    _KEPT = ("vectors", "acceptance", "diverging")

    def __init__(self, options: HMC, density: LogDensity, position: Tensor, root: Tensor) -> None:
        self.options = options

        def gradient(place: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
            return density.among(groups).gradient(place)

        self.ensemble = Ensemble(
            gradient, position, root, warmup=options.warmup, target_acceptance=options.target_acceptance
        )
        groups, chains, dimension = position.shape
        self.gradients = 0
        self.vectors = position.new_zeros(options.draws, groups, chains, dimension)
        self.acceptance = position.new_zeros(options.draws, groups, chains)
        self.diverging = position.new_zeros(options.draws, groups, chains, dtype=torch.bool)

    def go(self, store: StateStore | None) -> Run:
        """Run to the end, from where a checkpoint left off."""
        ensemble, warmup = self.ensemble, self.options.warmup
        held = store.read() if store else None
        if held is not None:
            self._restore(held)
        total = warmup + self.options.draws
        with progress(total, "HMC", ensemble.count) as bar:
            while ensemble.count < total:
                acceptance, diverging, gradients = ensemble.advance()
                self.gradients += gradients
                place = ensemble.count - warmup - 1
                if place >= 0:
                    self.vectors[place], self.acceptance[place] = ensemble.position, acceptance
                    self.diverging[place] = diverging
                bar.update()
                if store and (store.due() or ensemble.count == total):
                    store.write(self._state())
        return self

    def _state(self) -> dict[str, np.ndarray]:
        done = max(0, self.ensemble.count - self.options.warmup)
        held: dict[str, Any] = {name: getattr(self, name)[:done].cpu().numpy() for name in self._KEPT}
        held |= {"gradients": np.array(self.gradients), "random": torch.get_rng_state().numpy().copy()}
        return held | {f"ensemble/{name}": value for name, value in self.ensemble.state().items()}

    def _restore(self, held: Any) -> None:
        for name in self._KEPT:
            part = torch.from_numpy(np.array(held[name]))
            getattr(self, name)[: len(part)] = part
        self.gradients = int(held["gradients"])
        self.ensemble.restore(
            {name.removeprefix("ensemble/"): value for name, value in held.items() if name.startswith("ensemble/")}
        )
        torch.set_rng_state(torch.from_numpy(np.array(held["random"])))
