"""Systems that switch: their modes, their statistics, and the errors that they raise."""

from __future__ import annotations

import numpy as np
import pytest

from pyrodyn.systems import nascar, switching_rotations, switching_routes


def test_the_car_goes_round_and_its_place_tells_the_mode():
    found = nascar(bins=6000, seed=0)
    truth = found.truth
    mode, path = truth["mode"].values[0], truth["latents"].values[0]
    # The stated occupancy; with the other sense of rotation it is .06/0/.94/0.
    np.testing.assert_allclose(np.bincount(mode, minlength=4) / 6000, (0.18, 0.34, 0.34, 0.14), atol=0.02)
    logit = path[:-1] @ truth["recurrence"].values.T + truth["recurrence_bias"].values
    assert (logit.argmax(-1) == mode[1:]).mean() > 0.99
    step = np.einsum("tij,tj->ti", truth["dynamics"].values[mode[1:]], path[:-1]) + truth["bias"].values[mode[1:]]
    assert np.std(path[1:] - step) == pytest.approx(0.01, rel=0.03)
    rest = found.recording.values.numpy()[0] - path @ truth["loading"].values.T - truth["offset"].values
    assert np.std(rest) == pytest.approx(0.1, rel=0.02)
    np.testing.assert_allclose(truth["loading"].values.T @ truth["loading"].values, np.eye(2), atol=1e-12)


def test_rotations_have_their_eigenvalues_dwell_times_and_counts():
    found = switching_rotations(trials=20, dwell=20.0, seed=1)
    truth = found.truth
    ends = np.linalg.eigvals(truth["dynamics"].values)
    np.testing.assert_allclose(abs(ends), 0.95)
    np.testing.assert_allclose(abs(np.angle(ends)), (np.arange(5) + 1)[:, None] * np.full(2, np.pi / 20))
    assert (np.diff(truth["mode"].values, axis=1) != 0).mean() == pytest.approx(1 / 20, rel=0.1)
    assert float(truth["rates"].mean()) == pytest.approx(1.0)
    assert float(found.recording.values.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(np.log(truth["rates"]).std(("trial", "time")).mean()) == pytest.approx(0.6, rel=1e-6)


def test_routes_run_forwards_and_backwards_through_regions_that_see_their_own_latents():
    found = switching_routes(regions=3, units=8, trials=40, dwell=20.0, coupling=0.4, seed=2)
    truth = found.truth
    assert list(found.recording.region) == ["R1"] * 8 + ["R2"] * 8 + ["R3"] * 8
    there = truth["adjacency"]
    edges = [[(str(s), str(t)) for t in there["target"].values for s in there["source"].values
              if there.sel(mode=k, target=t, source=s)] for k in range(2)]  # fmt: skip
    assert edges == [[("R1", "R2"), ("R2", "R3")], [("R2", "R1"), ("R3", "R2")]]
    blocks = truth["dynamics"].values.reshape(2, 3, 2, 3, 2)
    size = np.sqrt(np.square(blocks).sum((2, 4)))
    np.testing.assert_allclose(size, 0.4 * there + 0.9 * 2**0.5 * np.eye(3), atol=1e-12)
    # Triple eigenvalues with one eigenvector are known to the third root of the rounding.
    np.testing.assert_allclose(abs(np.linalg.eigvals(truth["dynamics"].values)), 0.9, rtol=1e-4)
    assert ((truth["strength"].values > 0.0) == there.values).all()
    mode, path = truth["mode"].values, truth["latents"].values
    step = np.einsum("btij,btj->bti", truth["dynamics"].values[mode[:, 1:]], path[:, :-1])
    assert np.std(path[:, 1:] - step) == pytest.approx(0.3, rel=0.01)
    # A mode that goes on for ever has a stationary covariance; the strength of its edges is measured against it.
    covariance = np.eye(6)
    for _ in range(400):
        covariance = truth["dynamics"].values[0] @ covariance @ truth["dynamics"].values[0].T + 0.09 * np.eye(6)
    roots = [np.linalg.cholesky(covariance[i : i + 2, i : i + 2]) for i in (0, 2)]
    edge = np.linalg.solve(roots[1], truth["dynamics"].values[0, 2:4, :2] @ roots[0])
    assert float(truth["strength"].sel(mode=0, target="R2", source="R1")) == pytest.approx(np.linalg.norm(edge))
    assert (np.diff(mode, axis=1) != 0).mean() == pytest.approx(1 / 20, rel=0.1)
    own = np.repeat(np.arange(3), 8)[:, None] == np.repeat(np.arange(3), 2)
    assert (truth["loading"].values[~own] == 0.0).all() and (truth["loading"].values[own] != 0.0).all()
    assert float(truth["rates"].mean()) == pytest.approx(0.5)
    assert float(found.recording.values.mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("system", [nascar, switching_rotations, switching_routes])
def test_everything_follows_from_the_seed(system):
    first, again, other = system(bins=50, seed=3), system(bins=50, seed=3), system(bins=50, seed=4)
    assert first.truth.identical(again.truth) and first.recording.digest() == again.recording.digest()
    assert first.recording.digest() != other.recording.digest()


@pytest.mark.parametrize(
    ("system", "option", "said"),
    [
        (nascar, {"bins": 1}, "bins must be a whole number of at least 2, got 1"),
        (nascar, {"noise_variance": 0.0}, "noise_variance must be a finite number above 0, got 0.0"),
        (switching_rotations, {"modes": 0}, "modes must be a whole number of at least 1, got 0"),
        (switching_rotations, {"dwell": 1.0}, "dwell must be a finite number above 1, got 1.0"),
        (switching_routes, {"regions": 1}, "regions must be a whole number of at least 2, got 1"),
        (switching_routes, {"coupling": -0.1}, "coupling must be a finite number at least 0, got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(system, option, said):
    with pytest.raises(ValueError, match=said):
        system(**option)
