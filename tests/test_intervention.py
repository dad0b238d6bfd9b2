"""Silenced regions and cut edges: closed forms, Pyro's own ``do``, and a fitted system against the true one."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.linalg
import torch
import xarray as xr
from pyro import poutine

import pyrodyn as dyn
from pyrodyn import inference, models, plots, readouts
from pyrodyn.coupling.intervention import Surgery, replay
from pyrodyn.distributions import Transition
from pyrodyn.errors import CouplingError, RecordingError
from pyrodyn.linalg.recursion import follow, spread
from pyrodyn.program import specification
from pyrodyn.systems import coupled_regions

MODEL = models.MultiRegionLDS({"A": 2, "B": 1, "C": 1}, edge_probability=1.0, time_bumps=3)
REGION = ["A"] * 3 + ["B"] * 2 + ["C"] * 2


def blank(trials: int = 3, bins: int = 12, counts: bool = True) -> dyn.Recording:
    rng = np.random.default_rng(0)
    values = rng.poisson(1.0, (trials, bins, len(REGION))) if counts else rng.normal(size=(trials, bins, len(REGION)))
    inputs = rng.normal(size=(trials, bins, 1))
    like = dyn.Recording.from_arrays(
        values, bin_width=0.1, region=REGION, counts=counts, inputs=inputs, center=np.zeros(7), scale=np.ones(7)
    )
    return like.blank()


def known(model, like: dyn.Recording, **held) -> tuple[xr.DataTree, xr.Dataset, dyn.Recording]:
    """A posterior of one draw, the truth; the truth; and a recording of it."""
    recording, truth = dyn.simulate(model, like, seed=3, values=held)
    draw = truth.drop_vars("path").expand_dims(("chain", "draw"))
    draw.attrs = model.attributes(like)
    tree = xr.DataTree.from_dict({"posterior": draw, "constant_data": recording.to_xarray().drop_vars("observations")})
    tree["observed_data"] = xr.DataTree(recording.to_xarray()[["observations"]])
    tree.attrs = {"model": json.dumps(specification(model))}
    return tree, truth, recording


class Dense:
    """The system as one matrix over all bins, (I - N) x = u, with equations replaced row by row."""

    def __init__(self, truth: xr.Dataset, drift: np.ndarray) -> None:
        self.truth, self.drift = truth, drift
        self.bins, self.size = drift.shape[-2], drift.shape[-1]
        self.region = truth["latent_region"].values

    def system(self, silent: dict[str, range], cut: tuple[tuple[str, str], ...]) -> np.ndarray:
        """The map from shocks (time x latent) to paths."""
        dynamics = self.truth["dynamics"].values.copy()
        for source, target in cut:
            dynamics[np.ix_(self.region == target, self.region == source)] = 0.0
        whole = np.kron(np.eye(self.bins, k=-1), dynamics)
        heard = np.ones(self.bins * self.size)
        for name, bins in silent.items():
            for t in bins:
                heard[t * self.size + np.flatnonzero(self.region == name)] = 0.0
        return np.linalg.inv(np.eye(len(whole)) - heard[:, None] * whole) * heard

    def forecast(self, silent: dict[str, range], cut: tuple[tuple[str, str], ...]) -> np.ndarray:
        """Expected counts (trial, time, unit) of new trials from equilibrium."""
        a, q = self.truth["dynamics"].values, self.truth["process_noise"].values
        start = scipy.linalg.solve_discrete_lyapunov(a, q)
        through = self.system(silent, cut)
        covariance = through @ scipy.linalg.block_diag(start, *[q] * (self.bins - 1)) @ through.T
        mean = (self.drift.reshape(len(self.drift), -1) @ through.T).reshape(self.drift.shape)
        loading, offset = self.truth["loading"].values, self.truth["offset"].values
        blocks = [covariance[t * self.size :][: self.size, t * self.size :][:, : self.size] for t in range(self.bins)]
        variance = np.array([np.einsum("ui,ij,uj->u", loading, block, loading) for block in blocks])
        return np.exp(mean @ loading.T + offset + 0.5 * variance)


def drift_of(truth: xr.Dataset, like: dyn.Recording) -> np.ndarray:
    """What inputs and the time-locked course add, (trial, time, latent), zero in the first bin."""
    place = np.linspace(0.0, 2.0, like.num_bins)
    hats = np.clip(1.0 - np.abs(place[:, None] - np.arange(3)), 0.0, None)
    regional = truth["input_gain"].values
    found = like.inputs.numpy() @ regional.T + hats @ truth["time_locked"].values[:, 0].T
    found[:, 0] = 0.0
    return np.concatenate([found, np.zeros((*found.shape[:2], truth.sizes["latent"] - len(regional)))], -1)


SURGERIES = [
    ({"silence": "B"}, {"B": range(12)}, ()),
    ({"silence": {"A": slice(0.3, 0.6), "C": [0.0, 1.1]}}, {"A": range(3, 7), "C": (0, 11)}, ()),
    ({"cut": [("A", "B"), ("C", "A")]}, {}, (("A", "B"), ("C", "A"))),
    ({"silence": ["C"], "cut": [("global", "A")]}, {"C": range(12)}, (("global", "A"),)),
]


@pytest.mark.parametrize(("asked", "silent", "cut"), SURGERIES)
def test_new_trials_of_the_true_system_against_its_dense_closed_form(asked, silent, cut):
    like = blank()
    tree, truth, _ = known(MODEL, like, signal_variance=np.full(3, 0.02))
    found = dyn.intervene(tree, like, **asked)
    dense = Dense(truth, drift_of(truth, like))
    expected, factual = dense.forecast(silent, cut), dense.forecast({}, ())
    for name, bins in silent.items():
        expected[:, list(bins)] = np.where(np.array(REGION) == name, np.nan, expected[:, list(bins)])
    np.testing.assert_allclose(found["factual"], factual, rtol=1e-10)
    np.testing.assert_allclose(found["expected"], expected, rtol=1e-10)
    np.testing.assert_allclose(found["effect"], expected - factual, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found["effect_lower"], found["effect_upper"])  # of one draw
    means = np.stack([factual[..., np.array(REGION) == name].mean((0, 2)) for name in "ABC"], -1)
    np.testing.assert_allclose(found["region_factual"][0], means, rtol=1e-10)
    assert abs(found["effect"]).max() > 1e-3
    assert found.attrs["innovations"].startswith("averaged")
    times = {name: "all bins" if len(bins) == 12 else like.time[list(bins)].tolist() for name, bins in silent.items()}
    assert json.loads(found.attrs["silence"]) == times
    figure = plots.plot_intervention(found)
    for name, row in zip("ABC", np.reshape(figure.axes, (3, 2)), strict=True):
        own = expected[..., np.array(REGION) == name].mean((0, 2))
        np.testing.assert_allclose(row[0].lines[1].get_ydata(), own, rtol=1e-10)
        np.testing.assert_allclose(row[1].lines[0].get_ydata(), own - means[:, "ABC".index(name)], atol=1e-9)


def test_the_loops_over_bins_against_dense_matrices():
    generator = torch.Generator().manual_seed(0)
    dynamics, root = 0.4 * torch.randn(2, 2, 3, 3, generator=generator, dtype=torch.float64)
    noise = root @ root.mT
    shocks = torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64)
    held = torch.rand(5, 3, generator=generator) < 0.3
    paths = follow(dynamics, shocks, held)
    covariance = spread(dynamics, noise, noise[:1], held)
    for i in range(2):
        heard = 1.0 - held.double().flatten().numpy()
        step = heard[:, None] * np.kron(np.eye(5, k=-1), dynamics[i].numpy())
        through = np.linalg.inv(np.eye(15) - step) * heard
        np.testing.assert_allclose(
            paths[i].flatten(1), shocks[i].flatten(1).numpy() @ through.T, rtol=1e-12, atol=1e-13
        )
        whole = scipy.linalg.block_diag(noise[0].numpy(), *[noise[i].numpy()] * 4)
        dense = through @ whole @ through.T
        for t in range(5):
            block = dense[3 * t : 3 * t + 3, 3 * t : 3 * t + 3]
            np.testing.assert_allclose(covariance[i, t], block, rtol=1e-12, atol=1e-13)


def test_replay_is_what_do_makes_of_a_program_with_a_site_for_every_region_and_bin():
    generator = torch.Generator().manual_seed(1)
    dynamics = 0.4 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    places, bins = {"A": slice(0, 2), "B": slice(2, 3)}, 6

    def program():
        state = torch.zeros(3, dtype=torch.float64)
        for t in range(bins):
            noise = pyro.sample(f"noise_{t}", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
            told = dynamics @ state + noise
            parts = [pyro.sample(f"{name}_{t}", dist.Delta(told[place]).to_event(1)) for name, place in places.items()]
            state = torch.cat(parts)
        return state

    def path(trace) -> torch.Tensor:
        rows = [torch.cat([trace.nodes[f"{name}_{t}"]["value"] for name in places]) for t in range(bins)]
        return torch.stack(rows)

    factual = poutine.trace(program).get_trace()
    noises = {f"noise_{t}": factual.nodes[f"noise_{t}"]["value"] for t in range(bins)}
    nothing = {f"A_{t}": torch.zeros(2, dtype=torch.float64) for t in (2, 3)}
    intervened = poutine.trace(pyro.do(poutine.condition(program, data=noises), data=nothing)).get_trace()
    # `do` renames what it replaces; what follows in the program sees the new value.
    expected = torch.stack(
        [
            torch.cat([nothing.get(f"A_{t}", intervened.nodes[f"A_{t}"]["value"]), intervened.nodes[f"B_{t}"]["value"]])
            for t in range(bins)
        ]
    )
    held = torch.zeros(bins, 3, dtype=torch.bool)
    held[2:4, places["A"]] = True
    surgery = Surgery(held, torch.zeros(3, 3, dtype=torch.bool), np.zeros((bins, 0), dtype=bool))
    one = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    found = replay(Transition(dynamics.unsqueeze(0), one, one, None), path(factual).unsqueeze(0), surgery)
    torch.testing.assert_close(found.squeeze(0), expected, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(expected, path(factual))


@pytest.mark.parametrize(("asked", "silent", "cut"), SURGERIES[1:3])
def test_a_counterfactual_replays_the_innovations_that_were_there(asked, silent, cut):
    """Observations that show the path: what would have been seen follows from the truth alone."""
    model = models.MultiRegionLDS(
        dict(MODEL.latent_dim),
        edge_probability=1.0,
        global_dim=0,
        trial_level=False,
        time_bumps=3,
        readout=readouts.Gaussian(),
    )
    like = blank(counts=False)
    tree, truth, recording = known(model, like, noise_sd=np.full(7, 1e-6))
    found = dyn.intervene(tree, **asked)
    dense = Dense(truth, drift_of(truth, like))
    path = truth["path"].values.reshape(3, -1)
    moved = path @ (dense.system(silent, cut) @ np.linalg.inv(dense.system({}, ()))).T
    loading, offset = truth["loading"].values, truth["offset"].values
    expected = moved.reshape(truth["path"].shape) @ loading.T + offset
    for name, bins in silent.items():
        expected[:, list(bins)] = np.where(np.array(REGION) == name, np.nan, expected[:, list(bins)])
    # The path is known to the noise of observations over the smallest loading.
    np.testing.assert_allclose(found["expected"], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["factual"], recording.values, rtol=0, atol=1e-4)
    assert np.nanmax(abs(found["effect"])) > 0.1
    assert found.attrs["innovations"].startswith("inferred")


@pytest.mark.long
def test_what_a_fit_predicts_of_silence_is_what_silence_does():
    system = coupled_regions(regions=3, units=12, trials=8, bins=150, mean_count=2.0, coupling=0.35, seed=4)
    recording, truth = system.recording, system.truth
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyn.FitWarning)
        model = models.MultiRegionLDS(2, time_bumps=0, shared_innovations=0, trial_level=False)
        posterior = dyn.fit(model, recording, inference.Gibbs(draws=20, warmup=40, chains=2), seed=0)
    region = truth["latent_region"].values
    path = torch.from_numpy(truth["latents"].values)
    parts = [torch.from_numpy(truth[name].values).unsqueeze(0) for name in ("dynamics", "process_noise")]
    transition = Transition(*parts, parts[1], None)
    for name in ("R1", "R2"):
        held = torch.from_numpy(np.tile(region == name, (recording.num_bins, 1)))
        surgery = Surgery(held, torch.zeros(len(region), len(region), dtype=torch.bool), np.zeros((0, 0), dtype=bool))
        moved = replay(transition, path, surgery)
        effect = ((moved - path).numpy() @ truth["loading"].values.T)[..., recording.region != name]
        found = dyn.intervene(posterior, silence=name, draws=30).isel(unit=recording.region != name)
        # In log rates, in which the system is linear.
        predicted = np.log(found["expected"]) - np.log(found["factual"])
        heard = effect.std((0, 1)) > 0.02  # units that the region reaches at all
        assert heard.sum() >= 6
        correlation = np.corrcoef(predicted.values[..., heard].ravel(), effect[..., heard].ravel())[0, 1]
        assert correlation > 0.9, (name, correlation)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({}, CouplingError, "nothing is asked for"),
        ({"silence": "V9"}, CouplingError, "silence: there is no region 'V9'.*'A', 'B', 'C'"),
        ({"silence": ["A", "B", "C"]}, CouplingError, "names all regions"),
        ({"silence": {"A": slice(7.0, 9.0)}}, CouplingError, "no bin of the recording lies in.*from 0 to 1.1 s"),
        ({"silence": {"A": [0.05]}}, RecordingError, "time"),
        ({"cut": [("A", "V9")]}, CouplingError, "cut: there is no region 'V9'"),
        ({"cut": [("A", "global")]}, CouplingError, "cut: there is no region 'global'"),
        ({"cut": [("A", "A")]}, CouplingError, "a region and itself"),
        ({"cut": ("A", "B")}, CouplingError, r"expected pairs \(source, target\)"),
        ({"cut": "AB"}, CouplingError, "expected pairs"),
        ({"silence": "A", "draws": 0}, CouplingError, "draws"),
    ],
)
def test_what_cannot_be_done_is_said(asked, error, message):
    like = blank()
    tree, _, _ = known(MODEL, like)
    with pytest.raises(error, match=message):
        dyn.intervene(tree, like, **asked)


def test_interventions_need_a_linear_step_and_the_posteriors_units():
    like = blank()
    tree, _, recording = known(MODEL, like)
    with pytest.raises(RecordingError, match="7 units and the recording has 6"):
        dyn.intervene(tree, recording.isel(unit=slice(0, 6)), silence="A")
    other, _, _ = known(models.LDS(2), like)
    with pytest.raises(CouplingError, match="effect: got Dataset"):
        plots.plot_intervention(xr.Dataset())
    with pytest.raises(CouplingError, match="fitted with LDS.*MultiRegionLDS"):
        dyn.intervene(other, like, silence="A")


def test_draws_in_which_silence_lets_others_grow_are_counted_and_do_not_carry_the_prediction_away():
    """A excites itself and B holds it in check: without B it grows."""
    model = models.MultiRegionLDS({"A": 1, "B": 1, "C": 1}, global_dim=0, trial_level=False, time_bumps=0)
    like = blank(trials=2, bins=40)
    dynamics = np.diag([1.2, 0.2, 0.5])
    dynamics[0, 1], dynamics[1, 0] = -0.8, 0.6
    assert abs(np.linalg.eigvals(dynamics)).max() < 1.0
    tree, truth, recording = known(model, like)
    draws = truth.drop_vars("path").expand_dims({"chain": 1, "draw": 5}).copy(deep=True)
    draws["dynamics"][:, :] = np.diag([0.5, 0.5, 0.5])
    draws["dynamics"][0, 3] = dynamics
    tree["posterior"] = xr.DataTree(draws)
    with pytest.warns(dyn.FitWarning, match="in 20% of the draws activity grows more than tenfold"):
        found = dyn.intervene(tree, recording, silence="B")
    assert found.attrs["unstable_share"] == pytest.approx(0.2)
    own = found.isel(unit=[0, 1, 2])
    assert float(own["region_expected"].max()) > 1e2 * float(own["region_factual"].max())
    assert float(own["expected"].max()) < 10.0 * float(own["factual"].max())
    assert dyn.intervene(tree, recording, silence="A").attrs["unstable_share"] == 0.0
