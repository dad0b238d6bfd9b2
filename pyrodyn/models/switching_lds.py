r"""Switching linear dynamics: a latent path whose dynamics change with a hidden mode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from pyrodyn.distributions import GaugedLoading, SwitchingPath
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.errors import ModelError
from pyrodyn.models._startup import linear_start
from pyrodyn.models._switching import (
    ModeSteps,
    StepPrior,
    check_modes,
    check_options,
    mode_summaries,
    permuted,
    rotated,
    step_labels,
)
from pyrodyn.models._switching_start import initial_sites, latent_start
from pyrodyn.models._switching_sweep import SwitchingSweep
from pyrodyn.models._symmetry import rotation
from pyrodyn.program import Labelled, StateSpaceModel
from pyrodyn.readouts import AffineReadout, Poisson, Readout
from pyrodyn.recording import Recording


class SwitchingLDSParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event); the first are `ModeSteps`."""

    initial: Tensor  # (mode)
    transition: Tensor  # (mode, mode_to): rows sum to one
    dynamics: Tensor  # (mode, latent, latent)
    bias: Tensor  # (mode, latent)
    process_noise: Tensor  # (mode, latent, latent), covariances
    input_gain: Tensor | None  # (mode, latent, input)
    recurrence: Tensor | None  # (mode, latent)
    mode_gain: Tensor | None  # (mode, input)
    loading: Tensor  # (unit, latent)
    offset: Tensor  # (unit)
    noise: Tensor | None  # (unit): the readout's own parameter

    @property
    def steps(self) -> ModeSteps:
        parts: Any = self[: len(ModeSteps._fields)]
        return ModeSteps(*parts)


@dataclass(frozen=True)
class SwitchingLDS(StateSpaceModel):
    r"""Switching linear dynamical system with any readout; with ``recurrent``, modes that depend on the state.

    .. math::
        z_t \mid z_{t-1}, x_{t-1} &\sim \mathrm{softmax}\big(\log P_{z_{t-1}} + R x_{t-1} + W u_t\big), \\
        x_1 &\sim N(0, I), \qquad x_t = A_{z_t} x_{t-1} + b_{z_t} + B_{z_t} u_t + \epsilon_t, \qquad
        \epsilon_t \sim N(0, Q_{z_t}), \\
        \eta_t &= C x_t + d, \qquad y_{t,n} \sim p(\cdot \mid \eta_{t,n}).

    R and W are there with ``recurrent`` alone. Given the path the modes are summed out exactly (`SwitchingPath`), so
    that the program has no discrete site. Priors are those of `pyrodyn.models._switching.StepPrior`, and for the
    readout those of `LDS`; with one mode it is an LDS with a bias.

    **Symmetries.** Rotations of the latent, fixed by the loading as in `LDS`; and the numbers of the modes. Modes are
    exchangeable a priori; `inference.Gibbs` numbers them alike in all draws.

    Parameters
    ----------
    num_modes, latent_dim : int
    recurrent : bool
        Whether the state, and the inputs, enter the transitions.
    readout : Readout
    stickiness, concentration : float
        Transitions that the prior counts for every mode: to itself, and to each mode besides. With a concentration well
        below 1, modes that are not needed die out.
    persistence, dynamics_scale : float
        Entries of A are normal about ``persistence`` times the identity, with a standard deviation of
        ``dynamics_scale`` over the root of the number of latents.
    bias_scale : float
        Prior standard deviation of the entries of b, and of B for an input of unit standard deviation.
    max_radius : float
        Bound of every mode's spectral radius. Above 1, modes may be unstable for a while.

    References
    ----------
    Fox et al., IEEE Trans. Signal Process. 59:1569 (2011); Linderman et al., AISTATS 2017 (recurrent).
    """

    num_modes: int
    latent_dim: int
    recurrent: bool = False
    readout: Readout = field(default_factory=Poisson)
    stickiness: float = 10.0
    concentration: float = 1.0
    persistence: float = 0.85
    dynamics_scale: float = 0.25
    bias_scale: float = 0.5
    max_radius: float = 1.05

    def __post_init__(self) -> None:
        check_options(self)
        if isinstance(self.latent_dim, bool) or not isinstance(self.latent_dim, int) or self.latent_dim < 1:
            raise ModelError(f"latent_dim must be a whole number of at least 1, got {self.latent_dim!r}")
        if not isinstance(self.readout, Readout):
            raise ModelError(f"readout must be one of pyrodyn.readouts, such as Poisson(), got {self.readout!r}")

    def check(self, recording: Recording) -> None:
        if self.latent_dim > recording.num_units:
            raise ModelError(
                f"latent_dim is {self.latent_dim} but the recording has {recording.num_units} units; a loading "
                "(unit, latent) of full rank needs latent_dim <= units: lower latent_dim"
            )
        check_modes(self, recording, 1)
        self.readout.check(recording)

    # ------------------------------------------------------------------------------------------ the program

    def step_prior(self, recording: Recording) -> StepPrior:
        """Prior of the steps of the path."""
        return StepPrior(
            self.num_modes, self.latent_dim, 1, recording.num_inputs, self.concentration, self.stickiness,
            self.persistence, self.dynamics_scale, self.bias_scale, self.max_radius, self.recurrent,
        )  # fmt: skip

    def loading_scale(self, recording: Recording) -> Tensor:
        """Prior standard deviation of a unit's loadings, (unit, 1)."""
        return (self.readout.signal_scale(recording) / math.sqrt(self.latent_dim)).unsqueeze(-1)

    def sample_globals(self, recording: Recording) -> SwitchingLDSParameters:
        steps = self.step_prior(recording).sample(recording)
        weights = pyro.sample("weights", GaugedLoading(recording.num_units, self.latent_dim, self.pivots(recording)))
        offset = self.readout.sample_offset(recording)
        noise = self.readout.sample_noise(recording)
        loading = self.loading_scale(recording) * weights
        return SwitchingLDSParameters(**steps._asdict(), loading=loading, offset=offset, noise=noise)

    def latent_path(self, parameters: SwitchingLDSParameters, recording: Recording) -> SwitchingPath:
        return self.step_prior(recording).path(parameters.steps, recording)

    def readout_law(self, parameters: SwitchingLDSParameters, path: Tensor, recording: Recording) -> AffineReadout:
        return AffineReadout(
            self.readout, path, parameters.loading, parameters.offset, parameters.noise, recording.mask
        )

    def pivots(self, recording: Recording) -> tuple[int, ...]:
        """The units whose loading rows fix the rotation; depends on the recording alone."""
        return linear_start(recording, self.latent_dim, self.readout).pivots

    def latents(
        self, parameters: SwitchingLDSParameters, local: Mapping[str, Tensor], recording: Recording
    ) -> Labelled:
        path = local["latent"]
        modes = local.get("mode")
        if modes is None:
            modes = self.latent_path(parameters, recording).sample_modes(path)
        return {"path": (("trial", "time", "latent"), path), "mode_path": (("trial", "time"), modes)}

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        fit = latent_start(self.step_prior(recording), self.readout, recording)
        assert fit.seen is not None
        weights, turn = gauge_fix(fit.seen.loading[0, 0] / self.loading_scale(recording), self.pivots(recording))
        values = initial_sites(self.step_prior(recording), fit, recording, turn)
        values |= {"weights": weights, "offset": fit.seen.offset[0, 0]}
        if fit.seen.noise is not None:
            values[str(self.readout.noise_name)] = fit.seen.noise[0, 0]
        return {name: value.to(recording.device) for name, value in values.items()}

    def conditionals(self, recording: Recording, observations: Tensor | None = None) -> SwitchingSweep:
        """What `inference.Gibbs` draws from."""
        return SwitchingSweep(self, recording, observations)

    # ------------------------------------------------------------------------------------------ the posterior

    def coordinates(self, recording: Recording) -> dict[str, Any]:
        return {"mode": np.arange(self.num_modes), "mode_to": np.arange(self.num_modes)}

    def label(self, parameters: SwitchingLDSParameters) -> Labelled:
        labelled = step_labels(parameters.steps, "latent")
        labelled |= {"loading": (("unit", "latent"), parameters.loading), "offset": (("unit",), parameters.offset)}
        if self.readout.noise_name is not None:
            assert parameters.noise is not None
            labelled[self.readout.noise_name] = (("unit",), parameters.noise)
        return labelled

    def unlabel(self, values: Mapping[str, Tensor]) -> SwitchingLDSParameters:
        noise = None if self.readout.noise_name is None else values[self.readout.noise_name]
        held: Any = {name: values.get(name) for name in SwitchingLDSParameters._fields} | {"noise": noise}
        return SwitchingLDSParameters(**held)

    def invariants(self, parameters: SwitchingLDSParameters) -> Labelled:
        loading = parameters.loading
        found = mode_summaries(parameters.steps, loading)
        found |= {"signal_sd": (("unit",), loading.square().sum(-1).sqrt()), "offset": (("unit",), parameters.offset)}
        if self.readout.noise_name is not None:
            assert parameters.noise is not None
            found[self.readout.noise_name] = (("unit",), parameters.noise)
        return found

    def transformed(
        self, parameters: SwitchingLDSParameters, recording: Recording, seed: int
    ) -> SwitchingLDSParameters:
        """Turn the latent space by a random orthogonal matrix, and number the modes anew."""
        order, turn = self.symmetry(seed)
        steps = rotated(permuted(parameters.steps, order), turn)
        return parameters._replace(loading=parameters.loading @ turn, **steps._asdict())

    def symmetry(self, seed: int) -> tuple[Tensor, Tensor]:
        """A random numbering of the modes, (mode,), and a random turn of the latents, (latent, latent)."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.num_modes, generator=generator)
        return order, rotation(self.latent_dim, generator)

    def log_copies(self, recording: Recording) -> float:
        """Modes may be numbered in any order."""
        return math.lgamma(self.num_modes + 1)

    def nearest_copy(
        self, values: Mapping[str, Tensor], reference: Mapping[str, Tensor], recording: Recording
    ) -> dict[str, Tensor]:
        """Modes numbered such that their dynamics and biases lie nearest to those of the reference."""
        return self.step_prior(recording).nearest(values, reference)
