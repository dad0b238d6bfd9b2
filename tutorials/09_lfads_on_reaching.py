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
# # LFADS on reaching
#
# An animal reaches. In the quarter of a second before it moves, the activity of its motor cortex sets out from a state
# that depends on the target and follows a course that looks the same in every such reach. If that is so, then a whole
# trial is told by where it starts: the rest is dynamics.
#
# `models.LFADS` says just this. A recurrent network, the *generator*, runs by itself from a code $z_i$ of the trial,
#
# $$z_i \sim N(0, I), \qquad g_t = \mathrm{GRU}(g_{t-1}), \qquad \log \lambda_t = C F g_t + d,$$
#
# and spikes are Poisson with these rates. Nothing tells the network what its dynamics should be.
#
# A network with thousands of weights can also learn the wrong thing. In this tutorial you will
#
# 1. find rates that you know, below spikes that hide them,
# 2. see how training is kept from learning the noise, and what it reports,
# 3. fit a real reaching task and ask for neurons that the model was not shown.

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
from scipy.ndimage import gaussian_filter1d

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar that a notebook can do without

import pyrodyn as dyn
from pyrodyn import guides, inference, models, systems
from pyrodyn.evaluation import rate_r2
from pyrodyn.scoring import bits_per_spike_over_trials

torch.set_num_threads(1)

# %% [markdown]
# ## 1. Rates that you know
#
# A random network with strong connections is chaotic: no linear model can follow it for long. Here thirty of its units
# emit Poisson spikes, at most .3 in a bin. Each start is used for five trials, but no model is told which trials
# belong together.

# %%
system = systems.chaotic_rnn(units=30, conditions=40, repeats=5, bins=50)
recording, rates = system.recording, system.truth["rates"].values
recording

# %% [markdown]
# The generator's weights are random variables with priors, as all else here. With so many of them a point estimate is
# usual, and it is the default; what is latent in a trial, its code, has a posterior in any case. A *recognition
# network* reads the trial and says what the code may have been.

# %%
model = models.LFADS(latent_dim=8, generator_dim=32, initial_dim=16)
guide = guides.Amortised(hidden_dim=24)
engine = inference.SVI(steps=250, learning_rate=0.02, particles=1, guide=guide)
posterior = dyn.fit(model, recording, engine, seed=0)
{name: value for name, value in json.loads(posterior.attrs["notes"]).items() if name != "held_out_trials"}

# %% [markdown]
# Now the rates, beside two that need no network: each unit's own spikes smoothed by the best width (which only someone
# who knows the truth could choose), and the mean over the five trials from the same start.

# %%
smoothed = [gaussian_filter1d(recording.values.numpy(), width, axis=1) for width in (3, 5, 8, 12)]
own_start = recording.values.numpy().reshape(40, 5, 50, 30).mean(1).repeat(5, 0)
latents = posterior["latents"]["draws"]
loading, offset = (posterior["posterior"][name].values[0, 0] for name in ("loading", "offset"))
expected = np.exp(latents.values @ loading.T + offset).mean(0)  # over draws of the code


def score(found):
    return rate_r2(rates, found)


pd.Series(
    {
        "smoothed, the best width": max(score(found) for found in smoothed),
        "mean of five trials, smoothed": max(score(gaussian_filter1d(own_start, w, axis=1)) for w in (1, 2, 3, 5)),
        "LFADS, single trials": score(expected),
    },
    name="R2 of the rates",
).round(2)

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.4), sharey=True, layout="constrained")
for axis, trial in zip(axes, (0, 60, 120), strict=True):
    axis.plot(recording.time, rates[trial, :, 3], color="0.6", linewidth=3, label="true")
    axis.plot(recording.time, expected[trial, :, 3], color="#0072B2", label="inferred")
    seen = recording.time[recording.values[trial, :, 3].numpy() > 0]
    axis.plot(seen, np.full(len(seen), -0.02), "|", color="black", label="spikes")
    axis.set_title(f"trial {trial}", loc="left", fontsize=9)
    axis.set_xlabel("time (s)")
axes[0].set_ylabel("rate of one unit (a bin)")
axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
plt.show()

# %% [markdown]
# ## 2. What keeps it from learning the noise
#
# Three things, all on by default and all in the posterior's attributes:
#
# - a fifth of the trials is held back, and training returns to where these were explained best;
# - *coordinated dropout*: in every step a share of the entries is hidden from the recognition network, and the rates
#   are judged on these alone, so that copying spikes into rates gains nothing;
# - the terms that keep codes near their prior come in slowly, so that the generator finds a use for codes first.
#
# The two numbers that matter are the loss and the bound of the trials held back. If the second falls while the first
# still improves, you are looking at overfitting.

# %%
history = posterior["sample_stats"]
bound = history["held_out_bound"].dropna("step")
figure, axes = plt.subplots(1, 2, figsize=(8, 2.4), layout="constrained")
axes[0].plot(history["loss"], linewidth=0.8)
axes[0].set(xlabel="step", ylabel="loss", yscale="log")
axes[1].plot(bound["step"], bound, "o-", markersize=3)
axes[1].set(xlabel="step", ylabel="bound a held-out trial")
plt.show()

# %% [markdown]
# ## 3. Reaching
#
# Sixty-one neurons in a monkey's premotor and motor cortex, reaches to two targets; the first second of each trial, in
# bins of 20 ms.


# %%
def read_reach(file):
    raw = scipy.io.loadmat(file, squeeze_me=True)["D"]
    counts = [trial[:, :1000].reshape(len(trial), 50, 20).sum(-1).T.astype(float) for trial in raw["data"]]
    return dyn.Recording.from_arrays(counts, bin_width=0.02, condition=raw["condition"], session="reach")


def simulate_twin():
    blank = dyn.Recording.from_arrays(
        np.random.default_rng(0).poisson(0.3, (112, 50, 61)).astype(float),
        bin_width=0.02,
        condition=["reach1", "reach2"] * 56,
        session="simulated twin",
    )
    return dyn.simulate(models.LDS(latent_dim=4), blank.blank(), seed=3)[0]


file = Path(os.environ.get("PYRODYN_DATA", "data")) / "datahigh_reach" / "ex2_rawspiketrains.mat"
if file.exists():
    whole = read_reach(file)
else:
    print(f"there is no {file}: a simulated twin takes its place (set PYRODYN_DATA to the folder of recordings)")
    whole = simulate_twin()
busiest = whole.values.sum((0, 1)).argsort(descending=True)[:40].tolist()
spikes = whole.isel(unit=sorted(busiest)).split_trials({"train": 0.75, "test": 0.25}, seed=0)
train, test = spikes.sel(split="train"), spikes.sel(split="test")

# %%
reaching = models.LFADS(latent_dim=6, generator_dim=32, initial_dim=8)
network = dyn.fit(reaching, train, inference.SVI(steps=300, learning_rate=0.012, particles=1, guide=guide), seed=0)

# %% [markdown]
# A quarter of the neurons is hidden in the test trials, the codes are inferred from the rest, and the hidden ones are
# predicted. `predict` does not ask the recognition network: with the weights held, it finds the posterior of every
# trial's code anew, so that a network that reads trials badly does not count against a model that explains them.

# %%
hidden = np.sort(np.random.default_rng(0).permutation(test.unit)[:10])
observed = test.to_xarray()["observations"].sel(unit=hidden)
predicted = dyn.predict(network, test.hide(unit=hidden), draws=30).sel(unit=hidden)

# The rival knows the target of every test trial: the mean of the training trials to that target, smoothed.
spikes_of = train.to_xarray()["observations"].sel(unit=hidden)
means = {name: spikes_of[train.condition == name].mean("trial").values for name in np.unique(train.condition)}
averaged = np.stack([gaussian_filter1d(means[name], 2.0, axis=0) for name in test.condition])
print("LFADS, target unknown     ", bits_per_spike_over_trials(predicted["expected"], observed))
print("mean of the known target  ", bits_per_spike_over_trials(observed.copy(data=averaged), observed))

# %% [markdown]
# The network was told nothing of targets, and reads each trial from thirty other neurons. Before you call it a winner,
# ask what a linear model does. With ten latents, `models.LDS` predicts these neurons *better*: .39 bits per spike
# ([docs/tables/lfads.md](../docs/tables/lfads.md)). Dynamics over one second of a stereotyped movement are close to
# linear, and eighty reaches are few for a network. Its place is the case of part 1: dynamics that no linear model
# follows, and trials enough to learn them.

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 2.4), layout="constrained")
lively = predicted["expected"].var(("trial", "time")).argsort()[::-1][:4].values
for axis, unit in zip(axes, hidden[lively], strict=True):
    for condition, colour in zip(np.unique(test.condition), ("#0072B2", "#D55E00"), strict=True):
        of_target = test.condition == condition
        seen = gaussian_filter1d(observed.sel(unit=unit)[of_target].mean("trial"), 1.5) / test.bin_width
        rate = predicted["expected"].sel(unit=unit)[of_target].mean("trial") / test.bin_width
        axis.plot(test.time, seen, color=colour, alpha=0.6, linewidth=0.9, linestyle="--")
        axis.plot(test.time, rate, color=colour, linewidth=1.8, label=condition)
    axis.set_title(f"neuron {unit}, hidden", loc="left", fontsize=9)
    axis.set_xlabel("time (s)")
axes[0].set_ylabel("spikes/s")
axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="line: predicted\ndashed: observed", fontsize=8)
plt.show()

# %% [markdown]
# The factors are known up to an invertible map; their principal components are a picture that does not depend on it.

# %%
path = network["latents"]["mean"].values
centred = path.reshape(-1, path.shape[-1]) - path.mean((0, 1))
scores = (centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T).reshape(*path.shape[:2], 2)
figure, axis = plt.subplots(figsize=(4, 3.4), layout="constrained")
for condition, colour in zip(np.unique(train.condition), ("#0072B2", "#D55E00"), strict=True):
    own = scores[train.condition == condition]
    axis.plot(own[..., 0].T, own[..., 1].T, color=colour, linewidth=0.4, alpha=0.5)
    axis.plot(*own.mean(0).T, color=colour, linewidth=2.5, label=condition)
axis.set(xlabel="first component", ylabel="second component")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Exercise
#
# Something may happen within a trial that its start does not tell: a target that jumps, a mistake that is corrected.
# Give the generator inputs, `models.LFADS(6, generator_dim=32, initial_dim=8, input_dim=1)`: a controller then infers
# when something came in from outside.
#
# 1. Fit it to `systems.pulsed_rnn(units=30, conditions=40, repeats=5, bins=50).recording`, in whose trials one pulse
#    comes at a time of its own. Does `posterior["latents"]["inferred_inputs"]` move at the bin in the truth's
#    `pulse_bin`? (Twice as many steps help.)
# 2. Fit it to the reaches. Does the held-out score gain anything? If not, what would you conclude about inputs to motor
#    cortex in this task, and what would you not?
