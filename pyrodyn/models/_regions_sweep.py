"""Blocked Gibbs sampling of coupled regions: what each move needs of the model, and in which order they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyrodyn.conditionals.paths import LEAST_CURVATURE, Reference, factors, gaussian_path, settled, turned_path
from pyrodyn.conditionals.regression import SourceSets
from pyrodyn.conditionals.surrogate import BATCH_NUMBERS, NetworkProposal, Quadratic
from pyrodyn.conditionals.units import draw_coefficients, draw_noise
from pyrodyn.conditioning import gaussian_potential
from pyrodyn.distributions import GaussMarkov
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.distributions.network import LEVEL_PERSISTENCE, log_stability
from pyrodyn.models._regions import BUMPS, INITIAL, INNOVATION_SD, SIGNAL, SLOW
from pyrodyn.program import globals_given
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

if TYPE_CHECKING:
    from pyrodyn.models.multi_region_lds import MultiRegionLDS, MultiRegionParameters

State = dict[str, Tensor]
_PARAMETERS = frozenset(
    "dynamics innovation_loading loading offset noise initial_variance time_locked input_gain".split()
)
RESCALE = 2.0  # of the conditional sd of the logarithm of a region's scale: the width of its proposal
ROUNDS = 6  # of settling the first reference
SCATTER = 5  # runs under the surrogate that make a chain's first network
AVERAGED = (0.1, 0.5)  # share of the warm-up over which the reference is averaged
CAUTION = 1.5  # factor of the curvature that proposals are made with, before it adapts
ACCEPTED = 0.4  # of the moves of the network, to which their caution adapts
_VARIANCES = ("signal_variance", "initial_variance", "bump_variance")
_REFERENCE = ("centre", "score", "curvature")
_SUMS = ("centre_sum", "score_sum", "curvature_sum")


class Scored(NamedTuple):
    """Networks, with what a move needs to know of them; each (chain, ...)."""

    vector: Tensor
    value: Tensor
    slope: Tensor
    path: Tensor
    noise: Tensor | None

    def where(self, accepted: Tensor, other: Scored) -> Scored:
        """These where accepted, the others elsewhere; they share their noise."""
        return Scored(
            torch.where(accepted[:, None], self.vector, other.vector),
            torch.where(accepted, self.value, other.value),
            torch.where(accepted[:, None], self.slope, other.slope),
            torch.where(accepted[:, None, None, None], self.path, other.path),
            other.noise,
        )


class RegionSweep:
    """Moves for the unknowns of a `MultiRegionLDS`, each (chain, ...), in a gauge that is left free while sampling.

    Loadings are iid normal while the chain runs and are turned into the model's gauge when handed out: the two have the
    same law, and a regression of a full row is exact where that of a triangular one is not.
    """

    def __init__(self, model: MultiRegionLDS, recording: Recording, observations: Tensor | None = None) -> None:
        self.model, self.recording = model, recording
        # Groups of chains may see different data: (group, trial, time, unit).
        self.values = recording.values.unsqueeze(0) if observations is None else observations
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
        """Chains about ``values`` (*event) or (group, *event), each with a network of its own."""
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
        held |= {
            n: grouped[n].clone() for n in ("signal_variance", "initial_variance", "bump_variance") if n in grouped
        }
        if self.bumps:
            held["time_locked"] = held["time_locked"].flatten(-2)
        groups = len(held["dynamics"])
        self.values = self.values.expand(groups, *self.values.shape[-3:])
        state: State = {"aim": held["loading"].clone(), "aim_common": held["dynamics"].clone()}
        prior, readout = factors(self.model, parameters, self.recording)
        if not self.model.readout.is_gaussian:
            self._refer(state, settled(prior, readout, self.values, None, ROUNDS))
        quadratic = self._learn(state, held)
        state |= {name: value.repeat_interleave(chains, 0) for name, value in held.items()}
        shape = (groups * chains, self.recording.num_trials, self.recording.num_bins, self.layout.size)
        state["path"] = torch.zeros(shape, dtype=torch.float64)
        if "noise" in state:
            state["noise_step"] = torch.full_like(state["noise"], 0.1)
        state["caution"] = torch.full((groups * chains,), CAUTION, dtype=torch.float64)
        self._scatter(state, Quadratic(*(part.repeat_interleave(chains, 0) for part in quadratic)))
        near = self._near(state, self._parameters(state))[1]
        state["path"] = near.draw(torch.randn_like(state["path"]))
        return state

    def _scatter(self, state: State, quadratic: Quadratic) -> None:
        """Every chain from a network of its own: a draw under the surrogate, or where that is unstable, the first."""
        vector = self.layout.vector(state["dynamics"])
        for _ in range(SCATTER):
            drawn = self.proposal.draw(quadratic, vector)
            stable = torch.isfinite(self.prior.log_stability(drawn))
            vector = torch.where(stable.unsqueeze(-1), drawn, vector)
        state["information"] = quadratic.information.clone()
        state["dynamics"] = self.layout.matrix(vector)

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
        found["latent"] = state["path"] @ turn.unsqueeze(1)
        return found

    # ------------------------------------------------------------------------------------------ one sweep

    def sweep(self, state: State, share: float) -> State:
        """Every unknown anew; ``share`` of the warm-up that is done, 1 after it: then the posterior stays as it is."""
        state = dict(state)
        self._align(state)
        self._network(state, share < 1.0)
        self._path(state)
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
            of_trials("innovation_loading") if "innovation_loading" in state else None,
            self.model.spread_initial(of_trials("initial_variance"), self.layout),
            of_trials("loading"),
            of_trials("offset"),
            of_trials("noise") if "noise" in state else None,
            of_trials("input_gain") if "input_gain" in state else None,
            locked,
        )

    def _near(self, state: State, parameters: MultiRegionParameters) -> tuple[GaussMarkov, GaussMarkov, AffineReadout]:
        """Prior of the path, the same under the observations or their reference, and the readout."""
        prior, readout = factors(self.model, parameters, self.recording)
        if self.model.readout.is_gaussian:
            return prior, prior.condition(*gaussian_potential(readout, self._seen(state))), readout
        return prior, prior.condition(*self._reference(state).potential(readout)), readout

    def _seen(self, state: State) -> Tensor:
        """The observations of every chain, (chain or 1, trial, time, unit)."""
        groups = len(self.values)
        return self.values if groups == 1 else self.values.repeat_interleave(len(state["loading"]) // groups, 0)

    def _reference(self, state: State) -> Reference:
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
        parameters = self._parameters(state)
        prior, readout = factors(self.model, parameters, self.recording)
        seen = self._seen(state)
        if self.model.readout.is_gaussian:
            state["path"] = gaussian_path(prior, readout, seen)
            return
        state["path"], state["path_acceptance"] = turned_path(
            prior, readout, seen, state["path"], self._reference(state)
        )

    def _adapt(self, state: State, share: float) -> None:
        """Average the reference over the warm-up's middle, and learn the surrogate about where the chains now are."""
        if not self.model.readout.is_gaussian and AVERAGED[0] <= share < AVERAGED[1]:
            _, readout = factors(self.model, self._parameters(state), self.recording)
            here = Reference.about(readout, readout.predict(state["path"]), self._seen(state))
            count = float(state.get("averaged", torch.zeros(())))
            for name, part in zip(_SUMS, here, strict=True):
                part = part.unflatten(0, (len(self.values), -1)).mean(1)
                state[name] = part if not count else state[name] + (part - state[name]) / (count + 1.0)
            state["averaged"] = torch.tensor(count + 1.0)
        elif "learned" not in state and AVERAGED[1] <= share < 1.0:
            if "averaged" in state:
                self._refer(state, Reference(*(state.pop(name) for name in _SUMS)))
            state["information"] = self._learn(state, {n: v for n, v in state.items() if n in _PARAMETERS}).information
            state["caution"] = torch.full_like(state["caution"], CAUTION)
            state["learned"] = torch.ones(())

    # ------------------------------------------------------------------------------------------ the whole network

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
        state["loading"] = state["loading"] @ turn
        if "innovation_loading" in state:
            state["innovation_loading"] = turn.mT @ state["innovation_loading"]
        state["path"] = state["path"] @ turn.unsqueeze(1)
        for name in ("time_locked", "input_gain"):
            if name in state:
                state[name] = regional.mT @ state[name]

    def _learn(self, state: State, held: State) -> Quadratic:
        """The quadratic of the dynamics about ``held``, (chain, ...), other parameters as they are there."""
        layout = self.layout
        _, readout = factors(self.model, self._parameters(held), self.recording)
        if self.model.readout.is_gaussian:
            precision, linear = gaussian_potential(readout, self._seen(held))
        else:
            precision, linear = self._reference(state | held).potential(readout)

        def gradient(points: Tensor, owner: Tensor) -> Tensor:
            with torch.enable_grad():
                points = points.detach().requires_grad_()
                here = {name: value[owner] for name, value in held.items()} | {"dynamics": layout.matrix(points)}
                prior = self.model.latent_path(self._parameters(here), self.recording)
                near = prior.condition(precision[owner], linear[owner])
                return torch.autograd.grad((near.log_normaliser - prior.log_normaliser).sum(), points)[0]

        batch = max(1, BATCH_NUMBERS // (self.recording.num_trials * self.recording.num_bins * layout.size))
        return Quadratic.about(layout.vector(held["dynamics"]), gradient, batch)

    def _network(self, state: State, adapt: bool) -> None:
        """The rows of every region in turn, edges and all, the path integrated out or moving with them."""
        seen, gaussian = self._seen(state), self.model.readout.is_gaussian
        parameters = self._parameters(state)
        _, readout = factors(self.model, parameters, self.recording)
        potential = gaussian_potential(readout, seen) if gaussian else self._reference(state).potential(readout)
        information = state["caution"][:, None, None] * state["information"]
        here = self._scored(state, parameters, potential, self.layout.vector(state["dynamics"]), readout, None)
        rates = []
        for block in torch.randperm(len(self.proposal.blocks)).tolist():
            vector, ahead = self.proposal.step(block, here.vector, here.slope, information)
            there = self._scored(state, parameters, potential, vector, readout, here)
            behind = self.proposal.log_density(block, there.vector, there.slope, information, here.vector, ahead)
            change = there.value + behind - here.value - ahead.log_density
            acceptance = torch.nan_to_num(change, -torch.inf).clamp(max=0.0).exp()
            accepted = torch.rand_like(acceptance) < acceptance
            here = there.where(accepted, here)
            rates.append(acceptance)
        state["network_acceptance"] = torch.stack(rates).mean(0)
        if adapt:
            rise = (0.3 * (ACCEPTED - state["network_acceptance"])).exp()
            state["caution"] = (state["caution"] * rise).clamp(1.0, 30.0)
        state["dynamics"], state["path"] = self.layout.matrix(here.vector), here.path

    def _scored(
        self,
        state: State,
        parameters: MultiRegionParameters,
        potential: tuple[Tensor, Tensor],
        vector: Tensor,
        readout: AffineReadout,
        origin: Scored | None,
    ) -> Scored:
        """Log density and slope of networks (chain, entry), and the path that has the noise of ``origin``'s."""
        with torch.enable_grad():
            points = vector.detach().requires_grad_()
            moved = parameters._replace(dynamics=self.layout.matrix(points).unsqueeze(1))
            prior = self.model.latent_path(moved, self.recording)
            near = prior.condition(*potential)
            evidence = (near.log_normaliser - prior.log_normaliser).sum(-1)
            (slope,) = torch.autograd.grad(evidence.sum(), points)
        value = evidence.detach() + self.prior.log_prob(vector)
        path, noise = state["path"], None
        if not self.model.readout.is_gaussian:
            near = near.detach()
            if origin is None or origin.noise is None:
                noise = near.noise_of(path)
            else:
                noise, path = origin.noise, near.draw(origin.noise)
            rest, _ = self._reference(state).rest(readout, readout.predict(path), self._seen(state))
            value = value + rest.sum(-1)
        bad = ~(torch.isfinite(value) & torch.isfinite(slope).all(-1))
        return Scored(
            vector, torch.where(bad, -torch.inf, value), torch.where(bad.unsqueeze(-1), 0.0, slope), path, noise
        )

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
        parts = [state["dynamics"][:, :regional].mT]
        if "innovation_loading" in state:
            parts.append(state["innovation_loading"][:, :regional].mT)
        if self.bumps:
            parts.append(state["time_locked"].mT)
        if "input_gain" in state:
            parts.append(state["input_gain"].mT)
        return torch.cat(parts, 1)

    def _spread(self, state: State, coefficients: Tensor) -> None:
        """The inverse of `_coefficients`, but for the dynamics."""
        if "innovation_loading" in state:
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
            if "innovation_loading" in state:
                shared = state["innovation_loading"][:, place]
                up, grown = up + shared.square().sum((1, 2)) / INNOVATION_SD**2, grown + shared[0].numel()
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
        log_factor = RESCALE * (2.0 * (grown + shrunk)).rsqrt() * torch.randn(chains, dtype=torch.float64)
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
        values = self._seen(state).flatten(1, 2)
        loading, offset = state["loading"].clone(), state["offset"].clone()
        rates = []
        for (_, dim, units), place, r in zip(self.regions, self.layout.places, range(len(self.regions)), strict=True):
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
