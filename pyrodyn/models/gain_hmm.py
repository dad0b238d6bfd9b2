r"""Attention as a hidden state that scales the rates of all units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.ndimage import uniform_filter1d
from torch import Tensor

from pyrodyn.errors import ModelError
from pyrodyn.models._modes import mode_contrasts
from pyrodyn.models.hmm import HMM, STARTS, HMMParameters
from pyrodyn.program import Labelled, globals_given
from pyrodyn.readouts import NegativeBinomial, Poisson
from pyrodyn.recording import Recording

WIDTHS = (5, 15, 45, 135)  # bins that the first guess averages over: how long states last is not known yet


@dataclass(frozen=True)
class GainHMM(HMM):
    r"""A hidden Markov model whose states raise and lower the rates of all units together.

    .. math::
        z_t \mid z_{t-1} \sim \mathrm{Categorical}(P_{z_{t-1}}), \qquad
        \log \lambda_{t,n} = d_n + g_{z_t,n}, \qquad g_{k,n} \approx \bar g_k ,

    with counts :math:`y_{t,n}` of mean :math:`\lambda_{t,n}`. The log gains of a unit sum to zero over states. They
    scatter, with standard deviation ``spread``, about those that all units share, whose own prior has the standard
    deviation ``gain_scale``; both are isotropic over states, so that states are exchangeable as in an `HMM`.

    Where gains differ little and a bin holds few spikes, one unit says next to nothing of the state: the common gain is
    what makes the population tell it.

    Parameters
    ----------
    num_modes : int
        At least two.
    readout : Readout
        `Poisson` or `NegativeBinomial`: a gain multiplies an expected count.
    stickiness : float
        As in `HMM`; 100 says that states last for about a hundred bins.
    spread : float
        Prior standard deviation of a unit's log gains about the common ones.
    gain_scale : float
        Prior standard deviation of the common log gains: .3 is a change of a third.

    References
    ----------
    Engel et al., Science 354:1140 (2016), on states of attention in V4; Rabiner, Proc. IEEE 77:257 (1989).
    """

    num_modes: int = 2
    stickiness: float = 100.0
    spread: float = 0.1
    gain_scale: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_modes < 2:
            raise ModelError(f"num_modes must be at least 2, got {self.num_modes}: one state has no gain to tell")
        if not isinstance(self.readout, Poisson | NegativeBinomial):
            raise ModelError(
                f"readout must be Poisson() or NegativeBinomial(), since a gain multiplies counts, got {self.readout!r}"
            )
        if not self.gain_scale > 0:
            raise ModelError(f"gain_scale must be positive, got {self.gain_scale!r}")

    def _sample_common(self, zero: Tensor) -> Tensor:
        return pyro.sample(
            "common_contrasts", dist.Normal(zero.expand(self.num_modes - 1), self.gain_scale).to_event(1)
        )

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        """Of first guesses by activity averaged over windows of several lengths, the most probable."""
        widths = sorted({min(width, recording.num_bins) for width in WIDTHS})
        if recording.observations is None:
            return self._started(recording, widths[0])
        guesses = [self._started(recording, width) for width in widths]
        scores = [
            float(self.evidence(globals_given(self, guess, recording), recording, recording.values).sum())
            for guess in guesses
        ]
        return guesses[int(np.argmax(scores))]

    def _started(self, recording: Recording, width: int) -> dict[str, Tensor]:
        values = self._starting_values(recording, width)
        # What all units share is known better than what one of them does.
        common = values["contrasts"].mean(-1).clamp(-2 * self.gain_scale, 2 * self.gain_scale)
        noisy = values["contrasts"] - common.unsqueeze(-1)
        return values | {"common_contrasts": common, "contrasts": common.unsqueeze(-1) + 0.2 * noisy}

    def _clusters(self, recording: Recording, width: int) -> np.ndarray:
        """A state for every bin, (trial, time), by what all units do together, averaged over ``width`` bins."""
        from sklearn.cluster import KMeans

        counts = recording.values.numpy()
        observed = np.ones_like(counts) if recording.mask is None else recording.mask.numpy().astype(float)
        usual = counts.sum((0, 1)) / np.maximum(observed.sum((0, 1)), 1.0)
        seen, expected = (
            uniform_filter1d(part.sum(-1), width, axis=1, mode="nearest") for part in (counts, observed * usual)
        )
        activity = (seen / np.maximum(expected, 1e-9)).reshape(-1, 1)
        clusters = min(self.num_modes, len(np.unique(activity)))
        found = KMeans(clusters, n_init=STARTS, random_state=0)  # pyright: ignore[reportArgumentType]
        return found.fit_predict(activity).reshape(counts.shape[:2])

    def label(self, parameters: HMMParameters) -> Labelled:
        assert parameters.gain is not None
        return super().label(parameters) | {"gain": (("mode",), parameters.gain)}

    def unlabel(self, values: Mapping[str, Tensor]) -> HMMParameters:
        return super().unlabel(values)._replace(gain=values["gain"])

    def invariants(self, parameters: HMMParameters) -> Labelled:
        assert parameters.gain is not None
        gain = parameters.gain.sort(-1, descending=True).values
        return super().invariants(parameters) | {"sorted_gain": (("mode",), gain)}

    def transformed(self, parameters: HMMParameters, recording: Recording, seed: int) -> HMMParameters:
        assert parameters.gain is not None
        order = self.symmetry(seed)
        return super().transformed(parameters, recording, seed)._replace(gain=parameters.gain[..., order])

    def nearest_copy(
        self, values: Mapping[str, Tensor], reference: Mapping[str, Tensor], recording: Recording
    ) -> dict[str, Tensor]:
        basis = mode_contrasts(self.num_modes).to(recording.center.device)
        gain = (basis @ values["common_contrasts"].unsqueeze(-1)).squeeze(-1)
        turned = torch.take_along_dim(gain, self._numbering(values, reference), -1)
        return super().nearest_copy(values, reference, recording) | {
            "common_contrasts": (basis.mT @ turned.unsqueeze(-1)).squeeze(-1)
        }
