"""Systems that switch: their modes, their statistics, and the errors that they raise."""

from __future__ import annotations

import numpy as np
import pytest

from pyrodyn.systems import nascar, switching_rotations


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


@pytest.mark.parametrize("system", [nascar, switching_rotations])
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
    ],
)
def test_options_out_of_range_are_refused(system, option, said):
    with pytest.raises(ValueError, match=said):
        system(**option)
