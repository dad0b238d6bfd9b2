"""Inputs locked to time and their scales, moved with the path integrated out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from test_multi_region import recording

from pyrodyn import models, readouts
from pyrodyn.conditionals.along import Along, log_evidence
from pyrodyn.conditionals.paths import Reference, factors
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.models import _regions_locked, _regions_network
from pyrodyn.models._regions import MultiRegionParameters
from pyrodyn.models._regions_locked import HeightEvidence, Scales, _stepped, by_condition, move_locked
from pyrodyn.models._regions_network import _potential, locked_entropy, move_network
from pyrodyn.recording import Recording

WIDE = (3.0, 0.6)  # shape and rate under which drives are common; the model's own prior hardly ever draws one
MODEL = models.MultiRegionLDS(2, time_bumps=4, shared_courses=1, conditions=("left", "right"))


def two_conditions(gaussian: bool = False, masked: bool = False) -> Recording:
    """Six trials of two conditions with an input; units of a trial are hidden from bin to bin where ``masked``."""
    generator = np.random.default_rng(0)
    values = generator.poisson(1.0, (6, 20, 6)).astype(float)
    if gaussian:
        values += generator.standard_normal(values.shape)
    options = {"inputs": generator.standard_normal((6, 20, 1)), "condition": ["left", "right", "left"] * 2}
    if masked:
        options["mask"] = generator.random(values.shape) < 0.7
    return recording(values, **options)


def begun(model: models.MultiRegionLDS, seen: Recording, chains: int):
    sweep = model.conditionals(seen)
    state = sweep.start(model.initial_values(seen), chains)
    state["input_gain"] = torch.randn_like(state["input_gain"])
    return sweep, state


@pytest.mark.parametrize("readout", [readouts.Gaussian(), readouts.Poisson()], ids=["gaussian", "poisson"])
def test_the_evidence_of_heights_is_a_quadratic(readout):
    model = models.MultiRegionLDS(2, time_bumps=4, conditions=("left", "right"), readout=readout)
    seen = two_conditions(readout.is_gaussian)
    with random_stream(0), numerics(), torch.no_grad():
        sweep, state = begun(model, seen, 3)
        parameters = sweep.parameters(state)
        potential = _potential(sweep, state, factors(model, parameters, seen)[1])
        quadratic = HeightEvidence.of(sweep, parameters, potential)
        found = []
        for size in (0.0, 0.3, 1.0):
            heights = size * torch.randn(3, 4, 8)
            moved = parameters._replace(time_locked=heights.unsqueeze(1).unflatten(-1, (2, 4)))
            prior = model.latent_path(moved, seen)
            found.append(log_evidence(prior, prior.condition(*potential)) - quadratic.value(heights))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_heights_given_their_scales_are_normal():
    """Their law and the evidence of the scales, against dense normal laws."""
    with random_stream(1), numerics(), torch.no_grad():
        sweep = MODEL.conditionals(two_conditions())
        root = torch.randn(1, 1, 16, 16)
        quadratic = HeightEvidence(root @ root.mT / 4.0, torch.randn(1, 2, 16), torch.tensor([2.0, 4.0]))
        scales = Scales(torch.tensor([[0.3, 0.5]]), torch.tensor([[1.0]]), torch.randn(1, 4, 1))
        law = quadratic.given(scales, sweep)
        noise = torch.randn(1, 2, 16)
        torch.testing.assert_close(law.noise_of(law.draw(noise)), noise)

        covariance = scales.own[0].repeat_interleave(2).diag() + scales.weight[0] @ scales.weight[0].mT
        dense = torch.kron(covariance, torch.eye(4))
        evidence = entropy = 0.0
        for condition, trials in enumerate((2.0, 4.0)):
            information, pull = trials * quadratic.information[0, 0], quadratic.pull[0, condition]
            precision = information + torch.linalg.inv(dense)
            # The potential is a normal density of what it points to, but for a factor that no scale changes.
            spread, aim = torch.linalg.inv(information), torch.linalg.solve(information, pull)
            law_of_aim = torch.distributions.MultivariateNormal(torch.zeros(16), dense + spread)
            own = torch.distributions.MultivariateNormal(torch.zeros(16), spread)
            evidence += law_of_aim.log_prob(aim) - own.log_prob(torch.zeros(16)) + 0.5 * pull @ aim
            entropy -= 0.5 * (torch.logdet(precision) + torch.logdet(dense))
            mean = torch.linalg.solve(precision, pull)
            heights = law.draw(noise)
            apart = by_condition(heights, 2)[0, condition] - mean
            torch.testing.assert_close(apart @ precision @ apart, noise[0, condition].square().sum())
            torch.testing.assert_close(law.root[0, condition] @ law.root[0, condition].mT, precision)
        torch.testing.assert_close(law.evidence[0], evidence)
        torch.testing.assert_close(law.entropy[0], entropy)


@pytest.mark.parametrize("masked", [False, True])
def test_heights_are_accepted_where_the_quadratic_is_the_evidence(masked, monkeypatch):
    """Always where all trials are seen alike; else the evidence decides."""
    model = models.MultiRegionLDS(2, time_bumps=4, conditions=("left", "right"), readout=readouts.Gaussian())
    with random_stream(3), numerics(), torch.no_grad():
        sweep, state = begun(model, two_conditions(True, masked), 40)
        # Scales that are far from none: without heights, any quadratic would be right.
        monkeypatch.setattr(_regions_locked, "BUMPS", WIDE)
        state["bump_variance"] = torch.full_like(state["bump_variance"], 0.3)
        state["time_locked"] = before = 0.3 * torch.randn_like(state["time_locked"])
        monkeypatch.setattr(_regions_network, "LOCKED", 1.0)
        move_network(sweep, state, False)
    accepted = state["locked_acceptance"]
    if masked:
        assert 0.3 < float(accepted.mean()) < 0.999
    else:
        torch.testing.assert_close(accepted, torch.ones_like(accepted), atol=1e-6, rtol=0.0)
        assert bool((state["time_locked"] != before).all())


def test_scales_keep_their_posterior(monkeypatch):
    """Scales from their prior, heights, and what is seen of these: such scales are a draw of their posterior."""
    chains = 20_000
    monkeypatch.setattr(_regions_locked, "BUMPS", WIDE)
    monkeypatch.setattr(_regions_locked, "COURSES", WIDE)
    model = models.MultiRegionLDS(1, time_bumps=3, trial_level=False, global_dim=0)
    with random_stream(5), numerics(), torch.no_grad():
        sweep = model.conditionals(recording())
        scales = drawn(chains)
        covariance = scales.own.diag_embed() + scales.weight @ scales.weight.mT
        heights = torch.linalg.cholesky(covariance) @ torch.randn(chains, 2, 3)
        root = torch.linalg.cholesky(torch.eye(6) + 0.5)
        pull = 2.0 * by_condition(heights, 1) @ root @ root.mT + math.sqrt(2.0) * torch.randn(chains, 1, 6) @ root.mT
        quadratic = HeightEvidence((root @ root.mT).expand(chains, 1, 6, 6), pull, torch.tensor([2.0]))
        moved, _ = _stepped(sweep, quadratic, scales, quadratic.given(scales, sweep).evidence)
    keep_prior(moved)
    assert bool((moved.own != scales.own).any()) and bool((moved.weight != scales.weight).any())


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_locked_to_time_keeps_its_posterior_under_counts(masked, monkeypatch):
    """Everything from the program, with counts: then it is a draw of the posterior, and remains one."""
    chains = 1500
    monkeypatch.setattr(_regions_locked, "BUMPS", WIDE)
    monkeypatch.setattr(_regions_locked, "COURSES", WIDE)
    generator = np.random.default_rng(0)
    mask = generator.random((4, 12, 4)) < 0.7 if masked else None
    seen = recording(
        generator.poisson(1.0, (4, 12, 4)), list("AABB"), mask=mask, condition=["left", "right", "left", "left"]
    )
    model = models.MultiRegionLDS(
        1, time_bumps=3, trial_level=False, global_dim=0, shared_innovations=0, conditions=("left", "right")
    )
    with random_stream(6), numerics(), torch.no_grad():
        sweep = model.conditionals(seen)
        scales = drawn(chains)
        state = {"bump_variance": scales.own, "course_variance": scales.common, "course_weight": scales.weight}
        state["course"] = torch.randn(chains, 1, 6)
        own = scales.own.sqrt().unsqueeze(-1) * torch.randn(chains, 2, 6)
        state["time_locked"] = own + scales.weight @ state["course"]
        loading = torch.zeros(chains, 1, 4, 2)
        loading[..., :2, 0], loading[..., 2:, 1] = 0.5 * torch.randn(2, chains, 1, 2)
        parameters = MultiRegionParameters(
            torch.tensor([[0.8, 0.1], [-0.2, 0.7]]).expand(chains, 1, 2, 2), None, torch.ones(chains, 1, 2), loading,
            0.3 * torch.randn(chains, 1, 4), None, None, state["time_locked"].unsqueeze(1).unflatten(-1, (2, 3)),
        )  # fmt: skip
        prior, readout = factors(model, parameters, seen)
        path = prior.sample()
        counts = model.readout_law(parameters, path, seen).sample()
        counts = counts if seen.mask is None else torch.where(seen.mask, counts, 0.0)
        about = Reference.about(readout, readout.offset.expand(readout.predict(path).shape), counts)
        potential = about.levelled(seen.mask).potential(readout)
        acceptance = []
        for _ in range(6):
            parameters = parameters._replace(time_locked=state["time_locked"].unsqueeze(1).unflatten(-1, (2, 3)))
            prior = model.latent_path(parameters, seen)
            near = prior.condition(*potential)
            along = Along(readout, counts, potential, path, near)
            move_locked(sweep, state, parameters, potential, log_evidence(prior, near), along)
            path = along.path
            acceptance.append(state["locked_acceptance"])
        parameters = parameters._replace(time_locked=state["time_locked"].unsqueeze(1).unflatten(-1, (2, 3)))
        white = model.latent_path(parameters, seen).whiten(path)
    assert 0.1 < float(torch.stack(acceptance).mean()) < 0.95
    found = Scales.of(sweep, state)
    keep_prior(found)
    own = (state["time_locked"] - found.weight @ state["course"]) / found.own.sqrt().unsqueeze(-1)
    for part in (own, state["course"], white):
        assert scipy.stats.kstest(part.flatten().numpy(), "norm").pvalue > 1e-3


def drawn(chains: int) -> Scales:
    """Scales of two regions of one latent, from their prior."""
    shape, rate = WIDE
    own, common = (rate / torch._standard_gamma(torch.full((chains, size), shape)) for size in (2, 1))
    return Scales(own, common, common.sqrt().unsqueeze(-1) * torch.randn(chains, 2, 1))


def keep_prior(found: Scales) -> None:
    variances = torch.cat([found.own, found.common], -1)
    for part in variances.T:
        assert scipy.stats.kstest(part.numpy(), scipy.stats.invgamma(WIDE[0], scale=WIDE[1]).cdf).pvalue > 1e-3
    standard = found.weight / found.common.sqrt().unsqueeze(-1)
    assert scipy.stats.kstest(standard.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("drive", [0.0, 1.0])
def test_chains_start_with_a_drive_where_there_is_one(drive):
    """Whatever a climb left, which is heights as large with a drive as without."""
    generator = np.random.default_rng(0)
    course = drive * np.sin(np.linspace(0.0, 12.0, 60))[:, None]
    path = np.zeros((8, 60, 2))
    for t in range(1, 60):
        path[:, t] = 0.8 * path[:, t - 1] + course[t] + generator.standard_normal((8, 2))
    seen = recording(np.repeat(path, 3, -1) + 0.3 * generator.standard_normal((8, 60, 6)))
    model = models.MultiRegionLDS(1, time_bumps=12, readout=readouts.Gaussian())
    with random_stream(7), numerics(), torch.no_grad():
        values = model.initial_values(seen)
        values["bumps"] = torch.randn_like(values["bumps"])
        values["bump_variance"] = torch.full_like(values["bump_variance"], 10.0)
        state = model.conditionals(seen).start(values, 8)
    size = state["time_locked"].square().mean((1, 2)).sqrt()
    assert bool((size < 0.1).all() if not drive else (size > 0.3).all())


@pytest.mark.parametrize("courses", [0, 1, 5])
def test_a_sweep_moves_what_is_locked_to_time(courses, monkeypatch):
    """Whatever the number of courses, and with a condition of which there are no trials."""
    monkeypatch.setattr(_regions_network, "LOCKED", 1.0)
    model = models.MultiRegionLDS(
        2, time_bumps=4, shared_courses=courses, conditions=("left", "none", "right"), readout=readouts.Gaussian()
    )
    with random_stream(4), numerics(), torch.no_grad():
        sweep, state = begun(model, two_conditions(True), 2)
        after = sweep.sweep(state, 1.0)
    assert after["time_locked"].shape == (2, 4, 12)
    assert bool((after["bump_variance"] != state["bump_variance"]).all())
    torch.testing.assert_close(after["locked_acceptance"], torch.ones(2).double(), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("readout", [readouts.Gaussian(), readouts.Poisson()], ids=["gaussian", "poisson"])
def test_groups_of_chains_that_see_other_data_have_heights_of_their_own(readout):
    seen = two_conditions(readout.is_gaussian)
    model = models.MultiRegionLDS(1, time_bumps=4, readout=readout)
    drive = 2.0 * torch.sin(torch.linspace(0.0, 6.0, 20)).abs().unsqueeze(-1)
    groups = torch.stack([seen.values, seen.values + 3.0 * drive.round()]).unsqueeze(1).flatten(0, 1)
    with random_stream(8), numerics(), torch.no_grad():
        sweep = model.conditionals(seen, groups)
        values = {name: torch.stack([value, value]) for name, value in model.initial_values(seen).items()}
        state = sweep.sweep(sweep.start(values, 3), 1.0)
        entropy = locked_entropy(sweep, state)
    size = state["time_locked"].square().mean((1, 2)).sqrt().unflatten(0, (2, 3)).mean(1)
    assert float(size[1]) > 2.0 * float(size[0])
    # Heights that the data know have less entropy than their prior.
    assert bool((entropy <= 0.0).all()) and float(entropy[3:].mean()) < float(entropy[:3].mean())
