"""The options of models of several regions against a recording, and where such a model starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from pyrodyn.distributions import NetworkLayout
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.errors import ModelError
from pyrodyn.linalg.stationary import spectral_radius
from pyrodyn.models._startup import LinearStart, linear_start
from pyrodyn.recording import Recording

if TYPE_CHECKING:
    from pyrodyn.models.multi_region_lds import MultiRegionLDS
    from pyrodyn.models.multi_region_switching_lds import MultiRegionSwitchingLDS

GLOBAL, LEVEL = "global", "trial level"  # names of what is common to all regions, beside the regions' own
SPIKE, HORSESHOE = "spike-and-slab", "horseshoe"
SIGNAL = (1.0, 0.02)  # shape and rate of the prior of a region's squared loading, per unit of innovation
INITIAL = (1.5, 7.5)  # of the variance of the first state
BUMPS = COURSES = (0.5, 1e-7)  # of the variances of own heights and of weights of courses: near zero, with a long tail
BINS_A_BUMP, MOST_BUMPS = 5, 40  # hat functions where their number is not given
INNOVATION_SD = 0.5  # of the loadings of shared innovations, beside private ones of one
OWN_SD = 0.4  # of a region's own block: singular values about this wide about the persistence
COMMON_SD = 0.25  # of what enters from global latents, beside innovations of one
# Of what enters from the level of a trial, which is about four: regions remember twenty to fifty bins, so that their
# shift has about the spread that they have within a trial.
LEVEL_SD = 0.03
LARGEST = 0.97  # spectral radius at the start
SLOW, SLOW_SD = 0.95, 0.05  # persistence of a global latent


class MultiRegionParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event); latents: each region's, the global ones, the level."""

    dynamics: Tensor  # (latent, latent)
    innovation_loading: Tensor | None  # (latent, shared): of the innovations that regions share
    initial_variance: Tensor  # (latent)
    loading: Tensor  # (unit, latent)
    offset: Tensor  # (unit)
    noise: Tensor | None  # (unit): the readout's own parameter
    input_gain: Tensor | None  # (latent, input)
    time_locked: Tensor | None  # (latent, condition, bump)


class Edge(NamedTuple):
    """An edge that may exist, its prior probability, and its prior scale as a multiple of the others'."""

    source: str
    target: str
    probability: float
    scale: float = 1.0


def checked_dims(latent_dim: Any) -> int | tuple[tuple[str, int], ...]:
    """Latents of each region: one number, or pairs of name and number."""
    if isinstance(latent_dim, int):
        if latent_dim < 1:
            raise ModelError(f"latent_dim must be 1 or more, got {latent_dim}")
        return latent_dim
    pairs = latent_dim.items() if isinstance(latent_dim, Mapping) else latent_dim
    try:
        found = tuple((str(name), dim) for name, dim in pairs)
    except (TypeError, ValueError):
        raise ModelError(
            f"latent_dim must be a whole number or a mapping of region to one, such as {{'V1': 3, 'V2': 2}}, got "
            f"{latent_dim!r}"
        ) from None
    wrong = {name: dim for name, dim in found if not isinstance(dim, int) or dim < 1}
    if wrong or not found or len({name for name, _ in found}) < len(found):
        raise ModelError(f"latent_dim must give every region once a whole number of at least 1, got {latent_dim!r}")
    return found


def checked_edges(edges: Any, probability: float) -> tuple[Edge, ...] | None:
    """Edges (source, target, prior probability, prior scale) from a graph or a sequence."""
    if edges is None:
        return None
    if isinstance(edges, nx.Graph):
        if not edges.is_directed():
            raise ModelError("edges must be a networkx.DiGraph: an undirected graph does not say who drives whom")
        given = edges.edges(data=True)
        edges = [(s, t, data.get("probability", probability), data.get("scale", 1.0)) for s, t, data in given]
    found = []
    for edge in edges:
        given = (*edge[2:], *(probability, 1.0)[len(edge) - 2 :])
        if isinstance(edge, str) or len(given) != 2 or not all(isinstance(number, Real) for number in given):
            raise ModelError(
                "each of edges must be (source, target), with its prior probability and its prior scale behind them "
                f"where it has its own, got {edge!r}"
            )
        source, target, share, scale = str(edge[0]), str(edge[1]), *map(float, given)
        if source == target:
            raise ModelError(f"edges holds {source!r} -> {target!r}: a region's own dynamics are always there; drop it")
        if not 0.0 < share <= 1.0:
            raise ModelError(
                f"the prior probability of edge {source!r} -> {target!r} must lie in (0, 1], got {share}; leave out an "
                "edge that cannot exist"
            )
        if not 0.0 < scale < math.inf:
            raise ModelError(f"the prior scale of edge {source!r} -> {target!r} must be positive, got {scale}")
        found.append(Edge(source, target, share, scale))
    if len({edge[:2] for edge in found}) < len(found):
        raise ModelError("edges holds an edge twice")
    return tuple(found)


_UNITS: WeakKeyDictionary[Recording, dict[str, np.ndarray]] = WeakKeyDictionary()  # positions of every region's units


def regions_of(model: MultiRegionLDS | MultiRegionSwitchingLDS, recording: Recording) -> list[tuple[str, int, Tensor]]:
    """Name, latents, and positions of the units of every region; the order of ``latent_dim``, or of the recording."""
    dims = model.latent_dim
    pairs = [(name, dims) for name in recording.regions] if isinstance(dims, int) else dims
    known = _UNITS.setdefault(recording, {})
    found = []
    for name, dim in pairs:  # type: ignore[misc]
        if name not in known:
            known[name] = (recording.region == name).nonzero()[0]
        found.append((name, dim, torch.from_numpy(known[name])))
    return found


def possible_edges(model: MultiRegionLDS | MultiRegionSwitchingLDS, recording: Recording) -> tuple[Edge, ...]:
    """The edges that may exist among the regions of a recording."""
    if model.edges is not None:
        return model.edges
    names = [name for name, _, _ in regions_of(model, recording)]
    return tuple(Edge(s, t, model.edge_probability) for t in names for s in names if s != t)


def check(model: MultiRegionLDS, recording: Recording) -> None:
    """Raise an error that says what to do where a model's options do not fit a recording."""
    check_regions(model, recording)
    if model.conditions:
        strange = sorted(set(recording.condition.astype(str).tolist()) - set(model.conditions))
        if strange:
            raise ModelError(
                f"the recording has conditions {strange}, which are not among conditions={model.conditions}"
            )


def check_regions(model: MultiRegionLDS | MultiRegionSwitchingLDS, recording: Recording) -> None:
    """The part of `check` about regions, edges and bins."""
    kind = type(model).__name__
    present = list(recording.regions)
    if not isinstance(model.latent_dim, int):
        named = [name for name, _ in model.latent_dim]
        absent, extra = [n for n in named if n not in present], [n for n in present if n not in named]
        if absent:
            raise ModelError(f"latent_dim names {absent}, which have no units in the recording; its regions: {present}")
        if extra:
            raise ModelError(
                f"the recording has units in {extra}, of which latent_dim says nothing; add them, or select the units "
                f"of {named} with recording.sel(region={named})"
            )
    reserved = {GLOBAL, LEVEL, "shared"} & set(present)
    if reserved:
        raise ModelError(f"a region is called {sorted(reserved)}, a name this model uses itself; rename the region")
    if len(present) < 2:
        raise ModelError(
            f"{kind} needs two regions or more, and all units of the recording are in {present}; give the recording "
            f"its regions, Recording.from_arrays(..., region=[...]), or use models.{kind.removeprefix('MultiRegion')}"
        )
    for name, dim, units in regions_of(model, recording):
        if dim > len(units):
            raise ModelError(
                f"region {name!r} has {len(units)} units and latent_dim asks for {dim} latents; at most one latent a "
                "unit: lower latent_dim"
            )
        _check_activity(recording, name, units)
    unknown = {n for edge in model.edges or () for n in edge[:2]} - set(present)
    if unknown:
        raise ModelError(
            f"edges names {sorted(unknown)}, which are no regions of the recording: {present}; of a larger connectome "
            "take the part that was recorded, graph.subgraph(recording.regions)"
        )
    if recording.num_bins < 2:
        raise ModelError(
            "the recording has one bin, and one bin holds no dynamics; use smaller bins, or join bins that follow each "
            "other into trials"
        )
    if not recording.regular:
        raise ModelError(
            f"{kind} steps from bin to bin and needs equally spaced bins, but the recording's time axis is irregular; "
            "rebin it, or put the gaps into the mask"
        )


def _check_activity(recording: Recording, name: str, units: Tensor) -> None:
    """Refuse a region of which nothing is seen, or nothing that moves: its latents would be the prior's."""
    if recording.observations is None:
        return
    values = recording.values[..., units]
    seen = torch.ones_like(values, dtype=torch.bool) if recording.mask is None else recording.mask[..., units]
    remedy = f"leave it out with recording.sel(region={[r for r in recording.regions if r != name]})"
    if not bool(seen.any()):
        raise ModelError(
            f"region {name!r} is never observed: all entries of its {len(units)} units are hidden; {remedy}"
        )
    if recording.counts:
        if not bool((values != 0.0).any()):
            raise ModelError(
                f"region {name!r} is silent: none of its {len(units)} units has an observed event; {remedy}"
            )
        return
    middle = values.sum((0, 1)) / seen.sum((0, 1)).clamp(min=1)
    if not bool((((values - middle).abs() > 1e-12 * middle.abs()) & seen).any()):
        raise ModelError(f"region {name!r} is silent: none of its {len(units)} units ever changes; {remedy}")


@lru_cache(maxsize=64)
def entry_prior(
    layout: NetworkLayout, edges: tuple[Edge, ...], persistence: float, coupling_scale: float
) -> tuple[Tensor, Tensor]:
    """Mean and sd of every entry of the dynamics, (entry,), made once; ``edges`` are the layout's."""
    mean = torch.zeros(len(layout.edge), dtype=torch.float64)
    sd = torch.full_like(mean, COMMON_SD)
    sources = torch.zeros(layout.num_regions, dtype=torch.float64)
    for (target, _), edge in zip(layout.edges, edges, strict=True):
        sources[target] += edge.probability
    group, rows, columns = layout.group, layout.rows, layout.columns
    dims = torch.tensor(layout.dims, dtype=torch.float64)
    own = (layout.edge < 0) & (group[rows] == group[columns])
    held = own & (group[rows] >= 0)
    mean[held & (rows == columns)] = persistence
    sd[held] = OWN_SD / dims[group[rows[held]]].sqrt()
    slow = own & (group[rows] < 0)
    mean[slow], sd[slow] = SLOW, SLOW_SD
    if layout.level:
        sd[(columns == layout.size - 1) & (group[rows] >= 0)] = LEVEL_SD
    held = layout.edge >= 0
    target, source = group[rows[held]], group[columns[held]]
    scale = coupling_scale * torch.tensor([edge.scale for edge in edges], dtype=torch.float64)[layout.edge[held]]
    sd[held] = scale / (sources[target].clamp(min=1.0) * dims[target] * dims[source]).sqrt()
    return mean, sd


_DESIGNS: WeakKeyDictionary[Recording, dict[tuple, Tensor]] = WeakKeyDictionary()


def design(model: MultiRegionLDS, recording: Recording, bumps: int) -> Tensor:
    """Hat functions of the time of a trial, one set for each condition, (trial, time, condition x bump)."""
    known = _DESIGNS.setdefault(recording, {})
    key = (bumps, model.conditions)
    if key not in known:
        place = torch.linspace(0.0, bumps - 1.0, recording.num_bins, dtype=torch.float64)
        hats = (1.0 - (place.unsqueeze(-1) - torch.arange(bumps)).abs()).clamp(min=0.0)
        names = recording.condition.astype(str).tolist()
        which = [model.conditions.index(n) for n in names] if model.conditions else [0] * recording.num_trials
        of_trial = torch.nn.functional.one_hot(torch.tensor(which), max(1, len(model.conditions))).double()
        spread = torch.einsum("ic,tb->itcb", of_trial, hats).flatten(-2)
        known[key] = spread.to(recording.scale.device)
    return known[key]


_STARTS: WeakKeyDictionary[Recording, dict[Any, list[LinearStart]]] = WeakKeyDictionary()


def starts(model: MultiRegionLDS | MultiRegionSwitchingLDS, recording: Recording) -> list[LinearStart]:
    """A linear model of each region by itself; see `linear_start`."""
    recording = recording.whole
    known = _STARTS.setdefault(recording, {})
    key = (model.latent_dim, model.readout)
    if key not in known:
        known[key] = [
            linear_start(recording.isel(unit=units.numpy()), dim, model.readout)
            for _, dim, units in regions_of(model, recording)
        ]
    return known[key]


class RegionStart(NamedTuple):
    """A first guess for one region, in coordinates where innovations have unit covariance."""

    dynamics: Tensor  # (latent, latent)
    loading: Tensor  # (unit, latent)


def unit_innovations(start: LinearStart, scale: Tensor) -> RegionStart:
    """A start, given where the stationary covariance is the identity, in the gauge of the coupled model."""
    eye = torch.eye(len(start.dynamics), dtype=torch.float64)
    noise = eye - start.dynamics @ start.dynamics.mT
    root = torch.linalg.cholesky(noise + 1e-3 * eye)
    dynamics = torch.linalg.solve_triangular(root, start.dynamics @ root, upper=False)
    return RegionStart(dynamics, scale.unsqueeze(-1) * (start.loading @ root))


def initial_values(model: MultiRegionLDS, recording: Recording) -> dict[str, Tensor]:
    """One value for every site: each region by itself, and between them next to nothing, in any direction."""
    layout = model.layout(recording)
    prior = model.network_prior(recording)
    generator = torch.Generator().manual_seed(0)
    small = 0.05 * prior.sd_entry * torch.randn(len(prior.sd_entry), generator=generator, dtype=torch.float64)
    dynamics = layout.matrix(torch.where(layout.slow, SLOW, small))
    values: dict[str, Tensor] = {}
    signal = []
    for start, place, (name, _, units) in zip(
        starts(model, recording), layout.places, model.regions(recording), strict=True
    ):
        scale = model.readout.signal_scale(recording)[units]
        guess = unit_innovations(start, scale)
        size = (guess.loading / scale.unsqueeze(-1)).square().mean().clamp(min=SIGNAL[1] / 10.0)
        signal.append(size)
        weights, rotation = gauge_fix(guess.loading / scale.unsqueeze(-1) / size.sqrt(), start.pivots)
        values[f"weights_{name}"] = weights
        dynamics[place, place] = rotation.mT @ guess.dynamics @ rotation
    coupled = dynamics[: layout.regional, : layout.regional]
    coupled *= min(1.0, LARGEST / float(spectral_radius(coupled)))
    values["network"] = layout.vector(dynamics)
    if model.edge_prior == HORSESHOE:
        values["network"] = torch.cat([values["network"], torch.zeros(1 + len(layout.edges), dtype=torch.float64)])
    values["signal_variance"] = torch.stack(signal)
    values["initial_variance"] = torch.full((layout.num_regions + 1,), 5.0, dtype=torch.float64)
    if recording.observations is not None:
        values |= model.readout.initial_values(recording)
    if recording.num_inputs:
        values["drive"] = torch.zeros(layout.regional, recording.num_inputs, dtype=torch.float64)
    bumps = model.num_bumps(recording)
    if bumps:
        values["bump_variance"] = torch.full((layout.num_regions,), 0.01, dtype=torch.float64)
        values["bumps"] = torch.zeros(layout.regional, *bumps, dtype=torch.float64)
    if model.shared_innovations:
        shape = (layout.regional, model.shared_innovations)
        values["innovations"] = 0.05 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if bumps and model.shared_courses:
        values["course_variance"] = torch.full((1,), 0.01, dtype=torch.float64)
        course, weight = (model.shared_courses, *bumps), (layout.regional, model.shared_courses)
        values["course"] = 0.1 * torch.randn(course, generator=generator, dtype=torch.float64)
        values["course_weight"] = torch.randn(weight, generator=generator, dtype=torch.float64)
    return {name: value.to(recording.scale.device) for name, value in values.items()}
