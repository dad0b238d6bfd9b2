"""Synthetic systems: their moments against closed forms, their graphs, and that the null systems are null."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import xarray as xr
from scipy.stats import norm

from pyrodyn import Recording, systems
from pyrodyn.errors import RecordingError
from pyrodyn.systems import coupled_regions, feedback_loop, shuffle_trials, uncoupled_regions

SMALL = dict(units=3, trials=3, bins=40)
MADE = {
    "coupled": lambda **more: coupled_regions(**SMALL, **more),
    "no global": lambda **more: coupled_regions(**SMALL, global_input=0.0, latents=3, **more),
    "two": lambda **more: feedback_loop("two", **SMALL, **more),
    "three, delayed": lambda **more: feedback_loop("three", delays=(1, 3, 2), **SMALL, **more),
    "control, delayed": lambda **more: feedback_loop("two", control=True, delays=(2, 5), **SMALL, **more),
} | {
    drive: lambda drive=drive, **more: uncoupled_regions(drive, **SMALL, **more)
    for drive in ("none", "white", "slow", "time-locked")
}
every = pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
SEED = 3


def companion(truth: xr.Dataset) -> np.ndarray:
    lags = truth["dynamics"].values.reshape(-1, truth.sizes["latent"], truth.sizes["latent"])
    size = lags.shape[1] * len(lags)
    return np.concatenate([np.concatenate(list(lags), 1), np.eye(size - lags.shape[1], size)])


def covariance(truth: xr.Dataset, noise: np.ndarray) -> np.ndarray:
    """Stationary covariance as the sum over the past: another route than solving Lyapunov's equation."""
    turn = companion(truth)
    total = np.zeros_like(turn)
    total[: len(noise), : len(noise)] = noise
    for _ in range(14):  # doubling: 2^14 steps
        total, turn = total + turn @ total @ turn.T, turn @ turn
    return total[: len(noise), : len(noise)]


# ---------------------------------------------------------------------------------------------- truth


@every
def test_stationary_covariance_and_shares_are_sums_over_the_past(make) -> None:
    truth = make(seed=SEED).truth
    expected = covariance(truth, truth["process_noise"].values)
    np.testing.assert_allclose(truth["stationary_covariance"].values, expected, rtol=1e-9, atol=1e-12)
    share = truth["variance_share"]
    np.testing.assert_allclose(share.sum("origin").values, 1.0, rtol=1e-9)
    assert bool((share >= 0).all())
    for target, origin in itertools.product(truth["target"].values, truth["target"].values):
        alone = truth["process_noise"].values * np.outer(*[truth["latent_region"].values == origin] * 2)
        if "shared" in share["origin"]:
            alone = 0.09 * np.diag((truth["latent_region"].values == origin).astype(float))
        part = np.ix_(*[truth["latent_region"].values == target] * 2)
        ratio = np.linalg.solve(expected[part], covariance(truth, alone)[part])
        assert float(share.sel(target=target, origin=origin)) == pytest.approx(np.trace(ratio) / len(ratio), abs=1e-9)


@every
def test_spectral_radius(make) -> None:
    for seed in range(4):
        assert np.abs(np.linalg.eigvals(companion(make(seed=seed).truth))).max() <= 0.985 + 1e-12


def test_strong_coupling_is_scaled_to_the_largest_radius() -> None:
    for system in (
        coupled_regions(**SMALL, coupling=2.0, global_input=0.0),
        feedback_loop(**SMALL, coupling=2.0, delays=(2, 3)),
    ):
        assert np.abs(np.linalg.eigvals(companion(system.truth))).max() == pytest.approx(0.985, abs=1e-12)


def test_weak_coupling_leaves_radius_and_amplitude_as_given() -> None:
    truth = coupled_regions(**SMALL, coupling=0.02, global_input=0.0, seed=SEED).truth
    dynamics, region = truth["dynamics"].values, truth["latent_region"].values
    for target, source in itertools.product(truth["target"].values, truth["source"].values):
        block = dynamics[np.ix_(region == target, region == source)]
        if target == source:
            np.testing.assert_allclose(np.abs(np.linalg.eigvals(block)), 0.93, rtol=1e-12)
            angle = np.abs(np.angle(np.linalg.eigvals(block)))
            assert ((angle >= 0.08) & (angle <= 0.3)).all()
        else:
            present = bool(truth["adjacency"].sel(target=target, source=source))
            assert np.linalg.norm(block) == pytest.approx(0.02 if present else 0.0, rel=1e-12)


@every
def test_strength_is_that_of_the_normalised_blocks(make) -> None:
    truth = make(seed=SEED).truth
    lags = truth["dynamics"].values.reshape(-1, *truth["process_noise"].shape)
    region = truth["latent_region"].values

    def root(name: str) -> np.ndarray:
        return np.real(scipy.linalg.sqrtm(truth["stationary_covariance"].values[np.ix_(*[region == name] * 2)]))

    for target, source in itertools.product(truth["target"].values, truth["source"].values):
        if target == source:
            continue
        blocks = lags[:, region == target][:, :, region == source]
        norm_ = np.linalg.norm(np.linalg.inv(root(target)) @ blocks @ root(source))
        strength = float(truth["strength"].sel(target=target, source=source))
        assert strength == pytest.approx(norm_, rel=1e-9, abs=1e-15)
        assert bool(truth["adjacency"].sel(target=target, source=source)) == (strength > 0)
    assert not np.diagonal(truth["adjacency"].values).any() and not np.diagonal(truth["strength"].values).any()


def test_strength_is_seen_by_no_change_of_latents() -> None:
    truth = coupled_regions(**SMALL, seed=SEED).truth
    change = scipy.linalg.block_diag(*np.random.default_rng(0).standard_normal((4, 2, 2)), 3.0)
    region = truth["latent_region"].values
    dynamics = change @ truth["dynamics"].values @ np.linalg.inv(change)
    noise = change @ truth["stationary_covariance"].values @ change.T
    a, b = np.argwhere(truth["adjacency"].values)[0]
    parts = [region == truth["target"].values[i] for i in (a, b)]
    roots = [np.linalg.cholesky(noise[np.ix_(part, part)]) for part in parts]
    found = np.linalg.norm(np.linalg.inv(roots[0]) @ dynamics[np.ix_(*parts)] @ roots[1])
    assert found == pytest.approx(float(truth["strength"][a, b]), rel=1e-9)


# ---------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("make", [MADE[k] for k in ("coupled", "three, delayed", "white")])
def test_paths_are_in_equilibrium_from_the_first_bin_and_move_as_they_should(make) -> None:
    """Covariances at both ends and across the lags; innovations have the process noise and no memory."""
    number = 4000
    truth = make(seed=SEED).truth
    options = dict(truth.attrs)
    kind = options.pop("system")
    options.pop("bin_width")
    options |= {"units": 1, "trials": number, "bins": 6, "bin_width": 0.02}
    if kind == "coupled_regions":
        options["loop"] = bool(options["loop"])
    if kind == "feedback_loop":
        options["control"] = bool(options["control"])
    truth = getattr(systems, kind)(**options).truth
    paths = truth["latents"].values
    scale = np.sqrt(np.diagonal(truth["stationary_covariance"].values))
    # The sd of a sample correlation is at most sqrt(2 / number); five of them.
    close = dict(rtol=0, atol=5.0 * np.sqrt(2.0 / number))
    for t in (0, -1):
        found = paths[:, t].T @ paths[:, t] / number / np.outer(scale, scale)
        expected = truth["stationary_covariance"].values / np.outer(scale, scale)
        np.testing.assert_allclose(found, expected, **close)
    lags = truth["dynamics"].values.reshape(-1, *truth["process_noise"].shape)
    past = [paths[:, 5 - lag] for lag in range(1, len(lags) + 1)]
    steps = paths[:, 5] - sum(x @ a.T for x, a in zip(past, lags, strict=True))
    noise = truth["process_noise"].values
    sd = np.sqrt(np.diagonal(noise))
    np.testing.assert_allclose(steps.T @ steps / number / np.outer(sd, sd), noise / np.outer(sd, sd), **close)
    for x in past:
        np.testing.assert_allclose(steps.T @ x / number / np.outer(sd, scale), 0.0, **close)


@every
def test_log_rates_have_the_modulation_and_rates_the_mean_count(make) -> None:
    truth = make(seed=SEED, mean_count=0.4, modulation=0.6).truth
    loading, sigma = truth["loading"].values, truth["stationary_covariance"].values
    drift = truth["drift"].values if "drift" in truth else np.zeros((40, len(sigma)))
    mean = np.zeros_like(drift)
    for t in range(1, len(mean)):
        mean[t] = truth["dynamics"].values @ mean[t - 1] + drift[t] if drift.any() else 0.0
    predictor = mean @ loading.T
    variance = np.einsum("ui,ij,uj->u", loading, sigma, loading)
    np.testing.assert_allclose(np.sqrt(variance + predictor.var(0)), 0.6, rtol=1e-9)
    # The mean of the exponential by quadrature over the normal law of each bin.
    grid = np.linspace(-9.0, 9.0, 2001)[:, None, None]
    law = np.exp(truth["offset"].values + predictor + np.sqrt(variance) * grid) * norm.pdf(grid)
    np.testing.assert_allclose(law.sum(0).mean(0) * 18.0 / 2000, 0.4, rtol=1e-6)


@pytest.mark.parametrize("make", [coupled_regions, uncoupled_regions], ids=lambda f: f.__name__)
def test_mean_count_of_a_recording(make) -> None:
    drive = {"drive": "time-locked"} if make is uncoupled_regions else {}
    system = make(**drive, trials=30, bins=200, seed=SEED)
    counts, rates = system.recording.values.numpy(), system.truth["rates"].values
    # Given the rates, counts are Poisson; five standard errors of their total.
    assert abs(counts.sum() - rates.sum()) < 5.0 * np.sqrt(rates.sum())
    assert ((counts - rates) ** 2).sum() == pytest.approx(rates.sum(), rel=0.02)
    over_trials = rates.mean((1, 2))
    assert abs(over_trials.mean() - 0.15) < 5.0 * over_trials.std(ddof=1) / np.sqrt(len(over_trials))


@every
def test_rates_are_the_readout_of_the_latents_of_the_own_region(make) -> None:
    system = make(seed=SEED)
    truth = system.truth
    rates = np.exp(truth["latents"].values @ truth["loading"].values.T + truth["offset"].values)
    np.testing.assert_allclose(truth["rates"].values, rates, rtol=1e-12)
    own = truth["region"].values[:, None] == truth["latent_region"].values
    assert bool((truth["loading"].values[own] != 0).all()) and not truth["loading"].values[~own].any()


@every
def test_seed_decides_everything(make) -> None:
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert first.recording.digest() == again.recording.digest() != other.recording.digest()
    xr.testing.assert_identical(first.truth, again.truth)


@every
def test_labels_agree_and_truth_survives_a_file(make, tmp_path) -> None:
    system = make(seed=SEED)
    recording, truth = system.recording, system.truth
    assert isinstance(recording, Recording) and recording.counts
    assert recording.values.shape == (3, 40, 3 * len(recording.regions))
    for name in ("trial", "time", "unit", "region"):
        np.testing.assert_array_equal(truth[name].values, getattr(recording, name))
    assert truth["target"].values.tolist() == truth["source"].values.tolist() == recording.regions
    assert not any(bool(variable.isnull().any()) for variable in truth.data_vars.values())
    truth.to_netcdf(tmp_path / "truth.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "truth.nc", engine="h5netcdf") as stored:
        xr.testing.assert_equal(stored.load(), truth)
        assert stored["adjacency"].dtype == bool and stored.attrs["seed"] == SEED


# ---------------------------------------------------------------------------------------------- graphs


def edges(system: systems.System) -> set[tuple[str, str]]:
    """Edges as (source, target)."""
    found = system.truth["adjacency"]
    return {(str(found["source"].values[s]), str(found["target"].values[t])) for t, s in np.argwhere(found.values)}


def test_graph_has_the_density_and_the_loop() -> None:
    draws = [edges(coupled_regions(units=1, trials=1, bins=50, mean_count=1.0, seed=seed)) for seed in range(100)]
    assert all({("R1", "R2"), ("R2", "R1")} <= draw for draw in draws)
    free = sum(len(draw) - 2 for draw in draws)
    assert abs(free - 350) < 5.0 * np.sqrt(1000 * 0.35 * 0.65)
    for density, expected in ((0.0, 0), (1.0, 12)):
        assert len(edges(coupled_regions(**SMALL, density=density, loop=False))) == expected


def test_loops_and_their_controls() -> None:
    assert edges(feedback_loop("two", **SMALL)) == {("R1", "R2"), ("R2", "R1")}
    assert edges(feedback_loop("three", **SMALL)) == {("R1", "R2"), ("R2", "R3"), ("R3", "R1")}
    assert edges(feedback_loop("two", control=True, **SMALL)) == {("R3", "R1"), ("R3", "R2")}
    assert edges(feedback_loop("three", control=True, **SMALL)) == {("R4", "R1"), ("R4", "R2"), ("R4", "R3")}


def test_delays_stand_at_their_lags() -> None:
    truth = feedback_loop("three", delays=(1, 3, 2), **SMALL).truth
    region = truth["latent_region"].values
    assert truth["lag"].values.tolist() == [1, 2, 3]
    for source, target, lag in (("R1", "R2", 1), ("R2", "R3", 3), ("R3", "R1", 2)):
        blocks = truth["dynamics"].values[:, region == target][:, :, region == source]
        assert np.flatnonzero(np.linalg.norm(blocks, axis=(1, 2))).tolist() == [lag - 1]


@pytest.mark.parametrize("drive", ["none", "white", "slow", "time-locked"])
def test_null_systems_are_uncoupled(drive) -> None:
    """No block, no strength, no share of another region; and what they have in common is really there."""
    system = uncoupled_regions(drive, trials=200, bins=60, units=1, seed=SEED)
    truth = system.truth
    region = truth["latent_region"].values
    apart = (region[:, None] != region) & (region != "global")
    assert edges(system) == set()
    assert not truth["dynamics"].values[apart].any() and not truth["strength"].values.any()
    share = truth["variance_share"].sel(origin=truth["target"].values).values
    assert not share[~np.eye(4, dtype=bool)].any()
    # Given its own past (and the drive) no region's step depends on another's past: regressions over 200 x 59 bins.
    paths = truth["latents"].values
    steps = paths[:, 1:] - paths[:, :-1] @ truth["dynamics"].values.T
    if drive == "time-locked":
        steps = steps - truth["drift"].values[1:]
    scale = np.outer(steps.std((0, 1)), paths.std((0, 1)))
    found = np.einsum("bti,btj->ij", steps, paths[:, :-1]) / (200 * 59) / scale
    assert np.abs(found).max() < 5.0 / np.sqrt(200 * 59)
    between = paths - paths.mean(0) if drive != "time-locked" else np.broadcast_to(paths.mean(0), paths.shape)
    correlation = np.corrcoef(between.reshape(-1, paths.shape[-1]).T)
    common = np.abs(correlation[(region[:, None] != region) & (region != "global") & (region[:, None] != "global")])
    assert common.max() < 0.1 if drive == "none" else common.max() > 0.2


def test_a_time_locked_drive_is_the_same_in_all_trials() -> None:
    truth = uncoupled_regions("time-locked", trials=4, bins=50, units=2, seed=SEED).truth
    course = truth["drive"].values
    assert (abs(course.mean()), course.std()) == (pytest.approx(0.0, abs=1e-12), pytest.approx(1.0))
    assert np.linalg.matrix_rank(truth["drift"].values) == 1
    size = [uncoupled_regions("time-locked", **SMALL, drive_size=s).truth["drift"].values.std() for s in (1.0, 2.0)]
    assert size[1] == pytest.approx(2.0 * size[0])


# ---------------------------------------------------------------------------------------------- shuffled trials


def session(lengths=None, conditions=("a",) * 5 + ("b",) * 4, **more) -> Recording:
    """Every entry tells its trial: 100 x trial + unit."""
    trials = len(conditions)
    values = 100.0 * np.arange(trials)[:, None, None] + np.zeros((trials, 6, 1)) + np.arange(5.0)
    region = ["V1", "V1", "V2", "CA1", "V2"]
    return Recording.from_arrays(
        values, bin_width=0.01, region=region, condition=list(conditions), lengths=lengths, **more
    )


@pytest.mark.parametrize("by", ["region", "unit"])
def test_shuffled_trials_are_those_of_the_condition_and_never_together(by) -> None:
    recording = session(conditions=("a",) * 5 + ("b",) * 6)
    for seed in range(20):
        shuffled = shuffle_trials(recording, by=by, seed=seed)
        values = shuffled.values.numpy()
        assert (values % 100 == np.arange(5.0)).all()
        came = (values[:, 0] // 100).astype(int)  # (trial, unit)
        assert (values // 100 == came[:, None]).all()
        assert (recording.condition[came] == recording.condition[:, None]).all()
        assert all(sorted(column) == list(range(11)) for column in came.T.tolist())
        groups = recording.region if by == "region" else recording.unit
        for i, j in itertools.combinations(range(5), 2):
            together = came[:, i] == came[:, j]
            assert together.all() if groups[i] == groups[j] else not together.any()
        for name in ("trial", "time", "unit", "region", "condition", "lengths"):
            np.testing.assert_array_equal(getattr(shuffled, name), getattr(recording, name))
    assert shuffle_trials(recording, seed=1).digest() == shuffle_trials(recording, seed=1).digest()
    assert shuffle_trials(recording, seed=1).digest() != shuffle_trials(recording, seed=2).digest()


def test_shuffled_masks_move_along_and_no_trial_outgrows_its_length() -> None:
    lengths = [6, 3, 5, 6, 4, 6, 2, 6, 6]
    hidden = np.ones((9, 6, 5), dtype=bool)
    hidden[2, 1, :2] = False
    recording = session(lengths=lengths, mask=hidden)
    shuffled = shuffle_trials(recording, seed=SEED)
    values, mask = shuffled.values.numpy(), shuffled.mask.numpy()
    np.testing.assert_array_equal(shuffled.lengths, lengths)
    old = recording.mask.numpy()
    for trial, unit in itertools.product(range(9), range(5)):
        came = values[trial, 0, unit].astype(int) // 100
        np.testing.assert_array_equal(mask[trial, :, unit], old[came, :, unit] & (np.arange(6) < lengths[trial]))
        assert (values[trial, mask[trial, :, unit], unit] == 100 * came + unit).all()


def test_what_cannot_be_shuffled_is_refused() -> None:
    with pytest.raises(RecordingError, match=r"condition 'b' has 2 trials for 3 regions.*sel\(condition"):
        shuffle_trials(session(conditions=("a",) * 4 + ("b",) * 2))
    with pytest.raises(RecordingError, match="at least two regions"):
        shuffle_trials(session().sel(region="V1"))
    with pytest.raises(RecordingError, match="blank"):
        shuffle_trials(session().blank())
    with pytest.raises(ValueError, match="by must be one of 'region', 'unit', got 'trial'"):
        shuffle_trials(session(), by="trial")


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (coupled_regions, {"regions": 0}, "regions must be a whole number of at least 1, got 0"),
        (coupled_regions, {"regions": 1}, "loop=True needs two regions, got regions=1; pass loop=False"),
        (coupled_regions, {"units": 2.5}, "units must be a whole number of at least 1, got 2.5"),
        (coupled_regions, {"trials": True}, "trials must be a whole number"),
        (coupled_regions, {"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        (coupled_regions, {"density": 1.5}, "density must be a finite number at least 0 and at most 1, got 1.5"),
        (coupled_regions, {"coupling": -0.1}, "coupling must be a finite number at least 0, got -0.1"),
        (coupled_regions, {"global_persistence": 1.0}, "global_persistence must lie between -1 and 1, got 1.0"),
        (coupled_regions, {"process_sd": 0.0}, "process_sd must be a finite number above 0, got 0.0"),
        (coupled_regions, {"mean_count": float("nan")}, "mean_count must be a finite number above 0, got nan"),
        (feedback_loop, {"kind": "four"}, "kind must be one of 'two', 'three', got 'four'"),
        (feedback_loop, {"delays": (1, 2, 3)}, "delays has 3 entries, expected one for each of 2 edges"),
        (feedback_loop, {"delays": (1, 0)}, r"delays\[1\] must be a whole number of at least 1, got 0"),
        (uncoupled_regions, {"drive": "fast"}, "drive must be one of 'none', 'white', 'slow', 'time-locked', got"),
        (uncoupled_regions, {"drive_size": "big"}, "drive_size must be a finite number above 0, got 'big'"),
    ],
)
def test_options_out_of_range_are_named(make, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
