"""A process that makes one fit of `select`: ``python -m pyrodyn.comparison._worker job.json``."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path


def run(path: Path) -> None:
    """Fit what the job says, with a checkpoint beside its output."""
    from pyrodyn.fitting import fit
    from pyrodyn.posterior import FitWarning, build_engine, build_model
    from pyrodyn.recording import Recording
    from pyrodyn.storage import load, save

    job = json.loads(path.read_text(encoding="utf-8"))
    recording = Recording.from_xarray(load(job["recording"]).to_dataset())
    output = Path(job["output"])
    checkpoint = output.with_suffix(".checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)  # they stand in the posterior, too
        posterior = fit(
            build_model(job["model"]), recording, build_engine(job["engine"]), seed=job["seed"], checkpoint=checkpoint
        )
    save(posterior, output)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
