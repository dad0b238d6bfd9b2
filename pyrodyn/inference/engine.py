"""What every engine shares: the draws it returns, how it treats a path, and where its randomness comes from."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import pyro
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from pyrodyn.checkpoint import StateStore
from pyrodyn.errors import ModelError
from pyrodyn.inference.collapse import Collapsed, collapse, collapses
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.flow_start import NoiselessFlow, flow_start
from pyrodyn.inference.mode import ascend
from pyrodyn.inference.whitening import Whitened, whiten
from pyrodyn.program import IntegratedModel, Labelled, LatentModel, Program, globals_given
from pyrodyn.recording import Recording

_STARTS: WeakKeyDictionary[Recording, list[tuple[LatentModel, int, dict[str, Tensor]]]] = WeakKeyDictionary()
MOST_STARTS = 4  # of one recording that are remembered
NEAR = 1e-7  # relative gain of a step below which a start is near enough to the mode


@dataclass(frozen=True)
class Draws:
    """What an engine hands on.

    Attributes
    ----------
    samples : dict of Tensor
        Sites, constrained, (chain, draw, *event).
    treatment : str
        How the path was treated, in words.
    stats : dict of Tensor
        One number a draw, (chain, draw).
    details : dict
        More of every draw, (chain, draw, ...), with the names of the axes behind these.
    local : dict of Tensor
        Sites of trials where the engine sampled them, such as paths: (chain, kept draw, trial, *event).
    kept : ndarray, optional
        Positions of the draws that ``local`` belongs to; all by default.
    history : dict of ndarray
        Traces over steps, such as the loss.
    notes : dict
        Plain JSON about the run, for the attributes of the posterior.
    warnings : tuple of str
    """

    samples: dict[str, Tensor]
    treatment: str
    stats: dict[str, Tensor] = field(default_factory=dict)
    details: Labelled = field(default_factory=dict)
    local: dict[str, Tensor] = field(default_factory=dict)
    kept: np.ndarray | None = None
    history: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Engine(Protocol):
    """A frozen dataclass of options that turns a program and a recording into draws."""

    def run(
        self, program: Program, recording: Recording, *, seed: int, checkpoint: StateStore | None = None
    ) -> Draws: ...


@runtime_checkable
class ReplicatingEngine(Protocol):
    """An engine that takes replicates of an experiment as one batch."""

    def replicate(self, density: LogDensity, start: Tensor) -> Tensor:
        """Unconstrained draws (replicate, draw, dimension), from starts (replicate, dimension)."""
        ...


@runtime_checkable
class RefittingEngine(Protocol):
    """An engine whose replicates know the data by their density alone, so that trials may be weighted or left out."""

    def refit(self, density: LogDensity, start: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unconstrained draws (replicate, draw, dimension), from starts (replicate, dimension).

        With log q (replicate, draw) where they are independent draws from a density q.
        """
        ...


def starting_values(program: Program, recording: Recording, max_steps: int, label: str) -> dict[str, Tensor]:
    """Values of the globals near the posterior mode; the model's own guess where the path does not collapse.

    Of a flow without noise, values of all sites, by way of the same flow with noise. They follow from model and
    recording alone, neither of which changes, and the next engine that asks for those of the same two objects gets
    them at once.
    """
    model = program.model if isinstance(program, Collapsed) else program
    if not isinstance(model, LatentModel):
        return {}
    known = _STARTS.setdefault(recording, [])
    for other, steps, values in known:
        if other is model and steps == max_steps:
            return {name: value.clone() for name, value in values.items()}
    found = _climbed(model, recording, max_steps, label)
    known.append((model, max_steps, {name: value.clone() for name, value in found.items()}))
    del known[:-MOST_STARTS]
    return found


def _climbed(model: LatentModel, recording: Recording, max_steps: int, label: str) -> dict[str, Tensor]:
    if isinstance(model, NoiselessFlow) and max_steps:
        linear = _climbed(model.relative().linear_relative(), recording, max_steps, label)
        return flow_start(model, recording, linear, max_steps, label)
    values = model.initial_values(recording)
    if max_steps == 0 or not collapses(model, recording):
        return values
    density = LogDensity(collapse(model), recording)
    return density.constrain(ascend(density, density.unconstrain(values), max_steps, label, NEAR)[0])


def treat_path(
    program: Program, recording: Recording, collapse_path: bool | None, values: dict[str, Tensor]
) -> tuple[Program, str]:
    """The program an engine works on, and in words how its path is treated.

    ``collapse_path`` None integrates the path out where that is possible and samples it otherwise; True insists on
    integrating out, False on sampling, in coordinates whitened at ``values``.
    """
    if collapse_path is None:
        collapse_path = collapses(program, recording)
    if collapse_path:
        collapsed = collapse(program)
        collapsed.check(recording)
        return collapsed, collapsed.treatment
    if isinstance(program, IntegratedModel):
        raise ModelError(
            f"collapse=False would sample what {type(program).__name__} sums out, which has no gradient; leave "
            "collapse at None"
        )
    return whiten(program, recording, values)


def vector_of(values: dict[str, Tensor], density: LogDensity) -> Tensor:
    """``values`` in the density's coordinates; whitened paths start at zero, sites without a value at a prior draw."""
    parts = []
    for site in density.sites:
        if site.name in values:
            parts.append(site.transform.inv(values[site.name]).reshape(-1))
        elif site.local:
            parts.append(density.prototype.new_zeros(site.unconstrained.numel()))
        else:
            parts.append(density.prototype[site.place])
    return torch.cat(parts).detach()


def split_local(
    treated: Program, recording: Recording, samples: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Globals and sites of trials among the samples (chain, draw, ...); a whitened path is coloured."""
    rest = dict(samples)
    if not isinstance(treated, Whitened):
        names = {site.name for site in LogDensity(treated, recording).sites if site.local}
        return rest, {name: rest.pop(name) for name in names & rest.keys()}
    noise = rest.pop("whitened_latent").flatten(0, 1)
    flat = {name: value.flatten(0, 1).unsqueeze(1) for name, value in rest.items()}
    with torch.no_grad():
        path = treated.path(globals_given(treated.model, flat, recording), noise, recording)
    lead = next(iter(samples.values())).shape[:2]
    return rest, {"latent": path.reshape(*lead, *path.shape[1:])}


def stream_seed(seed: int, chain: int) -> int:
    """An independent random stream for each chain; seeds 0 and 1 share none."""
    return int(np.random.SeedSequence([seed, chain]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def random_stream(seed: int, chain: int = 0) -> Iterator[None]:
    """Torch's random state set from (seed, chain) inside, restored outside."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(stream_seed(seed, chain))
        yield


@contextmanager
def numerics() -> Iterator[None]:
    """float64 for what Pyro creates by default, its argument checks off for speed, and OpenBLAS on one thread.

    That is NumPy's library, and torch has a pool of threads already. Where the threads of both wait for work at once,
    as they do by spinning, they hold each other up: what takes 30 ms may take 500. The user's settings come back at the
    end.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pyro.validation_enabled(False), _second_pools().limit(limits=1):
            yield
    finally:
        torch.set_default_dtype(before)


@functools.cache
def _second_pools() -> ThreadpoolController:
    """Those of OpenBLAS with threads of its own: what runs on OpenMP shares torch's."""
    return ThreadpoolController().select(internal_api="openblas").select(threading_layer="pthreads")
