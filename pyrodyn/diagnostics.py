"""Whether draws can be trusted: R-hat, nested R-hat, effective sample size, Pareto's k-hat."""

from __future__ import annotations

import math
from dataclasses import dataclass

import arviz_stats
import numpy as np
import xarray as xr

LARGEST_R_HAT = 1.05
LARGEST_K_HAT = 0.7
LEAST_WEIGHTED = 25  # draws from which a tail of weights can be fitted
LEAST_DRAWS = 4  # of a chain whose halves are compared
MOST_ENTRIES = 500  # of one variable that are looked at: thousands, as of a course in every unit, take seconds


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes
    ----------
    values : dict of float
        ``max_r_hat`` or ``max_nested_r_hat`` and ``min_bulk_ess`` for chains, ``k_hat`` for an approximation.
    complaints : tuple of str
        What a user has to act on.
    remarks : tuple of str
        What a user should know: kept with the posterior, without a warning.
    """

    values: dict[str, float]
    complaints: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def diagnose(invariants: xr.Dataset, stats: xr.Dataset, superchains: int | None = None) -> Diagnosis:
    """R-hat and effective sample size of the invariants for chains; k-hat of the weights p / q for an approximation.

    Parameters
    ----------
    invariants : Dataset, (chain, draw, ...)
        Of a variable with more than `MOST_ENTRIES` entries, as many are looked at, the same ones every time.
    stats : Dataset, (chain, draw)
        With ``lp`` and ``log_q`` where the draws are independent ones from a density q.
    superchains : int, optional
        The number of groups of consecutive chains that share a start: nested R-hat instead of R-hat.
    """
    if "log_q" in stats:
        return _of_weights(stats)
    name, function = ("max_r_hat", arviz_stats.rhat)
    groups = superchains or 1
    if invariants.sizes["draw"] < LEAST_DRAWS and not 1 < groups < invariants.sizes["chain"]:
        return Diagnosis({})
    if groups > 1:
        name, function = "max_nested_r_hat", lambda draws: nested_rhat(draws, groups)
    invariants = invariants.map(_some_entries)
    found: dict[str, float] = {}
    with np.errstate(all="ignore"):
        found[name] = worst = _extreme(function(invariants), np.max)
        if invariants.sizes["draw"] >= LEAST_DRAWS:
            found["min_bulk_ess"] = _extreme(arviz_stats.ess(invariants), np.min)
    values = {key: value for key, value in found.items() if math.isfinite(value)}
    if math.isnan(worst) or worst <= LARGEST_R_HAT:
        return Diagnosis(values)
    kind = "nested R-hat" if "nested" in name else "R-hat"
    return Diagnosis(values, (f"{kind} of the invariants reaches {worst:.2f}: raise warmup and draws",))


def effective_share(draws: np.ndarray) -> float:
    """Effective draws a draw behind means of (chain, draw, ...), on average over the rest; at most one."""
    if draws.shape[1] < LEAST_DRAWS:
        return 1.0
    series = xr.Dataset({"value": (("chain", "draw", "rest"), draws.reshape(*draws.shape[:2], -1))})
    with np.errstate(all="ignore"):
        found = float(np.nanmean(arviz_stats.ess(series, method="mean")["value"].values))
    return min(1.0, found / (draws.shape[0] * draws.shape[1])) if math.isfinite(found) else 1.0


def nested_rhat(draws: xr.Dataset, superchains: int) -> xr.Dataset:
    r"""Nested R-hat of every variable (chain, draw, ...), for many short chains in groups that share a start.

    .. math:: \sqrt{1 + B / W}

    with B the variance of the groups' means, and W the mean over groups of the variance of chain means and the mean
    variance within chains. Near one, the chains of all groups have forgotten where their group began, however short
    they are. Expect about :math:`1 + 1 / 2n` for n effective draws in a group.

    Parameters
    ----------
    draws : Dataset, (chain, draw, ...)
    superchains : int
        Groups of consecutive chains, at least two, all of one size.

    References
    ----------
    Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari & Gelman, Bayesian Analysis (2024).
    """

    def of_array(values: np.ndarray) -> np.ndarray:  # (..., chain, draw)
        grouped = values.reshape(*values.shape[:-2], superchains, -1, values.shape[-1])
        means = grouped.mean(-1)
        within = grouped.var(-1, ddof=1).mean(-1) if grouped.shape[-1] > 1 else np.zeros(means.shape[:-1])
        if means.shape[-1] > 1:
            within = within + means.var(-1, ddof=1)
        between, within = means.mean(-1).var(-1, ddof=1), within.mean(-1)
        rounding = (1e-12 * np.abs(values).max((-2, -1))) ** 2  # variances below it are zeros
        return np.sqrt(1.0 + np.where(between > rounding, between, 0.0) / np.where(within > rounding, within, 0.0))

    return xr.apply_ufunc(of_array, draws, input_core_dims=[["chain", "draw"]])


def _some_entries(variable: xr.DataArray) -> xr.DataArray:
    """A variable (chain, draw, ...), or `MOST_ENTRIES` of its entries, (chain, draw, one more)."""
    rest = [dim for dim in variable.dims if dim not in ("chain", "draw")]
    size = math.prod(variable.sizes[dim] for dim in rest)
    if size <= MOST_ENTRIES:
        return variable
    entry = f"entry of {variable.name}"
    chosen = np.sort(np.random.default_rng(0).choice(size, MOST_ENTRIES, replace=False))
    return xr.DataArray(variable.variable.stack({entry: rest})[{entry: chosen}])


def _extreme(found: xr.Dataset, choose) -> float:
    """The largest or smallest of all variables; those that cannot be computed, of constants, are left out."""
    values = np.concatenate([np.ravel(variable.values) for variable in found.data_vars.values()])
    values = values[~np.isnan(values)]
    return float(choose(values)) if len(values) else math.nan


def _of_weights(stats: xr.Dataset) -> Diagnosis:
    if "lp" not in stats or stats.sizes["draw"] < LEAST_WEIGHTED:
        return Diagnosis({})
    with np.errstate(all="ignore"):  # weights that underflow leave no tail to fit
        _, shape = (stats["log_q"] - stats["lp"]).azstats.psislw(dim=["chain", "draw"])
    value = float(shape)
    if not math.isfinite(value):
        return Diagnosis({})
    remark = f"k-hat {value:.2f} of the weights p / q: intervals of this approximation may be off; compare with HMC"
    return Diagnosis({"k_hat": value}, remarks=(remark,) if value > LARGEST_K_HAT else ())
