"""LFADS: rates of a chaotic network that are known, hidden neurons of a reaching task, and the time of a step.

Run from the root of the repository, on one core: ``python benchmarks/bench_lfads.py``, or with some of
``chaos reach step``, with PYRODYN_DATA the folder that holds datahigh_reach. The results stand in docs/tables/lfads.md.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import pyro
import torch
from _real import reaches

import pyrodyn as dyn
from pyrodyn import guides, inference, models, systems
from pyrodyn.evaluation import rate_r2
from pyrodyn.guides import Start
from pyrodyn.inference import Cosine, EarlyStopping, Training
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.inference.loop import Run
from pyrodyn.program import globals_given
from pyrodyn.scoring import bits_per_spike_over_trials


def chaos() -> None:
    """R2 of the rates of all trials of `systems.chaotic_rnn`, one trial at a time, after 1600 steps."""
    system = systems.chaotic_rnn()
    model = models.LFADS(20, generator_dim=64, initial_dim=64)
    training = Training(
        batch=64, schedule=Cosine(warm_up=50), clip=5.0, latent_warm_up=320, dropout=0.3, single_precision=True,
        stopping=EarlyStopping(every=40, share=0.1, patience=100),
    )  # fmt: skip
    engine = inference.SVI(
        steps=1600, learning_rate=0.01, particles=1, guide=guides.Amortised(hidden_dim=48), training=training
    )
    began = time.perf_counter()
    draws = engine.run(model, system.recording, seed=0)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        values = {name: value[0].unsqueeze(1) for name, value in draws.samples.items()}
        parameters = globals_given(model, values, system.recording)
        expected = torch.zeros_like(system.recording.values)
        for draw in range(0, 100, 5):
            local = {name: value[0, draw : draw + 1] for name, value in draws.local.items()}
            expected += model.expected(parameters, local, system.recording)[0] / 20
    print(f"R2 {rate_r2(system.truth['rates'].values, expected.numpy()):.3f} after {seconds:.0f} s")


def reach() -> None:
    """Bits per spike of hidden neurons, as in tutorials/09_lfads_on_reaching.py, beside linear dynamics."""
    train, test, hidden, _ = reaches()
    observed = test.to_xarray()["observations"].sel(unit=hidden)
    guide = guides.Amortised(hidden_dim=24)
    engines = {
        "LFADS": (
            models.LFADS(latent_dim=6, generator_dim=32, initial_dim=8),
            inference.SVI(steps=300, learning_rate=0.012, particles=1, guide=guide),
        ),
        "LDS, 4 latents": (models.LDS(latent_dim=4), inference.Laplace(draws=100, max_steps=100)),
        "LDS, 10 latents": (
            models.LDS(latent_dim=10),
            inference.SVI(steps=60, particles=1, draws=20, guide=guides.LowRank()),
        ),
    }
    for name, (model, engine) in engines.items():
        posterior = dyn.fit(model, train, engine, seed=0)
        predicted = dyn.predict(posterior, test.hide(unit=hidden), draws=30).sel(unit=hidden)
        print(name, bits_per_spike_over_trials(predicted["expected"], observed), flush=True)


def step() -> None:
    """CPU seconds of a training step: 256 trials, 50 bins, 50 units, generator 100, recurrences in float32."""
    counts = np.random.default_rng(0).poisson(0.3, (256, 50, 50)).astype(float)
    recording = dyn.Recording.from_arrays(counts, bin_width=0.01)
    for inputs in (0, 4):
        model = models.LFADS(40, generator_dim=100, initial_dim=100, input_dim=inputs, controller_dim=80)
        with random_stream(0), numerics(), pyro.settings.context(module_local_params=True):
            guide = guides.Amortised(hidden_dim=100)(model, recording, Start(model.initial_values(recording), None))
            guide(recording)
            training = Training(single_precision=True, dropout=0.3, clip=5.0)
            run = Run(model, guide, recording, training, steps=20, rate=0.01, particles=1, seed=0)
            run._advance()
            taken = []
            for _ in range(5):
                began = time.process_time()
                run._advance()
                taken.append(time.process_time() - began)
        print(f"{inputs} inferred inputs: {min(taken):.2f} s a step", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", dyn.FitWarning)
    PARTS = {"chaos": chaos, "reach": reach, "step": step}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="{chaos,reach,step}", default=list(PARTS))
    for part in parser.parse_args().parts:
        PARTS[part]()
