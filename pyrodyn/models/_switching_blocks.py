"""How the latents of switching steps fall into regions: which drive which, and which units read which out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodyn.readouts import Readout


@dataclass(frozen=True)
class Blocks:
    """The latents of every region, and the edges between regions that may exist.

    A system that is not divided is one region without a name.

    Attributes
    ----------
    names : tuple of str
    dims : tuple of int
        Latents of each region.
    edges : tuple of (int, int)
        Edges (target, source).
    scales : tuple of float
        Of each edge: root mean square of the Frobenius norm of its block, times the root of the target's edges.
    """

    names: tuple[str, ...]
    dims: tuple[int, ...]
    edges: tuple[tuple[int, int], ...] = ()
    scales: tuple[float, ...] = ()

    @classmethod
    def undivided(cls, latent_dim: int) -> Blocks:
        return cls(("",), (latent_dim,))

    @property
    def size(self) -> int:
        """Latents of all regions."""
        return sum(self.dims)

    @cached_property
    def places(self) -> tuple[slice, ...]:
        """Where each region's latents stand."""
        ends = torch.tensor((0, *self.dims)).cumsum(0).tolist()
        return tuple(slice(a, b) for a, b in pairwise(ends))

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of each region's own sites end in."""
        return tuple(f"_{name}" if name else "" for name in self.names)

    @cached_property
    def scale(self) -> Tensor:
        """Of the entries of every block, (latent, latent): between regions their prior sd, within one 1 / root of its
        size, and 0 where there is no edge."""
        found = torch.zeros(self.size, self.size, dtype=torch.float64)
        for place, dim in zip(self.places, self.dims, strict=True):
            found[place, place] = dim**-0.5
        for (target, source), scale in zip(self.edges, self.scales, strict=True):
            number = sum(other == target for other, _ in self.edges)
            entries = number * self.dims[target] * self.dims[source]
            found[self.places[target], self.places[source]] = scale * entries**-0.5
        return found

    @cached_property
    def within(self) -> Tensor:
        """Which entries lie within a region, (latent, latent)."""
        return self.diagonal([torch.ones(dim, dim) for dim in self.dims]) > 0.0

    def diagonal(self, parts: list[Tensor]) -> Tensor:
        """The matrix (*batch, latent, latent) of a matrix (*batch, latent, latent) for every region."""
        if len(parts) == 1:
            return parts[0]
        rows = [
            torch.nn.functional.pad(part, (place.start, self.size - place.stop))
            for part, place in zip(parts, self.places, strict=True)
        ]
        return torch.cat(rows, -2)


class View(NamedTuple):
    """The units that read a region's latents out."""

    units: Tensor  # (unit,), positions
    place: slice  # of the latents
    readout: Readout
    pivots: tuple[int, ...]  # positions among the units of those whose loadings fix the rotation
