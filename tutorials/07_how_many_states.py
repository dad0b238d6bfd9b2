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
# # How many states?
#
# A hidden Markov model cuts neural activity into states. It cuts it into as many as you ask for. Papers report that
# cortex has five, or twelve, or twenty of them. Where does the number come from?
#
# There are two ways to let data have a say. One fits models with 1, 2, 3, ... states and compares how well each
# predicts trials that it has not seen. The other fits one model with too many states, and a prior that lets the idle
# ones die. And there is a third possibility, that the question has no answer: what varies is not discrete at all.
#
# In this tutorial you will
#
# 1. compare numbers of states where you know the answer,
# 2. see a sticky Dirichlet prior empty the states that are not needed,
# 3. ask the same of head-direction cells, whose states are not states.

# %%
# %matplotlib inline
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.io
import torch
from IPython.display import display

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar that a notebook can do without

import pyrodyn as dyn
from pyrodyn import comparison, inference, models, plots, systems

torch.set_num_threads(1)
warnings.simplefilter("ignore", dyn.FitWarning)  # short fits, for a tutorial; what they are worth is looked at below

# %% [markdown]
# ## 1. Where you know the answer
#
# Three states, eight neurons, 12 trials of 60 bins. Each state has its own rates, and lasts for ten bins or so.

# %%
like = dyn.Recording.from_arrays(np.ones((12, 60, 8)), bin_width=0.05)
stay = 0.85 * torch.eye(3).double() + 0.05
recording, truth = dyn.simulate(models.HMM(3), like, seed=1, values={"transition": stay, "offset": 0.5 * torch.ones(8)})

# %% [markdown]
# `select` fits every number, leaves thirds of the trials out, fits again, and scores the trials left out. Modes are
# summed out exactly, in the fit as in the score.

# %%
numbers = {"num_modes": [1, 2, 3, 4, 5]}
engine, folds = inference.Laplace(draws=200), comparison.KFold(3)
table = dyn.select(models.HMM, numbers, recording, engine, method=folds, seed=0)
comparison.as_table(table)[["elpd", "difference", "dse", "weight_stacking"]].round(2)

# %%
plots.comparison(table)

# %% [markdown]
# Too few states lose much, too many lose little: a state that is not needed costs only what its parameters add in
# noise. So look at the `difference` beside its standard error `dse`, and take the smallest number that is not clearly
# worse than the best, by two standard errors:

# %%
comparison.fewest(table, "num_modes")

# %% [markdown]
# The states of the chosen model, beside those that made the data (numbers are arbitrary, colours need not agree):

# %%
chosen = dyn.fit(models.HMM(3), recording, engine, seed=0)
plots.mode_raster(chosen)

# %%
figure, axis = plt.subplots(figsize=(5.6, 2.2))
colours = np.array([plt.matplotlib.colors.to_rgb(c) for c in plots.panels.COLOURS])
axis.imshow(colours[truth["mode_path"].values], aspect="auto", interpolation="none", extent=(0, 3, 12, 0))
axis.set(xlabel="time (s)", ylabel="trial", title="the states that made the data")
figure.tight_layout()

# %% [markdown]
# ## 2. A prior that lets states die
#
# The second way is one fit. Rows of the transition matrix have a Dirichlet prior,
#
# $$P_j \sim \mathrm{Dir}(\alpha, \ldots, \alpha + \kappa, \ldots, \alpha),$$
#
# with $\kappa$ on the diagonal: states are sticky. With $\alpha$ well below 1 most ways out of a state are improbable,
# and states to which no way leads stay empty. (The limit of infinitely many states is the hierarchical Dirichlet
# process of Fox et al., 2011.)
#
# Here a point in the plane turns at three speeds, about three centres. We give the model eight states.

# %%
turning = systems.switching_rotations(modes=3, bins=1200, dwell=60.0, process_sd=0.15, seed=0)
plane = dyn.Recording.from_arrays(turning.truth["latents"].values, bin_width=0.02, counts=False, unit=["x", "y"])
sticky = models.ARHMM(num_modes=8, concentration=0.05, stickiness=20.0)
eight = dyn.fit(sticky, plane, inference.Gibbs(draws=150, warmup=250, chains=4), seed=0)
plots.mode_raster(eight, window=(0.0, 12.0))

# %% [markdown]
# How many states hold more than one bin in a hundred, in each draw of the posterior?


# %%
def used(posterior):
    """Probability of each number of states that hold more than 1% of the bins."""
    paths = posterior["latents"]["mode_path_draws"].values
    modes = posterior["latents"].sizes["mode"]
    share = np.stack([np.bincount(path.ravel(), minlength=modes) for path in paths]) / paths[0].size
    return pd.Series((share > 0.01).sum(-1)).value_counts(normalize=True).sort_index()


flat = models.ARHMM(num_modes=8, concentration=1.0, stickiness=20.0)
loose = dyn.fit(flat, plane, inference.Gibbs(draws=150, warmup=250, chains=4), seed=0)
pd.DataFrame({"concentration .05": used(eight), "concentration 1": used(loose)}).fillna(0.0)

# %%
plots.mode_flows(eight, window=(0.0, 12.0))

# %% [markdown]
# Five of the eight are empty, under either prior: here the data speak so clearly that a small $\alpha$ is not needed.
# The flow of an empty state is the prior's; its arrows are pale because draws do not agree on them.
#
# Do not take such a count for more than it is. The prior prefers few states, it does not test their number. And two
# halves of one state stay apart for long, since merging them takes a move that blocked Gibbs sampling seldom makes.
# Hold the number against a comparison.
#
# ## 3. Where states are not states
#
# Nineteen head-direction cells of a mouse that runs about (Peyrache et al., 2015). Each cell fires when the head points
# its way. The head turns smoothly: there are no states. Ask for their number all the same.

# %%
path = Path(os.environ.get("PYRODYN_DATA", "../shared/data")) / "peyrache_hd_states" / "DataHDCells_RunSleep.mat"
if path.is_file():
    counts = scipy.io.loadmat(path)["Qrun"][:30_000].astype(float)  # bins of 10 ms
    coarse = counts.reshape(-1, 10, counts.shape[1]).sum(1)  # of 100 ms
    heads = dyn.Recording.from_arrays(coarse.reshape(30, 100, -1), bin_width=0.1, session="head direction")
    found = dyn.select(models.HMM, {"num_modes": [1, 2, 4, 6, 8]}, heads, inference.Laplace(draws=100), method=folds)
    print(comparison.as_table(found)[["elpd", "difference", "dse", "weight_stacking"]].round(1))
else:
    print(f"(no recording at {path}: set PYRODYN_DATA)")

# %% [markdown]
# More is better, as far as you care to go, and by more than a thousand nats. No number is right, because each cuts a
# circle into arcs, and finer arcs predict better. What gives it away is which state follows which:

# %%
if path.is_file():
    ring = dyn.fit(models.HMM(8), heads, inference.Laplace(draws=100), seed=0)
    figure = plots.transition_graph(ring)
    display(figure)

# %% [markdown]
# Each state leads to two others, about half and half. Go from each to the commonest next one that has not been seen:

# %%
if path.is_file():
    ways = ring["posterior"]["transition"].mean(("chain", "draw")).values
    order = [0]
    while len(order) < 8:
        order.append(max(set(range(8)) - set(order), key=lambda k: ways[order[-1], k]))
    print(" - ".join(map(str, [*order, 0])))
    print("and from the last back to the first:", f"{ways[order[-1], 0] / (1.0 - ways[order[-1], order[-1]]):.2f}")

# %% [markdown]
# The states are a ring. A comparison told that eight are better than four, and was right. That they are arcs of a
# circle, it did not tell: none of the models it was given knows of circles.
#
# ## Exercise
#
# Do the same asleep: `Qsws` in place of `Qrun`. In slow-wave sleep all cells fall silent together, again and again.
# Which number of states finds that, and what is the first thing a second state is used for?
