"""Edges in a few numbers each, over the draws that are stable."""

from __future__ import annotations

from collections.abc import Sequence

import arviz_stats
import xarray as xr

from pyrodyn.coupling.system import known_regions
from pyrodyn.errors import CouplingError

SAMPLE = ("chain", "draw")


def checked(graph: xr.Dataset, needed: Sequence[str] = ("strength",)) -> list[str]:
    """Names of the regions of what `coupling_graph` returned; anything else is refused."""
    lacking = [name for name in needed if not isinstance(graph, xr.Dataset) or name not in graph]
    if lacking:
        raise CouplingError(
            f"graph: got {type(graph).__name__} without {', '.join(map(repr, lacking))}; pass what "
            "coupling_graph(posterior) returned"
        )
    for dim in graph["strength"].dims:
        if dim not in (*SAMPLE, "target", "source"):
            raise CouplingError(
                f"graph: holds {graph.sizes[dim]} graphs, one for each {dim}; pass one of them, graph.isel({dim}=0)"
            )
    return [str(name) for name in graph["target"].values]


def probability_of(name: str, value: float) -> float:
    """A number strictly between zero and one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
        raise CouplingError(f"{name}: got {value!r}; expected a number strictly between 0 and 1, such as 0.9")
    return float(value)


def edge_of(name: str, edge: tuple[str, str], regions: Sequence[str]) -> dict[str, str]:
    """The place (source, target) of an edge given as a pair of names."""
    if isinstance(edge, str) or len(edge) != 2:
        raise CouplingError(f"{name}: got {edge!r}; expected a pair (source, target) such as ('V1', 'V2')")
    known_regions(name, edge, regions)
    if edge[0] == edge[1]:
        raise CouplingError(f"{name}: got {edge!r}, a region and itself; expected two different regions")
    return {"source": edge[0], "target": edge[1]}


def edge_table(graph: xr.Dataset, hdi_prob: float = 0.9) -> xr.Dataset:
    """Summary of every edge (target, source).

    Parameters
    ----------
    graph : xarray.Dataset
        From `coupling_graph`.
    hdi_prob : float
        Probability of the highest-density interval.

    Returns
    -------
    xarray.Dataset
        ``mean``, ``sd``, ``hdi_low``, ``hdi_high`` of the strength; ``share``, the mean share of the target's variance
        that stems from the source's own noise; ``p_present``, NaN where unknown; ``log_odds`` of that where the graph
        has them; ``p_rope``, the probability that the strength exceeds the graph's region of practical equivalence;
        ``gain``, the mean of the summed direct impulse response; ``p_sign``, the probability that it is positive, among
        the draws that have the edge; ``delay``, the median lag in seconds at which the direct response is largest,
        among the same draws.
    """
    checked(graph, ("strength", "impulse_response", "variance_share", "probability", "exceeds_rope"))
    probability_of("hdi_prob", hdi_prob)
    chosen = stable_draws(graph[["strength", "impulse_response", "variance_share"]])
    strength, response = chosen["strength"], chosen["impulse_response"]
    gain = response.sum("lag", skipna=False)
    moved = (response != 0.0).any("lag") & response.notnull().all("lag")
    peak = abs(response.fillna(0.0)).idxmax("lag")
    interval = arviz_stats.hdi(strength, prob=hdi_prob, dim="sample")
    share = chosen["variance_share"].mean("sample").sel(origin=graph["source"].values).rename(origin="source")
    count = moved.sum("sample")
    known = {"log_odds": graph["log_odds"]} if "log_odds" in graph else {}
    return xr.Dataset(
        {
            "mean": strength.mean("sample"),
            "sd": strength.std("sample", ddof=1 if strength.sizes["sample"] > 1 else 0),
            "hdi_low": interval.isel(ci_bound=0, drop=True),
            "hdi_high": interval.isel(ci_bound=1, drop=True),
            "share": share,
            "p_present": graph["probability"],
            **known,
            "p_rope": graph["exceeds_rope"],
            "gain": gain.mean("sample", skipna=False),
            "p_sign": (gain > 0.0).sum("sample") / count.where(count > 0),
            "delay": _median(peak.where(moved)),
        },
        attrs={"hdi_prob": hdi_prob},
    )


def stable_draws(graph: xr.Dataset) -> xr.Dataset:
    """The draws in which the graph is known, along one dim ``sample``."""
    flat = graph.stack(sample=SAMPLE, create_index=False)
    return flat.isel(sample=flat["strength"].notnull().all(("target", "source")).values)


def _median(values: xr.DataArray) -> xr.DataArray:
    """Median over samples, leaving NaN out, and NaN, without a warning, where nothing is left."""
    empty = values.isnull().all("sample")
    return values.where(~empty, 0.0).median("sample", skipna=True).where(~empty)
