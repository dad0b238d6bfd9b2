"""All dynamics of coupled regions anew, edges and all, with the path integrated out or moving along."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyrodyn.conditionals.paths import factors
from pyrodyn.conditionals.surrogate import BATCH_NUMBERS, Quadratic
from pyrodyn.conditioning import gaussian_potential
from pyrodyn.distributions.network import log_stability
from pyrodyn.readouts import AffineReadout

if TYPE_CHECKING:
    from pyrodyn.distributions import NetworkLayout
    from pyrodyn.models._regions import MultiRegionParameters
    from pyrodyn.models._regions_sweep import RegionSweep, State


SCATTER = 5  # runs under the surrogate that make a chain's first network
ACCEPTED = 0.4  # of the moves of the network, to which their caution adapts


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


def scatter(sweep: RegionSweep, state: State, quadratic: Quadratic) -> None:
    """Every chain from a network of its own: a draw under the surrogate, or where that is unstable, the first."""
    vector = sweep.layout.vector(state["dynamics"])
    for _ in range(SCATTER):
        drawn = sweep.proposal.draw(quadratic, vector, sweep.prior(state))
        stable = torch.isfinite(log_stability(sweep.layout.matrix(drawn), sweep.layout))
        vector = torch.where(stable.unsqueeze(-1), drawn, vector)
    state["information"] = quadratic.information.clone()
    state["dynamics"] = sweep.layout.matrix(vector)


def learn(sweep: RegionSweep, state: State, held: State) -> Quadratic:
    """The quadratic of the dynamics about ``held``, (chain, ...), other parameters as they are there."""
    layout = sweep.layout
    _, readout = factors(sweep.model, sweep.parameters(held), sweep.recording)
    if sweep.model.readout.is_gaussian:
        precision, linear = gaussian_potential(readout, sweep.seen(held))
    else:
        precision, linear = sweep.reference(state | held).potential(readout)

    def gradient(points: Tensor, owner: Tensor) -> Tensor:
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            here = {name: value[owner] for name, value in held.items()} | {"dynamics": layout.matrix(points)}
            prior = sweep.model.latent_path(sweep.parameters(here), sweep.recording)
            near = prior.condition(precision[owner], linear[owner])
            return torch.autograd.grad((near.log_normaliser - prior.log_normaliser).sum(), points)[0]

    batch = max(1, BATCH_NUMBERS // (sweep.recording.num_trials * sweep.recording.num_bins * layout.size))
    return Quadratic.about(layout.vector(held["dynamics"]), gradient, batch)


def move_network(sweep: RegionSweep, state: State, adapt: bool) -> None:
    """The rows of every region in turn, edges and all, the path integrated out or moving with them."""
    seen, gaussian = sweep.seen(state), sweep.model.readout.is_gaussian
    parameters = sweep.parameters(state)
    _, readout = factors(sweep.model, parameters, sweep.recording)
    potential = gaussian_potential(readout, seen) if gaussian else sweep.reference(state).potential(readout)
    information, prior = state["caution"][:, None, None] * state["information"], sweep.prior(state)
    here = _scored(sweep, state, parameters, potential, sweep.layout.vector(state["dynamics"]), readout, None)
    rates = []
    for block in torch.randperm(len(sweep.proposal.blocks)).tolist():
        vector, ahead = sweep.proposal.step(block, here.vector, here.slope, information, prior)
        there = _scored(sweep, state, parameters, potential, vector, readout, here)
        behind = sweep.proposal.log_density(block, there.vector, there.slope, information, prior, here.vector, ahead)
        change = there.value + behind - here.value - ahead.log_density
        acceptance = torch.nan_to_num(change, -torch.inf).clamp(max=0.0).exp()
        # Signs of common latents are held to one half of the space, on which the step stays reversible.
        acceptance = torch.where((_signs(sweep, state, there) == _signs(sweep, state, here)).all(-1), acceptance, 0.0)
        accepted = torch.rand_like(acceptance) < acceptance
        here = there.where(accepted, here)
        rates.append(acceptance)
    state["network_acceptance"] = torch.stack(rates).mean(0)
    if adapt:
        rise = (0.3 * (ACCEPTED - state["network_acceptance"])).exp()
        state["caution"] = (state["caution"] * rise).clamp(1.0, 30.0)
    state["dynamics"], state["path"] = sweep.layout.matrix(here.vector), here.path


def _scored(
    sweep: RegionSweep,
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
        moved = parameters._replace(dynamics=sweep.layout.matrix(points).unsqueeze(1))
        prior = sweep.model.latent_path(moved, sweep.recording)
        near = prior.condition(*potential)
        evidence = (near.log_normaliser - prior.log_normaliser).sum(-1)
        (slope,) = torch.autograd.grad(evidence.sum(), points)
    value = evidence.detach() + sweep.prior(state).log_prob(vector)
    path, noise = state["path"], None
    if not sweep.model.readout.is_gaussian:
        near = near.detach()
        if origin is None or origin.noise is None:
            noise = near.noise_of(path)
        else:
            noise, path = origin.noise, near.draw(origin.noise)
        rest, _ = sweep.reference(state).rest(readout, readout.predict(path), sweep.seen(state))
        value = value + rest.sum((-2, -1))
    bad = ~(torch.isfinite(value) & torch.isfinite(slope).all(-1))
    return Scored(vector, torch.where(bad, -torch.inf, value), torch.where(bad.unsqueeze(-1), 0.0, slope), path, noise)


def _signs(sweep: RegionSweep, state: State, scored: Scored) -> Tensor:
    """On which side of the aim every common latent enters the regions, (chain, common)."""
    return common_signs(sweep.layout.matrix(scored.vector), state["aim_common"], sweep.layout)


def common_signs(dynamics: Tensor, aim: Tensor, layout: NetworkLayout) -> Tensor:
    """Signs of the products of what enters the regions from common latents with an aim, (chain, common)."""
    here, there = (part[:, : layout.regional, layout.common] for part in (dynamics, aim))
    return (here * there.repeat_interleave(len(here) // len(there), 0)).sum(1).sign()
