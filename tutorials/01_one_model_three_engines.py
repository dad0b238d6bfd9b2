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
# # One model, three engines
#
# A monkey reaches, and the activity of its motor cortex seems to turn: the population's state runs around a circle
# and fades. Two numbers describe that: how **fast** it turns, and how **long** it lasts. You have a few noisy
# channels and twenty trials. What are the two numbers, and how far can you trust them?
#
# The linear dynamical system (LDS) answers with a posterior. In bin $t$ a hidden state $x_t$, the latent, is pushed
# on by a matrix $A$ and by noise, and every channel sees a mixture of its entries:
#
# $$x_t = A x_{t-1} + \epsilon_t, \qquad y_t = C x_t + d + \text{noise}.$$
#
# The eigenvalues of $A$ hold the answer. One at $r e^{\pm i\theta}$ makes the state turn by the angle $\theta$ and
# shrink by the factor $r$ in every bin: a frequency of $\theta / 2\pi$ turns a bin, and a time constant of $-1 / \ln
# r$ bins.
#
# In this tutorial you will
#
# 1. simulate a recording of which you know the truth,
# 2. fit it with three inference engines by changing one argument,
# 3. check each fit, and see that the three agree with each other and with the truth,
# 4. do the same with real spikes, and predict neurons that the model was not shown.

# %%
# %matplotlib inline
import json
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.io
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.ndimage import gaussian_filter1d
from scipy.stats import gaussian_kde

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar that a notebook can do without

import pyrodyn as dyn
from pyrodyn import inference, models, plots, readouts
from pyrodyn.scoring import bits_per_spike_over_trials

torch.set_num_threads(1)  # the arrays are small: a second thread would mostly wait for the first
COLOURS = {"SVI": "#0072B2", "Laplace": "#E69F00", "HMC": "#009E73"}
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.dpi": 110})

# %% [markdown]
# ## 1. A recording with known truth
#
# Six channels, twenty trials of one second, bins of 20 ms. The state turns 1.5 times a second and has a time constant
# of half a second. `simulate` draws everything that we do not fix from the model's prior; we fix $A$ alone. (The
# model's own parameter is a matrix $M$ with $A = (I + M M^\top)^{-1/2} M$: any $M$ whatever gives a stable $A$.)
#
# We begin with real-valued signals, such as field potentials or fluorescence, under a Gaussian readout. Here the
# latent path can be integrated out exactly, so any disagreement will be the engines' own.

# %%
bin_width = 0.02  # seconds
frequency, time_constant = 1.5, 0.5  # turns a second, seconds
angle, modulus = 2 * np.pi * frequency * bin_width, np.exp(-bin_width / time_constant)
turning = modulus * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

model = models.LDS(latent_dim=2, readout=readouts.Gaussian())
shape = dyn.Recording.from_arrays(np.random.default_rng(0).normal(size=(20, 50, 6)), bin_width=bin_width).blank()
recording, truth = dyn.simulate(model, shape, seed=1, values={"mixing": turning / np.sqrt(1 - modulus**2)})
recording

# %% [markdown]
# The state turns and fades and is kicked on by noise (left, three trials); what you would see is on the right.

# %%
times = recording.time
figure, (plane, signals) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1, 1.8), layout="constrained")
for trial, colour in zip(range(3), ("#0072B2", "#D55E00", "#009E73"), strict=True):
    path = truth["path"].values[trial]
    plane.plot(*path.T, color=colour, linewidth=1.2)
    plane.plot(*path[0], "o", color=colour, markersize=5)
plane.set(xlabel="latent 0", ylabel="latent 1", aspect="equal", title="the hidden truth (dot: start)")
for channel, trace in enumerate(recording.observations[0].numpy().T):
    signals.plot(times, (trace - trace.mean()) / trace.std() - 4 * channel, color="#0072B2", linewidth=1.0)
signals.set(xlabel="time (s)", ylabel="channel", yticks=-4 * np.arange(6), yticklabels=range(6), title="one trial")
plt.show()

# %% [markdown]
# ## 2. Three engines
#
# An engine turns the model and the recording into draws from the posterior.
#
# | engine | what it does | cost |
# |---|---|---|
# | `SVI` | fits a Gaussian to the posterior by maximising a lower bound of the evidence | seconds |
# | `Laplace` | climbs to the peak of the posterior and takes its curvature there | seconds |
# | `HMC` | walks through the posterior, 64 chains at once; exact but for Monte Carlo error | seconds to minutes |
#
# One argument changes. What comes back is always the same kind of object: an `xarray.DataTree` with named axes.

# %%
engines = {
    "SVI": inference.SVI(steps=500),
    "Laplace": inference.Laplace(draws=500),
    "HMC": inference.HMC(),
}
posteriors = {name: dyn.fit(model, recording, engine, seed=0) for name, engine in engines.items()}
posteriors["HMC"]["posterior"]

# %% [markdown]
# ## 3. Check, then believe
#
# Each engine fails in its own way, so each has its own check:
#
# - **HMC** runs 64 chains in four groups that start far from each other. If the groups have not forgotten where they
#   began, nested R-hat is above 1; 1.01 and less is fine. An effective sample size (ESS) of 400 is enough for most
#   questions.
# - **SVI** and **Laplace** replace the posterior by a Gaussian. Pareto's k-hat says how well that Gaussian covers the
#   posterior: below 0.7 reweighting its draws would mend it; above, take its tails with care.
# - The **loss** of SVI must have levelled out.
#
# What looks wrong is also given as a `FitWarning` at once, and kept in the posterior's attributes.


# %%
def checks_of(posterior):
    """What the engine's own check found, and the time it took."""
    found = json.loads(posterior.attrs["diagnostics"])
    return found | {"seconds": posterior.attrs["wall_time_seconds"]}


pd.DataFrame({name: checks_of(posterior) for name, posterior in posteriors.items()}).T.round(2)

# %%
plots.trace(posteriors["SVI"])

# %%
plots.trace(posteriors["HMC"])

# %% [markdown]
# ### Do the three agree?
#
# Entries of $A$ and $C$ are not comparable between studies: turn the latent space, and they change while the data do
# not. Eigenvalues, and how strongly each channel is driven, do not change. These are the model's `invariants`, and
# they are what to look at and to report.


# %%
def dynamics_of(posterior):
    """Time constant (s) and frequency (turns a second) of the slowest mode, one value a draw."""
    slowest = posterior["invariants"].to_dataset().isel(latent=0)
    width = posterior["constant_data"].attrs["bin_width"]
    return {
        "time constant (s)": (-width / np.log(slowest["eigenvalue_modulus"])).values.ravel(),
        "frequency (turns/s)": (slowest["eigenvalue_angle"] / (2 * np.pi * width)).values.ravel(),
    }


def quantities_of(posterior):
    signal = posterior["invariants"]["signal_sd"].isel(unit=0).values.ravel()
    return dynamics_of(posterior) | {"signal of channel 0 (sd)": signal}


def summary(posterior):
    return {name: f"{draws.mean():.2f} ± {draws.std():.2f}" for name, draws in quantities_of(posterior).items()}


known = {
    "time constant (s)": time_constant,
    "frequency (turns/s)": frequency,
    "signal of channel 0 (sd)": float((truth["loading"][0] ** 2).sum() ** 0.5),
}
table = pd.DataFrame({name: summary(posterior) for name, posterior in posteriors.items()})
table["truth"] = [f"{value:.2f}" for value in known.values()]
table

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
for axis, (quantity, value) in zip(axes, known.items(), strict=True):
    drawn = {name: quantities_of(posterior)[quantity] for name, posterior in posteriors.items()}
    low, high = np.quantile(np.concatenate(list(drawn.values())), [0.002, 0.998])
    grid = np.linspace(low, high, 200)
    for name, draws in drawn.items():
        axis.plot(grid, gaussian_kde(draws)(grid), color=COLOURS[name], label=name, linewidth=1.6)
    axis.axvline(value, color="black", linestyle=":", linewidth=1.2, label="truth")
    axis.set(xlabel=quantity, yticks=[], ylim=(0, None))
    axis.spines["left"].set_visible(False)
axes[0].set_ylabel("posterior density")
axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
# SVI and HMC lie on each other. Laplace sees the frequency alike, but puts time constant and signal lower, by up to
# one standard deviation: both are skewed, and the peak of a skewed posterior lies to one side of its mass. Its k-hat,
# the larger of the two, told you to expect as much. With more trials the posterior becomes Gaussian, and the three
# one.
#
# ### The latents themselves
#
# The latent space may be turned without any effect on the data. pyrodyn takes that freedom away by tying the axes to
# some of the channels, so all three engines speak of the same axes; before we lay the truth over the fit, it must be
# turned into these axes, too. The bands hold 90% of the posterior at each moment.

# %%
mean, sd = posteriors["HMC"]["latents"]["mean"].values, posteriors["HMC"]["latents"]["sd"].values
rotation, _ = orthogonal_procrustes(truth["path"].values.reshape(-1, 2), mean.reshape(-1, 2))
true_path = truth["path"].values @ rotation
inside = np.abs(true_path - mean) < 1.645 * sd

trial = 0
figure, axes = plt.subplots(2, 1, figsize=(8, 4), sharex=True, layout="constrained")
for latent, axis in enumerate(axes):
    centre, half = mean[trial, :, latent], 1.645 * sd[trial, :, latent]
    axis.fill_between(times, centre - half, centre + half, color=COLOURS["HMC"], alpha=0.25, linewidth=0)
    for name, posterior in posteriors.items():
        path = posterior["latents"]["mean"].values[trial, :, latent]
        axis.plot(times, path, color=COLOURS[name], label=name, linewidth=1.2)
    axis.plot(times, true_path[trial, :, latent], color="black", linestyle=":", linewidth=1.4, label="truth")
    axis.set_ylabel(f"latent {latent}")
axes[0].set_title(f"trial {trial}: means, and the 90% band of HMC", loc="left", fontsize=10)
axes[1].set_xlabel("time (s)")
axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()
print(f"{inside.mean():.0%} of the true path lies inside the 90% bands")

# %% [markdown]
# ## 4. Real spikes
#
# Now the real thing: a delayed reach to two targets, 61 neurons in premotor and primary motor cortex (Yu et al., J.
# Neurophysiol. 102:614, 2009; distributed with DataHigh). Trials last 1.0 to 1.5 seconds, each as long as it was. We
# take the 30 busiest neurons, and 48 of the 112 trials to keep the tutorial short; 32 to learn from, 16 to be tested
# on.
#
# The folder of recordings is named by the environment variable `PYRODYN_DATA`. Without it, a simulated twin of the
# same shape stands in, and everything below still runs.


# %%
def read_reach(file):
    """Spikes at 1 ms become counts in bins of 20 ms, (time, unit) for each trial."""
    raw = scipy.io.loadmat(file, squeeze_me=True)["D"]
    bins = [spikes.shape[1] // 20 for spikes in raw["data"]]
    counts = [s[:, : 20 * n].reshape(len(s), n, 20).sum(2).T for s, n in zip(raw["data"], bins, strict=True)]
    return dyn.Recording.from_arrays(counts, bin_width=0.02, condition=raw["condition"], session="reach")


def simulate_twin():
    random = np.random.default_rng(0)
    lengths = random.integers(51, 77, 112)
    like = [random.poisson(0.3, (n, 61)) for n in lengths]
    blank = dyn.Recording.from_arrays(
        like, bin_width=0.02, condition=["reach1", "reach2"] * 56, session="simulated twin"
    )
    return dyn.simulate(models.LDS(latent_dim=4), blank, seed=3)[0]


file = Path(os.environ.get("PYRODYN_DATA", "data")) / "datahigh_reach" / "ex2_rawspiketrains.mat"
if file.exists():
    whole = read_reach(file)
else:
    print(f"there is no {file}: a simulated twin takes its place (set PYRODYN_DATA to the folder of recordings)")
    whole = simulate_twin()

busiest = whole.observations.sum((0, 1)).argsort(descending=True)[:30].tolist()
spikes = whole.isel(unit=sorted(busiest)).split_trials({"train": 32 / 112, "test": 16 / 112, "rest": 64 / 112}, seed=0)
train, test = spikes.sel(split="train"), spikes.sel(split="test")
train

# %% [markdown]
# The model changes in one word, the readout: spike counts are Poisson, with a log rate that is linear in the latent.
# Its path can no longer be integrated out exactly, and the posterior says so. HMC would run here in the same way, by
# the same one argument; it takes a coffee break, which is why it is left out.

# %%
poisson = models.LDS(latent_dim=4, readout=readouts.Poisson())
reach = {
    "SVI": dyn.fit(poisson, train, inference.SVI(steps=100, particles=2, draws=200), seed=0),
    "Laplace": dyn.fit(poisson, train, inference.Laplace(draws=200), seed=0),
}
print("the path was", reach["SVI"].attrs["path_treatment"])
pd.DataFrame({name: checks_of(posterior) for name, posterior in reach.items()}).T.round(2)


# %%
def modes_of(posterior):
    """Median and 90% interval of every mode's time constant."""
    modulus = posterior["invariants"]["eigenvalue_modulus"]
    low, middle, high = (-0.02 / np.log(modulus)).quantile([0.05, 0.5, 0.95], ("chain", "draw")).values
    return [f"{m:.2f} s ({a:.2f} to {b:.2f})" for m, a, b in zip(middle, low, high, strict=True)]


pd.DataFrame({name: modes_of(posterior) for name, posterior in reach.items()}, index=pd.Index(range(4), name="mode"))

# %% [markdown]
# Look at k-hat before you quote such a table. Here are 160 numbers to learn from 32 trials, and no Gaussian fits that
# posterior in all its directions; the two engines may differ over a time constant by as much as their intervals are
# wide. Then say which engine a number came from, or run HMC. What they predict differs far less, as you will see.

# %%
plots.eigenvalues(reach["SVI"])

# %%
plots.latents(reach["SVI"], trials=train.trial[:2].tolist())

# %% [markdown]
# ### Neurons that the model was not shown
#
# A pretty latent proves nothing. A test does: hide a quarter of the neurons in trials that were never fitted, infer
# the latent from the other neurons, and predict the hidden ones. The score is in bits per spike above the knowledge
# of each neuron's mean rate; zero is no better than the mean.

# %%
hidden = np.sort(np.random.default_rng(0).permutation(test.unit)[:8])
observed = test.to_xarray()["observations"].sel(unit=hidden)
predicted = {name: dyn.predict(posterior, test.hide(unit=hidden)).sel(unit=hidden) for name, posterior in reach.items()}
for name, prediction in predicted.items():
    print(f"{name:<8}", bits_per_spike_over_trials(prediction["expected"], observed))

# %%
plots.rates(reach["SVI"], predicted["SVI"], recording=test)

# %% [markdown]
# Averaged over the eight test trials of each target (the spikes smoothed by 30 ms), predictions can be judged by eye:

# %%
first = 50  # bins that every trial has
figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), sharex=True, layout="constrained")
lively = predicted["SVI"]["expected"].var(("trial", "time")).argsort()[::-1][:4].values
for axis, unit in zip(axes, hidden[lively], strict=True):
    for condition, colour in zip(np.unique(test.condition), ("#0072B2", "#D55E00"), strict=True):
        of_target = test.condition == condition
        seen = gaussian_filter1d(observed.sel(unit=unit)[of_target, :first].mean("trial"), 1.5) / test.bin_width
        rate = predicted["SVI"]["expected"].sel(unit=unit)[of_target, :first].mean("trial") / test.bin_width
        axis.plot(test.time[:first], seen, color=colour, alpha=0.6, linewidth=0.9, linestyle="--")
        axis.plot(test.time[:first], rate, color=colour, linewidth=1.8, label=condition)
    axis.set_title(f"neuron {unit}, hidden", loc="left", fontsize=9)
    axis.set_xlabel("time (s)")
axes[0].set_ylabel("spikes/s")
axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="line: predicted\ndashed: observed", fontsize=8)
plt.show()

# %% [markdown]
# The same contest with all 61 neurons, with more latents, and against kernel smoothing with a tuned width, stands in
# [docs/tables/cosmoothing.md](../docs/tables/cosmoothing.md).
#
# A posterior is one file, and it predicts the same in another process:
#
# ```python
# dyn.save(reach["SVI"], "reach.nc")
# dyn.predict(dyn.load("reach.nc"), test.hide(unit=hidden))
# ```
#
# ## Exercise
#
# We took four latents because it was convenient. How many do the hidden neurons ask for? Fit `latent_dim` of 1, 2, 4
# and 8, and draw the score against it.
#
# *Hint.* Choose on trials that are neither fitted nor tested, or the test is no test any more: `spikes` has a third
# part, `spikes.sel(split="rest")`. `inference.Laplace(draws=50)` is quick for few latents, `inference.SVI(steps=50,
# particles=1, draws=50)` for many. Start from
#
# ```python
# from pyrodyn.scoring import bits_per_spike
#
# check = spikes.sel(split="rest")
# kept = check.to_xarray()["observations"].sel(unit=hidden)
# for latent_dim in (1, 2, 4, 8):
#     posterior = dyn.fit(models.LDS(latent_dim=latent_dim), train, inference.SVI(steps=50, particles=1, draws=50))
#     expected = dyn.predict(posterior, check.hide(unit=hidden))["expected"].sel(unit=hidden)
#     print(latent_dim, bits_per_spike(expected, kept))
# ```
#
# Does the best number stay the same when you hide other neurons? And with all 112 trials?
