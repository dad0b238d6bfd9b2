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
# # Replay
#
# A rat has run along a track and now stands still. For a tenth of a second its hippocampus bursts, and cells may fire
# in the order of their places on the track: twenty times as fast, and sometimes backwards. Where is the rat then?
#
# `models.Replay` answers bin by bin, with two questions summed over at once: which *place* the population speaks of,
# and by which *dynamics* it goes on from there,
#
# - **stationary**: the place is held,
# - **continuous**: it walks, a little at a time,
# - **fragmented**: it jumps; the next place may be anywhere.
#
# In this tutorial you will
#
# 1. decode an event in which you planted all three, one after the other,
# 2. measure place fields in the runs of a real rat, and check them on runs that were held out,
# 3. decode what the rat's hippocampus does while the animal pauses,
# 4. ask whether that could be chance.

# %%
# %matplotlib inline
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter1d

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar that a notebook can do without
warnings.filterwarnings("ignore", message=".*silent")  # in single events most units are

import pyrodyn as dyn
from pyrodyn import models, readers
from pyrodyn.models.replay import CATEGORIES, DYNAMICS, ReplayParameters

torch.set_num_threads(1)

# %% [markdown]
# ## 1. An event that you know
#
# Nineteen cells have fields every 10 cm of a track of 180 cm. In 280 ms the place is held for 60 ms, sweeps over the
# track in 190 ms, and jumps about for 30 ms. In every bin of 2 ms the cell fires whose field lies at the place.

# %%
spacing = 3.0
places = np.arange(0.0, 181.0, spacing)
fields = 0.1 + 15.0 * np.exp(-0.5 * ((places - np.linspace(0, 180, 19)[:, None]) / 6.0) ** 2)

rng = np.random.default_rng(0)
cell = np.concatenate([np.zeros(30, int), np.linspace(0, 18, 95).round().astype(int), rng.integers(19, size=15)])
event = dyn.Recording.from_arrays(np.eye(19)[cell], bin_width=0.002, counts=True)


# %% [markdown]
# The parameters are known here: rates are those of running, the walk has a variance of 6 square centimetres a bin, and
# dynamics stay on with probability .98. (`dyn.fit` infers all of these, with a gain for every unit, where there are
# enough events.) `decode` gives the exact posterior of dynamics and place in every bin.


# %%
def known(units, walk):
    one = torch.ones(1, dtype=torch.float64)
    return ReplayParameters(one, one.new_ones(units), walk * one, 0.98 * one.new_ones(3))


def show(law, axes, extent):
    """Probabilities of dynamics, and of places, over time in milliseconds; ``law`` is (time, dynamics, position)."""
    time = 2.0 * np.arange(len(law))
    for name, share in zip(DYNAMICS, law.sum(-1).T, strict=True):
        axes[0].plot(time, share, label=name)
    axes[1].imshow(
        law.sum(1).T, origin="lower", aspect="auto", extent=(0, time[-1], *extent), cmap="magma", vmin=0, vmax=0.3
    )
    axes[1].set_xlabel("ms")


walk = np.sqrt(6.0 / 0.002)  # cm per root of a second
law = models.Replay(fields=fields, spacing=spacing, walk=walk).decode(known(19, walk), event)[0].numpy()

figure, axes = plt.subplots(2, 1, figsize=(7, 4.5), sharex=True)
show(law, axes, (0, 180))
for end in (60, 250):
    axes[0].axvline(end, color="k", ls=":")
axes[0].set(ylabel="probability", title="an event that is held, swept and jumping")
axes[0].legend(loc="center left", frameon=False)
axes[1].set_ylabel("place (cm)")
figure.tight_layout()

# %% [markdown]
# The three come out in order. At the changes the decoder hesitates for some bins, as it should: a single spike fits a
# walk as well as a jump.
#
# ## 2. A real rat
#
# Thirty-one units of a rat that runs to and fro on a linear track for a quarter of an hour (nelpy's example data). The
# camera sees pixels; the track is the axis along which the rat moves most, from 0 to 1. Without the recording
# (`PYRODYN_DATA` names the folder) simulated cells run on a simulated track.

# %%
file = Path(os.environ.get("PYRODYN_DATA", "../shared/data")) / "nelpy_hippocampus" / "linear-track.npz"
begin, end, width = 4430.0, 5370.0, 0.025
bins = int((end - begin) / width)
middle = begin + width * (np.arange(bins) + 0.5)
if file.exists():
    with np.load(file, allow_pickle=False) as held:
        spikes = [held["spike_times"][held["spike_unit"] == k] for k in range(31)]
        camera, first = np.unique(held["pos_t"], return_index=True)
        pixels = np.stack([held["pos_x"], held["pos_y"]], -1)[first].astype(float)
    inside = (camera > begin) & (camera < end)
    pixels -= pixels[inside].mean(0)
    along = pixels @ np.linalg.svd(pixels[inside], full_matrices=False)[2][0]
    low, high = np.quantile(along[inside], [0.005, 0.995])
    place = np.interp(middle, camera, gaussian_filter1d((along - low) / (high - low), 10.0))
else:
    print(f"there is no {file}: a simulated rat takes its place (set PYRODYN_DATA to the folder of recordings)")
    way = middle / 15.0 % 2
    place = np.clip(1.4 * np.minimum(way, 2 - way) - 0.2, 0, 1)
    rates = 15.0 * np.exp(-0.5 * ((place - np.linspace(0, 1, 31)[:, None]) / 0.06) ** 2)
    spikes = [np.sort(middle[np.repeat(np.arange(bins), n)]) for n in rng.poisson(rates * width)]
counts = np.stack([readers.count_spikes(times, np.array([begin]), bins, width)[0] for times in spikes], -1)

# %% [markdown]
# A pass is a stretch of 250 ms bins in which the rat keeps moving, over a third of the track or more.

# %%
speed = np.abs(np.gradient(gaussian_filter1d(place, 5), width)).reshape(-1, 10).mean(1)
coarse = place.reshape(-1, 10).mean(1)
edges = np.flatnonzero(np.diff(np.r_[0, (speed > 0.08).astype(int), 0])).reshape(-1, 2)
passes = [slice(a, b) for a, b in edges if abs(coarse[b - 1] - coarse[a]) > 0.3]
counts_coarse = counts.reshape(-1, 10, counts.shape[-1]).sum(1)
print(f"{len(passes)} passes, {sum(p.stop - p.start for p in passes) / 4:.0f} s in all")


# %% [markdown]
# `place_fields` turns positions and counts of a run into rates: smoothed counts over smoothed time, with a little of
# the unit's mean rate where the rat hardly was.


# %%
def fields_from(chosen):
    fine = np.concatenate([np.arange(10 * part.start, 10 * part.stop) for part in chosen])
    active = np.flatnonzero(counts[fine].sum(0) > 20)
    run = dyn.Recording.from_arrays(counts[fine][None][..., active], bin_width=width, counts=True)
    return active, models.place_fields(run, place[fine][None], np.linspace(0, 1, 33), prior=0.1, smoothing=1.0)


active, fields = fields_from(passes)
order = fields.argmax(1).argsort()
figure, axis = plt.subplots(figsize=(6, 4))
axis.imshow(fields[order] / fields[order].max(1, keepdims=True), aspect="auto", extent=(0, 1, len(active), 0))
axis.set(xlabel="place on the track", ylabel="unit, by its peak", title="place fields")
figure.tight_layout()

# %% [markdown]
# Are they any good? Learn them from four passes in five, and decode the fifth, with the animal's own pace as the walk.
# The decoder knows nothing of the place but what the spikes say.

# %%
errors, shown = [], []
for fold in range(5):
    units, learned = fields_from([part for i, part in enumerate(passes) if i % 5 != fold])
    model = models.Replay(fields=learned, spacing=1 / 32, walk=0.15)
    kept = passes[fold::5]
    held_out = dyn.Recording.from_arrays([counts_coarse[part][:, units] for part in kept], bin_width=0.25, counts=True)
    laws = model.decode(known(len(units), 0.15), held_out).sum(-2).numpy()
    for law, part in zip(laws, kept, strict=True):
        law = law[: part.stop - part.start]
        median = ((law.cumsum(-1) >= 0.5).argmax(-1) + 0.5) / 32
        errors.append(np.abs(median - coarse[part]))
        shown.append((law, coarse[part]))
print(f"median error: {np.median(np.concatenate(errors)):.3f} of the track")

# Passes in which the decoder does well, as in the middle, and badly, by their mean errors.
ranked = np.argsort([error.mean() for error in errors])
figure, axes = plt.subplots(1, 3, figsize=(11, 3), sharey=True)
for axis, share in zip(axes, (0.1, 0.5, 0.9), strict=True):
    law, path = shown[ranked[int(share * len(ranked))]]
    axis.imshow(law.T, origin="lower", aspect="auto", extent=(0, len(law) / 4, 0, 1), cmap="magma")
    axis.plot(0.125 + 0.25 * np.arange(len(path)), path, color="C0", label="the rat")
    axis.set(xlabel="s", title=f"passes with less error: {share:.0%}")
axes[0].set_ylabel("place on the track")
axes[0].legend()
figure.tight_layout()

# %% [markdown]
# ## 3. What happens in pauses
#
# Bursts of the population while the rat stands: the summed rate is three standard deviations above its mean, for 50 to
# 500 ms, and five units or more take part. Units that fire fast all the time are left out where bursts are looked for.

# %%
millisecond = np.stack(
    [readers.count_spikes(spikes[k], np.array([begin]), int((end - begin) * 1000), 0.001)[0] for k in active], -1
)
slow = millisecond.mean(0) < 0.004
rate = gaussian_filter1d(millisecond[:, slow].sum(1).astype(float), 15.0)
above = np.flatnonzero(np.diff(np.r_[0, (rate > rate.mean()).astype(int), 0])).reshape(-1, 2)
bursts = [
    millisecond[a : b - (b - a) % 2].reshape((b - a) // 2, 2, -1).sum(1)
    for a, b in above
    if rate[a:b].max() > rate.mean() + 3 * rate.std()
    and 50 <= b - a <= 500
    and (millisecond[a:b, slow].sum(0) > 0).sum() >= 5
    and speed[min(a // 250, len(speed) - 1)] < 0.08
]
events = dyn.Recording.from_arrays(bursts, bin_width=0.002, counts=True)
events

# %% [markdown]
# Rates in bursts differ from those of running. Each unit's field is scaled to how often it fires in the bursts; a fit
# would infer these gains.

# %%
pace = np.sqrt(6.0 / 0.002) / 180.0  # as if the track were 180 cm long


def decode(fields):
    """Posterior (event, time, dynamics, position), the model, and its parameters."""
    seconds = events.lengths.sum() * events.bin_width
    gain = (events.values.numpy().sum((0, 1)) + 1) / (fields.mean(1) * seconds + 1)
    model, parameters = models.Replay(fields=fields * gain[:, None], spacing=1 / 32, walk=pace), known(len(gain), pace)
    return model.decode(parameters, events).numpy(), model, parameters


laws, model, parameters = decode(fields)
within = np.arange(events.num_bins) < events.lengths[:, None]
category = np.where(within, models.replay_categories(laws.sum(-1)), -1)
moved = np.array([
    np.ptp((law[:n].sum(1) * (np.arange(32) + 0.5) / 32).sum(-1)) for law, n in zip(laws, events.lengths, strict=True)
])  # fmt: skip
coherent = np.array([law[:n, :2].sum((1, 2)).mean() for law, n in zip(laws, events.lengths, strict=True)])
print(f"{events.num_trials} events, {(moved > 0.3).sum()} of which move over a third of the track")

# %% [markdown]
# Most events hold a place, or say little. Of those in which the place is held or walks with a mean probability of .8,
# these three move furthest:

# %%
chosen = np.argsort(-moved * (coherent > 0.8))[:3]
figure, axes = plt.subplots(2, 3, figsize=(11, 4.5), sharex="col")
for column, number in enumerate(chosen):
    show(laws[number, : events.lengths[number]], axes[:, column], (0, 1))
    axes[0, column].set_title(f"event {number}")
axes[0, 0].set_ylabel("probability")
axes[1, 0].set_ylabel("place on the track")
axes[0, 2].legend(frameon=False, fontsize=8)
figure.tight_layout()

# %% [markdown]
# Over all events: one belongs to a category where its dynamics, or two neighbours together, reach .8 in some bin.

# %%
pd.Series({name: float((category == k).any(1).mean()) for k, name in enumerate(CATEGORIES)}, name="events").round(2)

# %% [markdown]
# ## 4. Could it be chance?
#
# A decoder always answers. The test is a world without the bond between spikes and places, in which all else is as it
# was: turn every unit's field round the track by a distance of its own. Bursts of single units stay as coherent as they
# are; that cells with *neighbouring* fields fire together does not. What to compare is the evidence of all events.


# %%
def evidence(model, parameters):
    with torch.no_grad():
        return float(model.evidence(parameters, events, events.values).sum())


shuffles = []
for _ in range(20):
    turned = np.stack([np.roll(field, rng.integers(1, 32)) for field in fields])
    law, *shuffled = decode(turned)
    belongs = np.where(within, models.replay_categories(law.sum(-1)), -1)
    shuffles.append((evidence(*shuffled), np.isin(belongs, [0, 1, 2]).any(1).mean()))
shuffles = np.array(shuffles)

figure, axis = plt.subplots(figsize=(6, 3))
axis.hist(shuffles[:, 0] / events.num_trials, bins=8, color="0.7", label="fields turned")
axis.axvline(evidence(model, parameters) / events.num_trials, color="C3", label="as recorded")
axis.locator_params(axis="x", nbins=5)
axis.set(xlabel="log evidence an event (nats)", ylabel="shuffles")
axis.legend(frameon=False)
figure.tight_layout()
print(f"coherent events: {np.isin(category, [0, 1, 2]).any(1).mean():.2f}, fields turned {shuffles[:, 1].mean():.2f}")

# %% [markdown]
# No shuffle comes near. But look at the second number: under turned fields, too, many events look coherent by their
# categories alone, for a burst of one cell is a place that is held. A share of coherent events says little without the
# share to compare it with.
#
# ## Exercise
#
# After 5390 s the rat rests, off the track. Decode the bursts of that quarter of an hour. Are they as coherent? Then
# reorder the bins within each event, in place of turning fields: what does that shuffle test, and what does it miss?
