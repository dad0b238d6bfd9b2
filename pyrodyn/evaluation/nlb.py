r"""The scores of the Neural Latents Benchmark, as its own tools define them.

Co-smoothing and forward prediction are `bits_per_spike` of units, or bins, that the model did not see; all entries are
pooled. The others are regressions and correlations, each in a function of its own.

Reference: Pei et al., "Neural Latents Benchmark '21", NeurIPS Datasets and Benchmarks 2021.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV

from pyrodyn.scoring import bits_per_spike

PENALTIES = np.logspace(-4, 0, 9)


def nlb_scores(target: Mapping[str, Any], submission: Mapping[str, Any], *, timing: bool = False) -> dict[str, float]:
    """All scores that a target and a submission of the benchmark allow.

    Parameters
    ----------
    target : mapping
        Arrays under the benchmark's names: ``eval_spikes_heldout`` and, where they exist,
        ``eval_spikes_heldin_forward``, ``eval_spikes_heldout_forward``, ``train_behavior``, ``eval_behavior``,
        ``train_decode_mask``, ``eval_decode_mask``, ``psth``, ``eval_cond_idx``, ``eval_jitter``. An open HDF5 group
        will do.
    submission : mapping
        Predicted counts in events a bin: ``eval_rates_heldin``, ``eval_rates_heldout``, ``train_rates_heldin``,
        ``train_rates_heldout``, ``eval_rates_heldin_forward``, ``eval_rates_heldout_forward``, as far as they exist.
    timing : bool
        Whether behaviour holds produced intervals (the dataset DMFC_RSG), scored by `speed_correlation`, in place of a
        velocity.

    Returns
    -------
    dict of str to float
        "co-bps", "fp-bps", "vel R2" or "tp corr", "psth R2": those whose arrays are there.
    """
    found = {"co-bps": bits_per_spike(_of(submission, "eval_rates_heldout"), _of(target, "eval_spikes_heldout"))}
    rates = _units_together(submission, "eval_rates_{}")
    if timing and "eval_behavior" in target:
        found["tp corr"] = speed_correlation(
            rates, _of(target, "eval_behavior"), np.isnan(_of(target, "eval_spikes_heldout")[..., 0])
        )
    elif "eval_behavior" in target and "train_rates_heldin" in submission:
        masks = {
            f"{part}_mask": _of(target, f"{part}_decode_mask").astype(bool)
            for part in ("train", "eval")
            if f"{part}_decode_mask" in target
        }
        train = _units_together(submission, "train_rates_{}")
        found["vel R2"] = velocity_r2(
            train, _of(target, "train_behavior"), rates, _of(target, "eval_behavior"), **masks
        )
    if "psth" in target and "eval_cond_idx" in target:
        jitter = np.asarray(target["eval_jitter"][()]) if "eval_jitter" in target else None
        found["psth R2"] = psth_r2(rates, _of(target, "psth"), list(target["eval_cond_idx"][()]), jitter=jitter)
    if "eval_rates_heldin_forward" in submission and "eval_spikes_heldin_forward" in target:
        found["fp-bps"] = bits_per_spike(
            _units_together(submission, "eval_rates_{}_forward"), _units_together(target, "eval_spikes_{}_forward")
        )
    return found


def velocity_r2(
    train_rates: Any,
    train_velocity: Any,
    rates: Any,
    velocity: Any,
    *,
    train_mask: Any = None,
    eval_mask: Any = None,
) -> float:
    """R2 of behaviour decoded linearly from rates.

    A ridge regression on the training trials, its penalty chosen by five-fold cross-validation from 1e-4 to 1; bins
    whose behaviour is NaN are left out.

    Parameters
    ----------
    train_rates, rates : (trial, time, unit)
    train_velocity, velocity : (trial, time, behaviour)
        Already shifted by the lag between spikes and movement.
    train_mask, eval_mask : (trial, group) booleans, optional
        Trials of each group get a decoder of their own, and R2 is averaged over groups.

    Returns
    -------
    float
        Mean over the outputs of 1 - residual / total variance, on the evaluated trials.
    """
    train_rates, train_velocity = np.asarray(train_rates, np.float64), np.asarray(train_velocity, np.float64)
    rates, velocity = np.asarray(rates, np.float64), np.asarray(velocity, np.float64)
    train_groups = np.ones((len(train_rates), 1), bool) if train_mask is None else np.asarray(train_mask, bool)
    groups = np.ones((len(rates), 1), bool) if eval_mask is None else np.asarray(eval_mask, bool)
    if train_groups.shape[1] != groups.shape[1]:
        raise ValueError(
            f"train_mask and eval_mask must be (trial, group) with as many groups, got {train_groups.shape} and "
            f"{groups.shape}"
        )
    scores = []
    for train, test in zip(train_groups.T, groups.T, strict=True):
        decoder = GridSearchCV(Ridge(), {"alpha": PENALTIES})
        decoder.fit(*_rows("train_rates", train_rates[train], train_velocity[train]))
        scores.append(decoder.score(*_rows("rates", rates[test], velocity[test])))
    return float(np.mean(scores))


def psth_r2(rates: Any, psth: Any, conditions: Sequence[Any], *, jitter: Any = None) -> float:
    """R2 of trial-averaged predictions against peri-stimulus time histograms, averaged over units.

    Parameters
    ----------
    rates : (trial, time, unit)
    psth : (condition, time, unit)
        NaN in bins that do not count.
    conditions : for each condition the positions of its trials
        Conditions without trials are left out.
    jitter : (trial,) whole bins, optional
        By how many bins a trial is shifted later before the average.
    """
    rates, psth = np.asarray(rates, np.float64), np.asarray(psth, np.float64)
    shifts = np.zeros(len(rates), int) if jitter is None else np.asarray(jitter, int)
    true, predicted = [], []
    for wanted, members in zip(psth, conditions, strict=True):
        trials = np.asarray(members, int)
        if not trials.size:
            continue
        mean = np.mean([_shifted(rates[trial], int(shifts[trial])) for trial in trials], axis=0)
        counted = ~np.isnan(wanted[:, 0])
        if np.isnan(mean[counted]).any():
            raise ValueError("rates are NaN in bins where the psth is not; give predictions for all of them")
        true.append(wanted[counted])
        predicted.append(mean[counted])
    return float(r2_score(np.concatenate(true), np.concatenate(predicted)))


def speed_correlation(rates: Any, behaviour: Any, outside: Any) -> float:
    """Mean over conditions of Pearson's correlation between the speed of the rates and the produced interval.

    Parameters
    ----------
    rates : (trial, time, unit)
    behaviour : (trial, behaviour)
        The first three columns make the condition, the last one is the produced interval.
    outside : (trial, time) booleans
        Bins that do not belong to the interval.

    Notes
    -----
    The speed of a trial is the mean norm of the change of its rates from bin to bin.
    """
    rates, behaviour, inside = np.asarray(rates, np.float64), np.asarray(behaviour, np.float64), ~np.asarray(outside)
    speed = np.array(
        [np.linalg.norm(np.diff(trial[seen], axis=0), axis=1).mean() for trial, seen in zip(rates, inside, strict=True)]
    )
    labels = np.unique(behaviour[:, :3], axis=0)
    found = []
    for label in labels[~np.isnan(labels).all(1)]:
        members = (behaviour[:, :3] == label).all(1)
        found.append(pearsonr(speed[members], behaviour[members, -1])[0])
    return float(np.mean(found))


def _of(arrays: Mapping[str, Any], name: str) -> np.ndarray:
    return np.asarray(arrays[name][()], dtype=np.float64)


def _units_together(arrays: Mapping[str, Any], pattern: str) -> np.ndarray:
    return np.concatenate([_of(arrays, pattern.format(part)) for part in ("heldin", "heldout")], axis=-1)


def _rows(name: str, rates: np.ndarray, velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bins in which behaviour was measured, as rows."""
    rates, velocity = rates.reshape(-1, rates.shape[-1]), velocity.reshape(-1, velocity.shape[-1])
    kept = ~np.isnan(velocity[:, 0])
    if np.isnan(rates[kept]).any():
        raise ValueError(f"{name} holds NaN in bins where behaviour was measured; give predictions for all of them")
    return rates[kept], velocity[kept]


def _shifted(trial: np.ndarray, bins: int) -> np.ndarray:
    """A trial (time, unit) moved later by ``bins``, NaN where it leaves a gap."""
    if bins == 0:
        return trial
    gap = np.full((abs(bins), trial.shape[1]), np.nan)
    return np.concatenate([gap, trial[:-bins]] if bins > 0 else [trial[-bins:], gap])
