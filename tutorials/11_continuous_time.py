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
# # Continuous time and irregular sampling
#
# A microscope drops frames. An electrode is blanked while a stimulator fires. Two cameras do not keep step. What comes
# out has bins at odd times, and units that are missing each at times of its own. The usual repair is to interpolate and
# then pretend that nothing happened; it invents data, and tells no one how sure it is of them.
#
# The brain moved on while nobody looked. A model in **continuous time** says how: between any two moments, however far
# apart, it knows where the hidden state may have gone,
#
# $$dx = A x\,dt + L\,dW \quad\Rightarrow\quad
# x(t + \Delta) = e^{A\Delta} x(t) + \epsilon, \qquad \epsilon \sim N(0, I - e^{A\Delta} e^{A^\top\Delta}),$$
#
# so that a long gap is a long step and not a problem. In this tutorial you will
#
# 1. see that this is exact, against a Gaussian process written out in full,
# 2. throw away seven bins of ten from spikes of a chaotic system, and count what it costs,
# 3. do the same to each unit at times of its own,
# 4. look at what the model says about bins in which it saw nothing.

# %%
# %matplotlib inline
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import multivariate_normal

import pyrodyn as dyn
from pyrodyn import evaluation, inference, models, readouts, systems
from pyrodyn.inference import collapse
from pyrodyn.program import globals_given

warnings.simplefilter("ignore", dyn.FitWarning)  # short runs

# %% [markdown]
# ## Exact, at any times
#
# With one latent the model is the Ornstein-Uhlenbeck process: a Gaussian process with the kernel
# $k(t, s) = e^{-|t - s| / \tau}$. Forty moments drawn at random, one noisy channel, $\tau$ half a second. The model
# goes from moment to moment; the Gaussian process inverts one matrix of all of them.

# %%
rng = np.random.default_rng(0)
times = np.sort(rng.uniform(0.0, 5.0, 40))
tau, loading, noise = 0.5, 1.3, 0.4
kernel = np.exp(-np.abs(times[:, None] - times) / tau)
signal = multivariate_normal(np.zeros(40), kernel).rvs(random_state=1)
channel = loading * signal + noise * rng.normal(size=40)
ou = dyn.Recording.from_arrays(channel[None, :, None], time=times, counts=False, center=np.zeros(1), scale=np.ones(1))

model = models.LinearSDE(1, readouts.Gaussian(), time_constant=tau)
given = {"relaxation": [[1.0]], "weights": [[loading]], "offset": [0.0], "noise_sd": [noise]}
parameters = globals_given(model, {name: torch.tensor(value, dtype=torch.float64) for name, value in given.items()}, ou)
path = collapse(model).path_posterior(parameters, ou)

total = loading**2 * kernel + noise**2 * np.eye(40)
gain = loading * kernel @ np.linalg.inv(total)
mean, covariance = gain @ channel, kernel - loading * gain @ kernel
off_mean = np.abs(path.mean[0, :, 0].numpy() - mean).max()
off_variance = np.abs(path.variance[0, :, 0].numpy() - covariance.diagonal()).max()
print(f"largest difference of means {off_mean:.1e}, of variances {off_variance:.1e}")
assert max(off_mean, off_variance) < 1e-8

# %% [markdown]
# The same number by two ways, and the first costs as many steps as there are moments, not their cube.
#
# ## Seven bins of ten thrown away
#
# Now counts of twenty units, driven by the Lorenz attractor in windows of seventy bins. We keep everything, then three
# bins of ten, then one of ten. A linear model is the wrong model of a strange attractor; but it only has to bridge
# gaps. The score asks how well the true state can be read off the inferred one, and the other way round.

# %%
lorenz = systems.lorenz(trials=60, units=20, seed=1)
whole, truth = lorenz.recording, lorenz.truth["latents"].values
bins, units = whole.values.shape[:2], whole.values.shape
rng = np.random.default_rng(0)
recordings = {
    "all bins": whole,
    "30% of bins": whole.hide(mask=rng.random(bins) >= 0.3),
    "30%, each unit by itself": whole.hide(mask=rng.random(units) >= 0.3),
    "10% of bins": whole.hide(mask=rng.random(bins) >= 0.1),
}
engine = inference.Laplace(draws=50, max_steps=60)
fits, scores = {}, {}
for name, recording in recordings.items():
    fits[name] = dyn.fit(models.LinearSDE(3), recording, engine, seed=0)
    scores[name] = evaluation.latent_r2(truth, fits[name]["latents"]["mean"].values)
    print(f"{name:25s} truth from fit {scores[name][0]:.3f}, fit from truth {scores[name][1]:.3f}")

# %% [markdown]
# Seven bins of ten cost less than .05 in either direction. If each unit misses bins of its own it costs less still,
# since there is hardly a moment of which nothing is known. One bin of ten is another matter: gaps are then as long as
# the system remembers.

# %%
for name in ("30% of bins", "30%, each unit by itself"):
    cost = [full - part for full, part in zip(scores["all bins"], scores[name], strict=True)]
    print(f"{name}: costs {cost[0]:.3f} and {cost[1]:.3f}")
    assert max(cost) <= 0.05

# %% [markdown]
# ## Honest about gaps
#
# Interpolation hands over a line. A posterior hands over a band: narrow where a bin was seen, wide in the middle of a
# gap. Here is the rate of one unit in one trial, with three bins of ten; dots are counts that the model saw, the dashed
# line is the truth.

# %%
name, trial = "30% of bins", 0
prediction = dyn.predict(fits[name], recordings[name].isel(trial=[trial]), draws=50)
true_rates = lorenz.truth["rates"].values[trial]
unit = int(true_rates.var(0).argmax())
seen = recordings[name].mask[trial, :, unit].numpy()
fig, ax = plt.subplots(figsize=(7, 2.6))
time = whole.time + 0.5 * whole.bin_width
lower, middle, upper = (prediction[f"expected{end}"].values[0, :, unit] for end in ("_lower", "", "_upper"))
ax.fill_between(time, lower, upper, alpha=0.3, lw=0, label="90% of the expected count")
ax.plot(time, middle, lw=1.2, label="expected")
ax.plot(time, true_rates[:, unit], "k--", lw=0.8, label="truth")
ax.plot(time[seen], whole.values[trial, seen, unit], ".", ms=4, color="C3", label="seen")
ax.set(xlabel="time (s)", ylabel=f"counts a bin, unit {unit}")
ax.legend(loc="upper right", fontsize=7)
fig.tight_layout()

# %%
width = np.log(prediction["expected_upper"].values / prediction["expected_lower"].values)[0].mean(-1)
gap = np.abs(np.arange(whole.num_bins)[:, None] - np.flatnonzero(seen)).min(1)
for distance in range(4):
    print(f"{distance} bins from the next that was seen: log width of the 90% band {width[gap == distance].mean():.2f}")

# %% [markdown]
# ## Exercise
#
# Rebin the recording with three bins of ten into bins three times as long, fill those that are still empty by
# interpolation, fit `models.LDS(3)` to them, and compare its `latent_r2` with the one above. Then count how many of the
# true rates lie within its 90% bands. Which of the two repairs was the more expensive lie?
