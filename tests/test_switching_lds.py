"""Switching linear dynamics: the program, its symmetries, and every move of Gibbs against what it must leave alone."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pyro
import pytest
import scipy.special
import torch
from _switching import over_paths, prior_draws, sweeps_leave_the_prior_alone
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyrodyn as dyn
from pyrodyn import guides, inference, readouts
from pyrodyn.comparison import LOO, HeldOutEntries, KFold
from pyrodyn.comparison.folds import _fold_of
from pyrodyn.comparison.terms import Candidate, terms_of
from pyrodyn.conditionals.modes import settle
from pyrodyn.conditioning import gaussian_potential, path_evidence
from pyrodyn.distributions import GaussMarkov
from pyrodyn.errors import ModelError
from pyrodyn.inference import LocalInference
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.inference.switching_particles import switching_evidence
from pyrodyn.models.switching_lds import SwitchingLDS
from pyrodyn.program import globals_given, log_joint

SHORT = inference.Gibbs(draws=15, warmup=10, chains=2)


def blank(trials: int = 2, bins: int = 9, units: int = 3, *, counts: bool, inputs: int = 0, **options: Any):
    rng = np.random.default_rng(0)
    return dyn.Recording.from_arrays(
        np.zeros((trials, bins, units)),
        bin_width=0.05,
        unit=range(units),
        counts=counts,
        center=np.zeros(units) if counts else np.linspace(-1.0, 5.0, units),
        scale=np.ones(units) if counts else np.linspace(0.5, 4.0, units),
        inputs=2.0 * rng.normal(size=(trials, bins, inputs)) if inputs else None,
        **options,
    ).blank()


# ----------------------------------------------------------------------------------------- the posterior as a whole

JOINT = {
    "plain": SwitchingLDS(2, 2, stickiness=2.0, readout=readouts.Gaussian()),
    "recurrent": SwitchingLDS(2, 2, recurrent=True, stickiness=2.0, readout=readouts.Gaussian()),
    "counts": SwitchingLDS(2, 1, recurrent=True, stickiness=2.0),
}


@pytest.mark.parametrize("name", JOINT)
def test_sweeps_with_data_drawn_anew_leave_the_prior_alone(name):
    model = JOINT[name]
    mask = np.random.default_rng(1).random((2, 9, 3)) > 0.2
    like = blank(counts=not model.readout.is_gaussian, inputs=1, mask=mask, lengths=[9, 6])
    sweeps_leave_the_prior_alone(model, like)


# ---------------------------------------------------------------------------------------------- all paths of the modes


def small() -> tuple[SwitchingLDS, Any, Any, Tensor, list]:
    """One trial of eight bins with two modes: model, recording, parameters, and all 256 paths with log weights."""
    model = SwitchingLDS(2, 1, stickiness=3.0, readout=readouts.Gaussian())
    like = blank(1, 8, 2, counts=False)
    with torch.no_grad(), numerics():
        values = prior_draws(model, like, 1, 15)
        values["process_scale"] = torch.full_like(values["process_scale"], 0.3)
        values["bias"] = torch.tensor([[-0.3], [0.3]]).double().expand_as(values["bias"])
        parameters = globals_given(model, {n: v[0] for n, v in values.items()}, like)
        with random_stream(15):
            path = model.latent_path(parameters, like).sample()
            recording = like.with_observations(model.readout_law(parameters, path, like).sample())
        law = model.latent_path(parameters, recording)
        sequences = list(itertools.product(range(2), repeat=8))
        chosen = torch.nn.functional.one_hot(torch.tensor(sequences), 2).double().unsqueeze(1)
        prior = law.given_modes(chosen)
        weights = path_evidence(prior, model.readout_law(parameters, prior.mean, recording), recording.values)
        weights = weights.squeeze(1)
        transition, initial = parameters.transition.log().squeeze(0), parameters.initial.log().squeeze(0)
        for i, modes in enumerate(sequences):
            steps = sum(transition[a, b] for a, b in itertools.pairwise(modes))
            weights[i] = weights[i] + initial[modes[0]] + steps
        return model, recording, parameters, values, (chosen.squeeze(1), weights)


def test_gibbs_over_path_and_modes_agrees_with_all_mode_paths():
    model, recording, _, values, (chosen, weights) = small()
    expected = torch.einsum("p,ptk->tk", torch.softmax(weights, 0), chosen)
    assert float(expected[..., 0].min()) > 0.05 and float((expected - 0.5).abs().max()) > 0.3  # not a trivial case
    many = 3000
    with torch.no_grad(), numerics(), random_stream(13):
        sweep = model.conditionals(recording)
        state = sweep.start({n: v[0, 0] for n, v in values.items()}, many)
        for _ in range(40):
            sweep.draw_path(state)
            sweep.moves.draw_modes(state, state["path"])
    share = torch.nn.functional.one_hot(state["modes"][:, 0], 2).double().mean(0)
    error = (expected * (1.0 - expected) / many).sqrt()
    assert float(((share - expected) / error).abs().max()) < 4.0


def test_the_bound_of_path_and_modes_climbs_and_stays_below_the_evidence():
    model, recording, parameters, _, (_, weights) = small()
    evidence = float(torch.logsumexp(weights, 0))
    law = model.latent_path(parameters, recording)
    readout = model.readout_law(parameters, torch.zeros(1, 8, 1).double(), recording)
    bounds = [float(settle(law, readout, recording.values, (1,), rounds).bound) for rounds in range(1, 30)]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(bounds))
    assert evidence - 1.0 < bounds[-1] < evidence


class Held(torch.nn.Module):
    """A guide of the globals that holds them where they are."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def forward(self, recording) -> dict[str, Tensor]:
        return self.values


def test_the_structured_guide_brackets_the_evidence_and_has_its_mode_probabilities():
    model, recording, parameters, values, (chosen, weights) = small()
    evidence = float(torch.logsumexp(weights, 0))
    expected = torch.einsum("p,ptk->tk", torch.softmax(weights, 0), chosen)
    held = {name: value[0, 0] for name, value in values.items()}
    with numerics(), random_stream(0), pyro.settings.context(module_local_params=True):
        start = guides.Start(held, None)
        guide: Any = guides.Structured(lambda *_: Held(held))(model, recording, start)
        program = poutine.condition(model, data=held)
        elbo: Any = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)(program, guide)
        optimiser = torch.optim.Adam(guide.parameters(), lr=0.03)
        for step in range(250):
            optimiser.param_groups[0]["lr"] = 0.03 * (1.0 - step / 250) + 1e-4
            optimiser.zero_grad()
            elbo(recording).backward()
            optimiser.step()
        with torch.no_grad():
            law = guide.path_given(held, recording)
            path = law.sample((20_000,))
            prior = model.latent_path(parameters, recording)
            fit = model.readout_law(parameters, path, recording).log_prob(recording.values)
            ratio = (prior.log_prob(path) + fit - law.log_prob(path)).squeeze(-1)
            share = prior.mode_probabilities(path).mean(0)[0]
    below, above = float(ratio.mean()), 0.5 * float(torch.logsumexp(2.0 * ratio, 0) - np.log(20_000))
    assert below < evidence < above < below + 1.0
    assert float((share - expected).abs().sum(-1).max()) / 2 < 0.05


# ---------------------------------------------------------------------------------------------- the program


def test_one_mode_is_a_linear_system():
    model = SwitchingLDS(1, 2, readout=readouts.Gaussian())
    like = blank(3, 12, 4, counts=False, inputs=2)
    with torch.no_grad(), numerics():
        values = prior_draws(model, like, 4, 2)
        parameters = globals_given(model, values, like)
        law = model.latent_path(parameters, like)
        drift = parameters.bias + like.inputs[:, 1:] @ parameters.input_gain.squeeze(-3).mT
        chain = GaussMarkov.from_dynamics(
            parameters.dynamics.squeeze(-3), parameters.process_noise.squeeze(-3), num_bins=12,
            initial_covariance=torch.eye(2), drift=drift,
        )  # fmt: skip
        with random_stream(0):
            path = chain.expand((4, 3)).sample()
        torch.testing.assert_close(law.log_prob(path), chain.log_prob(path), rtol=1e-12, atol=1e-10)
        given = law.given_modes(torch.ones(4, 3, 12, 1).double())
        torch.testing.assert_close(given.mean, chain.mean, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(given.covariance, chain.covariance, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"recurrent": True}], ids=["plain", "recurrent"])
def test_sites_and_steps_are_inverse(options):
    model = SwitchingLDS(3, 2, readout=readouts.Gaussian(), **options)
    like = blank(counts=False, inputs=1)
    with torch.no_grad(), numerics():
        values = {n: v.squeeze(1) for n, v in prior_draws(model, like, 6, 3).items()}
        steps = globals_given(model, {n: v.unsqueeze(1) for n, v in values.items()}, like).steps
        found = model.step_prior(like).sites(
            steps.map(lambda part: part.squeeze(1)), values["process_scale"], values.get("recurrence_variance"),
            like.input_scale,
        )  # fmt: skip
    assert found.keys() == values.keys() - {"weights", "offset", "noise_sd"}
    for name, value in found.items():
        torch.testing.assert_close(value, values[name], rtol=1e-4 if name == "free_dynamics" else 1e-9, atol=1e-9)


def test_a_border_of_modes_is_a_constant_of_their_logits():
    model = SwitchingLDS(3, 2, recurrent=True, readout=readouts.Gaussian())
    like = blank(counts=False, inputs=0)
    with torch.no_grad(), numerics():
        steps = globals_given(model, prior_draws(model, like, 4, 3), like).steps
        rows = torch.log_softmax(steps.transition.log() + steps.recurrence_bias.unsqueeze(-2), -1).exp()
        prior, zero = model.step_prior(like), torch.zeros_like(steps.recurrence_bias)
        moved, plain = prior.path(steps, like), prior.path(steps._replace(transition=rows, recurrence_bias=zero), like)
        with random_stream(0):
            path = moved.expand((4, 3)).sample()
        torch.testing.assert_close(moved.log_prob(path), plain.log_prob(path), rtol=1e-12, atol=1e-10)
        without = prior.path(steps._replace(recurrence_bias=zero), like)
        assert float((moved.log_prob(path) - without.log_prob(path)).abs().min()) > 1e-6


def test_chains_that_start_in_permuted_modes_are_numbered_alike():
    model, recording, _, values, _ = small()
    swapped = dict(values)
    for name in ("free_dynamics", "bias", "precision_root", "initial"):
        swapped[name] = values[name].flip(-len(values[name].shape) + 2)
    swapped["transition"] = values["transition"].flip(-1, -2)
    with torch.no_grad(), numerics(), random_stream(1):
        sweep = model.conditionals(recording)
        state = sweep.start({n: v[0, 0] for n, v in values.items()}, 2)
        other = sweep.start({n: v[0, 0] for n, v in swapped.items()}, 2)
        density = [
            log_joint(poutine.condition(model, data={"latent": state["path"][:1]}), s, recording)
            for s in (values, swapped)
        ]
        torch.testing.assert_close(*density)  # the program does not know which is which
        torch.testing.assert_close(other["bias"], state["bias"].flip(1))
        for name in ("aim", "path", "modes"):
            other[name] = state[name]
        other["modes"] = 1 - state["modes"]
        for name, value in sweep.sites(state).items():
            torch.testing.assert_close(sweep.sites(other)[name], value)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_modes": 0}, "num_modes must be a whole number of at least 1, got 0"),
        ({"latent_dim": 1.5}, "latent_dim must be a whole number of at least 1, got 1.5"),
        ({"stickiness": -1.0}, "stickiness must be 0 or more, got -1.0"),
        ({"concentration": 0.0}, "concentration must be positive, got 0.0"),
        ({"persistence": 1.2}, "persistence must lie within max_radius, 1.05, of zero, got 1.2"),
        ({"readout": "poisson"}, "readout must be one of pyrodyn.readouts"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ModelError, match=said):
        SwitchingLDS(**({"num_modes": 2, "latent_dim": 1} | options))


def test_recordings_that_do_not_fit_are_refused():
    like = blank(1, 4, 2, counts=True)
    with pytest.raises(ModelError, match="num_modes is 4 but the recording has 3 steps"):
        SwitchingLDS(4, 1).check(like)
    with pytest.raises(ModelError, match="latent_dim is 3 but the recording has 2 units"):
        SwitchingLDS(2, 3).check(like)
    SwitchingLDS(3, 1).check(like)


# ---------------------------------------------------------------------------------------------- the evidence


def test_particles_give_the_evidence_of_all_mode_paths():
    model, recording, parameters, _, (_, weights) = small()
    evidence = float(torch.logsumexp(weights, 0))
    law = model.latent_path(parameters, recording)
    readout = model.readout_law(parameters, torch.zeros(1, 8, 1).double(), recording)
    with random_stream(0):
        found = torch.stack([switching_evidence(law, readout, recording.values)[0] for _ in range(40)]).flatten()
    ratio = (found - evidence).exp()  # unbiased for p(y)
    assert abs(float(ratio.mean()) - 1.0) < 3.5 * float(ratio.std()) / 40**0.5
    assert float(found.std()) < 0.1


def test_particles_of_counts_and_state_dependent_modes_agree_with_a_plain_filter():
    model = SwitchingLDS(2, 1, recurrent=True, stickiness=3.0)
    # Few bins: paths from the prior have to come near those of the posterior.
    like = blank(2, 4, 2, counts=True, inputs=1, lengths=[4, 3])
    with torch.no_grad(), numerics(), random_stream(3):
        values = prior_draws(model, like, 1, 4)
        parameters = globals_given(model, values, like)
        path, _ = model.latent_path(parameters, like).expand((1, 2)).sample_jointly()
        seen = torch.where(like.mask, model.readout_law(parameters, path, like).sample()[0], 0.0)
        recording = like.with_observations(seen)
        law, zeros = model.latent_path(parameters, recording), torch.zeros(2, 4, 1).double()
        readout = model.readout_law(parameters, zeros, recording)
        found = switching_evidence(law, readout, seen, particles=20_000)[0]
        # Paths from the prior, weighted by what they say of so few bins.
        many = law.expand((1, 2)).sample((100_000,))
        fit = model.readout_law(parameters, many, recording).log_prob(seen)
    plain = fit.logsumexp(0) - np.log(len(fit))
    share = (fit - fit.logsumexp(0)).exp()
    error = (share.square().sum(0)).sqrt()
    assert float(error.max()) < 0.05
    assert float(((found - plain) / (error**2 + 0.01**2).sqrt()).abs().max()) < 4.0


def short_runs() -> tuple[SwitchingLDS, Any, Any, list]:
    """Three trials of six bins, a short run of Gibbs on them, and all 64 paths of the modes."""
    model = SwitchingLDS(2, 1, stickiness=3.0, readout=readouts.Gaussian())
    recording, _ = dyn.simulate(model, blank(3, 6, 2, counts=False), seed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        posterior = dyn.fit(model, recording, SHORT, seed=0)
    return model, recording, posterior, list(itertools.product(range(2), repeat=6))


def log_mean(values: np.ndarray) -> np.ndarray:
    return scipy.special.logsumexp(values, axis=0) - np.log(len(values))


def test_leaving_a_trial_out_sums_over_all_paths_by_particles():
    model, recording, posterior, sequences = short_runs()
    candidate = Candidate("switching", model, posterior, recording)
    terms = terms_of(candidate)
    assert terms.likelihood == "particles" and terms.log_likelihood.shape == (30, 3)
    exact = over_paths(model, candidate.globals_at(terms.positions), recording, sequences)
    apart = terms.log_likelihood - exact
    assert np.abs(apart).max() < 0.5 and np.abs(apart.mean(0)).max() < 0.05 and apart.std() > 1e-4
    left_out = -log_mean(-exact)  # importance weights as they are
    assert abs(LOO().score(candidate, None, 0).pointwise.sum() - float(left_out.sum())) < 0.5


def test_folds_and_hidden_entries_of_switching_dynamics_sum_over_all_paths():
    model, recording, posterior, sequences = short_runs()
    candidate = Candidate("switching", model, posterior, recording)
    folds = KFold(folds=3).score(candidate, None, 0)
    assert folds.likelihood == "particles"
    for k in range(3):
        trial = int(np.flatnonzero(_fold_of(recording, 3, 0) == k)[0])
        rest = recording.isel(trial=np.delete(np.arange(3), trial))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dyn.FitWarning)
            refit = dyn.fit(model, rest, SHORT, seed=k)
        own = Candidate("refit", model, refit, rest)
        exact = over_paths(model, own.globals_at(np.arange(30)), recording.isel(trial=[trial]), sequences)
        assert abs(folds.pointwise[trial] - float(log_mean(exact)[0])) < 0.1

    hidden = np.zeros(recording.values.shape, dtype=bool)
    hidden[:, 3, :] = True
    entries = HeldOutEntries().score(
        Candidate("switching", model, posterior, recording.hide(mask=hidden)), recording, 0
    )
    parameters = candidate.globals_at(np.arange(30))
    whole, seen = (over_paths(model, parameters, part, sequences) for part in (recording, recording.hide(mask=hidden)))
    assert entries.likelihood == "particles"
    np.testing.assert_allclose(entries.pointwise, log_mean(whole - seen), atol=0.15)


# ---------------------------------------------------------------------------------------------- prediction


def test_draws_of_path_and_modes_are_those_of_all_mode_paths():
    model, recording, parameters, values, (chosen, weights) = small()
    many = 3000
    share = torch.softmax(weights, 0)
    expected = torch.einsum("p,ptk->tk", share, chosen)
    with torch.no_grad(), numerics(), random_stream(3):
        law = model.latent_path(parameters, recording).given_modes(chosen.unsqueeze(1))
        readout = model.readout_law(parameters, torch.zeros(1, 8, 1).double(), recording)
        near = law.condition(*gaussian_potential(readout, recording.values))
        mean = torch.einsum("p,ptd->td", share, near.mean[:, 0])
        square = torch.einsum("p,ptd->td", share, near.mean[:, 0].square() + near.variance[:, 0])
        wide = {n: v.expand(many, *v.shape[1:]) for n, v in values.items()}
        local = model.draw_local(globals_given(model, wide, recording), recording)
    found = torch.nn.functional.one_hot(local["mode"][:, 0], 2).double().mean(0)
    assert float(((found - expected) / (expected * (1.0 - expected) / many).sqrt()).abs().max()) < 4.0
    path = local["latent"][:, 0]
    assert float(((path.mean(0) - mean) / ((square - mean.square()) / many).sqrt()).abs().max()) < 4.0
    assert float(((path.square().mean(0) - square) / (path.square().std(0) / many**0.5)).abs().max()) < 4.0


def test_draws_given_counts_agree_with_weighted_draws_of_the_prior_and_with_a_mode_of_each_trial():
    model = SwitchingLDS(2, 1, recurrent=True, stickiness=3.0)
    like = blank(2, 4, 2, counts=True, inputs=1, lengths=[4, 3])  # few bins, as above
    many = 2000
    with torch.no_grad(), numerics(), random_stream(3):
        values = prior_draws(model, like, 1, 5)
        values["process_scale"] = torch.full_like(values["process_scale"], 2.0)  # modes that noise can take for others
        parameters = globals_given(model, values, like)
        path = model.latent_path(parameters, like).expand((1, 2)).sample()
        seen = torch.where(like.mask, model.readout_law(parameters, path, like).sample()[0], 0.0)
        recording = like.with_observations(seen)
        wide = globals_given(model, {n: v.expand(many, *v.shape[1:]) for n, v in values.items()}, recording)
        local = model.draw_local(wide, recording)
        prior, modes = model.latent_path(parameters, recording).expand((1, 2)).sample_jointly((200_000,))
        fit = model.readout_law(parameters, prior, recording).log_prob(seen)
        # The slow route, by which models without moves of their own predict.
        slow = LocalInference().infer(model, parameters, recording).sample(many)["latent"]
    weight = torch.softmax(fit, 0)[..., 0, :, None, None]
    mean = (weight * prior[:, 0]).sum(0)
    sd = (weight * (prior[:, 0] - mean).square()).sum(0).sqrt()
    error = ((weight**2).sum(0) + 1.0 / many).sqrt()
    assert float(error.max()) < 0.05
    assert float(((local["latent"].mean(0) - mean) / sd / error).abs().max()) < 4.0
    share = (weight[..., 0] * (modes[:, 0] == 1)).sum(0)
    found = (local["mode"] == 1).double().mean(0)
    spread = (share * (1.0 - share)).sqrt().clamp(min=0.05)  # that of a rare mode is not known better
    assert float(((found - share) / error[..., 0] / spread).abs().max()) < 4.0
    assert float(((slow.mean(0) - local["latent"].mean(0)) / sd).abs().max()) < 0.5  # it takes the mode for the mean


def test_one_draw_predicts_with_the_spread_of_its_paths():
    model, recording, *_ = small()
    engine = inference.SVI(steps=5, draws=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        posterior = dyn.fit(model, recording, engine, seed=0)
    assert posterior["posterior"].sizes["draw"] == 1
    found = dyn.predict(posterior, recording, draws=50)
    assert (found["path_sd"] > 0.0).all() and (found["expected_sd"] > 0.0).all()
