r"""Latent coordinates that a nonlinear model shares with the recording.

A nonlinear drift is identified up to affine maps of the latent. They are all fixed at once by reading the latent off
the predictor: with :math:`C_0` the loading of a linear first guess, in coordinates where the latent has zero mean and
unit covariance, :math:`\eta_0` the predictor without latents, s the units' scales and N orthonormal columns orthogonal
to :math:`C_0`,

.. math:: C = s (C_0 + N V), \qquad d = \eta_0 + s N e, \qquad V, e\ \text{normal},

so that :math:`C_0^\top s^{-1} (C x + d - \eta_0) = C_0^\top C_0 x` whatever V and e are. Every loading whose span is
not orthogonal to that of :math:`C_0` is reached by a change of coordinates. Length scales, boxes and fixed points are
then in one set of units in all draws and for all engines.
"""

from __future__ import annotations

from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyrodyn.distributions import SubspaceNormal
from pyrodyn.models._startup import linear_start
from pyrodyn.readouts import Readout
from pyrodyn.recording import Recording

OFFSET_SD = 2.0  # prior sd of what is free of the offsets, in units of the readout's signal scale


class Anchor(NamedTuple):
    """What fixes the coordinates of a recording.

    Attributes
    ----------
    loading : Tensor, (unit, latent)
        :math:`C_0`
    offset : Tensor, (unit)
        :math:`\\eta_0`
    free : Tensor, (unit, unit - latent)
        N
    scale : Tensor, (unit)
        s
    """

    loading: Tensor
    offset: Tensor
    free: Tensor
    scale: Tensor

    def sample(self) -> tuple[Tensor, Tensor]:
        """Place the priors; returns C (*draw, 1, unit, latent) and d (*draw, 1, unit)."""
        loading = self.scale[:, None] * self.loading
        if not self.free.shape[1]:
            return loading, self.offset
        basis, inverse = self.scale[:, None] * self.free, self.free.mT / self.scale
        entries = SubspaceNormal(loading, basis, inverse, self.loading.shape[1] ** -0.5)
        level = SubspaceNormal(self.offset, basis, inverse, OFFSET_SD)
        return pyro.sample("loading", entries), pyro.sample("offset", level)

    def initial_values(self) -> dict[str, Tensor]:
        """The linear first guess itself."""
        if not self.free.shape[1]:
            return {}
        return {"loading": self.scale[:, None] * self.loading, "offset": self.offset}

    def moved(self, loading: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Bring a loading (unit, latent) and an offset (unit) into these coordinates.

        Returns the map T and the shift a of the state, ``new = T @ old + a``, and the values of the sites.
        """
        scaled, away = loading / self.scale[:, None], (offset - self.offset) / self.scale
        turn = torch.linalg.lstsq(self.loading, scaled).solution  # C_0^+ C
        shift = torch.linalg.lstsq(self.loading, away[:, None]).solution[:, 0]
        values = {}
        if self.free.shape[1]:
            new = torch.linalg.solve(turn.mT, loading.mT).mT  # C T^-1
            values = {"loading": new, "offset": offset - new @ shift}
        return turn, shift, values


def anchor(recording: Recording, latent_dim: int, readout: Readout) -> Anchor:
    """The coordinates of a recording; they depend on nothing else."""
    recording = recording.whole
    start = linear_start(recording, latent_dim, readout)
    loading = start.loading.to(recording.device)
    basis = torch.linalg.qr(loading, mode="complete")[0]
    if recording.observations is None:
        with poutine.block(), torch.random.fork_rng(devices=()):
            offset = poutine.trace(readout.sample_offset).get_trace(recording).nodes["offset"]["fn"].mean
    else:
        offset = readout.initial_values(recording)["offset"]
    return Anchor(loading, offset, basis[:, latent_dim:], readout.signal_scale(recording))
