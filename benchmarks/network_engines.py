"""Small networks under variational inference and under HMC: do both tell the same rates?

Run `python benchmarks/network_engines.py --table docs/tables/network_engines.md`. One object for each model, two
engines; weights have no order and no signs of their own, so that rates are what can be compared.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _tables import write

import pyrodyn as dyn
from pyrodyn import drifts, inference, models, systems
from pyrodyn.evaluation import rate_r2

TRIALS, BINS, UNITS = 8, 25, 8
MODELS: dict[str, Any] = {
    "neural ODE, 2 latents, 6 hidden units": models.NeuralODE(2, drift=drifts.MLP(hidden=6)),
    "LatentRNN, 2 gated units": models.LatentRNN(2),
}
HMC = inference.HMC(draws=30, warmup=60, chains=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", dyn.FitWarning)
    system = systems.van_der_pol(trials=TRIALS, bins=BINS, units=UNITS, readout="poisson", mean_count=1.0)
    truth = system.truth["rates"].values
    rows = []
    for name, model in MODELS.items():
        rates, cells = [], []
        for engine in (inference.SVI(), HMC):
            began = time.process_time()
            posterior = dyn.fit(model, system.recording, engine, seed=0)
            seconds = time.process_time() - began
            rates.append(dyn.predict(posterior, system.recording, draws=50)["expected"].values)
            cells.append(f"{seconds:.0f} | {rate_r2(truth, rates[-1]):.3f}")
        both = np.corrcoef(np.log(rates[0]).ravel(), np.log(rates[1]).ravel())[0, 1]
        rows.append(f"| {name} | {' | '.join(cells)} | {both:.3f} | {rate_r2(rates[1], rates[0]):.3f} |")
        print(rows[-1], flush=True)
    if options.table:
        write(
            options.table,
            "Small networks under two engines",
            "Made by `python benchmarks/network_engines.py --table docs/tables/network_engines.md`.",
            f"`systems.van_der_pol`: {TRIALS} trials of {BINS} bins, {UNITS} Poisson units. `SVI()` and `{HMC!r}` from "
            "the same object; R2 of the expected rates with the true ones, and with each other.",
            head=(
                "model", "SVI, CPU seconds", "R2 with the truth", "HMC, CPU seconds", "R2 with the truth",
                "correlation of log rates", "R2 of SVI's with HMC's",
            ),
            rows=rows,
        )  # fmt: skip


if __name__ == "__main__":
    main()
