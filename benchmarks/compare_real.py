"""Real sessions: one latent system for all units, regions apart, regions coupled; which predicts what it has not seen?

Run `python benchmarks/compare_real.py` with PYRODYN_DATA set; it writes docs/tables/comparison_real.md, in about four
minutes on one core. Every session is one call of `compare` with two methods.
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
from pyrodyn.comparison import LOO, HeldOutUnits
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
    "bad k-hat",
    "bits/spike",
    "to the best",
)
ENGINES = {
    models.LDS: inference.SVI(steps=150, draws=400),
    models.MultiRegionLDS: inference.Gibbs(draws=100, warmup=100, chains=2),
}
CANDIDATES = {  # two latents a region in all of them
    "LDS": models.LDS(2 * REGIONS),
    "regions apart": models.MultiRegionLDS(2, time_bumps=5, edges=()),
    "regions coupled": models.MultiRegionLDS(2, time_bumps=5),
}


def session(name: str) -> list[str]:
    whole = spikes_recording(DATA / f"{name}.npz", units=UNITS, trials=TRIALS, new_trials=0)
    regions = pd.Series(whole.region).value_counts().index[:REGIONS].tolist()
    recording = whole.sel(region=regions)
    began = time.perf_counter()
    fits = {n: dyn.fit(m, recording, ENGINES[type(m)], seed=0) for n, m in CANDIDATES.items()}
    table = dyn.compare(fits, method=[LOO(), HeldOutUnits(groups=3, draws=40)])
    seconds = time.perf_counter() - began
    rows = []
    for model, posterior in fits.items():
        loo, units = (table.sel(model=model, criterion=method) for method in ("LOO", "HeldOutUnits"))
        mixing = json.loads(posterior.attrs["diagnostics"]).get("max_r_hat")
        cells = (
            name,
            f"{'/'.join(regions)}, {recording.num_units}",
            model,
            "-" if mixing is None else f"{mixing:.2f}",
            f"{float(loo['elpd']):.0f} ± {float(loo['se']):.0f}",
            f"{float(loo['difference']):+.1f} ± {float(loo['dse']):.1f}",
            f"{float(loo['bad_k_share']):.0%}",
            f"{float(units['bits_per_spike']):.3f} ± {float(units['se']):.3f}",
            f"{float(units['difference']):+.3f} ± {float(units['dse']):.3f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    print("\n".join(rows), f"\n{seconds:.0f} s; warnings: {table.attrs['warnings']}", flush=True)
    return rows


TEXT = """# Real sessions

`PYRODYN_DATA=... python benchmarks/compare_real.py` (one core, float64) made this table: Steinmetz et al., Nature
576:266 (2019). The busiest units of two regions in {trials} trials of 20 bins; two latents a region. LDS by `SVI`,
regions by `Gibbs`, in short runs. R-hat near two, and k-hat above its bound in so many trials, say that these numbers
are a first look and not a finding; `compare` warns of it.

- *elpd*: PSIS-LOO over trials in nats, paths integrated out and corrected by particles; SE over trials.
- *bits/spike*: each third of the units from the other two, in the trials of the fit; SE over trials.

Regions, apart and coupled, have an input locked to the time of the trial, shared innovations, a global latent and a
level of the trial, none of which the LDS has; in the LDS any latent may drive any unit.

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
    text = TEXT.format(
        trials=TRIALS, rows="\n".join(rows), header=" | ".join(HEADER), lines="|".join("---" for _ in HEADER)
    )
    TABLE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
