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
# # Structure and function
#
# Anatomy says which regions are wired to which. Activity says which regions help to predict which others. Neither
# implies the other: a tract may be idle in your experiment, and two regions may follow a third. So a connectome should
# be neither ignored nor believed. As a *prior* over edges it is weighed against the activity, edge by edge:
#
# $$\frac{P(z_{rs} = 1 \mid y)}{P(z_{rs} = 0 \mid y)} = \underbrace{\frac{\pi_{rs}}{1 - \pi_{rs}}}_{\text{connectome}}
# \times \underbrace{\frac{p(y \mid z_{rs} = 1)}{p(y \mid z_{rs} = 0)}}_{\text{activity}} .$$
#
# In this tutorial you will
#
# 1. look at the activity of ten brain regions of a larval zebrafish, and at what is known of their wiring,
# 2. give the connectome to `models.MultiRegionLDS` as a prior, beside a prior that knows nothing and one that is wrong,
# 3. ask whether activity alone finds the wiring, and whether the wiring helps to predict new activity.

# %%
# %matplotlib inline
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
import torch

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar that a notebook can do without

import pyrodyn as dyn
from pyrodyn import comparison, inference, models, plots, readouts

torch.set_num_threads(1)
folder = Path(os.environ.get("PYRODYN_DATA", "../shared/data")) / "zebrafish_regions"
if not folder.is_dir():
    raise SystemExit(f"no recording at {folder}: set PYRODYN_DATA")

# %% [markdown]
# ## 1. Two kinds of data
#
# Légaré et al. (Science Advances 11: eadv7576, 2025) imaged calcium across the brains of larval zebrafish and averaged
# it over the 70 regions of an atlas; the connectome comes from single neurons that were traced in other fish. The data
# are theirs (doi:10.5683/SP3/IIVGOB, CC BY 4.0). We take ten regions on the way from the eye to the tail, with two
# bystanders in the forebrain. The file does not give the frame rate: we count time in frames.

# %%
activity, connectome = (np.load(folder / f"{name}.npy") for name in ("timeseries_regions_fish6", "SC"))
names = np.load(folder / "region_acronyms.npy").astype(str).tolist()
known = {
    "DT": "pallium", "DH": "dorsal habenula", "DTP": "dorsal thalamus", "PTAP": "pretectum", "PVL": "tectum",
    "NI": "nucleus isthmi", "Cb": "cerebellum", "NMLF": "midbrain motor", "SVMOR": "upper hindbrain",
    "IntVMOR": "middle hindbrain",
}  # fmt: skip
regions = list(known)
chosen = [names.index(name) for name in regions]

# %%
figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
scaled = (activity[chosen] - activity[chosen].mean(1, keepdims=True)) / activity[chosen].std(1, keepdims=True)
for row, (trace, name) in enumerate(zip(scaled, regions, strict=True)):
    axes.plot(trace - 5.0 * row, color="black", linewidth=0.6)
    axes.annotate(f"{name}, {known[name]}", (1.01, -5.0 * row), xycoords=("axes fraction", "data"), fontsize=8)
_ = axes.set(xlabel="frame", yticks=[], xlim=(0, activity.shape[1]))

# %% [markdown]
# Two things are seen at once. From frame 650 on tectum, pretectum and thalamus go up and down together, as under a
# periodic visual stimulus; and now and then midbrain, cerebellum and hindbrain flash together, as when a fish swims.
# Neither is in the file as an input. A common cause that is not recorded is what the model's shared latents and
# innovations are for, and what an edge may still be mistaken for.
#
# Now the wiring. A matrix of weights does not say by itself whether its rows are the sources or its columns. Anatomy
# does: axons of the lateral-line ganglia run into the brain and none run back, and the inferior olive projects to the
# cerebellum.

# %%
weights = pd.DataFrame(connectome, index=names, columns=names)
print("weights in the columns of the lateral-line ganglia:", (weights[["ALLG", "PLLG"]] > 0).sum().tolist())
print("weights in their rows:                             ", (weights.loc[["ALLG", "PLLG"]] > 0).sum(axis=1).tolist())
print("rows with a weight in the column of the olive:     ", weights.index[weights["IO"] > 0].tolist())

# %% [markdown]
# So columns are sources and rows are targets, as in pyrodyn. (The first thing to go wrong with a connectome is its
# transpose, and nothing complains.) Between our ten regions:

# %%
wired = weights.loc[regions, regions].to_numpy()
off = ~np.eye(len(regions), dtype=bool)
there = wired > 0
print(f"{there[off].sum()} of {off.sum()} directed pairs are wired, {(there & there.T)[off].sum()} of them both ways")


def show(axes, values, title, limit=1.0):
    """A matrix (target, source)."""
    image = axes.imshow(np.where(off, values, np.nan), vmin=0, vmax=limit, cmap="viridis")
    axes.set_xticks(range(len(regions)), regions, rotation=90, fontsize=7)
    axes.set_yticks(range(len(regions)), regions, fontsize=7)
    axes.set_title(title, fontsize=9)
    return image


figure, axes = plt.subplots(figsize=(4.2, 3.6), layout="constrained")
image = show(axes, wired, "connectome")
axes.set(xlabel="from", ylabel="to")
_ = figure.colorbar(image, label="weight")

# %% [markdown]
# ## 2. The connectome as a prior
#
# `edges` takes a `networkx.DiGraph`; the attribute `probability` of an edge is its prior probability. An edge that is
# not in the graph cannot exist. We do not go so far: tracing misses axons, and here "edge" means that one region's past
# helps to predict the other, for which a detour through a region that we left out will do. So unwired pairs get .1, and
# wired ones more, the heavier the more: up to .9.
#
# To see what the connectome is worth it needs rivals. *Flat* expects as many edges, and knows nothing of where.
# *Shuffled* is the connectome with its regions renamed: as many edges, as uneven, in the wrong places.

# %%
probability = 0.1 + 0.8 * wired
renamed = np.random.default_rng(0).permutation(len(regions))
priors = {
    "connectome": probability,
    "flat": np.full_like(probability, probability[off].mean()),
    "shuffled": probability[np.ix_(renamed, renamed)],
}


def as_graph(probability):
    """A graph whose edges know how probable they are."""
    graph = nx.DiGraph()
    for r, target in enumerate(regions):
        for s, source in enumerate(regions):
            if r != s:
                graph.add_edge(source, target, probability=float(probability[r, s]))
    return graph


print(f"expected edges: {probability[off].sum():.0f} of {int(off.sum())}")
as_graph(probability).edges["PTAP", "NMLF"]

# %% [markdown]
# One latent for each region, since each has one trace. The recording is cut into blocks of 44 frames, which take the
# place of trials; every third block is hidden from the fits, to be predicted later.

# %%
length = 44
blocks = activity.shape[1] // length
values = activity[chosen, : blocks * length].T.reshape(blocks, length, len(regions))
recording = dyn.Recording.from_arrays(
    values, bin_width=1.0, unit=regions, region=regions, counts=False, session="zebrafish"
)
hidden = recording.trial[1::3]
seen = recording.hide(trial=hidden)
seen

# %%
engine = inference.Gibbs(draws=150, warmup=100, chains=2)
candidates = {
    name: models.MultiRegionLDS(1, edges=as_graph(prior), time_bumps=0, readout=readouts.Gaussian())
    for name, prior in priors.items()
}
candidates["no edges"] = models.MultiRegionLDS(1, edges=(), time_bumps=0, readout=readouts.Gaussian())
fits = {}
with warnings.catch_warnings(record=True) as complaints:
    warnings.simplefilter("always", dyn.FitWarning)
    for name, model in candidates.items():
        fits[name] = dyn.fit(model, seen, engine, seed=0)
for complaint in complaints:
    print("warning:", complaint.message)

# %% [markdown]
# The warnings say that two short chains do not agree on everything. Of all quantities the offsets are the slowest here:
# a block's level and the offset of a trace are hard to tell apart. How far the edges are affected can be looked at: the
# probability of every edge, one chain against the other.

# %%
graphs = {name: dyn.coupling_graph(fit) for name, fit in fits.items()}
figure, axes = plt.subplots(1, 3, figsize=(8, 2.9), layout="constrained", sharey=True)
for panel, name in zip(axes, priors, strict=True):
    one, other = graphs[name]["presence"].mean("draw").values[:, off]
    panel.plot(one, other, "o", markersize=3, alpha=0.5)
    panel.set(title=name, xlabel="P(present), chain 1", aspect="equal")
    apart = np.abs(one - other)
    print(f"{name:>10}: chains differ by {apart.mean():.2f} in the mean, by {apart.max():.2f} at most")
_ = axes[0].set_ylabel("chain 2")

# %% [markdown]
# ## 3. What came out

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained", sharey=True)
show(axes[0], wired, "connectome: weight")
for panel, name in zip(axes[1:], priors, strict=True):
    image = show(panel, graphs[name]["probability"].values, f"prior {name}: P(present)")
_ = figure.colorbar(image, ax=axes)

# %% [markdown]
# Points far from the diagonal are edges of which these runs say nothing yet. Some edges are there whatever the prior,
# and some pairs are apart whatever the prior: there the activity has spoken. The rest follows the prior, and that is
# what "the data say little" looks like.

# %%
table = pd.DataFrame(
    [
        (f"{source} → {target}", wired[r, s], *(float(graphs[name]["probability"][r, s]) for name in priors))
        for r, target in enumerate(regions)
        for s, source in enumerate(regions)
        if r != s
    ],
    columns=["edge", "weight", *(f"P, {name}" for name in priors)],
).set_index("edge")
table.assign(least=table.iloc[:, 1:].min(axis=1)).sort_values("least", ascending=False).head(10).round(2)

# %% [markdown]
# **Does activity alone find the wiring?** The fit with the flat prior has never seen it. If its probabilities were
# higher for wired pairs, a pair drawn among these would beat one drawn among the others more often than in half of the
# cases (the area under the ROC curve). Chance is what renaming the regions gives.


# %%
def auroc(score, truth):
    """Probability that a pair with an edge has the higher score; ties count half."""
    there, absent = score[truth], score[~truth]
    return float((there[:, None] > absent).mean() + 0.5 * (there[:, None] == absent).mean())


found = graphs["flat"]["probability"].values
rng = np.random.default_rng(1)
chance = []
for _ in range(2000):
    order = rng.permutation(len(regions))
    chance.append(auroc(found[np.ix_(order, order)][off], wired[off] > 0))
area = auroc(found[off], wired[off] > 0)
print(f"area {area:.2f}; with regions renamed {np.mean(chance):.2f} ± {np.std(chance):.2f}; ", end="")
print(f"{np.mean(np.array(chance) >= area):.3f} of them are as high")
rest = off & ~np.isin(regions, ["DT", "DH"]) & ~np.isin(regions, ["DT", "DH"])[:, None]
print(f"without pallium and habenula: {there[rest].sum()} of {rest.sum()} pairs are wired")

# %% [markdown]
# Higher than chance, then. But see what it rests on: pallium and habenula are apart from the rest in both, and among
# the others nearly all pairs are wired, so that there is next to nothing to tell apart.
#
# **Does the wiring help to predict?** Every candidate is scored by the log density of the hidden blocks, parameters and
# paths integrated out, and compared with the best, block by block.

# %%
scores = dyn.compare(fits, recording, comparison.HeldOutEntries())
comparison.as_table(scores)[["elpd", "difference", "dse"]].round(1)

# %%
figure, axes = plt.subplots(figsize=(5.5, 2.4), layout="constrained")
against = scores["pointwise"].sel(trial=hidden)
gain = (against - against.sel(model="flat")).drop_sel(model="flat")
for row, name in enumerate(gain["model"].values):
    each = gain.sel(model=name).values
    axes.plot(each, np.full(len(each), row), "o", color="grey", markersize=3, alpha=0.6)
    axes.errorbar(each.mean(), row, xerr=each.std(ddof=1) / len(each) ** 0.5, fmt="s", color="black", capsize=3)
axes.axvline(0.0, color="black", linewidth=0.8)
_ = axes.set(
    yticks=range(gain.sizes["model"]), yticklabels=gain["model"].values, ylim=(-0.6, gain.sizes["model"] - 0.4),
    xlabel="nats a hidden block, less those of the flat prior",
)  # fmt: skip

# %% [markdown]
# Dots are blocks; squares their mean, with its standard error. Read it as it stands. Edges predict new activity:
# without any, most blocks are less probable. But the connectome's prior predicts no better than the flat one, as far as
# these few blocks can tell, and the shuffled one not much worse. With so many frames the likelihood outweighs most of a
# prior: it overrules a wiring that is wrong, and has little need of one that is right.
#
# The graph, under the connectome's prior:

# %%
plots.plot_coupling_graph(graphs["connectome"])

# %% [markdown]
# ## What this does not say
#
# - *An edge is not a synapse.* It says that the past of one region's trace helps to predict another's, beyond that
#   one's own past and beyond what all share. What passes between regions faster than a frame is no edge but a shared
#   innovation; and fluorescence that decays over several frames smears who came first.
# - *The stimulus is a common cause.* From frame 650 on something drives tectum, pretectum and thalamus together. If its
#   times were in the file they would be `inputs` of the recording. Edges among these three deserve the least trust.
# - *Sixty regions are missing.* A region that was left out may drive two that were not.
# - *One fish*, and a connectome of others.
#
# ## Exercise
#
# How much activity is a connectome worth? Let the fits see every fourth block only, `recording.hide(trial=...)`, and
# compare the priors again. Then add the most tempting mistake as a rival: the connectome turned round, `probability.T`.
# *Hint:* nothing but `hidden` and `priors` has to change.
