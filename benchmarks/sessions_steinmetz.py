"""Three sessions of three mice in one hierarchical fit on spikes: what edges predict of held-out spikes.

Run `PYRODYN_DATA=<folder> python benchmarks/sessions_steinmetz.py`. Sessions 4, 8 and 12 of Steinmetz et al. (Nature
576:266, 2019) have VISp, CA1, DG and SUB in common. The busiest units of each region, 20 ms bins, 0 to 0.4 s from the
stimulus. Three fits by `inference.Gibbs` with the same seed and sizes: sessions pooled, each session alone, and no
edges at all. Scored on new trials: a quarter of the units from the others, and each region from all other regions.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

import pyrodyn as dyn
from pyrodyn import inference, models
from pyrodyn.scoring import BitsPerSpike, bits_per_spike_over_trials

NUMBERS = (4, 8, 12)
REGIONS = ("VISp", "CA1", "DG", "SUB")
DRAWS = 60  # of the globals in a prediction


def session(
    folder: Path, number: int, units: int, trials: int, new_trials: int, regions: Sequence[str] = REGIONS
) -> dyn.Recording:
    """The busiest units of every region; ``split`` is "train" and "test", interleaved."""
    with np.load(folder / "steinmetz2019_multiregion" / f"session{number}.npz", allow_pickle=False) as held:
        fine = held["spikes"].astype(np.int64)  # (trial, unit, 10 ms bin)
        areas, name = held["brain_area"].astype(str), f"{held['mouse']} {held['date']}"
    # Evenly over the session, a mouse tires; every so many for the test.
    chosen = np.linspace(0, len(fine) - 1, trials + new_trials).round().astype(int)
    fine = fine[chosen]
    test = np.zeros(len(fine), dtype=bool)
    test[np.linspace(0, len(fine) - 1, new_trials).round().astype(int)] = True
    count = fine[~test].sum((0, 2))
    kept = [np.flatnonzero(areas == region) for region in regions]
    busiest = np.sort(np.concatenate([own[np.argsort(-count[own], kind="stable")[:units]] for own in kept]))
    pairs = fine[:, busiest].reshape(len(fine), len(busiest), -1, 2).sum(-1)
    return dyn.Recording.from_arrays(
        pairs.transpose(0, 2, 1),
        bin_width=0.02,
        unit=busiest,
        region=areas[busiest],
        split=np.where(test, "test", "train"),
        session=name,
    )


def scores(posterior: xr.DataTree, recording: dyn.Recording) -> dict[str, BitsPerSpike]:
    """Bits per spike of hidden units, and of hidden regions, in the new trials."""
    train, test = recording.sel(split="train"), recording.sel(split="test")
    observed = test.to_xarray()["observations"]
    null = np.maximum(train.to_xarray()["observations"].mean(("trial", "time")).values, 1e-3)

    def predicted(hidden: list) -> xr.DataArray:
        parts = [dyn.predict(posterior, test.hide(unit=own), draws=DRAWS)["expected"].sel(unit=own) for own in hidden]
        return xr.concat(parts, "unit").sel(unit=observed["unit"])

    quarters = [recording.unit[i::4] for i in range(4)]
    regions = [recording.unit[recording.region == region] for region in REGIONS]
    return {
        "units": bits_per_spike_over_trials(predicted(quarters), observed, null=null),
        "regions": bits_per_spike_over_trials(predicted(regions), observed, null=null),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=15)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--new-trials", type=int, default=40)
    parser.add_argument("--sweeps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("docs/tables/sessions.md"))
    options = parser.parse_args()
    warnings.simplefilter("ignore", dyn.FitWarning)
    folder = Path(os.environ.get("PYRODYN_DATA", "../shared/data"))
    recordings = {
        f"session {number}": session(folder, number, options.units, options.trials, options.new_trials)
        for number in NUMBERS
    }
    train = {name: recording.sel(split="train") for name, recording in recordings.items()}
    engine = inference.Gibbs(draws=options.sweeps, warmup=options.sweeps, chains=2)
    model = models.MultiRegionLDS(2, time_bumps=6)
    bare = models.MultiRegionLDS(2, time_bumps=6, edges=())
    began = time.perf_counter()
    pooled = dyn.fit(model, train, engine, seed=0)
    seconds = time.perf_counter() - began
    print(f"pooled fit: {seconds:.0f} s", flush=True)
    fits = {
        "pooled": {name: pooled[f"sessions/{name}"] for name in train},
        "alone": {name: dyn.fit(model, own, engine, seed=0) for name, own in train.items()},
        "no edges": {name: dyn.fit(bare, own, engine, seed=0) for name, own in train.items()},
    }
    found = {
        kind: {name: scores(tree, recordings[name]) for name, tree in trees.items()} for kind, trees in fits.items()
    }
    first = next(iter(train.values()))
    lines = [
        "# Three sessions in one fit",
        "",
        "Made by `python benchmarks/sessions_steinmetz.py`: Steinmetz et al. (2019), sessions 4, 8 and 12, three mice,",
        f"{', '.join(REGIONS)}, {options.units} units each, {first.num_trials} trials of {first.num_bins} bins of",
        f"20 ms; `Gibbs(draws={options.sweeps}, warmup={options.sweeps}, chains=2)`; the pooled fit took",
        f"{seconds:.0f} s on one core beside another job.",
        f"Bits per spike above each unit's mean rate in {options.new_trials} new trials, with standard errors over",
        "trials; differences are paired. Chains are short, one seed: probabilities of edges are a first look.",
        "",
        "| session | hidden | pooled | alone | no edges | pooled less no edges | pooled less alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in train:
        for hidden in ("units", "regions"):
            pooled_score, alone, without = (found[kind][name][hidden] for kind in ("pooled", "alone", "no edges"))
            cells = [pooled_score, alone, without, pooled_score - without, pooled_score - alone]
            lines.append(
                f"| {name} | {hidden} | " + " | ".join(str(c).replace(" bits/spike", "") for c in cells) + " |"
            )
    graph = dyn.coupling_graph(pooled)
    rate, size = (pooled["posterior"][name].mean(("chain", "draw")) for name in ("edge_rate", "edge_size"))
    lines += [
        "",
        "Edges: the share of sessions that have it (posterior mean; its prior mean is .5), the root mean square of its",
        "block's norm, and the probability that it is there in each session.",
        "",
        "| edge | share of sessions | size | " + " | ".join(train) + " |",
        "|---" * (3 + len(train)) + "|",
    ]
    for target in rate["target"].values:
        for source in rate["source"].values:
            if source != target:
                at = {"target": target, "source": source}
                own = " | ".join(f"{float(graph['probability'].sel(session=name, **at)):.2f}" for name in train)
                lines.append(
                    f"| {source} -> {target} | {float(rate.sel(at)):.2f} | {float(size.sel(at)):.2f} | {own} |"
                )
    options.out.write_text("\n".join([*lines, ""]))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
