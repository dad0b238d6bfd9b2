"""Model comparison on linear dynamical systems: against exact refits, and whether it finds the right dimension.

Run `python benchmarks/compare_lds.py`; it writes docs/tables/comparison.md, in about ten minutes on one core. The exit
code is 1 unless every bar stated there is met.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import pyrodyn as dyn
from pyrodyn import inference, models, readouts
from pyrodyn.comparison import LOO, Evidence, KFold, LeaveFutureOut

TABLE = Path(__file__).resolve().parents[1] / "docs" / "tables" / "comparison.md"
TURNS = torch.tensor([[1.0, 2.0, 0, 0], [-2.0, 1.0, 0, 0], [0, 0, 2.0, 0.5], [0, 0, -0.5, 1.5]], dtype=torch.float64)
WITHIN_TOTAL, WITHIN_TERM = 0.5, 0.1  # nats
LONG = inference.HMC(draws=250, warmup=150, chains=64)
REFIT = inference.HMC(draws=250, warmup=120, chains=64)


def blank(trials: int, bins: int, units: int, *, counts: bool) -> dyn.Recording:
    return dyn.Recording.from_arrays(
        np.zeros((trials, bins, units)), bin_width=0.05, counts=counts, center=np.zeros(units), scale=np.ones(units)
    ).blank()


def gaussian(trials: int, bins: int, seed: int) -> tuple[models.LDS, dyn.Recording]:
    """A one-latent system seen by three channels."""
    model = models.LDS(1, readouts.Gaussian())
    values = {"mixing": torch.tensor([[1.5]]), "noise_sd": torch.full((3,), 0.5)}
    return model, dyn.simulate(model, blank(trials, bins, 3, counts=False), seed=seed, values=values)[0]


def against_refits(seed: int) -> list[str]:
    """LOO of three engines beside leave-one-trial-out by refits, and LFO beside refits at every cut."""
    model, recording = gaussian(20, 20, seed)
    fits = {
        "HMC": dyn.fit(model, recording, LONG, seed=seed),
        "SVI": dyn.fit(model, recording, inference.SVI(draws=20_000), seed=seed),
        "Laplace": dyn.fit(model, recording, inference.Laplace(draws=20_000), seed=seed),
    }
    exact = dyn.compare({"HMC": fits["HMC"]}, None, KFold(20, REFIT)).sel(model="HMC")
    found = dyn.compare(fits, None, LOO())
    rows = [row(f"LOO, seed {seed}", name, found.sel(model=name), exact, "trial") for name in fits]
    model, session = gaussian(1, 120, seed)
    fitted = {"HMC": dyn.fit(model, session, inference.Laplace(), seed=seed)}
    once, always = (
        dyn.compare(fitted, None, LeaveFutureOut(first=0.4, refit=LONG, always_refit=every)).sel(model="HMC")
        for every in (False, True)
    )
    return [*rows, row(f"LFO, seed {seed}", "HMC", once, always, "cut")]


def row(what: str, engine: str, found, exact, dim: str) -> str:
    gap = found["pointwise"].values - exact["pointwise"].values
    k_hat = np.nan_to_num(found["k_hat"].values, nan=0.0)
    trusted = k_hat < 0.7
    worst = np.abs(gap[trusted]).max(initial=0.0)
    met = abs(gap.sum()) < WITHIN_TOTAL and worst < WITHIN_TERM
    error = float(np.hypot(found["mc_error"], exact["mc_error"]))
    shown = f"{worst:.3f}" if trusted.any() else "-"
    return (
        f"| {what} | {engine} | {float(exact['elpd']):.2f} | {gap.sum():+.3f} | {error:.3f} | {shown} "
        f"| {(~trusted).sum()} of {found.sizes[dim]} | {found['estimator'].values} | {'yes' if met else 'no'} |"
    )


def dimension(seed: int) -> list[str]:
    """Poisson systems of four latents, fitted with 4 and with 8."""
    like = blank(24, 30, 12, counts=True)
    values = {"mixing": TURNS, "offset": torch.full((12,), 0.0, dtype=torch.float64)}
    recording, _ = dyn.simulate(models.LDS(4), like, seed=seed, values=values)
    engine = inference.SVI(steps=300, draws=400)
    fits = {str(dim): dyn.fit(models.LDS(dim), recording, engine, seed=seed) for dim in (4, 8)}
    rows = []
    for method in (KFold(3), Evidence()):
        began = time.perf_counter()
        found = dyn.compare(fits, None, method)
        seconds = time.perf_counter() - began
        name = "elpd" if "elpd" in found else "log_evidence"
        gap = {n: float(found[n].sel(model="4") - found[n].sel(model="8")) for n in (name, f"{name}_uncorrected")}
        error = float(found["dse"].max())
        met = gap[name] > 0.0 and str(found["model"].values[0]) == "4"
        bad = float(found["bad_k_share"].sel(model="8"))
        rows.append(
            f"| {seed} | {type(method).__name__} | {gap[name]:+.1f} | {error:.1f} | {gap[f'{name}_uncorrected']:+.1f} "
            f"| {float(found['mc_error'].max()):.2f} | {bad:.0%} | {seconds:.0f} | {'yes' if met else 'no'} |"
        )
    return rows


TEXT = """# Model comparison on linear dynamical systems

`python benchmarks/compare_lds.py` (one core, float64) made this table.

## Against exact refits

Gaussian readout, one latent, three channels; 20 trials of 20 bins, or one session of 120 bins of which the last 60% are
predicted in blocks. "Exact" refits without each trial (all 20 in one batch of `HMC`), or at every cut. Bars: the total
within {total} nats, every term with k-hat below .7 within {term}. Where the weights of an approximation fail, k-hat
says so, and by default `compare` turns to `KFold`.

| | engine | exact elpd | difference | its Monte Carlo error | worst trusted term | k-hat > .7 | estimator | met |
|---|---|---|---|---|---|---|---|---|
{refits}

## 4 latents or 8?

Poisson readout, 24 trials of 30 bins, 12 units, made from 4 latents. What 4 latents gain over 8, in nats. By `KFold`,
elpd with the standard error of the paired difference over trials; by `Evidence`, the log Bayes factor with its Monte
Carlo error. "Laplace" is the same difference before particles correct the evidences of paths: the error of the Laplace
approximation is larger with more latents, in favour of these.

| seed | method | 4 over 8 | SE | by Laplace | Monte Carlo error | bad k-hat, 8 | seconds | 4 preferred |
|---|---|---|---|---|---|---|---|---|
{dimension}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    seeds = range(parser.parse_args().seeds)
    warnings.simplefilter("ignore", UserWarning)
    refits = [line for seed in seeds for line in against_refits(seed)]
    print("\n".join(refits), flush=True)
    chosen = [line for seed in seeds for line in dimension(seed)]
    print("\n".join(chosen))
    text = TEXT.format(total=WITHIN_TOTAL, term=WITHIN_TERM, refits="\n".join(refits), dimension="\n".join(chosen))
    TABLE.write_text(text, encoding="utf-8")
    return int(any(line.endswith("| no |") for line in refits + chosen))


if __name__ == "__main__":
    sys.exit(main())
