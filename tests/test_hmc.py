"""Hamiltonian Monte Carlo on many chains: the ensemble on densities that are known, the engine on a model."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo

from pyrodyn import inference, models, readouts
from pyrodyn.errors import ModelError, NonFiniteError
from pyrodyn.inference import hmc
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.inference.ensemble import Ensemble, _van_der_corput
from pyrodyn.inference.mode import ascend, covariance_root, negative_hessian

SCALES = (0.01, 1.0, 50.0)  # of three posteriors that are sampled at once


def normals(dimension: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means (group, 1, dimension) and covariances (group, dimension, dimension) of three correlated normals."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(3, dimension, dimension, generator=generator, dtype=torch.float64)
    covariance = mix @ mix.mT + 0.3 * torch.eye(dimension, dtype=torch.float64)
    scale = torch.tensor(SCALES, dtype=torch.float64)
    return scale.reshape(3, 1, 1) * torch.arange(dimension, dtype=torch.float64), covariance * scale.square()[
        :, None, None
    ]


def sampled(dense: bool, draws: int, dimension: int = 4, warmup: int = 200) -> tuple[torch.Tensor, Ensemble]:
    mean, covariance = normals(dimension)
    precision = torch.linalg.inv(covariance)

    def gradient(place, groups):
        slope = -(place - mean[groups]) @ precision[groups]
        return 0.5 * ((place - mean[groups]) * slope).sum(-1), slope

    with random_stream(3), numerics():
        start = torch.randn(3, 32, dimension)
        ones = torch.ones(3, dimension)
        ensemble = Ensemble(gradient, start, ones.diag_embed() if dense else ones, warmup=warmup, target_acceptance=0.8)
        kept = []
        for count in range(warmup + draws):
            ensemble.advance()
            if count >= warmup:
                kept.append(ensemble.position)
    return torch.stack(kept, 2).flatten(1, 2), ensemble  # (group, chain x draw, dimension)


@pytest.mark.parametrize("dense", [True, False])
def test_posteriors_of_any_scale_are_sampled_side_by_side(dense):
    """The first guess at the mass matrix is wrong by a factor of 10,000, and nothing is pooled over groups."""
    mean, covariance = normals(4)
    draws, ensemble = sampled(dense, 150)
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    # 4,800 draws; in these dimensions at least one in five is worth an independent one.
    error = (draws.mean(1) - mean.squeeze(1)) / sd
    assert float(error.abs().max()) < 4.0 / np.sqrt(4800 / 5)
    for group in range(3):
        found = torch.cov(draws[group].T) / (sd[group].unsqueeze(0) * sd[group].unsqueeze(1))
        expected = covariance[group] / (sd[group].unsqueeze(0) * sd[group].unsqueeze(1))
        assert float((found - expected).abs().max()) < 4.0 * np.sqrt(2.0 / (4800 / 5))
    if dense:  # the mass matrix has learned the covariance: whitened, nothing is left to do
        white = ensemble.root.mT @ torch.linalg.inv(covariance) @ ensemble.root
        assert float(torch.linalg.cond(white).max()) < 2.5
        assert float(ensemble.step_size.max() / ensemble.step_size.min()) < 1.5


def test_transitions_after_the_warm_up_change_nothing_but_positions():
    _, ensemble = sampled(True, 1, warmup=60)
    before = {name: value for name, value in ensemble.state().items()}
    with random_stream(0), numerics():
        for _ in range(5):
            ensemble.advance()
    moved = {name for name, value in ensemble.state().items() if not np.array_equal(value, before[name])}
    assert moved == {"count", "position", "value", "slope"}


def test_trajectories_have_every_length():
    found = np.array([_van_der_corput(i) for i in range(1, 1024)])
    assert np.histogram(found, 16, (0, 1))[0].max() <= 65 and found.min() > 0.0 and found.max() < 1.0


def test_a_wall_is_counted_as_divergence_and_never_crossed():
    def gradient(place, _):  # a half-normal whose density fails below zero
        inside = (place > 0.0).all(-1)
        value = torch.where(inside, -0.5 * place.square().sum(-1), -torch.inf)
        return value, torch.where(inside.unsqueeze(-1), -place, 0.0)

    with random_stream(0), numerics():
        ensemble = Ensemble(gradient, torch.ones(1, 32, 1), torch.ones(1, 1), warmup=100, target_acceptance=0.8)
        kept, diverged = [], 0
        for count in range(400):
            _, diverging, _ = ensemble.advance()
            if count >= 100:
                kept.append(ensemble.position)
                diverged += int(diverging.sum())
    draws = torch.stack(kept)
    assert diverged > 0 and float(draws.min()) > 0.0
    assert float(draws.mean()) == pytest.approx(np.sqrt(2.0 / np.pi), abs=0.05)


# ------------------------------------------------------------------------------------------------- the engine


def test_chains_of_a_superchain_start_together_and_superchains_apart(monkeypatch):
    row = zoo.row("LDS-Gaussian")
    starts = []

    class Watched(Ensemble):
        def __init__(self, gradient, position, *rest, **options):
            starts.append(position)
            super().__init__(gradient, position, *rest, **options)

    monkeypatch.setattr(hmc, "Ensemble", Watched)
    inference.HMC(draws=1, warmup=1, chains=8, superchains=4).run(row.model, row.recording, seed=0)
    groups = starts[0].reshape(4, 2, -1)
    assert torch.equal(groups[:, 0], groups[:, 1])
    assert float(torch.pdist(groups[:, 0]).min()) > 1.0


def test_chains_must_fill_the_superchains():
    with pytest.raises(ModelError, match=r"chains=10 and superchains=4; try chains=8"):
        inference.HMC(chains=10)


def test_a_density_that_fails_everywhere_names_the_site(monkeypatch):
    row = zoo.row("LDS-Gaussian")

    class Broken(models.LDS):
        def readout_law(self, parameters, path, recording):
            return super().readout_law(parameters._replace(offset=parameters.offset * torch.nan), path, recording)

    with pytest.raises(NonFiniteError, match="step 0.*at site 'observations'"):
        inference.HMC(draws=2, warmup=2, chains=4).run(Broken(2, readouts.Gaussian()), row.recording, seed=0)


def test_the_posterior_says_how_it_was_sampled():
    tree = zoo.fitted("LDS-Gaussian", "HMC")
    assert tree["posterior"].sizes["chain"] == 4 and tree["posterior"].sizes["draw"] == 4
    assert {"diverging", "acceptance_rate", "lp"} <= set(tree["sample_stats"].data_vars)
    assert "max_nested_r_hat" in tree.attrs["diagnostics"]


def test_any_program_can_be_sampled_and_a_number_is_a_site():
    """Two normal numbers, one positive, with one observation of their sum: their posterior by quadrature."""

    def program(recording):
        del recording
        zero = torch.zeros((), dtype=torch.float64)
        place = pyro.sample("place", dist.Normal(zero, 1.0))
        spread = pyro.sample("spread", dist.LogNormal(zero, 0.5))
        return pyro.sample("seen", dist.Normal(place, spread), obs=zero + 2.0)

    recording = zoo.row("LDS-Gaussian").recording
    samples = inference.HMC(draws=100, warmup=100, collapse=False).run(program, recording, seed=0).samples
    grid = np.linspace(-6.0, 6.0, 801)
    place, log_spread = np.meshgrid(grid, grid, indexing="ij")
    weight = np.exp(
        -0.5 * place**2 - 2.0 * log_spread**2 - log_spread - 0.5 * ((2.0 - place) / np.exp(log_spread)) ** 2
    )
    weight /= weight.sum()
    assert samples["place"].shape == (64, 100)
    assert float(samples["place"].mean()) == pytest.approx((weight * place).sum(), abs=0.06)
    assert float(samples["spread"].log().mean()) == pytest.approx((weight * log_spread).sum(), abs=0.04)


def test_nothing_is_made_on_another_device_than_the_positions():
    """What is made without naming a device lands on `meta`, where it cannot meet a position: as it could not on a GPU.

    The random numbers come from the CPU's stream on any device.
    """
    plain, _ = sampled(True, 3, warmup=20)
    with torch.device("meta"):
        precision = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64, device="cpu"))

        class Bowl:
            def gradient(self, place):
                return -0.5 * ((place @ precision) * place).sum(-1), -(place @ precision)

        start = torch.ones(2, 1, 3, dtype=torch.float64, device="cpu")
        top, converged = ascend(Bowl(), start, 50, "test")
        assert bool(converged.all()) and float(top.abs().max()) < 1e-5
        hessian = negative_hessian(Bowl(), top, "test")
        root, _ = covariance_root(hessian, 1e-3)
        torch.testing.assert_close(root @ root.mT @ precision, torch.eye(3, dtype=torch.float64, device="cpu").expand(
            2, 3, 3), atol=1e-6, rtol=0)  # fmt: skip
        options = inference.HMC(draws=3, warmup=20, chains=4, superchains=2)
        position = options._scatter(Bowl(), top.squeeze(1), root, 1.0)
        density = Bowl()
        density.among = lambda groups: density
        run = hmc.Run(options, density, position, root).go(None)
        assert run.vectors.device.type == run.diverging.device.type == "cpu"
        run._restore(run._state())
        assert run.ensemble.position.device.type == "cpu"
    again, _ = sampled(True, 3, warmup=20)
    assert torch.equal(plain, again)
