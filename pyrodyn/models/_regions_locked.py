r"""Moves of time-locked inputs together with their scales, with path and courses integrated out.

Given the potential, the log evidence of the heights is quadratic, with one curvature for all trials. Given W and v the
heights of a hat are normal over latents, with covariance :math:`S = W W^\top + \mathrm{diag}(v)` once courses are
integrated out. So the evidence of the scales is known with heights integrated out, too, and scales can take long steps.
Heights are then made from noise under the new scales, and courses drawn last.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyrodyn.conditionals.along import Along, log_evidence
from pyrodyn.conditionals.metropolis import acceptance_of
from pyrodyn.linalg.matrix import cholesky, precision_of
from pyrodyn.models._regions import BUMPS, COURSES
from pyrodyn.models._regions_rows import draw_course_given_weights

if TYPE_CHECKING:
    from pyrodyn.models._regions import MultiRegionParameters
    from pyrodyn.models._regions_sweep import RegionSweep, State

SCALE_STEP, LONGEST = 1.0, 30.0  # random walks of log variances: Student's steps of two degrees, and their limit
WEIGHT_TURN = 0.3  # radians by which weights of courses are turned towards a fresh draw from their prior
BEGUN = 20  # rounds of steps that scales make before chains start
LEAST = 1e-6  # floor of variances read off the heights of a climb


def begin_locked(sweep: RegionSweep, state: State, quadratic: HeightEvidence) -> None:
    """Scales, heights and courses for the start of chains.

    A climb to a mode leaves scales so wide that the prior hardly holds heights, which then fit what averages over
    trials show by chance; chains needed ten sweeps to leave that. So scales begin at what the climb's heights have in
    common and apart, take some rounds under the quadratic, and heights are drawn given them.
    """
    heights = own = state["time_locked"]
    weight = Scales.of(sweep, state).weight
    if "course" in state:
        left, size, _ = torch.linalg.svd(heights, full_matrices=False)
        few = min(weight.shape[-1], size.shape[-1])
        left = left[..., :few]
        own = heights - left @ (left.mT @ heights)
        common = left * size[..., None, :few] / math.sqrt(heights.shape[-1])
        weight = torch.nn.functional.pad(common, (0, weight.shape[-1] - few))
    apart = torch.stack([own[:, place].square().mean((-2, -1)) for place in sweep.layout.places], -1)
    spread = weight.square().sum((-2, -1)).unsqueeze(-1) / max(1, weight[0].numel())
    scales = Scales(apart.clamp(min=LEAST), spread.clamp(min=LEAST), weight)
    evidence = quadratic.given(scales, sweep).evidence
    for _ in range(BEGUN):
        scales, evidence = _stepped(sweep, quadratic, scales, evidence)
    law = quadratic.given(scales, sweep)
    state["time_locked"] = law.draw(torch.randn_like(law.white))
    scales.keep(sweep, state)


def move_locked(
    sweep: RegionSweep,
    state: State,
    parameters: MultiRegionParameters,
    potential: tuple[Tensor, Tensor],
    evidence: Tensor,
    along: Along | None,
) -> None:
    """Scales by a few steps, then the heights under them, accepted with the path that moves along.

    ``evidence`` (chain) is that of ``parameters``. The noise behind the heights is turned by a random angle, mostly
    small: wholly new noise would mostly be refused by what the potential leaves over of counts.
    """
    assert sweep.bumps is not None
    held = Scales.of(sweep, state)
    quadratic = HeightEvidence.of(sweep, parameters, potential)
    first = quadratic.given(held, sweep)
    noise = first.noise_of(state["time_locked"])
    scales, _ = _stepped(sweep, quadratic, held, first.evidence)
    law = quadratic.given(scales, sweep)
    angle = 0.5 * math.pi * torch.rand(len(noise), 1, 1, dtype=torch.float64).square()
    heights = law.draw(angle.cos() * noise + angle.sin() * torch.randn_like(noise))

    moved = parameters._replace(time_locked=heights.unsqueeze(1).unflatten(-1, sweep.bumps))
    prior = sweep.model.latent_path(moved, sweep.recording)
    near = prior.condition(*potential)
    promised = quadratic.value(heights) - quadratic.value(state["time_locked"])
    acceptance = acceptance_of(log_evidence(prior, near) - evidence - promised)
    accepted = torch.rand_like(acceptance) < acceptance
    if along is not None:
        accepted, acceptance = along.move(near, accepted)
    state["locked_acceptance"] = acceptance
    state["time_locked"] = torch.where(accepted[:, None, None], heights, state["time_locked"])
    scales.where(accepted, held).keep(sweep, state)


class Scales(NamedTuple):
    """How wide time-locked inputs are, each (chain, ...)."""

    own: Tensor  # (region): variance of what each latent has of its own
    common: Tensor  # (1): of the weights of courses
    weight: Tensor  # (regional latent, course)

    @classmethod
    def of(cls, sweep: RegionSweep, state: State) -> Scales:
        """Those of a state; without courses there are no weights."""
        own = state["bump_variance"]
        none = own.new_ones(len(own), 1), own.new_zeros(len(own), sweep.layout.regional, 0)
        names = ("course_variance", "course_weight")
        return cls(own, *(state.get(name, absent) for name, absent in zip(names, none, strict=True)))

    def keep(self, sweep: RegionSweep, state: State) -> None:
        """Write these into a state, and draw courses given them and the heights."""
        state["bump_variance"] = self.own
        if "course" in state:
            state["course_variance"], state["course_weight"] = self.common, self.weight
            draw_course_given_weights(sweep, state)

    def where(self, accepted: Tensor, other: Scales) -> Scales:
        """These where accepted (chain), the others elsewhere."""
        pairs = zip(self, other, strict=True)
        return Scales(*(torch.where(accepted[(..., *(None,) * (a.dim() - 1))], a, b) for a, b in pairs))


class HeightLaw(NamedTuple):
    """Heights given their scales: a normal law of entries (regional latent x bump)."""

    evidence: Tensor  # (chain): of the scales
    entropy: Tensor  # (chain): less that of the prior
    root: Tensor  # (chain, condition, entry, entry): of the precision
    white: Tensor  # (chain, condition, entry): the mean through it
    bumps: int

    def noise_of(self, heights: Tensor) -> Tensor:
        """The noise that `draw` maps to ``heights`` (chain, regional latent, condition x bump)."""
        flat = by_condition(heights, self.root.shape[1])
        return (self.root.mT @ flat.unsqueeze(-1)).squeeze(-1) - self.white

    def draw(self, noise: Tensor) -> Tensor:
        """Heights from standard normal noise (chain, condition, entry)."""
        white = (self.white + noise).unsqueeze(-1)
        flat = torch.linalg.solve_triangular(self.root.mT, white, upper=True).squeeze(-1)
        return flat.unflatten(-1, (-1, self.bumps)).transpose(1, 2).flatten(2)


class HeightEvidence(NamedTuple):
    """The log evidence of heights given a potential, up to a constant: a quadratic, alike in trials of a condition."""

    information: Tensor  # (chain, 1, entry, entry): of one trial
    pull: Tensor  # (chain, condition, entry)
    trials: Tensor  # (condition)

    @classmethod
    def of(
        cls, sweep: RegionSweep, parameters: MultiRegionParameters, potential: tuple[Tensor, Tensor]
    ) -> HeightEvidence:
        r"""With :math:`L` what heights add to the linear part of a path of covariance :math:`\Sigma`, the information
        is :math:`H^\top Q^{-1} H - L^\top \Sigma L`.

        Where trials differ in what is seen of them their average stands for all: the quadratic is then only a proposal,
        which the exact evidence corrects.
        """
        model, recording, layout = sweep.model, sweep.recording, sweep.layout
        assert sweep.bumps is not None
        design = model.design(recording, sweep.bumps[1])[:, 1:].unflatten(-1, sweep.bumps)
        hats, member = design[0].sum(1), (design.sum((1, 3)) > 0.0).double()  # (time - 1, bump), (trial, condition)
        regional, dynamics = layout.regional, parameters.dynamics.squeeze(1)
        precision = precision_of(model.process_noise(parameters, layout).squeeze(1))[0]
        driven = parameters._replace(time_locked=None)
        prior = model.latent_path(driven, recording)
        still = model.latent_path(driven._replace(input_gain=None), recording)
        near = still.condition(potential[0].mean(-4, keepdim=True), torch.zeros_like(potential[1][:, :1]))

        # Hats as they stand in the bins they enter, and one bin before: all that heights do is a sum over these.
        later, earlier = torch.nn.functional.pad(hats, (0, 0, 1, 0)), torch.nn.functional.pad(hats, (0, 0, 0, 1))
        both = torch.cat([later, earlier], -1)

        def through_noise(entered: Tensor) -> Tensor:
            """``Q^-1`` of what enters a hat (chain, bump, latent, column), (chain, regional latent x bump, column)."""
            found = precision[:, None, :regional] @ entered
            return found.transpose(1, 2).flatten(1, 2)

        def response(columns: Tensor) -> Tensor:
            """``L' Sigma`` of linear parts (chain, time, latent, column), (chain, entry, column)."""
            mean = near._solve(columns.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            seen = (both.mT @ mean.flatten(-2)).unflatten(-1, mean.shape[-2:])
            after, before = seen.chunk(2, 1)
            return through_noise(after - dynamics.unsqueeze(1) @ before)

        parts = []
        for latent in range(regional):  # one at a time: together they would be the largest array of a sweep
            pushed = precision[:, None, :, latent, None]  # (chain, 1, latent, 1)
            parts.append(
                response(pushed * later.unsqueeze(1) - dynamics.mT.unsqueeze(1) @ pushed * earlier.unsqueeze(1))
            )
        within = precision[:, :regional, None, :regional, None] * (hats.mT @ hats)[:, None, :]
        information = within.flatten(3).flatten(1, 2) - torch.cat(parts, -1)
        pull = response(_summed(prior.linear + potential[1], member))
        drift = model.drift(driven, recording)
        if drift is not None:
            pull = pull - through_noise((hats.mT @ _summed(drift, member).flatten(-2)).unflatten(-1, (layout.size, -1)))
        return cls(0.5 * (information + information.mT).unsqueeze(1), pull.mT, member.sum(0))

    def value(self, heights: Tensor) -> Tensor:
        """Of heights (chain, regional latent, condition x bump), (chain)."""
        flat = by_condition(heights, len(self.trials))
        curved = self.trials[:, None] * (self.information @ flat.unsqueeze(-1)).squeeze(-1)
        return (flat * (self.pull - 0.5 * curved)).sum((1, 2))

    def given(self, scales: Scales, sweep: RegionSweep) -> HeightLaw:
        """The law of heights under these scales."""
        covariance = scales.own[:, sweep.layout.group[: sweep.layout.regional]].diag_embed()
        covariance = covariance + scales.weight @ scales.weight.mT
        prior, log_det = precision_of(covariance)
        precision = self.trials[:, None, None] * self.information
        bumps = precision.shape[-1] // prior.shape[-1]
        blocks = precision.unflatten(-1, (-1, bumps)).unflatten(-3, (-1, bumps))
        blocks.diagonal(dim1=-3, dim2=-1).add_(prior[:, None, :, :, None])
        root = cholesky(precision)
        white = torch.linalg.solve_triangular(root, self.pull.unsqueeze(-1), upper=False).squeeze(-1)
        entropy = -0.5 * bumps * len(self.trials) * log_det - root.diagonal(dim1=-2, dim2=-1).log().sum((1, 2))
        evidence = entropy + 0.5 * white.square().sum((1, 2))
        evidence = torch.nan_to_num(evidence, -math.inf, -math.inf, -math.inf)  # a root that fails is refused
        return HeightLaw(evidence, entropy, root, white, bumps)


def by_condition(heights: Tensor, conditions: int) -> Tensor:
    """Entries (chain, condition, regional latent x bump) of heights (chain, regional latent, condition x bump)."""
    return heights.unflatten(-1, (conditions, -1)).transpose(1, 2).flatten(2)


def _summed(values: Tensor, member: Tensor) -> Tensor:
    """Sums (chain, time, latent, condition) of what trials (chain, trial, time, latent) have."""
    wide = values.expand(-1, len(member), -1, -1)
    return (wide.flatten(2).mT @ member).unflatten(1, wide.shape[-2:])


def _stepped(sweep: RegionSweep, quadratic: HeightEvidence, here: Scales, evidence: Tensor) -> tuple[Scales, Tensor]:
    """All own scales together, one of them, the scale of courses, their weights.

    In a random order: the acceptance that follows needs the round to be reversible, and in a fixed order it is not.
    """
    chains, regions = here.own.shape
    one = torch.nn.functional.one_hot(torch.randint(regions, (chains,)), regions)

    def own(which: Tensor) -> tuple[Scales, Tensor]:
        moved = here.own * (_log_steps(chains) * which).exp()
        return here._replace(own=moved), _log_ratio(BUMPS, moved, here.own)

    def common() -> tuple[Scales, Tensor]:
        step = _log_steps(chains)
        moved = here.common * step.exp()
        found = here._replace(common=moved, weight=here.weight * (0.5 * step).exp().unsqueeze(-1))
        return found, _log_ratio(COURSES, moved, here.common)

    def weight() -> tuple[Scales, Tensor]:
        fresh = here.common.sqrt().unsqueeze(-1) * torch.randn_like(here.weight)
        moved = math.cos(WEIGHT_TURN) * here.weight + math.sin(WEIGHT_TURN) * fresh
        return here._replace(weight=moved), torch.zeros_like(evidence)

    steps = [lambda: own(torch.ones_like(one)), lambda: own(one)]
    steps += [common, weight] if here.weight.shape[-1] else []
    for i in torch.randperm(len(steps)).tolist():
        there, prior = steps[i]()
        found = quadratic.given(there, sweep).evidence
        accepted = torch.rand_like(found).log() < found - evidence + prior
        here, evidence = there.where(accepted, here), torch.where(accepted, found, evidence)
    return here, evidence


def _log_steps(chains: int) -> Tensor:
    """Steps (chain, 1) of logarithms of variances."""
    step = SCALE_STEP * torch.randn(chains, 1, dtype=torch.float64)
    return (step / torch.empty_like(step).exponential_().sqrt()).clamp(-LONGEST, LONGEST)


def _log_ratio(prior: tuple[float, float], there: Tensor, here: Tensor) -> Tensor:
    """Of inverse-gamma densities of the logarithms of variances, summed, (chain)."""
    shape, rate = prior
    return (shape * (here / there).log() + rate * (here.reciprocal() - there.reciprocal())).sum(-1)
