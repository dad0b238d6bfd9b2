r"""How much of a known truth was found: rates, latents in both directions, forecasts, and where a flow spends its time.

.. math:: R^2 = \frac1K \sum_k 1 - \frac{\sum_i (y_{ik} - \hat y_{ik})^2}{\sum_i (y_{ik} - \bar y_k)^2}

over K columns, each about its own mean.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr


class LatentR2(NamedTuple):
    """Affine regressions between true and inferred latents, both ways.

    Attributes
    ----------
    true_from_inferred : float
        R2 of the true latents regressed on the inferred ones: what of the truth is in the fit. Superfluous dimensions
        do not lower it.
    inferred_from_true : float
        R2 of the inferred latents regressed on the true ones: what of the fit is truth. Superfluous dimensions do.
    """

    true_from_inferred: float
    inferred_from_true: float


def rate_r2(true: Any, inferred: Any) -> float:
    """R2 of inferred rates, averaged over units; arrays (trial, time, unit)."""
    return _r2(*_matched("true", _rows(true), "inferred", _rows(inferred)))


def latent_r2(true: Any, inferred: Any) -> LatentR2:
    """Both regressions between latents (trial, time, latent), of any two dimensions; see `LatentR2`."""
    x, y = _rows(true), _rows(inferred)
    if len(x) != len(y):
        raise ValueError(
            f"true has {np.shape(true)[:-1]} trials and bins, inferred {np.shape(inferred)[:-1]}; select the same"
        )
    return LatentR2(_r2(x, _regressed(y, x)), _r2(y, _regressed(x, y)))


def forecast_r2(true: Any, forecast: Any) -> xr.DataArray:
    """R2 of forecasts at each horizon, over trials and averaged over units.

    Parameters
    ----------
    true, forecast : (trial, time, unit)
        The forecast bins alone, the first one first.

    Returns
    -------
    xarray.DataArray, (horizon,)
        Its mean is the score that the attractors of `pyrodyn.systems` are compared by.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (true, forecast))
    if x.ndim != 3 or x.shape != y.shape:
        raise ValueError(f"true and forecast must be the same (trial, time, unit), got {x.shape} and {y.shape}")
    scores = [_r2(x[:, t], y[:, t]) for t in range(x.shape[1])]
    return xr.DataArray(scores, dims="horizon", coords={"horizon": np.arange(1, x.shape[1] + 1)}, name="forecast_r2")


def state_space_divergence(true: Any, model: Any, bins: int = 30) -> float:
    r"""Kullback-Leibler divergence of where two flows are, :math:`\sum_b p_b \log (p_b / q_b)` in nats.

    Parameters
    ----------
    true, model : (..., latent)
        States visited, in the same coordinates.
    bins : int
        In each dimension, over the range of ``true``; what lies beyond counts for the outermost bins.

    Notes
    -----
    Bins that only the truth visits would make it infinite: one visit is shared out among all bins of both histograms.

    References
    ----------
    After Koppe et al., PLoS Comput. Biol. 15:e1007263 (2019).
    """
    x, y = _rows(true), _rows(model)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"true has {x.shape[1]} latents and model {y.shape[1]}; both must lie in the same space")
    low, high = x.min(0), x.max(0)
    places = []
    for states in (x, y):
        place = ((states - low) / np.where(high > low, high - low, 1.0) * bins).astype(int).clip(0, bins - 1)
        flat = np.ravel_multi_index(tuple(place.T), (bins,) * x.shape[1])
        places.append(np.bincount(flat, minlength=bins ** x.shape[1]) + 1.0 / bins ** x.shape[1])
    p, q = (place / place.sum() for place in places)
    return float((p * np.log(p / q)).sum())


def _rows(values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return array.reshape(-1, array.shape[-1])


def _matched(first: str, x: np.ndarray, second: str, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.shape != y.shape:
        raise ValueError(f"{first} and {second} must have the same trials, bins and units, got {x.shape} and {y.shape}")
    return x, y


def _r2(wanted: np.ndarray, found: np.ndarray) -> float:
    total = np.square(wanted - wanted.mean(0)).sum(0)
    return float(np.mean(1.0 - np.square(wanted - found).sum(0) / total))


def _regressed(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    design = np.concatenate([source, np.ones((len(source), 1))], 1)
    return design @ np.linalg.lstsq(design, target, rcond=None)[0]
