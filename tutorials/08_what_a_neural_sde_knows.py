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
# # What a neural SDE knows about its drift
#
# A decision is sometimes pictured as a ball in a landscape with two valleys. Noise kicks it about; now and then it
# crosses the ridge. You see neither ball nor landscape, only ten noisy channels, and only in three bins of ten. Can the
# landscape be learned, and **where** should you believe it?
#
# A stochastic differential equation moves the hidden state $x$ by a drift $f$ and by noise,
#
# $$dx = f(x)\,dt + L\,dW, \qquad y_t = C x(t) + d + \text{noise},$$
#
# and here $f$ is a random function: a Gaussian process. Its posterior is narrow where paths went, and as wide as the
# prior where none did. In this tutorial you will
#
# 1. fit such a model to an oscillator with two wells, with gaps in the data,
# 2. look at the flow field together with its uncertainty,
# 3. find the fixed points, in every draw of the posterior,
# 4. take one well's data away, and see the model say that it does not know.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import numpy as np
import torch

import pyrodyn as dyn
from pyrodyn import drifts, evaluation, inference, models, readouts, systems
from pyrodyn.posterior import parameters_of

# %% [markdown]
# ## Two wells, and three bins of ten
#
# The Duffing oscillator $\dot x = v,\ \dot v = 2x - x^3 - v/10$ has stable points at $(\pm\sqrt 2, 0)$ and a saddle
# between them. Two trials start in each well.

# %%
BINS = 400
both = systems.duffing(bins=BINS, seen=120, bin_width=0.03, seed=1)
print(both.recording)

fig, ax = plt.subplots(figsize=(7, 2.5))
unit = both.recording.observations[0, :, 0].numpy().copy()
unit[~both.recording.mask[0, :, 0].numpy()] = np.nan
ax.plot(both.recording.time, both.truth["rates"].values[0, :, 0], lw=1, label="what channel 0 means")
ax.plot(both.recording.time, unit, ".", ms=4, label="what was seen")
ax.set(xlabel="time (s)", ylabel="channel 0, trial 0")
ax.legend(loc="upper right")
fig.tight_layout()

# %% [markdown]
# ## The fit
#
# `NaturalGradient` is the engine made for these models. It keeps a Gaussian law of every path, and one of the
# drift's weights in closed form; the noise and the channels' loadings follow by climbing the same bound.

# %%
model = models.NeuralSDE(2, readouts.Gaussian(), drifts.GaussianProcess(functions=9))
engine = inference.NaturalGradient(rounds=15, draws=100)
posterior = dyn.fit(model, both.recording, engine, seed=0)
posterior["latents"]

# %% [markdown]
# ## The field, and what is known of it
#
# Latent coordinates are a matter of choice. Here we know the truth, so every posterior draw is carried into the true
# coordinates by its own loading before we compare.

# %%
GRID = np.stack(np.meshgrid(np.linspace(-2.2, 2.2, 17), np.linspace(-1.6, 1.6, 13)), -1)


def to_truth(tree, system):
    """The drift of every draw as a function of true states, and the paths' mean in true coordinates."""
    drawn = parameters_of(tree, model, 100)
    back = torch.linalg.pinv(torch.from_numpy(system.truth["loading"].values))
    turn = back @ drawn.loading.squeeze(1)
    shift = (drawn.offset.squeeze(1) - torch.from_numpy(system.truth["offset"].values)) @ back.mT
    flow = model.flow(drawn)

    def drift(states):
        own = torch.linalg.solve(turn, (torch.from_numpy(states)[None] - shift[:, None]).mT).mT
        return (flow(own) @ turn.mT).detach().numpy()

    mean = torch.from_numpy(tree["latents"]["mean"].values)
    return drift, (mean @ turn.mean(0).mT + shift.mean(0)).numpy()


def show(ax, tree, system, title):
    """Mean field as arrows over the standard deviation of the drift."""
    drift, paths = to_truth(tree, system)
    draws = drift(GRID.reshape(-1, 2)).reshape(-1, *GRID.shape)
    spread = np.linalg.norm(draws.std(0), axis=-1)
    mean = draws.mean(0)
    shown = ax.pcolormesh(GRID[..., 0], GRID[..., 1], spread, cmap="Greys", vmin=0.0, vmax=1.2, shading="gouraud")
    ax.plot(*paths.reshape(-1, 2).T, ",", color="tab:blue", alpha=0.6)
    ax.quiver(GRID[..., 0], GRID[..., 1], mean[..., 0], mean[..., 1], color="tab:red", width=0.004)
    ax.plot([-(2**0.5), 0, 2**0.5], [0, 0, 0], "k*", ms=9)
    ax.set(title=title, xlabel="x", ylabel="v")
    return shown


fig, ax = plt.subplots(figsize=(5.5, 3.8))
fig.colorbar(show(ax, posterior, both, "two wells seen"), label="sd of the drift")
fig.tight_layout()

# %% [markdown]
# White is known, dark is guessed. The stars are the true fixed points. Is the uncertainty honest? In the cells that the
# true paths visited, the error of the mean should be of the size of its standard deviation.

# %%
visited = both.truth["latents"].values.reshape(-1, 2)[::8]
drift, _ = to_truth(posterior, both)
draws = drift(visited)
x, v = visited.T
truth = np.stack([v, 2 * x - x**3 - 0.1 * v], -1)
error = draws.mean(0) - truth
print(f"drift error over its size: {np.sqrt((error**2).mean() / (truth**2).mean()):.2f}")
print(f"drift error over its own sd: {np.sqrt(((error / draws.std(0)) ** 2).mean()):.2f}")

# %% [markdown]
# A number a little above one is the price of a factorised posterior: path and drift are taken to be independent, and
# each is a little too sure of itself.
#
# ## Fixed points with error bars
#
# Every draw of the drift has its own fixed points; `evaluation.fixed_points` matches them to those of the mean field.

# %%
points = evaluation.fixed_points(posterior, draws=50)
for i in range(points.sizes["fixed_point"]):
    growth = points["eigenvalues_real"].values[:, i]
    print(
        f"in {100 * float(points['presence'][i]):.0f}% of draws, "
        f"fastest growth {np.nanmean(growth.max(-1)):.2f} +- {np.nanstd(growth.max(-1)):.2f} a second"
    )

# %% [markdown]
# ## One well alone
#
# Now all four trials start on the right, and most never leave. What does the model say of the left?

# %%
right = systems.duffing(bins=BINS, seen=120, bin_width=0.03, start="right", seed=1)
one_well = dyn.fit(model, right.recording, engine, seed=0)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
show(axes[0], posterior, both, "two wells seen")
fig.colorbar(show(axes[1], one_well, right, "one well seen"), ax=axes, label="sd of the drift")

# %% [markdown]
# The arrows on the left are drawn as boldly as ever: a mean field always has an opinion. One path strayed round the
# left well; inside of its loop nobody was, and the shade says so. A flow field shown without it is half a result.
#
# ## Exercise
#
# Give the model a drift that is linear, `drifts.Linear()`, and compare its bound with that of the Gaussian process
# (`json.loads(posterior.attrs["notes"])["elbo"]`). Which of the two recordings tells them apart, and why does the other
# one not?
