"""Pyro's No-U-Turn sampler as the reference, its chains run in order by our own runner."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.infer.mcmc import NUTS as PyroNUTS
from torch import Tensor

from pyrodyn.checkpoint import StateStore
from pyrodyn.errors import NonFiniteError
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
from pyrodyn.program import Program
from pyrodyn.progress import progress
from pyrodyn.recording import Recording

SITE = "globals"  # all unconstrained coordinates are one vector to the kernel
SPREAD = 0.1  # standard deviation of the chains' starts about the initial values, in unconstrained coordinates
CLIMB = 200  # steps of L-BFGS towards the mode, about which the chains start
DENSE_LIMIT = 100  # coordinates up to which the mass matrix is dense


@dataclass(frozen=True)
class NUTS:
    """The No-U-Turn sampler: exact but for Monte Carlo error, one density at a time, hence slow.

    Parameters
    ----------
    draws, warmup : int
        In each chain.
    chains : int
        Run one after the other. Each has a fresh kernel and a random stream that depends on (seed, chain) alone.
    target_acceptance : float
    max_tree_depth : int
    dense_mass : bool, optional
        None: dense up to 100 coordinates.
    collapse : bool, optional
        None integrates the path out where it can be; False samples it, in whitened coordinates.

    References
    ----------
    Hoffman & Gelman, JMLR 15:1593 (2014), in the implementation of Pyro.
    """

    draws: int = 500
    warmup: int = 500
    chains: int = 2
    target_acceptance: float = 0.8
    max_tree_depth: int = 8
    dense_mass: bool | None = None
    collapse: bool | None = None

    def run(self, program: Program, recording: Recording, *, seed: int, checkpoint: StateStore | None = None) -> Draws:
        with numerics():
            with random_stream(seed):
                values = starting_values(program, recording, CLIMB, "NUTS: start")
                treated, treatment = treat_path(program, recording, self.collapse, values)
                density = LogDensity(treated, recording)
                start = vector_of(values, density)
            chains = []
            with progress(self.chains * (self.warmup + self.draws), "NUTS") as bar:
                for chain in range(self.chains):
                    store = checkpoint.scope(f"chain{chain}") if checkpoint else None
                    with random_stream(seed, chain):
                        chains.append(_Chain(self, density, start).run(store, bar))
        vectors = torch.from_numpy(np.stack([c["vectors"] for c in chains]))
        values = density.constrain(vectors)
        samples = {site.name: values[site.name].reshape(self.chains, self.draws, *site.shape) for site in density.sites}
        diverging = np.stack([c["diverging"] for c in chains])
        acceptance = [float(c["acceptance"]) for c in chains]
        warnings = []
        if diverging.any():
            warnings.append(f"NUTS: {int(diverging.sum())} of {diverging.size} draws diverged")
        with numerics():
            samples, local = split_local(treated, recording, samples)
        return Draws(
            samples,
            treatment,
            local=local,
            stats={"diverging": torch.from_numpy(diverging)},
            notes={
                "globals": "draws of the no-U-turn sampler",
                "step_size": [float(c["step_size"]) for c in chains],
                "acceptance_rate": acceptance,
            },
            warnings=tuple(warnings),
        )


class _Chain:
    """One chain: its kernel, its draws, and its whole state as arrays."""

    def __init__(self, options: NUTS, density: LogDensity, start: Tensor) -> None:
        self.options = options
        self.density = density
        dense = options.dense_mass if options.dense_mass is not None else density.dimension <= DENSE_LIMIT
        self.kernel = PyroNUTS(
            potential_fn=self._potential,
            full_mass=bool(dense),
            target_accept_prob=options.target_acceptance,
            max_tree_depth=options.max_tree_depth,
        )
        self.start = start
        self.done = 0  # of warm-up and draws together
        self.vectors = np.zeros((options.draws, density.dimension))
        self.diverging = np.zeros(options.draws, dtype=bool)

    def _potential(self, values: Mapping[str, Tensor]) -> Tensor:
        return -self.density(values[SITE])

    def run(self, store: StateStore | None, bar: Any) -> dict[str, np.ndarray]:
        held = store.read() if store else None
        if held is None:
            place = self._place()
        else:
            place = {SITE: torch.from_numpy(held["position"])}
        self.kernel.initial_params = place
        self.kernel.setup(self.options.warmup)
        if held is not None:
            self._restore(held)
        bar.update(self.done)
        total = self.options.warmup + self.options.draws
        while self.done < total:
            place = self.kernel.sample(place)
            drawn = self.done - self.options.warmup
            if drawn >= 0:
                self.vectors[drawn] = place[SITE].detach().numpy()
                self.diverging[drawn] = bool(self.kernel._divergences) and self.kernel._divergences[-1] == drawn
            self.done += 1
            bar.update()
            if store and (store.due() or self.done == total):
                store.write(self._state(place))
        return {
            "vectors": self.vectors,
            "diverging": self.diverging,
            "step_size": np.array(self.kernel.step_size),
            "acceptance": np.array(self.kernel._mean_accept_prob),
        }

    def _place(self) -> dict[str, Tensor]:
        """A start near the initial values at which the density is finite."""
        for _ in range(20):
            vector = self.start + SPREAD * torch.randn_like(self.start)
            if bool(torch.isfinite(self.density.gradient(vector)[0])):
                return {SITE: vector}
        raise NonFiniteError(
            "NUTS: the log density is not finite anywhere near the initial values (step 0); check the recording with "
            "model.check(recording) and the scale of the priors"
        )

    def _state(self, place: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        kernel, adapter = self.kernel, self.kernel._adapter
        averaging, mass = adapter._step_size_adapt_scheme, adapter.mass_matrix_adapter
        (block,) = mass.inverse_mass_matrix
        welford = mass._adapt_scheme[block]
        cached: Any = kernel._fetch_from_cache()
        _, energy, slopes = cached
        return {
            "position": place[SITE].detach().numpy(),
            "energy": energy.detach().numpy(),
            "slope": slopes[SITE].numpy(),
            "counts": np.array([self.done, kernel._t, kernel._accept_cnt, adapter._current_window, averaging._t,
                                welford.n_samples]),
            "numbers": np.array([kernel._mean_accept_prob, adapter.step_size, averaging.prox_center, averaging._x_avg,
                                 averaging._g_avg, getattr(averaging, "_x_t", math.nan)]),
            "inverse_mass": mass.inverse_mass_matrix[block].numpy(),
            "welford_mean": np.asarray(welford._mean),
            "welford_m2": np.asarray(welford._m2),
            "vectors": self.vectors,
            "diverging": self.diverging,
            "random": torch.get_rng_state().numpy(),
        }  # fmt: skip

    def _restore(self, state: Mapping[str, np.ndarray]) -> None:
        kernel, adapter = self.kernel, self.kernel._adapter
        averaging: Any = adapter._step_size_adapt_scheme
        mass = adapter.mass_matrix_adapter
        (block,) = mass.inverse_mass_matrix
        mass.inverse_mass_matrix = {block: torch.from_numpy(state["inverse_mass"])}
        welford = mass._adapt_scheme[block]
        self.done, kernel._t, kernel._accept_cnt, adapter._current_window, averaging._t, welford.n_samples = (
            int(v) for v in state["counts"]
        )
        (kernel._mean_accept_prob, adapter.step_size, averaging.prox_center, averaging._x_avg, averaging._g_avg,
         averaging._x_t) = (float(v) for v in state["numbers"])  # fmt: skip
        welford._mean, welford._m2 = (
            torch.from_numpy(np.array(state[key])) if state[key].ndim else float(state[key])
            for key in ("welford_mean", "welford_m2")
        )
        position = torch.from_numpy(state["position"])
        kernel._cache(
            {SITE: position}, torch.from_numpy(np.array(state["energy"])), {SITE: torch.from_numpy(state["slope"])}
        )
        self.vectors[:], self.diverging[:] = state["vectors"], state["diverging"]
        kernel._divergences = [int(i) for i in np.flatnonzero(self.diverging)]
        torch.set_rng_state(torch.from_numpy(np.array(state["random"])))
