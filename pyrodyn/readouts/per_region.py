r"""Units of several kinds in one recording: spikes here, a field potential there, each region under a law of its own.

All laws take the same predictor :math:`\eta = C x + d`, so that a path meets them as it meets one: log likelihood,
score and curvature are those of the blocks of units, side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyrodyn.errors import ModelError, ReadoutError
from pyrodyn.linalg.matrix import broadcast_shapes
from pyrodyn.readouts.law import Law, Readout
from pyrodyn.recording import Recording

NOISE = "readout_noise"


def as_readout(given: Any) -> Readout | PerRegion:
    """A readout as it is, a mapping of region to readout as a `PerRegion`; anything else is a ModelError."""
    if isinstance(given, Mapping):
        return PerRegion(given)
    if not isinstance(given, Readout | PerRegion):
        raise ModelError(
            f"readout must be one of pyrodyn.readouts, such as Poisson(), or a mapping of region to one, got {given!r}"
        )
    return given


@dataclass(frozen=True)
class PerRegion:
    """A readout for every region of the recording.

    Parameters
    ----------
    parts : mapping of region to Readout
        Such as ``{"V1": Poisson(), "LFP": Gaussian()}``.

    Notes
    -----
    The own parameters of all laws, where they have one, are one site ``readout_noise``: a standard deviation for the
    units of a `Gaussian`, a concentration for those of a `NegativeBinomial`. In a posterior it is (unit), 1 where the
    law has none. With a law that is not Gaussian the path is integrated out by Laplace, in which Gaussian units are
    exact.
    """

    parts: Any

    def __post_init__(self) -> None:
        pairs = self.parts.items() if isinstance(self.parts, Mapping) else self.parts
        try:
            found = tuple((str(name), part) for name, part in pairs)
        except (TypeError, ValueError):
            found = ()
        if not found or len({name for name, _ in found}) < len(found):
            raise ReadoutError(f"parts must map every region, once, to a readout, got {self.parts!r}")
        for name, part in found:
            if not isinstance(part, Readout):
                raise ReadoutError(f"the readout of region {name!r} must be a law such as Poisson(), got {part!r}")
        object.__setattr__(self, "parts", found)

    @property
    def is_gaussian(self) -> bool:
        """Whether all laws are."""
        return all(part.is_gaussian for _, part in self.parts)

    @property
    def noise_name(self) -> str | None:
        return NOISE if any(part.noise_name for _, part in self.parts) else None

    def check(self, recording: Recording) -> None:
        named, present = [name for name, _ in self.parts], list(recording.regions)
        if set(named) != set(present):
            raise ReadoutError(
                f"readout gives a law to the regions {named}, and the recording has units in {present}; expected the "
                "same names"
            )
        for part, units in self._blocks(recording):
            part.check(recording.isel(unit=units.numpy()))

    def bound(self, recording: Recording) -> Law:
        """The laws of a recording's units, side by side."""
        return _Blocks(self._blocks(recording))

    def noisy(self, recording: Recording) -> Tensor:
        """Positions of the units whose law has a parameter of its own."""
        held = [units for part, units in self._blocks(recording) if part.noise_name]
        return torch.cat([*held, torch.zeros(0, dtype=torch.long)]).sort().values

    def sample_offset(self, recording: Recording) -> Tensor:
        priors = [_prior(part.sample_offset, part, rec) for part, _, rec in self._recordings(recording)]
        loc, scale = (self._join([getattr(prior, name) for prior in priors], recording) for name in ("loc", "scale"))
        return pyro.sample("offset", dist.Normal(loc, scale).to_event(1), infer=_PER_UNIT)

    def sample_noise(self, recording: Recording) -> Tensor | None:
        if self.noise_name is None:
            return None
        noisy, loc, scale = self.noisy(recording), torch.zeros_like(recording.scale), torch.ones_like(recording.scale)
        for part, units, rec in self._recordings(recording):
            if part.noise_name:
                prior = _prior(part.sample_noise, part, rec)
                loc[units], scale[units] = prior.loc, prior.scale
        law = dist.LogNormal(loc[noisy], scale[noisy]).to_event(1)
        held = pyro.sample(NOISE, law, infer={"event_dims": ("noisy_unit",)})  # pyright: ignore[reportArgumentType]
        whole = held.new_ones(*held.shape[:-1], recording.num_units)
        return whole.index_copy(-1, noisy, held)

    def initial_values(self, recording: Recording) -> dict[str, Tensor]:
        offset, noise = torch.zeros_like(recording.scale), torch.ones_like(recording.scale)
        for part, units, rec in self._recordings(recording):
            found = part.initial_values(rec)
            offset[units] = found["offset"]
            if part.noise_name:
                noise[units] = found[part.noise_name]
        return {"offset": offset} | ({} if self.noise_name is None else {NOISE: noise[self.noisy(recording)]})

    def linearise(self, recording: Recording) -> Tensor:
        return self._join([part.linearise(rec) for part, _, rec in self._recordings(recording)], recording)

    def signal_scale(self, recording: Recording) -> Tensor:
        return self._join([part.signal_scale(rec) for part, _, rec in self._recordings(recording)], recording)

    def _blocks(self, recording: Recording) -> list[tuple[Readout, Tensor]]:
        """Every law with the positions of its units; regions under equal laws share one."""
        units: dict[Readout, list[int]] = {}
        laws = dict(self.parts)
        for i, name in enumerate(recording.region.tolist()):
            units.setdefault(laws[name], []).append(i)
        return [(law, torch.tensor(places)) for law, places in units.items()]

    def _recordings(self, recording: Recording) -> list[tuple[Readout, Tensor, Recording]]:
        return [(law, units, recording.isel(unit=units.numpy())) for law, units in self._blocks(recording)]

    def _join(self, pieces: list[Tensor], recording: Recording) -> Tensor:
        order = torch.cat([units for _, units in self._blocks(recording)])
        return torch.cat(pieces, -1)[..., order.argsort()]


class _Blocks(Law):
    """Laws side by side, each with the positions of its units; made by `PerRegion.bound`."""

    def __init__(self, blocks: Sequence[tuple[Law, Tensor]]) -> None:
        self.blocks = blocks
        self.is_gaussian = all(law.is_gaussian for law, _ in blocks)
        self.noise_name = NOISE if any(law.noise_name for law, _ in blocks) else None
        back = torch.cat([units for _, units in blocks]).argsort()
        self.back = None if bool((back == torch.arange(len(back))).all()) else back
        # Neighbours are taken as a view.
        self.places = [
            slice(int(units[0]), int(units[-1]) + 1) if int(units[-1] - units[0]) == len(units) - 1 else units
            for _, units in blocks
        ]

    def of_units(self, units: Tensor) -> Law:
        parts: list[tuple[Law, Tensor]] = []
        for law, own in self.blocks:
            held = torch.isin(units, own).nonzero().squeeze(-1)
            if len(held):
                parts.append((law, held))
        return parts[0][0] if len(parts) == 1 else _Blocks(parts)

    def _each(self, noise: Any, tensors: tuple[Tensor, ...]) -> Iterator[tuple[Law, Any, list[Tensor]]]:
        """Every law, its noise, and its units' part of the tensors."""
        for (law, _), place in zip(self.blocks, self.places, strict=True):
            own = None if noise is None or law.noise_name is None else noise[..., place]
            yield law, own, [part[..., place] for part in tensors]

    def _joined(self, pieces: Iterable[Tensor]) -> Tensor:
        pieces = list(pieces)
        lead = broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
        whole = torch.cat([piece.expand(*lead, piece.shape[-1]) for piece in pieces], -1)
        return whole if self.back is None else whole[..., self.back]

    def log_prob(self, predictor, noise, value):
        return self._joined(law.log_prob(eta, own, y) for law, own, (eta, y) in self._each(noise, (predictor, value)))

    def log_kernel(self, predictor, noise, value):
        return self._joined(law.log_kernel(eta, own, y) for law, own, (eta, y) in self._each(noise, (predictor, value)))

    def natural(self, predictor, noise):
        parts = [law.natural(eta, own) for law, own, (eta,) in self._each(noise, (predictor,))]
        slope, constant = (self._joined(pieces) for pieces in zip(*parts, strict=True))
        return slope, constant

    def score(self, predictor, noise, value):
        return self._joined(law.score(eta, own, y) for law, own, (eta, y) in self._each(noise, (predictor, value)))

    def curvature(self, predictor, noise, value):
        return self._joined(law.curvature(eta, own, y) for law, own, (eta, y) in self._each(noise, (predictor, value)))

    def expand_log(self, predictor, noise, value):
        parts = [law.expand_log(eta, own, y) for law, own, (eta, y) in self._each(noise, (predictor, value))]
        kernel, score, curvature = (self._joined(pieces) for pieces in zip(*parts, strict=True))
        return kernel, score, curvature

    def mean(self, predictor, noise):
        return self._joined(law.mean(eta, own) for law, own, (eta,) in self._each(noise, (predictor,)))

    def link(self, mean):
        return self._joined(law.link(part) for law, _, (part,) in self._each(None, (mean,)))

    def marginal_mean(self, predictor, variance, noise):
        each = self._each(noise, (predictor, variance))
        return self._joined(law.marginal_mean(eta, spread, own) for law, own, (eta, spread) in each)

    def sample(self, predictor, noise):
        return self._joined(law.sample(eta, own) for law, own, (eta,) in self._each(noise, (predictor,)))


_PER_UNIT: Any = {"event_dims": ("unit",)}


def _prior(sample: Callable[[Recording], Any], part: Readout, recording: Recording) -> Any:
    """The prior (unit) of the one site that a law's method samples."""
    with poutine.block(), torch.random.fork_rng(devices=()), torch.no_grad():
        trace = poutine.trace(sample).get_trace(recording)
    (site,) = (trace.nodes[name] for name in trace.stochastic_nodes)
    prior = site["fn"].base_dist
    if type(prior) not in (dist.Normal, dist.LogNormal):
        raise ReadoutError(
            f"{type(part).__name__} has a prior of {type(prior).__name__}, which cannot stand beside other laws'; "
            "expected a normal or log-normal one"
        )
    return prior
