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
# # Which region drives which?
#
# You record from several regions at once, and their activity moves together. Does one drive the other? Do both drive
# each other? Or do they follow a third that you did not record? A correlation cannot tell, and a single number for each
# pair hides how little the data may say.
#
# `models.MultiRegionLDS` gives every region latents of its own. Each directed pair has an edge that is there or is not,
# $z_{rs} \in \{0, 1\}$:
#
# $$x^r_t = A_{rr} x^r_{t-1} + \sum_{s \ne r} z_{rs} A_{rs} x^s_{t-1} + \text{what all share} + \epsilon^r_t .$$
#
# What regions share has a place of its own in the model: slow global latents, innovations that come to several regions
# at once, an input locked to the time of the trial, and a level of the whole trial. Without it, each of these would
# look like an edge.
#
# In this tutorial you will
#
# 1. find a graph that you know, and see how sure one can be of it,
# 2. see what a common drive does to the answer,
# 3. ask the same of a real session, and see what must not be concluded.

# %%
# %matplotlib inline
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar that a notebook can do without

import pyrodyn as dyn
from pyrodyn import inference, models, plots, systems

torch.set_num_threads(1)

# %% [markdown]
# ## 1. A graph that you know
#
# Three regions with fifteen neurons each. The simulated circuit has a loop, and a global signal enters all regions.

# %%
system = systems.coupled_regions(regions=3, units=15, trials=8, bins=150, mean_count=0.6, coupling=0.35, seed=4)
recording, truth = system.recording, system.truth
recording

# %%
model = models.MultiRegionLDS(latent_dim=2, time_bumps=4)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", dyn.FitWarning)  # short chains, for a tutorial; R-hat is looked at below
    posterior = dyn.fit(model, recording, inference.Gibbs(draws=60, warmup=60, chains=2), seed=0)

# %% [markdown]
# `Gibbs` draws everything in turn: the latent paths, the edges, the couplings, the loadings. So presence is sampled
# like any other unknown, and its probability is the share of draws that have the edge. Of 120 draws a share of one says
# no more than that; the log odds, an average over what every draw says of each edge given the others, tell apart what
# all draws have.

# %%
graph = dyn.coupling_graph(posterior)
pairs = [(str(s), str(t)) for t in graph["target"].values for s in graph["source"].values if s != t]
table = pd.DataFrame(
    {
        "edge": [f"{s} → {t}" for s, t in pairs],
        "P(present)": [float(graph["probability"].sel(source=s, target=t)) for s, t in pairs],
        "log odds": [float(graph["log_odds"].sel(source=s, target=t)) for s, t in pairs],
        "really there": [bool(truth["adjacency"].sel(source=s, target=t)) for s, t in pairs],
        "strength": [float(graph["strength"].sel(source=s, target=t).mean()) for s, t in pairs],
        "true strength": [float(truth["strength"].sel(source=s, target=t)) for s, t in pairs],
    }
)
table.round(2)

# %% [markdown]
# The strength of an edge is a number without units: the block $A_{rs}$ between latents that were scaled to unit
# covariance. No change of latent coordinates alters it. The picture shows it with its uncertainty.

# %%
plots.plot_coupling_graph(graph)

# %%
plots.plot_strengths(graph)

# %% [markdown]
# A sign means nothing between latents of two dimensions. It is read where it does mean something: kick the activity of
# one region's neurons, and watch the rates of the other's.

# %%
plots.plot_impulse_responses(graph)

# %% [markdown]
# Questions are one line, and their answer is a probability:

# %%
(source, target) = pairs[int(table["P(present)"].to_numpy().argmax())]
print(f"P({source} drives {target} more than {target} drives {source}) =", end=" ")
print(f"{dyn.compare_edges(graph, (source, target), (target, source)):.2f}")
dyn.edges_into(graph, target).round(2)

# %% [markdown]
# ## 2. What imitates coupling
#
# Now no region drives another. A slow signal drives them all. We fit it twice: once with a global latent, once without.

# %%
common = systems.uncoupled_regions("slow", regions=3, units=15, trials=8, bins=150, mean_count=0.6, seed=1)
found = {}
for global_dim in (1, 0):
    alternative = models.MultiRegionLDS(
        latent_dim=2, time_bumps=4, global_dim=global_dim, trial_level=global_dim > 0, shared_innovations=global_dim
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        fit = dyn.fit(alternative, common.recording, inference.Gibbs(draws=60, warmup=60, chains=2), seed=0)
    probability = dyn.coupling_graph(fit)["probability"].values
    found[global_dim] = probability[~np.eye(len(probability), dtype=bool)]
    kind = "with" if global_dim else "without"
    print(f"{kind} what regions share: P(present) {np.round(np.sort(found[global_dim]), 2)}")

# %%
figure, axes = plt.subplots(figsize=(5, 2.4), layout="constrained")
for row, values in enumerate(found.values()):
    axes.plot(values, np.full(len(values), row), "o", alpha=0.6)
_ = axes.set(
    yticks=[0, 1], yticklabels=["shared terms", "none"], ylim=(-0.5, 1.5), xlim=(-0.05, 1.05),
    xlabel="P(present) of edges that do not exist",
)  # fmt: skip

# %% [markdown]
# A model without a place for the common signal has to explain it by edges. The edges then come out certain, and they
# are wrong. No interval warns of it: a posterior is honest only about what its model can say.
#
# ## 3. A real session
#
# Neurons of three regions of a mouse in the first .4 s after a stimulus (Steinmetz et al., Nature 576:266, 2019).

# %%
path = Path(os.environ.get("PYRODYN_DATA", "../shared/data")) / "steinmetz2019_multiregion" / "session1.npz"
if path.is_file():
    from pyrodyn.demo import spikes_recording

    whole = spikes_recording(path, units=50, trials=50, new_trials=0)
    regions = pd.Series(whole.region).value_counts().index[:3].tolist()
    real = whole.sel(region=regions)
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always", dyn.FitWarning)
        fitted = dyn.fit(
            models.MultiRegionLDS(2, time_bumps=5), real, inference.Gibbs(draws=80, warmup=80, chains=2), seed=0
        )
    print(real)
    for complaint in complaints:
        print("warning:", complaint.message)
    real_graph = dyn.coupling_graph(fitted)
    plots.plot_strengths(real_graph)
else:
    print(f"(no recording at {path}: set PYRODYN_DATA)")

# %% [markdown]
# The warning is part of the answer: R-hat far above one says that the two chains do not agree yet, so that the numbers
# above are a first look. Run more draws, and more chains, before you write any of them down.
#
# And even a converged posterior does not prove that one region acts on another. A region that was not recorded may
# drive both with different delays. In .4 s after a stimulus little is stationary, and the model's dynamics are. Edges
# here mean: given this model, the past of one region helps to predict the other beyond its own past and beyond what all
# share.
#
# ## Exercise
#
# How many trials are needed to find a weak edge? Simulate `systems.coupled_regions(coupling=0.1, ...)` with 4, 8 and 16
# trials, and draw the P(present) of the true edges against the number of trials. *Hint:* keep the seed, so that the
# circuit stays the same, and take `truth["adjacency"]` to pick the true edges.
