"""The mode of a log density and its curvature there: an engine of its own, and where the others start."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pyrodyn.errors import NonFiniteError
from pyrodyn.inference.density import LogDensity
from pyrodyn.progress import progress

STEP = 1e-4  # of differences, in unconstrained coordinates, whose posterior sds are of order .01 to 1
MEMORY = 30  # pairs of steps and changes of the gradient that L-BFGS remembers
SUFFICIENT, CURVATURE = 1e-4, 0.9  # Wolfe's constants
FLAT = 1e-5  # largest entry of the gradient at which there is nowhere to climb
TRIALS = 30  # steps tried in one line search
ROUNDING = 1e-11  # of the size of a log density: what a sum over bins may be off by
PROBES = 8  # random signs from which a diagonal of the Hessian is read
LEAST_SHARE = 0.1  # of the mean curvature of a site: the reading of a single entry is noisy


class Hill(Protocol):
    """What is climbed: a `LogDensity`, or another function of a vector."""

    def gradient(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Value (*draw) and gradient (*draw, dimension); a failed element is -inf with a zero gradient."""
        ...

    def culprit(self, vector: Tensor) -> str:
        """The site at which it is not finite."""
        ...


class Rescaled:
    """A log density in coordinates of about unit curvature at ``vector`` (dimension,).

    The log likelihood of an entry of the dynamics may be a thousand times as curved as that of a loading; a climb that
    starts without knowing it hardly moves the loadings. The diagonal of the Hessian is read off products with random
    signs (Bekas, Kokiopoulou & Saad, Appl. Numer. Math. 57:1214, 2007).
    """

    def __init__(self, density: LogDensity, vector: Tensor) -> None:
        self.density = density
        signs = 2.0 * torch.randint(2, (PROBES, len(vector)), device=vector.device).to(vector.dtype) - 1.0
        slope, curvature = density.gradient(vector)[1], torch.zeros_like(vector)
        for sign in signs:
            curvature += sign * (slope - density.gradient(vector + STEP * sign)[1]) / (STEP * PROBES)
        self.scale = torch.ones_like(vector)
        for site in density.sites:
            own = curvature[site.place]
            least = max(1.0, LEAST_SHARE * float(own.mean().abs()))
            self.scale[site.place] = own.clamp(min=least).rsqrt()

    def ascend(self, vector: Tensor, max_steps: int, label: str, tolerance: float) -> Tensor:
        """Climb from ``vector``; both it and the result are in the coordinates of the density."""
        return ascend(self, vector / self.scale, max_steps, label, tolerance)[0] * self.scale

    def gradient(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = self.density.gradient(vector * self.scale)
        return value, slope * self.scale

    def culprit(self, vector: Tensor) -> str:
        return self.density.culprit(vector * self.scale)


def ascend(density: Hill, start: Tensor, max_steps: int, label: str, tolerance: float = 1e-13) -> tuple[Tensor, Tensor]:
    """Climb to the mode by L-BFGS from ``start``; returns the vectors and whether each converged.

    ``start`` is (*replicate, dimension): each replicate has its own curvature, its own line search and stops by itself,
    where a step gains less than ``tolerance`` of the size of its log density. The path of steps only goes up; where no
    step does, that is the top as far as rounding tells if the slope promised less than `ROUNDING` of that size.

    References
    ----------
    Nocedal, Math. Comp. 35:773 (1980); line search of Lewis & Overton, Math. Program. 141:135 (2013).
    """
    place = start.clone()
    value, slope = density.gradient(place)
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"{label}: the log density is not finite at the initial values (step 0), at site "
            f"{density.culprit(place)!r}; check the recording with model.check(recording) and the scale of that "
            "site's prior"
        )
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    active = slope.abs().amax(-1) > FLAT
    stuck = torch.zeros_like(active)  # no step along the last direction went up
    with progress(max_steps, label) as bar:
        for _ in range(max_steps):
            if not bool(active.any()):
                break
            step = _direction(slope, pairs)
            gain = (step * slope).sum(-1)
            size, (ahead, value_ahead, slope_ahead) = _search(density, place, value, step, gain, active.to(gain.dtype))
            moved = ahead - place
            change = slope - slope_ahead
            overlap = (moved * change).sum(-1)
            useful = overlap > 1e-10 * moved.norm(dim=-1) * change.norm(dim=-1)
            pairs = [*pairs[1 - MEMORY :], (moved, change, torch.where(useful, 1.0 / overlap, 0.0))]
            won = value_ahead - value
            place, value, slope = ahead, value_ahead, slope_ahead
            larger = torch.maximum(value.abs(), (value - won).abs()).clamp(min=1.0)
            stuck = stuck | (active & (size == 0.0) & (gain > ROUNDING * larger))
            active = active & (won > tolerance * larger) & (slope.abs().amax(-1) > FLAT)
            bar.update()
    return place, ~active & ~stuck


def _direction(slope: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Inverse curvature times the gradient, by the two loops of L-BFGS; a pair of weight zero has no part in it."""
    step, shares = slope, []
    for moved, change, weight in reversed(pairs):
        share = weight * (moved * step).sum(-1)
        shares.append(share)
        step = step - share.unsqueeze(-1) * change
    scale = (1.0 / slope.abs().sum(-1).clamp(min=1e-300)).clamp(max=1.0)
    for _, change, weight in pairs:  # the curvature along the last step that had any
        scale = torch.where(weight > 0.0, 1.0 / (weight * change.square().sum(-1)).clamp(min=1e-300), scale)
    step = scale.unsqueeze(-1) * step
    for (moved, change, weight), share in zip(pairs, reversed(shares), strict=True):
        step = step + (share - weight * (change * step).sum(-1)).unsqueeze(-1) * moved
    return step


def _search(
    density: Hill, place: Tensor, value: Tensor, step: Tensor, gain: Tensor, size: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Bisect every replicate's step until the weak conditions of Wolfe hold; a size of zero where none goes up."""
    lower, upper = torch.zeros_like(size), torch.full_like(size, torch.inf)
    too_far = too_near = torch.zeros_like(size, dtype=torch.bool)
    for _ in range(TRIALS):
        ahead = place + size.unsqueeze(-1) * step
        value_ahead, slope_ahead = density.gradient(ahead)
        too_far = ~(value_ahead >= value + SUFFICIENT * size * gain)
        too_near = ~too_far & ((slope_ahead * step).sum(-1) > CURVATURE * gain)
        if not bool(((too_far | too_near) & (size > 0.0)).any()):
            return size, (ahead, value_ahead, slope_ahead)
        upper = torch.where(too_far, size, upper)
        lower = torch.where(too_near, size, lower)
        middle = torch.where(torch.isinf(upper), 2.0 * size, 0.5 * (lower + upper))
        size = torch.where((too_far | too_near) & (size > 0.0), middle, size)
    size = torch.where(too_far | too_near, lower, size)
    ahead = place + size.unsqueeze(-1) * step
    return size, (ahead, *density.gradient(ahead))


def negative_hessian(density: Hill, vector: Tensor, label: str, chunk: int = 64) -> Tensor:
    """Minus the Hessian of the log density by central differences of its gradient.

    ``vector`` is (dimension,), or (replicate, 1, dimension); the result (dimension, dimension) with the replicates.
    """
    size = vector.shape[-1]
    columns = []
    with progress(size, label) as bar:
        for part in (STEP * torch.eye(size, dtype=vector.dtype, device=vector.device)).split(chunk):
            steps = torch.cat([part, -part])
            _, slopes = density.gradient(vector + steps)
            ahead, behind = slopes.chunk(2, dim=-2)
            columns.append((behind - ahead) / (2.0 * STEP))
            bar.update(len(part))
    hessian = torch.cat(columns, -2)
    return 0.5 * (hessian + hessian.mT)


def covariance_root(hessian: Tensor, least_curvature: float) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor of the inverse Hessian, and how many directions were too flat and were lifted."""
    curvature, axes = torch.linalg.eigh(hessian)
    flat = (curvature < least_curvature).sum(-1)
    scaled = axes / curvature.clamp(min=least_curvature).sqrt().unsqueeze(-2)
    # R from the QR of the transpose is a triangular root of scaled @ scaled.mT, without forming the product.
    upper = torch.linalg.qr(scaled.mT)[1]
    return upper.mT * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2), flat
