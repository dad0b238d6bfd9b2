"""Real spikes: linear, switching, recurrent and continuous-time dynamics beside each other.

Run `python benchmarks/compare_dynamics.py --table docs/tables/dynamics.md` with PYRODYN_DATA set, on one core. Every
model is fitted to the same trials and asked for units that are hidden in others, and for what the animal did in them:
which target, which side of the screen, or the velocity of the hand, decoded from the rates that the other units tell.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _real import LAG, REAL, Real
from _tables import write
from scipy.ndimage import gaussian_filter1d
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pyrodyn as dyn
from pyrodyn import drifts, guides, inference, models
from pyrodyn.evaluation import velocity_r2
from pyrodyn.scoring import bits_per_spike_over_trials

AMORTISED = inference.SVI(steps=400, learning_rate=0.012, particles=1, guide=guides.Amortised(hidden_dim=24))
BEST = "LDS, 10 latents"  # to which all others are compared
FITS: dict[str, tuple[Any, Any]] = {
    "LDS, 4 latents": (models.LDS(4), inference.Laplace(draws=100, max_steps=100)),
    BEST: (models.LDS(10), inference.SVI(steps=60, particles=1, draws=20, guide=guides.LowRank())),
    "switching LDS, 2 modes of 4 latents": (models.SwitchingLDS(2, 4), inference.Gibbs(draws=20, warmup=40, chains=1)),
    "LatentRNN, 10 gated units": (models.LatentRNN(10), AMORTISED),
    "LFADS, 10 factors": (
        models.LFADS(10, generator_dim=64, initial_dim=16),
        inference.SVI(steps=1500, learning_rate=0.012, particles=1, guide=guides.Amortised(hidden_dim=48)),
    ),
    "neural ODE, 5 latents": (
        models.NeuralODE(5, drift=drifts.MLP()),
        inference.SVI(steps=600, particles=2, learning_rate=0.003, draws=50),
    ),
    "neural SDE, 3 latents": (models.NeuralSDE(3, drift=drifts.MLP()), inference.NaturalGradient(rounds=15, draws=50)),
}
PENALTIES = {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]}
STRETCHES = 4  # of a trial, over which log rates are averaged before its label is read off them
SMOOTHED = 2.0  # bins, of the counts from which the floor decodes


def decoded(train: np.ndarray, test: np.ndarray, wanted: tuple[np.ndarray, np.ndarray]) -> str:
    """What rates (trial, time, unit) tell of the behaviour, with a standard error over the trials tested."""
    if wanted[0].ndim == 3:
        whole = velocity_r2(train, wanted[0], test, wanted[1])
        parts = np.array_split(np.arange(len(test)), 20)
        without = np.array(
            [velocity_r2(train, wanted[0], np.delete(test, p, 0), np.delete(wanted[1], p, 0)) for p in parts]
        )
        error = np.sqrt(19 / 20 * np.square(without - without.mean()).sum())  # the jackknife's, by twentieths
        return f"{whole:.3f} ± {error:.3f}"
    stretches = [
        np.concatenate([part.mean(1) for part in np.array_split(np.log(rates), STRETCHES, axis=1)], -1)
        for rates in (train, test)
    ]
    (fit, labels), (new, true) = (
        (rates[label != ""], label[label != ""]) for rates, label in zip(stretches, wanted, strict=True)
    )
    reader = GridSearchCV(make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), PENALTIES)
    right = reader.fit(fit, labels).predict(new) == true
    return f"{right.mean():.3f} ± {right.std() / len(right) ** 0.5:.3f}"


def floor(real: Real) -> str:
    """The same decoded from smoothed counts of the units that are not hidden."""
    kept = ~np.isin(real.train.unit, real.hidden)
    smoothed = [
        gaussian_filter1d(np.nan_to_num(part.values.numpy()[..., kept]), SMOOTHED, axis=1) + 1e-2
        for part in (real.train, real.test)
    ]
    return decoded(*smoothed, real.wanted)  # type: ignore[arg-type]


def rows(name: str, labels: list[str]) -> list[str]:
    real = REAL[name]()
    observed = real.test.to_xarray()["observations"].sel(unit=real.hidden)
    found: dict[str, Any] = {}
    told, seconds = {}, {}
    for label, (model, engine) in FITS.items():
        if label not in (*labels, BEST):
            continue
        began = time.process_time()
        posterior = dyn.fit(model, real.train, engine, seed=0)
        seconds[label] = time.process_time() - began
        rates = [
            dyn.predict(posterior, part.hide(unit=real.hidden), draws=20)["expected"]
            for part in (real.train, real.test)
        ]
        found[label] = bits_per_spike_over_trials(rates[1].sel(unit=real.hidden), observed)
        told[label] = decoded(rates[0].values, rates[1].values, real.wanted)
        print(name, label, f"{seconds[label]:.0f} s", found[label], told[label], flush=True)
    written = [f"| {name} | smoothed counts | - | - | - | {floor(real)} |"]
    for label, score in found.items():
        apart = score - found[BEST]
        written.append(
            f"| {name} | {label} | {seconds[label]:.0f} | {score.value:.3f} ± {score.standard_error:.3f} | "
            f"{apart.value:+.3f} ± {apart.standard_error:.3f} | {told[label]} |"
        )
    print("\n".join(written), flush=True)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", nargs="+", choices=list(REAL), default=list(REAL))
    parser.add_argument("--models", nargs="+", choices=list(FITS), default=list(FITS))
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", dyn.FitWarning)
    written = [row for name in options.recordings for row in rows(name, options.models)]
    if options.table:
        write(
            options.table,
            "Real spikes: which dynamics predict hidden neurons, and behaviour?",
            "Made by `python benchmarks/compare_dynamics.py --table docs/tables/dynamics.md`.",
            "*Reaches*: Yu et al. (2009), 40 neurons, 50 bins of 20 ms, 84 trials to fit, 28 new ones; which of two "
            "targets. *Decisions*: Steinmetz et al. (2019), session 12, 60 neurons of four regions, 20 bins of 20 ms, "
            "150 and 60 trials; on which side contrast was larger, where it was. *Movements*: threshold crossings of "
            "motor cortex (`chestek_m1_contdata`), 60 channels, 150 and 50 movements of some 22 bins of 50 ms; R2 of "
            f"the hand's velocity {50 * LAG} ms later.",
            "In new trials a quarter of the units is hidden. Bits per spike of these with the standard error over "
            "trials, and the paired difference; behaviour is decoded from the rates of all units, as the others tell "
            "them: share right, or R2, with its standard error over new trials. One seed, short runs of one core.",
            head=("recording", "model", "CPU seconds, fit", "bits/spike", f"to {BEST}", "decoded"),
            rows=written,
        )


if __name__ == "__main__":
    main()
