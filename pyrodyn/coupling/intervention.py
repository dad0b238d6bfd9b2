r"""What would happen if a region fell silent or an edge were cut: surgery on a fitted system, not conditioning.

An intervention replaces structural equations, as Pyro's ``do`` replaces a site: what a region tells others is changed,
and nothing is inferred from the change. Of :math:`x_t = A x_{t-1} + b_t + \epsilon_t`, in every draw of the parameters,

- *silence* a region in some bins: the equations of its latents there become :math:`x^r_t = 0`, the state from which it
  tells the others nothing. What it was told, and its own innovations, are dropped;
- *cut* an edge: :math:`A_{rs} = 0` in all bins.

All other equations, and the innovations that enter them, stay as they are. Shared innovations, too: they come from
outside and reach the other regions also while one of them is silent.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyrodyn._recording_selection import by_time
from pyrodyn.coupling.system import Places, known_regions, read_places
from pyrodyn.distributions import Transition
from pyrodyn.errors import CouplingError
from pyrodyn.fitting import INTERVAL, same_units
from pyrodyn.inference import collapse
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.linalg.recursion import follow, spread
from pyrodyn.linalg.stationary import spectral_radius
from pyrodyn.posterior import FitWarning, model_of, parameters_of, recording_of, trial_batches
from pyrodyn.program import StateSpaceModel
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

GROWN = 10.0  # times as much activity in the end as in the beginning: draws with more are counted

Silence = str | Sequence[str] | Mapping[str, Any]


@runtime_checkable
class Steps(Protocol):
    """A model that says what the step of its path is made of."""

    def transition(self, parameters: Any, recording: Recording) -> Transition: ...


class Surgery(NamedTuple):
    """What is done to the structural equations."""

    held: Tensor  # (time, latent) bool: the latents that are zero
    cut: Tensor  # (latent, latent) bool: the entries of the dynamics that are zero
    unknown: np.ndarray  # (time, unit) bool: units of silent regions, of which nothing is said

    def dynamics(self, matrix: Tensor) -> Tensor:
        return torch.where(self.cut, 0.0, matrix)

    def unstable(self, matrix: Tensor) -> Tensor:
        """Whether activity under dynamics (*draw, latent, latent) grows more than `GROWN` while all silences hold."""
        lasting = len(self.held) if bool(self.cut.any()) else int(self.held.any(1).sum())
        left = torch.where(self.held.any(0), 0.0, self.dynamics(matrix))
        return lasting * spectral_radius(left).log() > math.log(GROWN)


def intervene(
    posterior: xr.DataTree,
    recording: Recording | None = None,
    *,
    silence: Silence = (),
    cut: Iterable[tuple[str, str]] = (),
    draws: int = 100,
    seed: int = 0,
) -> xr.Dataset:
    r"""Expected activity of all regions after silencing regions or cutting edges.

    With observations, the question is a counterfactual: the path of every trial is inferred from what was observed, its
    innovations are kept, and the same innovations run through the changed system. Without (``recording.blank()``), it
    is about new trials: the system starts in the equilibrium that it has when it is left alone, is then changed, and
    innovations are averaged over, in closed form.

    Parameters
    ----------
    posterior : xarray.DataTree
        From `fit` or `load`, of a model with coupled regions.
    recording : Recording, optional
        With the units of the posterior; that it was fitted to by default.
    silence : str, sequence of str, or mapping of str to bins
        Regions held silent, in all bins, or in those that a mapping gives: a slice in seconds with both ends included,
        times of bins, or a boolean array. The name of the shared latents, ``"global"``, stands for all that is common
        to regions.
    cut : iterable of (source, target)
        Edges that are cut. A source may be ``"global"``.
    draws : int
        Evenly thinned posterior draws, each with a draw of the path where that is inferred.
    seed : int

    Returns
    -------
    xarray.Dataset
        - ``expected``, the expected observation under the intervention, ``factual``, without it, and their difference
          ``effect``, each (trial, time, unit), means over draws, and each with the 90% interval over draws ``_lower``,
          ``_upper``. NaN for the units of a silent region: of a region that is told what to do, its units say nothing.
        - ``region_expected`` and ``region_factual`` (path_draw, time, target): means over trials and the units of a
          region, draw by draw.

        Attributes: ``silence`` and ``cut``, as JSON, ``innovations``, ``path_treatment``, and ``unstable_share``: in
        this share of the draws activity grows more than tenfold while the intervention lasts.

    Warns
    -----
    FitWarning
        Where ``unstable_share`` is not zero.

    Raises
    ------
    CouplingError
        Where the model has no linear steps, where a name is no region, or nothing is asked for.
    RecordingError
        Where units differ from the posterior's, or bins are not in the recording.

    Notes
    -----
    The state of silence is the latents' zero, about which the model is written: its rates are those of the offset. A
    baseline that should count as activity lost is not seen as lost by the other regions.

    The prior holds the whole system stable, and not what is left of it: a region may be what keeps others in check.
    Draws that say so count as any others, but they would carry a mean away, so that point values are medians.

    References
    ----------
    Pearl, *Causality*, 2nd edition, 2009, chapters 3 (surgery) and 7 (counterfactuals: abduction, action, prediction).
    """
    model = model_of(posterior)
    if not isinstance(model, StateSpaceModel) or not isinstance(model, Steps):
        raise CouplingError(
            f"posterior: was fitted with {type(model).__name__}, which has no linear step from bin to bin to change; "
            "fit models.MultiRegionLDS"
        )
    if not isinstance(draws, int) or draws < 1:
        raise CouplingError(f"draws: got {draws!r}; expected a whole number of 1 or more")
    recording = recording_of(posterior) if recording is None else recording
    same_units(posterior, recording)
    places = read_places(posterior)
    asked, edges = _asked(silence, places), _edges(cut, places)
    surgery = _surgery(asked, edges, places, recording)
    parameters = parameters_of(posterior, model, draws)
    inferred = recording.observations is not None
    summary, region_expected, region_factual = _Summary(), [], []
    with random_stream(seed), torch.no_grad(), numerics():
        dynamics = model.transition(parameters, recording.isel(trial=[0])).dynamics  # the same in all trials
        unstable = float(surgery.unstable(dynamics).double().mean())
        for part in trial_batches(recording, 2 * draws):
            transition = model.transition(parameters, part)
            if inferred:
                path = collapse(model).path_posterior(parameters, part).sample()
                both = [path, replay(transition, path, surgery)]
                readout = model.readout_law(parameters, path, part)
                pair = [readout.law.mean(readout.predict(one), readout.noise) for one in both]
            else:
                readout = collapse(model).factors(parameters, part)[1]
                start = transition.stationary()
                untouched = surgery._replace(held=torch.zeros_like(surgery.held), cut=torch.zeros_like(surgery.cut))
                pair = [forecast(start, readout, change) for change in (untouched, surgery)]
            factual, expected = (one.numpy() for one in pair)
            expected[..., surgery.unknown] = np.nan
            summary.add(expected=expected, factual=factual, effect=expected - factual)
            region_expected.append(_of_regions(expected, places))
            region_factual.append(_of_regions(factual, places))
    dims = ("trial", "time", "unit")
    found = xr.Dataset(
        {name: (dims, values) for name, values in summary.joined().items()}
        | {
            name: (("path_draw", "time", "target"), np.concatenate(parts, 1).mean(1))
            for name, parts in (("region_expected", region_expected), ("region_factual", region_factual))
        },
        coords={
            "trial": recording.trial,
            "time": recording.time,
            "unit": recording.unit,
            "region": ("unit", recording.region),
            "target": places.regions,
        },
        attrs={
            "silence": json.dumps(_told(asked, surgery, places, recording)),
            "cut": json.dumps(edges),
            "innovations": "inferred from the recording" if inferred else "averaged over, from equilibrium",
            "path_treatment": collapse(model).treatment if inferred else "integrated out exactly",
            "unstable_share": unstable,
        },
    )
    if unstable:
        warnings.warn(
            f"intervene: in {100.0 * unstable:.0f}% of the draws activity grows more than tenfold under the "
            "intervention; look at the intervals ..._lower and ..._upper, or ask for fewer bins",
            FitWarning,
            stacklevel=2,
        )
    found["expected"].attrs["units"] = "events per bin" if recording.counts else "units of the recording"
    return found


def _of_regions(values: np.ndarray, places: Places) -> np.ndarray:
    """Means over units, (draw, trial, time, region)."""
    return np.stack([values[..., places.units[name]].mean(-1) for name in places.regions], -1)


def replay(transition: Transition, path: Tensor, surgery: Surgery) -> Tensor:
    """The path (*draw, trial, time, latent) that the same shocks make in the changed system."""
    return follow(surgery.dynamics(transition.dynamics).squeeze(-3), transition.shocks(path), surgery.held)


def forecast(transition: Transition, readout: AffineReadout, surgery: Surgery) -> Tensor:
    """Expected observations (*draw, trial, time, unit) of the changed system, innovations averaged over."""
    dynamics = surgery.dynamics(transition.dynamics).squeeze(-3)
    # Sizes of draws and trials from the readout: without a drift nothing else tells trials apart.
    shocks = readout.path.new_zeros(*readout.batch_shape, *surgery.held.shape)
    if transition.drift is not None:
        shocks[..., 1:, :] = transition.drift
    mean = follow(dynamics, shocks, surgery.held)
    noise, initial = (part.squeeze(-3) for part in (transition.process_noise, transition.initial_covariance))
    covariance = spread(dynamics, noise, initial, surgery.held).unsqueeze(-4)
    variance = readout.spread(covariance)
    return readout.law.marginal_mean(readout.predict(mean), variance, readout.noise)


def _asked(silence: Silence, places: Places) -> dict[str, Any]:
    """Bins by name of the silent region; None for all bins."""
    if isinstance(silence, Mapping):
        found = {str(name): bins for name, bins in silence.items()}
    else:
        found = dict.fromkeys([silence] if isinstance(silence, str) else map(str, silence))
    known_regions("silence", list(found), list(places.latents))
    if set(places.regions) <= set(found):
        raise CouplingError(f"silence: names all regions, {', '.join(found)}; expected one that is left to look at")
    return found


def _edges(cut: Iterable[tuple[str, str]], places: Places) -> list[tuple[str, str]]:
    asked = [cut] if isinstance(cut, str) else list(cut)
    if any(isinstance(edge, str) or len(edge) != 2 for edge in asked):
        raise CouplingError(f"cut: got {cut!r}; expected pairs (source, target), such as [('V1', 'V2')]")
    edges = [(str(source), str(target)) for source, target in asked]
    known_regions("cut", [source for source, _ in edges], list(places.latents))
    known_regions("cut", [target for _, target in edges], places.regions)
    for source, target in edges:
        if source == target:
            raise CouplingError(f"cut: got ({source!r}, {target!r}), a region and itself; expected two regions")
    return edges


def _surgery(
    asked: Mapping[str, Any], edges: Sequence[tuple[str, str]], places: Places, recording: Recording
) -> Surgery:
    if not asked and not edges:
        raise CouplingError("silence, cut: nothing is asked for; expected regions to silence or edges to cut")
    size = sum(len(own) for own in places.latents.values())
    held = np.zeros((recording.num_bins, size), dtype=bool)
    unknown = np.zeros((recording.num_bins, recording.num_units), dtype=bool)
    for name, bins in asked.items():
        chosen = np.arange(recording.num_bins) if bins is None else by_time(bins, recording.time, recording.bin_width)
        if not len(chosen):
            raise CouplingError(
                f"silence: no bin of the recording lies in {bins!r}; its bins start from {recording.time[0]:g} to "
                f"{recording.time[-1]:g} s"
            )
        held[chosen[:, None], places.latents[name]] = True
        if name in places.units:
            unknown[chosen[:, None], places.units[name]] = True
    without = np.zeros((size, size), dtype=bool)
    for source, target in edges:
        without[places.latents[target][:, None], places.latents[source]] = True
    return Surgery(torch.from_numpy(held), torch.from_numpy(without), unknown)


def _told(asked: Mapping[str, Any], surgery: Surgery, places: Places, recording: Recording) -> dict[str, Any]:
    """For each silent region, "all bins" or the times of the bins."""
    held = {name: surgery.held[:, places.latents[name][0]].numpy() for name in asked}
    return {name: "all bins" if bins.all() else recording.time[bins].tolist() for name, bins in held.items()}


class _Summary:
    """Median and interval over draws (draw, trial, time, unit), batch by batch of trials."""

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {}

    def add(self, **drawn: np.ndarray) -> None:
        for name, values in drawn.items():
            lower, upper = np.quantile(values, INTERVAL, axis=0)
            for suffix, part in (("", np.median(values, 0)), ("_lower", lower), ("_upper", upper)):
                self.parts.setdefault(name + suffix, []).append(part)

    def joined(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self.parts.items()}
