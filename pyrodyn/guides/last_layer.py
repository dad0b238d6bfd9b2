"""All weights at a point but those of the last layer, which have the Gaussian of Laplace's approximation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta, TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyrodyn.errors import ModelError
from pyrodyn.guides.base import Start, initialise
from pyrodyn.program import Program, log_terms
from pyrodyn.recording import Recording

STEP = 1e-4  # of central differences of the gradient
ROUNDS, HALVINGS = 8, 6  # of Newton's search for the mode of the last layer, and of a step that went down
LEAST_CURVATURE = 1e-3  # given to directions of a unit's weights that have less
PART = 4_000_000  # (draw, trial, time, unit) entries in one call


@dataclass(frozen=True)
class LastLayer:
    r"""Weights for `Amortised`: a point, except for those that lead to the observations.

    Trained as `PointEstimate`. Then the weights w of each unit n (its row of the loading, and its offset) are given

    .. math:: q(w_n) = N(\hat w_n, H_n^{-1}), \qquad
        H_n = -\nabla^2 \big( E_{q(z)} \log p(y_n \mid z, w_n) + \log p(w_n) \big),

    at the mode of what is in the brackets, with z what is latent in trials as the recognition network draws it. Given
    z units are independent, so that no covariance between them is left out; that of z and w is. Where the predictor is
    linear in w, a Gaussian readout with its noise at a point makes it the posterior of a Bayesian linear regression.

    Parameters
    ----------
    sites : tuple of str
        Of the model's global sites, each with the units as its first dimension.
    samples : int
        Draws of z for the expectation.

    References
    ----------
    MacKay, Neural Comput. 4:448 (1992); Daxberger et al., NeurIPS 2021.
    """

    sites: tuple[str, ...] = ("loading", "offset")
    samples: int = 8

    @property
    def posterior_of_globals(self) -> str:
        """What the globals' guide is, in words."""
        return f"point estimate; {' and '.join(self.sites)} by Laplace's approximation of the last layer"

    def __call__(self, program: Program, recording: Recording, start: Start) -> nn.Module:
        return LastLayerGuide(program, recording, self, start)


class _Place(NamedTuple):
    """A site in the vector."""

    part: slice
    shape: torch.Size
    transform: Any


class LastLayerGuide(AutoContinuous):
    """The module built by `LastLayer`: a point until it is settled."""

    def __init__(self, program: Program, recording: Recording, options: LastLayer, start: Start) -> None:
        super().__init__(program, init_loc_fn=initialise(start))
        self._units, self._options = recording.num_units, options
        self._root: Tensor | None = None  # (unit, weight, weight)

    def _setup_prototype(self, *args, **kwargs) -> None:
        super()._setup_prototype(*args, **kwargs)
        self.loc = nn.Parameter(self._init_loc())
        self._places: dict[str, _Place] = {}
        begin = 0
        for name, site in self.prototype_trace.iter_stochastic_nodes():  # type: ignore[union-attr]
            shape = self._unconstrained_shapes[name]
            self._places[name] = _Place(slice(begin, begin + shape.numel()), shape, biject_to(site["fn"].support))
            begin += shape.numel()
        parts = []
        for name in self._options.sites:
            place = self._places.get(name)
            if place is None or not place.shape or place.shape[0] != self._units:
                found = "no such site" if place is None else f"shape {tuple(place.shape)}"
                raise ModelError(
                    f"sites: {name!r} must be a global site whose first dimension is the {self._units} units, found "
                    f"{found}; the model has {', '.join(self._places)}"
                )
            parts.append(torch.arange(begin)[place.part].reshape(self._units, -1))
        self._index = torch.cat(parts, -1)  # (unit, weight): where the weights of each unit stand

    def get_posterior(self, *args, **kwargs) -> TorchDistribution:
        if self._root is None:
            return Delta(self.loc).to_event(1)
        return _Scattered(self.loc.detach(), self._index, self._root)

    def settle(self, program: Program, recording: Recording, local: Mapping[str, Tensor]) -> None:
        """Move the last layer to its mode and take the curvature there.

        Parameters
        ----------
        program : Program
            All of it, with the sites of trials.
        recording : Recording
        local : mapping of site to Tensor, (draw, trial, *event)
        """
        rows = self.loc.detach()[self._index]
        value, slope = self._gradient(rows, program, recording, local)
        curvature = self._curvature(rows, program, recording, local)
        for _ in range(ROUNDS):
            values, axes = torch.linalg.eigh(curvature)
            along = (axes.mT @ slope.unsqueeze(-1)) / values.clamp(min=LEAST_CURVATURE).unsqueeze(-1)
            step = (axes @ along).squeeze(-1)
            if float((step * slope).sum()) < 1e-9 * (1.0 + abs(value)):
                break
            size = 1.0
            for _ in range(HALVINGS):
                ahead, slope_ahead = self._gradient(rows + size * step, program, recording, local)
                if ahead > value:
                    break
                size *= 0.5
            else:
                break
            rows, value, slope = rows + size * step, ahead, slope_ahead
            curvature = self._curvature(rows, program, recording, local)
        values, axes = torch.linalg.eigh(curvature)
        self._root = axes / values.clamp(min=LEAST_CURVATURE).sqrt().unsqueeze(-2)
        with torch.no_grad():
            self.loc[self._index.flatten()] = rows.flatten()

    def _gradient(
        self, rows: Tensor, program: Program, recording: Recording, local: Mapping[str, Tensor]
    ) -> tuple[float, Tensor]:
        """What the last layer maximises, at weights (unit, weight), and its gradient; by parts of whole trials."""
        draws = len(next(iter(local.values())))
        size = max(1, PART // (draws * recording.num_bins * recording.num_units))
        total, slope = 0.0, torch.zeros_like(rows)
        for start in range(0, recording.num_trials, size):
            part = recording.batch(slice(start, start + size)) if size < recording.num_trials else recording
            given = rows.detach().requires_grad_()
            vector = self.loc.detach().index_copy(0, self._index.flatten(), given.flatten())
            values, jacobian = {}, vector.new_zeros(())
            for name, place in self._places.items():
                raw = vector[place.part].reshape(place.shape)
                values[name] = place.transform(raw)
                jacobian = jacobian + place.transform.log_abs_det_jacobian(raw, values[name]).sum()
            values |= {name: value[:, start : start + size] for name, value in local.items()}
            with torch.enable_grad():
                shared, of_trials = log_terms(program, values, part)
                found = of_trials.sum(-1).mean(0)
                if start == 0:
                    found = found + shared + jacobian
                (own,) = torch.autograd.grad(found, given)
            total, slope = total + float(found.detach()), slope + own
        return total, slope

    def _curvature(self, rows: Tensor, program: Program, recording: Recording, local: Mapping[str, Tensor]) -> Tensor:
        """Minus the Hessian (unit, weight, weight): units are independent, so that one step moves a weight of all."""
        columns = []
        for k in range(rows.shape[-1]):
            step = torch.zeros_like(rows)
            step[:, k] = STEP
            _, ahead = self._gradient(rows + step, program, recording, local)
            _, behind = self._gradient(rows - step, program, recording, local)
            columns.append((behind - ahead) / (2.0 * STEP))
        hessian = torch.stack(columns, -1)
        return 0.5 * (hessian + hessian.mT)


class _Scattered(TorchDistribution):
    """A vector at a point but for some entries, Gaussian in independent groups; its density is that of these."""

    arg_constraints = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, point: Tensor, index: Tensor, root: Tensor, batch: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.point, self.index, self.root = point, index, root
        super().__init__(batch, point.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None) -> _Scattered:
        return _Scattered(self.point, self.index, self.root, torch.Size(batch_shape))

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        lead = self._extended_shape(sample_shape)[:-1]
        noise = torch.randn(*lead, *self.index.shape, 1, dtype=self.point.dtype)
        moved = self.point[self.index] + (self.root @ noise).squeeze(-1)
        place = self.index.flatten().expand(*lead, -1)
        return self.point.expand(*lead, -1).scatter(-1, place, moved.flatten(-2))

    def log_prob(self, value: Tensor) -> Tensor:
        away = (value - self.point)[..., self.index].unsqueeze(-1)
        noise = torch.linalg.solve(self.root, away).squeeze(-1)
        volume = torch.linalg.slogdet(self.root)[1].sum() + 0.5 * self.index.numel() * math.log(2.0 * math.pi)
        return -0.5 * noise.square().sum((-2, -1)) - volume
