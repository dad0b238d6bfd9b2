"""The test of posteriors, tested: it passes what is right and catches what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import zoo

import pyrodyn as dyn
from pyrodyn import inference, models, plots, readouts
from pyrodyn.calibration import summarise
from pyrodyn.errors import ModelError
from pyrodyn.inference import LogDensity, collapse
from pyrodyn.inference.engine import numerics
from pyrodyn.recording import Recording

MODEL = models.LDS(1, readouts.Gaussian())
QUICK = inference.HMC(chains=8, superchains=2, draws=25, warmup=60)


def like(trials: int = 2, bins: int = 12, units: int = 2) -> Recording:
    zeros = np.zeros((trials, bins, units))
    return Recording.from_arrays(zeros, bin_width=0.1, center=np.zeros(units), scale=np.ones(units), counts=False)


@dataclass(frozen=True)
class Halved(models.LDS):
    """A planted fault: the density takes half the noise sd that it reports."""

    def readout_law(self, parameters, path, recording):
        return super().readout_law(parameters._replace(noise=0.5 * parameters.noise), path, recording)


def test_the_truth_is_uniform_among_the_draws_of_hmc():
    found = dyn.calibrate(MODEL, like(), QUICK, replicates=200, seed=1)
    assert found.sizes == {"replicate": 200, "quantity": found.sizes["quantity"], "level": 2, "side": 2}
    assert "log_likelihood" in found["quantity"] and "lag_one_covariance[1]" in found["quantity"]
    assert not found["flagged"].any(), found["quantity"].values[found["flagged"].values]


SWITCHING = models.SwitchingLDS(2, 1, readout=readouts.Gaussian())
SWEEPS = inference.Gibbs(chains=1, draws=20, warmup=50, thin=5)


@dataclass(frozen=True)
class Forgetful(models.SwitchingLDS):
    """A planted fault: the sampler forgets the stickiness of the prior."""

    def conditionals(self, recording, observations=None):
        sweep = super().conditionals(recording, observations)
        sweep.moves.prior = replace(sweep.moves.prior, stickiness=0.0)
        return sweep


def test_the_truth_is_uniform_among_paths_and_modes_of_gibbs():
    # Path and process noise hold each other: it takes tens of sweeps from one draw to the next.
    engine = inference.Gibbs(chains=1, draws=20, warmup=200, thin=40)
    found = dyn.calibrate(SWITCHING, like(bins=8), engine, replicates=30, seed=1)
    assert "complete_log_likelihood" in found["quantity"] and "stay_probability[1]" in found["quantity"]
    assert not found["flagged"].any(), found["quantity"].values[found["flagged"].values]


def test_a_planted_fault_of_gibbs_is_caught():
    wrong = Forgetful(2, 1, readout=readouts.Gaussian())
    found = dyn.calibrate(SWITCHING, like(bins=15), SWEEPS, replicates=60, seed=1, program=wrong)
    assert found["flagged"].sel(quantity=["stay_probability[0]", "stay_probability[1]"]).all()


@pytest.mark.parametrize(
    ("model", "engine"),
    [
        (models.HMM(2, readouts.Gaussian()), inference.HMC(chains=4, superchains=2, draws=20, warmup=40)),
        (models.ARHMM(2, recurrent=True), SWEEPS),
    ],
    ids=["HMM-HMC", "ARHMM-Gibbs"],
)
def test_the_truth_is_uniform_among_the_draws_of_models_with_modes(model, engine):
    found = dyn.calibrate(model, like(bins=8), engine, replicates=30, seed=1)
    assert not found["flagged"].any(), found["quantity"].values[found["flagged"].values]


def test_the_same_seed_gives_the_same_places():
    engine = inference.HMC(chains=4, superchains=2, draws=4, warmup=6)
    few = [dyn.calibrate(MODEL, like(bins=5), engine, replicates=3, seed=1) for _ in range(2)]
    assert few[0].equals(few[1])


def test_a_planted_fault_is_caught():
    found = dyn.calibrate(MODEL, like(), QUICK, replicates=30, seed=1, program=collapse(Halved(1, readouts.Gaussian())))
    assert found["flagged"].sel(quantity=["noise_sd[0]", "noise_sd[1]"]).all()
    assert len(plots.calibration(found, ["noise_sd[0]", "offset[0]"]).axes) == 2


def test_an_engine_without_replicates_fits_one_by_one():
    engine = inference.SVI(steps=20, draws=30)
    found = dyn.calibrate(MODEL, like(bins=6), engine, replicates=3, seed=0)
    assert found.sizes["replicate"] == 3
    assert bool(((found["place"] > 0.0) & (found["place"] < 1.0)).all())


def test_laplace_takes_replicates_as_a_batch():
    found = dyn.calibrate(MODEL, like(trials=20, bins=20), inference.Laplace(draws=200), replicates=20, seed=0)
    assert float(found["coverage"].sel(level=0.9).mean()) == pytest.approx(0.9, abs=0.12)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in zoo.MODELS if row.integrated])
def test_replicates_have_the_density_of_each_alone(row):
    blank = row.like()
    values = zoo.prior_draws(row.model, blank, (3,))
    with torch.no_grad(), numerics():
        recordings = [dyn.simulate(row.model, blank, seed=seed)[0] for seed in (1, 2, 3)]
        stacked = torch.stack([recording.values for recording in recordings]).unsqueeze(1)
        density = LogDensity(collapse(row.model), blank, stacked)
        vectors = density.unconstrain(values)
        together, slopes = density.gradient(torch.stack([vectors, vectors + 0.1], 1))
        subset = density.among(torch.tensor([2, 0])).gradient(torch.stack([vectors, vectors + 0.1], 1)[[2, 0]])[0]
        torch.testing.assert_close(subset, together[[2, 0]], rtol=1e-10, atol=1e-9)
        for i, recording in enumerate(recordings):
            # In the gauge of a blank recording, which the stack has too.
            alone = LogDensity(collapse(row.model), blank, recording.values.reshape(1, 1, *recording.values.shape))
            value, slope = alone.gradient(torch.stack([vectors[i], vectors[i] + 0.1]).unsqueeze(0))
            torch.testing.assert_close(together[i], value[0], rtol=1e-10, atol=1e-8)
            torch.testing.assert_close(slopes[i], slope[0], rtol=1e-8, atol=1e-6)


def test_flags_follow_the_rule():
    random = np.random.default_rng(0)
    found = summarise({"right": random.uniform(size=400), "narrow": 0.5 + 0.6 * (random.uniform(size=400) - 0.5)})
    assert found["flagged"].values.tolist() == [False, True]
    assert float(found["coverage"].sel(quantity="narrow", level=0.5)) > float(found["bounds"][0, 1])
    assert 0.8 < float(found["bounds"].sel(level=0.9, side="lower")) < 0.9


def test_a_program_for_an_engine_that_would_ignore_it_is_refused():
    with pytest.raises(ModelError, match="program is for engines with a method replicate"):
        dyn.calibrate(MODEL, like(), inference.SVI(steps=2), replicates=2, program=collapse(MODEL))


def test_what_cannot_be_calibrated_is_said_before_anything_is_drawn():
    with pytest.raises(ModelError, match="replicates must be 2 or more, got 0"):
        dyn.calibrate(MODEL, like(), QUICK, replicates=0)
    with pytest.raises(ModelError, match="latent_dim is 5 but the recording has 2 units"):
        dyn.calibrate(models.LDS(5, readouts.Gaussian()), like(), QUICK)
    with pytest.raises(ModelError, match=r"path of SwitchingLDS cannot be integrated out.*inference\.Gibbs"):
        dyn.calibrate(SWITCHING, like(), QUICK)
