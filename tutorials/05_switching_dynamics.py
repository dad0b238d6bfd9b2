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
# # Switching dynamics from scratch
#
# A linear dynamical system does one thing, for ever. A brain does one thing and then another: it waits, then moves; it
# sleeps, then wakes. The simplest model of that has several linear systems, and a hidden *mode* that says which of them
# is at work:
#
# $$z_t \sim p(z_t \mid z_{t-1}, x_{t-1}), \qquad x_t = A_{z_t} x_{t-1} + b_{z_t} + \epsilon_t, \qquad
# y_t = C x_t + d + \text{noise} .$$
#
# You see y alone. The path x, the modes z, the dynamics of every mode, and what makes the modes switch are all to be
# inferred. In this tutorial you will
#
# 1. write the generative story down yourself, as a car on a race track,
# 2. infer everything, and check it against what you wrote,
# 3. see what it costs to leave out why modes switch,
# 4. let a variational engine do the same, and compare.

# %%
# %matplotlib inline
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar that a notebook can do without

import pyrodyn as dyn
from pyrodyn import guides, inference, models, plots, readouts

torch.set_num_threads(1)
warnings.simplefilter("ignore", dyn.FitWarning)  # short fits, for a tutorial; what they are worth is looked at below

# %% [markdown]
# ## 1. The story
#
# A track with two straights and two bends. Which part the car is on depends on where it is: that is what `recurrence`
# says, weights of a softmax over modes. On a straight the car moves by a fixed step; in a bend it rotates, clockwise,
# about the bend's centre.

# %%
rng = np.random.default_rng(0)


def rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


dynamics = np.stack([rotation(-np.pi / 24), rotation(-np.pi / 48), np.eye(2), np.eye(2)])
centres = np.array([[2.0, 0.0], [-2.0, 0.0]])
bias = np.array([c - a @ c for a, c in zip(dynamics[:2], centres, strict=True)] + [[0.1, 0.0], [-0.25, 0.0]])
recurrence = np.array([[100.0, 0.0], [-100.0, 0.0], [0.0, 10.0], [0.0, -10.0]])
recurrence_bias = np.array([-200.0, -200.0, 0.0, 0.0])

bins, state = 1500, np.array([0.0, 1.0])
path, modes = np.empty((bins, 2)), np.empty(bins, dtype=int)
for t in range(bins):
    logits = recurrence @ state + recurrence_bias
    modes[t] = (logits + rng.gumbel(size=4)).argmax()  # a draw from the softmax
    state = dynamics[modes[t]] @ state + bias[modes[t]] + 0.01 * rng.normal(size=2)
    path[t] = state

figure, axis = plt.subplots(figsize=(5, 2.6))
axis.scatter(*path.T, c=[plots.panels.COLOURS[k] for k in modes], s=2)
axis.set(xlabel="x", ylabel="y", aspect="equal", title="one colour a mode")
figure.tight_layout()

# %% [markdown]
# Nobody records x and y. What is recorded are ten channels, each a mixture of the two and noise. (`systems.nascar`
# makes such recordings in one line.)

# %%
loading, offset = np.linalg.qr(rng.normal(size=(10, 2)))[0], rng.normal(size=10)
observed = path @ loading.T + offset + 0.1 * rng.normal(size=(bins, 10))
recording = dyn.Recording.from_arrays(observed[None], bin_width=0.02, counts=False, session="race track")
recording

# %% [markdown]
# ## 2. The way back
#
# Given the path, the modes are a hidden Markov chain; given the modes, the path is a Gaussian chain; given both, the
# dynamics of each mode are a regression. Blocked Gibbs sampling draws one after another, each block as a whole. It
# starts from several clusterings of a smoothed path and takes the most probable.

# %%
model = models.SwitchingLDS(num_modes=4, latent_dim=2, recurrent=True, readout=readouts.Gaussian())
began = time.perf_counter()
posterior = dyn.fit(model, recording, inference.Gibbs(draws=60, warmup=60, chains=2), seed=0)
print(f"{time.perf_counter() - began:.0f} s")

# %%
plots.mode_raster(posterior, window=(0.0, 10.0))

# %% [markdown]
# Pale stretches are those in which the posterior does not know the mode. The numbers of modes mean nothing: any order
# has the same probability. To compare with the truth they have to be matched first.


# %%
def accuracy(posterior):
    """Share of the bins with the true mode, and which found mode each true one is."""
    found = posterior["latents"]["mode_probability"].values[0].argmax(-1)
    shared = np.array([[np.sum((modes == a) & (found == b)) for b in range(4)] for a in range(4)])
    names = linear_sum_assignment(-shared)[1]
    return shared[np.arange(4), names].sum() / bins, names


share, names = accuracy(posterior)
print(f"{share:.1%} of the bins")

# %% [markdown]
# What each mode does: arrows are its flow, colour is where it was at work. The track lies turned, since the ten
# channels do not tell in which directions x and y were laid.

# %%
plots.mode_flows(posterior, window=(0.0, 10.0))

# %% [markdown]
# An angle does not depend on such a turn. Those of the two bends, with what the posterior says of its own error:

# %%
angles = np.abs(np.angle(np.linalg.eigvals(posterior["posterior"]["dynamics"].values))).max(-1)
pd.DataFrame(
    {
        "true turn (degrees a bin)": np.degrees([np.pi / 24, np.pi / 48]),
        "mean": np.degrees(angles.mean((0, 1))[names[:2]]),
        "sd": np.degrees(angles.std((0, 1))[names[:2]]),
    },
    index=pd.Index(["right bend", "left bend"], name="mode"),
).round(2)

# %% [markdown]
# ## 3. Why modes switch
#
# Which mode follows which, and after how long? Each arrow's number is the share of the ways out of its mode.

# %%
plots.transition_graph(posterior)

# %%
plots.dwell_times(posterior)

# %% [markdown]
# A straight is left where it ends: visits last about equally long, and not, as in a Markov chain, a geometric time
# (dashed). The fitted model knows this: data that it simulates (grey) have such visits too.
#
# Now leave out the state's say in the modes, `recurrent=False`.

# %%
plain = models.SwitchingLDS(num_modes=4, latent_dim=2, readout=readouts.Gaussian())
without = dyn.fit(plain, recording, inference.Gibbs(draws=60, warmup=60, chains=2), seed=0)
print(f"{accuracy(without)[0]:.1%} of the bins")
plots.dwell_times(without)

# %% [markdown]
# The modes are found about as well: within a mode the data speak. But what the model simulates lasts geometric times,
# and the colours leave the grey bands. It explains the recording and could not have made it. Let both drive, three
# draws of each, over the track (grey):

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, (name, fit) in zip(axes, {"recurrent": posterior, "without": without}.items(), strict=True):
    simulated = dyn.checks.replicated_latents(fit, draws=3)["path"][:, 0, :400]
    axis.plot(*fit["latents"]["mean"].values[0].T, color="0.8", lw=0.5)
    for one in simulated.values:
        axis.plot(*one.T, lw=0.8)
    axis.set(title=name, xlabel="latent 0", xlim=(-6, 6), ylim=(-6, 6))
axes[0].set_ylabel("latent 1")
figure.tight_layout()

# %% [markdown]
# With the state's say most draws keep near the track; without it they bend where there is no bend.
#
# ## 4. Another engine
#
# Modes summed out, the density of path and parameters is smooth, and a variational engine takes the same model. Its
# guide knows that the path is a chain.

# %%
began = time.perf_counter()
variational = dyn.fit(model, recording, inference.SVI(steps=150, draws=100, guide=guides.Structured()), seed=0)
print(f"{time.perf_counter() - began:.0f} s, {accuracy(variational)[0]:.1%} of the bins")
plots.trace(variational)

# %%
spread = {
    name: np.degrees(np.abs(np.angle(np.linalg.eigvals(fit["posterior"]["dynamics"].values))).max(-1))
    for name, fit in {"Gibbs": posterior, "SVI": variational}.items()
}
pd.DataFrame(
    {
        (name, what): getattr(values, what)((0, 1))[accuracy(fit)[1][:2]]
        for (name, values), fit in zip(spread.items(), (posterior, variational), strict=True)
        for what in ("mean", "std")
    },
    index=pd.Index(["right bend", "left bend"], name="mode"),
).round(2)

# %% [markdown]
# Both start from the same clusterings, and the modes come early. The error bars come late: the loss still falls, and
# until it is at rest the standard deviations are the guide's, not the posterior's. Where the conditionals are known, as
# here, Gibbs sampling is the better buy; the variational engine takes what has none.
#
# ## Exercise
#
# Give the model five modes instead of four. What happens to the fifth: is it left empty, or does it take over a part of
# another? *Hint:* `plots.transition_graph`; and "How many states?" for how to decide.
