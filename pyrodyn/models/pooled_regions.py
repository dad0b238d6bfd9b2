r"""Several sessions of coupled regions at once: the strengths of their edges partially pooled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrodyn.distributions import NetworkPrior, PoolPrior
from pyrodyn.errors import ModelError, ReadoutError
from pyrodyn.models._pooled_sweep import PooledSweep
from pyrodyn.models._regions import SPIKE
from pyrodyn.models._regions_sweep import RegionSweep, State
from pyrodyn.models.multi_region_lds import MultiRegionLDS
from pyrodyn.readouts import PerRegion
from pyrodyn.recording import Recording


@dataclass(frozen=True)
class PooledRegions:
    r"""`MultiRegionLDS` in several sessions, of one or several animals, with edges in common.

    Sessions have units, latents, readouts and common inputs of their own, and may lack regions. What they have in
    common is how likely each edge e is, and how strong:

    .. math::
        \rho_e &\sim \mathrm{Beta}(2 \pi_e, 2 (1 - \pi_e)), \qquad
        \log \sigma_e \sim N(\log \sigma_{0e}, 0.5^2), \qquad \tau \sim N^+(0.3^2), \\
        z_{ke} &\sim \mathrm{Bernoulli}(\rho_e), \qquad
        \log \sigma_{ke} \sim N(\log \sigma_e, \tau^2), \qquad
        A_{ke} \mid z_{ke} = 1 \sim N\!\big(0, \tfrac{\sigma_{ke}^2}{d_r d_s} I\big),

    for session k. :math:`\sigma_e` is the root mean square of the Frobenius norm of an edge's block, :math:`\pi_e`
    its prior probability. Latent coordinates of sessions need no alignment: only rotation-free quantities are shared.
    All sessions are restricted to stable dynamics jointly.

    `pyrodyn.fit` builds it when it is given a mapping of session to recording.

    Parameters
    ----------
    model : MultiRegionLDS
        Of every session. What it says of regions that a session did not record is left out there (see `of`).

    References
    ----------
    Gelman et al., Bayesian Data Analysis, 3rd ed. (2013), ch. 5, on exchangeable groups.
    """

    model: MultiRegionLDS

    def __post_init__(self) -> None:
        if not isinstance(self.model, MultiRegionLDS):
            raise ModelError(
                f"several sessions at once are taken by models.MultiRegionLDS, got {type(self.model).__name__}; fit "
                "each session by itself"
            )
        if self.model.edge_prior != SPIKE:
            raise ModelError(
                f"several sessions share edges of a spike-and-slab prior, got edge_prior={self.model.edge_prior!r}"
            )

    def check(self, recordings: Mapping[str, Recording]) -> None:
        """Raise an error that names the session where the model does not fit its recording."""
        somewhere = {region for recording in recordings.values() for region in recording.regions}
        for what, named in self._named().items():
            if named - somewhere:
                raise ModelError(
                    f"{what} names {sorted(named - somewhere)}, which are no regions of any session; the sessions have "
                    f"{sorted(somewhere)}"
                )
        for name, recording in recordings.items():
            try:
                self.of(recording).check(recording)
            except (ModelError, ReadoutError) as error:
                raise type(error)(f"session {name!r}: {error}") from error

    def of(self, recording: Recording) -> MultiRegionLDS:
        """The model of one session, without the regions that it did not record and without their edges."""
        model, here = self.model, set(recording.regions)
        if not any(named & here and named - here for named in self._named().values()):
            return model  # of all regions, or of none, which `check` says
        dims, edges, readout = model.latent_dim, model.edges, model.readout
        if not isinstance(dims, int):
            dims = tuple((region, dim) for region, dim in dims if region in here)
        if edges is not None:
            edges = tuple(edge for edge in edges if {edge.source, edge.target} <= here)
        if isinstance(readout, PerRegion):
            readout = PerRegion(tuple((region, part) for region, part in readout.parts if region in here))
        return replace(model, latent_dim=dims, edges=edges, readout=readout)

    def _named(self) -> dict[str, set[str]]:
        """The regions of which each option speaks by name."""
        model, found = self.model, {}
        if not isinstance(model.latent_dim, int):
            found["latent_dim"] = {region for region, _ in model.latent_dim}
        if model.edges is not None:
            found["edges"] = {region for edge in model.edges for region in edge[:2]}
        if isinstance(model.readout, PerRegion):
            found["readout"] = {region for region, _ in model.readout.parts}
        return found

    def __call__(self, recordings: Mapping[str, Recording]) -> dict[str, Tensor]:
        law = self.law(recordings)
        pool = law.split(pyro.sample("pool", law))
        found = {}
        for name, recording in recordings.items():
            # The dynamics belong to the pool: their own prior is not counted beside it.
            held = {"network": pool.network[name]}
            with _Session(name), poutine.block(hide=["network"]), poutine.condition(data=held):
                found[name] = self.of(recording)(recording)
        return found

    def law(self, recordings: Mapping[str, Recording]) -> PoolPrior:
        """Prior of what sessions share, and of their dynamics."""
        return PoolPrior(
            {name: self.of(recording).network_prior(recording) for name, recording in recordings.items()},
            {
                name: tuple((edge.source, edge.target) for edge in self.of(recording).possible_edges(recording))
                for name, recording in recordings.items()
            },
        )

    def conditionals(self, recordings: Mapping[str, Recording]) -> PooledSweep:
        """The moves of blocked Gibbs sampling; see `inference.Gibbs`."""
        law = self.law(recordings)

        def sweep(name: str, recording: Recording) -> RegionSweep:
            def given(state: State) -> NetworkPrior:
                return law.given(name, state["edge_rate"], state["edge_log_size"])

            return RegionSweep(self.of(recording), recording, given=given)

        return PooledSweep({name: sweep(name, recording) for name, recording in recordings.items()}, law)


class _Session(Messenger):
    """Puts the name of a session before those of its sites."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        msg["name"] = f"{self.name}/{msg['name']}"
