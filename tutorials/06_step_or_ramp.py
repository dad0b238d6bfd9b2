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
# # Does this neuron step or ramp?
#
# A monkey watches moving dots and decides: left or right. While it does, the rate of a neuron in the parietal cortex
# climbs, the steeper the clearer the motion. It looks as if the neuron added up evidence. But what climbs is an average
# over trials. Imagine a neuron that does nothing of the kind: in every trial its rate jumps once, at a time of its own.
# Average such jumps, and out comes a ramp.
#
# So averages cannot tell. A single trial holds a dozen spikes, and cannot tell either. What can is a model of single
# trials in which the moment of the jump, or the path of the ramp, is summed out:
#
# $$p(y \mid \text{model}) =
# \int \prod_{i} \sum_{\text{paths}} p(y_i, \text{path} \mid \theta) \, p(\theta) \, d\theta .$$
#
# In this tutorial you will
#
# 1. see two neurons with the same average, one of which steps and one of which ramps,
# 2. tell them apart,
# 3. look into single trials, and see how little they say,
# 4. find out what is asked when both models are wrong.

# %%
# %matplotlib inline
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar that a notebook can do without

import pyrodyn as dyn
from pyrodyn import comparison, inference, models

torch.set_num_threads(1)

# %% [markdown]
# ## 1. Two neurons, one average
#
# Three strengths of motion, 250 trials of .8 s, bins of 10 ms. `condition` carries the motion.

# %%
rng = np.random.default_rng(0)
motion = ("against", "none", "for")
which = rng.integers(3, size=250)
like = dyn.Recording.from_arrays(
    np.ones((250, 80, 1)), bin_width=0.01, condition=[motion[i] for i in which], counts=True
)

# %% [markdown]
# The first neuron ramps: its position x drifts and diffuses from .5, and stays at the bound once it reaches 1. Its rate
# is 40 x events a second (`offset` is the log of the expected count of a bin at the bound).

# %%
ramp = models.Accumulator(motion, grid=60)
ramping, ramp_truth = dyn.simulate(
    ramp,
    like,
    seed=1,
    values={"drift": [-0.5, 0.0, 1.0], "diffusion": [0.316], "start": [0.5], "offset": [np.log(0.4)]},
)

# %% [markdown]
# The second neuron steps: from 20 up to 38 or down to 8 events a second.

# %%
step = models.Stepping(motion)
stepping, step_truth = dyn.simulate(
    step,
    like,
    seed=2,
    values={
        "delay": [0.4, 0.5, 0.3],
        "up_probability": [0.05, 0.5, 0.95],
        "offset": [np.log(0.2)],
        "change": [[np.log(38 / 20)], [np.log(8 / 20)]],
    },
)

# %%
cells = {"the one that ramps": ramping, "the one that steps": stepping}
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
kernel = np.ones(9) / 9
for axis, (name, cell) in zip(axes, cells.items(), strict=True):
    for condition in motion:
        counts = cell.sel(condition=condition).values.mean(0)[:, 0].numpy() / cell.bin_width
        axis.plot(cell.time[4:-4], np.convolve(counts, kernel, "valid"), label=condition)
    axis.set(title=name, xlabel="time (s)")
axes[0].set_ylabel("events a second")
axes[1].legend(title="motion", frameon=False)
figure.tight_layout()

# %% [markdown]
# Both climb and fall with the motion. Would you know which is which without the titles?
#
# ## 2. Telling them apart
#
# Fit both models to both neurons. Each is a hidden Markov chain: a few phases and two outcomes for a step, a grid of
# 60 positions for a ramp. So the sum over all paths is exact, and what an engine sees is a smooth density of a few
# numbers.

# %%
engine = inference.Laplace(draws=300)
fits = {
    name: {"step": dyn.fit(step, cell, engine, seed=0), "ramp": dyn.fit(ramp, cell, engine, seed=0)}
    for name, cell in cells.items()
}

# %%
with warnings.catch_warnings(record=True) as complaints:
    warnings.simplefilter("always", comparison.ComparisonWarning)
    tables = {
        name: comparison.as_table(dyn.compare(both, method=comparison.Evidence()))[["log_evidence", "se", "difference"]]
        for name, both in fits.items()
    }
for complaint in complaints:
    print("warning:", complaint.message)
pd.concat(tables).round(2)

# %% [markdown]
# A difference of 5 nats is odds of 150 to 1. If a warning says that the importance weights are uneven, look at `se`
# beside the difference: an error of .1 cannot turn over a difference of 10.
#
# The winner's parameters are those that made the data, within their error:

# %%
drift = fits["the one that ramps"]["ramp"]["posterior"]["drift"]
pd.DataFrame(
    {
        "true drift": ramp_truth["drift"].values,
        "mean": drift.mean(("chain", "draw")).values,
        "sd": drift.std(("chain", "draw")).values,
    },
    index=pd.Index(motion, name="motion"),
).round(2)

# %% [markdown]
# ## 3. Single trials
#
# The neuron that steps, four of its trials: spikes, the probability that the step is over, and the planted step.

# %%
phase = fits["the one that steps"]["step"]["latents"]["phase_probability"]
over = 1.0 - phase.sel(phase="before")
planted = (step_truth["phase_path"].values == 0).sum(1)
figure, axes = plt.subplots(1, 4, figsize=(11, 2.4), sharey=True)
for axis, trial in zip(axes, np.flatnonzero((planted > 20) & (planted < 60))[:4], strict=True):
    spikes = stepping.values[trial, :, 0].numpy()
    axis.plot(over["time"], over[trial])
    axis.vlines(stepping.time[spikes > 0], 1.05, 1.2, color="k", lw=1)
    axis.axvline(stepping.time[planted[trial]], color="C1", ls="--")
    axis.set(title=f"trial {trial}", xlabel="time (s)")
axes[0].set_ylabel("step is over")
figure.tight_layout()

# %%
found = (phase.sel(phase="before").values > 0.5).sum(1)
print(f"median error of the step's time: {10 * np.median(np.abs(found - planted)):.0f} ms")

# %% [markdown]
# One trial of one neuron says little of the moment of its step: at 20 events a second a change takes several intervals
# between spikes to be seen. That the *kind* of neuron is known so well is owed to 250 such trials together.
#
# ## 4. When both are wrong
#
# A comparison ranks. It does not say that any model is good. Here is a neuron that does neither: its rate rises
# smoothly in every trial, without noise in its path, and without a bound.

# %%
slope = np.array([-0.5, 0.0, 0.6])[which]
rates = np.logaddexp(0.0, 40.0 * (0.5 + slope[:, None] * like.time)) * 0.01
smooth = like.with_observations(rng.poisson(rates)[..., None].astype(float))
neither = {"step": dyn.fit(step, smooth, engine, seed=0), "ramp": dyn.fit(ramp, smooth, engine, seed=0)}
pd.DataFrame(
    {
        "mean": {name: float(neither["ramp"]["posterior"][name].mean()) for name in ("diffusion", "start")},
        "sd": {name: float(neither["ramp"]["posterior"][name].std()) for name in ("diffusion", "start")},
    }
).round(3)

# %% [markdown]
# The ramp takes this neuron in by turning its own noise down: look at `diffusion` beside the .316 of before. A question
# put as "step or ramp" has to be answered with one of both; the parameters tell what the answer means.
#
# ## Exercise
#
# How many trials does it take? Fit both models to the first 30, 60 and 120 trials of each neuron, and draw the
# difference of the log evidences against the number of trials. *Hint:* `cell.isel(trial=slice(0, 30))`. And what if the
# step times are less variable than you thought: `models.Stepping(motion, phases=5)`?
