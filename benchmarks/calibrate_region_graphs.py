"""How well `models.MultiRegionLDS` recovers a known graph of regions, and how often it sees one where there is none.

Run `python benchmarks/calibrate_region_graphs.py`. Floor and ceiling stand beside every score, see `_regions.py`, and
beside strengths those of an oracle that knows the graph, see `_oracle.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import xarray as xr
from _oracle import graph_of, oracle
from _regions import SETTINGS, Recovered, ceiling, edge_auroc, floor, log_gain_correlation, off_diagonal, scores
from sessions_steinmetz import session

import pyrodyn as dyn
from pyrodyn import inference, models
from pyrodyn.coupling.presence import mean_log_odds
from pyrodyn.systems import System, coupled_regions, feedback_loop, shuffle_trials, uncoupled_regions

DRIVES = ("none", "white", "slow", "time-locked")
# Warm-up, draws and chains within the time for a fit. Few trials leave chains apart: more of them.
SWEEPS = {"easy": (40, 40, 2), "hard 1": (80, 60, 4), "hard 2": (50, 50, 2)}


def sampled(
    recording: dyn.Recording, warmup: int, draws: int, chains: int = 2, global_dim: int = 1
) -> tuple[xr.DataTree, float]:
    """A fit and its seconds."""
    began = time.perf_counter()
    model = models.MultiRegionLDS(2, global_dim=global_dim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        posterior = dyn.fit(model, recording, inference.Gibbs(draws=draws, warmup=warmup, chains=chains), seed=0)
    return posterior, time.perf_counter() - began


def recovered(system: System, warmup: int, draws: int, chains: int = 2) -> tuple[Recovered, np.ndarray, float]:
    """What a fit finds, log odds of the edges (target, source), and its seconds."""
    posterior, seconds = sampled(system.recording, warmup, draws, chains)
    found = posterior["invariants"].to_dataset().mean(("chain", "draw"))
    path = posterior["latents"]["mean"]
    shared = path.sel(latent="global:0").values
    odds = mean_log_odds(posterior["sample_stats"]["edge_log_odds"].values)
    return Recovered(found["presence"].values, found["coupling_strength"].values, shared), odds, seconds


def recovery(seeds: int, settings: list[str]) -> list[str]:
    lines = [
        "| setting | seed | AUROC of log odds | of P | floor | log-gain corr. | the oracle's | with the oracle "
        "| global R2 | its ceiling | absent at P > .9 | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in settings:
        table = []
        for seed in range(seeds):
            system = coupled_regions(seed=seed, **SETTINGS[setting])
            found, odds, seconds = recovered(system, *SWEEPS[setting])
            ours, least, most = (scores(each, system.truth) for each in (found, floor(system), ceiling(system)))
            there = system.truth["adjacency"].values
            absent = ~there & ~np.eye(len(there), dtype=bool)
            false = int((found.evidence[absent] > 0.9).sum())
            told = edge_auroc(odds, there)
            known = graph_of(oracle(system))["strength"].squeeze(("chain", "draw")).values
            known_gain = log_gain_correlation(known, system.truth["strength"].values, there)
            alike = log_gain_correlation(found.strength, known, there)
            cells = (told, ours[0], least[0], ours[1], known_gain, alike)
            table.append((*cells, ours[2] / most[2]))
            lines.append(
                f"| {setting} | {seed} | {' | '.join(f'{cell:.2f}' for cell in (*cells, ours[2], most[2]))} "
                f"| {false} of {int(absent.sum())} | {seconds:.0f} |"
            )
            print(lines[-1], flush=True)
        values = np.array(table)
        means, worst, middle = values.mean(0), values.min(0), np.nanmedian(values, 0)
        lines.append(
            f"| **{setting}** | mean, worst | {means[0]:.2f}, {worst[0]:.2f} | {means[1]:.2f}, {worst[1]:.2f} "
            f"| {means[2]:.2f}, {worst[2]:.2f} | {' | '.join(f'median {each:.2f}' for each in middle[3:6])} "
            f"| share of ceiling {middle[6]:.2f}, {worst[6]:.2f} | | | |"
        )
        print(lines[-1], flush=True)
    return lines


def ablation(seeds: int) -> list[str]:
    """How many absent edges are seen with and without a global latent in the model, where there is one; hard 1."""
    lines = ["| global latents | seeds | absent at P > .9 |", "|---|---|---|"]
    for global_dim in (1, 0):
        false, absent = 0, 0
        for seed in range(seeds):
            system = coupled_regions(seed=seed, **SETTINGS["hard 1"])
            evidence = sampled(system.recording, *SWEEPS["hard 1"], global_dim=global_dim)[0]["invariants"]["presence"]
            where = ~system.truth["adjacency"].values & ~np.eye(evidence.sizes["target"], dtype=bool)
            false += int((evidence.mean(("chain", "draw")).values[where] > 0.9).sum())
            absent += int(where.sum())
        lines.append(f"| {global_dim} | {seeds} | {false} of {absent} |")
        print(lines[-1], flush=True)
    return lines


def controls(blocks: int, drives: list[str]) -> list[str]:
    lines = ["| drive | absent blocks | at P > .9 | mean P |", "|---|---|---|---|"]
    for drive in drives:
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


LOOPS = (  # kind, control, delays of the edges in bins of 20 ms
    ("two", False, (1, 1)),
    ("two", False, (1, 3)),
    ("three", False, (1, 1, 1)),
    ("three", False, (1, 2, 3)),
    ("two", True, (1, 1)),
    ("three", True, (1, 1, 1)),
)


def loops(seeds: int) -> list[str]:
    """Cycles, also with unequal delays, and graphs without one whose regions are as correlated."""
    lines = [
        "| system | seed | edges with P | the others at most | edges found | absent at P > .9 | AUROC | radius "
        "| of the draws at most | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, control, delays in LOOPS:
        name = f"{kind}-region " + ("control" if control else "loop")
        if max(delays) > 1:
            name += f", delays {', '.join(map(str, delays))}"
        table, most = [], 0.0
        for seed in range(seeds):
            system = feedback_loop(kind, control=control, delays=delays, trials=8, seed=seed)
            posterior, seconds = sampled(system.recording, 40, 40)
            evidence = posterior["invariants"]["presence"].mean(("chain", "draw")).values
            there = system.truth["adjacency"].values
            absent = ~there & ~np.eye(len(there), dtype=bool)
            found, false = int((evidence[there] > 0.5).sum()), int((evidence[absent] > 0.9).sum())
            score = edge_auroc(evidence, there)
            fitted = float(posterior["invariants"]["spectral_radius"].max())
            table.append((found, there.sum(), false, absent.sum(), score))
            most = max(most, fitted)
            edges, shown = ", ".join(f"{p:.2f}" for p in evidence[there]), f"{score:.2f}" if absent.any() else "-"
            lines.append(
                f"| {name} | {seed} | {edges} | {evidence[absent].max(initial=0.0):.2f} | {found} of {there.sum()} "
                f"| {false} of {absent.sum()} | {shown} | {true_radius(system.truth):.3f} "
                f"| {fitted:.3f} | {seconds:.0f} |"
            )
            print(lines[-1], flush=True)
        counts, auroc = np.array(table)[:, :-1], np.array(table)[:, -1]
        found, edges, false, absent = counts.sum(0).astype(int)
        spread = f"{np.median(auroc):.2f}, {auroc.min():.2f}" if np.isfinite(auroc).all() else "-"
        lines.append(f"| **{name}** | all | | | {found} of {edges} | {false} of {absent} | {spread} | | {most:.3f} | |")
        print(lines[-1], flush=True)
    return lines


def true_radius(truth: xr.Dataset) -> float:
    """Spectral radius of the true system, its delays included."""
    lagged = truth["dynamics"].values
    lagged = lagged.reshape(-1, *lagged.shape[-2:])
    lags, size, _ = lagged.shape
    companion = np.vstack([np.hstack(list(lagged)), np.eye((lags - 1) * size, lags * size)])
    return float(np.abs(np.linalg.eigvals(companion)).max())


SESSIONS = {
    1: ("VISp", "LS", "MOs", "ACA"),
    4: ("LSr", "ACA", "TH", "DG"),
    8: ("PO", "ILA", "PL", "LP"),
    9: ("ORBm", "VISl", "CA1", "CA3"),
    12: ("MD", "SUB", "VISam", "VISp"),
    14: ("MOs", "ORB", "CA1", "RSP"),
}  # of Steinmetz et al. (2019), with the four named regions that have the most units


def shuffled(blocks: int) -> list[str]:
    """Real sessions whose regions have their trials shuffled, each by itself: every edge is false."""
    folder = Path(os.environ.get("PYRODYN_DATA", "../shared/data"))
    recordings = {number: session(folder, number, 15, 60, 0, regions) for number, regions in SESSIONS.items()}
    rounds = -(-blocks // sum(len(regions) * (len(regions) - 1) for regions in SESSIONS.values()))
    lines = [
        "| session | trials | blocks | at P > .9 | mean P | largest P | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    everything: dict[str, list[float]] = {"as recorded": [], "shuffled": []}
    for number, recording in recordings.items():
        kinds = {"as recorded": [recording], "shuffled": [shuffle_trials(recording, seed=i) for i in range(rounds)]}
        for kind, given in kinds.items():
            probability: list[float] = []
            began = time.perf_counter()
            for one in given:
                posterior, _ = sampled(one, 40, 40)
                probability += off_diagonal(posterior["invariants"]["presence"].mean(("chain", "draw")).values).tolist()
            everything[kind] += probability
            seconds = (time.perf_counter() - began) / len(given)
            lines.append(f"| {number} | {kind} | {counted(probability)} | {seconds:.0f} |")
            print(lines[-1], flush=True)
    return [*lines, *(f"| **all** | {kind} | {counted(found)} | |" for kind, found in everything.items())]


def counted(probability: list[float]) -> str:
    """Cells of a table: blocks, those above .9, mean and largest P."""
    found = np.array(probability)
    return f"{len(found)} | {int((found > 0.9).sum())} | {found.mean():.2f} | {found.max():.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS, help="of recovery")
    parser.add_argument("--blocks", type=int, default=200, help="absent blocks of each control")
    parser.add_argument("--drives", nargs="*", default=list(DRIVES), choices=DRIVES, help="of controls")
    parser.add_argument("--parts", nargs="*", default=["recovery", "controls", "loops"])
    parser.add_argument("--out", type=Path, default=Path("docs/tables/region_graphs.md"))
    options = parser.parse_args()
    made = {
        "recovery": ("Recovery", lambda: recovery(options.seeds, options.settings)),
        "ablation": ("Without the global latent", lambda: ablation(options.seeds)),
        "controls": ("Controls without coupling", lambda: controls(options.blocks, options.drives)),
        "loops": ("Loops", lambda: loops(options.seeds)),
        "shuffled": ("Real sessions with shuffled trials", lambda: shuffled(options.blocks)),
    }
    lines = ["# Graphs of regions", "", "Made by `python benchmarks/calibrate_region_graphs.py`.", ""]
    for part in options.parts:
        title, make = made[part]
        lines += [f"## {title}", "", *make(), ""]
        options.out.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
