"""Simulation-based calibration of models with modes: exact engines must pass, and planted faults must be caught.

Run `python benchmarks/calibrate_modes.py --table docs/tables/calibration_modes.md`, or with some of ``hmm arhmm slds
faults``. Every row is one call of `pyrodyn.calibrate`. No quantity depends on how modes are numbered. The exit code is
1 where a quantity is flagged or a planted fault is not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from calibrate_regions import rows

import pyrodyn as dyn
from pyrodyn import inference, models, readouts
from pyrodyn.inference import collapse
from pyrodyn.inference.engine import Engine
from pyrodyn.recording import Recording


def like(trials: int, bins: int, units: int, *, counts: bool = False) -> Recording:
    """Shape and units of measurement; fixed, so that the prior is the same in all replicates."""
    return Recording.from_arrays(
        np.ones((trials, bins, units)), bin_width=0.05, counts=counts, center=np.zeros(units), scale=np.ones(units)
    ).blank()


@dataclass(frozen=True)
class Case:
    """One call of `calibrate`."""

    model: Any
    like: Recording
    engine: Engine
    program: Any = None


HMC = inference.HMC(chains=8, superchains=4, draws=25, warmup=100)
# Path and process noise hold each other: it takes tens of sweeps from one draw to the next.
OF_PATH = inference.Gibbs(chains=1, draws=50, warmup=400, thin=40)
OBSERVED = inference.Gibbs(chains=2, draws=50, warmup=100, thin=4)
GAUSSIAN = readouts.Gaussian()


def cases(part: str) -> dict[str, Case]:
    """What must pass, by its title."""
    found = {
        "hmm": {
            "HMM, Gaussian readout, HMC": Case(models.HMM(2, GAUSSIAN), like(2, 25, 3), HMC),
            "HMM, Poisson readout, HMC": Case(models.HMM(2), like(2, 25, 3, counts=True), HMC),
        },
        "arhmm": {
            "ARHMM, HMC": Case(models.ARHMM(2), like(2, 25, 2), HMC),
            "ARHMM, Gibbs": Case(models.ARHMM(2), like(2, 25, 2), OBSERVED),
            "ARHMM, recurrent, Gibbs": Case(models.ARHMM(3, recurrent=True), like(2, 40, 2), OBSERVED),
        },
        "slds": {
            "Switching LDS, Gibbs": Case(models.SwitchingLDS(2, 1, readout=GAUSSIAN), like(2, 25, 3), OF_PATH),
            "Switching LDS, recurrent, two latents, Gibbs": Case(
                models.SwitchingLDS(2, 2, recurrent=True, readout=GAUSSIAN), like(2, 25, 3), OF_PATH
            ),
            "Switching LDS, Poisson readout, Gibbs": Case(
                models.SwitchingLDS(2, 1), like(2, 25, 3, counts=True), OF_PATH
            ),
        },
    }
    return found[part]


# ------------------------------------------------------------------------------------------------ planted faults


@dataclass(frozen=True)
class Swapped(models.HMM):
    """The density reads transitions the wrong way round."""

    def evidence(self, parameters, recording, observations):
        back = parameters.transition.mT
        wrong = parameters._replace(transition=back / back.sum(-1, keepdim=True))
        return super().evidence(wrong, recording, observations)


@dataclass(frozen=True)
class Unscaled(models.ARHMM):
    """The density takes half the process noise that it reports."""

    def evidence(self, parameters, recording, observations):
        wrong = parameters._replace(process_noise=0.5 * parameters.process_noise)
        return super().evidence(wrong, recording, observations)


def forgetful(model: Any) -> Any:
    """A model whose Gibbs sampler forgets the stickiness of the prior."""

    class Forgetful(type(model)):
        def conditionals(self, recording, observations=None):
            sweep = super().conditionals(recording, observations)
            sweep.moves.prior = replace(sweep.moves.prior, stickiness=0.0)
            return sweep

    return Forgetful(**vars(model))


def late(model: Any) -> Any:
    """A model whose Gibbs sampler draws the modes given the path of one bin later."""

    class Late(type(model)):
        def conditionals(self, recording, observations=None):
            sweep = super().conditionals(recording, observations)
            draw: Callable = sweep.moves.draw_modes
            sweep.moves.draw_modes = lambda state, path: draw(state, path.roll(-1, -2))
            return sweep

    return Late(**vars(model))


def planted() -> dict[str, Case]:
    """Every fault, with the right model and a small recording on which it matters."""
    hmm, arhmm = models.HMM(3, GAUSSIAN, stickiness=0.0), models.ARHMM(2)
    slds = models.SwitchingLDS(2, 1, readout=GAUSSIAN)
    small = like(2, 25, 2)
    return {
        "HMM: transitions read the wrong way round": Case(
            hmm, like(2, 40, 3), HMC, collapse(Swapped(3, GAUSSIAN, stickiness=0.0))
        ),
        "ARHMM, HMC: process noise halved": Case(arhmm, small, HMC, collapse(Unscaled(2))),
        "ARHMM, Gibbs: stickiness forgotten": Case(arhmm, small, OBSERVED, collapse(forgetful(arhmm))),
        "switching LDS, Gibbs: stickiness forgotten": Case(slds, like(2, 25, 3), OF_PATH, forgetful(slds)),
        "switching LDS, Gibbs: modes one bin late": Case(slds, like(2, 25, 3), OF_PATH, late(slds)),
    }


# ------------------------------------------------------------------------------------------------ the report


def timed(case: Case, replicates: int) -> tuple[xr.Dataset, float]:
    """One calibration, and the processor time that it took."""
    began = time.process_time()
    found = dyn.calibrate(case.model, case.like, case.engine, replicates=replicates, seed=1, program=case.program)
    return found, time.process_time() - began


def passing(title: str, case: Case, replicates: int) -> tuple[list[str], int]:
    found, seconds = timed(case, replicates)
    flagged = [str(name) for name in found["quantity"].values[found["flagged"].values]]
    said = f"flagged: {', '.join(flagged)}" if flagged else "all passed"
    lines = [
        f"## {title}: {found.attrs['shape']}, {replicates} replicates",
        "",
        f"`{case.model}`, `{case.engine}`, {seconds:.0f} s; {said}.",
        "",
        "| quantity | entries | least KS p | least chi-square p | 50% coverage | 90% coverage | flagged |",
        "|---|---|---|---|---|---|---|",
        *rows(found),
        "",
    ]
    return lines, len(flagged)


def faults(replicates: int) -> tuple[list[str], int]:
    lines = [
        f"## Planted faults, {replicates} replicates each",
        "",
        "| fault | clearest quantity | p | quantities flagged | s | |",
        "|---|---|---|---|---|---|",
    ]
    missed = 0
    for name, case in planted().items():
        found, seconds = timed(case, replicates)
        p = np.minimum(found["ks_p"].values, found["chi_square_p"].values)
        clearest = str(found["quantity"].values[int(p.argmin())])
        caught = bool(found["flagged"].any())
        missed += not caught
        lines.append(
            f"| {name} | {clearest} | {p.min():.1e} | {int(found['flagged'].sum())} of {found.sizes['quantity']} "
            f"| {seconds:.0f} | {'caught' if caught else 'MISSED'} |"
        )
        print(lines[-1], flush=True)
    return [*lines, ""], missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["hmm", "arhmm", "slds", "faults"])
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--fault-replicates", type=int, default=100)
    parser.add_argument("--table", type=Path, help="write the tables to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    written = [
        "# Calibration of models with modes",
        "",
        "Made by `python benchmarks/calibrate_modes.py`.",
        "",
        "A quantity is flagged where a p-value is below 5e-4 or a coverage leaves its binomial bounds of 99.8%. Ranges "
        "are over the entries of a quantity. `complete_log_likelihood` is of the observations and the path.",
        "",
    ]
    for part in options.parts:
        if part == "faults":
            lines, wrong = faults(options.fault_replicates)
            written, failed = written + lines, failed + wrong
            continue
        for title, case in cases(part).items():
            lines, wrong = passing(title, case, options.replicates)
            print("\n".join(lines), flush=True)
            written, failed = written + lines, failed + wrong
    if options.table is not None:
        options.table.write_text("\n".join(written).rstrip() + "\n", encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
