"""One law for each region: side by side, every law must do what it does alone."""

import numpy as np
import pytest
import torch

import pyrodyn as dyn
from pyrodyn import inference, models, readouts
from pyrodyn.errors import ModelError, ReadoutError

LAWS = {"A": readouts.Poisson(), "B": readouts.Gaussian(), "C": readouts.NegativeBinomial()}
REGION = np.array(["B", "A", "C", "A", "B"])


def recorded(seed: int = 0, trials: int = 4, bins: int = 40) -> tuple[dyn.Recording, np.ndarray]:
    """Counts and channels that one slow latent drives, and the latent (trial, time)."""
    rng = np.random.default_rng(seed)
    path = np.zeros((trials, bins))
    for t in range(1, bins):
        path[:, t] = 0.95 * path[:, t - 1] + 0.3 * rng.normal(size=trials)
    counts = rng.poisson(np.exp(0.5 + 0.8 * path)[..., None], (trials, bins, 5))
    channels = 3.0 * path[..., None] + rng.normal(size=(trials, bins, 5))
    values = np.where(REGION == "B", channels, counts)
    return dyn.Recording.from_arrays(values, bin_width=0.02, region=REGION, counts=False), path


@pytest.mark.parametrize("name", ["log_prob", "log_kernel", "score", "curvature"])
def test_laws_side_by_side_are_the_laws(name):
    recording, _ = recorded()
    law = readouts.PerRegion(LAWS).bound(recording)
    generator = torch.Generator().manual_seed(0)
    predictor = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    noise = torch.rand(5, generator=generator, dtype=torch.float64) + 0.5
    value = recording.values[0, :6]
    found = getattr(law, name)(predictor, noise, value)
    for i, region in enumerate(REGION):
        own = LAWS[region]
        held = None if own.noise_name is None else noise[i : i + 1]
        alone = getattr(own, name)(predictor[:, i : i + 1], held, value[:, i : i + 1])
        torch.testing.assert_close(found[:, i : i + 1], alone.expand(6, 1))


def test_counts_and_channels_tell_of_one_latent_together():
    recording, path = recorded()
    posterior = dyn.fit(models.LDS(1, LAWS), recording, inference.Laplace(draws=20), seed=0)
    found = posterior["latents"]["mean"].values[..., 0]
    assert abs(np.corrcoef(found.ravel(), path.ravel())[0, 1]) > 0.95
    assert dyn.model_of(posterior).readout == readouts.PerRegion(LAWS)
    own = posterior["posterior"]["readout_noise"].sel(unit=recording.unit[REGION == "B"])
    assert abs(float(own.mean()) - 1.0) < 0.2  # the standard deviation of the channels


def test_regions_and_laws_that_do_not_fit_are_named():
    recording, _ = recorded()
    with pytest.raises(ReadoutError, match=r"law to the regions \['A'\]"):
        dyn.fit(models.LDS(1, {"A": readouts.Poisson()}), recording, inference.Laplace())
    with pytest.raises(ReadoutError, match="readout of region 'A'"):
        models.LDS(1, {"A": "Poisson"})
    with pytest.raises(ReadoutError, match="counts"):
        dyn.fit(models.LDS(1, LAWS | {"B": readouts.Poisson()}), recording, inference.Laplace())
    with pytest.raises(ModelError, match="mapping of region"):
        models.LDS(1, 3)
