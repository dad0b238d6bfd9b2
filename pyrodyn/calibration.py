r"""Simulation-based calibration: are the posteriors of an engine right on average over the prior?

In every replicate parameters :math:`\theta` are drawn from the prior and observations from :math:`\theta`. If
simulator, density, gauge, Jacobians and engine agree, the place of a true quantity among its posterior draws is uniform
on (0, 1).

References
----------
Talts et al., arXiv:1804.06788; Modrak et al., Bayesian Anal. 2023 (the likelihood among the quantities).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import scipy.stats
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from pyrodyn.errors import ModelError
from pyrodyn.inference import HMC, Gibbs, LogDensity, collapse, collapses
from pyrodyn.inference.engine import Engine, ReplicatingEngine, numerics, random_stream
from pyrodyn.program import LatentModel, Program, globals_given, is_random, log_terms, specification
from pyrodyn.progress import progress
from pyrodyn.recording import Recording

LEVELS = (0.5, 0.9)  # of the intervals whose coverage is measured
LEAST_P = 5e-4  # of one test; the bounds of a coverage leave out .001 on either side
BINS = 10
BATCH_NUMBERS = 20_000_000  # (replicate, draw, trial, time, unit) entries in one batched call
ENGINE_STREAM = 1_000_000  # so that no engine draws the numbers that made the truth
TIE = 1e-9

Quantities = dict[str, np.ndarray]
Compared = tuple[Quantities, Quantities, Quantities]


def calibrate(
    model: LatentModel,
    like: Recording,
    engine: Engine | None = None,
    *,
    replicates: int = 200,
    seed: int = 0,
    program: Program | None = None,
) -> xr.Dataset:
    """Simulate from the prior, infer, and see where the truth lies among the draws.

    Parameters
    ----------
    model : LatentModel
    like : Recording
        Gives the shape, labels, inputs, mask, and the channels' units; its observations are not looked at.
    engine : Engine
        `HMC` with 16 chains by default. Engines with a method ``replicate`` (`HMC`, `Laplace`) take all replicates as
        one batch, each with an adaptation of its own, from the mode nearest to the truth: what is tested is whether
        posteriors are right, not whether they are found. Other engines run from scratch on each. Of a model whose path
        cannot be integrated out, `inference.Gibbs` draws it.
    replicates : int
    seed : int
    program : Program, optional
        What is fitted, in place of the model with its path integrated out: the test of the test plants a fault here. It
        has the model's sites, with its path integrated out where the model's can be.

    Returns
    -------
    xarray.Dataset
        ``place``, ``truth`` and the posterior's ``mean`` (replicate, quantity), places in (0, 1); and for each quantity
        ``ks_p`` and ``chi_square_p`` (10 bins), the ``coverage`` (quantity, level) of central intervals, its ``bounds``
        (level, side) where intervals are right, and ``flagged``. Quantities are the model's invariants and the log
        likelihood, by the program that was fitted; where the path is drawn, ``complete_log_likelihood``, of path and
        observations.

    Raises
    ------
    ModelError
        Where the model does not fit ``like``, or the engine cannot take ``program`` or draw the path.

    Notes
    -----
    A flag is a p-value below 5e-4 or a coverage outside of bounds that hold with probability .998.
    """
    engine = HMC(chains=16, draws=25, warmup=100) if engine is None else engine
    if replicates < 2:
        raise ModelError(f"replicates must be 2 or more, got {replicates}; 200 make a calibration")
    blank = like.blank()
    model.check(blank)
    collapsing = collapses(model, blank)
    if not collapsing and not isinstance(engine, Gibbs):
        raise ModelError(
            f"the path of {type(model).__name__} cannot be integrated out, so that its calibration needs an engine "
            f"that draws the paths of all replicates, inference.Gibbs(), got {engine!r}"
        )
    fitted = program
    if program is None:
        program = collapse(model) if collapsing else model
    with numerics(), torch.no_grad():
        sites, observations = simulated(model, like, replicates, seed)
        # An engine that was told to sample the path does so for one recording at a time.
        if isinstance(engine, ReplicatingEngine) and getattr(engine, "collapse", None) is not False:
            parts = list(_batched(model, blank, engine, program, sites, observations, seed))
        elif fitted is not None:
            raise ModelError(f"program is for engines with a method replicate, such as HMC(), got {engine!r}")
        else:
            parts = list(_one_by_one(model, like, engine, sites, observations, seed))
    places = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
    truth, mean = (np.concatenate([np.stack(list(part[i].values()), -1) for part in parts]) for i in (1, 2))
    sides = ("replicate", "quantity")
    return (
        summarise(places)
        .assign(truth=(sides, truth), mean=(sides, mean))
        .assign_attrs(
            model=json.dumps(specification(model)),
            engine=json.dumps(specification(engine), default=str),
            shape=f"{like.num_trials} trials x {like.num_bins} bins x {like.num_units} units",
            seed=seed,
        )
    )


def simulated(model: LatentModel, like: Recording, replicates: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Sites (replicate, 1 or trial, *event) drawn from the prior, and observations (replicate, 1, trial, time, unit).

    The path is among the sites where it cannot be integrated out.
    """
    blank = like.blank()
    with numerics(), torch.no_grad(), random_stream(seed), pyro.plate("replicate", replicates, dim=-2):
        trace = poutine.trace(model).get_trace(blank)
    sites: dict[str, Any] = {name: site["value"] for name, site in trace.nodes.items() if is_random(site)}
    observations = sites.pop("observations")
    if like.mask is not None:
        observations = torch.where(like.mask, observations, 0.0)  # hidden entries are 0, as in a recording
    if collapses(model, blank):
        sites.pop("latent", None)
    return sites, observations.unsqueeze(1)


def summarise(places: dict[str, np.ndarray]) -> xr.Dataset:
    """Tests of uniformity for the places (replicate,) of every quantity; see `calibrate`."""
    found = np.stack(list(places.values()), -1)
    count = len(found)
    histograms = np.stack([np.histogram(column, BINS, (0.0, 1.0))[0] for column in found.T])
    ks = np.array([scipy.stats.kstest(column, "uniform").pvalue for column in found.T])
    chi_square = scipy.stats.chisquare(histograms, axis=1).pvalue
    levels = np.array(LEVELS)
    coverage = (np.abs(found - 0.5)[..., None] < 0.5 * levels).mean(0)
    bounds = np.stack([scipy.stats.binom(count, levels).ppf(share) / count for share in (0.001, 0.999)], -1)
    outside = (coverage < bounds[:, 0]) | (coverage > bounds[:, 1])
    return xr.Dataset(
        {
            "place": (("replicate", "quantity"), found),
            "ks_p": ("quantity", ks),
            "chi_square_p": ("quantity", chi_square),
            "coverage": (("quantity", "level"), coverage),
            "bounds": (("level", "side"), bounds),
            "flagged": ("quantity", (ks < LEAST_P) | (chi_square < LEAST_P) | outside.any(-1)),
        },
        coords={"quantity": list(places), "level": levels, "side": ["lower", "upper"]},
    )


def _batched(
    model: LatentModel,
    blank: Recording,
    engine: ReplicatingEngine,
    program: Program,
    sites: dict[str, Tensor],
    observations: Tensor,
    seed: int,
) -> Iterator[Compared]:
    """Replicates as one draw dimension, in blocks that fit into memory."""
    chains = getattr(engine, "chains", 64)
    block = max(1, BATCH_NUMBERS // (chains * observations[0].numel()))
    with progress(len(observations), "calibration") as bar, random_stream(seed, ENGINE_STREAM):
        for first in range(0, len(observations), block):
            chosen = slice(first, first + block)
            seen = observations[chosen]
            density = LogDensity(program, blank, seen)
            truth = {name: value[chosen] for name, value in sites.items()}
            vectors = engine.replicate(density, density.unconstrain(truth))
            size = max(1, BATCH_NUMBERS // (len(seen) * seen[0].numel()))
            drawn = [_quantities(model, density, density.constrain(part)) for part in vectors.split(size, 1)]
            values = {name: np.concatenate([part[name] for part in drawn], 1) for name in drawn[0]}
            true = _quantities(model, density, {name: value.unsqueeze(1) for name, value in truth.items()})
            yield _compared(values, true, seed + first)
            bar.update(len(seen))


def _one_by_one(
    model: LatentModel,
    like: Recording,
    engine: Engine,
    sites: dict[str, Tensor],
    observations: Tensor,
    seed: int,
) -> Iterator[Compared]:
    """A fit from scratch for every replicate."""
    with progress(len(observations), "calibration") as bar:
        for i, seen in enumerate(observations):
            recording = like.with_observations(seen[0])
            with torch.enable_grad():
                samples = engine.run(model, recording, seed=ENGINE_STREAM + seed + i).samples
            with torch.no_grad():
                drawn = {name: value.flatten(0, 1)[None].unsqueeze(2) for name, value in samples.items()}
                values = _quantities(model, LogDensity(collapse(model), recording, seen[None]), drawn)
                # The sites of the truth are in the gauge of a blank recording.
                density = LogDensity(collapse(model), like.blank(), seen[None])
                true = _quantities(model, density, {n: v[i : i + 1].unsqueeze(1) for n, v in sites.items()})
            yield _compared(values, true, seed + i)
            bar.update()


def _quantities(model: LatentModel, density: LogDensity, values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Scalars (replicate, draw) by name, from sites (replicate, draw, 1 or trial, *event)."""
    found = {}
    for name, (dims, value) in model.invariants(globals_given(model, values, density.recording)).items():
        flat = value.reshape(*value.shape[:2], -1)
        found |= {f"{name}[{i}]" if dims else name: flat[..., i].numpy() for i in range(flat.shape[-1])}
    name = "complete_log_likelihood" if any(site.local for site in density.sites) else "log_likelihood"
    found[name] = log_terms(density.program, values, density.recording)[1].sum(-1).numpy()
    return found


def _compared(drawn: Quantities, true: Quantities, seed: int) -> Compared:
    """Places, truths and posterior means, each (replicate) by name."""
    truth = {name: value[:, 0] for name, value in true.items()}
    return _places(drawn, true, seed), truth, {name: values.mean(1) for name, values in drawn.items()}


def _places(drawn: dict[str, np.ndarray], true: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Share of the draws below the truth, ties and the ends broken at random: uniform if all is right."""
    random, found = np.random.default_rng([seed, ENGINE_STREAM]), {}
    for name, values in drawn.items():
        apart = values - true[name]
        tied = np.abs(apart) < TIE * (1.0 + np.abs(true[name]))
        below, ties = ((apart < 0.0) & ~tied).sum(1), tied.sum(1)
        found[name] = (below + (ties + 1) * random.uniform(size=len(values))) / (values.shape[1] + 1)
    return found
