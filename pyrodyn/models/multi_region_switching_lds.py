r"""Coupled regions whose dynamics, within and between them, switch with one hidden mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pyrodyn.errors import ModelError
from pyrodyn.linalg.stationary import block_strength, stationary_covariance
from pyrodyn.models import _regions
from pyrodyn.models import _regions_posterior as labels
from pyrodyn.models._startup import LinearStart
from pyrodyn.models._switching import StepPrior
from pyrodyn.models._switching_blocks import Blocks, View
from pyrodyn.models._switching_checks import check_modes, check_options
from pyrodyn.models._switching_model import SwitchingModel, SwitchingParameters
from pyrodyn.program import Labelled
from pyrodyn.readouts import PerRegion, Poisson, Readout, as_readout
from pyrodyn.recording import Recording


@dataclass(frozen=True)
class MultiRegionSwitchingLDS(SwitchingModel):
    r"""Switching linear dynamics of several regions: who drives whom depends on a mode that all regions share.

    With :math:`x^r` the latents of region r, and x those of all regions,

    .. math::
        z_t \mid z_{t-1}, x_{t-1} &\sim \mathrm{softmax}\big(\log P_{z_{t-1}} + R x_{t-1} + r + W u_t\big), \\
        x^r_1 &\sim N(0, I), \qquad
        x^r_t = A^{z_t}_{rr} x^r_{t-1} + \sum_{s \to r} A^{z_t}_{rs} x^s_{t-1} + b^{z_t}_r + B^{z_t}_r u_t
            + \epsilon^r_t, \qquad \epsilon^r_t \sim N(0, Q^{z_t}_r), \\
        \eta_t^r &= C_r x^r_t + d_r, \qquad y_{t,n} \sim p(\cdot \mid \eta_{t,n}).

    R, r and W are there with ``recurrent`` alone. Given the path the modes are summed out exactly, as in
    `SwitchingLDS`; with one mode it is a linear system of coupled regions with a bias.

    **Gauge.** The rotation of each region's latents is fixed by a loading that is lower triangular in pivot units, as
    in `MultiRegionLDS`, and the priors of blocks are invariant under it. The numbers of the modes are exchangeable.

    **Priors.** Those of `pyrodyn.models._switching.StepPrior`. The entries of a block :math:`A^k_{rs}` are normal, for
    every mode by itself; all edges are there, and `coupling_graph` gives, mode by mode, the probability that one is
    needed (`savage_dickey`). What is common to all regions, such as the global latents of `MultiRegionLDS`, has no
    place of its own here: it may appear as coupling in all modes alike.

    Parameters
    ----------
    num_modes : int
    latent_dim : int or mapping of region to int
        Latents of each region. An int serves for every region of the recording.
    edges : networkx.DiGraph or sequence of (source, target[, probability[, scale]]), optional
        Edges that may exist, in all modes; all by default. Edge attributes ``probability`` and ``scale`` are as in
        `MultiRegionLDS`.
    edge_probability : float
        Prior probability of edges that state none, in every mode.
    recurrent : bool
        Whether the states of all regions, and the inputs, enter the transitions.
    readout : Readout, or mapping of region to Readout
    coupling_scale : float
        Root mean square of the Frobenius norm of the blocks of all edges into a region, where all have a scale of 1.
    stickiness, concentration, persistence, dynamics_scale, bias_scale : float
        As in `SwitchingLDS`.
    max_radius : float
        Bound of every mode's spectral radius, at most 1: coupling is measured against a mode's stationary law.

    References
    ----------
    Glaser, Whiteway, Cunningham, Paninski & Linderman, NeurIPS 2020.
    """

    num_modes: int
    latent_dim: int | Mapping[str, int] | tuple[tuple[str, int], ...]
    edges: Any = None
    edge_probability: float = 0.5
    recurrent: bool = False
    readout: Readout | PerRegion = field(default_factory=Poisson)
    coupling_scale: float = 0.35
    stickiness: float = 10.0
    concentration: float = 1.0
    persistence: float = 0.85
    dynamics_scale: float = 0.25
    bias_scale: float = 0.5
    max_radius: float = 1.0

    def __post_init__(self) -> None:
        check_options(self)
        for name, value in (
            ("latent_dim", _regions.checked_dims(self.latent_dim)),
            ("edges", _regions.checked_edges(self.edges, self.edge_probability)),
            ("readout", as_readout(self.readout)),
        ):
            object.__setattr__(self, name, value)
        if not self.max_radius <= 1.0:
            raise ModelError(
                f"max_radius must be at most 1, got {self.max_radius!r}: coupling is measured against the stationary "
                "law of a mode, and only a stable one has such a law"
            )
        if not 0.0 < self.edge_probability <= 1.0:
            raise ModelError(f"edge_probability must lie in (0, 1], got {self.edge_probability!r}")
        if not self.coupling_scale > 0:
            raise ModelError(f"coupling_scale must be positive, got {self.coupling_scale!r}")

    def check(self, recording: Recording) -> None:
        _regions.check_regions(self, recording)
        check_modes(self, recording, 1)
        self.readout.check(recording)

    # ------------------------------------------------------------------------------------------ its parts

    def blocks(self, recording: Recording) -> Blocks:
        """The regions, and the edges between them."""
        names, dims = zip(*((name, dim) for name, dim, _ in _regions.regions_of(self, recording)), strict=True)
        edges = _regions.possible_edges(self, recording)
        pairs = tuple((names.index(edge.target), names.index(edge.source)) for edge in edges)
        return Blocks(names, dims, pairs, tuple(self.coupling_scale * edge.scale for edge in edges))

    def step_prior(self, recording: Recording) -> StepPrior:
        return StepPrior(
            self.num_modes, self.blocks(recording), 1, recording.num_inputs, self.concentration, self.stickiness,
            self.persistence, self.dynamics_scale, self.bias_scale, self.max_radius, self.recurrent,
        )  # fmt: skip

    def views(self, recording: Recording) -> list[View]:
        regions, places = _regions.regions_of(self, recording), self.blocks(recording).places
        readout = self.readout
        laws = dict(readout.parts) if isinstance(readout, PerRegion) else dict.fromkeys(recording.regions, readout)
        return [
            View(units, place, laws[name], start.pivots)
            for (name, _, units), place, start in zip(regions, places, self.starts(recording), strict=True)
        ]

    def starts(self, recording: Recording) -> list[LinearStart]:
        return _regions.starts(self, recording)

    # ------------------------------------------------------------------------------------------ the posterior

    def coordinates(self, recording: Recording) -> dict[str, Any]:
        blocks = self.blocks(recording)
        return super().coordinates(recording) | labels.region_coordinates(blocks.names, blocks.dims)

    def attributes(self, recording: Recording) -> dict[str, Any]:
        blocks = self.blocks(recording)
        edges = _regions.possible_edges(self, recording)
        probability = [edge.probability for edge in edges]
        found = labels.edge_attributes(blocks.edges, blocks.scale, blocks.places, probability)
        return {"edge_prior": "normal"} | found

    def invariants(self, parameters: SwitchingParameters) -> Labelled:
        places = self.places_of(parameters)
        with torch.no_grad():
            covariance = stationary_covariance(parameters.dynamics, parameters.process_noise)
            strength = block_strength(parameters.dynamics, covariance, places)
        in_order = strength.sort(-3, descending=True).values  # each by itself, so that the modes' numbers do not matter
        return super().invariants(parameters) | {"coupling_strength": (("mode", "target", "source"), in_order)}

    def places_of(self, parameters: SwitchingParameters) -> tuple[slice, ...]:
        """Where each region's latents stand, of parameters whose recording is not at hand."""
        if isinstance(self.latent_dim, int):
            dims = (self.latent_dim,) * (parameters.dynamics.shape[-1] // self.latent_dim)
        else:
            dims = tuple(dim for _, dim in self.latent_dim)
        return Blocks(("",) * len(dims), dims).places  # type: ignore[arg-type]
