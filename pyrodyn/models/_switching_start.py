r"""Where switching models start: clusterings of a smooth path, each refined by variational EM, chosen by its bound.

Alternating :math:`q(z)` and a Gauss-Markov :math:`q(x)` with a maximum over the parameters climbs a bound of the
evidence. It ends in local maxima, so it is run side by side from several places.

Reference: Ghahramani & Hinton, Neural Comput. 12:831 (2000).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from pyrodyn.conditionals.modes import expect, mode_marginals_and_counts
from pyrodyn.conditionals.steps import StepSums, coefficient_posterior, step_sums
from pyrodyn.conditionals.transitions import StateLogits
from pyrodyn.conditionals.units import draw_coefficients
from pyrodyn.distributions import GaussMarkov
from pyrodyn.linalg import mode_log_normaliser
from pyrodyn.linalg.taming import lagged_radius
from pyrodyn.models._switching import RECURRENCE, SCALE, StepPrior
from pyrodyn.models._switching_checks import inside_of
from pyrodyn.models._switching_moves import push_features
from pyrodyn.models._switching_steps import ModeSteps, rotated
from pyrodyn.readouts import AffineReadout
from pyrodyn.recording import Recording

if TYPE_CHECKING:
    from pyrodyn.models._switching_blocks import View
    from pyrodyn.models._switching_model import SwitchingModel

STARTS = 12  # clusterings
VELOCITIES = (0.0, 1.0, 3.0, 1.0)  # weights of velocity beside place, in turn
SEEN_ROUNDS, LINEAR_ROUNDS, ROUNDS, LAST_ROUNDS = 25, 20, 60, 40  # of EM: on the smooth path, of one mode, of all
ENOUGH = 30_000  # bins of all starts together that EM takes further: more bins, fewer starts, though at least three
SAME = 0.5  # nats between two starts that are taken for one
MOST_RADIUS = 0.995  # of the largest that the prior allows


@dataclass(frozen=True)
class Seen:
    """How the path is read out, (start, 1, ...)."""

    loading: Tensor  # (start, 1, unit, latent)
    offset: Tensor  # (start, 1, unit)
    noise: Tensor | None  # (start, 1, unit)


@dataclass(frozen=True)
class Fit:
    """Starts side by side."""

    steps: ModeSteps  # (start, 1, ...)
    scale: Tensor  # (start,), psi
    weight: Tensor  # (start, trial, time, mode), probabilities of modes
    path: Tensor  # (start, trial, time, latent), the mean
    bound: Tensor  # (start,), of the log evidence
    seen: Seen | None = None

    def take(self, index: Tensor) -> Fit:
        """Some of the starts."""
        seen = self.seen
        if seen is not None:
            noise = None if seen.noise is None else seen.noise[index]
            seen = Seen(seen.loading[index], seen.offset[index], noise)
        return Fit(
            self.steps.map(lambda part: part[index]),
            self.scale[index],
            self.weight[index],
            self.path[index],
            self.bound[index],
            seen,
        )


_STARTS: WeakKeyDictionary[Recording, dict] = WeakKeyDictionary()


def latent_start(model: SwitchingModel, recording: Recording) -> Fit:
    """The best of several starts with a latent path; computed once for a recording."""
    known = _STARTS.setdefault(recording, {})
    if model not in known:
        with torch.random.fork_rng(devices=()), torch.no_grad():
            torch.manual_seed(0)
            known[model] = _latent(model, recording)
    return known[model]


def observed_start(prior: StepPrior, path: Tensor, recording: Recording) -> Fit:
    """The best of several starts where the observations are the path, (trial, time, latent)."""
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        return _best(_on_path(prior, path, recording, SEEN_ROUNDS + LAST_ROUNDS), 1)


def _latent(model: SwitchingModel, recording: Recording) -> Fit:
    prior = model.step_prior(recording)
    one = replace(prior, modes=1)
    fit = _linear(one, model, recording)
    for _ in range(LINEAR_ROUNDS):
        fit = _round(one, model, recording, fit)
    if prior.switches:
        linear = fit
        fits = _on_path(prior, linear.path[0], recording, SEEN_ROUNDS)
        fit = _best(fits, max(3, ENOUGH // (recording.num_trials * recording.num_bins)))
        index = torch.zeros(len(fit.bound), dtype=torch.long)
        fit = replace(fit, seen=linear.take(index).seen)
        for _ in range(ROUNDS):
            fit = _round(prior, model, recording, fit)
        fit = _best(fit, 1)
    for _ in range(LAST_ROUNDS):
        fit = _round(prior, model, recording, fit)
    return fit


def _linear(one: StepPrior, model: SwitchingModel, recording: Recording) -> Fit:
    """One mode, by covariances at two lags, every region by itself."""
    dim, views, starts = one.latent_dim, model.views(recording), model.starts(recording)
    dynamics = one.blocks.diagonal([start.dynamics for start in starts])
    scale, values = model.readout.signal_scale(recording), model.readout.initial_values(recording)
    loading = torch.zeros(recording.num_units, dim, dtype=torch.float64)
    noise = None if model.readout.noise_name is None else torch.ones(recording.num_units, dtype=torch.float64)
    if noise is not None:
        noise[model.readout.noisy(recording)] = values[str(model.readout.noise_name)]
    for view, start in zip(views, starts, strict=True):
        loading[view.units, view.place] = scale[view.units].unsqueeze(-1) * start.loading
        if view.readout.is_gaussian:
            assert noise is not None
            noise[view.units] = recording.scale[view.units] * start.residual.sqrt()
    steps = ModeSteps(
        torch.ones(1, 1, 1, dtype=torch.float64),
        torch.ones(1, 1, 1, 1, dtype=torch.float64),
        dynamics[None, None, None],
        torch.zeros(1, 1, 1, dim, dtype=torch.float64),
        (torch.eye(dim, dtype=torch.float64) - dynamics @ dynamics.mT)[None, None, None],
        None if not one.num_inputs else torch.zeros(1, 1, 1, dim, one.num_inputs, dtype=torch.float64),
        None,
        None,
        None,
    )
    shape = (1, recording.num_trials, recording.num_bins)
    seen = Seen(loading[None, None], values["offset"][None, None], None if noise is None else noise[None, None])
    return Fit(
        steps,
        torch.full((1,), SCALE[0] / SCALE[1], dtype=torch.float64),
        torch.ones(*shape, 1, dtype=torch.float64),
        torch.zeros(*shape, dim, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        seen,
    )


# ---------------------------------------------------------------------------------------------- a path that is known


def _on_path(prior: StepPrior, path: Tensor, recording: Recording, rounds: int) -> Fit:
    """Autoregressive modes of one path (trial, time, latent), from all clusterings."""
    labels = _clusterings(prior, path, recording)
    weight = torch.nn.functional.one_hot(labels, prior.modes).to(path.dtype)
    paths, inside = path.expand(len(labels), *path.shape), inside_of(recording)
    scale = torch.full((len(labels),), SCALE[0] / SCALE[1], dtype=torch.float64)
    pairs, precision = _pairs_of(weight), torch.eye(prior.latent_dim, dtype=torch.float64) / scale[:, None, None, None]
    precision = precision.expand(-1, prior.modes, -1, -1)
    bound = steps = None
    for _ in range(rounds):
        sums = step_sums(paths, weight * inside.unsqueeze(-1), prior.lags, recording.inputs)
        steps, scale, precision = _maximise(prior, sums, weight, pairs, precision, scale, recording)
        potentials = prior.path(steps, recording, inside).mode_potentials(paths)
        bound = mode_log_normaliser(*potentials).sum(-1)
        weight, pairs = mode_marginals_and_counts(*potentials)
        pairs = pairs.sum(1)
    assert steps is not None and bound is not None
    return Fit(steps, scale, weight, paths, bound)


def _clusterings(prior: StepPrior, path: Tensor, recording: Recording) -> Tensor:
    """Modes (start, trial, time) by k-means on place and velocity, in several weights."""
    from sklearn.cluster import KMeans

    place = path.numpy()
    speed = np.diff(place, axis=1, prepend=place[:, :1])
    inside = inside_of(recording).numpy()

    def scaled(values: np.ndarray) -> np.ndarray:
        spread = values[inside].std(0)
        return values / np.where(spread > 0.0, spread, 1.0)

    place, speed = scaled(place), scaled(speed)
    found = []
    for i in range(STARTS if prior.switches else 1):
        features = np.concatenate([place, VELOCITIES[i % len(VELOCITIES)] * speed], -1)
        modes = min(prior.modes, len(np.unique(features[inside], axis=0)))
        clusters: Any = KMeans
        means = clusters(modes, n_init=1, random_state=i).fit(features[inside])
        found.append(means.predict(features.reshape(-1, features.shape[-1])).reshape(inside.shape))
    return torch.from_numpy(np.stack(found)).long()


def _best(fit: Fit, count: int) -> Fit:
    """The starts with the largest bounds, those that came to the same end counted once."""
    chosen: list[int] = []
    for i in torch.nan_to_num(fit.bound, nan=-torch.inf).argsort(descending=True, stable=True).tolist():
        if len(chosen) < count and all(abs(float(fit.bound[i] - fit.bound[j])) > SAME for j in chosen):
            chosen.append(i)
    return fit.take(torch.tensor(chosen))


# ---------------------------------------------------------------------------------------------- a path that is not


def _round(prior: StepPrior, model: SwitchingModel, recording: Recording, fit: Fit) -> Fit:
    """One round of variational EM."""
    assert fit.seen is not None
    law, of_units = prior.path(fit.steps, recording), model.readout.bound(recording)
    read = AffineReadout(of_units, fit.path, fit.seen.loading, fit.seen.offset, fit.seen.noise, recording.mask)
    found = expect(law, read, recording.values.unsqueeze(0), fit.weight)
    sums = step_sums(
        found.chain.mean, found.weight * inside_of(recording).unsqueeze(-1), 1, recording.inputs, found.chain
    )
    precision = torch.linalg.inv(fit.steps.process_noise.squeeze(1))
    steps, scale, _ = _maximise(prior, sums, found.weight, found.pairs.sum(1), precision, fit.scale, recording)
    seen = _read(model, recording, found.chain, fit.seen)
    return Fit(steps, scale, found.weight, found.chain.mean, found.bound.sum(-1), seen)


def _read(model: SwitchingModel, recording: Recording, chain: GaussMarkov, seen: Seen) -> Seen:
    """Loadings, offsets and Gaussian noise given the law of the path."""
    views = model.views(recording)
    path = None if model.readout.is_gaussian else chain.draw(torch.randn_like(chain.mean)).flatten(1, 2)
    loading, offset = torch.zeros_like(seen.loading), torch.zeros_like(seen.offset)
    noise = None if seen.noise is None else seen.noise.clone()
    level = model.readout.initial_values(recording)["offset"]
    size = model.loading_scale(recording).square()
    for view in views:
        units, place = view.units, view.place
        dim = place.stop - place.start
        spread = recording.scale[units] if view.readout.is_gaussian else torch.full_like(size[units, 0], 3.0)
        weight = torch.cat([size[units].reciprocal().expand(-1, dim), spread.pow(-2).unsqueeze(-1)], -1)
        held = torch.cat([seen.loading[..., units, place], seen.offset[..., units].unsqueeze(-1)], -1).squeeze(1)
        own = None if noise is None else noise[..., units]
        if view.readout.is_gaussian:
            assert noise is not None and own is not None
            found, noise[..., units] = _read_gaussian(view, recording, chain, weight, own)
        else:
            assert path is not None
            values = recording.values[..., units].flatten(0, 1)
            mask = None if recording.mask is None else recording.mask[..., units].flatten(0, 1)
            design = torch.cat([path[..., place], torch.ones_like(path[..., :1])], -1)
            mean = torch.zeros_like(held[:1])
            mean[..., -1] = level[units]
            found, _ = draw_coefficients(view.readout, own, values, mask, design, held, mean, weight)
        loading[..., units, place], offset[..., units] = found[..., :-1].unsqueeze(1), found[..., -1].unsqueeze(1)
    return Seen(loading, offset, noise)


def _read_gaussian(
    view: View, recording: Recording, chain: GaussMarkov, weight: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Loadings and offsets (start, unit, latent + 1), and noise (start, 1, unit), of the units of a view.

    ``weight`` (unit, latent + 1) is the precision of their normal prior, ``noise`` (start, 1, unit) what it was.
    """
    units, place = view.units, view.place
    dim, centre = place.stop - place.start, recording.center[units]
    values = recording.values[..., units].flatten(0, 1)
    observed = torch.ones_like(values)
    if recording.mask is not None:
        observed = recording.mask[..., units].flatten(0, 1).to(values.dtype)
    centred = (values - centre) * observed
    path = chain.mean[..., place].flatten(1, 2)
    design = torch.cat([path, torch.ones_like(path[..., :1])], -1)
    pairs = design.unsqueeze(-1) * design.unsqueeze(-2)
    pairs[..., :dim, :dim] += chain.covariance[..., place, place].flatten(1, 2)
    gram = (observed.mT @ pairs.flatten(-2)).unflatten(-1, pairs.shape[-2:])
    cross = centred.mT @ design
    penalty = torch.diag_embed(weight) * noise.squeeze(1).square()[..., None, None]
    found = torch.linalg.solve(gram + penalty, cross.unsqueeze(-1)).squeeze(-1)
    left = centred.square().sum(0) - (found * (2.0 * cross - (gram @ found.unsqueeze(-1)).squeeze(-1))).sum(-1)
    left = left + 0.05 * recording.scale[units].square()
    noise = (left / (observed.sum(0) + 1.0)).clamp(min=1e-12).sqrt()
    return torch.cat([found[..., :-1], (found[..., -1] + centre).unsqueeze(-1)], -1), noise.unsqueeze(1)


# ---------------------------------------------------------------------------------------------- parts of a round


def _maximise(
    prior: StepPrior,
    sums: StepSums,
    weight: Tensor,
    pairs: Tensor,
    precision: Tensor,
    scale: Tensor,
    recording: Recording,
) -> tuple[ModeSteps, Tensor, Tensor]:
    """Steps (start, 1, ...) near their posterior mode given expected sums, with psi and the modes' precisions."""
    dim, wide = prior.latent_dim, prior.lags * prior.latent_dim
    found = torch.zeros_like(sums.cross)
    regressions = prior.regressions(_input_scale(recording))
    for place, rows, mean, sd, _ in regressions:
        own = precision[..., place, place]
        found[..., rows, place], _ = coefficient_posterior(sums.of(rows, place), own, mean, sd)
    dynamics = found[..., :wide, :].mT
    most = MOST_RADIUS * prior.max_radius
    over = (lagged_radius(dynamics) / most).clamp(min=1.0)
    # All lags by the same power of one factor, so that the radius falls to the bound.
    lag = torch.arange(wide) // dim + 1
    dynamics = dynamics * over[..., None, None].reciprocal() ** lag
    found = torch.cat([dynamics.mT, found[..., wide:, :]], -2)
    total = scale[:, None, None, None] * torch.eye(dim, dtype=torch.float64) + sums.residual(found)
    parts = [
        (degrees + sums.count)[..., None, None] * torch.linalg.inv(0.5 * (total + total.mT)[..., place, place])
        for place, _, _, _, degrees in regressions
    ]
    precision = prior.blocks.diagonal(parts)
    freedom = SCALE[0] + 0.5 * prior.modes * prior.freedom
    scale = freedom / (SCALE[1] + 0.5 * precision.diagonal(dim1=-2, dim2=-1).sum((-2, -1)))
    rows = prior.counts + pairs
    first = 1.0 + weight[:, :, 0].sum(1)
    steps = ModeSteps(
        (first / first.sum(-1, keepdim=True)).unsqueeze(1),
        (rows / rows.sum(-1, keepdim=True)).unsqueeze(1),
        dynamics.unsqueeze(1),
        found[..., wide, :].unsqueeze(1),
        torch.linalg.inv(precision).unsqueeze(1),
        None if not prior.num_inputs else found[..., wide + 1 :, :].mT.unsqueeze(1),
        None,
        None,
        None,
    )
    return steps, scale, precision


def _pairs_of(weight: Tensor) -> Tensor:
    return torch.einsum("sbtj,sbtk->sjk", weight[..., :-1, :], weight[..., 1:, :])


def _input_scale(recording: Recording) -> Tensor:
    return recording.input_scale if recording.num_inputs else torch.ones(0, dtype=torch.float64)


def initial_sites(prior: StepPrior, fit: Fit, recording: Recording, turn: Tensor) -> dict[str, Tensor]:
    """Sites of the prior of the first start, in latents ``turn' x``."""
    steps, variance = fit.steps, None
    if prior.recurrent and prior.switches:
        table, weights, variance = _slopes(prior, fit, recording)
        recurrence, border, gain = prior.pushes(weights.unsqueeze(1), _input_scale(recording))
        steps = steps._replace(
            transition=torch.softmax(table, -1).unsqueeze(1), recurrence=recurrence, recurrence_bias=border,
            mode_gain=gain,
        )  # fmt: skip
    steps = rotated(steps, turn)
    found = prior.sites(
        steps.map(lambda part: part[0, 0]),
        fit.scale[0],
        None if variance is None else variance[0],
        _input_scale(recording),
    )
    return {name: value.clone() for name, value in found.items()}


def _slopes(prior: StepPrior, fit: Fit, recording: Recording) -> tuple[Tensor, Tensor, Tensor]:
    """Log table (start, mode, mode), weights (start, mode - 1, feature) and their prior variance (start,) of state
    logits, near their mode given the most probable mode of every bin."""
    modes = fit.weight.argmax(-1)
    features = push_features(fit.path, recording.inputs if prior.num_inputs else None, _input_scale(recording))
    variance = torch.ones(len(features), dtype=torch.float64)
    table = weights = torch.zeros(0)
    for _ in range(5):
        logits = StateLogits(
            modes[..., :-1].flatten(1), modes[..., 1:].flatten(1), inside_of(recording)[:, 1:].flatten(), features,
            prior.contrasts, prior.counts, variance.reciprocal().unsqueeze(-1).expand(-1, features.shape[-1]),
        )  # fmt: skip
        table, weights = logits.unpack(logits.approximation()[0])
        shape = RECURRENCE[0] + 0.5 * weights[0].numel()
        variance = (RECURRENCE[1] + 0.5 * weights.square().sum((-2, -1))) / (shape + 1.0)
    return table, weights, variance
