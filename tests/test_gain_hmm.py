"""States of attention: the prior that gains share, and states that are found in a population but in no unit alone."""

import itertools

import numpy as np
import pytest
import torch
import zoo
from sklearn.metrics import roc_auc_score

import pyrodyn as dyn
from pyrodyn import inference, models, readouts
from pyrodyn.models._modes import mode_contrasts
from pyrodyn.program import globals_given, log_terms


def attentive(units=20, dwell=2.0, bin_width=0.02, trials=4, bins=1500, seed=0):
    """Counts of units whose rates are 25% higher in one of two states, and the state."""
    rng = np.random.default_rng(seed)
    state = np.zeros((trials, bins), dtype=int)
    state[:, 0] = rng.integers(2, size=trials)
    for t in range(1, bins):
        state[:, t] = np.where(rng.random(trials) < bin_width / dwell, 1 - state[:, t - 1], state[:, t - 1])
    rates = rng.uniform(10.0, 25.0, units) * bin_width
    counts = rng.poisson(rates * 1.25 ** state[..., None])
    return dyn.Recording.from_arrays(counts, bin_width=bin_width), state


def test_states_of_attention_are_found_with_their_gain():
    recording, state = attentive()
    posterior = dyn.fit(models.GainHMM(), recording, inference.Laplace(draws=30), seed=0)
    gain = posterior["posterior"]["gain"].mean(("chain", "draw")).values
    high = posterior["latents"]["mode_probability"].values[..., int(np.argmax(gain))]
    assert np.mean((high > 0.5) == state) >= 0.90
    assert roc_auc_score(state.ravel(), high.ravel()) >= 0.95
    assert abs(gain.max() - gain.min() - np.log(1.25)) < 0.04


def test_the_sites_have_the_density_written_in_the_docstring():
    model, recording = models.GainHMM(3, spread=0.2, gain_scale=0.4), zoo.row("GainHMM-Poisson-ragged").recording
    values = zoo.prior_draws(model, recording, (3,))
    shared, _ = log_terms(model, values | {"mode": torch.zeros(3, 3, 9, dtype=torch.long)}, recording)
    common, contrasts = values["common_contrasts"], values["contrasts"]
    normal = torch.distributions.Normal
    moved = values | {"common_contrasts": common + 0.1, "contrasts": contrasts - 0.3}
    change = log_terms(model, moved | {"mode": torch.zeros(3, 3, 9, dtype=torch.long)}, recording)[0] - shared
    expected = sum(
        sign * (normal(0.0, 0.4).log_prob(c).sum((-2, -1)) + normal(c.unsqueeze(-1), 0.2).log_prob(v).sum((-3, -2, -1)))
        for sign, c, v in ((1, common + 0.1, contrasts - 0.3), (-1, common, contrasts))
    )
    torch.testing.assert_close(change, expected)


def renumbered(model, values, order):
    """Values of the global sites with the modes in another order."""
    basis = mode_contrasts(model.num_modes)
    turn = basis.mT @ torch.eye(model.num_modes, dtype=torch.float64)[order] @ basis
    return values | {
        "initial": values["initial"][..., order],
        "transition": values["transition"][..., order, :][..., order],
        "contrasts": turn @ values["contrasts"],
        "common_contrasts": values["common_contrasts"] @ turn.mT,
    }


def test_common_and_own_gains_sum_to_zero_and_are_renumbered_together():
    row = zoo.row("GainHMM-NegativeBinomial-three-states-missing")
    values = zoo.prior_draws(row.model, row.recording, (1,))
    parameters = globals_given(row.model, values, row.recording)
    torch.testing.assert_close(parameters.gain.sum(-1), torch.zeros(1, 1, dtype=torch.float64))
    torch.testing.assert_close(parameters.predictor.mean(-2), values["offset"])
    for order in itertools.permutations(range(3)):
        moved = renumbered(row.model, values, list(order))
        gain = globals_given(row.model, moved, row.recording).gain
        torch.testing.assert_close(gain, parameters.gain[..., list(order)])
        back = row.model.nearest_copy(moved, values, row.recording)
        for name, value in values.items():
            torch.testing.assert_close(back[name], value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_modes": 1}, "num_modes"),
        ({"readout": readouts.Gaussian()}, "readout"),
        ({"gain_scale": 0.0}, "gain_scale"),
        ({"spread": -1.0}, "spread"),
    ],
)
def test_options_out_of_range_are_named(change, words):
    with pytest.raises(dyn.errors.ModelError, match=words):
        models.GainHMM(**change)
