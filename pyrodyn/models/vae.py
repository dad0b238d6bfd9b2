r"""The variational autoencoder: latents with a simple law, seen through a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.distributions import GaugedLoading
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.errors import ModelError
from pyrodyn.models._startup import linear_start, static_start
from pyrodyn.models._symmetry import rotation, signed_permutation
from pyrodyn.models.time_priors import StaticPrior, TimePrior
from pyrodyn.networks.layers import prior_sd, product, sample_weight, start_weight
from pyrodyn.program import Labelled, StateSpaceModel
from pyrodyn.readouts import AffineReadout, NetworkReadout, Poisson, Readout
from pyrodyn.recording import Recording


class VAEParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event); None where there is none of the kind."""

    time_constant: Tensor | None  # (latent): seconds
    condition_mean: Tensor | None  # (condition, latent)
    condition_sd: Tensor | None  # (condition, latent)
    first_weight: Tensor | None  # (first_hidden, latent)
    first_bias: Tensor | None  # (first_hidden)
    second_weight: Tensor | None  # (second_hidden, first_hidden)
    second_bias: Tensor | None  # (second_hidden)
    loading: Tensor  # (unit, latent), or (unit, units of the last hidden layer)
    offset: Tensor  # (unit)
    noise: Tensor | None  # (unit): the readout's own parameter


@dataclass(frozen=True)
class VAE(StateSpaceModel):
    r"""Latents with a Gaussian law over time, decoded by a network.

    .. math::
        x_{i} &= m_{c(i)} + s_{c(i)} \odot w_i, \qquad w_i \sim \text{the law over time}, \\
        \eta_{i,t} &= C\,h(x_{i,t}) + d, \qquad y_{i,t,n} \sim p(\cdot \mid \eta_{i,t,n}),

    with h a network of up to two hidden layers with tanh units, or nothing: then the model is linear and, where its law
    over time is a chain, every engine can integrate the path out. With a `StaticPrior` and a Gaussian readout that
    is factor analysis, and probabilistic PCA where all units have the same noise.

    **Conditions.** With ``conditions`` given, mean and scale of the latents depend on the condition of the trial.
    Latents of a nonlinear decoder can be changed by any map that leaves their law alone; laws that differ between
    conditions leave none but affine ones. Otherwise mean and scale are 0 and 1.

    The encoder belongs to the guide (`pyrodyn.guides.Amortised`).

    Parameters
    ----------
    latent_dim : int
    hidden : tuple of int
        Units of the hidden layers of the decoder: none, one or two; 30 and 30 by default.
    time : TimePrior
        `StaticPrior` by default, `MarkovPrior` or `SmoothPrior`.
    conditions : tuple of str
        Names of the conditions that have laws of their own.
    readout : Readout

    References
    ----------
    Kingma & Welling, ICLR 2014; Khemakhem et al., AISTATS 2020 and Zhou & Wei, NeurIPS 2020 (conditions identify).
    """

    latent_dim: int
    hidden: tuple[int, ...] = (30, 30)
    time: TimePrior = field(default_factory=StaticPrior)
    conditions: tuple[str, ...] = ()
    readout: Readout = field(default_factory=Poisson)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))  # a stored specification has lists
        object.__setattr__(self, "conditions", tuple(self.conditions))
        if not isinstance(self.latent_dim, int) or self.latent_dim < 1:
            raise ModelError(f"latent_dim must be a whole number of at least 1, got {self.latent_dim!r}")
        if len(self.hidden) > 2 or not all(isinstance(size, int) and size > 0 for size in self.hidden):
            raise ModelError(f"hidden must hold the sizes of at most two layers, such as (30,), got {self.hidden!r}")
        if not isinstance(self.time, TimePrior):
            raise ModelError(
                f"time must be StaticPrior(), MarkovPrior() or SmoothPrior() of pyrodyn.models, got {self.time!r}"
            )
        if len(set(self.conditions)) != len(self.conditions) or len(self.conditions) == 1:
            raise ModelError(f"conditions must be at least two different names, or none, got {self.conditions!r}")
        if not isinstance(self.readout, Readout):
            raise ModelError(f"readout must be one of pyrodyn.readouts, such as Poisson(), got {self.readout!r}")

    def check(self, recording: Recording) -> None:
        if self._gauged and self.latent_dim > recording.num_units:
            raise ModelError(
                f"latent_dim is {self.latent_dim} but the recording has {recording.num_units} units; a linear decoder "
                "of full rank needs latent_dim <= units: lower latent_dim"
            )
        unknown = sorted(set(recording.condition.tolist()) - set(self.conditions)) if self.conditions else []
        if unknown:
            raise ModelError(
                f"the recording has trials of conditions {unknown[:5]}, but the model knows {list(self.conditions)}; "
                "name them all in VAE(conditions=...), or leave these trials out"
            )
        self.readout.check(recording)

    @property
    def _gauged(self) -> bool:
        """Whether the latents could be turned: a linear decoder of latents that all have the same law."""
        return not self.hidden and not self.time.has_time_constant and not self.conditions

    def sample_globals(self, recording: Recording) -> VAEParameters:
        dim, units = self.latent_dim, recording.num_units
        constant = self.time.sample(dim, recording)
        mean = sd = None
        if self.conditions:
            shape = (len(self.conditions), dim)
            mean = sample_weight("condition_mean", shape, 1.0, recording)
            zeros = torch.zeros(shape, dtype=torch.float64, device=recording.device)
            sd = pyro.sample("condition_sd", dist.LogNormal(zeros - 0.5, 0.5).to_event(2))
        layers: list[Tensor | None] = [None] * 4
        sizes = (dim, *self.hidden)
        for i, name in zip(range(len(self.hidden)), ("first", "second"), strict=False):
            layers[2 * i] = sample_weight(f"{name}_weight", (sizes[i + 1], sizes[i]), prior_sd(sizes[i]), recording)
            layers[2 * i + 1] = sample_weight(f"{name}_bias", (sizes[i + 1],), 1.0, recording)
        if self._gauged:
            weights = pyro.sample("weights", GaugedLoading(units, dim, self.pivots(recording)))
        else:
            weights = sample_weight("weights", (units, sizes[-1]), 1.0, recording)
        offset = self.readout.sample_offset(recording)
        noise = self.readout.sample_noise(recording)
        return VAEParameters(
            constant, mean, sd, layers[0], layers[1], layers[2], layers[3], self._loading_scale(recording) * weights,
            offset, noise,
        )  # fmt: skip

    def latent_path(self, parameters: VAEParameters, recording: Recording) -> Any:
        if parameters.condition_mean is None or parameters.condition_sd is None:
            zeros = parameters.offset.new_zeros(1, self.latent_dim)
            return self.time.law(parameters.time_constant, zeros, zeros + 1.0, recording)
        places = [self.conditions.index(name) for name in recording.condition.tolist()]
        which = torch.tensor(places, device=recording.device)
        mean, sd = (_by_trial(part, which) for part in (parameters.condition_mean, parameters.condition_sd))
        return self.time.law(parameters.time_constant, mean, sd, recording)

    def readout_law(self, parameters: VAEParameters, path: Tensor, recording: Recording) -> Any:
        law = AffineReadout(
            self.readout, self.decoded(parameters, path), parameters.loading, parameters.offset, parameters.noise,
            recording.mask,
        )  # fmt: skip
        return NetworkReadout(law) if self.hidden else law

    def decoded(self, parameters: VAEParameters, path: Tensor) -> Tensor:
        """The last hidden layer (*draw, trial, time, unit of the layer); the path itself for a linear decoder."""
        if parameters.first_weight is not None and parameters.first_bias is not None:
            path = torch.tanh(product(path, parameters.first_weight) + parameters.first_bias.unsqueeze(-2))
        if parameters.second_weight is not None and parameters.second_bias is not None:
            path = torch.tanh(product(path, parameters.second_weight) + parameters.second_bias.unsqueeze(-2))
        return path

    def pivots(self, recording: Recording) -> tuple[int, ...]:
        """The units whose loading rows fix the rotation of a linear decoder; depends on the recording alone."""
        return static_start(recording, self.latent_dim, self.readout).pivots

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        dim = self.latent_dim
        values = self.time.initial_values(dim, recording)
        if self.conditions:
            shape = (len(self.conditions), dim)
            values |= {"condition_mean": start_weight(shape, 0.5, 20)}
            values |= {"condition_sd": torch.full(shape, 0.6, dtype=torch.float64)}
        sizes = (dim, *self.hidden)
        for i, name in zip(range(len(self.hidden)), ("first", "second"), strict=False):
            values[f"{name}_weight"] = start_weight((sizes[i + 1], sizes[i]), prior_sd(sizes[i]), 21 + i)
            values[f"{name}_bias"] = start_weight((sizes[i + 1],), 0.5, 23 + i)
        start = linear_start if self.time.has_time_constant else static_start
        if self.hidden:
            values["weights"] = start_weight((recording.num_units, sizes[-1]), 0.3, 25)
        elif self._gauged:
            found = start(recording, dim, self.readout)
            values["weights"] = gauge_fix(found.loading * dim**0.5, found.pivots)[0]
        else:
            axes = min(dim, recording.num_units)
            weights = start_weight((recording.num_units, dim), 0.1, 25)
            weights[:, :axes] += dim**0.5 * start(recording, axes, self.readout).loading
            values["weights"] = weights
        if recording.observations is not None:
            values |= self.readout.initial_values(recording)
        return {name: value.to(recording.device) for name, value in values.items()}

    def coordinates(self, recording: Recording) -> dict[str, Any]:
        del recording
        return {"condition": np.asarray(self.conditions)} if self.conditions else {}

    def label(self, parameters: VAEParameters) -> Labelled:
        dims = {
            "time_constant": ("latent",),
            "condition_mean": ("condition", "latent"),
            "condition_sd": ("condition", "latent"),
            "first_weight": ("first_hidden", "latent"),
            "first_bias": ("first_hidden",),
            "second_weight": ("second_hidden", "first_hidden"),
            "second_bias": ("second_hidden",),
            "loading": ("unit", ("latent", "first_hidden", "second_hidden")[len(self.hidden)]),
            "offset": ("unit",),
        }
        values = parameters._asdict()
        if self.readout.noise_name is not None:
            values[self.readout.noise_name], dims[self.readout.noise_name] = parameters.noise, ("unit",)
        return {name: (axes, values[name]) for name, axes in dims.items() if values[name] is not None}

    def unlabel(self, values: Mapping[str, Tensor]) -> VAEParameters:
        noise = None if self.readout.noise_name is None else values[self.readout.noise_name]
        return VAEParameters(*(values.get(name) for name in VAEParameters._fields[:-1]), noise)  # type: ignore[arg-type]

    def invariants(self, parameters: VAEParameters) -> Labelled:
        found: Labelled = {}
        with torch.no_grad():
            for name, (dims, value) in self.label(parameters).items():
                if dims == ("unit",):
                    found[name] = dims, value
                elif name == "time_constant":
                    found[name] = dims, value.sort(-1)[0]
                elif name != "loading":
                    # What no order and no sign of latents and hidden units changes.
                    found[f"{name}_size"] = (), value.square().flatten(value.dim() - len(dims)).mean(-1).sqrt()
            found["signal_sd"] = ("unit",), parameters.loading.square().sum(-1).sqrt()
            # Of this unit with the next, which tells more about the loading than its size does.
            pairs = (parameters.loading * parameters.loading.roll(-1, -2)).sum(-1)
            found["neighbour_covariance"] = ("unit",), pairs
        return found

    def transformed(self, parameters: VAEParameters, recording: Recording, seed: int) -> VAEParameters:
        """Turn the latents of a gauged decoder; otherwise give latents and hidden units another order and signs."""
        turns = [turn.to(recording.device) for turn in self.symmetry(seed)]
        order = turns[0].abs()

        def turned(value: Tensor | None, left: Tensor | None, right: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            value = value if left is None else left @ value
            return value if right is None else value @ right.mT

        first, second = turns[1] if len(turns) > 1 else None, turns[2] if len(turns) > 2 else None
        return parameters._replace(
            time_constant=_moved(parameters.time_constant, order),
            condition_mean=turned(parameters.condition_mean, None, turns[0]),
            condition_sd=turned(parameters.condition_sd, None, order),
            first_weight=turned(parameters.first_weight, first, turns[0]),
            first_bias=_moved(parameters.first_bias, first),
            second_weight=turned(parameters.second_weight, second, first),
            second_bias=_moved(parameters.second_bias, second),
            loading=parameters.loading @ turns[-1].mT,
        )

    def symmetry(self, seed: int) -> list[Tensor]:
        """By what `transformed` multiplies the latents, and the units of every hidden layer: the path moves as they
        do.
        """
        generator = torch.Generator().manual_seed(seed)
        if self._gauged:
            return [rotation(self.latent_dim, generator)]
        return [signed_permutation(size, generator) for size in (self.latent_dim, *self.hidden)]

    def _loading_scale(self, recording: Recording) -> Tensor:
        size = (self.latent_dim, *self.hidden)[-1]
        return (self.readout.signal_scale(recording) / math.sqrt(size)).unsqueeze(-1)


def _by_trial(values: Tensor, which: Tensor) -> Tensor:
    """Rows (*draw, 1, condition, latent) for every trial, (*draw, trial, latent)."""
    rows = values[..., which, :]
    return rows.squeeze(-3) if values.dim() > 2 else rows


def _moved(vector: Tensor | None, turn: Tensor | None) -> Tensor | None:
    return None if vector is None or turn is None else (turn @ vector.unsqueeze(-1)).squeeze(-1)
