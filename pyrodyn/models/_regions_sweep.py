"""Blocked Gibbs sampling of coupled regions: what each move needs of the model, and in which order they come."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrodyn.conditionals.edges import EdgeToggle
from pyrodyn.conditionals.paths import LEAST_CURVATURE, Reference, factors, gaussian_path, settled, turned_path
from pyrodyn.conditionals.regression import SourceSets
from pyrodyn.conditionals.surrogate import Quadratic, blocks
from pyrodyn.conditionals.units import UnitMoves
from pyrodyn.conditioning import gaussian_potential
from pyrodyn.distributions import GaussMarkov, HorseshoeNetwork, NetworkPrior
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.distributions.network import LEVEL_PERSISTENCE
from pyrodyn.models._regions import MultiRegionParameters
from pyrodyn.models._regions_network import common_signs, learn, locked_entropy, move_network, scatter
from pyrodyn.models._regions_rows import draw_courses, draw_rows, place_regressors
from pyrodyn.models._regions_scales import apart_from_courses, draw_edge_scales, draw_variances, rescale
from pyrodyn.program import Labelled, global_laws, globals_given
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

if TYPE_CHECKING:
    from pyrodyn.models.multi_region_lds import MultiRegionLDS

State = dict[str, Tensor]
_PARAMETERS = frozenset(
    "dynamics innovation_loading loading offset noise initial_variance time_locked input_gain".split()
)
ROUNDS = 6  # of settling the first reference
AVERAGED = (0.1, 0.5)  # share of the warm-up over which the reference is averaged
CAUTION = 1.5  # factor of the curvature that proposals are made with, before it adapts
_VARIANCES = ("signal_variance", "initial_variance", "bump_variance", "course_variance")
_REFERENCE = ("centre", "score", "curvature")
_SUMS = ("centre_sum", "score_sum", "curvature_sum")


class RegionSweep:
    """Moves for the unknowns of a `MultiRegionLDS`, each (chain, ...), in a gauge that is left free while sampling.

    Loadings are iid normal while the chain runs and are turned into the model's gauge when handed out: the two have the
    same law, and a regression of a full row is exact where that of a triangular one is not.
    """

    # Where regressors stand, and one regression a region: `place_regressors`.
    shared: slice
    locked: slice
    driven: slice
    fixed: Tensor | None  # (trial x bin, regressor): of bins after the first
    fixed_gram: Tensor | None
    targets: list[tuple[slice, SourceSets, Tensor, Tensor, list[int]]]

    def __init__(
        self,
        model: MultiRegionLDS,
        recording: Recording,
        observations: Tensor | None = None,
        given: Callable[[State], NetworkPrior] | None = None,
    ) -> None:
        self.model, self.recording, self.given = model, recording, given
        # Groups of chains may see different data: (group, trial, time, unit).
        self.values = recording.values.unsqueeze(0) if observations is None else observations
        self.layout = model.layout(recording)
        self.law = model.network_prior(recording)
        self.regions = model.regions(recording)
        self.scale = model.readout.signal_scale(recording)
        laws = global_laws(model, recording)
        self.offset_prior = laws["offset"].base_dist
        self.event_dims = {name: len(law.event_shape) for name, law in laws.items()}
        name = model.readout.noise_name
        self.noise_prior = None if name is None else laws[name].base_dist
        self.readout, self.noisy = model.readout.bound(recording), model.readout.noisy(recording)
        windows = [(units, place) for (_, _, units), place in zip(self.regions, self.layout.places, strict=True)]
        self.units = UnitMoves(self.readout, windows, self.offset_prior, self.noisy, self.noise_prior, recording.mask)
        self.bumps = model.num_bumps(recording)
        self.slab = self.law.slab if isinstance(self.law, HorseshoeNetwork) else self.law
        self.rows, self.toggle = blocks(self.slab), EdgeToggle(self.slab)
        place_regressors(self)

    # ------------------------------------------------------------------------------------------ start and end

    def start(self, values: dict[str, Tensor], chains: int, extra: State | None = None) -> State:
        """Chains about ``values`` (*event) or (group, *event), each with a network and time-locked inputs of its own.

        ``extra`` (chain, ...) is what a prior that is not the model's own depends on.
        """
        grouped = {
            name: value if value.dim() > self.event_dims[name] else value.unsqueeze(0) for name, value in values.items()
        }
        parameters = globals_given(
            self.model, {name: value.unsqueeze(1) for name, value in grouped.items()}, self.recording
        )
        held: State = {
            name: value.squeeze(1).clone()
            for name, value in parameters._asdict().items()
            if value is not None and name != "initial_variance"
        }
        held |= {n: grouped[n].clone() for n in (*_VARIANCES, "course", "course_weight") if n in grouped}
        if self.bumps:
            held["time_locked"] = held["time_locked"].flatten(-2)
        if "course" in held:
            held["course_weight"] = held["course_variance"].sqrt().unsqueeze(-1) * held["course_weight"]
            held["course"] = held["course"].flatten(-2)
        if isinstance(self.law, HorseshoeNetwork):
            held["edge_scales"] = self.law.split(grouped["network"])[1].clone()
        groups = len(held["dynamics"])
        self.divide(groups)
        state: State = {"aim": held["loading"].clone(), "aim_common": held["dynamics"].clone()}
        prior, readout = factors(self.model, parameters, self.recording)
        if not self.model.readout.is_gaussian:
            self._refer(state, settled(prior, readout, self.values, None, ROUNDS))
        quadratic = learn(self, state, held)
        state |= {name: value.repeat_interleave(chains, 0) for name, value in held.items()} | (extra or {})
        shape = (groups * chains, self.recording.num_trials, self.recording.num_bins, self.layout.size)
        state["path"] = torch.zeros(shape, dtype=torch.float64)
        if "noise" in state:
            state["noise_step"] = torch.full_like(state["noise"][:, self.noisy], 0.1)
        state["caution"] = torch.full((groups * chains,), CAUTION, dtype=torch.float64)
        scatter(self, state, Quadratic(*(part.repeat_interleave(chains, 0) for part in quadratic)))
        near = self.near(state, self.parameters(state))[1]
        state["path"] = near.draw(torch.randn_like(state["path"]))
        return state

    def sites(self, state: State) -> dict[str, Tensor]:
        """The values (chain, *event) of the program's sites, in the model's gauge."""
        found, turn = self._gauged(state)
        layout, back = self.layout, turn.mT
        regional = layout.regional
        found["network"] = layout.vector(back @ state["dynamics"] @ turn)
        if "edge_scales" in state:
            found["network"] = torch.cat([found["network"], state["edge_scales"]], -1)
        found |= {name: state[name] for name in ("signal_variance", "initial_variance", "offset")}
        if "noise" in state:
            found[str(self.model.readout.noise_name)] = state["noise"][:, self.noisy]
        if "input_gain" in state:
            found["drive"] = back[:, :regional, :regional] @ state["input_gain"] * self.recording.input_scale
        if self.bumps:
            size = state["bump_variance"][:, layout.group[:regional]].sqrt()
            heights = back[:, :regional, :regional] @ apart_from_courses(state) / size.unsqueeze(-1)
            found |= {"bump_variance": state["bump_variance"], "bumps": heights.unflatten(-1, self.bumps)}
        if self.bumps and "course" in state:
            found["course"] = state["course"].unflatten(-1, self.bumps)
            size = state["course_variance"].sqrt().unsqueeze(-1)
            found["course_variance"] = state["course_variance"]
            found["course_weight"] = back[:, :regional, :regional] @ state["course_weight"] / size
        if self.model.shared_innovations:
            found["innovations"] = (back @ state["innovation_loading"])[:, :regional]
        return found

    def entropy(self, state: State) -> Tensor:
        """Of the dynamics whose edges are there, (chain), as far as the information that chains propose with tells, and
        of the time-locked heights, less that of their prior.
        """
        vector = self.layout.vector(state["dynamics"])
        there = (vector != 0.0).to(vector.dtype)
        precision = state["information"] + torch.diag_embed(self.prior(state).weight.expand_as(vector))
        precision = there.unsqueeze(-1) * precision * there.unsqueeze(-2) + torch.diag_embed(1.0 - there)
        found = 0.5 * (math.log(2.0 * math.pi * math.e) * there.sum(-1) - torch.logdet(precision))
        return found + locked_entropy(self, state) if self.bumps else found

    def join(self, state: State, other: State) -> State:
        """Half of the chains of two starts; common latents of the other take the signs of the first."""
        regional, other = self.layout.regional, dict(other)
        one, two = (part["path"][..., regional:].mean(0) for part in (state, other))
        sign = torch.ones(self.layout.size, dtype=torch.float64)
        sign[regional:] = torch.where((one * two).sum((0, 1)) < 0.0, -1.0, 1.0)
        self._turn(other, sign.diag().expand(len(other["path"]), -1, -1))
        pairs = sign.unsqueeze(-1) * sign
        other["aim_common"] = other["aim_common"] * pairs
        entries = self.layout.vector(pairs)
        other["information"] = other["information"] * entries.unsqueeze(-1) * entries
        self.divide(2)
        half, joined = len(state["path"]) // 2, dict(state)
        for name, value in state.items():
            if value.dim():  # what a start has for all of its chains has a length of one
                joined[name] = torch.cat([p if len(p) == 1 else p[:half] for p in (value, other[name])])
        return joined

    def divide(self, groups: int) -> None:
        """From now on chains come in groups, with loadings to be turned to and a reference of their own."""
        self.values = self.values.expand(groups, *self.values.shape[-3:])

    def details(self, state: State) -> Labelled:
        """Log odds that an edge is there, all other edges being as they are; of those that may be absent."""
        if "edge_log_odds" not in state:
            return {}
        size = self.layout.num_regions
        odds = torch.full((len(state["dynamics"]), size, size), torch.nan, dtype=torch.float64)
        target, source = torch.tensor(self.layout.edges)[self.toggle.which].mT
        odds[:, target, source] = state["edge_log_odds"]
        return {"edge_log_odds": (("target", "source"), odds)}

    def local(self, state: State) -> dict[str, Tensor]:
        """The paths (chain, trial, time, latent), in the model's gauge."""
        return {"latent": state["path"] @ self._gauged(state)[1].unsqueeze(1)}

    def _gauged(self, state: State) -> tuple[dict[str, Tensor], Tensor]:
        """Weights of the loadings in the model's gauge, and the turn (chain, latent, latent) of the latents into it."""
        layout = self.layout
        turns, found = [], {}
        for (name, _, units), place, pivots, r in zip(
            self.regions, layout.places, self.model.pivots(self.recording), range(layout.num_regions), strict=True
        ):
            size = state["signal_variance"][:, r, None, None].sqrt() * self.scale[units].unsqueeze(-1)
            found[f"weights_{name}"], rotation = gauge_fix(state["loading"][:, units, place] / size, pivots)
            turns.append(rotation)
        turn = torch.eye(layout.size, dtype=torch.float64).repeat(len(state["dynamics"]), 1, 1)
        for place, rotation in zip(layout.places, turns, strict=True):
            turn[:, place, place] = rotation
        return found, turn

    # ------------------------------------------------------------------------------------------ one sweep

    def sweep(self, state: State, share: float) -> State:
        """Every unknown anew; ``share`` of the warm-up that is done, 1 after it: then the posterior stays as it is."""
        state = dict(state)
        self._align(state)
        move_network(self, state, share < 1.0)
        self._path(state)
        self._adapt(state, share)
        draw_rows(self, state)
        draw_courses(self, state)
        rescale(self, state)
        draw_variances(self, state)
        draw_edge_scales(self, state)
        self.units.draw(state, self.seen(state), self._loading_variance(state), share < 1.0)
        return state

    def _loading_variance(self, state: State) -> Tensor:
        """Prior variance of the loadings of every unit, (chain, unit)."""
        variance = self.scale.square().expand(len(state["loading"]), -1).clone()
        for r, (_, _, units) in enumerate(self.regions):
            variance[:, units] *= state["signal_variance"][:, r, None]
        return variance

    def parameters(self, state: State) -> MultiRegionParameters:
        def of_trials(name: str) -> Tensor:
            return state[name].unsqueeze(1)

        locked = of_trials("time_locked").unflatten(-1, self.bumps) if self.bumps else None
        return MultiRegionParameters(
            of_trials("dynamics"),
            of_trials("innovation_loading") if "innovation_loading" in state else None,
            self.model.spread_initial(of_trials("initial_variance"), self.layout),
            of_trials("loading"),
            of_trials("offset"),
            of_trials("noise") if "noise" in state else None,
            of_trials("input_gain") if "input_gain" in state else None,
            locked,
        )

    def prior(self, state: State) -> NetworkPrior:
        """Prior of every chain's dynamics, given what sessions share, or the scales of edges that are shrunk."""
        if self.given is not None:
            return self.given(state)
        return self.law.given(state["edge_scales"]) if isinstance(self.law, HorseshoeNetwork) else self.law

    def near(self, state: State, parameters: MultiRegionParameters) -> tuple[GaussMarkov, GaussMarkov, AffineReadout]:
        """Prior of the path, the same under the observations or their reference, and the readout."""
        prior, readout = factors(self.model, parameters, self.recording)
        if self.model.readout.is_gaussian:
            return prior, prior.condition(*gaussian_potential(readout, self.seen(state))), readout
        return prior, prior.condition(*self.reference(state).potential(readout)), readout

    def seen(self, state: State) -> Tensor:
        """The observations of every chain, (chain or 1, trial, time, unit)."""
        groups = len(self.values)
        return self.values if groups == 1 else self.values.repeat_interleave(len(state["loading"]) // groups, 0)

    def reference(self, state: State) -> Reference:
        found = Reference(state["centre"], state["score"], state["curvature"])
        chains = len(state["loading"]) // len(found.centre)
        return found if len(found.centre) == 1 else Reference(*(p.repeat_interleave(chains, 0) for p in found))

    def _refer(self, state: State, reference: Reference) -> None:
        curvature = reference.curvature.clamp(min=LEAST_CURVATURE)
        if self.recording.mask is not None:
            curvature = torch.where(self.recording.mask, curvature, 0.0)
        shape = (len(self.values), *self.values.shape[1:])
        for name, part in (("centre", reference.centre), ("score", reference.score), ("curvature", curvature)):
            state[name] = part.expand(shape).contiguous()

    def _path(self, state: State) -> None:
        parameters = self.parameters(state)
        prior, readout = factors(self.model, parameters, self.recording)
        seen = self.seen(state)
        if self.model.readout.is_gaussian:
            state["path"] = gaussian_path(prior, readout, seen)
            return
        state["path"], state["path_acceptance"] = turned_path(
            prior, readout, seen, state["path"], self.reference(state)
        )

    def _adapt(self, state: State, share: float) -> None:
        """Average the reference over the warm-up's middle, and learn the surrogate about where the chains now are."""
        if not self.model.readout.is_gaussian and AVERAGED[0] <= share < AVERAGED[1]:
            _, readout = factors(self.model, self.parameters(state), self.recording)
            here = Reference.about(readout, readout.predict(state["path"]), self.seen(state))
            count = float(state.get("averaged", torch.zeros(())))
            for name, part in zip(_SUMS, here, strict=True):
                part = part.unflatten(0, (len(self.values), -1)).mean(1)
                state[name] = part if not count else state[name] + (part - state[name]) / (count + 1.0)
            state["averaged"] = torch.tensor(count + 1.0)
        elif "learned" not in state and AVERAGED[1] <= share < 1.0:
            if "averaged" in state:
                self._refer(state, Reference(*(state.pop(name) for name in _SUMS)))
            state["information"] = learn(self, state, {n: v for n, v in state.items() if n in _PARAMETERS}).information
            state["caution"] = torch.full_like(state["caution"], CAUTION)
            state["learned"] = torch.ones(())

    # ------------------------------------------------------------------------------------------ one gauge

    def _align(self, state: State) -> None:
        """Turn every chain's latents towards one loading, so that what was learned in one place serves in another.

        The posterior does not see the turn; the free gauge would drift.
        """
        layout = self.layout
        chains = len(state["loading"]) // len(state["aim"])
        aim = state["aim"].repeat_interleave(chains, 0)
        turn = torch.eye(layout.size, dtype=torch.float64).repeat(len(aim), 1, 1)
        for (_, _, units), place in zip(self.regions, layout.places, strict=True):
            left, _, right = torch.linalg.svd(state["loading"][:, units, place].mT @ aim[:, units, place])
            turn[:, place, place] = left @ right
        self._turn(state, turn)
        sign = common_signs(state["dynamics"], state["aim_common"], layout)
        turn = torch.eye(layout.size, dtype=torch.float64).repeat(len(aim), 1, 1)
        turn[:, torch.arange(layout.regional, layout.size), torch.arange(layout.regional, layout.size)] = torch.where(
            sign == 0.0, 1.0, sign
        )
        self._turn(state, turn)

    def _turn(self, state: State, turn: Tensor) -> None:
        """New latents ``turn' x`` for orthogonal ``turn`` (chain, latent, latent)."""
        regional = turn[:, : self.layout.regional, : self.layout.regional]
        state["dynamics"] = turn.mT @ state["dynamics"] @ turn
        if self.layout.level:
            state["dynamics"][:, -1, -1] = LEVEL_PERSISTENCE
        state["loading"] = state["loading"] @ turn
        if "innovation_loading" in state:
            state["innovation_loading"] = turn.mT @ state["innovation_loading"]
        state["path"] = state["path"] @ turn.unsqueeze(1)
        for name in ("time_locked", "course_weight", "input_gain"):
            if name in state:
                state[name] = regional.mT @ state[name]
