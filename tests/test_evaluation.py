"""Scores by their definition, and properties of flows against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import gammaln

from pyrodyn import evaluation, systems
from pyrodyn.evaluation import (
    find_fixed_points,
    forecast_r2,
    latent_r2,
    lyapunov_exponents,
    nlb_scores,
    psth_r2,
    rate_r2,
    state_space_divergence,
    velocity_r2,
)

# ---------------------------------------------------------------------------------------------- the benchmark


def arrays(seed: int = 0) -> tuple[dict, dict]:
    """A target and a submission of random arrays under the benchmark's names, NaN where trials have ended."""
    rng = np.random.default_rng(seed)
    spikes = {}
    for part, units in (("heldin", 5), ("heldout", 3)):
        spikes[f"eval_spikes_{part}"] = rng.poisson(0.6, (12, 15, units)).astype(float)
        spikes[f"eval_spikes_{part}_forward"] = rng.poisson(0.6, (12, 4, units)).astype(float)
    spikes["eval_spikes_heldout"][3, 9:] = np.nan
    rates = {
        f"{split}_rates_{part}{end}": rng.gamma(2.0, 0.3, (trials, bins, units))
        for split, trials in (("train", 20), ("eval", 12))
        for part, units in (("heldin", 5), ("heldout", 3))
        for end, bins in (("", 15), ("_forward", 4))
    }
    rates["eval_rates_heldout"][0, 0, 0] = 0.0
    target = spikes | {
        "train_behavior": rng.normal(size=(20, 15, 2)),
        "eval_behavior": rng.normal(size=(12, 15, 2)),
        "train_decode_mask": rng.random((20, 2)) < 0.7,
        "eval_decode_mask": np.arange(12)[:, None] % 2 == np.arange(2),
        "psth": rng.gamma(2.0, 0.3, (4, 15, 8)),
        "eval_cond_idx": np.array([[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]),
        "eval_jitter": np.array([0, 1, -2, 0, 3, 0, 0, -1, 0, 0, 2, 0]),
    }
    target["train_behavior"][2, 5:7] = np.nan
    target["eval_behavior"][1, :3] = np.nan
    target["psth"][:, :3], target["psth"][:, -3:] = np.nan, np.nan
    return target, rates


def bits(rates: np.ndarray, spikes: np.ndarray) -> float:
    """The definition, entry by entry."""
    total = null = 0.0
    means = np.nanmean(spikes, axis=(0, 1))
    for i, count in np.ndenumerate(spikes):
        if not np.isnan(count):
            rate, mean = max(rates[i], 1e-9), means[i[-1]]
            total += rate - count * math.log(rate) + gammaln(count + 1.0)
            null += mean - count * math.log(mean) + gammaln(count + 1.0)
    return (null - total) / np.nansum(spikes) / math.log(2.0)


def test_the_benchmark_scores_are_those_of_their_definition() -> None:
    target, rates = arrays()
    scores = nlb_scores(target, rates)
    assert scores.keys() == {"co-bps", "fp-bps", "vel R2", "psth R2"}
    assert scores["co-bps"] == pytest.approx(
        bits(rates["eval_rates_heldout"], target["eval_spikes_heldout"]), abs=1e-10
    )
    together = [
        np.concatenate([a[f"eval_{kind}_heldin_forward"], a[f"eval_{kind}_heldout_forward"]], -1)
        for a, kind in ((rates, "rates"), (target, "spikes"))
    ]
    assert scores["fp-bps"] == pytest.approx(bits(*together), abs=1e-10)

    # PSTHs: shift by loops, average, and take residual over total variance for each unit.
    whole = np.concatenate([rates["eval_rates_heldin"], rates["eval_rates_heldout"]], -1)
    wanted, found = [], []
    for condition, members in enumerate(target["eval_cond_idx"]):
        for t in range(3, 12):
            wanted.append(target["psth"][condition, t])
            found.append(np.mean([whole[i, t - target["eval_jitter"][i]] for i in members], 0))
    wanted, found = np.array(wanted), np.array(found)
    r2 = 1.0 - ((wanted - found) ** 2).sum(0) / ((wanted - wanted.mean(0)) ** 2).sum(0)
    assert scores["psth R2"] == pytest.approx(r2.mean(), abs=1e-10)


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    centre = x - x.mean(0)
    slope = np.linalg.solve(centre.T @ centre + penalty * np.eye(x.shape[1]), centre.T @ (y - y.mean(0)))
    return slope, y.mean(0) - x.mean(0) @ slope


def r2_of(x: np.ndarray, y: np.ndarray, fit: tuple[np.ndarray, np.ndarray]) -> float:
    residual = ((y - x @ fit[0] - fit[1]) ** 2).sum(0)
    return float((1.0 - residual / ((y - y.mean(0)) ** 2).sum(0)).mean())


def test_velocity_is_decoded_by_a_cross_validated_ridge() -> None:
    """Against normal equations and folds written out."""
    rng = np.random.default_rng(2)
    rates, test = rng.normal(size=(30, 11, 6)), rng.normal(size=(9, 11, 6))
    mixing = rng.normal(size=(6, 2))
    velocity, moved = (r @ mixing + 2.0 * rng.normal(size=(*r.shape[:2], 2)) for r in (rates, test))
    velocity[4, 3:] = np.nan
    x, y = rates.reshape(-1, 6), velocity.reshape(-1, 2)
    x, y = x[~np.isnan(y[:, 0])], y[~np.isnan(y[:, 0])]
    # scikit-learn's folds: the first len % 5 of them have one row more.
    folds = np.array_split(np.arange(len(x)), 5)
    scores = {}
    for penalty in np.logspace(-4, 0, 9):
        parts = [np.setdiff1d(np.arange(len(x)), fold) for fold in folds]
        scores[penalty] = np.mean(
            [r2_of(x[fold], y[fold], ridge(x[part], y[part], penalty)) for part, fold in zip(parts, folds, strict=True)]
        )
    best = max(scores, key=scores.__getitem__)
    expected = r2_of(test.reshape(-1, 6), moved.reshape(-1, 2), ridge(x, y, best))
    assert velocity_r2(rates, velocity, test, moved) == pytest.approx(expected, abs=1e-10)
    groups = np.arange(30)[:, None] % 2 == np.arange(2), np.arange(9)[:, None] % 2 == np.arange(2)
    alone = [
        velocity_r2(rates[a], velocity[a], test[b], moved[b]) for a, b in zip(groups[0].T, groups[1].T, strict=True)
    ]
    both = velocity_r2(rates, velocity, test, moved, train_mask=groups[0], eval_mask=groups[1])
    assert both == pytest.approx(np.mean(alone))


def test_timing_is_scored_by_the_speed_of_the_rates() -> None:
    target, rates = arrays(1)
    rng = np.random.default_rng(0)
    behaviour = np.stack([*[rng.integers(0, 2, 12) for _ in range(2)], np.zeros(12), rng.random(12)], -1)
    behaviour[:, :2] = np.repeat([[0, 0], [0, 1], [1, 0]], 4, axis=0)
    whole = np.concatenate([rates["eval_rates_heldin"], rates["eval_rates_heldout"]], -1)
    inside = ~np.isnan(target["eval_spikes_heldout"][..., 0])
    speed = []
    for trial, seen in zip(whole, inside, strict=True):
        steps = [math.dist(a, b) for a, b in zip(trial[seen][1:], trial[seen][:-1], strict=True)]
        speed.append(sum(steps) / len(steps))
    expected = np.mean([np.corrcoef(speed[i : i + 4], behaviour[i : i + 4, -1])[0, 1] for i in (0, 4, 8)])
    scores = nlb_scores(target | {"eval_behavior": behaviour}, rates, timing=True)
    assert scores["tp corr"] == pytest.approx(expected) and "vel R2" not in scores


def test_predictions_that_are_missing_are_refused() -> None:
    target, rates = arrays()
    rates["eval_rates_heldin"][0, 5] = np.nan
    with pytest.raises(ValueError, match="rates holds NaN in bins where behaviour was measured"):
        nlb_scores(target, rates)
    with pytest.raises(ValueError, match="rates are NaN in bins where the psth is not"):
        psth_r2(np.full((2, 4, 3), np.nan), np.ones((1, 4, 3)), [[0, 1]])
    with pytest.raises(ValueError, match="with as many groups"):
        velocity_r2(*(np.zeros((2, 3, 1)),) * 4, train_mask=np.ones((2, 2)), eval_mask=np.ones((2, 1)))


# ---------------------------------------------------------------------------------------------- recovery


def test_latent_r2_tells_missing_from_superfluous_dimensions() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20, 30, 3))
    mixed = true @ rng.normal(size=(3, 3)) + 5.0
    assert latent_r2(true, mixed) == pytest.approx((1.0, 1.0))
    more = latent_r2(true, np.concatenate([mixed, rng.normal(size=(20, 30, 2))], -1))
    assert more.true_from_inferred == pytest.approx(1.0)
    assert more.inferred_from_true == pytest.approx(0.6, abs=0.01)  # two of five columns are noise
    fewer = latent_r2(true, true[..., :2])
    assert fewer.true_from_inferred == pytest.approx(2 / 3, abs=0.01)
    assert fewer.inferred_from_true == pytest.approx(1.0)
    noise = rng.normal(size=true.shape)
    half = latent_r2(true, true + noise)
    assert half == pytest.approx((0.5, 0.5), abs=0.05)
    with pytest.raises(ValueError, match="select the same"):
        latent_r2(true, true[:3])


def test_rate_and_forecast_r2_by_unit_and_horizon() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(50, 7, 2)) * np.array([1.0, 10.0])
    predicted = true + np.array([0.5, 10.0]) * rng.normal(size=true.shape)
    assert rate_r2(true, true) == 1.0
    assert rate_r2(true, predicted) == pytest.approx((0.75 + 0.0) / 2, abs=0.05)
    constant = np.broadcast_to(true.mean((0, 1)), true.shape)
    assert rate_r2(true, constant) == pytest.approx(0.0)
    found = forecast_r2(true, predicted)
    assert found.dims == ("horizon",) and found["horizon"].values.tolist() == list(range(1, 8))
    assert float(found[3]) == pytest.approx(rate_r2(true[:, 3], predicted[:, 3]))
    with pytest.raises(ValueError, match="must be the same"):
        forecast_r2(true, predicted[:, 1:])


def test_divergence_of_visited_states_against_normals() -> None:
    """KL(N(0, 1) || N(m, 1)) = m^2 / 2, up to the width of the bins."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(200_000, 1))
    for shift in (0.0, 0.5, 1.0):
        found = state_space_divergence(true, rng.normal(size=true.shape) + shift, bins=60)
        assert found == pytest.approx(0.5 * shift**2, abs=0.01)


# ---------------------------------------------------------------------------------------------- flows


@pytest.mark.parametrize("name", ["lorenz", "arneodo", "duffing"])
def test_fixed_points_of_known_flows_are_found_in_every_draw(name) -> None:
    """Draws are the flow in stretched coordinates: points stretch, eigenvalues stay."""
    field = systems.field(name)
    stretch = torch.tensor([1.0, 0.5, 3.0])[:, None, None]
    spread = np.abs(field.fixed_points).max()
    starts = spread * 1.5 * torch.randn(3, 60, field.dim, generator=torch.Generator().manual_seed(0)).double()
    found = find_fixed_points(lambda x: stretch * field(x / stretch), stretch * starts)
    truth = np.linalg.eigvals(field.jacobian(field.fixed_points))
    for draw in range(3):
        kept = found.distinct((draw,))
        assert len(kept) == len(field.fixed_points)
        for point, values in zip(field.fixed_points, truth, strict=True):
            away = (found.states[draw, kept] / stretch[draw] - torch.from_numpy(point)).abs().amax(-1)
            assert float(away.min()) < 1e-7
            own = found.eigenvalues[draw, kept[away.argmin()]].numpy()
            np.testing.assert_allclose(np.sort_complex(own), np.sort_complex(values.astype(complex)), atol=1e-6)


def test_fixed_points_of_a_map() -> None:
    """The logistic map has 0 and 1 - 1/r, with slopes r and 2 - r."""
    found = find_fixed_points(
        lambda x: 3.2 * x * (1.0 - x), torch.linspace(-0.3, 1.3, 9).double()[:, None], discrete=True
    )
    states = {round(float(found.states[i]), 9): round(float(found.jacobian[i]), 9) for i in found.distinct()}
    assert states == {0.0: 3.2, 0.6875: -1.2}


def test_a_flow_without_fixed_points_has_none() -> None:
    found = find_fixed_points(lambda x: x.square() + 1.0, torch.linspace(-3, 3, 7).double()[:, None])
    assert not found.converged.any() and not len(found.distinct())


def test_lyapunov_exponents_of_linear_systems_are_real_parts_and_moduli() -> None:
    matrix = torch.tensor([[-0.2, -3.0, 0.4], [3.0, -0.2, 0.1], [0.0, 0.0, -1.5]], dtype=torch.float64)
    starts = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    found = lyapunov_exponents(lambda x: x @ matrix.mT, starts, duration=200.0, step=0.02, settle=20.0)
    torch.testing.assert_close(found.exponents, torch.tensor([-0.2, -0.2, -1.5]).double(), atol=2e-3, rtol=0)
    step = torch.linalg.matrix_exp(0.1 * matrix)
    mapped = lyapunov_exponents(lambda x: x @ step.mT, starts, duration=2000, settle=200, discrete=True)
    torch.testing.assert_close(mapped.exponents / 0.1, found.exponents, atol=2e-3, rtol=0)


def test_lyapunov_exponents_of_the_lorenz_attractor() -> None:
    """The divergence of the flow is their sum, the flow itself has the exponent zero, and two trajectories part."""
    field = systems.field("lorenz", beta=8.0 / 3.0)
    starts = torch.from_numpy(systems.lorenz(trials=64, bins=1, units=1, beta=8.0 / 3.0).truth["latents"].values[:, 0])
    found = lyapunov_exponents(field, starts, duration=25.0, step=0.01, settle=2.0)
    assert float(found.exponents.sum()) == pytest.approx(-(10.0 + 1.0 + 8.0 / 3.0), abs=1e-3)
    assert abs(float(found.exponents[1])) < 0.02
    # Benettin's way: follow a twin at a distance of 1e-8, bring it back to that distance every .1.
    state, twin, grown, blocks = starts.numpy(), starts.numpy() + 1e-8 / np.sqrt(3.0), 0.0, 250
    for block in range(blocks + 20):
        for _ in range(20):
            state, twin = (
                x + 0.005 / 6 * (k1 + 2 * k2 + 2 * k3 + field(x + 0.005 * k3))
                for x in (state, twin)
                for k1 in [field(x)]
                for k2 in [field(x + 0.0025 * k1)]
                for k3 in [field(x + 0.0025 * k2)]
            )
        apart = twin - state
        size = np.linalg.norm(apart, axis=1, keepdims=True)
        grown += np.log(size / 1e-8) if block >= 20 else 0.0
        twin = state + apart / size * 1e-8
    largest = float(grown.mean()) / (0.1 * blocks)
    assert float(found.exponents[0]) == pytest.approx(largest, abs=0.02)
    assert largest == pytest.approx(0.9056, abs=0.02)  # Sprott's value
    assert float(found.standard_error[0]) < 0.01


def test_a_model_without_a_flow_is_refused() -> None:
    import xarray as xr

    from pyrodyn.errors import ModelError

    tree = xr.DataTree(xr.Dataset(attrs={"model": '{"class": "LDS", "latent_dim": 2}'}))

    class Still:
        """No flow."""

    with pytest.raises(ModelError, match="Still declares no flow"):
        evaluation.fixed_points(tree, model=Still())
