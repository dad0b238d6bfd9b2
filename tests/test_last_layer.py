"""Laplace's approximation of the last layer: a Bayesian linear regression, exactly, where the readout is Gaussian."""

from __future__ import annotations

import json

import numpy as np
import pyro
import pytest
import torch

import pyrodyn as dyn
from pyrodyn import guides, inference, models, networks, readouts
from pyrodyn.errors import ModelError
from pyrodyn.guides import LastLayer, Start, draw_globals, draw_trials
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.program import global_laws, globals_given

LATENTS, UNITS = 3, 5


def recording(counts: bool) -> dyn.Recording:
    """Eight trials, a fifth of the entries missing."""
    rng = np.random.default_rng(0)
    shape = (8, 12, UNITS)
    slow = np.cumsum(0.4 * rng.normal(size=(8, 12, 1)), 1) * np.linspace(-1.0, 1.0, UNITS)
    values = rng.poisson(np.exp(0.5 * slow)).astype(float) if counts else slow + 0.5 * rng.normal(size=shape)
    return dyn.Recording.from_arrays(values, bin_width=0.1, counts=counts, mask=rng.random(shape) > 0.2)


def settled(model, data: dyn.Recording):
    """The guide after it was settled on some draws of the paths, and these."""
    with random_stream(0), numerics(), pyro.settings.context(module_local_params=True):
        start = Start(model.initial_values(data), None)
        guide = guides.Amortised(weights=LastLayer(), hidden_dim=4)(model, data, start)
        guide(data)
        values, _ = draw_globals(guide, data, 1)
        local = draw_trials(guide, values, data, 4)
        guide.globals.settle(model, data, local)
    return guide.globals, values, local


def design(model, data: dyn.Recording, values, local) -> torch.Tensor:
    """What multiplies a unit's weights, (draw, trial, time, unit, weight): the scaled activity, and one."""
    activity = model.cell.activity(local["latent"]).unsqueeze(-2)
    scale = model.readout.signal_scale(data).unsqueeze(-1) / LATENTS**0.5
    return torch.cat([activity * scale, torch.ones(*activity.shape[:-2], UNITS, 1)], -1)


def prior(model, data: dyn.Recording) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and precisions (unit, weight)."""
    laws = global_laws(model, data)
    means = torch.cat([laws["loading"].mean, laws["offset"].mean.unsqueeze(-1)], -1)
    variances = torch.cat([laws["loading"].variance, laws["offset"].variance.unsqueeze(-1)], -1)
    return means, 1.0 / variances


def test_under_a_gaussian_readout_it_is_the_posterior_of_a_linear_regression() -> None:
    model, data = models.LatentRNN(LATENTS, networks.Leaky(), readouts.Gaussian()), recording(counts=False)
    guide, values, local = settled(model, data)
    x, mask = design(model, data, values, local), data.mask.double()
    noise = values["noise_sd"][0].square()
    means, precisions = prior(model, data)
    weighed = x * (mask / noise).unsqueeze(-1)
    precision = torch.diag_embed(precisions) + torch.einsum("stbnk,stbnl->nkl", weighed, x) / len(x)
    linear = precisions * means + torch.einsum("stbnk,tbn->nk", weighed, data.values) / len(x)
    covariance = torch.linalg.inv(precision)
    torch.testing.assert_close(guide._root @ guide._root.mT, covariance, rtol=1e-6, atol=1e-9)
    rows = guide.loc.detach()[guide._index]
    torch.testing.assert_close(rows, (covariance @ linear.unsqueeze(-1)).squeeze(-1), rtol=1e-6, atol=1e-8)


def test_under_a_poisson_readout_the_slope_vanishes_and_the_curvature_is_fishers() -> None:
    model, data = models.LatentRNN(LATENTS, networks.Leaky()), recording(counts=True)
    guide, values, local = settled(model, data)
    x, mask = design(model, data, values, local), data.mask.double()
    rows = guide.loc.detach()[guide._index]
    means, precisions = prior(model, data)
    held = {name: value.squeeze(0) for name, value in values.items()}
    held |= {"loading": rows[:, :-1], "offset": rows[:, -1]}
    law = model.readout_law(globals_given(model, held, data), local["latent"], data)
    rates = law.mean
    torch.testing.assert_close(rates.log(), (x * rows).sum(-1), rtol=1e-9, atol=1e-9)
    slope = torch.einsum("stbn,stbnk->nk", (data.values - rates) * mask, x) / len(x) - precisions * (rows - means)
    curvature = torch.diag_embed(precisions)
    curvature = curvature + torch.einsum("stbn,stbnk,stbnl->nkl", rates * mask, x, x) / len(x)
    away = slope / curvature.diagonal(dim1=-2, dim2=-1).sqrt()  # from the mode, in posterior sds
    assert float(away.abs().max()) < 1e-3
    torch.testing.assert_close(guide._root @ guide._root.mT, torch.linalg.inv(curvature), rtol=1e-5, atol=1e-8)


def test_draws_of_a_fit_scatter_in_the_last_layer_alone_and_the_posterior_says_so() -> None:
    model, data = models.LatentRNN(LATENTS, networks.Leaky()), recording(counts=True)
    guide = guides.Amortised(weights=LastLayer(), hidden_dim=4)
    engine = inference.SVI(steps=20, particles=1, draws=400, guide=guide)
    tree = dyn.fit(model, data, engine, seed=0)
    expected = "point estimate; loading and offset by Laplace's approximation of the last layer"
    assert json.loads(tree.attrs["notes"])["globals"] == expected
    spread = tree["unconstrained_posterior"].to_dataset().std(("chain", "draw"))
    for name, variable in spread.data_vars.items():
        assert bool((variable > 0.01).all() if name in ("loading", "offset") else (variable < 1e-12).all()), name
    assert tree["posterior"].sizes["draw"] == 400
    assert dyn.predict(tree, data, draws=4)["expected"].notnull().all()


def test_the_density_of_draws_is_that_of_a_normal() -> None:
    model, data = models.LatentRNN(LATENTS, networks.Leaky()), recording(counts=True)
    guide, _, _ = settled(model, data)
    law = guide.get_posterior()
    value = law.expand((6,)).sample()
    rows, centre = value[:, guide._index], guide.loc.detach()[guide._index]
    normal = torch.distributions.MultivariateNormal(centre, guide._root @ guide._root.mT)
    torch.testing.assert_close(law.log_prob(value), normal.log_prob(rows).sum(-1))


@pytest.mark.parametrize(("sites", "message"), [
    (("output",), "'output' must be a global site whose first dimension is the 5 units, found no such site"),
    (("bias",), r"'bias' must be a global site .* found shape \(3,\)"),
])  # fmt: skip
def test_a_layer_that_is_not_the_last_is_refused(sites, message) -> None:
    model, data = models.LatentRNN(LATENTS, networks.Leaky()), recording(counts=True)
    engine = inference.SVI(steps=2, guide=guides.Amortised(weights=LastLayer(sites=sites), hidden_dim=4))
    with pytest.raises(ModelError, match=message):
        dyn.fit(model, data, engine, seed=0)
