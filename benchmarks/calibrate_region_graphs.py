"""How well `models.MultiRegionLDS` recovers a known graph of regions, and how often it sees one where there is none.

Run `python benchmarks/calibrate_region_graphs.py`. Floor and ceiling stand beside every score: see `_regions.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from _regions import SETTINGS, Recovered, ceiling, floor, scores

import pyrodyn as dyn
from pyrodyn import inference, models
from pyrodyn.systems import System, coupled_regions, feedback_loop, uncoupled_regions

DRIVES = ("none", "white", "slow", "time-locked")
SWEEPS = {"easy": (40, 40), "hard 1": (80, 80), "hard 2": (50, 50)}  # warm-up and draws within the time for a fit


def recovered(system: System, warmup: int, draws: int, global_dim: int = 1) -> tuple[Recovered, float]:
    """What a fit finds, and its seconds."""
    began = time.perf_counter()
    model = models.MultiRegionLDS(2, global_dim=global_dim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        posterior = dyn.fit(model, system.recording, inference.Gibbs(draws=draws, warmup=warmup, chains=2), seed=0)
    seconds = time.perf_counter() - began
    found = posterior["invariants"].to_dataset().mean(("chain", "draw"))
    path = posterior["latents"]["mean"]
    shared = path.sel(latent="global:0").values if global_dim else None
    return Recovered(found["presence"].values, found["coupling_strength"].values, shared), seconds


def recovery(seeds: int) -> list[str]:
    lines = [
        "| setting | seed | AUROC | floor | log-gain corr. | global R2 | its ceiling | absent at P > .9 | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for setting, options in SETTINGS.items():
        table = []
        for seed in range(seeds):
            system = coupled_regions(seed=seed, **options)
            found, seconds = recovered(system, *SWEEPS[setting])
            ours, least, most = (scores(each, system.truth) for each in (found, floor(system), ceiling(system)))
            absent = ~system.truth["adjacency"].values & ~np.eye(len(found.evidence), dtype=bool)
            false = int((found.evidence[absent] > 0.9).sum())
            table.append((ours[0], least[0], ours[1], ours[2] / most[2]))
            lines.append(
                f"| {setting} | {seed} | {ours[0]:.2f} | {least[0]:.2f} | {ours[1]:.2f} | {ours[2]:.2f} "
                f"| {most[2]:.2f} | {false} of {int(absent.sum())} | {seconds:.0f} |"
            )
            print(lines[-1], flush=True)
        values = np.array(table)
        lines.append(
            f"| **{setting}** | mean, worst | {values[:, 0].mean():.2f}, {values[:, 0].min():.2f} "
            f"| {values[:, 1].mean():.2f}, {values[:, 1].min():.2f} | median {np.nanmedian(values[:, 2]):.2f} "
            f"| share of ceiling {np.median(values[:, 3]):.2f}, {values[:, 3].min():.2f} | | | |"
        )
        print(lines[-1], flush=True)
    return lines


def controls(blocks: int) -> list[str]:
    lines = ["| drive | absent blocks | at P > .9 | mean P |", "|---|---|---|---|"]
    for drive in DRIVES:
        probability: list[float] = []
        seed = 0
        while len(probability) < blocks:
            system = uncoupled_regions(drive, trials=5, bins=200, seed=seed)
            evidence = recovered(system, 40, 40)[0].evidence
            probability += evidence[~np.eye(len(evidence), dtype=bool)].tolist()
            seed += 1
        found = np.array(probability)
        lines.append(f"| {drive} | {len(found)} | {int((found > 0.9).sum())} | {found.mean():.2f} |")
        print(lines[-1], flush=True)
    return lines


def loops(seeds: int) -> list[str]:
    lines = ["| system | seed | edges with P | the others at most |", "|---|---|---|---|"]
    for kind in ("two", "three"):
        for control in (False, True):
            for seed in range(seeds):
                system = feedback_loop(kind, control=control, trials=8, seed=seed)
                evidence = recovered(system, 40, 40)[0].evidence
                there = system.truth["adjacency"].values
                off = ~np.eye(len(there), dtype=bool)
                edges = ", ".join(f"{p:.2f}" for p in evidence[there])
                name = f"{kind}-region " + ("control" if control else "loop")
                lines.append(f"| {name} | {seed} | {edges} | {evidence[off & ~there].max(initial=0.0):.2f} |")
                print(lines[-1], flush=True)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=200, help="absent blocks of each control")
    parser.add_argument("--parts", nargs="*", default=["recovery", "controls", "loops"])
    parser.add_argument("--out", type=Path, default=Path("docs/tables/region_graphs.md"))
    options = parser.parse_args()
    made = {
        "recovery": ("Recovery", lambda: recovery(options.seeds)),
        "controls": ("Controls without coupling", lambda: controls(options.blocks)),
        "loops": ("Loops", lambda: loops(3)),
    }
    lines = ["# Graphs of regions", "", "Made by `python benchmarks/calibrate_region_graphs.py`.", ""]
    for part in options.parts:
        title, make = made[part]
        lines += [f"## {title}", "", *make(), ""]
        options.out.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
