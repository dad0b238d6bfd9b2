"""Latents of trials with the globals held, against exact answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from torch import Tensor

import pyrodyn as dyn
from pyrodyn import models, networks, readouts
from pyrodyn.distributions import NonlinearMarkov
from pyrodyn.errors import ModelError
from pyrodyn.inference import LocalInference, collapse
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.program import LatentModel, TrialModel, globals_given
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording


@cache
def simulated(model: LatentModel, trials: int = 3, bins: int = 8, missing: float = 0.2, counts: bool = False):
    like = zoo.blank(trials=trials, bins=bins, units=4, counts=counts, missing=missing)
    return dyn.simulate(model, like, seed=2, values={"offset": like.center + 0.3})[0]


def parameters(model: LatentModel, recording: Recording, draws: int = 2):
    return globals_given(model, zoo.prior_draws(model, recording, (draws,)), recording)


def inferred(engine: LocalInference, model: LatentModel, given, recording: Recording):
    with random_stream(0), numerics():
        return engine.infer(model, given, recording)


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_a_gaussian_at_the_mode_is_the_smoother_where_that_is_exact(missing):
    model = models.LDS(2, readouts.Gaussian())
    recording = simulated(model, missing=missing)
    given = parameters(model, recording)
    found = inferred(LocalInference(), model, given, recording)
    assert found.treatment == "a Gaussian at the mode of each trial"
    exact = collapse(model).path_posterior(given, recording)
    shape = (*exact.mean.shape[:2], -1)
    torch.testing.assert_close(found.family.mode, exact.mean.reshape(shape), rtol=1e-5, atol=1e-5)
    covariance = found.family.root @ found.family.root.mT
    torch.testing.assert_close(
        covariance.diagonal(dim1=-2, dim2=-1), exact.variance.reshape(shape), rtol=1e-5, atol=1e-6
    )
    evidence = collapse(model).marginal(given, recording).log_prob(recording.observations)
    for bound in found.log_evidence(5):  # where q is the posterior, every weight is the evidence
        torch.testing.assert_close(bound, evidence, rtol=1e-5, atol=1e-4)


def test_a_chain_of_one_latent_is_the_smoother_and_its_bound_the_evidence():
    """A potential in every bin is all that a Gaussian readout of one latent gives, so the family holds the truth."""
    model = models.LDS(1, readouts.Gaussian())
    recording = simulated(model, trials=2, bins=60)
    values = {
        name: torch.stack([value, 1.1 * value]).unsqueeze(1) for name, value in model.initial_values(recording).items()
    }
    given = globals_given(model, values, recording)
    found = inferred(LocalInference(few=0, steps=400), model, given, recording)
    assert "chain" in found.treatment
    exact = collapse(model).path_posterior(given, recording)
    evidence = collapse(model).marginal(given, recording).log_prob(recording.observations)
    with random_stream(1):
        mean, tight = found.log_evidence(400)
        paths = found.sample(500)["latent"].unflatten(0, (2, 500))
    assert bool((mean < evidence + 0.05).all()) and bool((evidence - mean < 0.3).all())
    assert bool(((tight - evidence).abs() < 0.1).all())
    assert bool(((paths.mean(1) - exact.mean).abs() < 0.3 * exact.variance.sqrt()).all())
    assert float((paths.std(1) / exact.variance.sqrt()).mean()) == pytest.approx(1.0, abs=0.05)


class Level(NamedTuple):
    loading: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Levels(TrialModel):
    """Counts whose log rate is one number of the trial: a model of no use but to integrate on a grid."""

    codes: int = 1

    def check(self, recording: Recording) -> None: ...

    def sample_globals(self, recording: Recording) -> Level:
        loading = pyro.sample("loading", dist.Normal(torch.zeros(recording.num_units), 0.7).to_event(1))
        return Level(loading, pyro.sample("spread", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 0.3)))

    def trials(self, parameters: Level, recording: Recording) -> Tensor:
        zeros = torch.zeros(self.codes, dtype=torch.float64)
        code = pyro.sample("code", dist.Normal(zeros, parameters.spread.unsqueeze(-1)).to_event(1))
        path = code.sum(-1)[..., None, None].expand(*code.shape[:-1], recording.num_bins, 1)
        offset = torch.zeros(recording.num_units, dtype=torch.float64)
        law = AffineReadout(readouts.Poisson(), path, parameters.loading.unsqueeze(-1), offset, None, recording.mask)
        return pyro.sample("observations", law, obs=recording.observations)

    def initial_values(self, recording): ...
    def label(self, parameters): ...
    def unlabel(self, values): ...
    def invariants(self, parameters): ...
    def transformed(self, parameters, recording, seed): ...


@pytest.mark.parametrize(("few", "treatment"), [(40, "at the mode"), (0, "independent Gaussians")])
def test_the_bounds_of_one_number_a_trial_equal_quadrature(few, treatment):
    model = Levels()
    like = zoo.blank(trials=3, bins=5, units=4, missing=0.2)
    with random_stream(4), numerics():
        values = zoo.prior_draws(model, like, (2,))
        recording = like.with_observations(torch.poisson(torch.full((3, 5, 4), 4.0)))
        given = globals_given(model, values, recording)
    found = inferred(LocalInference(few=few), model, given, recording)
    assert treatment in found.treatment
    grid = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)
    values = grid.reshape(-1, 1, 1, 1).expand(-1, 2, 3, 1)
    exact = torch.trapezoid(found.target({"code": values}).exp(), grid, dim=0).log()
    with random_stream(5):
        mean, tight = found.log_evidence(2000)
        draws = found.sample(2000)["code"].unflatten(0, (2, 2000)).squeeze(-1)
    assert bool((mean < exact + 0.02).all()) and bool((exact - mean < 0.2).all())
    torch.testing.assert_close(tight, exact, rtol=0, atol=0.03)
    weight = (found.target({"code": values}) - exact).exp()
    centre = torch.trapezoid(grid.reshape(-1, 1, 1) * weight, grid, dim=0)
    sd = torch.trapezoid((grid.reshape(-1, 1, 1) - centre).square() * weight, grid, dim=0).sqrt()
    assert bool(((draws.mean(1) - centre).abs() < 0.15 * sd).all())
    assert bool(((draws.std(1) / sd - 1.0).abs() < 0.15).all())


def test_a_noisy_networks_path_is_bounded_from_below_and_tightly():
    """The bounds of two families, found in two ways, agree on a short path."""
    model = models.LatentRNN(2, networks.Leaky())
    recording = simulated(model, trials=2, bins=10, counts=True)
    given = parameters(model, recording)
    assert isinstance(model.latent_path(given, recording), NonlinearMarkov)
    tight = {}
    for few in (40, 0):
        found = inferred(LocalInference(few=few), model, given, recording)
        with random_stream(2):
            mean, tight[few] = found.log_evidence(4000)
        assert bool((mean < tight[few]).all())
        assert bool((tight[few] - mean < 1.0).all())
    torch.testing.assert_close(tight[0], tight[40], rtol=0, atol=0.2)


def test_without_observations_the_prior_is_drawn():
    model = models.LatentRNN(2, networks.Leaky())
    blank = simulated(model, counts=True).blank()
    given = parameters(model, blank)
    found = inferred(LocalInference(), model, given, blank)
    assert "prior" in found.treatment
    with random_stream(0):
        paths = found.sample(400)["latent"].unflatten(0, (2, 400))
    torch.testing.assert_close(
        paths[:, :, :, 0].std((1, 2)), given.initial_sd.squeeze(1), rtol=0.1, atol=0.01
    )  # fmt: skip


def test_draws_and_trials_are_inferred_apart():
    """One draw's and one trial's answer does not depend on what stands beside it."""
    model = models.LatentRNN(2, networks.Gated())
    recording = simulated(model, trials=3, bins=6, counts=True)
    given = parameters(model, recording)
    whole = inferred(LocalInference(), model, given, recording)
    part = recording.isel(trial=[1])
    one = type(given)(*(None if value is None else value[1:] for value in given))
    alone = inferred(LocalInference(), model, one, part)
    torch.testing.assert_close(alone.family.mode[0, 0], whole.family.mode[1, 1], rtol=1e-4, atol=1e-4)


def test_a_model_without_its_part_for_trials_is_refused_by_name():
    class Bare(LatentModel):
        pass

    Bare.__abstractmethods__ = frozenset()  # none of them is called
    with pytest.raises(ModelError, match="Bare must say by a method trials"):
        LocalInference().infer(Bare(), None, zoo.blank())
