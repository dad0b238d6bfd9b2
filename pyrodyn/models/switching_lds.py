r"""Switching linear dynamics: a latent path whose dynamics change with a hidden mode."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pyrodyn.errors import ModelError
from pyrodyn.models._startup import LinearStart, linear_start
from pyrodyn.models._switching import StepPrior
from pyrodyn.models._switching_blocks import Blocks, View
from pyrodyn.models._switching_checks import check_modes, check_options
from pyrodyn.models._switching_model import SwitchingModel
from pyrodyn.readouts import Poisson, Readout
from pyrodyn.recording import Recording


@dataclass(frozen=True)
class SwitchingLDS(SwitchingModel):
    r"""Switching linear dynamical system with any readout; with ``recurrent``, modes that depend on the state.

    .. math::
        z_t \mid z_{t-1}, x_{t-1} &\sim \mathrm{softmax}\big(\log P_{z_{t-1}} + R x_{t-1} + r + W u_t\big), \\
        x_1 &\sim N(0, I), \qquad x_t = A_{z_t} x_{t-1} + b_{z_t} + B_{z_t} u_t + \epsilon_t, \qquad
        \epsilon_t \sim N(0, Q_{z_t}), \\
        \eta_t &= C x_t + d, \qquad y_{t,n} \sim p(\cdot \mid \eta_{t,n}).

    R, r and W are there with ``recurrent`` alone. Given the path the modes are summed out exactly (`SwitchingPath`), so
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

    def step_prior(self, recording: Recording) -> StepPrior:
        return StepPrior(
            self.num_modes, Blocks.undivided(self.latent_dim), 1, recording.num_inputs, self.concentration,
            self.stickiness, self.persistence, self.dynamics_scale, self.bias_scale, self.max_radius, self.recurrent,
        )  # fmt: skip

    def views(self, recording: Recording) -> list[View]:
        units, (start,) = torch.arange(recording.num_units), self.starts(recording)
        return [View(units, slice(0, self.latent_dim), self.readout, start.pivots)]

    def starts(self, recording: Recording) -> list[LinearStart]:
        return [linear_start(recording, self.latent_dim, self.readout)]
