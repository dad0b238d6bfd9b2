r"""The hidden Markov model: discrete modes, summed out exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.ndimage import uniform_filter1d
from torch import Tensor

from pyrodyn.distributions.modes import MarkovModes
from pyrodyn.errors import ModelError
from pyrodyn.linalg import mode_log_normaliser, sample_modes
from pyrodyn.linalg.matrix import broadcast_shapes
from pyrodyn.models._modes import mode_contrasts, numbering
from pyrodyn.program import OBSERVATION_DIMS, IntegratedModel, Labelled
from pyrodyn.readouts import AffineReadout, PerRegion, Poisson, Readout, as_readout, mode_log_likelihood
from pyrodyn.recording import Recording

STARTS = 10  # of the clustering that the first guess comes from
RIDGE = 1e-12  # beside a probability: a stationary distribution of a chain that is stuck still has a solution


class HMMParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event)."""

    initial: Tensor  # (mode)
    transition: Tensor  # (mode, mode_to): rows sum to one
    predictor: Tensor  # (mode, unit)
    noise: Tensor | None  # (unit): the readout's own parameter
    gain: Tensor | None = None  # (mode): the mean over units that the predictors of a mode scatter about


@dataclass(frozen=True)
class HMM(IntegratedModel):
    r"""Hidden Markov model with any readout.

    .. math::
        z_1 &\sim \mathrm{Categorical}(\pi), \qquad z_t \mid z_{t-1} \sim \mathrm{Categorical}(P_{z_{t-1}}), \\
        \eta_{k,n} &= d_n + s_n \sum_j W_{kj} v_{j,n}, \qquad y_{t,n} \sim p(\cdot \mid \eta_{z_t,n}).

    The columns of W are an orthonormal basis of what sums to zero over modes, and v is iid standard normal: d is the
    mean over modes, modes are exchangeable a priori, and no direction is left to the prior alone. s is the readout's
    signal scale. Rows of P have Dirichlet priors with ``stickiness`` added on the diagonal.

    Modes are summed out by the forward algorithm, so that every engine works on the globals alone; the sum is exact.

    Parameters
    ----------
    num_modes : int
    readout : Readout, or mapping of region to Readout
        `Poisson` by default; any of `pyrodyn.readouts`. A mapping gives every region a law of its own.
    stickiness : float
        Transitions to itself that the prior counts for every mode, beside one to each mode.
    spread : float
        Prior standard deviation of a mode about the mean over modes, on the predictor's scale.

    References
    ----------
    Rabiner, Proc. IEEE 77:257 (1989); Fox et al., Ann. Appl. Stat. 5:1020 (2011), on stickiness.
    """

    num_modes: int
    readout: Readout | PerRegion = field(default_factory=Poisson)
    stickiness: float = 10.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.num_modes, int) or self.num_modes < 1:
            raise ModelError(f"num_modes must be a whole number of at least 1, got {self.num_modes!r}")
        object.__setattr__(self, "readout", as_readout(self.readout))
        if not self.stickiness >= 0 or not self.spread > 0:
            raise ModelError(
                f"stickiness must be 0 or more and spread positive, got {self.stickiness!r} and {self.spread!r}"
            )

    @property
    def treatment(self) -> str:
        return "summed out exactly"

    def check(self, recording: Recording) -> None:
        bins = int(recording.lengths.sum())
        if self.num_modes > bins:
            raise ModelError(
                f"num_modes is {self.num_modes} but the recording has {bins} bins in all trials; lower num_modes"
            )
        if recording.num_inputs:
            raise ModelError(
                f"HMM takes no inputs, but the recording has {recording.num_inputs}; leave them out of "
                "Recording.from_arrays"
            )
        if not recording.regular:
            raise ModelError(
                "HMM steps from bin to bin and needs equally spaced bins, but the recording's time axis is irregular; "
                "rebin it, or put the gaps into the mask"
            )
        self.readout.check(recording)

    def coordinates(self, recording: Recording) -> dict[str, np.ndarray]:
        return {"mode": np.arange(self.num_modes), "mode_to": np.arange(self.num_modes)}

    def sample_globals(self, recording: Recording) -> HMMParameters:
        modes, units = self.num_modes, recording.num_units
        zero = torch.zeros((), dtype=torch.float64, device=recording.device)
        offset = self.readout.sample_offset(recording)
        noise = self.readout.sample_noise(recording)
        predictor = offset.unsqueeze(-2)
        if modes == 1:
            one = zero.new_ones(1)
            return HMMParameters(one, one.unsqueeze(-1), predictor, noise)
        initial = pyro.sample("initial", dist.Dirichlet(zero.new_ones(modes)))
        counts = 1.0 + self.stickiness * torch.eye(modes, dtype=zero.dtype, device=zero.device)
        transition = pyro.sample("transition", dist.Dirichlet(counts).to_event(1))
        basis, common = mode_contrasts(modes).to(zero.device), self._sample_common(zero)
        middle = zero.expand(modes - 1, units) if common is None else common.unsqueeze(-1).expand(*common.shape, units)
        contrasts = pyro.sample("contrasts", dist.Normal(middle, self.spread).to_event(2))
        apart = basis @ contrasts * self.readout.signal_scale(recording)
        gain = None if common is None else (basis @ common.unsqueeze(-1)).squeeze(-1)
        return HMMParameters(initial, transition, predictor + apart, noise, gain)

    def _sample_common(self, zero: Tensor) -> Tensor | None:
        """Mean over units of the contrasts' prior, (mode - 1), where it is a site; zero otherwise."""
        del zero
        return None

    def trials(self, parameters: HMMParameters, recording: Recording) -> Tensor:
        law = MarkovModes(parameters.initial, parameters.transition, recording.num_bins)
        modes = pyro.sample("mode", law)
        return pyro.sample(
            "observations",
            self._given(parameters, modes, recording),
            obs=recording.observations,
            infer=OBSERVATION_DIMS,
        )

    def evidence(self, parameters: HMMParameters, recording: Recording, observations: Tensor) -> Tensor:
        initial, transition, likelihood = self._potentials(parameters, recording, observations)
        lost = likelihood.isnan().flatten(-2).any(-1)
        if not bool(lost.any()):
            return mode_log_normaliser(initial, transition, likelihood)
        # Parameters that overflow, as on a diverging trajectory of HMC, have no density.
        return torch.where(lost, -torch.inf, mode_log_normaliser(initial, transition, likelihood.nan_to_num()))

    def draw_local(self, parameters: HMMParameters, recording: Recording) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"mode": sample_modes(*self._potentials(parameters, recording, recording.observations)).squeeze(-2)}

    def latents(self, parameters: HMMParameters, local: Mapping[str, Tensor], recording: Recording) -> Labelled:
        return {"mode_path": (("trial", "time"), local["mode"])}

    def expected(self, parameters: HMMParameters, local: Mapping[str, Tensor], recording: Recording) -> Tensor:
        return self._given(parameters, local["mode"], recording).mean

    def _given(self, parameters: HMMParameters, modes: Tensor, recording: Recording) -> AffineReadout:
        """Law of the observations in modes (*draw, trial, time)."""
        chosen = torch.nn.functional.one_hot(modes, self.num_modes).to(parameters.predictor.dtype)
        zero = parameters.predictor.new_zeros(recording.num_units)
        law = self.readout.bound(recording)
        return AffineReadout(law, chosen, parameters.predictor.mT, zero, parameters.noise, recording.mask)

    def _potentials(
        self, parameters: HMMParameters, recording: Recording, observations: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        initial, transition = parameters.initial.log(), parameters.transition.log().unsqueeze(-3)
        if observations is None:
            shape = (recording.num_trials, recording.num_bins, self.num_modes)
            return initial, transition, parameters.predictor.new_zeros(shape)
        law = self.readout.bound(recording)
        seen = mode_log_likelihood(law, parameters.predictor, parameters.noise, observations, recording.mask)
        return initial, transition, seen

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        return self._starting_values(recording, min(5, recording.num_bins))

    def _starting_values(self, recording: Recording, width: int) -> dict[str, Tensor]:
        """From clusters of observations averaged over ``width`` bins."""
        modes, units = self.num_modes, recording.num_units
        offset = recording.center.new_zeros(units)
        values = {"offset": offset} if recording.observations is None else self.readout.initial_values(recording)
        if modes == 1:
            return values
        counts = recording.center.new_full((modes, modes), 0.5)
        apart = recording.center.new_zeros(modes, units)
        if recording.observations is not None:
            labels = self._clusters(recording, width)
            within = np.arange(recording.num_bins) < recording.lengths[:, None]
            both = within[:, 1:] & within[:, :-1]
            np.add.at(counts.numpy(), (labels[:, :-1][both], labels[:, 1:][both]), 1.0)
            of_modes = [self.readout.initial_values(recording.hide(mask=labels != k))["offset"] for k in range(modes)]
            predictor = torch.stack(of_modes)
            # As if each cluster had been seen a few bins more at the common level.
            size = torch.from_numpy(np.bincount(labels[within], minlength=modes)).to(offset).unsqueeze(-1)
            apart = (predictor - values["offset"]) * size / (size + 5.0)
            values["offset"] = values["offset"] + apart.mean(-2)
        rows = counts / counts.sum(-1, keepdim=True)
        contrasts = mode_contrasts(modes).mT @ apart / self.readout.signal_scale(recording)
        return values | {
            "initial": counts.new_full((modes,), 1.0 / modes),
            "transition": rows,
            "contrasts": contrasts,
        }

    def _clusters(self, recording: Recording, width: int) -> np.ndarray:
        """A mode for every bin, (trial, time), by k-means of observations averaged over ``width`` bins."""
        from sklearn.cluster import KMeans

        values = self.readout.linearise(recording).numpy()
        if recording.mask is not None:
            values = np.where(recording.mask.numpy(), values, 0.0)
        flat = uniform_filter1d(values, width, axis=1, mode="nearest").reshape(-1, recording.num_units)
        clusters = min(self.num_modes, len(np.unique(flat, axis=0)))
        found = KMeans(clusters, n_init=STARTS, random_state=0)  # pyright: ignore[reportArgumentType]
        return found.fit_predict(flat).reshape(values.shape[:2])

    def label(self, parameters: HMMParameters) -> Labelled:
        labelled = {
            "initial": (("mode",), parameters.initial),
            "transition": (("mode", "mode_to"), parameters.transition),
            "predictor": (("mode", "unit"), parameters.predictor),
        }
        if self.readout.noise_name is not None:
            labelled[self.readout.noise_name] = (("unit",), parameters.noise)
        return labelled

    def unlabel(self, values: Mapping[str, Tensor]) -> HMMParameters:
        noise = None if self.readout.noise_name is None else values[self.readout.noise_name]
        return HMMParameters(values["initial"], values["transition"], values["predictor"], noise)

    def invariants(self, parameters: HMMParameters) -> Labelled:
        initial, transition, predictor, noise, _ = parameters
        lead = broadcast_shapes(predictor.shape[:-2], transition.shape[:-2])
        share = stationary_distribution(transition).expand(*lead, -1)
        middle = (share.unsqueeze(-1) * predictor).sum(-2)
        apart = (share.unsqueeze(-1) * (predictor - middle.unsqueeze(-2)).square()).sum(-2)
        ends = torch.linalg.eigvals(transition).abs().expand(*lead, -1)
        stay = transition.diagonal(dim1=-2, dim2=-1).expand(*lead, -1)
        found = {
            "occupancy": (("mode",), share.sort(-1, descending=True).values),
            "stay_probability": (("mode",), stay.sort(-1, descending=True).values),
            "transition_eigenvalue_modulus": (("mode",), ends.sort(-1, descending=True).values),
            "initial_predictor": (("unit",), (initial.unsqueeze(-1) * predictor).sum(-2)),
            "predictor_mean": (("unit",), middle),
            "predictor_sd": (("unit",), apart.sqrt()),
        }
        if self.readout.noise_name is not None:
            found[self.readout.noise_name] = (("unit",), noise)
        return found

    def transformed(self, parameters: HMMParameters, recording: Recording, seed: int) -> HMMParameters:
        """Number the modes anew at random."""
        order = self.symmetry(seed)
        return parameters._replace(
            initial=parameters.initial[..., order],
            transition=parameters.transition[..., order, :][..., order],
            predictor=parameters.predictor[..., order, :],
        )

    def symmetry(self, seed: int) -> Tensor:
        """The random order that `transformed` puts the modes in."""
        return torch.randperm(self.num_modes, generator=torch.Generator().manual_seed(seed))

    def log_copies(self, recording: Recording) -> float:
        """Modes may be numbered in any order."""
        return math.lgamma(self.num_modes + 1)

    def nearest_copy(
        self, values: Mapping[str, Tensor], reference: Mapping[str, Tensor], recording: Recording
    ) -> dict[str, Tensor]:
        """Modes numbered such that their predictors lie nearest to those of the reference, in least squares."""
        if self.num_modes == 1:
            return dict(values)
        basis = mode_contrasts(self.num_modes).to(recording.center.device)
        apart, order = basis @ values["contrasts"], self._numbering(values, reference)
        rows = torch.take_along_dim(values["transition"], order.unsqueeze(-1), -2)
        return dict(values) | {
            "initial": torch.take_along_dim(values["initial"], order, -1),
            "transition": torch.take_along_dim(rows, order.unsqueeze(-2), -1),
            "contrasts": basis.mT @ torch.take_along_dim(apart, order.unsqueeze(-1), -2),
        }

    def _numbering(self, values: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Tensor:
        """For every mode of the reference the mode of ``values`` that lies nearest, (*draw, 1, mode)."""
        basis = mode_contrasts(self.num_modes).to(values["contrasts"].device)
        apart, wanted = basis @ values["contrasts"], basis @ reference["contrasts"]
        costs = (wanted.unsqueeze(-2) - apart.unsqueeze(-3)).square().sum(-1)  # (*draw, 1, mode, own mode)
        return numbering(costs)


def stationary_distribution(transition: Tensor) -> Tensor:
    """Share of time in each mode, (*batch, mode), of a chain with transition probabilities (*batch, mode, mode_to)."""
    modes = transition.shape[-1]
    # (I - P' + 1 1') pi = 1 has the stationary distribution as its one solution.
    system = torch.eye(modes, dtype=transition.dtype, device=transition.device) * (1.0 + RIDGE) - transition.mT + 1.0
    return torch.linalg.solve(system, torch.ones_like(transition[..., :1])).squeeze(-1)
