"""The log likelihood of paths and its derivatives, a few bins at a time."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyrodyn.linalg.matrix import of_all_trials
from pyrodyn.readouts.observations import AffineReadout


class PathLikelihood:
    r"""What observations say of paths (*draw, trial, time, latent), up to what no path enters; outside of autograd.

    Where the predictor is the natural parameter of the law, :math:`\log p = y \eta - A(\eta)` up to a constant, and the
    first term is linear in the path: it is summed over units once, and only A and its derivatives are left for every
    path.

    Parameters
    ----------
    readout : AffineReadout
    observations : Tensor, (*draw or 1, trial, time, unit)
    batch : Size, optional
        Of the paths, (*draw, trial); by default that of the readout.
    """

    def __init__(self, readout: AffineReadout, observations: Tensor, batch: torch.Size | None = None) -> None:
        self.loading, self.canonical = readout.loading, readout.law.canonical
        self.pieces = readout.pieces(observations, batch)
        if self.canonical:
            seen = observations if readout.observed is None else torch.where(readout.observed, observations, 0.0)
            self.linear = of_all_trials(seen, self.loading)

    @functools.cached_property
    def pairs(self) -> Pairs:
        """Of the loadings."""
        return Pairs(self.loading)

    def bins(self, path: Tensor) -> Tensor:
        """In every bin, (*draw, trial, time)."""
        values = []
        for place, own, seen in self.pieces:
            predictor = own.predict(path[..., place, :])
            values.append(own.partition_bins(predictor)[0] if self.canonical else own.kernel_bins(predictor, seen))
        return self._whole(values, path)

    def slope(self, path: Tensor) -> tuple[Tensor, Tensor]:
        """`bins`, and their derivative in the path (*draw, trial, time, latent)."""
        values, forces = [], []
        for place, own, seen in self.pieces:
            value, score, _ = self._expand(path[..., place, :], own, seen)
            values.append(value)
            forces.append(of_all_trials(score, self.loading))
        return self._whole(values, path), self._force(forces)

    def expand(self, path: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`slope`, and minus the second derivative (*draw, trial, time, latent, latent)."""
        values, forces, precisions = [], [], []
        for place, own, seen in self.pieces:
            value, score, curvature = self._expand(path[..., place, :], own, seen)
            values.append(value)
            forces.append(of_all_trials(score, self.loading))
            precisions.append(self.pairs.outer(curvature))
        return self._whole(values, path), self._force(forces), torch.cat(precisions, -3)

    def reach(self, step: Tensor) -> Tensor:
        """The furthest that a step of the path moves a predictor, (*draw, trial)."""
        along = self.loading.mT
        moved = [of_all_trials(step[..., place, :], along).abs().amax((-2, -1)) for place, *_ in self.pieces]
        return torch.stack(moved).amax(0)

    def _expand(self, path: Tensor, readout: AffineReadout, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value of every bin, score and curvature of every unit, without the linear term where there is one."""
        predictor = readout.predict(path)
        return readout.partition_bins(predictor) if self.canonical else readout.expand_bins(predictor, seen)

    def _whole(self, values: list[Tensor], path: Tensor) -> Tensor:
        value = torch.cat(values, -1)
        return value + (path * self.linear).sum(-1) if self.canonical else value

    def _force(self, forces: list[Tensor]) -> Tensor:
        force = torch.cat(forces, -2)
        return force + self.linear if self.canonical else force


class Pairs:
    """Products of the loadings of every two latents, each formed once; outside of autograd.

    Of two that are equal by symmetry one is formed, and one of all that are zero: units that read out few of the
    latents leave few others.
    """

    def __init__(self, loading: Tensor) -> None:
        self.shape = loading.shape[-1:] * 2
        products = _products(loading)
        flat = torch.arange(products.shape[-1], device=loading.device)
        first = torch.minimum(flat, flat.reshape(self.shape).mT.flatten())
        empty = ~(products != 0.0).flatten(0, -2).any(0)
        if bool(empty.any()):
            first = torch.where(empty, empty.to(torch.uint8).argmax(), first)
        distinct, self.place = first.unique(return_inverse=True)
        self.products = products[..., distinct]  # (*draw, unit, pair)

    def outer(self, curvature: Tensor) -> Tensor:
        """C' diag(curvature) C in every bin, (*batch, time, latent, latent)."""
        return of_all_trials(curvature, self.products)[..., self.place].unflatten(-1, self.shape)


def outer(readout: AffineReadout, curvature: Tensor) -> Tensor:
    """C' diag(curvature) C in every bin, (*batch, time, latent, latent)."""
    if not torch.is_grad_enabled():
        return Pairs(readout.loading).outer(curvature)
    return of_all_trials(curvature, _products(readout.loading)).unflatten(-1, readout.loading.shape[-1:] * 2)


def _products(loading: Tensor) -> Tensor:
    return (loading.unsqueeze(-1) * loading.unsqueeze(-2)).flatten(-2)
