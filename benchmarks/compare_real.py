"""Real sessions: linear dynamics, dynamics that switch, coupled regions; which predicts what it has not seen?

Run `python benchmarks/compare_real.py` with PYRODYN_DATA set; it writes docs/tables/comparison_real.md, in about a
quarter of an hour on one core. Every session is one call of `compare` with two methods.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

import pandas as pd

import pyrodyn as dyn
from pyrodyn import inference, models
from pyrodyn.comparison import HeldOutUnits, KFold
from pyrodyn.demo import spikes_recording

TABLE = Path(__file__).resolve().parents[1] / "docs" / "tables" / "comparison_real.md"
DATA = Path(os.environ.get("PYRODYN_DATA", "../shared/data")) / "steinmetz2019_multiregion"
SESSIONS = ("session1", "session12")
UNITS, TRIALS, REGIONS = 60, 60, 2
HEADER = (
    "session",
    "regions, units",
    "model",
    "R-hat",
    "elpd",
    "to the best",
    "bits/spike",
    "to the best",
)
ENGINES = {
    models.SwitchingLDS: inference.Gibbs(draws=250, warmup=250, chains=4),
    models.MultiRegionLDS: inference.Gibbs(draws=150, warmup=250, chains=2),
}
CANDIDATES = {  # two latents a region in all of them; switching dynamics of one mode are linear dynamics
    "LDS": models.SwitchingLDS(1, 2 * REGIONS),
    "switching LDS": models.SwitchingLDS(2, 2 * REGIONS),
    "coupled regions": models.MultiRegionLDS(2, time_bumps=5),
}
FOLDED = KFold(3, refit=inference.Gibbs(draws=20, warmup=230, chains=2))
METHODS = [FOLDED, HeldOutUnits(groups=3, draws=40)]


def session(name: str) -> list[str]:
    whole = spikes_recording(DATA / f"{name}.npz", units=UNITS, trials=TRIALS, new_trials=0)
    regions = pd.Series(whole.region).value_counts().index[:REGIONS].tolist()
    recording = whole.sel(region=regions)
    began = time.perf_counter()
    fits = {n: dyn.fit(m, recording, ENGINES[type(m)], seed=0) for n, m in CANDIDATES.items()}
    table = dyn.compare(fits, method=METHODS)
    seconds = time.perf_counter() - began
    rows = []
    for model, posterior in fits.items():
        folds, units = (table.sel(model=model, criterion=method) for method in ("KFold", "HeldOutUnits"))
        mixing = json.loads(posterior.attrs["diagnostics"]).get("max_r_hat")
        cells = (
            name,
            f"{'/'.join(regions)}, {recording.num_units}",
            model,
            f"{mixing:.2f}",
            f"{float(folds['elpd']):.0f} ± {float(folds['se']):.0f}",
            f"{float(folds['difference']):+.1f} ± {float(folds['dse']):.1f}",
            f"{float(units['bits_per_spike']):.3f} ± {float(units['se']):.3f}",
            f"{float(units['difference']):+.3f} ± {float(units['dse']):.3f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    print("\n".join(rows), f"\n{seconds:.0f} s; warnings: {table.attrs['warnings']}", flush=True)
    return rows


TEXT = """# Real sessions

`PYRODYN_DATA=... python benchmarks/compare_real.py{sessions}` made this table, on one core in float64.
Steinmetz et al., Nature 576:266 (2019). The busiest units of two regions in {trials} trials of 20 bins; two latents a
region. One call of `compare` for each session, with the methods `{methods}`.

{fits}

- *R-hat*: the largest of all invariants, of short chains. Where it is far above one, as of the coupled regions, a score
  is of where the chains stood and not of the model.
- *elpd*: of trials that were left out in three folds, refitted, in nats; paths integrated out by particles, or by
  Laplace corrected by particles. SE over trials. Importance weights for leaving single trials out fail here: with
  as many parameters as there are, k-hat of the LDS is too large in three trials of four.
- *bits/spike*: each third of the units from the other two, in the trials of the fit; SE over trials.

Coupled regions have an input locked to the time of the trial, shared innovations, a global latent and a level of the
trial, none of which the others have; in these any latent may drive any unit.

| {header} |
|{lines}|
{rows}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", nargs="*", default=SESSIONS)
    names = parser.parse_args().sessions
    warnings.simplefilter("ignore", UserWarning)
    rows = [row for name in names for row in session(name)]
    fits = "\n".join(f"- {name}: `{model}`, `{ENGINES[type(model)]}`." for name, model in CANDIDATES.items())
    columns = {"header": " | ".join(HEADER), "lines": "|".join("---" for _ in HEADER)}
    given = "" if tuple(names) == SESSIONS else f" --sessions {' '.join(names)}"
    text = TEXT.format(
        sessions=given,
        trials=TRIALS,
        methods=METHODS,
        fits=fits,
        rows="\n".join(rows),
        **columns,
    )
    TABLE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
