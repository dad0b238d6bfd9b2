"""Does LFADS find when a hidden pulse hit a chaotic network, and does coordinated dropout keep it from copying?

Run `python benchmarks/lfads_pulse.py --table docs/tables/lfads_pulse.md`, in about ten minutes of one core. All scores
are of trials that were not fitted, read by the recognition network, which is what may copy.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from _tables import write
from pyro import poutine
from torch import nn

import pyrodyn as dyn
from pyrodyn import guides, models, systems
from pyrodyn.evaluation import input_leakage, rate_r2
from pyrodyn.guides import Start, draw_globals, draw_trials
from pyrodyn.inference import Cosine, EarlyStopping, Training
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.inference.loop import Run
from pyrodyn.program import globals_given
from pyrodyn.recording import Recording

QUIET = 0.2  # share of trials without a pulse
WITHIN = 3  # bins
DRAWS = 20  # of codes and inputs in every trial

Read = tuple[dict[str, torch.Tensor], torch.Tensor]  # draws of the sites of trials, expected counts


def fit(model: models.LFADS, recording: Recording, steps: int, dropout: float) -> nn.Module:
    """A trained guide, its recognition network with it."""
    training = Training(
        batch=64, schedule=Cosine(warm_up=50), clip=5.0, latent_warm_up=steps // 5, dropout=dropout,
        single_precision=True, stopping=EarlyStopping(every=max(1, steps // 40), share=0.1, patience=100),
    )  # fmt: skip
    guide = guides.Amortised(hidden_dim=48)(model, recording, Start(model.initial_values(recording), None))
    guide(recording.isel(trial=range(4)))
    Run(model, guide, recording, training, steps=steps, rate=0.01, particles=1, seed=0).train(None)
    return guide


def read(model: models.LFADS, guide: Any, recording: Recording) -> Read:
    """What the recognition network makes of a recording."""
    with torch.no_grad():
        values, _ = draw_globals(guide, recording.isel(trial=[0]), 1)
        local = draw_trials(guide, values, recording, DRAWS)
        parameters = globals_given(model, {name: value.unsqueeze(1) for name, value in values.items()}, recording)
        return local, model.expected(parameters, local, recording).mean(0)


def divergence(model: models.LFADS, guide: Any, recording: Recording) -> np.ndarray:
    """KL of the inferred inputs from their prior in every trial, in nats, by draws."""
    found = torch.zeros(recording.num_trials)
    with torch.no_grad():
        for _ in range(DRAWS):
            guessed = poutine.trace(guide).get_trace(recording)
            scored = poutine.trace(poutine.replay(model, guessed)).get_trace(recording)
            guessed.compute_log_prob()
            scored.compute_log_prob()
            terms = [trace.nodes["inferred_input"]["log_prob"] for trace in (guessed, scored)]
            found += (terms[0] - terms[1]) / DRAWS
    return found.numpy()


def measure(steps: int, dropout: float, degrees: float, seed: int) -> list[str]:
    """One row of the table."""
    system = systems.pulsed_rnn(quiet=QUIET, seed=seed)
    known = None if math.isinf(degrees) else degrees  # of Student's steps
    model = models.LFADS(20, generator_dim=64, initial_dim=64, input_dim=1, input_degrees=known, controller_dim=32)
    train, test = (system.recording.sel(split=name) for name in ("train", "valid"))
    truth = system.truth.sel(trial=test.trial)
    with random_stream(0), numerics(), pyro.settings.context(module_local_params=True):
        began = time.process_time()
        guide = fit(model, train, steps, dropout)
        seconds = time.process_time() - began
        local, expected = read(model, guide, test)
        effort = divergence(model, guide, test)

        def inference(recording: Recording) -> xr.Dataset:
            return xr.Dataset({"expected": (("trial", "time", "unit"), read(model, guide, recording)[1].numpy())})

        leak = input_leakage(inference, test)
    size = local["inferred_input"].mean(0).norm(dim=-1).numpy()
    when = truth["pulse_bin"].values
    hit = when >= 0
    missed = np.abs(size.argmax(-1) - when)[hit]
    return [
        f"{seed}",
        f"{degrees:g}",
        f"{dropout:g}",
        f"{steps}",
        f"{seconds:.0f}",
        f"{rate_r2(truth['rates'].values, expected.numpy()):.3f}",
        f"{100 * (missed <= WITHIN).mean():.0f}%",
        f"{np.median(missed):.0f}",
        f"{effort[hit].mean():.1f}",
        f"{effort[~hit].mean():.1f} ({100 * effort[~hit].mean() / effort[hit].mean():.0f}%)",
        f"{leak.seen.value:.3f}",
        f"{leak.hidden.value:.3f}",
        f"{leak.gap.value:.3f} ± {leak.gap.standard_error:.3f}",
    ]


HEAD = (
    "network", "degrees of freedom", "dropout", "steps", "CPU seconds", "rate R2",
    f"pulses within {WITHIN} bins (bar 80%)", "median miss, bins", "KL of inputs with a pulse, nats",
    "without one (bar 20%)", "bits/spike of seen entries", "of hidden ones", "gap (bar .03)",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.3, 0.0])
    parser.add_argument("--degrees", type=float, nargs="+", default=[math.inf, 2.0], help="of freedom of inputs' steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5], help="of network and spikes")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", dyn.FitWarning)
    rows = []
    for seed, degrees, dropout in product(options.seeds, options.degrees, options.dropout):
        rows.append("| " + " | ".join(measure(options.steps, dropout, degrees, seed)) + " |")
        print(rows[-1], flush=True)
    if options.table:
        names = ("dropout", "degrees", "seeds")
        given = " ".join(f"--{name} {' '.join(f'{v:g}' for v in getattr(options, name))}" for name in names)
        write(
            options.table,
            "A hidden pulse in a chaotic network, found by LFADS",
            f"Made by `python benchmarks/lfads_pulse.py --steps {options.steps} {given} --table "
            "docs/tables/lfads_pulse.md`.",
            f"`systems.pulsed_rnn(quiet={QUIET})`: 1,300 trials of 100 bins, 50 units at 15 spikes/s, a pulse at an "
            "unknown bin in four trials of five. Fitted to eight repeats of each start, scored on the other two (260 "
            "trials). `models.LFADS(20, generator_dim=64, initial_dim=64, input_dim=1, controller_dim=32)`. "
            "A pulse is where the mean of the inferred input is largest; the gap is `evaluation.input_leakage`.",
            head=HEAD,
            rows=rows,
        )


if __name__ == "__main__":
    main()
