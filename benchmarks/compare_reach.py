"""Reach spikes: linear, switching, recurrent and continuous-time dynamics beside each other.

Run `python benchmarks/compare_reach.py --table docs/tables/reach.md` with PYRODYN_DATA the folder that holds
datahigh_reach, on one core. Every model is fitted to the same trials and asked for units that are hidden in others.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _reach import reaches
from _tables import write

import pyrodyn as dyn
from pyrodyn import drifts, guides, inference, models
from pyrodyn.scoring import bits_per_spike_over_trials

AMORTISED = inference.SVI(steps=300, learning_rate=0.012, particles=1, guide=guides.Amortised(hidden_dim=24))
FITS: dict[str, tuple[Any, Any]] = {
    "LDS, 4 latents": (models.LDS(4), inference.Laplace(draws=100, max_steps=100)),
    "LDS, 10 latents": (models.LDS(10), inference.SVI(steps=60, particles=1, draws=20, guide=guides.LowRank())),
    "LFADS, 6 factors": (models.LFADS(6, generator_dim=32, initial_dim=8), AMORTISED),
    "LatentRNN, 10 gated units": (models.LatentRNN(10), AMORTISED),
    "neural SDE, 3 latents": (models.NeuralSDE(3, drift=drifts.MLP()), inference.NaturalGradient(rounds=15, draws=50)),
    "neural ODE, 3 latents": (
        models.NeuralODE(3, drift=drifts.MLP()),
        inference.SVI(steps=60, particles=1, learning_rate=0.003, draws=50),
    ),
    "switching LDS, 2 modes of 4 latents": (
        models.SwitchingLDS(2, 4),
        inference.Gibbs(draws=20, warmup=40, chains=1),
    ),
}
HEAD = ("model", "CPU seconds, fit", "bits/spike", "to LDS, 10 latents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", dyn.FitWarning)
    train, test, hidden = reaches()
    observed = test.to_xarray()["observations"].sel(unit=hidden)
    found: dict[str, Any] = {}
    seconds = {}
    for name, (model, engine) in FITS.items():
        began = time.process_time()
        posterior = dyn.fit(model, train, engine, seed=0)
        seconds[name] = time.process_time() - began
        predicted = dyn.predict(posterior, test.hide(unit=hidden), draws=20).sel(unit=hidden)
        found[name] = bits_per_spike_over_trials(predicted["expected"], observed)
        print(name, f"{seconds[name]:.0f} s", found[name], flush=True)
    rows = []
    for name, score in found.items():
        apart = score - found["LDS, 10 latents"]
        rows.append(
            f"| {name} | {seconds[name]:.0f} | {score.value:.3f} ± {score.standard_error:.3f} | "
            f"{apart.value:+.3f} ± {apart.standard_error:.3f} |"
        )
        print(rows[-1], flush=True)
    if options.table:
        write(
            options.table,
            "Reach spikes: which dynamics predict hidden neurons?",
            "Made by `python benchmarks/compare_reach.py --table docs/tables/reach.md`.",
            f"Yu et al. (2009): 40 neurons, 50 bins of 20 ms, {train.num_trials} trials to fit; {len(hidden)} neurons "
            f"hidden in {test.num_trials} others. Bits per spike with the standard error over trials, and the paired "
            "difference. One seed, short runs of one core.",
            head=HEAD,
            rows=rows,
        )


if __name__ == "__main__":
    main()
