r"""A recurrent network with noise, whose state is the latent path."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.distributions import NonlinearMarkov
from pyrodyn.errors import ModelError
from pyrodyn.models._startup import linear_start
from pyrodyn.models._symmetry import order_and_signs
from pyrodyn.networks import Cell, Gated
from pyrodyn.networks.cells import CellWeights
from pyrodyn.networks.layers import prior_sd, product, sample_weight, start_weight
from pyrodyn.program import Labelled, StateSpaceModel
from pyrodyn.readouts import AffineReadout, NetworkReadout, Poisson, Readout
from pyrodyn.recording import Recording

OPEN_LOOP = 20  # bins that the network runs by itself for the invariants


class LatentRNNParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event); the first six are those of `CellWeights`."""

    recurrent: Tensor
    recurrent_right: Tensor | None
    bias: Tensor
    candidate_bias: Tensor | None
    time_constant: Tensor | None
    input_weight: Tensor | None
    process_sd: Tensor  # (latent)
    initial_mean: Tensor  # (latent)
    initial_sd: Tensor  # (latent)
    loading: Tensor  # (unit, latent)
    offset: Tensor  # (unit)
    noise: Tensor | None  # (unit): the readout's own parameter

    @property
    def cell(self) -> CellWeights:
        """The weights of the cell."""
        return CellWeights(*self[:6])


@dataclass(frozen=True)
class LatentRNN(StateSpaceModel):
    r"""Recurrent network with process noise and any readout.

    .. math::
        x_1 &\sim N(\mu, \mathrm{diag}(s^2)), \qquad
        x_t = F(x_{t-1}, u_t) + \sigma_t \odot \epsilon_t, \quad \epsilon_t \sim N(0, I), \\
        \eta_t &= C\,\phi(x_t) + d, \qquad y_{t,n} \sim p(\cdot \mid \eta_{t,n}),

    with F and the activity :math:`\phi` those of the cell: a gated recurrent unit (`networks.Gated`), leaky rate units
    (`networks.Leaky`), or rate units with a recurrent matrix of low rank (`networks.LowRank`). Weights are sample sites
    with independent normal priors of variance one over the number of inputs.

    **Symmetry.** Units of the network have no order, and a unit's sign is its own: any signed permutation of them is
    the same model. The posterior has as many equal modes; nothing but invariants may be compared between chains.

    Parameters
    ----------
    latent_dim : int
        Units of the network.
    cell : Cell
        One of `pyrodyn.networks`; `Gated` by default.
    readout : Readout
        `Poisson` by default; any of `pyrodyn.readouts`.

    References
    ----------
    Sussillo & Barak, Neural Comput. 25:626 (2013); Pals, Sagtekin, Pei, Gloeckler & Macke, NeurIPS 2024 (networks of
    low rank with noise).
    """

    latent_dim: int
    cell: Cell = field(default_factory=Gated)
    readout: Readout = field(default_factory=Poisson)

    def __post_init__(self) -> None:
        if not isinstance(self.latent_dim, int) or self.latent_dim < 1:
            raise ModelError(f"latent_dim must be a whole number of at least 1, got {self.latent_dim!r}")
        if not isinstance(self.cell, Cell):
            raise ModelError(f"cell must be one of pyrodyn.networks, such as Gated(), got {self.cell!r}")
        if not isinstance(self.readout, Readout):
            raise ModelError(f"readout must be one of pyrodyn.readouts, such as Poisson(), got {self.readout!r}")

    def check(self, recording: Recording) -> None:
        self.cell.check(self.latent_dim, recording)
        self.readout.check(recording)

    def sample_globals(self, recording: Recording) -> LatentRNNParameters:
        dim, units = self.latent_dim, recording.num_units
        weights = self.cell.sample(dim, recording)
        ones = torch.ones(dim, dtype=torch.float64, device=recording.device)
        process_sd = pyro.sample("process_sd", dist.LogNormal(math.log(0.2) * ones, 1.0).to_event(1))
        initial_mean = sample_weight("initial_mean", (dim,), 1.0, recording)
        initial_sd = pyro.sample("initial_sd", dist.LogNormal(math.log(0.5) * ones, 0.7).to_event(1))
        loading = sample_weight("loading", (units, dim), 1.0, recording)
        offset = self.readout.sample_offset(recording)
        noise = self.readout.sample_noise(recording)
        scale = self._loading_scale(recording)
        return LatentRNNParameters(
            *weights, process_sd, initial_mean, initial_sd, scale * loading, offset, noise
        )  # fmt: skip

    def latent_path(self, parameters: LatentRNNParameters, recording: Recording) -> NonlinearMarkov:
        steps = torch.tensor(np.diff(recording.time), device=recording.device)
        inputs = None if recording.inputs is None else recording.inputs[:, 1:]
        weights = parameters.cell
        return NonlinearMarkov(
            self.cell.bind(weights, inputs, steps),
            parameters.initial_mean,
            parameters.initial_sd,
            self.cell.noise_scale(weights, steps) * parameters.process_sd.unsqueeze(-2),
            num_bins=recording.num_bins,
        )

    def readout_law(self, parameters: LatentRNNParameters, path: Tensor, recording: Recording) -> NetworkReadout:
        activity = self.cell.activity(path)
        return NetworkReadout(
            AffineReadout(
                self.readout, activity, parameters.loading, parameters.offset, parameters.noise, recording.mask
            )
        )

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        dim = self.latent_dim
        values = self.cell.initial_values(dim, recording) | {
            "process_sd": torch.full((dim,), 0.2, dtype=torch.float64),
            "initial_mean": torch.zeros(dim, dtype=torch.float64),
            "initial_sd": torch.full((dim,), 0.5, dtype=torch.float64),
            "loading": self._initial_loading(recording),
        }
        if recording.observations is not None:
            values |= self.readout.initial_values(recording)
        return {name: value.to(recording.device) for name, value in values.items()}

    def _initial_loading(self, recording: Recording) -> Tensor:
        """The leading subspace of the observations, each of its axes shared out over the units of the network."""
        axes = min(self.latent_dim, recording.num_units)
        start = linear_start(recording, axes, self.readout)
        spread = torch.linalg.qr(start_weight((self.latent_dim, axes), 1.0, 3))[0]
        return self.latent_dim**0.5 * start.loading @ spread.mT

    def label(self, parameters: LatentRNNParameters) -> Labelled:
        dims = self.cell.dims() | {
            "process_sd": ("latent",),
            "initial_mean": ("latent",),
            "initial_sd": ("latent",),
            "loading": ("unit", "latent"),
            "offset": ("unit",),
        }
        values = parameters._asdict()
        if self.readout.noise_name is not None:
            values[self.readout.noise_name], dims[self.readout.noise_name] = parameters.noise, ("unit",)
        return {name: (axes, values[name]) for name, axes in dims.items() if values[name] is not None}

    def unlabel(self, values: Mapping[str, Tensor]) -> LatentRNNParameters:
        noise = None if self.readout.noise_name is None else values[self.readout.noise_name]
        names = LatentRNNParameters._fields[:-1]
        return LatentRNNParameters(*(values.get(name) for name in names), noise)  # type: ignore[arg-type]

    def invariants(self, parameters: LatentRNNParameters) -> Labelled:
        with torch.no_grad():
            eigenvalues = torch.linalg.eigvals(self.cell.matrix(parameters.cell))
            found: Labelled = {"spectral_radius": ((), eigenvalues.abs().amax(-1))}
            for name, (dims, value) in self.label(parameters).items():
                if dims == ("unit",):
                    found[name] = dims, value
                elif "unit" not in dims:
                    # What no order and no sign of the network's units changes.
                    size = value.square().flatten(value.dim() - len(dims)).mean(-1).sqrt() if dims else value
                    found[f"{name}_size"] = (), size
            found["open_loop"] = ("unit",), self._open_loop(parameters)
        found["signal_sd"] = ("unit",), parameters.loading.square().sum(-1).sqrt()
        return found

    def _open_loop(self, parameters: LatentRNNParameters) -> Tensor:
        """The predictor (*draw, 1, unit) after some bins without noise and inputs from the mean initial state."""
        weights = parameters.cell
        steps = weights.bias.new_ones(OPEN_LOOP)
        if weights.time_constant is not None:
            steps = 0.2 * steps
            weights = weights._replace(time_constant=torch.ones_like(weights.time_constant))
        state = self.cell.bind(weights, None, steps).scan(parameters.initial_mean, None, None)[..., -1, :]
        return product(self.cell.activity(state), parameters.loading, 1) + parameters.offset

    def transformed(self, parameters: LatentRNNParameters, recording: Recording, seed: int) -> LatentRNNParameters:
        """Put the units of the network in another order, with other signs."""
        order, sign = (part.to(recording.device) for part in self.symmetry(seed))
        return LatentRNNParameters(
            *self.cell.permuted(parameters.cell, order, sign),
            parameters.process_sd[..., order],
            sign * parameters.initial_mean[..., order],
            parameters.initial_sd[..., order],
            parameters.loading[..., order] * sign,
            parameters.offset,
            parameters.noise,
        )

    def symmetry(self, seed: int) -> tuple[Tensor, Tensor]:
        """The order and the signs (latent) that `transformed` gives the units: the path moves as they do."""
        return order_and_signs(self.latent_dim, torch.Generator().manual_seed(seed))

    def _loading_scale(self, recording: Recording) -> Tensor:
        return (self.readout.signal_scale(recording) * prior_sd(self.latent_dim)).unsqueeze(-1)
