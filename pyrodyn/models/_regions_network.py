"""All dynamics of coupled regions anew, edges and all, with the path integrated out or moving along."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyrodyn.conditionals.along import Along, log_evidence
from pyrodyn.conditionals.edges import EdgeToggle
from pyrodyn.conditionals.metropolis import acceptance_of
from pyrodyn.conditionals.paths import factors
from pyrodyn.conditionals.surrogate import BATCH_NUMBERS, Quadratic, Rows, drawn
from pyrodyn.conditioning import gaussian_potential
from pyrodyn.distributions.network import log_stability
from pyrodyn.models._regions_locked import HeightEvidence, Scales, begin_locked, move_locked
from pyrodyn.readouts import AffineReadout

if TYPE_CHECKING:
    from pyrodyn.distributions import GaussMarkov, NetworkLayout
    from pyrodyn.models._regions import MultiRegionParameters
    from pyrodyn.models._regions_sweep import RegionSweep, State


LOCKED = 0.5  # share of sweeps that move what is locked to time, at a third of the cost of the moves of the network
TOGGLES = 4  # edges proposed to come or go in a sweep, beside the sets of sources of every region
SCATTER = 5  # runs under the surrogate that make a chain's first network
ACCEPTED = 0.4  # of the moves of the network, to which their caution adapts


class Scored(NamedTuple):
    """Networks, with what a move needs to know of them; each (chain, ...)."""

    vector: Tensor
    value: Tensor  # log density with the path integrated out under the potential
    slope: Tensor
    evidence: Tensor  # that density without the prior

    def where(self, accepted: Tensor, other: Scored) -> Scored:
        """These where accepted, the others elsewhere."""
        return Scored(
            torch.where(accepted[:, None], self.vector, other.vector),
            torch.where(accepted, self.value, other.value),
            torch.where(accepted[:, None], self.slope, other.slope),
            torch.where(accepted, self.evidence, other.evidence),
        )


def scatter(sweep: RegionSweep, state: State, quadratic: Quadratic) -> None:
    """Every chain from a network of its own: a draw under the surrogate, or where that is unstable, the first; and from
    time-locked inputs drawn for it.
    """
    vector = sweep.layout.vector(state["dynamics"])
    for _ in range(SCATTER):
        found = drawn(sweep.rows, quadratic, vector, sweep.prior(state))
        stable = torch.isfinite(log_stability(sweep.layout.matrix(found), sweep.layout))
        vector = torch.where(stable.unsqueeze(-1), found, vector)
    state["information"] = quadratic.information.clone()
    state["dynamics"] = sweep.layout.matrix(vector)
    if sweep.bumps:
        begin_locked(sweep, state, _height_evidence(sweep, state))


def learn(sweep: RegionSweep, state: State, held: State) -> Quadratic:
    """The quadratic of the dynamics about ``held``, (chain, ...), other parameters as they are there."""
    layout = sweep.layout
    _, readout = factors(sweep.model, sweep.parameters(held), sweep.recording)
    precision, linear = _potential(sweep, state | held, readout)

    def gradient(points: Tensor, owner: Tensor) -> Tensor:
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            here = {name: value[owner] for name, value in held.items()} | {"dynamics": layout.matrix(points)}
            prior = sweep.model.latent_path(sweep.parameters(here), sweep.recording)
            near = prior.condition(precision[owner], linear[owner])
            return torch.autograd.grad((near.log_normaliser - prior.log_normaliser).sum(), points)[0]

    batch = max(1, BATCH_NUMBERS // (sweep.recording.num_trials * sweep.recording.num_bins * layout.size))
    return Quadratic.about(layout.vector(held["dynamics"]), gradient, batch)


def locked_entropy(sweep: RegionSweep, state: State) -> Tensor:
    """Entropy of the time-locked heights given their scales, less that of their prior, (chain)."""
    return _height_evidence(sweep, state).given(Scales.of(sweep, state), sweep).entropy


def _height_evidence(sweep: RegionSweep, state: State) -> HeightEvidence:
    parameters = sweep.parameters(state)
    _, readout = factors(sweep.model, parameters, sweep.recording)
    return HeightEvidence.of(sweep, parameters, _potential(sweep, state, readout))


def _potential(sweep: RegionSweep, state: State, readout: AffineReadout) -> tuple[Tensor, Tensor]:
    """The observations as a potential on the path, precision and linear part; counts by a reference for the network.

    Its curvature is the same in all bins: it is renewed for every block of rows, and costs a fraction of one that is
    not, while steps of the network are as often accepted.
    """
    if sweep.model.readout.is_gaussian:
        return gaussian_potential(readout, sweep.seen(state))
    return sweep.reference(state).levelled(sweep.recording.mask).potential(readout)


def move_network(sweep: RegionSweep, state: State, adapt: bool) -> None:
    """Rows of every region and single edges, in a random order, the path integrated out or moving with them; then, in
    half of the sweeps, what is locked to time.

    What the potential leaves over of counts needs the path, and the rates of all units. It is not asked where the rest
    of the ratio refuses for all chains: two chances to refuse in a row leave the same law as one.

    Reference: Christen & Fox, J. Comput. Graph. Stat. 14:795 (2005), on delayed acceptance.
    """
    parameters = sweep.parameters(state)
    _, readout = factors(sweep.model, parameters, sweep.recording)
    potential = _potential(sweep, state, readout)
    information, prior = state["caution"][:, None, None] * state["information"], sweep.prior(state)
    here, near = _scored(sweep, state, parameters, potential, sweep.layout.vector(state["dynamics"]))
    along = (
        None if sweep.model.readout.is_gaussian else Along(readout, sweep.seen(state), potential, state["path"], near)
    )
    # A toggle is worth its chance where the quadratic is right; caution would have it ask for less than that.
    moves: list[tuple[Rows | EdgeToggle, Tensor]] = [(rows, information) for rows in sweep.rows]
    moves += [(sweep.toggle, state["information"])] * (TOGGLES if sweep.slab.uncertain else 0)
    rates: dict[bool, list[Tensor]] = {False: [], True: []}
    for i in torch.randperm(len(moves)).tolist():
        move, curvature = moves[i]
        vector, ahead = move.step(here.vector, here.slope, curvature, prior)
        there, near = _scored(sweep, state, parameters, potential, vector)
        behind = move.log_density(there.vector, there.slope, curvature, prior, here.vector, ahead)
        acceptance = acceptance_of(there.value + behind - here.value - ahead.log_density)
        # Signs of common latents are held to one half of the space, on which the step stays reversible.
        acceptance = torch.where((_signs(sweep, state, there) == _signs(sweep, state, here)).all(-1), acceptance, 0.0)
        accepted = torch.rand_like(acceptance) < acceptance
        if along is not None:
            accepted, acceptance = along.move(near, accepted)
        here = there.where(accepted, here)
        rates[move is sweep.toggle].append(acceptance)
    state["network_acceptance"] = torch.stack(rates[False]).mean(0)
    if rates[True]:
        state["edge_acceptance"] = torch.stack(rates[True]).mean(0)
    if adapt:
        rise = (0.3 * (ACCEPTED - state["network_acceptance"])).exp()
        state["caution"] = (state["caution"] * rise).clamp(1.0, 30.0)
    state["dynamics"] = sweep.layout.matrix(here.vector)
    if sweep.slab.uncertain and not adapt:
        state["edge_log_odds"] = sweep.toggle.log_odds(here.vector, here.slope, state["information"], prior)
    if sweep.bumps and float(torch.rand(())) < LOCKED:
        move_locked(sweep, state, sweep.parameters(state), potential, here.evidence, along)
    if along is not None:
        state["path"] = along.path


def _scored(
    sweep: RegionSweep,
    state: State,
    parameters: MultiRegionParameters,
    potential: tuple[Tensor, Tensor],
    vector: Tensor,
) -> tuple[Scored, GaussMarkov]:
    """Log density and slope of networks (chain, entry), and the law of the path under them and the potential."""
    moved = parameters._replace(dynamics=sweep.layout.matrix(vector).unsqueeze(1))
    prior = sweep.model.latent_path(moved, sweep.recording)
    near = prior.condition(*potential)
    evidence, slope = _evidence(sweep, moved, prior, near)
    value = evidence + sweep.prior(state).log_prob(vector)
    bad = ~(torch.isfinite(value) & torch.isfinite(slope).all(-1))
    slope = torch.where(bad.unsqueeze(-1), 0.0, slope)
    return Scored(vector, torch.where(bad, -torch.inf, value), slope, evidence), near


def _evidence(
    sweep: RegionSweep, parameters: MultiRegionParameters, prior: GaussMarkov, near: GaussMarkov
) -> tuple[Tensor, Tensor]:
    r"""Log evidence of the dynamics (chain), and its slope (chain, entry) by Fisher's identity.

    .. math:: \nabla_A \log Z = Q^{-1} \sum_t E[(x_t - A x_{t-1} - b_t) x_{t-1}^\top],

    under ``near``, whose factor serves the draw of the path, too.
    """
    before, after = near.mean[..., :-1, :], near.mean[..., 1:, :]
    drift = sweep.model.drift(parameters, sweep.recording)
    if drift is not None:
        after = after - drift
    lagged = after.flatten(1, 2).mT @ before.flatten(1, 2) + near.cross_covariance.sum((1, 2)).mT
    own = before.flatten(1, 2).mT @ before.flatten(1, 2) + near.covariance[..., :-1, :, :].sum((1, 2))
    residual = lagged - parameters.dynamics.squeeze(1) @ own
    noise = sweep.model.process_noise(parameters, sweep.layout).squeeze(1)
    return log_evidence(prior, near), sweep.layout.vector(torch.linalg.solve(noise, residual))


def _signs(sweep: RegionSweep, state: State, scored: Scored) -> Tensor:
    """On which side of the aim every common latent enters the regions, (chain, common)."""
    return common_signs(sweep.layout.matrix(scored.vector), state["aim_common"], sweep.layout)


def common_signs(dynamics: Tensor, aim: Tensor, layout: NetworkLayout) -> Tensor:
    """Signs of the products of what enters the regions from common latents with an aim, (chain, common)."""
    here, there = (part[:, : layout.regional, layout.common] for part in (dynamics, aim))
    return (here * there.repeat_interleave(len(here) // len(there), 0)).sum(1).sign()
