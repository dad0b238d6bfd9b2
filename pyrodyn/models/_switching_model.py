"""What models of a latent path whose linear dynamics switch have in common, undivided or divided into regions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from pyrodyn.conditionals.modes import settle
from pyrodyn.conditionals.switching import draw_path_and_modes
from pyrodyn.distributions import GaugedLoading, SwitchingPath
from pyrodyn.models._startup import LinearStart
from pyrodyn.models._switching import Renumbered
from pyrodyn.models._switching_blocks import View
from pyrodyn.models._switching_start import initial_sites, latent_start
from pyrodyn.models._switching_steps import ModeSteps, mode_summaries, permuted, rotated, step_labels
from pyrodyn.models._switching_sweep import SETTLING, SwitchingSweep, gauged
from pyrodyn.models._symmetry import rotation
from pyrodyn.program import Labelled, StateSpaceModel, draws_of
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

AT_ONCE = 500_000  # (draw, trial, time, unit) entries of draws whose path and modes are drawn together


class SwitchingParameters(NamedTuple):
    """Global parameters, each (*draw, 1, *event) or (*event); the first are `ModeSteps`."""

    initial: Tensor  # (mode)
    transition: Tensor  # (mode, mode_to): rows sum to one
    dynamics: Tensor  # (mode, latent, latent)
    bias: Tensor  # (mode, latent)
    process_noise: Tensor  # (mode, latent, latent), covariances
    input_gain: Tensor | None  # (mode, latent, input)
    recurrence: Tensor | None  # (mode, latent)
    recurrence_bias: Tensor | None  # (mode)
    mode_gain: Tensor | None  # (mode, input)
    loading: Tensor  # (unit, latent)
    offset: Tensor  # (unit)
    noise: Tensor | None  # (unit): the readout's own parameter

    @property
    def steps(self) -> ModeSteps:
        parts: Any = self[: len(ModeSteps._fields)]
        return ModeSteps(*parts)


class SwitchingModel(Renumbered, StateSpaceModel):
    """A path under switching linear dynamics, and units that each read out the latents of their region.

    Subclasses say how latents fall into regions, and which units read which out; all else is written once.
    """

    readout: Any  # Readout or PerRegion

    @abstractmethod
    def views(self, recording: Recording) -> list[View]:
        """The units of every region, and the latents that they read out."""

    @abstractmethod
    def starts(self, recording: Recording) -> list[LinearStart]:
        """A linear system without modes for every region by itself: it depends on the recording alone."""

    # ------------------------------------------------------------------------------------------ the program

    def loading_scale(self, recording: Recording) -> Tensor:
        """Prior standard deviation of a unit's loadings, (unit, 1)."""
        scale = self.readout.signal_scale(recording).clone()
        for view in self.views(recording):
            scale[view.units] /= math.sqrt(view.place.stop - view.place.start)
        return scale.unsqueeze(-1)

    def sample_globals(self, recording: Recording) -> SwitchingParameters:
        prior, scale = self.step_prior(recording), self.loading_scale(recording)
        steps, loading = prior.sample(recording), torch.zeros(0)
        for view, suffix in zip(self.views(recording), prior.blocks.suffixes, strict=True):
            law = GaugedLoading(len(view.units), len(view.pivots), view.pivots)
            own = scale[view.units] * pyro.sample(f"weights{suffix}", law)
            if not loading.numel():
                loading = own.new_zeros(*own.shape[:-2], recording.num_units, prior.latent_dim)
            wide = torch.nn.functional.pad(own, (view.place.start, prior.latent_dim - view.place.stop))
            loading = loading.index_copy(-2, view.units, wide)
        offset = self.readout.sample_offset(recording)
        noise = self.readout.sample_noise(recording)
        return SwitchingParameters(**steps._asdict(), loading=loading, offset=offset, noise=noise)

    def latent_path(self, parameters: SwitchingParameters, recording: Recording) -> SwitchingPath:
        return self.step_prior(recording).path(parameters.steps, recording)

    def readout_law(self, parameters: SwitchingParameters, path: Tensor, recording: Recording) -> AffineReadout:
        law = self.readout.bound(recording)
        return AffineReadout(law, path, parameters.loading, parameters.offset, parameters.noise, recording.mask)

    def latents(self, parameters: SwitchingParameters, local: Mapping[str, Tensor], recording: Recording) -> Labelled:
        path = local["latent"]
        modes = local.get("mode")
        if modes is None:
            modes = self.latent_path(parameters, recording).sample_modes(path)
        return {"path": (("trial", "time", "latent"), path), "mode_path": (("trial", "time"), modes)}

    def draw_local(self, parameters: SwitchingParameters, recording: Recording) -> dict[str, Tensor]:
        """Path and modes of every trial given the parameters of every draw, (draw, 1, *event)."""
        draws, batch = len(parameters.bias), (1, recording.num_trials)
        first, size = draws_of(parameters, slice(0, 1)), recording.num_trials * recording.num_bins * recording.num_units
        if recording.observations is None:
            path, modes = self.latent_path(parameters, recording).expand((draws, recording.num_trials)).sample_jointly()
            return {"latent": path, "mode": modes}
        law = self.latent_path(first, recording)
        still = torch.zeros(recording.num_trials, *law.event_shape, dtype=torch.float64)
        # One draw from afar, the others from there: draws lie close together.
        found = settle(law, self.readout_law(first, still, recording), recording.values, batch, SETTLING)
        parts, most = [], max(1, AT_ONCE // size)
        for start in range(0, draws, most):
            here = draws_of(parameters, slice(start, start + most))
            readout = self.readout_law(here, found.chain.mean, recording)
            law = self.latent_path(here, recording)
            parts.append(draw_path_and_modes(law, readout, recording.values, found.weight))
        path, modes = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"latent": path, "mode": modes}

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        prior, fit = self.step_prior(recording), latent_start(self, recording)
        assert fit.seen is not None
        weights, turn = gauged(prior, self.views(recording), fit.seen.loading[0, 0] / self.loading_scale(recording))
        values = initial_sites(prior, fit, recording, turn) | weights | {"offset": fit.seen.offset[0, 0]}
        if fit.seen.noise is not None:
            values[str(self.readout.noise_name)] = fit.seen.noise[0, 0][self.readout.noisy(recording)]
        return {name: value.to(recording.device) for name, value in values.items()}

    def conditionals(self, recording: Recording, observations: Tensor | None = None) -> SwitchingSweep:
        """What `inference.Gibbs` draws from."""
        return SwitchingSweep(self, recording, observations)

    # ------------------------------------------------------------------------------------------ the posterior

    def coordinates(self, recording: Recording) -> dict[str, Any]:
        return {"mode": np.arange(self.num_modes), "mode_to": np.arange(self.num_modes)}

    def label(self, parameters: SwitchingParameters) -> Labelled:
        labelled = step_labels(parameters.steps, "latent")
        labelled |= {"loading": (("unit", "latent"), parameters.loading), "offset": (("unit",), parameters.offset)}
        if self.readout.noise_name is not None:
            assert parameters.noise is not None
            labelled[self.readout.noise_name] = (("unit",), parameters.noise)
        return labelled

    def unlabel(self, values: Mapping[str, Tensor]) -> SwitchingParameters:
        noise = None if self.readout.noise_name is None else values[self.readout.noise_name]
        held: Any = {name: values.get(name) for name in SwitchingParameters._fields} | {"noise": noise}
        return SwitchingParameters(**held)

    def invariants(self, parameters: SwitchingParameters) -> Labelled:
        loading = parameters.loading
        found = mode_summaries(parameters.steps, loading)
        found |= {"signal_sd": (("unit",), loading.square().sum(-1).sqrt()), "offset": (("unit",), parameters.offset)}
        if self.readout.noise_name is not None:
            assert parameters.noise is not None
            found[self.readout.noise_name] = (("unit",), parameters.noise)
        return found

    def transformed(self, parameters: SwitchingParameters, recording: Recording, seed: int) -> SwitchingParameters:
        """Turn each region's latents by a random orthogonal matrix, and number the modes anew."""
        order, turn = self.symmetry(recording, seed)
        steps = rotated(permuted(parameters.steps, order), turn)
        return parameters._replace(loading=parameters.loading @ turn, **steps._asdict())

    def symmetry(self, recording: Recording, seed: int) -> tuple[Tensor, Tensor]:
        """A random numbering of the modes, (mode,), and a random turn of the latents, (latent, latent)."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.num_modes, generator=generator)
        blocks = self.step_prior(recording).blocks
        return order, blocks.diagonal([rotation(dim, generator) for dim in blocks.dims])
