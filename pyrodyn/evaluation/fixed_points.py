r"""Where a flow stands still, and how it moves nearby."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import xarray as xr
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyrodyn.errors import ModelError
from pyrodyn.inference.engine import numerics
from pyrodyn.linalg.slopes import expanded
from pyrodyn.posterior import model_of, parameters_of, thinned

MAX_STEPS = 200
FIRST_DAMPING = 1e-3  # beside the squared norm of the Jacobian
LEAST_DAMPING, MOST_DAMPING = 1e-14, 1e12
STARTS = 200  # states of the posterior's paths from which fixed points are searched


@runtime_checkable
class HasFlow(Protocol):
    """A model whose latent moves by itself.

    ``flow(parameters)`` is a function of states (*draw, point, latent) to their rate of change, or, where
    ``discrete_time`` is true, to the states one bin later.
    """

    discrete_time: bool

    def flow(self, parameters: Any) -> Callable[[Tensor], Tensor]: ...


class FixedPoints(NamedTuple):
    """What `find_fixed_points` found, from every start.

    Attributes
    ----------
    states : Tensor, (*draw, start, latent)
    converged : Tensor of bool, (*draw, start)
    jacobian : Tensor, (*draw, start, latent, latent)
    """

    states: Tensor
    converged: Tensor
    jacobian: Tensor

    @property
    def eigenvalues(self) -> Tensor:
        """Of the Jacobian, complex (*draw, start, latent)."""
        return torch.linalg.eigvals(self.jacobian)

    def distinct(self, index: tuple[int, ...] = (), merge: float = 1e-4) -> Tensor:
        """Positions of the starts (point,) that ended in different places, in one draw."""
        kept: list[int] = []
        states = self.states[index]
        size = 1.0 + states.abs().amax()
        for i in self.converged[index].nonzero().flatten().tolist():
            if all(float((states[i] - states[j]).abs().amax()) > merge * float(size) for j in kept):
                kept.append(i)
        return torch.tensor(kept, dtype=torch.long)


def find_fixed_points(
    flow: Callable[[Tensor], Tensor], starts: Tensor, *, discrete: bool = False, tolerance: float = 1e-8
) -> FixedPoints:
    r"""Zeros of :math:`f(x)`, or of :math:`f(x) - x` for a map, by damped Newton steps from many starts at once.

    Every start, in every draw, has its own damping (Levenberg-Marquardt): it falls where a step lowers
    :math:`|f|^2` and rises where it does not.

    Parameters
    ----------
    flow : callable
        Takes and returns (*draw, start, latent), each start by itself; differentiable by autograd.
    starts : Tensor, (*draw, start, latent)
    discrete : bool
        Whether ``flow`` is a map from bin to bin.
    tolerance : float
        Largest entry of the residual at which a start has converged, beside the largest one at the starts.

    References
    ----------
    Sussillo & Barak, Neural Comput. 25:626 (2013).
    """

    def residual(state: Tensor) -> Tensor:
        return flow(state) - state if discrete else flow(state)

    state = starts.detach().clone()
    value, slope = expanded(residual, state)
    size = float(value.abs().amax().clamp(min=1e-12))
    damping = (FIRST_DAMPING * slope.square().sum((-2, -1))).clamp(min=LEAST_DAMPING)
    eye = torch.eye(state.shape[-1], dtype=state.dtype)
    for _ in range(MAX_STEPS):
        open_ = value.abs().amax(-1) > tolerance * size
        if not bool(open_.any()):
            break
        normal = slope.mT @ slope + damping[..., None, None] * eye
        step = -torch.linalg.solve(normal, (slope.mT @ value.unsqueeze(-1)).squeeze(-1))
        ahead = state + step
        value_ahead, slope_ahead = expanded(residual, ahead)
        better = value_ahead.square().sum(-1) < value.square().sum(-1)
        state = torch.where(better[..., None], ahead, state)
        value = torch.where(better[..., None], value_ahead, value)
        slope = torch.where(better[..., None, None], slope_ahead, slope)
        damping = torch.where(better, 0.2 * damping, 4.0 * damping).clamp(min=LEAST_DAMPING, max=MOST_DAMPING)
    converged = value.abs().amax(-1) <= tolerance * size
    jacobian = slope + eye if discrete else slope
    return FixedPoints(state, converged, jacobian)


def fixed_points(posterior: xr.DataTree, *, draws: int = 50, radius: float = 1.0, model: Any = None) -> xr.Dataset:
    r"""Fixed points of the posterior's mean flow, and of every draw's.

    Parameters
    ----------
    posterior : xarray.DataTree
        Of a model with a flow.
    draws : int
        Posterior draws, evenly thinned.
    radius : float
        A draw's fixed point belongs to one of the mean flow where it is nearest to it and not further away than this,
        in standard deviations of the latents.
    model : optional
        Needed only for a model that is not in `pyrodyn.models`.

    Returns
    -------
    xarray.Dataset
        Over (fixed_point, latent) ``location`` of the mean flow; ``draws`` (draw, fixed_point, latent), NaN where a
        draw has none nearby; ``presence`` (fixed_point), the share of draws that do; ``eigenvalues_real`` and
        ``eigenvalues_imag`` (draw, fixed_point, mode), of the draws, sorted by size; ``stable`` (draw, fixed_point), 1
        where all of them are, NaN where there is none.

    Raises
    ------
    ModelError
        For a model without a flow.
    """
    model = model_of(posterior) if model is None else model
    known: Any = model
    if not isinstance(model, HasFlow):
        raise ModelError(f"{type(model).__name__} declares no flow, so it has no fixed points to look for")
    paths = torch.from_numpy(posterior["latents"]["mean"].values)
    visited = paths.reshape(-1, paths.shape[-1])
    starts = visited[torch.linspace(0, len(visited) - 1, min(STARTS, len(visited))).round().long()]
    with numerics():
        flow = model.flow(parameters_of(posterior, known, draws))
        sizes = posterior["posterior"].sizes
        count = len(thinned(sizes["chain"] * sizes["draw"], draws))

        def mean(state: Tensor) -> Tensor:
            return flow(state.expand(count, *state.shape[-2:])).mean(0, keepdim=True)

        of_mean = find_fixed_points(mean, starts[None], discrete=model.discrete_time)
        references = of_mean.states[0][of_mean.distinct((0,))]
        # Far from all paths a flow is its prior's alone.
        near = _scaled(references[:, None] - visited[None], visited).norm(dim=-1).amin(1) <= radius
        references = references[near]
        found = find_fixed_points(
            flow, torch.cat([references, starts]).expand(count, -1, -1), discrete=model.discrete_time
        )
    return _matched(found, references, visited, radius, model.discrete_time)


def _matched(found: FixedPoints, references: Tensor, visited: Tensor, radius: float, discrete: bool) -> xr.Dataset:
    """Give each draw's points to those of the mean flow, nearest first."""
    count, points, dim = len(found.states), *references.shape
    places: Any = np.full((count, points, dim), np.nan)
    values: Any = np.full((count, points, dim), np.nan + 0j)
    eigenvalues = found.eigenvalues
    for draw in range(count):
        kept = found.distinct((draw,))
        states = found.states[draw, kept]
        if not len(kept) or not points:
            continue
        distance = _scaled(states[:, None] - references[None], visited).norm(dim=-1).numpy()
        for row, column in zip(*linear_sum_assignment(distance), strict=True):
            if distance[row, column] <= radius:
                places[draw, column] = states[row].numpy()
                own: Any = eigenvalues[draw, kept[row]].numpy()
                values[draw, column] = own[np.lexsort((own.imag, -np.abs(own)))]
    growth = np.abs(values) - 1.0 if discrete else values.real
    missing = np.isnan(places[..., 0])
    stable = np.where(missing, np.nan, (growth < 0.0).all(-1))
    mode, latent = ("draw", "fixed_point", "mode"), ("draw", "fixed_point", "latent")
    return xr.Dataset(
        {
            "location": (("fixed_point", "latent"), references.numpy()),
            "draws": (latent, places),
            "presence": ("fixed_point", 1.0 - missing.mean(0)),
            "eigenvalues_real": (mode, values.real),
            "eigenvalues_imag": (mode, values.imag),
            "stable": (("draw", "fixed_point"), stable),
        }
    )


def _scaled(difference: Tensor, visited: Tensor) -> Tensor:
    return difference / visited.std(0).clamp(min=1e-12)
