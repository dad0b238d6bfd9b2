"""Any models of the zoo on one recording: one call, one table."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import xarray as xr

from pyrodyn.comparison.folds import KFold
from pyrodyn.comparison.future import LeaveFutureOut
from pyrodyn.comparison.loo import LOO
from pyrodyn.comparison.terms import LAPLACE, Candidate, Score, same_data
from pyrodyn.comparison.weights import model_weights
from pyrodyn.errors import ComparisonError
from pyrodyn.fitting import fit
from pyrodyn.inference.engine import Engine
from pyrodyn.posterior import model_of, recording_of
from pyrodyn.program import LatentModel, specification
from pyrodyn.recording import Recording

CLEAR = 2.0  # standard errors beyond which two estimates disagree


class ComparisonWarning(UserWarning):
    """The numbers stand in the table, and should not be compared as they are."""


class Method(Protocol):
    """An estimator: a frozen dataclass of options that scores one candidate at a time."""

    def score(self, candidate: Candidate, recording: Recording | None, seed: int) -> Score:
        """The candidate's score; ``recording`` where another one is scored than the one that was fitted."""
        ...


def compare(
    candidates: Mapping[str, xr.DataTree | LatentModel],
    recording: Recording | None = None,
    method: Method | Sequence[Method] | None = None,
    *,
    engine: Engine | None = None,
    seed: int = 0,
    models: Mapping[str, LatentModel] | None = None,
) -> xr.Dataset:
    """Compare models by how well they predict what they have not seen.

    Parameters
    ----------
    candidates : mapping of name to posterior or model
        Posteriors of one recording, from any engines; models are fitted first.
    recording : Recording, optional
        What models are fitted to. For held-out units or entries, what is predicted.
    method : one or several of `pyrodyn.comparison`, optional
        `LOO`, `KFold`, `LeaveFutureOut`, `HeldOutUnits`, `HeldOutEntries` or `Evidence`. By default `LOO` over trials;
        `KFold` for every candidate where one has a trial whose k-hat is too large; `LeaveFutureOut` for a single trial.
    engine : Engine, optional
        For candidates that are models.
    seed : int
    models : mapping of name to model, optional
        For posteriors of models that are not in `pyrodyn.models`.

    Returns
    -------
    xarray.Dataset
        Sorted by rank along ``model``: ``rank``, the score (``elpd``, ``log_evidence`` or ``bits_per_spike``) with its
        standard error ``se`` over trials (of an evidence: its Monte Carlo error), ``difference`` to the best and its
        standard error ``dse``, ``mc_error`` of the correction of Laplace evidences by particles, ``p_eff``,
        ``bad_k_share`` (share of terms with k-hat too large), ``weight_stacking``, ``weight_pseudo_bma``, ``seconds``
        of fit and score, the names ``estimator`` and ``likelihood``; and ``pointwise`` with ``k_hat`` for every term.
        With several methods, all along a dim ``criterion``. `as_table` gives the columns as a DataFrame.

    Raises
    ------
    ComparisonError
        Where a method does not apply: a single trial for `LOO`, no log likelihood, too few draws.

    Warns
    -----
    ComparisonWarning
        Where scores are not comparable (other data, densities beside probabilities, Laplace beside exact likelihoods),
        rest on importance weights of large k-hat, or contradict each other beyond their standard errors.
    """
    found = _candidates(candidates, recording, engine, seed, models or {})
    fitted_here = {name for name, item in candidates.items() if isinstance(item, LatentModel)}
    other = None if fitted_here == set(candidates) else recording
    if method is None:
        tables, complaints = _by_default(found, other, seed)
    else:
        methods = list(method) if isinstance(method, Sequence) else [method]
        tables, complaints = [], []
        for each in methods:
            table, said = _scored(found, each, other, seed)
            tables.append(table)
            complaints += said
    complaints += _contradictions(tables)
    complaints = list(dict.fromkeys(complaints))
    for complaint in complaints:
        warnings.warn(complaint, ComparisonWarning, stacklevel=2)
    table = tables[0] if len(tables) == 1 else _joined(tables)
    return table.assign_attrs(seed=seed, warnings=json.dumps(complaints))


def as_table(comparison: xr.Dataset) -> Any:
    """The columns of a comparison as a pandas.DataFrame, one row a model (and criterion), without what is pointwise."""
    rows = {"model", "criterion"}
    columns = [name for name, variable in comparison.data_vars.items() if set(variable.dims) <= rows]
    return comparison[columns].to_dataframe()


def _candidates(
    given: Mapping[str, xr.DataTree | LatentModel],
    recording: Recording | None,
    engine: Engine | None,
    seed: int,
    models: Mapping[str, LatentModel],
) -> list[Candidate]:
    if not isinstance(given, Mapping) or not given:
        raise ComparisonError(
            f"candidates must be a mapping of names to posteriors or models, such as {{'3 latents': posterior}}, got "
            f"{type(given).__name__ if given else given!r}"
        )
    found = []
    for name, item in given.items():
        if isinstance(item, LatentModel):
            if recording is None:
                raise ComparisonError(f"{name!r} is a model: say by recording=... what it is to be fitted to")
            found.append(Candidate(str(name), item, fit(item, recording, engine, seed=seed), recording))
        elif isinstance(item, xr.DataTree):
            model = models[name] if name in models else model_of(item)
            found.append(Candidate(str(name), model, item, recording_of(item)))
        else:
            raise ComparisonError(f"{name!r} must be a posterior (DataTree) or a model, got {type(item).__name__}")
    return found


def _by_default(found: list[Candidate], recording: Recording | None, seed: int) -> tuple[list[xr.Dataset], list[str]]:
    """LOO; K-fold for all where weights fail for one, since the two leave different numbers of trials out."""
    if all(candidate.recording.num_trials == 1 for candidate in found):
        table, complaints = _scored(found, LeaveFutureOut(), recording, seed)
        return [table], complaints
    table, complaints = _scored(found, LOO(), recording, seed)
    if (table["bad_k_share"] > 0.0).any():
        table, complaints = _scored(found, KFold(), recording, seed)
    return [table], complaints


def _scored(
    found: list[Candidate], method: Method, recording: Recording | None, seed: int
) -> tuple[xr.Dataset, list[str]]:
    scores, seconds = [], []
    for candidate in found:
        began = time.perf_counter()
        scores.append(method.score(candidate, recording, seed))
        seconds.append(candidate.fit_seconds + time.perf_counter() - began)
    complaints, comparable = _complaints(found, scores)
    table = _tabulated([c.name for c in found], scores, seconds, comparable)
    return table.assign_attrs(method=json.dumps(specification(method), default=str)), complaints


def _tabulated(names: list[str], scores: list[Score], seconds: list[float], comparable: bool) -> xr.Dataset:
    value = np.array([score.value for score in scores])
    order = np.argsort(-value, kind="stable")
    best = scores[order[0]]
    quantity = best.quantity if len({s.quantity for s in scores}) == 1 else "score"
    count = len(scores)
    unknown = np.full(count, np.nan)
    columns: dict[str, Any] = {
        "rank": np.argsort(order) if comparable else unknown,
        quantity: value,
        "se": np.array([_spread(s.pointwise, s.error) for s in scores]),
        "difference": value - value[order[0]] if comparable else unknown,
        "dse": np.array([_difference_error(s, best) for s in scores]) if comparable else unknown,
        "mc_error": np.array([score.error for score in scores]),
        "p_eff": np.array([score.p_eff for score in scores]),
        "bad_k_share": np.array([score.bad_share for score in scores]),
    }
    if comparable:
        columns |= _weights(scores)
    columns |= {
        "seconds": np.array(seconds),
        "estimator": np.array([score.estimator for score in scores]),
        "likelihood": np.array([score.likelihood for score in scores]),
    }
    table = xr.Dataset({name: ("model", column) for name, column in columns.items()}, coords={"model": names})
    if any(score.uncorrected is not None for score in scores):
        before = [s.value if s.uncorrected is None else float(s.uncorrected.sum()) for s in scores]
        table[f"{quantity}_uncorrected"] = ("model", np.array(before))
    for name in dict.fromkeys(name for score in scores for name in score.details):
        table[name] = xr.concat([score.details[name] for score in scores], "model")
    if comparable and len(best.pointwise) > 1:
        table["pointwise"] = (("model", best.dim), np.stack([score.pointwise for score in scores]))
        k_hats = [unknown_like(s.pointwise) if s.k_hat is None else s.k_hat for s in scores]
        table["k_hat"] = (("model", best.dim), np.stack(k_hats))
        table = table.assign_coords({best.dim: best.labels})
    return table.isel(model=order)


def unknown_like(values: np.ndarray) -> np.ndarray:
    return np.full(values.shape, np.nan)


def _spread(pointwise: np.ndarray, error: float) -> float:
    """Standard error of a sum over terms; of a single term, its Monte Carlo error."""
    count = len(pointwise)
    return math.sqrt(count) * float(pointwise.std(ddof=1)) if count > 1 else error


def _difference_error(score: Score, best: Score) -> float:
    if score is best:
        return 0.0
    return _spread(score.pointwise - best.pointwise, math.hypot(score.error, best.error))


def _weights(scores: list[Score]) -> dict[str, np.ndarray]:
    """Stacking and pseudo-BMA+ where scores split into terms; of evidences, probabilities under equal priors."""
    if len(scores[0].pointwise) > 1:
        stacking, pseudo = model_weights(np.stack([score.pointwise for score in scores]))
        return {"weight_stacking": stacking, "weight_pseudo_bma": pseudo}
    value = np.array([score.value for score in scores])
    share = np.exp(value - value.max())
    return {"probability": share / share.sum()}


def _complaints(found: list[Candidate], scores: list[Score]) -> tuple[list[str], bool]:
    """What should be known before these scores are compared, and whether they can be at all."""
    first, complaints, comparable = scores[0], [], True
    for candidate, score in zip(found, scores, strict=True):
        if not same_data(first.recording, score.recording):
            comparable = False
            complaints.append(
                f"{found[0].name!r} and {candidate.name!r} were not scored on the same data (trials, bins, units and "
                "observed entries), so that no difference is given; fit both to one recording"
            )
        elif score.quantity != first.quantity or not np.array_equal(score.labels, first.labels):
            comparable = False
            complaints.append(
                f"{found[0].name!r} has {first.quantity} of {len(first.labels)} {first.dim}s and {candidate.name!r} "
                f"{score.quantity} of {len(score.labels)} {score.dim}s: no difference is given"
            )
        if score.bad_share > 0.0:
            complaints.append(
                f"{candidate.name!r}: k-hat exceeds {score.good_k:.2f} in {100 * score.bad_share:.3g}% of the terms of "
                f"{score.estimator}, whose weights cannot be trusted; use method=comparison.KFold()"
            )
    gaussian = [bool(getattr(getattr(c.model, "readout", None), "is_gaussian", False)) for c in found]
    if first.quantity != "bits_per_spike" and len(set(gaussian)) > 1:
        complaints.append(
            "densities (Gaussian readout) stand beside probabilities (readouts of counts): their differences have no "
            "meaning; compare by method=comparison.HeldOutUnits(), or fit one kind of readout"
        )
    elif len({score.likelihood for score in scores}) > 1 and LAPLACE in {score.likelihood for score in scores}:
        kinds = ", ".join(f"{c.name!r} {s.likelihood}" for c, s in zip(found, scores, strict=True))
        complaints.append(
            f"the likelihoods are not of one kind ({kinds}), and a Laplace evidence of paths has an error that grows "
            "with the latents; let particles correct it: particles=comparison.Particles()"
        )
    return complaints, comparable


def _contradictions(tables: list[xr.Dataset]) -> list[str]:
    """Pairs of models that two estimates order differently, both beyond their standard errors."""
    views: list[tuple[str, xr.Dataset, str]] = []
    for table in tables:
        for name in ("elpd", "log_evidence", "bits_per_spike"):
            if name in table and not np.isnan(table["difference"]).any():
                views.append((_short(table), table, name))
                if f"{name}_uncorrected" in table:
                    views.append((f"{_short(table)} without particles", table, f"{name}_uncorrected"))
    said = []
    for i, (label, table, name) in enumerate(views):
        for other_label, other, other_name in views[:i]:
            for a, b in _pairs(table["model"].values):
                here, there = _clear(table, name, a, b), _clear(other, other_name, a, b)
                if here * there < 0:
                    better, worse = (a, b) if here > 0 else (b, a)
                    said.append(
                        f"{label} prefers {better!r} to {worse!r} beyond {CLEAR:g} SE, {other_label} the reverse"
                    )
    return said


def _pairs(names: Any) -> list[tuple[str, str]]:
    return [(str(a), str(b)) for i, a in enumerate(names) for b in names[:i]]


def _clear(table: xr.Dataset, name: str, a: str, b: str) -> int:
    """Sign of the score of a less that of b, zero where it lies within its standard error."""
    gap = float(table[name].sel(model=a) - table[name].sel(model=b))
    if "pointwise" in table:
        points = table["pointwise"]
        error = _spread((points.sel(model=a) - points.sel(model=b)).values, 0.0)
    else:
        error = float(np.hypot(table["se"].sel(model=a), table["se"].sel(model=b)))
    return int(np.sign(gap)) if abs(gap) > CLEAR * error else 0


def _short(table: xr.Dataset) -> str:
    return str(json.loads(table.attrs["method"])["class"])


def _joined(tables: list[xr.Dataset]) -> xr.Dataset:
    """Tables of several methods along a dim ``criterion``, models in the order of the first; pointwise values apart."""
    names = [_short(table) for table in tables]
    names = [f"{name} {names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)]
    order = tables[0]["model"].values
    parts: list[xr.Dataset] = []
    for table, name in zip(tables, names, strict=True):
        table = table.sel(model=order)
        apart = [str(v) for v in table.data_vars if set(table[v].dims) - {"model"}]
        parts.append(table.drop_vars(apart).drop_dims(set(table.dims) - {"model"}).expand_dims(criterion=[name]))
    joined: Any = xr.concat(parts, "criterion", join="outer", data_vars="all", combine_attrs="drop")
    return joined.assign_coords(criterion=np.array(names))
