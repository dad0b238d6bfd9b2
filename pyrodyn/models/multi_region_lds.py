r"""Coupled regions: a hierarchical linear dynamical system with a posterior over who drives whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.distributions import (
    GaugedLoading,
    GaussMarkov,
    HorseshoeNetwork,
    NetworkLayout,
    NetworkPrior,
    Transition,
    network_layout,
)
from pyrodyn.distributions.network import LEVEL_PERSISTENCE
from pyrodyn.errors import ModelError
from pyrodyn.linalg.matrix import of_all_trials
from pyrodyn.models import _regions
from pyrodyn.models import _regions_posterior as labels
from pyrodyn.models._regions import (
    BINS_A_BUMP,
    BUMPS,
    COURSES,
    HORSESHOE,
    INITIAL,
    INNOVATION_SD,
    MOST_BUMPS,
    SIGNAL,
    SPIKE,
    Edge,
    MultiRegionParameters,
)
from pyrodyn.models._regions_sweep import RegionSweep
from pyrodyn.program import Labelled, StateSpaceModel, Values
from pyrodyn.readouts import AffineReadout, PerRegion, Poisson, Readout, as_readout
from pyrodyn.recording import Recording

# Of the guess of a network, where edges begin that the simpler model had not: large ones turn what is common into
# coupling before the climb has weighed the two (an edge in one system of eight, and a mode 880 nats below another).
FIRST_EDGES = 0.1


@dataclass(frozen=True)
class MultiRegionLDS(StateSpaceModel):
    r"""Coupled linear dynamics of several regions, with what they share.

    With :math:`x^r` the latents of region r and g the global ones,

    .. math::
        x^r_t &= A_{rr} x^r_{t-1} + \sum_{s \ne r} z_{rs} A_{rs} x^s_{t-1} + B_r g_{t-1} + b_r \ell + D_r u_t
            + U_r \varphi_{c, t} + \Gamma_r \xi_t + \epsilon^r_t, \\
        g_t &= \mathrm{diag}(a)\, g_{t-1} + \epsilon^g_t, \qquad
        \eta_t^r = C_r x^r_t + d_r, \qquad y_{t,n} \sim p(\cdot \mid \eta_{t,n}),

    with iid standard normal :math:`\epsilon` and :math:`\xi`. Edges :math:`z_{rs} \in \{0, 1\}` may run both ways. What
    would imitate coupling has a place of its own: innovations :math:`\xi` shared by regions, an input :math:`\varphi`
    locked to the time of the trial (hat functions, for every condition), and a level :math:`\ell` of the trial. The
    heights of the hats are :math:`U = W \Psi + V`, with courses :math:`\Psi` that all latents share.

    **Gauge.** Private innovations have unit covariance; the rotation left in each region is fixed by a loading that is
    lower triangular in pivot units (see `GaugedLoading`). The priors of blocks are invariant under these rotations.

    **Priors.** Entries of :math:`A_{rr}` are normal about ``persistence`` times the identity; a block
    :math:`A_{rs}` has a Frobenius norm of ``coupling_scale`` (root mean square, divided by the root of the expected
    number of sources of r, and times the scale of its edge); edges are there with their prior probability; what enters
    from a global latent has a standard deviation of .25, from the level .03; and the whole is stable (see
    `NetworkPrior`). The scales of signals and initial states are learned, and those of time-locked inputs: in each
    region that of its own heights, and one of the weights of courses. The squares of these two have an inverse-gamma
    prior of shape 1/2 and rate 1e-7, near zero unless the data ask for more.

    Parameters
    ----------
    latent_dim : int or mapping of region to int
        Latents of each region. An int serves for every region of the recording.
    edges : networkx.DiGraph or sequence of (source, target[, probability[, scale]]), optional
        Edges that may exist; all by default. An edge attribute ``probability`` is its prior probability; ``scale``,
        1 where it is not given, multiplies the prior scale of its block. Weights of a connectome can be either.
    edge_probability : float
        Prior probability of edges that state none. 1 keeps all edges.
    edge_prior : str
        "spike-and-slab", under which an edge is there or not, or "horseshoe", under which it is shrunk towards zero or
        left alone, without a border between (see `HorseshoeNetwork`). Then `coupling_graph` gives the probability that
        a strength exceeds a region of practical equivalence to zero.
    global_dim : int
        Shared global latents.
    shared_innovations : int
        Rank of the innovations shared by regions.
    trial_level : bool
        Whether each trial has a level of its own that enters all regions.
    time_bumps : int, optional
        Hat functions of the time-locked input; 0 for none. By default one for every five bins, and no more than 40:
        what is locked to time and finer than they are passes for coupling. Ignored where each condition has a single
        trial. Its scales are learned: sampled, they are near zero where the data show no such input. An engine that
        looks for a mode leaves them wide: there ask for 0.
    shared_courses : int
        Rank of what the time-locked inputs of all latents have in common. A drive that all regions share costs its
        course once; were it paid for in every latent, edges from one region that has it to the others would be cheaper.
    conditions : sequence of str
        Conditions with a time-locked input of their own. By default all trials share one.
    readout : Readout, or mapping of region to Readout
        A mapping gives every region a law of its own: ``{"V1": Poisson(), "LFP": Gaussian()}``.
    coupling_scale, persistence : float

    Notes
    -----
    With spikes, an engine that moves by gradients keeps all edges; `inference.Gibbs` samples them. With a horseshoe,
    all engines face the same posterior.

    References
    ----------
    Glaser et al., NeurIPS 2020 (coupled populations); George & McCulloch, JASA 88:881 (1993), on spike and slab.
    """

    latent_dim: int | Mapping[str, int] | tuple[tuple[str, int], ...]
    edges: Any = None
    edge_probability: float = 0.5
    edge_prior: str = SPIKE
    global_dim: int = 1
    shared_innovations: int = 1
    trial_level: bool = True
    time_bumps: int | None = None
    shared_courses: int = 1
    conditions: tuple[str, ...] = ()
    readout: Readout | PerRegion = field(default_factory=Poisson)
    coupling_scale: float = 0.35
    persistence: float = 0.7

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        keep("latent_dim", _regions.checked_dims(self.latent_dim))
        keep("edges", _regions.checked_edges(self.edges, self.edge_probability))
        keep("conditions", tuple(str(name) for name in self.conditions))
        for name in ("global_dim", "shared_innovations", "time_bumps", "shared_courses"):
            value = getattr(self, name)
            if name == "time_bumps" and value is None:
                continue
            if not isinstance(value, int) or value < 0:
                raise ModelError(f"{name} must be a whole number of 0 or more, got {value!r}")
        if self.time_bumps == 1:
            raise ModelError("time_bumps must be 0 or at least 2, got 1: one hat function has no width")
        if not 0.0 < self.edge_probability <= 1.0:
            raise ModelError(f"edge_probability must lie in (0, 1], got {self.edge_probability!r}")
        if self.edge_prior not in (SPIKE, HORSESHOE):
            raise ModelError(f"edge_prior must be {SPIKE!r} or {HORSESHOE!r}, got {self.edge_prior!r}")
        if not self.coupling_scale > 0:
            raise ModelError(f"coupling_scale must be positive, got {self.coupling_scale!r}")
        if not -1.0 < self.persistence < 1.0:
            raise ModelError(f"persistence must lie between -1 and 1, got {self.persistence!r}")
        keep("readout", as_readout(self.readout))

    # ------------------------------------------------------------------------------------------ the program

    def check(self, recording: Recording) -> None:
        _regions.check(self, recording)
        self.readout.check(recording)

    def sample_globals(self, recording: Recording) -> MultiRegionParameters:
        layout, like = self.layout(recording), recording.scale
        zero = torch.zeros((), dtype=torch.float64, device=like.device)
        regional, regions = layout.regional, layout.num_regions
        network = pyro.sample("network", self.network_prior(recording))
        signal = pyro.sample("signal_variance", dist.InverseGamma(*_rates(SIGNAL, zero, regions)).to_event(1))
        start = pyro.sample("initial_variance", dist.InverseGamma(*_rates(INITIAL, zero, regions + 1)).to_event(1))
        blocks = []
        for r, (name, dim, units) in enumerate(self.regions(recording)):
            weights = pyro.sample(f"weights_{name}", GaugedLoading(len(units), dim, self.pivots(recording)[r]))
            scale = self.readout.signal_scale(recording)[units].unsqueeze(-1)
            blocks.append(signal[..., r, None, None].sqrt() * scale * weights)
        offset = self.readout.sample_offset(recording)
        noise = self.readout.sample_noise(recording)
        gain = time_locked = None
        if recording.num_inputs:
            drive = pyro.sample("drive", dist.Normal(zero.expand(regional, recording.num_inputs), 1.0).to_event(2))
            gain = drive / recording.input_scale
        bumps = self.num_bumps(recording)
        if bumps:
            variance = pyro.sample("bump_variance", dist.InverseGamma(*_rates(BUMPS, zero, regions)).to_event(1))
            heights = pyro.sample("bumps", dist.Normal(zero.expand(regional, *bumps), 1.0).to_event(3))
            time_locked = variance[..., layout.group[:regional], None, None].sqrt() * heights
            if self.shared_courses:
                shape = (self.shared_courses, *bumps)
                course = pyro.sample("course", dist.Normal(zero.expand(shape), 1.0).to_event(3))
                spread = pyro.sample("course_variance", dist.InverseGamma(*_rates(COURSES, zero, 1)).to_event(1))
                prior = dist.Normal(zero.expand(regional, self.shared_courses), 1.0)
                weight = spread.sqrt().unsqueeze(-1) * pyro.sample("course_weight", prior.to_event(2))
                time_locked = time_locked + torch.einsum("...ik,...kcb->...icb", weight, course)
        shared = None
        if self.shared_innovations:
            prior = dist.Normal(zero.expand(regional, self.shared_innovations), INNOVATION_SD)
            own = pyro.sample("innovations", prior.to_event(2))
            shared = torch.cat([own, own.new_zeros(*own.shape[:-2], layout.size - regional, own.shape[-1])], -2)
        return MultiRegionParameters(
            layout.matrix(network[..., : len(layout.edge)]),
            shared,
            self.spread_initial(start, layout),
            self.join_loading(blocks, recording),
            offset,
            noise,
            gain,
            time_locked,
        )

    def latent_path(self, parameters: MultiRegionParameters, recording: Recording) -> GaussMarkov:
        return self.transition(parameters, recording).path(recording.num_bins)

    def readout_law(self, parameters: MultiRegionParameters, path: Tensor, recording: Recording) -> AffineReadout:
        law = self.readout.bound(recording)
        return AffineReadout(law, path, parameters.loading, parameters.offset, parameters.noise, recording.mask)

    # ------------------------------------------------------------------------------------------ its parts

    def regions(self, recording: Recording) -> list[tuple[str, int, Tensor]]:
        """Name, latents and positions of the units of every region."""
        return _regions.regions_of(self, recording)

    def layout(self, recording: Recording) -> NetworkLayout:
        """How the dynamics stand in one vector."""
        names = [name for name, _, _ in self.regions(recording)]
        dims = tuple(dim for _, dim, _ in self.regions(recording))
        edges = tuple((names.index(edge.target), names.index(edge.source)) for edge in self.possible_edges(recording))
        return network_layout(dims, self.global_dim, self.trial_level, edges)

    def possible_edges(self, recording: Recording) -> tuple[Edge, ...]:
        """The edges that may exist among the regions of a recording."""
        return _regions.possible_edges(self, recording)

    def network_prior(self, recording: Recording) -> NetworkPrior | HorseshoeNetwork:
        """Prior of the dynamics."""
        layout, device, edges = self.layout(recording), recording.scale.device, self.possible_edges(recording)
        probability = torch.tensor([edge.probability for edge in edges], dtype=torch.float64)
        mean, sd = _regions.entry_prior(layout, edges, self.persistence, self.coupling_scale)
        kind = HorseshoeNetwork if self.edge_prior == HORSESHOE else NetworkPrior
        return kind(layout, mean.to(device), sd.to(device), probability.to(device))

    def num_bumps(self, recording: Recording) -> tuple[int, int] | None:
        """Conditions and hat functions of the time-locked input; None where there is none."""
        conditions, bumps = max(1, len(self.conditions)), self.time_bumps
        if bumps is None:
            bumps = min(recording.num_bins // BINS_A_BUMP, MOST_BUMPS)
        if bumps < 2 or recording.num_trials <= conditions or recording.num_bins < bumps:
            return None
        return conditions, bumps

    def design(self, recording: Recording, bumps: int) -> Tensor:
        """The time-locked input :math:`\\varphi` of every trial, (trial, time, condition x bump)."""
        return _regions.design(self, recording, bumps)

    def transition(self, parameters: MultiRegionParameters, recording: Recording) -> Transition:
        """The step from bin to bin, which an intervention changes; see `pyrodyn.intervene`."""
        return Transition(
            parameters.dynamics,
            self.process_noise(parameters, self.layout(recording)),
            torch.diag_embed(parameters.initial_variance),
            self.drift(parameters, recording),
        )

    def process_noise(self, parameters: MultiRegionParameters, layout: NetworkLayout) -> Tensor:
        """Covariance of the innovations, private and shared, (*draw, 1, latent, latent)."""
        own, shared = self.own_noise(parameters, layout), parameters.innovation_loading
        return own if shared is None else own + shared @ shared.mT

    def own_noise(self, parameters: MultiRegionParameters, layout: NetworkLayout) -> Tensor:
        """Covariance of the private innovations, diagonal, (*draw, 1, latent, latent)."""
        like = parameters.dynamics
        own = torch.ones(layout.size, dtype=like.dtype, device=like.device)
        if layout.level:
            own[-1] = 1.0 - LEVEL_PERSISTENCE**2
        return own.diag().expand_as(like)

    def drift(self, parameters: MultiRegionParameters, recording: Recording) -> Tensor | None:
        """What inputs add to the latents from the second bin on, (*draw, trial or 1, time - 1, latent), or None."""
        regional, total = self.layout(recording).regional, None
        if parameters.input_gain is not None and recording.inputs is not None:
            total = recording.inputs[:, 1:] @ parameters.input_gain.mT
        if parameters.time_locked is not None:
            locked = parameters.time_locked
            design = self.design(recording, locked.shape[-1])[:, 1:]
            if len(self.conditions) < 2:
                design = design[:1]  # the same in all trials
            locked = of_all_trials(design, locked.flatten(-2).mT)
            total = locked if total is None else total + locked
        if total is None:
            return None
        rest = self.layout(recording).size - regional
        return torch.cat([total, total.new_zeros(*total.shape[:-1], rest)], -1)

    def spread_initial(self, variance: Tensor, layout: NetworkLayout) -> Tensor:
        """Initial variance of every latent, from one for each region and one for the global latents."""
        index = layout.group.clone()
        index[layout.regional :] = layout.num_regions
        spread = variance[..., index]
        if layout.level:
            spread = torch.cat([spread[..., :-1], torch.ones_like(spread[..., -1:])], -1)
        return spread

    def join_loading(self, blocks: list[Tensor], recording: Recording) -> Tensor:
        """The loading (*draw, unit, latent) of all regions, zero where a unit does not see a latent."""
        layout = self.layout(recording)
        joined = blocks[0].new_zeros(*blocks[0].shape[:-2], recording.num_units, layout.size)
        for block, place, (_, _, units) in zip(blocks, layout.places, self.regions(recording), strict=True):
            wide = torch.nn.functional.pad(block, (place.start, layout.size - place.stop))
            joined = joined.index_copy(-2, units, wide)
        return joined

    def pivots(self, recording: Recording) -> list[tuple[int, ...]]:
        """In each region, the positions among its units of those whose loading rows fix the rotation."""
        return [start.pivots for start in _regions.starts(self, recording)]

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        return _regions.initial_values(self, recording)

    def simpler(
        self, recording: Recording
    ) -> tuple[MultiRegionLDS, Callable[[Values], Values], Callable[[Values], Values]] | None:
        """The model without the edges that may be absent, at whose mode `inference.Gibbs` tries to start.

        What imitates coupling is so tried before coupling is. A horseshoe has no absent edges and no simpler model.
        """
        edges = self.possible_edges(recording)
        sure = tuple(edge for edge in edges if edge.probability == 1.0)
        if self.edge_prior == HORSESHOE or len(sure) == len(edges):
            return None
        inner, layout = replace(self, edges=sure), self.layout(recording)

        def widened(values: Values) -> Values:
            dynamics = inner.layout(recording).matrix(values["network"])
            return values | {"network": layout.vector(dynamics)}

        def filled(values: Values) -> Values:
            held, guess = widened(values)["network"], self.initial_values(recording)["network"]
            return values | {"network": torch.where(held == 0.0, FIRST_EDGES * guess, held)}

        return inner, widened, filled

    # ------------------------------------------------------------------------------------------ the posterior

    def coordinates(self, recording: Recording) -> dict[str, Any]:
        return labels.coordinates(self, recording)

    def attributes(self, recording: Recording) -> dict[str, Any]:
        return labels.attributes(self, recording)

    def label(self, parameters: MultiRegionParameters) -> Labelled:
        labelled: Labelled = {
            "dynamics": (("latent", "latent_from"), parameters.dynamics),
            "process_noise": (("latent", "latent_from"), self.process_noise(parameters, self.layout_of(parameters))),
            "initial_variance": (("latent",), parameters.initial_variance),
            "loading": (("unit", "latent"), parameters.loading),
            "offset": (("unit",), parameters.offset),
        }
        if self.readout.noise_name is not None and parameters.noise is not None:
            labelled[self.readout.noise_name] = (("unit",), parameters.noise)
        if parameters.innovation_loading is not None:
            labelled["innovation_loading"] = (("latent", "shared"), parameters.innovation_loading)
        if parameters.input_gain is not None:
            labelled["input_gain"] = (("regional_latent", "input"), parameters.input_gain)
        if parameters.time_locked is not None:
            labelled["time_locked"] = (("regional_latent", "condition", "bump"), parameters.time_locked)
        return labelled

    def unlabel(self, values: Mapping[str, Tensor]) -> MultiRegionParameters:
        noise = None if self.readout.noise_name is None else values[self.readout.noise_name]
        return MultiRegionParameters(
            values["dynamics"], values.get("innovation_loading"), values["initial_variance"], values["loading"],
            values["offset"], noise, values.get("input_gain"), values.get("time_locked"),
        )  # fmt: skip

    def invariants(self, parameters: MultiRegionParameters) -> Labelled:
        return labels.invariants(self, parameters)

    def transformed(self, parameters: MultiRegionParameters, recording: Recording, seed: int) -> MultiRegionParameters:
        return labels.transformed(self, parameters, recording, seed)

    def log_copies(self, recording: Recording) -> float:
        """Signs and order of the global latents; the signs of the trial's level, of one shared innovation, one course.

        Several of the last two may be turned, a symmetry without separate modes; it counts for nothing here.
        """
        layout = self.layout(recording)
        signs = layout.num_globals + int(layout.level) + (self.shared_innovations == 1)
        signs += self.shared_courses == 1 and self.num_bumps(recording) is not None
        return signs * math.log(2.0) + math.lgamma(layout.num_globals + 1)

    def conditionals(self, recording: Recording, observations: Tensor | None = None) -> RegionSweep:
        """The moves of blocked Gibbs sampling; see `inference.Gibbs`."""
        return RegionSweep(self, recording, observations)

    def layout_of(self, parameters: MultiRegionParameters) -> NetworkLayout:
        """The layout, without edges, of parameters whose recording is not at hand."""
        size = parameters.dynamics.shape[-1]
        seen = (parameters.loading != 0.0).flatten(0, -2).any(0)  # what is common to all regions has no loading
        regional = int(seen.sum())
        level = size - regional > self.global_dim
        if isinstance(self.latent_dim, int):
            dims = (self.latent_dim,) * (regional // self.latent_dim)
        else:
            dims = tuple(dim for _, dim in self.latent_dim)
        return network_layout(dims, self.global_dim, level, ())


def _rates(prior: tuple[float, float], zero: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return zero.expand(size) + prior[0], zero.expand(size) + prior[1]
