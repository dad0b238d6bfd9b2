"""What observations say of a path: against dense Gaussians, other libraries' filters, published outputs, quadrature."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas
import pyro.distributions as dist
import pytest
import statsmodels.datasets
import statsmodels.tsa.statespace
import torch
import zoo
from statsmodels.tsa.statespace.mlemodel import MLEModel
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import MultivariateNormal

from pyrodyn import conditioning
from pyrodyn.conditioning import (
    find_mode,
    gaussian_evidence,
    gaussian_potential,
    laplace_evidence,
    laplace_path,
    linearised_potential,
    path_evidence,
    path_given,
)
from pyrodyn.distributions import GaussMarkov
from pyrodyn.readouts import AffineReadout, Bernoulli, Gaussian, NegativeBinomial, Poisson, Readout

COUNTS = [pytest.param(law, id=type(law).__name__) for law in zoo.READOUTS if not law.is_gaussian]


class Case:
    """A random LDS, its readout, and data simulated from it, all as plain tensors."""

    def __init__(
        self, law: Readout, *, trials=2, bins=6, units=3, dim=2, seed=0, observed=None, drifting=False
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.law, self.observed, eye = law, observed, torch.eye(dim, dtype=torch.float64)
        self.dynamics = 0.8 * torch.linalg.qr(normal(dim, dim))[0]
        root = 0.4 * normal(dim, dim)
        self.noise_covariance = root @ root.T + 0.2 * eye
        self.initial = self.noise_covariance + 0.5 * eye
        self.mean = 0.3 * normal(dim)
        self.drift = 0.5 * normal(trials, bins - 1, dim) if drifting else None
        self.loading, self.offset = 0.7 * normal(units, dim), normal(units)
        self.noise = None if law.noise_name is None else 0.3 + normal(units).square()
        self.bins, self.dim, self.units = bins, dim, units
        torch.manual_seed(seed)
        path = self.prior().expand((trials,)).sample()
        self.data = self.readout(path).sample()

    def prior(self) -> GaussMarkov:
        return GaussMarkov.from_dynamics(
            self.dynamics, self.noise_covariance, num_bins=self.bins, initial_covariance=self.initial,
            initial_mean=self.mean, drift=self.drift,
        )  # fmt: skip

    def readout(self, path: Tensor | None = None) -> AffineReadout:
        path = torch.zeros(len(self.data), self.bins, self.dim, dtype=torch.float64) if path is None else path
        return AffineReadout(self.law, path, self.loading, self.offset, self.noise, self.observed)

    def parts(self) -> tuple[GaussMarkov, AffineReadout, Tensor]:
        return self.prior(), self.readout(), self.data


def dense_posterior(case: Case, trial: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance and log evidence of one trial from the joint Gaussian of path and observed entries."""
    bins, dim, units = case.bins, case.dim, case.units
    mean, covariance = [case.mean], torch.zeros(bins, dim, bins, dim, dtype=torch.float64)
    covariance[0, :, 0] = case.initial
    for t in range(1, bins):
        mean.append(case.dynamics @ mean[-1] + (0.0 if case.drift is None else case.drift[trial, t - 1]))
        covariance[t, :, t] = case.dynamics @ covariance[t - 1, :, t - 1] @ case.dynamics.T + case.noise_covariance
        for s in range(t):
            covariance[t, :, s] = case.dynamics @ covariance[t - 1, :, s]
            covariance[s, :, t] = covariance[t, :, s].T
    prior_mean, prior = torch.cat(mean), covariance.reshape(bins * dim, bins * dim)
    seen = torch.ones(bins * units, dtype=torch.bool) if case.observed is None else case.observed[trial].flatten()
    rows = torch.block_diag(*[case.loading] * bins)[seen]
    values = (case.data[trial] - case.offset).flatten()[seen]
    spread = rows @ prior @ rows.T + torch.diag(case.noise.square().repeat(bins)[seen])
    gain = torch.linalg.solve(spread, rows @ prior).T
    mean_given = prior_mean + gain @ (values - rows @ prior_mean)
    evidence = MultivariateNormal(rows @ prior_mean, spread).log_prob(values) if len(values) else torch.zeros(())
    return mean_given.reshape(bins, dim), prior - gain @ rows @ prior, evidence


def some_observed(kind: str, trials: int, bins: int, units: int) -> Tensor | None:
    if kind == "all":
        return None
    observed = torch.ones(trials, bins, units, dtype=torch.bool)
    if kind == "ragged":
        for trial in range(trials):
            observed[trial, bins - 2 * trial :] = trial == 0
        return observed
    observed = torch.rand(trials, bins, units, generator=torch.Generator().manual_seed(1)) < 0.6
    observed[0, bins // 2] = False  # a bin in which nothing was seen
    observed[1] = False  # and a trial
    return observed


# ------------------------------------------------------------------------------------------ exact: Gaussian readouts


@pytest.mark.parametrize("kind", ["all", "ragged", "missing"])
@pytest.mark.parametrize(("bins", "dim", "drifting"), [(1, 1, False), (1, 2, False), (6, 2, False), (7, 3, True)])
def test_gaussian_posterior_and_evidence_equal_dense_conditioning(kind, bins, dim, drifting):
    observed = some_observed(kind, 3, bins, 4)
    case = Case(Gaussian(), trials=3, bins=bins, units=4, dim=dim, observed=observed, drifting=drifting)
    posterior, evidence = path_given(*case.parts()), path_evidence(*case.parts())
    for trial in range(3):
        mean, covariance, log_evidence = dense_posterior(case, trial)
        assert float((posterior.mean[trial] - mean).abs().max()) < 1e-10
        blocks = covariance.reshape(bins, dim, bins, dim)
        found = posterior.covariance.expand(3, bins, dim, dim)[trial]
        for t in range(bins):
            assert float((found[t] - blocks[t, :, t]).abs().max()) < 1e-10
        cross = posterior.cross_covariance.expand(3, bins - 1, dim, dim)[trial]
        for t in range(bins - 1):
            assert float((cross[t] - blocks[t, :, t + 1]).abs().max()) < 1e-10
        assert float((evidence[trial] - log_evidence).abs()) < 1e-9


@pytest.mark.parametrize("law", [pytest.param(law, id=type(law).__name__) for law in zoo.READOUTS])
def test_missing_and_padded_bins_equal_bins_removed(law):
    """A trial that ends early, and what stands behind its end, say nothing."""
    case = Case(law, trials=2, bins=9)
    case.observed = torch.ones(2, 9, 3, dtype=torch.bool)
    case.observed[:, 5:] = False
    case.data[:, 5:] = torch.nan
    posterior, evidence = path_given(*case.parts()), path_evidence(*case.parts())
    short = Case(law, trials=2, bins=9)
    short.bins, short.data = 5, short.data[:, :5]
    expected = path_given(*short.parts())
    torch.testing.assert_close(evidence, path_evidence(*short.parts()), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.mean[:, :5], expected.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        posterior.covariance.expand(2, 9, 2, 2)[:, :5], expected.covariance.expand(2, 5, 2, 2), rtol=1e-10, atol=1e-10
    )
    # Behind the end the prior goes on from the last bin.
    ahead = posterior.mean[:, 4] @ case.dynamics.T
    torch.testing.assert_close(posterior.mean[:, 5], ahead, rtol=1e-9, atol=1e-9)


def test_draws_and_trials_broadcast():
    case, other = Case(Gaussian(), trials=3, seed=0), Case(Gaussian(), trials=3, seed=1)
    together = Case(Gaussian(), trials=3, seed=0)
    for name in ("dynamics", "noise_covariance", "initial", "loading"):
        setattr(together, name, torch.stack([getattr(case, name), getattr(other, name)]).unsqueeze(1))
    for name in ("mean", "offset", "noise"):
        setattr(together, name, torch.stack([getattr(case, name), getattr(other, name)]).unsqueeze(1))
    other.data = case.data
    found = path_evidence(*together.parts())
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, torch.stack([path_evidence(*case.parts()), path_evidence(*other.parts())]))


def test_offsets_far_from_zero_cost_no_digits():
    case = Case(Gaussian(), trials=2)
    evidence = path_evidence(*case.parts())
    case.offset, case.data = case.offset + 1e7, case.data + 1e7
    torch.testing.assert_close(path_evidence(*case.parts()), evidence, rtol=0, atol=1e-5)


def test_gaussian_readout_is_the_laplace_approximation_of_itself():
    """Two routes through the code that must agree where the likelihood is quadratic."""

    class Disguised(Gaussian):
        is_gaussian = False

    observed = some_observed("missing", 2, 6, 3)
    plain, disguised = (Case(law, observed=observed) for law in (Gaussian(), Disguised()))
    torch.testing.assert_close(
        laplace_evidence(*disguised.parts()), gaussian_evidence(*plain.parts()), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(
        laplace_path(*disguised.parts()).mean, path_given(*plain.parts()).mean, rtol=0, atol=1e-9
    )


# ---------------------------------------------------------------------------------------------- other libraries


@pytest.mark.parametrize("missing", [False, True])
def test_equals_the_kalman_smoother_of_statsmodels(missing):
    observed = torch.rand(1, 40, 4, generator=torch.Generator().manual_seed(2)) < 0.7 if missing else None
    case = Case(Gaussian(), trials=1, bins=40, units=4, dim=3, observed=observed, drifting=True)
    values = case.data[0].numpy().copy()
    if observed is not None:
        values[~observed[0].numpy()] = np.nan
    model = MLEModel(values, k_states=3, k_posdef=3)
    model["design"], model["transition"] = case.loading.numpy(), case.dynamics.numpy()
    model["selection"], model["state_cov"] = np.eye(3), case.noise_covariance.numpy()
    model["obs_cov"], model["obs_intercept"] = np.diag(case.noise.square().numpy()), case.offset.numpy()[:, None]
    # Their drift at t leads to the state at t + 1.
    model["state_intercept"] = np.concatenate([case.drift[0].numpy().T, np.zeros((3, 1))], 1)
    model.ssm.initialize_known(case.mean.numpy(), case.initial.numpy())
    reference = model.ssm.smooth()
    posterior = path_given(*case.parts())
    np.testing.assert_allclose(posterior.mean[0].numpy(), reference.smoothed_state.T, rtol=0, atol=1e-8)
    np.testing.assert_allclose(
        posterior.covariance.expand(1, 40, 3, 3)[0].numpy(),
        np.moveaxis(reference.smoothed_state_cov, -1, 0),
        rtol=0,
        atol=1e-8,
    )
    assert float(path_evidence(*case.parts())[0]) == pytest.approx(reference.llf_obs.sum(), abs=1e-8)


class Published:
    """A model and its outputs from KFAS (R), as shipped with statsmodels' own tests: US macroeconomic series."""

    results = Path(statsmodels.tsa.statespace.__file__).parent / "tests" / "results"

    def __init__(self, file: str, values: np.ndarray, dynamics, process_noise, noise_variance) -> None:
        self.table = pandas.read_csv(self.results / file)
        observed = torch.from_numpy(~np.isnan(values)).unsqueeze(0)
        self.data = torch.from_numpy(np.nan_to_num(values)).unsqueeze(0)
        eye = torch.eye(3, dtype=torch.float64)
        self.prior = GaussMarkov.from_dynamics(
            torch.tensor(dynamics, dtype=torch.float64), torch.tensor(process_noise, dtype=torch.float64),
            num_bins=len(values), initial_covariance=1e6 * eye,
        )  # fmt: skip
        noise = torch.tensor(noise_variance, dtype=torch.float64).sqrt()
        path, offset = torch.zeros(1, len(values), 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        self.readout = AffineReadout(Gaussian(), path, eye, offset, noise, observed)


def macroeconomic_series() -> np.ndarray:
    table = statsmodels.datasets.macrodata.load_pandas().data
    return table[["realgdp", "realcons", "realinv"]].to_numpy(float)


def random_walks_with_missing_values() -> tuple[Published, float]:
    values = np.diff(macroeconomic_series(), axis=0)
    values[0:50, 0] = values[19:70, 1] = values[39:90, 2] = values[119:130, 0] = values[119:130, 2] = np.nan
    eye = np.eye(3)
    return Published("results_smoothing_R.csv", values, eye, eye, np.ones(3)), -205310.9767


def vector_autoregression() -> tuple[Published, float]:
    dynamics = [
        [-0.1119908792, 0.8441841604, 0.0238725303],
        [0.2629347724, 0.4996718412, -0.0173023305],
        [-3.2192369082, 4.1536028244, 0.4514379215],
    ]
    noise = [
        [0.0000640649, 0.0000388496, 0.0002148769],
        [0.0000388496, 0.0000572802, 0.000001555],
        [0.0002148769, 0.000001555, 0.0017088585],
    ]
    values = np.diff(np.log(macroeconomic_series()), axis=0)
    return Published("results_smoothing2_R.csv", values, dynamics, noise, np.diagonal(noise).copy()), 1695.34872


@pytest.mark.parametrize("make", [random_walks_with_missing_values, vector_autoregression])
def test_equals_published_kalman_outputs(make):
    case, log_likelihood = make()
    posterior = path_given(case.prior, case.readout, case.data)
    assert float(path_evidence(case.prior, case.readout, case.data)) == pytest.approx(log_likelihood, rel=1e-9)
    np.testing.assert_allclose(
        posterior.mean[0].numpy(), case.table[["alphahat1", "alphahat2", "alphahat3"]].to_numpy(), rtol=1e-6, atol=1e-7
    )
    determinant = torch.linalg.det(posterior.covariance)[0].numpy()
    # A covariance of 1e6 beside a noise of 1e-5 costs their filter the last digits in the first bin.
    np.testing.assert_allclose(determinant, case.table["detV"].to_numpy(), rtol=1e-5)


def test_equals_the_gaussian_hmm_of_pyro():
    """Its initial law is of the state before the first transition, and its matrices act on row vectors."""
    case = Case(Gaussian(), trials=3, bins=11)
    before = torch.linalg.solve(
        case.dynamics, torch.linalg.solve(case.dynamics, case.initial - case.noise_covariance).T
    ).T
    mean_before = torch.linalg.solve(case.dynamics, case.mean)
    zero = torch.zeros(2, dtype=torch.float64)
    reference = dist.GaussianHMM(
        MultivariateNormal(mean_before, 0.5 * (before + before.T)),
        case.dynamics.T,
        MultivariateNormal(zero, case.noise_covariance),
        case.loading.T,
        MultivariateNormal(case.offset, torch.diag(case.noise.square())),
        duration=11,
    )
    torch.testing.assert_close(path_evidence(*case.parts()), reference.log_prob(case.data), rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------- Laplace: counts


@pytest.mark.parametrize("law", COUNTS)
@pytest.mark.parametrize("kind", ["all", "missing"])
def test_the_mode_is_a_stationary_maximum_with_its_curvature(law, kind):
    case = Case(law, trials=3, bins=7, observed=some_observed(kind, 3, 7, 3))
    prior, readout, data = case.parts()
    law_given = laplace_path(prior, readout, data)
    mode = law_given.mean.clone().requires_grad_()

    def joint(path):
        return prior.log_prob(path) + readout.log_likelihood(readout.predict(path), data)

    (slope,) = torch.autograd.grad(joint(mode).sum(), mode)
    assert float(slope.abs().max()) < 1e-8
    evidence = laplace_evidence(prior, readout, data)
    for trial in range(3):

        def alone(flat, trial=trial):
            others = mode.detach().clone()
            return joint(torch.cat([others[:trial], flat.reshape(1, 7, 2), others[trial + 1 :]]))[trial]

        hessian = torch.autograd.functional.hessian(alone, mode[trial].detach().flatten())
        covariance = torch.linalg.inv(-hessian).reshape(7, 2, 7, 2)
        for t in range(7):
            torch.testing.assert_close(law_given.covariance[trial, t], covariance[t, :, t], rtol=1e-7, atol=1e-9)
        volume = 7.0 * math.log(2.0 * math.pi) - 0.5 * torch.linalg.slogdet(-hessian).logabsdet
        torch.testing.assert_close(evidence[trial], (joint(mode)[trial] + volume).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", COUNTS)
@pytest.mark.parametrize("kind", ["all", "missing"])
def test_gradient_of_the_laplace_evidence_follows_the_mode(law, kind):
    """Against finite differences through a mode found anew; with a mode merely detached this is off by a quarter."""
    observed = some_observed(kind, 2, 4, 3)
    case = Case(law, trials=2, bins=4, observed=observed)
    root = torch.linalg.cholesky(case.noise_covariance)
    noise = () if case.noise is None else (case.noise,)
    leaves = tuple(p.clone().requires_grad_() for p in (case.dynamics, root, case.loading, case.offset, *noise))

    def evidence(dynamics, root, loading, offset, *noise):
        case.dynamics, case.noise_covariance, case.loading, case.offset = dynamics, root @ root.T, loading, offset
        case.noise = noise[0] if noise else None
        return laplace_evidence(*case.parts())

    assert gradcheck(evidence, leaves, eps=1e-5, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("law", COUNTS)
@pytest.mark.parametrize("units", [1, 60])
def test_evidence_of_one_bin_and_one_latent_equals_quadrature_within_the_known_error(law, units):
    """With f = -log p(y, x): log Z = Laplace - f4 / (8 f2^2) + 5 f3^2 / (24 f2^3), and smaller terms."""
    case = Case(law, trials=4, bins=1, units=units, dim=1, seed=3)
    prior, readout, data = case.parts()

    def minus_joint(path):
        return -prior.log_prob(path) - readout.log_likelihood(readout.predict(path), data)  # (*node, trial)

    nodes = torch.linspace(-12.0, 12.0, 40001, dtype=torch.float64)
    exact = torch.logsumexp(-minus_joint(nodes.reshape(-1, 1, 1, 1)), 0) + math.log(float(nodes[1] - nodes[0]))
    error = laplace_evidence(prior, readout, data) - exact
    mode = laplace_path(prior, readout, data).mean.clone().requires_grad_()
    derivatives = [minus_joint(mode)]
    for _ in range(4):
        slope = torch.autograd.grad(derivatives[-1].sum(), mode, create_graph=True)[0]
        derivatives.append(slope.reshape(4))
    _, _, f2, f3, f4 = (d.detach() for d in derivatives)
    known = f4 / (8.0 * f2.square()) - 5.0 * f3.square() / (24.0 * f2**3)
    assert float(error.abs().max()) < 0.05
    assert float((error - known).abs().max()) < 0.25 * float(known.abs().max())


@pytest.mark.parametrize("law", [Poisson(), NegativeBinomial()], ids=["Poisson", "NegativeBinomial"])
def test_counts_up_to_ten_thousand_converge(law):
    """Rates far from the prior mean: a plain Newton step from there overshoots, and the exponential overflows."""
    case = Case(law, trials=4, bins=12, units=6)
    case.loading, case.offset = 3.0 * case.loading, torch.zeros(6, dtype=torch.float64)
    data = torch.zeros_like(case.data)
    data[0] = 10000.0
    data[1, 6:] = 10000.0
    data[2, ::3] = torch.tensor([0.0, 1e4, 3.0, 500.0, 0.0, 9999.0], dtype=torch.float64)
    case.data = data
    leaves = tuple(p.requires_grad_() for p in (case.dynamics, case.loading, case.offset))
    prior, readout, _ = case.parts()
    evidence = laplace_evidence(prior, readout, data)
    slopes = torch.autograd.grad(evidence.sum(), leaves)
    assert bool(torch.isfinite(evidence).all()) and all(bool(torch.isfinite(slope).all()) for slope in slopes)
    with torch.no_grad():
        mode = laplace_path(prior, readout, data).mean
        slope = prior.force(mode) + readout.score(readout.predict(mode), data) @ readout.loading
    assert float(slope.abs().max()) < 1e-8 * 1e4  # relative to the counts


def test_one_failing_draw_leaves_the_others_alone():
    case = Case(Poisson(), trials=2)
    alone = laplace_evidence(*case.parts())
    case.dynamics = case.dynamics.expand(3, 1, 2, 2)
    noise = case.noise_covariance.expand(3, 1, 2, 2).clone()
    noise[1] = -torch.eye(2, dtype=torch.float64)
    case.noise_covariance = noise
    case.initial = case.initial.expand(3, 1, 2, 2)
    found = laplace_evidence(*case.parts())
    assert found.shape == (3, 2) and bool(torch.isnan(found[1]).all())
    torch.testing.assert_close(found[[0, 2]], alone.expand(2, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("law", [pytest.param(law, id=type(law).__name__) for law in zoo.READOUTS])
def test_the_linearised_potential_has_the_likelihoods_slope_and_curvature(law):
    case = Case(law, observed=some_observed("missing", 2, 6, 3))
    _, readout, data = case.parts()
    point = torch.randn(2, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()
    precision, linear = linearised_potential(readout, point.detach(), data)
    (slope,) = torch.autograd.grad(readout.log_likelihood(readout.predict(point), data).sum(), point)
    pull = linear - (precision @ point.detach().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(pull, slope, rtol=1e-10, atol=1e-10)
    predictor = readout.predict(point.detach())
    expected = torch.einsum("...tu,ui,uj->...tij", readout.curvature(predictor, data), case.loading, case.loading)
    torch.testing.assert_close(precision.expand(expected.shape), expected, rtol=1e-10, atol=1e-12)


def test_the_mode_depends_on_nothing_but_parameters_and_data():
    case = Case(Poisson(), trials=3)
    whole = find_mode(*case.parts())
    torch.randn(5)
    assert torch.equal(find_mode(*case.parts()), whole)
    case.data = case.data[[1]]
    torch.testing.assert_close(find_mode(*case.parts())[0], whole[1], rtol=1e-8, atol=1e-8)


def test_bernoulli_that_is_always_one_has_a_finite_mode():
    case = Case(Bernoulli(), trials=2)
    case.data, case.loading = torch.ones_like(case.data), 10.0 * case.loading
    assert bool(torch.isfinite(find_mode(*case.parts())).all()) and bool(
        torch.isfinite(laplace_evidence(*case.parts())).all()
    )


@pytest.mark.parametrize("repeats", ["units", "bins", "trials", "nothing"])
def test_a_mask_that_repeats_itself_shares_a_factorisation(repeats):
    """The same evidence as with a mask that is spelled out, from fewer factors."""
    generator = torch.Generator().manual_seed(0)
    shape = {"units": (1, 1, 4), "bins": (1, 6, 4), "trials": (3, 1, 4), "nothing": (3, 6, 4)}[repeats]
    observed = (torch.rand(shape, generator=generator) < 0.6).expand(3, 6, 4).clone()
    eye = torch.eye(2, dtype=torch.float64)
    prior = GaussMarkov.from_dynamics((0.9 * eye)[None], (0.19 * eye)[None], num_bins=6, initial_covariance=eye[None])
    loading = torch.randn(1, 4, 2, generator=generator, dtype=torch.float64)
    offset, noise = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    values = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(3, 6, 2, dtype=torch.float64)
    readout = AffineReadout(Gaussian(), zeros, loading, offset, noise, observed)
    assert gaussian_potential(readout, values)[0].shape[:2] == shape[:2]
    posterior = prior.condition(*gaussian_potential(readout, values))
    assert (posterior._steady is not None) == (shape[1] == 1)
    full = torch.einsum("btu,ui,uj->btij", observed.double(), loading[0], loading[0])
    expected = prior.condition(full, torch.where(observed, values, 0.0) @ loading[0])
    torch.testing.assert_close(posterior.log_normaliser, expected.log_normaliser)
    torch.testing.assert_close(posterior.mean, expected.mean)


def grouped_mask(kind: str, trials: int, bins: int, units: int) -> Tensor:
    """Masks that few trials, or none, have to themselves."""
    observed = torch.ones(trials, bins, units, dtype=torch.bool)
    if kind == "ragged":
        for trial in range(trials):
            observed[trial, bins - 2 * (trial % 3) :] = trial % 3 == 0
    elif kind == "units":
        observed[::2, :, 1] = False
    elif kind == "mixed":  # two common masks, and trials of their own
        observed[: trials // 2, :, 0] = False
        observed[-1, 1:4] = False
        observed[-2, 2] = False
        observed[-2, :, 1] = False
    else:  # each trial its own
        observed = torch.rand(trials, bins, units, generator=torch.Generator().manual_seed(4)) < 0.7
    return observed


@pytest.mark.parametrize("drifting", [False, True])
@pytest.mark.parametrize("kind", ["ragged", "units", "mixed", "many"])
def test_trials_of_one_mask_share_a_factorisation(monkeypatch, kind, drifting):
    """Value and gradient equal those of a factorisation for every trial, and of a dense Gaussian."""
    observed = grouped_mask(kind, 12, 7, 4)
    case = Case(Gaussian(), trials=12, bins=7, units=4, observed=observed, drifting=drifting)
    case.data, case.loading = torch.where(observed, case.data, torch.nan), case.loading.unsqueeze(0)
    names = ("dynamics", "noise_covariance", "initial", "loading", "offset", "noise")
    factorised, found = [], []
    condition = GaussMarkov.condition

    def counted(chain, precision, linear, mask=None):
        factorised.append(precision.shape[-4])
        return condition(chain, precision, linear, mask)

    monkeypatch.setattr(GaussMarkov, "condition", counted)
    monkeypatch.setattr("pyrodyn.conditioning.WORTH", 0)
    for _ in range(2):
        leaves = []
        for name in names:
            setattr(case, name, getattr(case, name).detach().clone().requires_grad_())
            leaves.append(getattr(case, name))
        value = path_evidence(*case.parts())
        weight = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64)
        found.append([value.detach(), *torch.autograd.grad((weight * value).sum(), leaves)])
        monkeypatch.setattr("pyrodyn.conditioning._groups", lambda *_: None)
    expected = {"ragged": [1, 1, 1], "units": [1, 1], "mixed": [1, 1, 2], "many": [12]}
    assert factorised[:-1] == expected[kind] and factorised[-1] == 12
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    for name in names:
        setattr(case, name, getattr(case, name).detach())
    case.loading = case.loading[0]
    for trial in range(12):
        assert float((found[0][0][trial] - dense_posterior(case, trial)[2]).abs()) < 1e-9


def test_masks_are_grouped_for_draws_and_again_when_a_mask_changes(monkeypatch):
    monkeypatch.setattr("pyrodyn.conditioning.WORTH", 0)
    observed = grouped_mask("ragged", 9, 6, 3)
    case = Case(Gaussian(), trials=9, bins=6, observed=observed)
    case.loading = case.loading.unsqueeze(0)
    alone = path_evidence(*case.parts())
    scale = torch.tensor([1.0, 0.5], dtype=torch.float64)
    loading = case.loading
    case.loading = (scale[:, None, None, None] * loading).reshape(2, 1, 3, 2)
    case.offset, case.noise = case.offset.expand(2, 1, 3), case.noise.expand(2, 1, 3)
    both = path_evidence(*case.parts())
    assert both.shape == (2, 9)
    torch.testing.assert_close(both[0], alone)
    case.loading, case.offset, case.noise = 0.5 * loading[0], case.offset[0, 0], case.noise[0, 0]
    torch.testing.assert_close(both[1], path_evidence(*case.parts()))
    observed[4:7, 2] = False
    torch.testing.assert_close(
        path_evidence(*case.parts())[5], dense_posterior(case, 5)[2].reshape(()), rtol=1e-10, atol=1e-10
    )


def test_a_group_must_be_worth_its_calls():
    """Few bins of few latents are factorised sooner than sorted."""
    observed = grouped_mask("ragged", 12, 50, 4)
    assert conditioning._groups(observed, 3) is None
    assert conditioning._groups(observed, 20) is not None
    assert conditioning._groups(grouped_mask("many", 12, 50, 4), 20) is None
