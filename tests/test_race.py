"""Races and bounds that collapse: against sums over every path, dense filters, simulated diffusions, known truth."""

import itertools

import numpy as np
import scipy.stats as st
import torch
import zoo

import pyrodyn as dyn
from pyrodyn import inference, models
from pyrodyn.distributions.race import StoppedRace
from pyrodyn.inference.engine import random_stream
from pyrodyn.program import globals_given

NAMES = ("left", "right")
WIDTH = 0.04  # seconds
DRIFTS = np.array([[1.2, 0.2], [0.0, 1.0]])  # per second, (condition, accumulator)
SHARES = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9], [0.5, 0.5]])
GAIN, START, DIFFUSION = 80.0, 0.4, 0.4


def random_race(chains=2, size=3, bins=4):
    """A race of chains with random steps, in two conditions, and what was seen of three trials."""
    generator = torch.Generator().manual_seed(0)

    def logs(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1)

    law = StoppedRace(logs(2, 1, 2, chains, size), logs(2, 1, 2, chains, size - 1, size), torch.tensor([1, 0, 1]), bins)
    return law, torch.randn(3, bins, size**chains, generator=generator, dtype=torch.float64)


def paths_of(law):
    return torch.tensor(list(itertools.product(range(law.num_states), repeat=law.event_shape[0])))


def scores_of(law, seen):
    """Log probability of every path and what was seen, (path, draw, trial)."""
    paths = paths_of(law)
    time = torch.arange(paths.shape[-1])
    observed = torch.stack([own[time, paths].sum(-1) for own in seen], -1)  # (path, trial)
    return law.log_prob(paths[:, None, None]) + observed[:, None]


def test_paths_of_a_race_have_probabilities_that_sum_to_one_and_stop_where_they_should():
    law, seen = random_race()
    scores = scores_of(law, torch.zeros_like(seen))
    torch.testing.assert_close(scores.logsumexp(0), torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    stopped = (law.places(paths_of(law)) == 2).any(-1)
    still = (paths_of(law)[:, 1:] == paths_of(law)[:, :-1]) | ~stopped[:, :-1]
    assert bool(torch.isneginf(scores[~still.all(-1)]).all()) and bool(torch.isfinite(scores[still.all(-1)]).all())


def test_the_evidence_of_a_race_is_the_sum_over_every_path_and_so_is_its_slope():
    for chains, size, bins in ((2, 3, 4), (3, 2, 4)):
        law, seen = random_race(chains, size, bins)
        parts = [part.requires_grad_() for part in (law.initial, law.transition, seen)]
        found, expected = law.log_normaliser(seen), scores_of(law, seen).logsumexp(0)
        torch.testing.assert_close(found, expected)
        slopes = [torch.autograd.grad(value.sum(), parts) for value in (found, expected)]
        torch.testing.assert_close(*slopes)


def test_what_no_path_reaches_may_be_by_far_the_likeliest():
    law, seen = random_race()
    never = torch.tensor([[0.0, -torch.inf, -torch.inf]] * 2, dtype=torch.float64)
    law = StoppedRace(never.expand(2, 1, 2, 2, 3), law.transition, law.which, 4)
    seen[:, 0, 4] += 5000.0  # both chains in their middle state, where none starts
    torch.testing.assert_close(law.log_normaliser(seen), scores_of(law, seen).logsumexp(0))


def test_drawn_paths_of_a_race_occur_as_often_as_their_posterior_says():
    law, seen = random_race()
    draws = 4000
    with random_stream(0):
        drawn = law.sample_given(seen.expand(draws, 1, *seen.shape).expand(draws, 2, *seen.shape))
    weights, paths = scores_of(law, seen).softmax(0), paths_of(law)
    for state in range(law.num_states):
        expected = torch.einsum("pdi,pt->dit", weights, (paths == state).double())
        assert float(((drawn == state).double().mean(0) - expected).abs().max()) < 5 * 0.5 / draws**0.5
    both = torch.einsum("pdi,p->di", weights, ((paths[:, 1] == 0) & (paths[:, 2] == 1)).double())
    found = ((drawn[..., 1] == 0) & (drawn[..., 2] == 1)).double().mean(0)
    assert float((found - both).abs().max()) < 5 * 0.5 / draws**0.5


def test_the_evidence_of_a_race_is_a_dense_forward_pass():
    row = zoo.row("Race-conditions-ragged-missing")
    model, recording = row.model, row.recording
    parameters = globals_given(model, zoo.prior_draws(model, recording, ()), recording)
    found = model.evidence(parameters, recording, recording.values).reshape(-1)
    grid, sd = model.positions.numpy()[:-1], parameters.diffusion.item() * np.sqrt(recording.bin_width)
    gain = np.exp(parameters.offset.numpy().reshape(-1)) / recording.bin_width
    share = parameters.share.numpy().reshape(-1, 2)
    joint = np.array(list(itertools.product(np.append(grid, 1.0), repeat=2)))
    rates = np.logaddexp(0.0, joint @ share.T * gain) * recording.bin_width
    which = model.which(recording)
    for i in range(recording.num_trials):
        drift = parameters.drift.numpy().reshape(2, 2)[which[i]] * recording.bin_width

        def step(x, drift):
            weight, beyond = st.norm.pdf(grid, x + drift, sd), st.norm.sf(1.0, x + drift, sd)
            return np.append(weight / weight.sum() * (1.0 - beyond), beyond)

        def together(x, drift=drift):
            return np.outer(*(step(own, part) for own, part in zip(x, drift, strict=True))).ravel()

        held = np.eye(len(joint))
        after = np.array([held[k] if (x == 1.0).any() else together(x) for k, x in enumerate(joint)])
        belief, total = together([parameters.start.item()] * 2), 0.0
        for t in range(recording.num_bins):
            belief = belief @ after if t else belief
            seen = recording.mask[i, t].numpy()
            belief = belief * np.exp((seen * st.poisson.logpmf(recording.values[i, t].numpy(), rates)).sum(-1))
            total += np.log(belief.sum())
            belief = belief / belief.sum()
        assert abs(found[i].item() - total) < 1e-8


def raced(trials, bins, rng):
    """Paths (trial, time, accumulator) made without the model, and the conditions of trials."""
    which = rng.integers(2, size=trials)
    x, path = np.full((trials, 2), START), np.zeros((trials, bins, 2))
    for t in range(bins):
        moved = x + DRIFTS[which] * WIDTH + DIFFUSION * np.sqrt(WIDTH) * rng.normal(size=x.shape)
        x = np.where((x >= 1.0).any(-1, keepdims=True), x, np.minimum(moved, 1.0))
        path[:, t] = x
    return path, which


def sites(**values):
    return {name: torch.as_tensor(value, dtype=torch.float64).unsqueeze(0) for name, value in values.items()}


def test_the_evidence_of_a_race_is_the_mean_over_simulated_diffusions():
    counts, paths = np.array([[1, 0], [1, 1], [2, 0], [3, 0], [2, 1], [4, 1], [3, 0], [4, 1]]), 200_000
    model = models.Race(("left",), grid=60)
    values = sites(drift=DRIFTS[:1], diffusion=[DIFFUSION], start=[START], offset=[1.0, 0.0], share=SHARES[[0, 3]])
    recording = dyn.Recording.from_arrays(counts[None].astype(float), bin_width=WIDTH, counts=True, condition=["left"])
    found = model.evidence(globals_given(model, values, recording), recording, recording.values).item()
    rng = np.random.default_rng(0)
    x, likelihood = np.full((paths, 2), START), np.zeros(paths)
    gain = np.exp([1.0, 0.0]) / WIDTH
    for count in counts:
        moved = x + DRIFTS[0] * WIDTH + DIFFUSION * np.sqrt(WIDTH) * rng.normal(size=x.shape)
        x = np.where((x >= 1.0).any(-1, keepdims=True), x, np.minimum(moved, 1.0))
        rates = np.logaddexp(0.0, x @ SHARES[[0, 3]].T * gain) * WIDTH
        likelihood += st.poisson.logpmf(count, rates).sum(-1)
    weight = np.exp(likelihood - likelihood.max())
    error = weight.std() / weight.mean() / np.sqrt(paths)
    assert error < 0.006
    assert abs(found - np.log(weight.mean()) - likelihood.max()) < 4 * error


def test_the_winner_of_a_race_and_its_drifts_are_recovered():
    rng = np.random.default_rng(0)
    path, which = raced(70, 22, rng)
    counts = rng.poisson(np.logaddexp(0.0, GAIN * path @ SHARES.T) * WIDTH)
    recording = dyn.Recording.from_arrays(
        counts.astype(float), bin_width=WIDTH, counts=True, condition=[NAMES[i] for i in which]
    )
    model = models.Race(NAMES, grid=15, lower=0.0, diffusion=0.35)
    found = dyn.fit(model, recording, inference.Laplace(draws=60), seed=0)
    drift, share = found["posterior"]["drift"], found["posterior"]["share"].mean(("chain", "draw")).values
    order = [0, 1] if share[0, 0] > share[0, 1] else [1, 0]
    mean, spread = (part.values[:, order] for part in (drift.mean(("chain", "draw")), drift.std(("chain", "draw"))))
    assert np.abs((mean - DRIFTS) / spread).max() < 4 and spread.max() < 0.5  # of the prior it is 1
    assert np.abs(share[:, order] - SHARES).max() < 0.15
    ends = found["latents"]["winner_probability"].isel(time=-1).sel(winner=["1", "2"]).values[:, order]
    arrived = path[:, -1] == 1.0
    decided = arrived.sum(-1) == 1
    assert decided.mean() > 0.5
    assert (ends.argmax(-1) == arrived.argmax(-1))[decided].mean() > 0.9
    position = found["latents"]["position"].values[..., order]
    assert np.corrcoef(position.ravel(), path.ravel())[0, 1] > 0.85


def test_how_fast_a_bound_collapses_is_recovered():
    rng = np.random.default_rng(1)
    trials, bins, collapse, drift = 200, 30, 2.0, 0.2
    evidence, decided, path = np.full(trials, 0.4), np.zeros(trials, bool), np.zeros((trials, bins))
    for t in range(bins):
        evidence = evidence + drift * WIDTH + 0.3 * np.sqrt(WIDTH) * rng.normal(size=trials)
        bound = 1.0 / (1.0 + collapse * (t + 1) * WIDTH)
        decided |= evidence >= bound
        path[:, t] = np.where(decided, 1.0, evidence / bound)
    counts = rng.poisson(np.logaddexp(0.0, np.array([40.0, 60.0]) * path[..., None]) * WIDTH).astype(float)
    recording = dyn.Recording.from_arrays(counts, bin_width=WIDTH, counts=True)
    fits = {
        name: dyn.fit(models.Accumulator(grid=30, collapse=middle), recording, inference.Laplace(draws=200), seed=0)
        for name, middle in (("collapses", 1.0), ("stays", 0.0))
    }
    found = fits["collapses"]["posterior"]["collapse"].values
    assert abs(found.mean() - collapse) < 4 * found.std() and found.std() < 0.5
    assert abs(fits["collapses"]["posterior"]["drift"].values.mean() - drift) < 0.2
    best = {name: float(fit["sample_stats"]["lp"].max()) for name, fit in fits.items()}
    assert best["collapses"] > best["stays"] + 10.0
