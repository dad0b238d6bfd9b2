"""Stochastic gradient Langevin dynamics: its own law, a posterior by quadrature, and gradients without bias."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from _toy import Quadrature, Toy, toy_recording

import pyrodyn as dyn
from pyrodyn import models, networks
from pyrodyn.errors import ModelError
from pyrodyn.inference import LogDensity
from pyrodyn.inference.engine import numerics, random_stream, treat_path, vector_of
from pyrodyn.inference.sgld import SGLD, _Run

SDS = torch.tensor([0.02, 0.1, 0.5, 1.0], dtype=torch.float64)


def gaussian(recording: dyn.Recording) -> torch.Tensor:
    return pyro.sample("z", dist.Normal(torch.zeros(4, dtype=torch.float64), SDS).to_event(1))


@pytest.mark.parametrize("step_size", [0.2, 1.0])
def test_the_variance_of_its_draws_is_the_one_that_its_steps_imply(step_size: float) -> None:
    r"""z' = (1 - s/2) z + (s/h)^(1/2) xi has the variance 1 / (h (1 - s/4)); G learned from it makes that 1 + eps/4.

    With s = eps h G and G the inverse of h^2 times that variance: s = eps (1 - s/4).
    """
    engine = SGLD(draws=20, thin=10, warmup=400, chains=500, step_size=step_size)
    draws = engine.run(gaussian, toy_recording(), seed=0).samples["z"]
    # So many independent draws that the standard error of a variance is under a hundredth.
    ratio = draws.var((0, 1)) / SDS.square()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.0 + step_size / 4.0), rtol=0.05, atol=0)
    assert bool((draws.mean((0, 1)).abs() < 0.05 * SDS).all())


@pytest.mark.parametrize("batch", [None, 4])
def test_a_posterior_by_quadrature_is_found_also_from_batches(batch: int | None) -> None:
    recording = toy_recording(trials=16)
    exact = Quadrature(Toy(), recording)
    weight = (exact.log_prior + exact.of_trials.sum(-1)).softmax(0)
    mean = weight @ exact.grid
    sd = (weight @ (exact.grid - mean).square()).sqrt()
    engine = SGLD(draws=10, thin=25, warmup=900, chains=200, step_size=0.1, batch=batch)
    draws = engine.run(Toy(), recording, seed=0)
    found = torch.stack([draws.samples["level"].flatten(), draws.samples["gain"].flatten().log()], -1)
    error = found.unflatten(0, (200, 10)).mean(1).std(0) / 200**0.5  # chains are independent
    assert bool(((found.mean(0) - mean).abs() < 4.0 * error).all()) and bool((error < 0.08 * sd).all())
    assert bool(((found.std(0) / sd - 1.0).abs() < 0.08).all())
    assert draws.treatment == "integrated out exactly"
    assert "Langevin" in draws.notes["globals"] and draws.notes["refused_steps"] == 0


def network_run(batch: int | None) -> _Run:
    """Chains of a small network whose paths are sampled, with nothing learned yet."""
    model = models.LatentRNN(2, networks.Leaky())
    like = dyn.Recording.from_arrays(np.ones((6, 7, 3)), bin_width=0.1, counts=True).blank()
    recording, _ = dyn.simulate(model, like, seed=0, values={"offset": torch.zeros(3)})
    with random_stream(0), numerics():
        values = model.initial_values(recording)
        treated, _ = treat_path(model, recording, None, values)
        density = LogDensity(treated, recording)
        run = _Run(SGLD(chains=2, batch=batch), density, vector_of(values, density), seed=0)
        run.position = run.position + 0.3 * torch.randn_like(run.position)
    return run


def test_gradients_of_a_round_of_batches_average_to_the_gradient_of_all_trials() -> None:
    """Of the globals; what is latent in a trial has its own, whole, whenever the trial is seen."""
    run = network_run(2)
    with numerics():
        value, whole = run.density.gradient(run.position)
        found = []
        for run.step in range(3):
            found.append(run._estimate())
    np.testing.assert_allclose(np.mean([part.value.numpy() for part in found], 0), value, rtol=1e-9)
    mean = torch.stack([part.gradient for part in found]).mean(0)
    seen = torch.stack([part.moving for part in found])
    (local,) = (site.place for site in run.density.sites if site.local)
    outside = torch.ones_like(seen[0])
    outside[local] = False
    assert bool(seen[:, outside].all()) and bool((seen[:, local].sum(0) == 1).all())
    torch.testing.assert_close(mean[:, outside], whole[:, outside], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(3.0 * mean[:, local], whole[:, local], rtol=1e-8, atol=1e-8)


def test_what_is_latent_in_trials_moves_with_its_batch_alone() -> None:
    run = network_run(2)
    with random_stream(1), numerics():
        found, before = run._estimate(), run.position.clone()
        run._diffuse(found, 0)
    moved = (run.position != before).all(0)
    assert torch.equal(moved, found.moving) and 0 < int((~moved).sum()) < len(moved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws must be a whole number of at least 1"),
        ({"warmup": 2}, "warmup must be a whole number of at least 3"),
        ({"step_size": 1.5}, "step_size must be above 0 and at most 1"),
    ],
)
def test_impossible_options_are_named(options, message) -> None:
    with pytest.raises(ModelError, match=message):
        SGLD(**options)


def test_batches_of_a_path_whitened_at_all_trials_are_refused() -> None:
    with pytest.raises(ModelError, match="leave batch at None"):
        SGLD(draws=1, warmup=3, batch=2, collapse=False).run(Toy(), toy_recording(), seed=0)
