"""The posterior of a directed graph of regions: one Dataset with every measure of every edge, draw by draw."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from pyrodyn.coupling.measures import blocks, impulse_responses, variance_shares
from pyrodyn.coupling.presence import checked_prior, mean_log_odds, savage_dickey
from pyrodyn.coupling.spectra import granger_geweke
from pyrodyn.coupling.system import SHARED_INNOVATIONS, System, dynamics_of, read_system
from pyrodyn.errors import CouplingError
from pyrodyn.posterior import SESSIONS

FREQUENCIES = 33  # from zero to the Nyquist frequency
ROPE = 0.05  # such a block makes at most 1 / 400 of the variance of a latent in the next bin
EDGE = ("chain", "draw", "target", "source")
CONDITIONAL_ODDS = "conditional on the other edges of every draw, the likelihood of the dynamics taken as quadratic"


def coupling_graph(
    posterior: xr.DataTree,
    *,
    lags: int = 20,
    frequencies: Sequence[float] | None = None,
    edge_prior_sd: float | np.ndarray | None = None,
    edge_prior_probability: float | np.ndarray | None = None,
    rope: float = ROPE,
) -> xr.Dataset:
    r"""Posterior of the graph of regions, each edge with its strength, share, presence, subspace, gain and spectrum.

    Every number is computed for each draw and stays the same under any invertible change of a region's latent
    coordinates. With :math:`x_t = A x_{t-1} + e_t`, e of covariance Q, and :math:`\Sigma = A \Sigma A^\top + Q`, the
    edge from source s into target r has

    .. math:: B_{rs} = \Sigma_r^{-1/2} A_{rs} \Sigma_s^{1/2}, \qquad \mathrm{strength} = \lVert B_{rs} \rVert_F .

    Parameters
    ----------
    posterior : xarray.DataTree
        From `fit` with a model of several regions. Its group ``posterior`` holds ``dynamics`` (latent, latent_from),
        ``process_noise``, ``loading`` (unit, latent), the coordinate ``latent_region`` (latent), and, where the model
        has them, ``innovation_loading`` (latent, shared) and ``presence`` (target, source). Of a fit of several
        sessions, the dataset has the dim ``session`` and what sessions share (see `pyrodyn.sessions`); regions that a
        session lacks are NaN, and patterns over units are left out. Of dynamics that switch, it has the dim ``mode``:
        a graph for each mode, as if that mode went on for ever. ``graph.sel(mode=0)`` is what pictures and
        `to_networkx` take.
    lags : int
        Bins over which a response to a kick is followed.
    frequencies : sequence of float, optional
        In Hz, between zero and half the sampling rate; by default 33 over that range.
    edge_prior_sd, edge_prior_probability : float or (target, source), optional
        The prior of an edge's entries and of its presence, for `savage_dickey`; by default the posterior's attributes
        of these names. Only used without a variable ``presence``.
    rope : float
        Half the width of the region of practical equivalence: strengths up to it count as none.

    Returns
    -------
    xarray.Dataset
        - ``strength`` (chain, draw, target, source): dimensionless; the diagonal is a region's hold on itself.
        - ``variance_share`` (chain, draw, target, origin): share of the target's variance that stems from the noise of
          each region, of ``global``, and of ``shared innovations``; sums to one.
        - ``probability`` (target, source): that the edge is there; the attribute ``estimator`` says from what. Under
          a continuous prior, a horseshoe, no edge is ever quite absent, and this is ``exceeds_rope``.
        - ``exceeds_rope`` (target, source): the probability that the strength is above ``rope``, an attribute.
        - ``presence`` (chain, draw, target, source): 0 or 1, where the model sampled it.
        - ``log_odds`` (target, source): log odds of the mean over draws of an edge's probability given all other edges
          of the draw, where the engine told it. What is present in every draw, or in none, is so told apart; it is
          approximate, and a probability that draws can resolve is better read off ``probability``.
        - ``singular_values`` (..., target, source, rank), ``source_pattern`` (chain, draw, target, rank, unit) and
          ``target_pattern`` (chain, draw, source, rank, unit): the communication subspace, shown in the readout.
        - ``impulse_response`` (..., target, source, lag), of the edge alone, and ``impulse_response_total``, through
          all paths: mean linear predictor of the target's units after a kick of one standard deviation.
        - ``granger_geweke`` (..., target, source, frequency), conditional on all other latents, in nats, and
          ``granger`` (..., target, source), its mean over frequencies.

        Coordinates: regions, ``lag`` in seconds, ``frequency`` in Hz, ``target_units`` and ``target_latents`` (target).
        Draws with unstable dynamics are NaN; the attribute ``unstable_draws`` counts them.

    Raises
    ------
    CouplingError
        Where the posterior has no linear dynamics, fewer than two regions, or no stable draw, or an option is out of
        range.

    See Also
    --------
    pyrodyn.coupling.measures, pyrodyn.coupling.spectra, pyrodyn.coupling.presence : the equations and their sources.
    """
    graph_of = functools.partial(
        coupling_graph,
        lags=lags,
        frequencies=frequencies,
        edge_prior_sd=edge_prior_sd,
        edge_prior_probability=edge_prior_probability,
        rope=rope,
    )
    if isinstance(posterior, xr.DataTree) and SESSIONS in posterior.children:
        return _of_sessions(posterior, graph_of)
    if "mode" in dynamics_of(posterior).dims:
        return _of_modes(posterior, graph_of)
    system = read_system(posterior)
    if isinstance(rope, bool) or not isinstance(rope, int | float) or not 0.0 <= rope < np.inf:
        raise CouplingError(f"rope: got {rope!r}; expected a strength of 0 or more, such as {ROPE:g}")
    if not isinstance(lags, int) or lags < 1:
        raise CouplingError(f"lags: got {lags!r}; expected a whole number of bins, at least 1")
    hertz = _frequencies(frequencies, system.bin_width)
    strength, singular_values, source_pattern, target_pattern = blocks(system)
    direct, total = impulse_responses(system, lags)
    causality, spectrum = granger_geweke(
        system.dynamics, system.process_noise, system.region_latents, hertz * system.bin_width
    )
    found: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        "strength": (EDGE, strength),
        "variance_share": (("chain", "draw", "target", "origin"), variance_shares(system)),
        "singular_values": ((*EDGE, "rank"), singular_values),
        "source_pattern": (("chain", "draw", "target", "rank", "unit"), source_pattern),
        "target_pattern": (("chain", "draw", "source", "rank", "unit"), target_pattern),
        "impulse_response": ((*EDGE, "lag"), direct),
        "impulse_response_total": ((*EDGE, "lag"), total),
        "granger": (EDGE, causality),
        "granger_geweke": ((*EDGE, "frequency"), spectrum),
    }
    variables: dict[str, Any] = {name: (dims, system.blot(values)) for name, (dims, values) in found.items()}
    priors = (edge_prior_sd, edge_prior_probability)
    exceeds = (strength > rope)[system.stable].mean(0)
    variables["exceeds_rope"] = (EDGE[2:], exceeds, {"rope": float(rope)})
    if _attribute(posterior, "edge_prior", plain=True) == "horseshoe":
        presence, probability = None, np.where(np.eye(len(exceeds), dtype=bool), 1.0, exceeds)
        estimator = f"share of the draws with a strength above {rope:g}, the prior being continuous"
    else:
        presence, probability, estimator = _presence(posterior, system, priors)
    if presence is not None:
        variables["presence"] = (EDGE, presence)
    variables["probability"] = (EDGE[2:], probability, {"estimator": estimator})
    told = posterior.children.get("sample_stats", {})
    if "edge_log_odds" in told:
        odds = told["edge_log_odds"].sel(target=system.regions, source=system.regions).transpose(*EDGE).values
        variables["log_odds"] = (EDGE[2:], mean_log_odds(odds), {"estimator": CONDITIONAL_ODDS})
    draws = posterior["posterior"].to_dataset()
    unit_region = np.empty(len(system.unit), dtype=object)
    for name in system.regions:
        unit_region[system.units[name]] = name
    kept = np.array([name is not None for name in unit_region])
    graph = xr.Dataset(
        variables,
        coords={
            "chain": draws["chain"].values,
            "draw": draws["draw"].values,
            "target": system.regions,
            "source": system.regions,
            "origin": [*system.regions, system.global_name, SHARED_INNOVATIONS],
            "rank": np.arange(singular_values.shape[-1]),
            "unit": system.unit,
            "region": ("unit", np.where(kept, unit_region, "").astype(str)),
            "lag": ("lag", np.arange(1, lags + 1) * system.bin_width, {"units": "s"}),
            "frequency": ("frequency", hertz, {"units": "Hz"}),
            "target_units": ("target", [len(system.units[name]) for name in system.regions]),
            "target_latents": ("target", [len(own) for own in system.region_latents]),
        },
        attrs={
            "bin_width": system.bin_width,
            "unstable_draws": int((~system.stable).sum()),
            "global_name": system.global_name,
        },
    )
    return graph.isel(unit=kept)


def _of_sessions(posterior: xr.DataTree, graph_of: Callable[[xr.DataTree], xr.Dataset]) -> xr.Dataset:
    """The graph of every session, one beside the other, and what they share."""
    shared = posterior["posterior"].to_dataset()
    sessions = posterior.children[SESSIONS].children
    found = [graph_of(session).drop_dims("unit") for session in sessions.values()]
    joined = xr.concat(found, xr.DataArray(list(sessions), dims="session", name="session"), join="outer")
    return joined.merge(shared, join="outer", combine_attrs="override")


def _of_modes(posterior: xr.DataTree, graph_of: Callable[[xr.DataTree], xr.Dataset]) -> xr.Dataset:
    """The graph of every mode, one beside the other."""
    modes = np.arange(posterior["posterior"].sizes["mode"])
    found = [graph_of(posterior.isel(mode=k)) for k in modes]
    joined = xr.concat(
        [graph.drop_vars("mode", errors="ignore") for graph in found],
        xr.DataArray(modes, dims="mode", name="mode"),
        combine_attrs="override",
    )
    return joined.assign_attrs(unstable_draws=sum(graph.attrs["unstable_draws"] for graph in found))


def _frequencies(asked: Sequence[float] | None, bin_width: float) -> np.ndarray:
    highest = 0.5 / bin_width
    if asked is None:
        return np.linspace(0.0, highest, FREQUENCIES)
    hertz = np.atleast_1d(np.asarray(asked, dtype=float))
    if hertz.ndim != 1 or not len(hertz) or not np.all((hertz >= 0.0) & (hertz <= highest * (1.0 + 1e-12))):
        raise CouplingError(
            f"frequencies: got {asked!r}; expected numbers in Hz from 0 to {highest:g}, half the sampling rate of "
            f"bins of {bin_width:g} s"
        )
    return hertz


def _presence(
    posterior: xr.DataTree, system: System, priors: tuple[Any, Any]
) -> tuple[np.ndarray | None, np.ndarray, str]:
    """Draws of presence, their probability (target, source), and the estimator's name."""
    draws = posterior["posterior"].to_dataset()
    if "presence" in draws:
        chosen = draws["presence"]
        if all(dim in chosen.coords for dim in EDGE[2:]):
            chosen = chosen.sel(target=system.regions, source=system.regions)
        presence = chosen.transpose(*EDGE).values.astype(np.int8)
        return presence, presence.mean((0, 1)), "share of the draws that have the edge"
    kept = _attribute(posterior, "edge_prior", plain=True) == "normal"  # no edge is ever absent, whoever sampled
    if not kept and json.loads(posterior.attrs.get("notes", "{}")).get("atoms") == "sampled":
        places = system.region_latents
        blocks = [[system.dynamics[..., t[:, None], s] for s in places] for t in places]
        there = np.stack([np.stack([(b != 0.0).any((-2, -1)) for b in row], -1) for row in blocks], -2)
        return there.astype(np.int8), there.mean((0, 1)), "share of the draws that have the edge"
    names = ("edge_prior_sd", "edge_prior_probability")
    sd, prior = (
        _attribute(posterior, name) if given is None else given for name, given in zip(names, priors, strict=True)
    )
    count = len(system.regions)
    probability = np.full((count, count), np.nan)
    if sd is None or prior is None:
        return None, probability, f"none: the posterior has neither presence nor the attributes {' and '.join(names)}"
    sd, prior = checked_prior(names, (sd, prior), (count, count))
    raw = draws["dynamics"].transpose("chain", "draw", "latent", "latent_from").values
    for r, target in enumerate(system.regions):
        for s, source in enumerate(system.regions):
            block = system.block(raw, target, source)
            if r == s:
                probability[r, s] = 1.0
            elif not block.any():
                probability[r, s] = 0.0  # left out of the structure
            else:
                probability[r, s] = savage_dickey(block, sd[r, s], prior[r, s])
    return None, probability, "Savage-Dickey ratio, posterior density at zero taken as normal"


def _attribute(posterior: xr.DataTree, name: str, plain: bool = False) -> Any:
    """From the group or the root: a word, or a number or an array of numbers, which files keep as JSON."""
    value = posterior["posterior"].attrs.get(name, posterior.attrs.get(name))
    return json.loads(value) if isinstance(value, str) and not plain else value
