"""Engines agree where they must: with each other and with importance sampling, and when things go wrong."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from functools import cache

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import torch
import xarray as xr
import zoo
from threadpoolctl import ThreadpoolController

import pyrodyn as dyn
from pyrodyn import guides, inference, models, readouts
from pyrodyn.distributions import GaussMarkov
from pyrodyn.errors import CollapseError, ModelError, NonFiniteError
from pyrodyn.inference import LogDensity, collapse, collapses, engine, svi
from pyrodyn.inference.mode import ascend, covariance_root, negative_hessian
from pyrodyn.inference.whitening import whiten
from pyrodyn.program import LatentModel, StateSpaceModel, globals_given, log_joint
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

MODEL = models.LDS(1, readouts.Gaussian())
TRUTH = {"mixing": torch.tensor([[0.8]]), "weights": torch.tensor([[1.4], [-0.9], [1.1]])}


@cache
def simulated(trials: int, bins: int, units: int) -> Recording:
    like = Recording.from_arrays(
        np.zeros((trials, bins, units)), bin_width=0.1, counts=False, center=np.zeros(units), scale=np.ones(units)
    ).blank()
    values = {"mixing": TRUTH["mixing"], "weights": TRUTH["weights"][:units], "noise_sd": torch.full((units,), 0.6)}
    return dyn.simulate(MODEL, like, seed=0, values=values | {"offset": torch.zeros(units)})[0]


@cache
def invariants(engine, size: tuple[int, int, int]) -> tuple[xr.Dataset, xr.DataTree]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        tree = dyn.fit(MODEL, simulated(*size), engine, seed=1)
    return tree["invariants"].to_dataset().drop_vars("eigenvalue_angle"), tree  # 0 or pi with one latent


# ---------------------------------------------------------------------------------------------- agreement

LARGE = (40, 100, 3)  # near-Gaussian, or Laplace's approximation could not agree; larger costs no more
REFERENCE = inference.NUTS(draws=300, warmup=80, chains=1)
APPROXIMATIONS = {
    "Laplace": inference.Laplace(draws=3000),
    "SVI": inference.SVI(steps=300, draws=3000),
    "SVI-structured": inference.SVI(steps=300, draws=3000, guide=guides.Structured()),
}
DRAW = ("chain", "draw")


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_approximations_agree_with_nuts(name):
    reference, _ = invariants(REFERENCE, LARGE)
    found, _ = invariants(APPROXIMATIONS[name], LARGE)
    for variable in reference:
        spread = reference[variable].std(DRAW)
        bias = (found[variable].mean(DRAW) - reference[variable].mean(DRAW)) / spread
        ratio = found[variable].std(DRAW) / spread
        assert float(abs(bias).max()) < 0.2, (variable, bias.values)
        assert float(ratio.min()) > 0.7 and float(ratio.max()) < 1.3, (variable, ratio.values)


def test_nuts_agrees_with_importance_sampling():
    """Laplace's draws, weighted by p / q, are the posterior by a route without a Markov chain."""
    reference, chain = invariants(REFERENCE, LARGE)
    proposed, tree = invariants(APPROXIMATIONS["Laplace"], LARGE)
    log_weight = (tree["sample_stats"]["lp"] - tree["sample_stats"]["log_q"]).to_dataset(name="w")["w"]
    weight = np.exp(log_weight - log_weight.max())
    weight = weight / weight.sum()
    effective = 1.0 / float(np.square(weight).sum())
    assert effective > 1000 and json.loads(tree.attrs["diagnostics"])["k_hat"] < 0.7
    error = arviz_stats.mcse(reference)
    for variable in reference:
        exact = (weight * proposed[variable]).sum(DRAW)
        spread = np.sqrt((weight * np.square(proposed[variable] - exact)).sum(DRAW))
        combined = np.sqrt(np.square(error[variable]) + np.square(spread) / effective)
        assert float((abs(reference[variable].mean(DRAW) - exact) / combined).max()) < 4.0, variable
    assert not chain["sample_stats"]["diverging"].any()
    # The evidence by importance sampling is what Laplace over the globals says it is, nearly.
    evidence = float(log_weight.max() + np.log(np.exp(log_weight - log_weight.max()).mean()))
    assert json.loads(tree.attrs["notes"])["log_evidence"] == pytest.approx(evidence, abs=0.3)


def test_the_bound_is_below_the_evidence_and_near_it():
    _, laplace = invariants(APPROXIMATIONS["Laplace"], LARGE)
    evidence = json.loads(laplace.attrs["notes"])["log_evidence"]
    for name in ("SVI", "SVI-structured"):
        _, tree = invariants(APPROXIMATIONS[name], LARGE)
        assert -2.0 < json.loads(tree.attrs["notes"])["elbo"] - evidence < 0.5


def within_error(first: xr.Dataset, second: xr.Dataset) -> None:
    """Means within four Monte Carlo errors, for every invariant."""
    errors = [arviz_stats.mcse(part) for part in (first, second)]
    for variable in first:
        combined = np.sqrt(sum(np.square(error[variable]) for error in errors))
        difference = first[variable].mean(DRAW) - second[variable].mean(DRAW)
        assert float((abs(difference) / combined).max()) < 4.0, variable


def test_hmc_agrees_with_nuts():
    reference, _ = invariants(REFERENCE, LARGE)
    found, tree = invariants(inference.HMC(chains=16, draws=40, warmup=60), LARGE)
    assert json.loads(tree.attrs["diagnostics"])["max_nested_r_hat"] < 1.02
    within_error(reference, found)


def test_collapsed_and_path_sampled_nuts_agree():
    size = (1, 5, 2)
    options = {"draws": 100, "warmup": 50, "chains": 1, "max_tree_depth": 3}
    collapsed, _ = invariants(inference.NUTS(**options), size)
    sampled, tree = invariants(inference.NUTS(**options, collapse=False), size)
    assert tree.attrs["path_treatment"].startswith("sampled")
    within_error(collapsed, sampled)


@pytest.mark.long
def test_collapsed_and_path_sampled_hmc_agree():
    """On paths of 120 bins in all, and with NUTS as well."""
    size = (4, 30, 3)
    options = {"chains": 16, "draws": 80, "warmup": 80}
    collapsed, _ = invariants(inference.HMC(**options), size)
    sampled, tree = invariants(inference.HMC(**options, collapse=False), size)
    assert tree.attrs["path_treatment"].startswith("sampled")
    within_error(collapsed, sampled)
    nuts, _ = invariants(inference.NUTS(draws=200, warmup=80, chains=1), size)
    within_error(collapsed, nuts)


# ------------------------------------------------------------------------------------------ the same density, rewritten


@pytest.mark.parametrize(
    "name", ["LDS-Gaussian-inputs-missing", "LDS-Poisson-ragged-missing", "LDS-Bernoulli-one-trial"]
)
def test_whitening_rewrites_the_density_and_nothing_else(name):
    """log p(y, x(z), theta) + log |dx/dz|, for any z; with a Gaussian readout z is independent of all else."""
    row = zoo.row(name)
    recording = row.recording
    program, _ = whiten(row.model, recording, row.model.initial_values(recording))
    values = zoo.prior_draws(row.model, recording, (3,))
    shape = (3, recording.num_trials, recording.num_bins, row.model.latent_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = log_joint(program, values | {"whitened_latent": noise}, recording)
    parameters = globals_given(row.model, values, recording)
    path = program.path(parameters, noise, recording)
    volume = []
    for draw in range(3):
        single = {key: value[draw] for key, value in values.items()}
        own = globals_given(row.model, single, recording)
        jacobian = torch.autograd.functional.jacobian(lambda z, own=own: program.path(own, z, recording), noise[draw])
        size = noise[draw].numel()
        volume.append(torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet)
    expected = log_joint(row.model, values | {"latent": path}, recording) + torch.stack(volume)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)
    if row.model.readout.is_gaussian:
        standard = -0.5 * noise.square().flatten(1).sum(-1) - 0.5 * noise[0].numel() * math.log(2.0 * math.pi)
        torch.testing.assert_close(
            found, log_joint(collapse(row.model), values, recording) + standard, rtol=1e-9, atol=1e-8
        )


@pytest.mark.parametrize("guide", zoo.GUIDES, ids=lambda guide: type(guide).__name__)
@pytest.mark.parametrize("structured", [False, True])
def test_every_guide_gives_the_normalised_density_of_its_draws(guide, structured):
    """A Gaussian's log density is quadratic in its draws, and its constant follows from its curvature."""
    row = zoo.row("LDS-Gaussian-inputs-missing")
    options = inference.SVI(
        steps=2, draws=600, particles=1, guide=guides.Structured(globals=guide) if structured else guide
    )
    draws = options.run(row.model, row.recording, seed=0)
    density = LogDensity(collapse(row.model), row.recording)
    assert draws.samples.keys() == {site.name for site in density.sites} and not draws.local
    vectors = density.unconstrain({name: value.flatten(0, 1).unsqueeze(1) for name, value in draws.samples.items()})
    log_q = draws.stats["log_q"].squeeze(0) + density.log_jacobian(vectors)
    root = torch.linalg.cholesky(torch.cov(vectors.T))
    white = torch.linalg.solve_triangular(root, (vectors - vectors.mean(0)).T, upper=False).T
    log_q = log_q + root.diagonal().log().sum()
    size = white.shape[-1]
    rows, columns = torch.triu_indices(size, size)
    design = torch.cat([torch.ones(600, 1), white, white[:, rows] * white[:, columns]], -1)
    found = torch.linalg.lstsq(design, log_q.unsqueeze(-1)).solution.squeeze(-1)
    torch.testing.assert_close(design @ found, log_q, rtol=0, atol=1e-6)
    precision = torch.zeros(size, size, dtype=torch.float64)
    precision[rows, columns] = -found[1 + size :]
    precision = precision + precision.T
    pull = found[1 : 1 + size]
    constant = 0.5 * torch.linalg.slogdet(precision).logabsdet - 0.5 * size * math.log(2.0 * math.pi)
    constant = constant - 0.5 * pull @ torch.linalg.solve(precision, pull)
    torch.testing.assert_close(found[0], constant, rtol=0, atol=1e-6)


def test_the_curvature_at_the_mode_equals_autograd():
    recording = simulated(2, 12, 2)
    density = LogDensity(collapse(MODEL), recording)
    mode, converged = ascend(density, density.unconstrain(MODEL.initial_values(recording)), 500, "test")
    assert converged and float(density.gradient(mode)[1].abs().max()) < 1e-3
    hessian = negative_hessian(density, mode, "test")

    def slope(i: int, step: float) -> torch.Tensor:
        moved = mode.clone()
        moved[i] += step
        return density.gradient(moved)[1]

    for i in range(density.dimension):
        column = -(slope(i, 1e-3) - slope(i, -1e-3)) / 2e-3
        torch.testing.assert_close(hessian[:, i], column, rtol=1e-3, atol=1e-3)
    root, flat = covariance_root(hessian, 1e-4)
    assert flat == 0
    torch.testing.assert_close(root @ root.T @ hessian, torch.eye(len(mode), dtype=torch.float64), rtol=0, atol=1e-8)
    assert bool((root.triu(1) == 0).all()) and bool((root.diagonal() > 0).all())


def test_the_climb_only_goes_up_and_ends_where_scipy_does():
    """The counterpart of an EM algorithm that must not lose likelihood; replicates climb side by side."""
    recording = simulated(2, 12, 2)
    density = LogDensity(collapse(MODEL), recording)
    start = density.unconstrain(MODEL.initial_values(recording))
    values = [float(density.gradient(ascend(density, start, steps, "test")[0])[0]) for steps in range(0, 40, 2)]
    assert np.all(np.diff(values) >= 0.0)

    def loss(vector: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = density.gradient(torch.from_numpy(vector))
        return -float(value), -slope.numpy()

    expected = scipy.optimize.minimize(loss, start.numpy(), jac=True, method="L-BFGS-B", options={"ftol": 1e-14})
    starts = torch.stack([start, start + 0.3, start - 0.2])
    modes, converged = ascend(density, starts, 500, "test")
    assert bool(converged.all())
    np.testing.assert_allclose(density.gradient(modes)[0].numpy(), -expected.fun, rtol=0, atol=1e-6)


class _Bowls:
    """A quadratic, and beside it a ridge on which no line search ends."""

    def gradient(self, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, slope = -0.5 * place.square().sum(-1), -place
        lying = torch.tensor([False, True])
        return torch.where(lying, -place.abs().sum(-1), value), torch.where(lying.unsqueeze(-1), place.sign(), slope)


def test_a_replicate_that_cannot_climb_harms_no_other_and_is_not_called_converged():
    start = torch.tensor([[0.1, 5.0, -4.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    modes, converged = ascend(_Bowls(), start, 50, "test")  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(modes[0], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-5)
    assert converged.tolist() == [True, False]


def test_a_direction_without_curvature_is_counted_and_lifted():
    hessian = torch.diag(torch.tensor([4.0, 0.0, -1.0], dtype=torch.float64))
    root, flat = covariance_root(hessian, 1e-4)
    assert flat == 2
    torch.testing.assert_close(root @ root.T, torch.diag(torch.tensor([0.25, 1e4, 1e4], dtype=torch.float64)))


# ---------------------------------------------------------------------------------------------- NaN


class Flaky(models.LDS):
    """An LDS whose density is NaN when told so."""

    broken = False

    def sample_globals(self, recording):
        parameters = super().sample_globals(recording)
        return parameters._replace(offset=parameters.offset * math.nan) if Flaky.broken else parameters


@pytest.fixture
def break_calls(monkeypatch):
    """Break the program at the training steps for which a predicate of their running number holds."""
    original = svi._Run._advance

    def install(predicate) -> list[int]:
        calls = []

        def advance(run) -> bool:
            calls.append(run.step)
            Flaky.broken = predicate(len(calls) - 1)
            good = original(run)
            # It stays broken where the run is about to give up and looks for the site.
            Flaky.broken = not good and run.failures == svi.MAX_FAILURES
            return good

        monkeypatch.setattr(svi._Run, "_advance", advance)
        return calls

    yield install
    Flaky.broken = False


def flaky_run(steps: int = 80):
    return inference.SVI(steps=steps, particles=1, draws=10).run(
        Flaky(1, readouts.Gaussian()), simulated(2, 12, 2), seed=0
    )


@pytest.mark.parametrize("bad", [{0}, {30}, {60}, {30, 31}])
def test_a_step_that_is_not_finite_is_taken_back(bad, break_calls):
    calls = break_calls(lambda call: call in bad)
    draws = flaky_run()
    losses = draws.history["loss"]
    assert len(losses) == 80 and np.isfinite(losses).all()
    assert all(bool(torch.isfinite(value).all()) for value in draws.samples.values())
    # Every failure goes back to the last state kept, at step 0 or 50, never further.
    returned = [calls[call + 1] for call in sorted(bad)]
    assert returned == [50 if call >= 50 else 0 for call in sorted(bad)]
    assert len(calls) == 80 + sum(calls[call] - back + 1 for call, back in zip(sorted(bad), returned, strict=True))


@pytest.mark.parametrize(
    "predicate", [lambda call: call >= 30, lambda call: call % 30 == 29], ids=["for ever", "again and again"]
)
def test_steps_that_stay_broken_end_in_an_error_that_names_step_and_site(predicate, break_calls):
    calls = break_calls(predicate)
    with pytest.raises(
        NonFiniteError, match=r"SVI.*not finite at step \d+.*at site 'observations'.*learning_rate=0.02"
    ):
        flaky_run()
    assert len(calls) <= 4 * 30


@pytest.mark.parametrize("engine", [inference.Laplace(), inference.NUTS(draws=2, warmup=2), inference.SVI(steps=2)])
def test_a_density_that_is_never_finite_is_an_error_before_the_first_step(engine):
    Flaky.broken = True
    try:
        with pytest.raises(
            NonFiniteError, match=f"{type(engine).__name__}.*not finite at the initial values \\(step 0\\)"
        ):
            engine.run(Flaky(1, readouts.Gaussian()), simulated(2, 12, 2), seed=0)
    finally:
        Flaky.broken = False


# ---------------------------------------------------------------------------------------------- models of one's own


class Independent(models.LDS):
    """A path without memory, and so without a chain to integrate out."""

    def latent_path(self, parameters, recording):
        return dist.Normal(torch.zeros(recording.num_bins, self.latent_dim, dtype=torch.float64), 1.0).to_event(2)


class Squared(models.LDS):
    """A readout that bends the path."""

    def readout_law(self, parameters, path, recording):
        predictor = path.square() @ parameters.loading.mT + parameters.offset.unsqueeze(-2)
        return dist.Normal(predictor, parameters.noise.unsqueeze(-2)).to_event(2)


@dataclass(frozen=True)
class Levels(LatentModel):
    """A model without any path."""

    def check(self, recording):
        pass

    def sample_globals(self, recording):
        return pyro.sample("level", dist.Normal(torch.zeros(recording.num_units, dtype=torch.float64), 5.0).to_event(1))

    def initial_values(self, recording):
        return {"level": torch.zeros(recording.num_units, dtype=torch.float64)}

    def label(self, parameters):
        return {"level": (("unit",), parameters)}

    def unlabel(self, values):
        return values["level"]

    def invariants(self, parameters):
        return self.label(parameters)

    def transformed(self, parameters, recording, seed):
        return parameters

    def forward(self, recording):
        level = self.sample_globals(recording)
        with pyro.plate("trial", recording.num_trials, dim=-1):
            law = dist.Normal(level.unsqueeze(-2), torch.ones(recording.num_bins, 1, dtype=torch.float64)).to_event(2)
            return pyro.sample("observations", law, obs=recording.observations)


OWN = {
    "path": Independent(1, readouts.Gaussian()),
    "readout": Squared(1, readouts.Gaussian()),
    "neither": Levels(),
}
REFUSALS = {
    "path": "Independent: the path follows Independent, and only a GaussMarkov path.*collapse=False",
    "readout": "Squared: the readout Independent is not affine.*collapse=False",
    "neither": "Levels is neither a StateSpaceModel",
}


@pytest.mark.parametrize(("model", "message"), [(OWN[key], REFUSALS[key]) for key in OWN], ids=OWN)
def test_what_cannot_be_collapsed_is_refused_by_name(model, message):
    recording = simulated(2, 12, 2)
    assert not collapses(model, recording)
    for one in (inference.NUTS(collapse=True), inference.SVI(collapse=True), inference.Laplace()):
        with pytest.raises(CollapseError, match=message):
            one.run(model, recording, seed=0)
    with pytest.raises(ModelError, match="the guide Structured needs"):
        inference.SVI(guide=guides.Structured()).run(model, recording, seed=0)
    assert issubclass(CollapseError, TypeError)


@pytest.mark.parametrize("model", OWN.values(), ids=OWN)
@pytest.mark.parametrize(
    "engine",
    [inference.SVI(steps=5, draws=8, particles=2), inference.NUTS(draws=4, warmup=3, max_tree_depth=2)],
    ids=["SVI", "NUTS"],
)
def test_what_cannot_be_collapsed_is_sampled(model, engine):
    recording = simulated(2, 12, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        tree = dyn.fit(model, recording, engine, seed=0)
    assert "sampled" in tree.attrs["path_treatment"] and tree.attrs["log_likelihood_estimator"] == "none"
    assert "log_likelihood" not in tree.children and "lp" not in tree["sample_stats"]
    assert all(np.isfinite(value).all() for value in tree["posterior"].data_vars.values())
    if isinstance(model, StateSpaceModel):
        assert tree["latents"]["mean"].shape == (2, 12, 1) and float(tree["latents"]["draws"].std()) > 0
    with pytest.raises(ModelError, match=f"fitted with '{type(model).__name__}'.*model="):
        dyn.model_of(tree)


def test_a_model_without_a_path_has_its_known_posterior():
    """Conjugate: the level of each unit is normal, with mean and sd in closed form."""
    recording = simulated(2, 12, 2)
    tree = dyn.fit(Levels(), recording, inference.SVI(steps=400, learning_rate=0.1, draws=4000), seed=0)
    precision = 24.0 + 1.0 / 25.0
    expected = recording.observations.sum((0, 1)).numpy() / precision
    level = tree["posterior"]["level"]
    np.testing.assert_allclose(level.mean(DRAW), expected, rtol=0, atol=0.1 * precision**-0.5)
    np.testing.assert_allclose(level.std(DRAW), precision**-0.5, rtol=0.1)


def test_things_that_are_no_model_are_refused():
    for thing in (lambda recording: None, models.LDS, "LDS", None):
        with pytest.raises(ModelError, match="model must be one of pyrodyn.models"):
            dyn.fit(thing, simulated(2, 12, 2))
    with pytest.raises(CollapseError, match="function is neither a StateSpaceModel"):
        collapse(lambda recording: None)


def test_collapsing_twice_is_collapsing_once():
    recording, once = simulated(2, 12, 2), collapse(MODEL)
    assert collapse(once) is once and collapses(once, recording)
    parameters = globals_given(MODEL, zoo.prior_draws(MODEL, recording, (2,)), recording)
    prior, readout = once.factors(parameters, recording)
    assert isinstance(prior, GaussMarkov) and isinstance(readout, AffineReadout)


def test_numerics_hold_inside_and_leave_the_users_settings_as_they_were():
    def blas() -> set[int]:
        return {
            pool["num_threads"] for pool in ThreadpoolController().info() if pool.get("threading_layer") == "pthreads"
        }

    with ThreadpoolController().limit(limits=2, user_api="blas"):
        before = blas()
        with pytest.raises(KeyError), engine.numerics():
            with engine.numerics():
                pass
            assert torch.get_default_dtype() == torch.float64 and blas() <= {1}
            raise KeyError
        assert torch.get_default_dtype() == torch.float32 and blas() == before


def test_a_start_is_climbed_to_once_and_cannot_be_spoilt(monkeypatch):
    climbed, original = [], engine.ascend
    monkeypatch.setattr(engine, "ascend", lambda *args: climbed.append(1) or original(*args))
    row = zoo.row("LDS-Gaussian")
    model, recording = models.LDS(2, readouts.Gaussian()), row.like().with_observations(row.recording.observations)
    with engine.numerics():
        first = engine.starting_values(model, recording, 20, "test")
        kept = {name: value.clone() for name, value in first.items()}
        for value in first.values():
            value.zero_()
        again = engine.starting_values(model, recording, 20, "test")
        assert len(climbed) == 1 and all(torch.equal(again[name], kept[name]) for name in kept)
        engine.starting_values(model, recording, 21, "test")  # of other options, and of another model
        engine.starting_values(models.LDS(2, readouts.Gaussian()), recording, 20, "test")
    assert len(climbed) == 3
