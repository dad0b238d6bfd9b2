"""Weights of models by their pointwise scores: stacking, and pseudo-BMA with a Bayesian bootstrap."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import arviz_stats
import numpy as np
import xarray as xr
from arviz_stats.utils import ELPDData


def model_weights(pointwise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights by stacking and by pseudo-BMA+, each (model,), from pointwise scores (model, term).

    Reference: Yao, Vehtari, Simpson & Gelman, Bayesian Anal. 13:917 (2018).
    """
    models = len(pointwise)
    if models == 1:
        return np.ones(1), np.ones(1)
    # Weights depend on differences alone, and exp() of the log density of a whole trial would be zero.
    differences = pointwise - pointwise.max(0)
    scores = {str(i): _as_elpd(row) for i, row in enumerate(differences)}
    found = []
    for method in ("stacking", "BB-pseudo-BMA"):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of pandas, on arviz's way of sorting; k-hat is reported beside
            table: Any = arviz_stats.compare(scores, method=method, **_EXACT)
        found.append(np.array([float(table.loc[str(i), "weight"]) for i in range(models)]))
    return found[0], found[1]


def _as_elpd(differences: np.ndarray) -> ELPDData:
    terms = xr.DataArray(differences, dims="term")
    spread = float(np.sqrt(len(differences) * differences.var()))
    return ELPDData(
        "loo",
        float(differences.sum()),
        spread,
        0.0,
        1,
        len(differences),
        "log",
        False,
        0.7,
        terms,
        xr.zeros_like(terms),
    )


# Newer versions of ArviZ round by default.
_EXACT = {"round_to": "none"} if "round_to" in inspect.signature(arviz_stats.compare).parameters else {}
