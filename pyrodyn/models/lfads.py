r"""LFADS: a generator that runs by itself from an initial state, with inputs inferred where it cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrodyn.distributions import GaussMarkov, StudentSteps
from pyrodyn.errors import ModelError
from pyrodyn.models._lfads_recognition import INITIAL_DIMS, INPUT_DIMS, LFADSRecognition
from pyrodyn.models._startup import linear_start
from pyrodyn.models._symmetry import order_and_signs, rotation
from pyrodyn.networks import Gated
from pyrodyn.networks.cells import BoundGated, CellWeights, driven
from pyrodyn.networks.layers import prior_sd, product, sample_weight, start_weight
from pyrodyn.networks.precision import lowered
from pyrodyn.networks.recall import recalled
from pyrodyn.program import OBSERVATION_DIMS, Labelled, TrialModel
from pyrodyn.readouts import AffineReadout, Poisson, Readout
from pyrodyn.recording import Recording

OPEN_LOOP = 20  # bins that the generator runs by itself for the invariants


class LFADSParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event)."""

    initial_map: Tensor  # (generator, initial)
    initial_bias: Tensor  # (generator)
    recurrent: Tensor  # (gate x generator, generator)
    bias: Tensor  # (gate x generator)
    candidate_bias: Tensor  # (generator)
    input_weight: Tensor | None  # (gate x generator, input)
    control_weight: Tensor | None  # (gate x generator, inferred_input)
    input_sd: Tensor | None  # (inferred_input)
    input_persistence: Tensor | None  # (inferred_input)
    factor_weight: Tensor  # (latent, generator)
    loading: Tensor  # (unit, latent)
    offset: Tensor  # (unit)
    noise: Tensor | None  # (unit): the readout's own parameter

    @property
    def of_generator(self) -> tuple[Tensor | None, ...]:
        """All on which the generator's states depend."""
        return self[:7]

    @property
    def cell(self) -> CellWeights:
        """The generator's weights, with those of recorded inputs."""
        return CellWeights(self.recurrent, None, self.bias, self.candidate_bias, None, self.input_weight)


@dataclass(frozen=True)
class LFADS(TrialModel):
    r"""Latent factor analysis via dynamical systems.

    .. math::
        z_i &\sim N(0, I), \quad g_0 = W z_i + b, \qquad g_t = \mathrm{GRU}(g_{t-1};\, V u_t + B v_t), \\
        u_{t,k} &= a_k u_{t-1,k} + s_k (1 - a_k^2)^{1/2} \epsilon_{t,k}, \qquad \epsilon \sim t_\nu, \\
        f_t &= F g_t, \qquad \eta_t = C f_t + d, \qquad y_{t,n} \sim p(\cdot \mid \eta_{t,n}).

    What differs between trials is the initial code z and, with ``input_dim`` above zero, the inferred inputs u; v are
    the recording's own inputs. All weights are sample sites with normal priors of variance one over the number of
    inputs, which take the place of the usual penalty (L2).

    The recognition network belongs to the guide (`pyrodyn.guides.Amortised`): one encoder reads the trial for z,
    another gives a controller, bin by bin, what it needs to infer u while the generator runs.

    **Symmetry.** The generator's units have no order and signs of their own; factors may be turned together with the
    loading. Nothing but invariants may be compared between fits.

    Parameters
    ----------
    latent_dim : int
        Factors.
    generator_dim : int
        Units of the generator.
    initial_dim : int
        Entries of z.
    input_dim : int
        Inferred inputs; with none the generator is autonomous and there is no controller.
    input_degrees : float, optional
        :math:`\nu`, degrees of freedom of the inputs' steps; None makes them Gaussian. Few let an input jump. Under
        a Gaussian law small inputs that come early, and grow along the generator's unstable directions, cost less than
        the sudden one that was there.
    controller_dim : int
        Units of the controller, in the guide.
    readout : Readout
    dropout : float
        Coordinated dropout that training uses unless told otherwise (`pyrodyn.inference.Training`): without it,
        inferred inputs may learn to copy spikes.

    References
    ----------
    Pandarinath et al., Nat. Methods 15:805 (2018); Keshtkaran & Pandarinath, NeurIPS 2019 (dropout); Keshtkaran et al.,
    Nat. Methods 19:1572 (2022); Schimel et al., ICLR 2022 (inputs under Student's t).
    """

    latent_dim: int
    generator_dim: int = 64
    initial_dim: int = 32
    input_dim: int = 0
    input_degrees: float | None = 2.0
    controller_dim: int = 64
    readout: Readout = field(default_factory=Poisson)
    dropout: float = 0.3

    def __post_init__(self) -> None:
        for name, least in (("latent_dim", 1), ("generator_dim", 1), ("initial_dim", 1), ("input_dim", 0),
                            ("controller_dim", 1)):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ModelError(f"{name} must be a whole number of at least {least}, got {value!r}")
        degrees = self.input_degrees
        if degrees is not None and not (isinstance(degrees, int | float) and 0.0 < degrees < math.inf):
            raise ModelError(
                f"input_degrees must be a positive number, got {degrees!r}: 2 lets inputs jump, and None makes their "
                "steps Gaussian"
            )
        if not isinstance(self.readout, Readout):
            raise ModelError(f"readout must be one of pyrodyn.readouts, such as Poisson(), got {self.readout!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ModelError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    def check(self, recording: Recording) -> None:
        if not recording.regular:
            raise ModelError(
                "LFADS steps from bin to bin and needs equally spaced bins, but the recording's time axis is "
                "irregular; rebin it, or put the gaps into the mask"
            )
        self.readout.check(recording)

    def sample_globals(self, recording: Recording) -> LFADSParameters:
        hidden, rows = self.generator_dim, 3 * self.generator_dim
        control = input_sd = persistence = None
        initial_map = sample_weight("initial_map", (hidden, self.initial_dim), prior_sd(self.initial_dim), recording)
        initial_bias = sample_weight("initial_bias", (hidden,), 0.3, recording)
        weights = Gated().sample(hidden, recording)
        if self.input_dim:
            control = sample_weight("control_weight", (rows, self.input_dim), prior_sd(self.input_dim), recording)
            ones = torch.ones(self.input_dim, dtype=torch.float64, device=recording.device)
            input_sd = pyro.sample("input_sd", dist.LogNormal(math.log(0.3) * ones, 1.0).to_event(1))
            persistence = pyro.sample("input_persistence", dist.Beta(ones, 2.0 * ones).to_event(1))
        factor_weight = sample_weight("factor_weight", (self.latent_dim, hidden), prior_sd(hidden), recording)
        loading = sample_weight("loading", (recording.num_units, self.latent_dim), 1.0, recording)
        offset = self.readout.sample_offset(recording)
        noise = self.readout.sample_noise(recording)
        return LFADSParameters(
            initial_map, initial_bias, weights.recurrent, weights.bias, weights.candidate_bias,  # type: ignore[arg-type]
            weights.input_weight, control, input_sd, persistence, factor_weight,
            self._loading_scale(recording) * loading, offset, noise,
        )  # fmt: skip

    def trials(self, parameters: LFADSParameters, recording: Recording) -> Tensor:
        zeros = torch.zeros(self.initial_dim, dtype=torch.float64, device=recording.device)
        local = {"initial": pyro.sample("initial", dist.Normal(zeros, 1.0).to_event(1), infer=INITIAL_DIMS)}
        if self.input_dim:
            law = self.input_law(parameters, recording)
            local["inferred_input"] = pyro.sample("inferred_input", law, infer=INPUT_DIMS)
        law = self._readout_law(parameters, self._factors(parameters, local, recording), recording)
        return pyro.sample("observations", law, obs=recording.observations, infer=OBSERVATION_DIMS)

    def input_law(self, parameters: LFADSParameters, recording: Recording) -> GaussMarkov | StudentSteps:
        """The prior of the inferred inputs: event (time, inferred_input), batch (*draw, 1) or ()."""
        assert parameters.input_sd is not None and parameters.input_persistence is not None
        if self.input_degrees is not None:
            return StudentSteps(
                parameters.input_persistence, parameters.input_sd, self.input_degrees, num_bins=recording.num_bins
            )
        variance = parameters.input_sd.square()
        return GaussMarkov.from_dynamics(
            torch.diag_embed(parameters.input_persistence),
            torch.diag_embed(variance * (1.0 - parameters.input_persistence.square())),
            num_bins=recording.num_bins,
            initial_covariance=torch.diag_embed(variance),
        )

    def initial_state(self, parameters: LFADSParameters, code: Tensor) -> Tensor:
        """The generator before the first bin, (*draw, trial, generator)."""
        return product(code, parameters.initial_map, 1) + parameters.initial_bias

    def drive(self, parameters: LFADSParameters, recording: Recording) -> Tensor:
        """What bias and recorded inputs give the generator, (*draw, trial or 1, time, gate x generator)."""
        return driven(parameters.cell, recording.inputs, recording.num_bins)

    def _states(self, parameters: LFADSParameters, local: Mapping[str, Tensor], recording: Recording) -> Tensor:
        """States of the generator, (*draw, trial, time, generator)."""
        code, inputs = local["initial"], local.get("inferred_input")
        known = recalled(inputs, (code, *parameters.of_generator))
        if known is not None:  # the recognition network has run the generator already
            return known
        drive = self.drive(parameters, recording)
        if inputs is not None:
            assert parameters.control_weight is not None
            drive = drive + product(inputs, parameters.control_weight)
        bound = BoundGated(parameters.recurrent, parameters.candidate_bias, drive)
        return bound.scan(self.initial_state(parameters, code), None, None)

    def _factors(self, parameters: LFADSParameters, local: Mapping[str, Tensor], recording: Recording) -> Tensor:
        """(*draw, trial, time, latent)."""
        states = self._states(parameters, local, recording)
        (weight,) = lowered(parameters.factor_weight)
        return product(states, weight).to(torch.float64)

    def _readout_law(self, parameters: LFADSParameters, factors: Tensor, recording: Recording) -> AffineReadout:
        return AffineReadout(
            self.readout, factors, parameters.loading, parameters.offset, parameters.noise, recording.mask
        )

    def latents(self, parameters: LFADSParameters, local: Mapping[str, Tensor], recording: Recording) -> Labelled:
        shown: Labelled = {"path": (("trial", "time", "latent"), self._factors(parameters, local, recording))}
        if self.input_dim:
            shown["inferred_inputs"] = ("trial", "time", "inferred_input"), local["inferred_input"]
        return shown

    def expected(self, parameters: LFADSParameters, local: Mapping[str, Tensor], recording: Recording) -> Tensor:
        return self._readout_law(parameters, self._factors(parameters, local, recording), recording).mean

    def recognition(self, recording: Recording, hidden_dim: int) -> nn.Module:
        """See `pyrodyn.program.Recognised`."""
        return LFADSRecognition(self, recording, hidden_dim)

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        hidden, rows = self.generator_dim, 3 * self.generator_dim
        axes = min(self.latent_dim, recording.num_units)
        start = linear_start(recording, axes, self.readout)
        loading = torch.zeros(recording.num_units, self.latent_dim, dtype=torch.float64)
        loading[:, :axes] = self.latent_dim**0.5 * start.loading
        values = Gated().initial_values(hidden, recording) | {
            "initial_map": start_weight((hidden, self.initial_dim), prior_sd(self.initial_dim), 10),
            "initial_bias": torch.zeros(hidden, dtype=torch.float64),
            "factor_weight": start_weight((self.latent_dim, hidden), prior_sd(hidden), 11),
            "loading": loading,
        }
        if self.input_dim:
            values |= {
                "control_weight": start_weight((rows, self.input_dim), prior_sd(self.input_dim), 12),
                "input_sd": torch.full((self.input_dim,), 0.3, dtype=torch.float64),
                "input_persistence": torch.full((self.input_dim,), 0.5, dtype=torch.float64),
            }
        if recording.observations is not None:
            values |= self.readout.initial_values(recording)
        return {name: value.to(recording.device) for name, value in values.items()}

    def label(self, parameters: LFADSParameters) -> Labelled:
        dims = {
            "initial_map": ("generator", "initial"),
            "initial_bias": ("generator",),
            "recurrent": ("gated_generator", "generator"),
            "bias": ("gated_generator",),
            "candidate_bias": ("generator",),
            "input_weight": ("gated_generator", "input"),
            "control_weight": ("gated_generator", "inferred_input"),
            "input_sd": ("inferred_input",),
            "input_persistence": ("inferred_input",),
            "factor_weight": ("latent", "generator"),
            "loading": ("unit", "latent"),
            "offset": ("unit",),
        }
        values = parameters._asdict()
        if self.readout.noise_name is not None:
            values[self.readout.noise_name], dims[self.readout.noise_name] = parameters.noise, ("unit",)
        return {name: (axes, values[name]) for name, axes in dims.items() if values[name] is not None}

    def unlabel(self, values: Mapping[str, Tensor]) -> LFADSParameters:
        noise = None if self.readout.noise_name is None else values[self.readout.noise_name]
        return LFADSParameters(*(values.get(name) for name in LFADSParameters._fields[:-1]), noise)  # type: ignore[arg-type]

    def invariants(self, parameters: LFADSParameters) -> Labelled:
        with torch.no_grad():
            matrix = parameters.recurrent[..., 2 * self.generator_dim :, :]
            found: Labelled = {"spectral_radius": ((), torch.linalg.eigvals(matrix).abs().amax(-1))}
            for name, (dims, value) in self.label(parameters).items():
                if dims == ("unit",):
                    found[name] = dims, value
                elif "unit" not in dims and "latent" not in dims:
                    found[f"{name}_size"] = (), value.square().flatten(value.dim() - len(dims)).mean(-1).sqrt()
            read = parameters.loading @ parameters.factor_weight
            found["signal_sd"] = ("unit",), read.square().sum(-1).sqrt()
            drive = parameters.bias.unsqueeze(-2).expand(*parameters.bias.shape[:-1], OPEN_LOOP, -1)
            bound = BoundGated(parameters.recurrent, parameters.candidate_bias, drive)
            state = bound.scan(parameters.initial_bias, None, None)[..., -1, :]
            found["open_loop"] = ("unit",), product(state, read, 1) + parameters.offset
        return found

    def transformed(self, parameters: LFADSParameters, recording: Recording, seed: int) -> LFADSParameters:
        """Put the generator's units in another order with other signs, and turn the factors with the loading."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (*order_and_signs(self.generator_dim, generator), rotation(self.latent_dim, generator))
        order, sign, turn = (part.to(recording.device) for part in drawn)
        cell = Gated().permuted(parameters.cell, order, sign)
        control = parameters.control_weight
        if control is not None:
            control = Gated().permuted(parameters.cell._replace(input_weight=control), order, sign).input_weight
        return parameters._replace(
            initial_map=sign[:, None] * parameters.initial_map[..., order, :],
            initial_bias=sign * parameters.initial_bias[..., order],
            recurrent=cell.recurrent,
            bias=cell.bias,
            candidate_bias=cell.candidate_bias,
            input_weight=cell.input_weight,
            control_weight=control,
            factor_weight=turn @ parameters.factor_weight[..., order] * sign,
            loading=parameters.loading @ turn.mT,
        )

    def _loading_scale(self, recording: Recording) -> Tensor:
        return (self.readout.signal_scale(recording) * prior_sd(self.latent_dim)).unsqueeze(-1)
