"""The table of the zoo: for every exported model its smallest instances, and how each engine runs on them.

A new model adds rows to `MODELS`; a new engine or readout adds one to `ENGINES` or `READOUTS`.
`tests/test_contract.py` runs every row, and fails for an exported name without one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

import pyrodyn as dyn
from pyrodyn import drifts, guides, inference, integrators, models, networks, readouts
from pyrodyn.diffusion import DiffusionModel
from pyrodyn.inference.engine import Engine, numerics, random_stream
from pyrodyn.inference.local import LocalDensity
from pyrodyn.program import IntegratedModel, LatentModel, StateSpaceModel, globals_given
from pyrodyn.recording import Recording


@dataclass(frozen=True)
class Row:
    """One model of the zoo.

    Attributes
    ----------
    name : str
    model : LatentModel
        The smallest instance that shows the feature in its name.
    like : callable
        Gives the blank recording that the model is simulated on.
    symmetry : str
        What `model.transformed` draws from, in words; the test holds the model to it.
    moved : callable
        What that does to the drawn sites of trials, given model, sites and seed; nothing by default. Looked at where
        they cannot be integrated out.
    structured : bool
        Whether the structured guide takes the model.
    """

    name: str
    model: LatentModel
    like: Callable[[], Recording]
    symmetry: str
    moved: Callable[[Any, dict[str, Tensor], int], dict[str, Tensor]] = lambda model, local, seed: local
    structured: bool = True

    @property
    def integrated(self) -> bool:
        """Whether what is latent in trials can be integrated out, or the model does so itself."""
        return inference.collapses(self.model, self.like())

    @property
    def sampled(self) -> bool:
        """Whether it can be sampled by an engine."""
        return not isinstance(self.model, IntegratedModel)

    @property
    def recording(self) -> Recording:
        """A simulated recording with all that ``like`` says."""
        return _simulated(self.name)


def blank(
    trials: int = 3,
    bins: int = 9,
    units: int = 4,
    *,
    counts: bool = True,
    lengths: list[int] | None = None,
    missing: float = 0.0,
    inputs: int = 0,
    irregular: bool = False,
    conditions: tuple[str, ...] = (),
) -> Recording:
    """A blank recording: ragged by ``lengths``, with a share ``missing`` of the entries unobserved, with ``inputs``.

    With ``irregular``, times are up to six bins apart.
    """
    rng = np.random.default_rng(trials + 10 * bins + 100 * units)
    mask = None
    if missing:
        mask = rng.random((trials, bins, units)) >= missing
        mask[0, 2] = False  # and one bin in which no unit was seen
    # Real-valued channels differ in where they lie and how far they spread, as a voltage and a temperature would.
    center = np.zeros(units) if counts else np.linspace(-3.0, 40.0, units)
    scale = np.ones(units) if counts else np.linspace(0.5, 8.0, units)
    return Recording.from_arrays(
        np.zeros((trials, bins, units)),
        bin_width=None if irregular else 0.05,
        time=0.05 * np.cumsum(rng.integers(1, 7, bins)) if irregular else None,
        counts=counts,
        center=center,
        scale=scale,
        region=["V1"] * (units // 2) + ["V2"] * (units - units // 2),
        trial=[f"t{i}" for i in range(trials)],
        lengths=lengths,
        mask=mask,
        condition=[conditions[i % len(conditions)] for i in range(trials)] if conditions else None,
        inputs=rng.normal(size=(trials, bins, inputs)) * 3.0 if inputs else None,
    ).blank()


def mixed(missing: float = 0.0) -> Recording:
    """A blank recording of counts in V1 and real-valued channels in V2, a unit of V1 standing last."""
    order, mask = [0, 2, 3, 1], None
    if missing:
        mask = np.random.default_rng(0).random((3, 9, 4)) >= missing
    return Recording.from_arrays(
        np.zeros((3, 9, 4)),
        bin_width=0.05,
        counts=False,
        center=np.array([0.2, 0.2, -3.0, 40.0])[order],
        scale=np.array([1.0, 1.0, 0.5, 8.0])[order],
        region=np.array(["V1", "V1", "V2", "V2"])[order],
        mask=mask,
    ).blank()


ROTATION = "orthogonal changes of the latent coordinates"
REGIONS = "orthogonal changes in each region, reflections of what is common, turns of the shared innovations"

MODELS: tuple[Row, ...] = (
    Row(
        "LDS-Gaussian",
        models.LDS(2, readouts.Gaussian()),
        lambda: blank(counts=False),
        ROTATION,
    ),
    Row(
        "LDS-Gaussian-inputs-missing",
        models.LDS(2, readouts.Gaussian()),
        lambda: blank(counts=False, inputs=2, missing=0.2),
        ROTATION,
    ),
    Row(
        "LDS-Poisson-inputs",
        models.LDS(2, readouts.Poisson()),
        lambda: blank(inputs=1),
        ROTATION,
    ),
    Row(
        "LDS-Poisson-ragged-missing",
        models.LDS(2, readouts.Poisson()),
        lambda: blank(lengths=[9, 4, 1], missing=0.2),
        ROTATION,
    ),
    Row(
        "LDS-NegativeBinomial-one-latent",
        models.LDS(1, readouts.NegativeBinomial()),
        lambda: blank(),
        ROTATION,
    ),
    Row(
        "LDS-Bernoulli-one-trial",
        models.LDS(2, readouts.Bernoulli(), dynamics_scale=1.0),
        lambda: blank(trials=1, bins=12),
        ROTATION,
    ),
)

MODELS += (
    Row(
        "MultiRegionLDS-Gaussian-missing",
        models.MultiRegionLDS(1, time_bumps=3, readout=readouts.Gaussian()),
        lambda: blank(bins=15, counts=False, missing=0.2),
        REGIONS,
    ),
    Row(
        "MultiRegionLDS-Poisson-inputs-one-edge",
        models.MultiRegionLDS({"V1": 2, "V2": 1}, edges=[("V2", "V1", 0.3)], time_bumps=0, trial_level=False),
        lambda: blank(inputs=1),
        REGIONS,
    ),
    Row(
        "MultiRegionLDS-Poisson-horseshoe",
        models.MultiRegionLDS(1, edge_prior="horseshoe", shared_innovations=0, time_bumps=0),
        lambda: blank(),
        REGIONS,
    ),
    Row(
        "MultiRegionLDS-NegativeBinomial-one-trial",
        models.MultiRegionLDS(
            1, global_dim=0, shared_innovations=0, edge_probability=1.0, readout=readouts.NegativeBinomial()
        ),
        lambda: blank(trials=1, bins=12),
        REGIONS,
    ),
)

PERMUTATION = "another numbering of the modes"

MODELS += (
    Row(
        "HMM-Gaussian-missing",
        models.HMM(3, readouts.Gaussian()),
        lambda: blank(counts=False, missing=0.2),
        PERMUTATION,
    ),
    Row("HMM-Poisson-ragged", models.HMM(2), lambda: blank(lengths=[9, 4, 1]), PERMUTATION),
    Row(
        "HMM-NegativeBinomial-one-trial",
        models.HMM(2, readouts.NegativeBinomial()),
        lambda: blank(trials=1, bins=12),
        PERMUTATION,
    ),
    Row("GainHMM-Poisson-ragged", models.GainHMM(), lambda: blank(lengths=[9, 4, 1]), PERMUTATION),
    Row(
        "GainHMM-NegativeBinomial-three-states-missing",
        models.GainHMM(3, readouts.NegativeBinomial(), stickiness=2.0),
        lambda: blank(missing=0.2),
        PERMUTATION,
    ),
    Row("HMM-Bernoulli", models.HMM(2, readouts.Bernoulli(), stickiness=0.0), lambda: blank(), PERMUTATION),
)

MODELS += (
    Row(
        "LinearSDE-Gaussian-irregular-inputs",
        models.LinearSDE(2, readouts.Gaussian()),
        lambda: blank(counts=False, irregular=True, inputs=1),
        ROTATION,
    ),
    Row(
        "LinearSDE-Poisson-ragged-missing",
        models.LinearSDE(2, readouts.Poisson()),
        lambda: blank(lengths=[9, 4, 1], missing=0.2),
        ROTATION,
    ),
    Row(
        "LinearSDE-Gaussian-one-latent",
        models.LinearSDE(1, readouts.Gaussian(), time_constant=0.2),
        lambda: blank(counts=False, irregular=True, missing=0.2),
        ROTATION,
    ),
)

UNITS = "another numbering and other signs of the units of the network"

MODELS += (
    Row(
        "LatentRNN-Poisson-inputs",
        models.LatentRNN(2),
        lambda: blank(inputs=1),
        UNITS,
        lambda model, local, seed: {"latent": local["latent"][..., model.symmetry(seed)[0]] * model.symmetry(seed)[1]},
    ),
    Row(
        "LatentRNN-Gaussian-low-rank-irregular-missing",
        models.LatentRNN(3, networks.LowRank(rank=1), readouts.Gaussian()),
        lambda: blank(counts=False, irregular=True, missing=0.2),
        UNITS,
        lambda model, local, seed: {"latent": local["latent"][..., model.symmetry(seed)[0]] * model.symmetry(seed)[1]},
    ),
    Row(
        "VAE-Gaussian-linear",
        models.VAE(2, hidden=(), readout=readouts.Gaussian()),
        lambda: blank(counts=False),
        ROTATION,
    ),
    Row(
        "VAE-Poisson-smooth-conditions-ragged",
        models.VAE(2, hidden=(3,), time=models.SmoothPrior(), conditions=("a", "b")),
        lambda: blank(lengths=[9, 4, 1], conditions=("a", "b")),
        UNITS,
        lambda model, local, seed: {"latent": local["latent"] @ model.symmetry(seed)[0].mT},
        structured=False,
    ),
    Row(
        "LFADS-Poisson-controller-inputs-missing",
        models.LFADS(2, generator_dim=3, initial_dim=2, input_dim=1, controller_dim=3),
        lambda: blank(inputs=1, missing=0.2),
        UNITS,
    ),
)

ORDER = "another order of the latents and other signs"


def _reordered(name: str) -> Callable[[Any, dict[str, Tensor], int], dict[str, Tensor]]:
    return lambda model, local, seed: {name: local[name] @ model.symmetry(seed).mT}


MODELS += (
    Row(
        "NeuralSDE-Gaussian-process-irregular-missing",
        models.NeuralSDE(2, readouts.Gaussian(), drifts.GaussianProcess(functions=3)),
        lambda: blank(counts=False, irregular=True, missing=0.2),
        ORDER,
        _reordered("latent"),
        structured=False,
    ),
    Row(
        "NeuralSDE-Poisson-MLP-ragged",
        models.NeuralSDE(2, drift=drifts.MLP(hidden=3, layers=2), time_constant=2.0, steps_per_bin=2),
        lambda: blank(lengths=[9, 4, 1]),
        ORDER,
        _reordered("latent"),
        structured=False,
    ),
    Row(
        "NeuralODE-Poisson-irregular-missing",
        models.NeuralODE(2, drift=drifts.MLP(hidden=3), time_constant=10.0),
        lambda: blank(irregular=True, missing=0.2),
        ORDER,
        _reordered("initial_state"),
        structured=False,
    ),
    Row(
        "NeuralODE-Gaussian-short-steps-one-latent",
        models.NeuralODE(1, readouts.Gaussian(), drifts.Linear(), integrator=integrators.FixedStep(bins=0.4)),
        lambda: blank(counts=False),
        ORDER,
        _reordered("initial_state"),
        structured=False,
    ),
)

MODELS += (
    Row(
        "LDS-regions-of-counts-and-channels",
        models.LDS(2, {"V1": readouts.Poisson(), "V2": readouts.Gaussian()}),
        lambda: mixed(),
        ROTATION,
    ),
    Row(
        "MultiRegionLDS-regions-of-counts-and-channels-missing",
        models.MultiRegionLDS(1, time_bumps=0, readout={"V1": readouts.Poisson(), "V2": readouts.Gaussian()}),
        lambda: mixed(missing=0.2),
        REGIONS,
    ),
)

ROTATED_PERMUTATION = "another numbering of the modes, orthogonal changes of the latent coordinates"
REGIONS_PERMUTATION = "another numbering of the modes, orthogonal changes in each region"


def _turned(model: Any, local: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    return {"latent": local["latent"] @ model.symmetry(blank(), seed)[1]}


MODELS += (
    Row(
        "SwitchingLDS-Poisson-recurrent-inputs",
        models.SwitchingLDS(2, 2, recurrent=True),
        lambda: blank(2, 7, inputs=1),
        ROTATED_PERMUTATION,
        _turned,
    ),
    Row(
        "SwitchingLDS-Gaussian-ragged-missing",
        models.SwitchingLDS(3, 1, readout=readouts.Gaussian()),
        lambda: blank(2, 7, counts=False, lengths=[7, 4], missing=0.2),
        ROTATED_PERMUTATION,
        _turned,
    ),
    Row(
        "MultiRegionSwitchingLDS-Poisson-recurrent-inputs",
        models.MultiRegionSwitchingLDS(2, {"V1": 2, "V2": 1}, recurrent=True),
        lambda: blank(2, 7, inputs=1),
        REGIONS_PERMUTATION,
        _turned,
    ),
    Row(
        "MultiRegionSwitchingLDS-counts-and-channels-one-edge-missing",
        models.MultiRegionSwitchingLDS(
            2, 1, edges=[("V2", "V1", 0.3)], readout={"V1": readouts.Poisson(), "V2": readouts.Gaussian()}
        ),
        lambda: mixed(missing=0.2),
        REGIONS_PERMUTATION,
        _turned,
    ),
    Row(
        "ARHMM-two-lags-recurrent-inputs-ragged",
        models.ARHMM(2, lags=2, recurrent=True),
        lambda: blank(2, 8, 2, counts=False, lengths=[8, 5], inputs=1),
        PERMUTATION,
    ),
)

DIRECTIONS = "up and down exchanged"
RACERS = "another numbering of the accumulators"
NONE = "none"
PLACES = tuple(tuple(0.5 + 20.0 * np.exp(-0.5 * (np.arange(5) - peak) ** 2)) for peak in (0, 1, 3, 4))

MODELS += (
    Row(
        "Stepping-conditions-ragged",
        models.Stepping(("a", "b")),
        lambda: blank(lengths=[9, 4, 1], conditions=("a", "b")),
        DIRECTIONS,
    ),
    Row("Stepping-geometric-missing", models.Stepping(phases=1), lambda: blank(missing=0.2), DIRECTIONS),
    Row(
        "Accumulator-conditions-ragged",
        models.Accumulator(("a", "b"), grid=25),
        lambda: blank(lengths=[9, 4, 1], conditions=("a", "b")),
        NONE,
    ),
    Row("Accumulator-collapsing-missing", models.Accumulator(grid=25, collapse=1.0), lambda: blank(missing=0.2), NONE),
    Row(
        "Race-conditions-ragged-missing",
        models.Race(("a", "b"), grid=10, lower=0.0, diffusion=0.5),
        lambda: blank(lengths=[9, 4, 1], missing=0.2, conditions=("a", "b")),
        RACERS,
    ),
    Row(
        "Replay-ragged-missing",
        models.Replay(fields=PLACES, walk=3.0, stay=0.8),
        lambda: blank(lengths=[9, 4, 1], missing=0.2),
        NONE,
    ),
    Row("Accumulator-no-bound-missing", models.Accumulator(bound=False, grid=40), lambda: blank(missing=0.2), NONE),
)

READOUTS: tuple[readouts.Readout, ...] = (
    readouts.Gaussian(),
    readouts.Poisson(),
    readouts.NegativeBinomial(),
    readouts.Bernoulli(),
)

# Settings that only show that an engine runs from end to end; that it is right is another test's business.
ENGINES: dict[str, Engine] = {
    "SVI": inference.SVI(steps=4, draws=30, particles=2),
    "SVI-structured": inference.SVI(steps=4, draws=30, particles=2, guide=guides.Structured()),
    "SVI-path": inference.SVI(steps=4, draws=30, particles=2, guide=guides.LowRank(rank=3), collapse=False),
    "Laplace": inference.Laplace(draws=30, max_steps=200),
    "Gibbs": inference.Gibbs(draws=4, warmup=6, chains=2),
    "HMC": inference.HMC(draws=4, warmup=2, chains=4, superchains=2),
    "HMC-path": inference.HMC(draws=4, warmup=2, chains=4, superchains=2, collapse=False),
    "NUTS": inference.NUTS(draws=4, warmup=3, chains=2, max_tree_depth=2),
    "NUTS-path": inference.NUTS(draws=4, warmup=3, chains=1, max_tree_depth=2, collapse=False),
    "SGLD": inference.SGLD(draws=4, thin=1, warmup=6, chains=2),
    "NaturalGradient": inference.NaturalGradient(rounds=3, draws=30, rest=2),
}

# Every guide on the collapsed program, on the program with its path, and as the globals' part of the structured guide.
GUIDES: tuple[guides.GuideFactory, ...] = (guides.FullRank(), guides.MeanField(), guides.LowRank(rank=2))


def applies(engine: Engine, row: Row) -> bool:
    """Whether an engine takes a model.

    `inference.Gibbs` takes those that declare their conditionals, `inference.NaturalGradient` diffusions,
    `inference.Laplace` those without anything latent in trials left, an engine that samples paths those with a path.
    """
    if isinstance(engine, inference.Gibbs):
        return hasattr(row.model, "conditionals")
    if isinstance(engine, inference.NaturalGradient):
        return isinstance(row.model, DiffusionModel)
    if isinstance(engine, inference.Laplace):
        return row.integrated
    if isinstance(getattr(engine, "guide", None), guides.Structured) and not row.structured:
        return False
    samples_path = getattr(engine, "collapse", None) is False or isinstance(
        getattr(engine, "guide", None), guides.Structured
    )
    return not samples_path or isinstance(row.model, StateSpaceModel)


def row(name: str) -> Row:
    """A row by its name."""
    return next(r for r in MODELS if r.name == name)


@cache
def _simulated(name: str) -> Recording:
    chosen = row(name)
    # Offsets near the middle of the prior: a silent or saturated toy recording would test little.
    like = chosen.like()
    offset = like.center if not like.counts else torch.full((like.num_units,), 0.2, dtype=torch.float64)
    return dyn.simulate(chosen.model, like, seed=5, values={"offset": offset})[0]


@cache
def fitted(name: str, engine: str, seed: int = 0) -> xr.DataTree:
    """The posterior of one row under one engine; complaints about so short a run are expected."""
    chosen = row(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        return dyn.fit(chosen.model, chosen.recording, ENGINES[engine], seed=seed)


def prior_draws(model: LatentModel, recording: Recording, shape: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Draws of the global sites from their priors, (*shape, 1, *event)."""
    with random_stream(seed), numerics(), torch.no_grad(), pyro.plate("draw", int(np.prod(shape)), dim=-2):
        trace = poutine.trace(model.sample_globals).get_trace(recording)
    return {
        name: trace.nodes[name]["value"].reshape(*shape, 1, *trace.nodes[name]["value"].shape[2:])
        for name in trace.stochastic_nodes
        if name != "draw"
    }


def local_draws(
    model: LatentModel, values: dict[str, Tensor], recording: Recording, seed: int = 1
) -> dict[str, Tensor]:
    """What is latent in every trial, drawn from its prior for every draw of the globals, (*draw, trial, *event)."""
    with random_stream(seed), torch.no_grad():
        drawn = LocalDensity(model, globals_given(model, values, recording), recording).prior(1)
    return {name: value.squeeze(0) for name, value in drawn.items()}
