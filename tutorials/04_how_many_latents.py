# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How many latents?
#
# A reviewer asks why your model has three latents and not six. More latents always fit better: every one of them gives
# the model another way to bend towards the data it was shown. So the fit cannot answer. What can is a trial that the
# model has not seen:
#
# $$\mathrm{elpd} = \sum_{i} \log p(y_i \mid y_{-i}),$$
#
# the expected log predictive density, in nats. Trial $i$ is predicted by a posterior of all others, and the trial's
# latent path is integrated out: a path that was fitted to the trial would have seen it.
#
# In this tutorial you will
#
# 1. choose the number of latents where you know it, by leaving trials out,
# 2. ask the same of the evidence, and see what each answer rests on,
# 3. check what the chosen model cannot make, which no comparison tells,
# 4. compare models of a real recording.

# %%
# %matplotlib inline
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.io
import torch

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar that a notebook can do without

import pyrodyn as dyn
from pyrodyn import comparison, inference, models, plots

torch.set_num_threads(1)
warnings.simplefilter("ignore", dyn.FitWarning)  # short fits, for a tutorial; what they are worth is looked at below

# %% [markdown]
# ## 1. Where you know the answer
#
# Two latents turn at about 2 Hz, and ten neurons see them. We make 20 trials.

# %%
like = dyn.Recording.from_arrays(np.ones((20, 30, 10)), bin_width=0.05)
turning = torch.tensor([[1.0, 2.0], [-2.0, 1.0]], dtype=torch.float64)
recording, truth = dyn.simulate(models.LDS(2), like, seed=1, values={"mixing": turning, "offset": -torch.ones(10)})
recording

# %% [markdown]
# Fit one, two and four latents, and compare. `KFold` leaves a third of the trials out at a time and fits the others
# again; all folds are one batch of weighted replicates, so that this costs less than three fits.

# %%
engine = inference.SVI(steps=100, draws=400)
names = {1: "1 latent", 2: "2 latents", 4: "4 latents"}
fits = {name: dyn.fit(models.LDS(dim), recording, engine, seed=0) for dim, name in names.items()}
chosen = dyn.compare(fits, method=comparison.KFold(3))
columns = ["elpd", "difference", "dse", "elpd_uncorrected", "mc_error", "weight_stacking"]
comparison.as_table(chosen)[columns].round(2)

# %%
plots.comparison(chosen)

# %% [markdown]
# In one line, and for larger grids in several processes, resumable: `dyn.select(models.LDS, {"latent_dim": [1, 2, 4]},
# recording, engine, folder="fits", workers=2)`.
#
# Read the `difference` beside its standard error `dse`, never two scores beside their own: trials are easy or hard for
# all models alike, and the difference does not see that.
#
# Spikes are not Gaussian, so that the path is integrated out by Laplace's approximation. It errs, in favour of more
# latents. Particle filters measure the error and take it out: `elpd_uncorrected` is the score before, `mc_error` what
# the noise of the particles leaves in the score after.
#
# ## 2. The evidence
#
# The marginal likelihood $p(y)$ asks another question: how probable were these data before any was seen? It is an
# integral over all parameters, and depends on how wide the priors are where the data say nothing.

# %%
with warnings.catch_warnings(record=True) as complaints:
    warnings.simplefilter("always", dyn.ComparisonWarning)
    evidence = dyn.compare(fits, method=comparison.Evidence())
for complaint in complaints:
    print("warning:", complaint.message)
comparison.as_table(evidence)[["log_evidence", "se", "bad_k_share", "estimator"]].round(2)

# %% [markdown]
# The numbers come from weights $p(y, \theta) / q(\theta)$ of draws from the fitted guide $q$. Where $\hat k$ of the
# weights is large, a few draws rule the sum, and the warning says that the number cannot be trusted, however small its
# standard error. Fit with `inference.HMC()` and the evidence is bridged instead.
#
# ## 3. The best of bad models
#
# A comparison ranks. It does not say that any of the models is good. For that, let the fitted model make data, and look
# where yours lie among them.

# %%
checked = dyn.check(fits["2 latents"], draws=100)
plots.checks(checked)

# %%
alone = dyn.check(fits["1 latent"], draws=100)
pd.DataFrame({"1 latent": alone["extreme"].to_series(), "2 latents": checked["extreme"].to_series()}).round(2)

# %% [markdown]
# Each number is the share of units, pairs, lags or bins whose p-value lies outside of .01 to .99; a model that is right
# has about .02. One latent cannot make the correlations between neurons that turn out of phase.
#
# ## 4. A real recording
#
# Motor cortex of a monkey that reaches. Four models, one call: three linear systems, and a hidden Markov model that
# jumps between four levels. Neurons are predicted from each other in trials that no model has seen; bits per spike are
# what the others tell about each spike of a neuron.

# %%
path = Path(os.environ.get("PYRODYN_DATA", "../shared/data")) / "datahigh_reach" / "ex2_rawspiketrains.mat"
if path.is_file():
    raw = scipy.io.loadmat(path, squeeze_me=True)["D"]
    wide = [s[:, : s.shape[1] // 40 * 40].reshape(len(s), -1, 40).sum(2).T for s in raw["data"]]  # bins of 40 ms
    whole = dyn.Recording.from_arrays(wide, bin_width=0.04, condition=raw["condition"], session="reach")
    busiest = whole.observations.sum((0, 1)).argsort(descending=True)[:20].tolist()
    parts = whole.isel(unit=sorted(busiest)).split_trials({"train": 0.2, "test": 0.2, "rest": 0.6}, seed=0)
    train, test = parts.sel(split="train"), parts.sel(split="test")
    real = {name: dyn.fit(models.LDS(dim), train, engine, seed=0) for dim, name in names.items()}
    real["4 modes"] = dyn.fit(models.HMM(4), train, inference.Laplace(draws=200), seed=0)
    table = dyn.compare(real, test, comparison.HeldOutUnits(groups=4, draws=25))
    print(comparison.as_table(table)[["bits_per_spike", "se", "difference", "dse"]].round(3))
    plots.comparison(table)
else:
    print(f"(no recording at {path}: set PYRODYN_DATA)")

# %% [markdown]
# ## Exercise
#
# Halve the number of trials, and again, until the second latent is no longer found. What do `dse` and the stacking
# weight do on the way? *Hint:* `recording.isel(trial=slice(0, 10))`; and weaken the second latent, or two trials will
# do: `"mixing": 0.3 * turning`.
