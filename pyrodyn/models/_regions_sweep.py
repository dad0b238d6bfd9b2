"""Blocked Gibbs sampling of coupled regions: what each move needs of the model, and in which order they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from pyrodyn.conditioning import gaussian_potential
from pyrodyn.conditionals.paths import LEAST_CURVATURE, Reference, gaussian_path, nearby_path, turned_path
from pyrodyn.conditionals.regression import SourceSets
from pyrodyn.conditionals.surrogate import BATCH_NUMBERS, NetworkProposal, Quadratic
from pyrodyn.conditionals.units import draw_coefficients, draw_noise
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.distributions.network import LEVEL_PERSISTENCE, log_stability
from pyrodyn.models._regions import BUMPS, INITIAL, INNOVATION_SD, SIGNAL, SLOW
from pyrodyn.recording import Recording

if TYPE_CHECKING:
    from pyrodyn.models.multi_region_lds import MultiRegionLDS, MultiRegionParameters

State = dict[str, Tensor]
_PARAMETERS = frozenset(
    "dynamics innovation_loading loading offset noise initial_variance time_locked input_gain".split()
)
RESCALE = 0.1  # sd of the proposed change of the logarithm of a region's scale


class RegionSweep:
    """Moves for the unknowns of a `MultiRegionLDS`, each (chain, ...), in a gauge that is left free while sampling.

    Loadings are iid normal while the chain runs and are turned into the model's gauge when handed out: the two have the
    same law, and a regression of a full row is exact where that of a triangular one is not.
    """

    def __init__(self, model: MultiRegionLDS, recording: Recording, observations: Tensor | None = None) -> None:
        self.model, self.recording = model, recording
        # (trial, time, unit) for all chains, or (chain, trial, time, unit) where groups of chains see different data.
        self.values = recording.values if observations is None else observations
        self.groups = 1 if observations is None else len(observations)
        self.layout = model.layout(recording)
        self.prior = model.network_prior(recording)
        self.regions = model.regions(recording)
        self.scale = model.readout.signal_scale(recording)
        with poutine.block(), torch.no_grad():
            trace = poutine.trace(model.sample_globals).get_trace(recording)
        nodes: Any = trace.nodes
        self.offset_prior = nodes["offset"]["fn"].base_dist
        self.event_dims = {n: len(site["fn"].event_shape) for n, site in nodes.items() if site["type"] == "sample"}
        name = model.readout.noise_name
        self.noise_prior = None if name is None else nodes[name]["fn"].base_dist
        self.bumps = model.num_bumps(recording)
        self.proposal = NetworkProposal(self.prior)
        self._place_regressors()

    # ------------------------------------------------------------------------------------------ start and end

    def start(self, values: dict[str, Tensor], chains: int) -> State:
        """Chains that start near ``values``, the model's own first guess, scattered."""
        parts = {
            name: value.expand(chains, *value.shape).clone()
            if value.dim() == self.event_dims[name]
            else value.repeat_interleave(chains, 0)
            for name, value in values.items()
        }
        if self.groups > 1:
            self.values = self.values.repeat_interleave(chains, 0)
        chains = chains * self.groups
        with poutine.block(), poutine.condition(data=parts):
            parameters = self.model.sample_globals(self.recording)
        layout, regional = self.layout, self.layout.regional
        jitter = self.layout.matrix(0.3 * self.prior.sd_entry * torch.randn(chains, len(self.prior.sd_entry)))
        if layout.level:
            jitter[..., -1, -1] = 0.0
        keep = (layout.group[:, None] == layout.group) | (layout.group < 0)
        dynamics = torch.where(keep, parameters.dynamics, 0.0)
        common = torch.zeros_like(dynamics)
        common[..., :regional, layout.common] = jitter[..., :regional, layout.common]
        state: State = {
            "dynamics": dynamics + common,
            "innovation_loading": parameters.innovation_loading,
            "loading": parameters.loading,
            "offset": parameters.offset,
            "signal_variance": parts["signal_variance"],
            "initial_variance": parts["initial_variance"],
            "steps": torch.zeros(()),
        }
        if parameters.noise is not None:
            state |= {"noise": parameters.noise, "noise_step": torch.full_like(parameters.noise, 0.1)}
        if self.bumps:
            state |= {
                "time_locked": parameters.time_locked.flatten(-2),
                "bump_variance": parts["bump_variance"],
            }
        if parameters.input_gain is not None:
            state["input_gain"] = parameters.input_gain
        shape = (chains, self.recording.num_trials, self.recording.num_bins, layout.size)
        state["path"] = torch.zeros(shape, dtype=torch.float64)
        return state

    def sites(self, state: State) -> dict[str, Tensor]:
        """The values (chain, *event) of the program's sites, in the model's gauge."""
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
        back, regional = turn.mT, layout.regional
        found["network"] = layout.vector(back @ state["dynamics"] @ turn)
        found |= {name: state[name] for name in ("signal_variance", "initial_variance", "offset")}
        if "noise" in state:
            found[str(self.model.readout.noise_name)] = state["noise"]
        if "input_gain" in state:
            found["drive"] = back[:, :regional, :regional] @ state["input_gain"] * self.recording.input_scale
        if self.bumps:
            size = state["bump_variance"][:, layout.group[:regional]].sqrt()
            heights = back[:, :regional, :regional] @ state["time_locked"] / size.unsqueeze(-1)
            found |= {"bump_variance": state["bump_variance"], "bumps": heights.unflatten(-1, self.bumps)}
        if self.model.shared_innovations:
            found["innovations"] = (back @ state["innovation_loading"])[:, :regional]
        found["latent"] = state["path"] @ turn
        return found

    # ------------------------------------------------------------------------------------------ one sweep

    def sweep(self, state: State, share: float) -> State:
        """Every unknown anew; ``share`` of the warm-up that is done, 1 after it: then the posterior stays as it is."""
        state = dict(state)
        self._align(state)
        if "slope" in state:
            self._network(state)
        self._path(state, share)
        self._adapt(state, share)
        self._dynamics(state)
        self._rescale(state)
        self._variances(state)
        self._units(state, adapt=share < 1.0)
        return state

    def _parameters(self, state: State) -> MultiRegionParameters:
        from pyrodyn.models.multi_region_lds import MultiRegionParameters

        def of_trials(name: str) -> Tensor:
            return state[name].unsqueeze(1)

        locked = of_trials("time_locked").unflatten(-1, self.bumps) if self.bumps else None
        return MultiRegionParameters(
            of_trials("dynamics"),
            of_trials("innovation_loading"),
            self.model.spread_initial(of_trials("initial_variance"), self.layout),
            of_trials("loading"),
            of_trials("offset"),
            of_trials("noise") if "noise" in state else None,
            of_trials("input_gain") if "input_gain" in state else None,
            locked,
        )

    def _path(self, state: State, share: float) -> None:
        parameters = self._parameters(state)
        prior = self.model.latent_path(parameters, self.recording)
        readout = self.model.readout_law(parameters, state["path"], self.recording)
        if self.model.readout.is_gaussian:
            state["path"] = gaussian_path(prior, readout, self.values)
            return
        if share < 0.4 or "centre" not in state and share < 1.0:
            state["path"], reference = nearby_path(prior, readout, self.values, state["path"])
        else:
            if "centre" not in state:
                self._refer(state, Reference.about(readout, readout.predict(state["path"]), self.values))
            reference = Reference(state["centre"], state["score"], state["curvature"])
            state["path"], state["path_acceptance"] = turned_path(
                prior, readout, self.values, state["path"], reference
            )
        if 0.2 <= share < 1.0:
            self._average(state, readout, share)

    # ------------------------------------------------------------------------------------------ the whole network

    def _align(self, state: State) -> None:
        """Turn every chain's latents towards one loading, so that what was learned in one place serves in another.

        The posterior does not see the turn; the free gauge would drift.
        """
        layout = self.layout
        if "aim" not in state:
            every = state["loading"].unflatten(0, (self.groups, -1))
            state["aim"] = every[:, 0].clone()
            state["aim_common"] = state["dynamics"].unflatten(0, (self.groups, -1))[:, 0].clone()
        chains = len(state["loading"]) // self.groups
        aim = state["aim"].repeat_interleave(chains, 0)
        turn = torch.eye(layout.size, dtype=torch.float64).repeat(len(aim), 1, 1)
        for (_, _, units), place in zip(self.regions, layout.places, strict=True):
            left, _, right = torch.linalg.svd(state["loading"][:, units, place].mT @ aim[:, units, place])
            turn[:, place, place] = left @ right
        self._turn(state, turn)
        common = layout.common
        here, there = state["dynamics"][:, : layout.regional, common], state["aim_common"][:, : layout.regional, common]
        sign = (here * there.repeat_interleave(chains, 0)).sum(1).sign()
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
        state["innovation_loading"] = turn.mT @ state["innovation_loading"]
        state["loading"] = state["loading"] @ turn
        state["path"] = state["path"] @ turn.unsqueeze(1)
        for name in ("time_locked", "input_gain"):
            if name in state:
                state[name] = regional.mT @ state[name]

    def _adapt(self, state: State, share: float) -> None:
        """Learn the quadratic of the dynamics, twice in the warm-up."""
        if self.layout.num_regions and share >= 0.4:
            if "slope" not in state or (share >= 0.7 and "learned" not in state and share < 1.0):
                if "slope" in state:
                    state["learned"] = torch.ones(())
                quadratic = self._quadratic(state)
                state["middle"], state["slope"], state["information"] = quadratic

    def _quadratic(self, state: State) -> Quadratic:
        layout, chains = self.layout, len(state["loading"]) // self.groups

        def middle(value: Tensor) -> Tensor:
            return value.unflatten(0, (self.groups, chains)).mean(1)

        held = {n: middle(v) for n, v in state.items() if n in _PARAMETERS}
        values = self.values if self.values.dim() == 3 else self.values[::chains]
        zeros = torch.zeros(1, *state["path"].shape[1:], dtype=torch.float64)
        precision, linear = self._potential(held, state, values, zeros)

        def gradient(points: Tensor, owner: Tensor) -> Tensor:
            with torch.enable_grad():
                points = points.detach().requires_grad_()
                here = {name: value[owner] for name, value in held.items()}
                here["dynamics"] = layout.matrix(points)
                prior = self.model.latent_path(self._parameters(here), self.recording)
                at = owner if len(precision) > 1 else torch.zeros_like(owner)
                at_linear = owner if len(linear) > 1 else torch.zeros_like(owner)
                near = prior.condition(precision[at], linear[at_linear])
                value = (near.log_normaliser - prior.log_normaliser).sum()
                return torch.autograd.grad(value, points)[0]

        batch = max(1, BATCH_NUMBERS // zeros.numel())
        return Quadratic.about(layout.vector(held["dynamics"]), gradient, batch)

    def _potential(self, held: State, state: State, values: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
        readout = self.model.readout_law(self._parameters(held), path, self.recording)
        if self.model.readout.is_gaussian:
            return gaussian_potential(readout, values)
        return Reference(state["centre"], state["score"], state["curvature"]).potential(readout)

    def _network(self, state: State) -> None:
        """All dynamics anew at once, the path moving with them."""
        layout, path = self.layout, state["path"]
        quadratic = Quadratic(state["middle"], state["slope"], state["information"])
        vector = layout.vector(state["dynamics"])
        proposed = self.proposal.draw(quadratic, vector)
        stable = self.prior.log_stability(proposed)
        proposed = torch.where(torch.isfinite(stable).unsqueeze(-1), proposed, vector)
        precision, linear = self._potential(state, state, self.values, path)
        readout = self.model.readout_law(self._parameters(state), path, self.recording)
        found = []
        noise = None
        for at in (vector, proposed):
            here = self._parameters(state | {"dynamics": layout.matrix(at)})
            prior = self.model.latent_path(here, self.recording)
            near = prior.condition(precision, linear)
            score = 0.5 * (near.linear * near.mean).sum((-2, -1)) + near.log_whitening_jacobian - prior.log_normaliser
            moved = path
            if not self.model.readout.is_gaussian:
                if noise is None:
                    noise = near.noise_of(path)
                else:
                    moved = near.draw(noise)
                reference = Reference(state["centre"], state["score"], state["curvature"])
                score = score + reference.rest(readout, readout.predict(moved), self.values)[0]
            found.append((score.sum(-1) - quadratic.log_prob(at) + self.prior.log_stability(at), moved))
        (before, _), (after, moved) = found
        acceptance = torch.nan_to_num(after - before, -torch.inf).clamp(max=0.0).exp()
        acceptance = torch.where(torch.isfinite(stable), acceptance, 0.0)
        accepted = torch.rand_like(acceptance) < acceptance
        state["network_acceptance"] = acceptance
        state["dynamics"] = torch.where(accepted[:, None, None], layout.matrix(proposed), state["dynamics"])
        state["path"] = torch.where(accepted[:, None, None, None], moved, path)

    def _average(self, state: State, readout: Any, share: float) -> None:
        """Take the present predictor up into the reference: mean score and curvature about the mean predictor."""
        here = Reference.about(readout, readout.predict(state["path"]), self.values)
        pooled = len(self.values) != len(state["path"]) or self.values.dim() == 3
        parts = [part.mean(0, keepdim=True) if pooled else part for part in here]
        count = state.get("averaged", torch.zeros(()))
        if float(count) and (share < 0.6) != (float(state["averaged_at"]) < 0.6):
            count = torch.zeros(())  # what the first paths said is forgotten
        for name, part in zip(("centre_sum", "score_sum", "curvature_sum"), parts, strict=True):
            state[name] = part if not float(count) else state[name] + (part - state[name]) / (float(count) + 1.0)
        state["averaged"], state["averaged_at"] = count + 1.0, torch.tensor(share)
        if share < 0.4 or float(count) >= 20.0:
            self._refer(state, Reference(state["centre_sum"], state["score_sum"], state["curvature_sum"]))

    def _refer(self, state: State, reference: Reference) -> None:
        state["centre"], state["score"] = reference.centre, reference.score
        state["curvature"] = reference.curvature.clamp(min=LEAST_CURVATURE)
        if self.recording.mask is not None:
            state["curvature"] = torch.where(self.recording.mask, state["curvature"], 0.0)

    # ------------------------------------------------------------------------------------------ dynamics

    def _place_regressors(self) -> None:
        """The regressors of the latents: state, shared innovations, time-locked input, inputs."""
        layout, model = self.layout, self.model
        size, regional = layout.size, layout.regional
        self.shared = slice(size, size + model.shared_innovations)
        bumps = self.bumps[0] * self.bumps[1] if self.bumps else 0
        self.locked = slice(self.shared.stop, self.shared.stop + bumps)
        self.driven = slice(self.locked.stop, self.locked.stop + self.recording.num_inputs)
        fixed = []
        if bumps:
            fixed.append(model.design(self.recording)[:, 1:])
        if self.recording.num_inputs and self.recording.inputs is not None:
            fixed.append(self.recording.inputs[:, 1:])
        self.fixed = torch.cat(fixed, -1) if fixed else None
        extra = torch.arange(regional, self.driven.stop)
        matrix_sd, matrix_mean = layout.matrix(self.prior.sd_entry), layout.matrix(self.prior.mean_entry)
        self.targets = []
        for r, place in enumerate(layout.places):
            own = torch.arange(place.start, place.stop)
            which = [i for i, (target, _) in enumerate(layout.edges) if target == r]
            columns = [torch.arange(size)[layout.places[layout.edges[i][1]]] for i in which]
            always = torch.cat([own, extra])
            sets = SourceSets(columns, always, self.prior.probability[which])
            mean = torch.zeros(self.driven.stop, len(own), dtype=torch.float64)
            mean[:size] = matrix_mean[place].mT
            sd = torch.ones(self.driven.stop, dtype=torch.float64)
            sd[:size] = matrix_sd[place.start]  # the same in every row of a block
            sd[self.shared] = INNOVATION_SD
            if self.recording.num_inputs:
                sd[self.driven] = 1.0 / self.recording.input_scale
            self.targets.append((place, sets, mean, sd, which))

    def _dynamics(self, state: State) -> None:
        layout, path = self.layout, state["path"]
        chains, regional = len(path), layout.regional
        before, after = path[:, :, :-1], path[:, :, 1:]
        if path.shape[2] == 1:
            return
        coefficients = self._coefficients(state)
        fixed = None if self.fixed is None else self.fixed.expand(chains, *self.fixed.shape)
        rest = after[..., :regional] - before @ coefficients[:, None, : layout.size]
        if fixed is not None:
            rest = rest - fixed @ coefficients[:, None, self.locked.start :]
        parts = [before]
        if self.model.shared_innovations:
            shared = coefficients[:, self.shared]  # (chain, shared, regional)
            eye = torch.eye(shared.shape[1], dtype=torch.float64)
            root = torch.linalg.cholesky(eye + shared @ shared.mT)
            mean = torch.cholesky_solve((rest @ shared.mT.unsqueeze(1)).flatten(1, 2).mT, root).mT
            noise = torch.linalg.solve_triangular(root.mT, torch.randn_like(mean).mT, upper=True).mT
            parts.append((mean + noise).unflatten(1, before.shape[1:3]))
        if fixed is not None:
            parts.append(fixed)
        design = torch.cat(parts, -1).flatten(1, 2)
        target = after[..., :regional].flatten(1, 2)
        gram, cross = design.mT @ design, design.mT @ target
        new, presence = torch.zeros_like(coefficients), layout.presence(state["dynamics"])
        for r, (place, sets, mean, sd, which) in enumerate(self.targets):
            precision = sd.reciprocal().square().expand(chains, -1).clone()
            if self.bumps:
                precision[:, self.locked] = state["bump_variance"][:, r, None].reciprocal()
            present = presence[:, r][:, [layout.edges[i][1] for i in which]]
            new[..., place], _ = sets.draw(gram, cross[..., place], mean, precision, present)
        dynamics = state["dynamics"].clone()
        dynamics[:, :regional] = new[:, : layout.size].mT
        for i in range(regional, regional + layout.num_globals):
            dynamics[:, i, i] = self._persistence(path[..., i])
        change = log_stability(dynamics, layout) - log_stability(state["dynamics"], layout)
        accepted = torch.rand(chains, dtype=torch.float64).log() < change
        state["stable"] = accepted.double()
        kept = accepted[:, None, None]
        state["dynamics"] = torch.where(kept, dynamics, state["dynamics"])
        self._spread(state, torch.where(kept, new, coefficients))
        state["residual"] = target - design @ torch.where(kept, new, coefficients)

    def _coefficients(self, state: State) -> Tensor:
        """Everything that enters the regional latents, (chain, regressor, regional latent)."""
        regional = self.layout.regional
        parts = [state["dynamics"][:, :regional].mT, state["innovation_loading"][:, :regional].mT]
        if self.bumps:
            parts.append(state["time_locked"].mT)
        if "input_gain" in state:
            parts.append(state["input_gain"].mT)
        return torch.cat(parts, 1)

    def _spread(self, state: State, coefficients: Tensor) -> None:
        """The inverse of `_coefficients`, but for the dynamics."""
        wide = torch.zeros_like(state["innovation_loading"])
        wide[:, : self.layout.regional] = coefficients[:, self.shared].mT
        state["innovation_loading"] = wide
        if self.bumps:
            state["time_locked"] = coefficients[:, self.locked].mT
        if "input_gain" in state:
            state["input_gain"] = coefficients[:, self.driven].mT

    def _persistence(self, path: Tensor) -> Tensor:
        """Persistence of a global latent given its path (chain, trial, time)."""
        before, after = path[..., :-1], path[..., 1:]
        entry = self.prior.mean_entry == SLOW
        mean, weight = self.prior.mean_entry[entry][0], self.prior.sd_entry[entry][0].reciprocal().square()
        precision = before.square().sum((-2, -1)) + weight
        centre = ((before * after).sum((-2, -1)) + weight * mean) / precision
        return centre + torch.randn_like(centre) / precision.sqrt()

    # ------------------------------------------------------------------------------------------ scales

    def _rescale(self, state: State) -> None:
        """Stretch the latents of a region, or a global one, and all that enters and leaves them, by one factor.

        The likelihood does not see it; without it path and loading would hold each other where they are. The measure is
        that of Liu & Sabatti, Biometrika 87:353 (2000): Lebesgue's, with a Jacobian of one power for every number.
        """
        if state["path"].shape[2] == 1:
            return
        layout = self.layout
        for r, place in enumerate(layout.places):
            self._stretch(state, place, r)
        for i in range(layout.num_globals):
            self._stretch(state, slice(layout.regional + i, layout.regional + i + 1), layout.num_regions)

    def _stretch(self, state: State, place: slice, index: int) -> None:
        layout, regional = self.layout, self.layout.regional
        path, dynamics = state["path"], state["dynamics"]
        chains = len(path)
        of_region = index < layout.num_regions
        spread = state["initial_variance"][:, index]
        if of_region:
            residual = state["residual"][..., place].square().sum((1, 2))
        else:
            i = place.start
            apart = path[:, :, 1:, i] - dynamics[:, None, None, i, i] * path[:, :, :-1, i]
            residual = apart.square().sum((1, 2))
        # Sums of squares over their prior variance of what grows (up) and of what shrinks (down), and their numbers.
        up = residual + (path[:, :, 0, place].square().sum((1, 2)) / spread)
        grown = path[0, ..., place].numel() * torch.ones(chains)
        sd = layout.matrix(self.prior.sd_entry)
        outside = torch.ones(layout.size, dtype=torch.bool)
        outside[place] = False
        into, out = dynamics[:, place][..., outside], dynamics[:, :regional][..., place]
        if of_region:
            present = into != 0.0
            up = up + torch.where(present, into / sd[place][..., outside].clamp(min=1e-300), 0.0).square().sum((1, 2))
            grown = grown + present.sum((1, 2))
            shared = state["innovation_loading"][:, place]
            up = up + shared.square().sum((1, 2)) / INNOVATION_SD**2
            grown = grown + shared[0].numel()
            if self.bumps:
                locked = state["time_locked"][:, place]
                up = up + locked.square().sum((1, 2)) / state["bump_variance"][:, index]
                grown = grown + locked[0].numel()
            if "input_gain" in state:
                gain = state["input_gain"][:, place] * self.recording.input_scale
                up, grown = up + gain.square().sum((1, 2)), grown + gain[0].numel()
        rows = outside[:regional]
        leaving = out[:, rows]
        there = leaving != 0.0
        weight = sd[:regional][rows][:, place].clamp(min=1e-300)
        down = torch.where(there, leaving / weight, 0.0).square().sum((1, 2))
        shrunk = there.sum((1, 2)).double()
        if of_region:
            units = self.regions[index][2]
            loading = state["loading"][:, units][..., place] / self.scale[units].unsqueeze(-1)
            down = down + loading.square().sum((1, 2)) / state["signal_variance"][:, index]
            shrunk = shrunk + loading[0].numel()
        log_factor = RESCALE * (2.0 * (grown + shrunk)).rsqrt() * 20.0 * torch.randn(chains, dtype=torch.float64)
        factor = log_factor.exp()
        change = (
            -0.5 * (factor.square() - 1.0) * up
            - 0.5 * (factor.square().reciprocal() - 1.0) * down
            + log_factor * (grown - shrunk)
        )
        accepted = torch.rand(chains, dtype=torch.float64).log() < change
        factor = torch.where(accepted, factor, 1.0)[:, None, None]
        state["path"] = path.clone()
        state["path"][..., place] *= factor.unsqueeze(-1)
        state["dynamics"] = dynamics.clone()
        state["dynamics"][:, place] *= factor
        state["dynamics"][..., place] /= factor
        state["loading"] = state["loading"].clone()
        state["loading"][..., place] /= factor
        for name in ("innovation_loading", "time_locked", "input_gain"):
            if name in state and of_region:
                state[name] = state[name].clone()
                state[name][:, place] *= factor
        if of_region:
            state["residual"] = state["residual"].clone()
            state["residual"][..., place] *= factor

    def _variances(self, state: State) -> None:
        layout, first = self.layout, state["path"][:, :, 0]
        count = layout.num_regions
        for name, prior, blocks in (
            ("initial_variance", INITIAL, [first[..., p] for p in layout.places]),
            ("signal_variance", SIGNAL, self._weights(state)),
            ("bump_variance", BUMPS, [state["time_locked"][:, p] for p in layout.places] if self.bumps else []),
        ):
            if name == "initial_variance":
                blocks = [*blocks, first[..., layout.regional : layout.regional + layout.num_globals]]
            if not blocks:
                continue
            shape = torch.tensor([prior[0] + 0.5 * block[0].numel() for block in blocks], dtype=torch.float64)
            rate = torch.stack([prior[1] + 0.5 * block.square().flatten(1).sum(1) for block in blocks], -1)
            state[name] = rate / torch._standard_gamma(shape.expand_as(rate))
        del count

    def _weights(self, state: State) -> list[Tensor]:
        """Loadings of every region in units of the readout's scale."""
        return [
            state["loading"][:, units][..., place] / self.scale[units].unsqueeze(-1)
            for (_, _, units), place in zip(self.regions, self.layout.places, strict=True)
        ]

    # ------------------------------------------------------------------------------------------ units

    def _units(self, state: State, adapt: bool) -> None:
        path = state["path"].flatten(1, 2)
        law, mask = self.model.readout, self.recording.mask
        seen = None if mask is None else mask.flatten(0, 1)
        values = self.values.reshape(-1, path.shape[1], self.recording.num_units)
        loading, offset = state["loading"].clone(), state["offset"].clone()
        rates = []
        for (_, dim, units), place, r in zip(
            self.regions, self.layout.places, range(len(self.regions)), strict=True
        ):
            design = torch.cat([path[..., place], torch.ones_like(path[..., :1])], -1)
            held = torch.cat([loading[:, units, place], offset[:, units, None]], -1)
            mean = torch.zeros(1, len(units), dim + 1, dtype=torch.float64)
            mean[..., -1] = self.offset_prior.mean[units]
            size = state["signal_variance"][:, r, None, None] * self.scale[units].square().unsqueeze(-1)
            precision = torch.cat(
                [
                    size.reciprocal().expand(-1, -1, dim),
                    self.offset_prior.variance[units].reciprocal().expand(len(path), -1).unsqueeze(-1),
                ],
                -1,
            )
            noise = state["noise"][:, None, units] if "noise" in state else None
            held, rate = draw_coefficients(
                law, noise, values[..., units], None if seen is None else seen[:, units], design, held, mean, precision
            )
            rates.append(rate)
            loading[:, units, place], offset[:, units] = held[..., :-1], held[..., -1]
        state["loading"], state["offset"] = loading, offset
        state["unit_acceptance"] = torch.cat(rates, -1)
        if "noise" in state:
            predictor = path @ loading.mT + offset.unsqueeze(1)
            state["noise"], rate = draw_noise(
                law, self.noise_prior, state["noise"], values, seen, predictor, state["noise_step"]
            )
            if adapt:
                state["noise_step"] = state["noise_step"] * (0.3 * (rate - 0.44)).exp()
