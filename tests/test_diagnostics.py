"""What tells draws that can be trusted from draws that cannot."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from pyrodyn.diagnostics import diagnose, nested_rhat

DRAW = ("chain", "draw")


def chains(apart: float = 0.0, groups: int = 4, each: int = 16, draws: int = 5, seed: int = 0) -> np.ndarray:
    """Independent normal draws in chains whose groups have their means ``apart``."""
    noise = np.random.default_rng(seed).normal(size=(groups, each, draws))
    return (noise + apart * np.arange(groups)[:, None, None]).reshape(groups * each, draws)


def test_k_hat_tells_a_good_approximation_from_a_bad_one():
    x = np.random.default_rng(0).normal(size=(1, 2000))
    log_q = -0.5 * x**2

    def of(lp):
        return diagnose(xr.Dataset({"x": (DRAW, x)}), xr.Dataset({"lp": (DRAW, lp), "log_q": (DRAW, log_q)}))

    narrow, wide = of(-0.5 * (x / 0.9) ** 2), of(-0.5 * (x / 2.5) ** 2)
    assert narrow.values["k_hat"] < 0.5 and narrow.remarks == ()
    assert wide.values["k_hat"] > 0.7 and "compare with HMC" in wide.remarks[0] and wide.complaints == ()


def test_nested_r_hat_by_hand():
    values = np.array([[[1.0, 3.0], [2.0, 6.0]], [[0.0, 2.0], [5.0, 5.0]]])  # (group, chain, draw)
    within = np.mean([np.var([2.0, 4.0], ddof=1) + (2.0 + 8.0) / 2, np.var([1.0, 5.0], ddof=1) + (2.0 + 0.0) / 2])
    between = np.var([3.0, 3.0], ddof=1)
    found = nested_rhat(xr.Dataset({"x": (DRAW, values.reshape(4, 2))}), 2)
    assert float(found["x"]) == pytest.approx(np.sqrt(1.0 + between / within))


def test_nested_r_hat_trusts_many_short_chains_where_r_hat_cannot():
    short = xr.Dataset({"x": (DRAW, chains(draws=1))})
    assert 1.0 <= float(nested_rhat(short, 4)["x"]) < 1.1
    stuck = xr.Dataset({"x": (DRAW, chains(0.3, draws=50)), "constant": (DRAW, np.ones((64, 50)))})
    found = diagnose(stuck, xr.Dataset(), superchains=4)
    assert found.values["max_nested_r_hat"] > 1.05 and "nested R-hat" in found.complaints[0]
    fine = diagnose(xr.Dataset({"x": (DRAW, chains(draws=50))}), xr.Dataset(), superchains=4)
    assert fine.values["max_nested_r_hat"] < 1.01 and fine.complaints == ()
    assert fine.values["min_bulk_ess"] > 2000


def test_a_constant_alone_is_not_diagnosed():
    constant = xr.Dataset({"x": (DRAW, np.ones((4, 10)))})
    assert "max_r_hat" not in diagnose(constant, xr.Dataset()).values


@pytest.mark.parametrize("draws", [1, 8, 25, 32, 64])
def test_chains_that_never_left_their_start_are_reported(draws):
    still = np.repeat(np.arange(4.0) + 0.1, 16)[:, None] * np.ones(draws)
    found = diagnose(xr.Dataset({"x": (DRAW, still)}), xr.Dataset(), superchains=4)
    assert "nested R-hat of the invariants reaches inf" in found.complaints[0]


def test_one_draw_of_many_chains_is_diagnosed():
    apart = diagnose(xr.Dataset({"x": (DRAW, chains(10.0, draws=1))}), xr.Dataset(), superchains=4)
    assert apart.values["max_nested_r_hat"] > 5.0 and apart.complaints


def test_of_large_variables_some_entries_are_looked_at_whatever_their_axes_are_called():
    rng = np.random.default_rng(0)
    draws = xr.Dataset(
        {
            "wide": (("chain", "draw", "entry"), rng.normal(size=(4, 50, 1200))),
            "narrow": (("entry", "chain", "draw"), rng.normal(size=(1200, 4, 50))),
            "few": (("chain", "draw", "other"), rng.normal(size=(4, 50, 7))),
        }
    )
    good = diagnose(draws, xr.Dataset())
    assert good.values["max_r_hat"] < 1.2 and not np.isnan(good.values["min_bulk_ess"])
    apart = draws.copy(deep=True)
    apart["wide"].loc[{"chain": 0}] += 5.0
    assert diagnose(apart, xr.Dataset()).values["max_r_hat"] > 1.5
