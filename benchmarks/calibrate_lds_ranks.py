r"""Simulation-based calibration of the LDS with a Gaussian readout, and the measured coverage of the approximate
engines.

Run `python benchmarks/calibrate_lds_ranks.py`. In every replicate parameters are drawn from the prior and observations
from the parameters. If simulator, density, gauge, Jacobians and conditioning agree, the rank of a true quantity among
exact posterior draws is uniform.

The posterior draws are exact in the sense that the test needs. From the truth, itself one draw of the posterior, a
reversible Markov chain walks some steps; from where it ends, 63 chains walk as many steps forward. Given the meeting
point, truth and ends are exchangeable, so ranks are uniform whether or not the chains have mixed; mixing gives the
test its power, and the planted bugs show that it has some. Steps are Hamiltonian, in coordinates whitened by the
covariance that `inference.Laplace` found from the data alone.

References: Talts et al., arXiv:1804.06788 (ranks); Gandy & Scott, arXiv:2001.06465 (chains that start at the truth).
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import arviz_stats  # noqa: F401 (brings the accessor azstats)
import numpy as np
import scipy.stats
import torch
import xarray as xr
from torch import Tensor

import pyrodyn as dyn
from pyrodyn import guides, inference, models, readouts
from pyrodyn.distributions.loading import gauge_fix
from pyrodyn.inference import LogDensity, collapse
from pyrodyn.inference.engine import double_precision, random_stream
from pyrodyn.linalg import square_roots
from pyrodyn.program import globals_given, log_terms

TRIALS, BINS, UNITS = 2, 25, 4
DRAWS = 63  # ranks are 0 to 63
WALKS, LEAPS = 8, 6  # Hamiltonian steps each way, leapfrog steps in each
LEAST_P = 5e-4  # of a single test
ENGINE_SEED = 1_000_000  # added, so that no engine draws the numbers that made the truth
PRIOR_SD = 3.0  # widest prior of an unconstrained coordinate


@dataclass(frozen=True)
class HalvedNoise(models.LDS):
    """A planted bug: the density takes half the noise sd that it reports."""

    def readout_law(self, parameters, path, recording):
        return super().readout_law(parameters._replace(noise=0.5 * parameters.noise), path, recording)


@dataclass(frozen=True)
class Transposed(models.LDS):
    """A planted bug: the density transposes the dynamics."""

    def latent_path(self, parameters, recording):
        return super().latent_path(parameters._replace(dynamics=parameters.dynamics.mT), recording)


def twice(recording: dyn.Recording) -> dyn.Recording:
    """A planted bug: every trial counts twice."""
    values = recording.to_xarray()["observations"].values
    return like(2 * TRIALS).with_observations(np.concatenate([values, values]))


def like(trials: int = TRIALS) -> dyn.Recording:
    """Shape and units of measurement; fixed, so that the prior is the same in all replicates."""
    zeros = np.zeros((trials, BINS, UNITS))
    return dyn.Recording.from_arrays(zeros, bin_width=0.02, center=np.zeros(UNITS), scale=np.ones(UNITS), counts=False)


def true_sites(model: models.LDS, truth: xr.Dataset, recording: dyn.Recording) -> dict[str, Tensor]:
    """The global sites that the true parameters are, in the gauge that this recording gives the model."""
    known = {str(name): torch.from_numpy(truth[name].values) for name in truth.data_vars}
    weights, rotation = gauge_fix(known["loading"] * model.latent_dim**0.5, model.pivots(recording))
    _, inverse = square_roots(known["process_noise"])
    mixing = rotation.mT @ (inverse @ known["dynamics"]) @ rotation
    return {"mixing": mixing, "weights": weights, "offset": known["offset"], "noise_sd": known["noise_sd"]}


def exact_draws(density: LogDensity, truth: Tensor, root: Tensor) -> Tensor:
    """Draws (DRAWS, dimension), exchangeable with ``truth`` (dimension,) if that is a draw of the posterior."""
    meeting = walk(density, truth.unsqueeze(0), root)
    return walk(density, meeting.expand(DRAWS, -1), root)


def walk(density: LogDensity, position: Tensor, root: Tensor) -> Tensor:
    """WALKS steps of Hamiltonian Monte Carlo from every row of ``position``; reversible, as momenta are drawn anew."""
    value, slope = density.gradient(position)
    for _ in range(WALKS):
        size = 0.1 * 6.0 ** torch.rand(len(position), 1)
        size = torch.where(torch.rand(len(position), 1) < 0.25, 0.1 * size, size)  # moves where the whitening is poor
        momentum = torch.randn_like(position)
        energy = value - 0.5 * momentum.square().sum(-1)
        place, force = position, slope @ root
        height, steep = value, slope
        moving = momentum
        for _ in range(LEAPS):
            moving = moving + 0.5 * size * force
            place = place + size * moving @ root.mT
            height, steep = density.gradient(place)
            force = steep @ root
            moving = moving + 0.5 * size * force
        gain = height - 0.5 * moving.square().sum(-1) - energy
        taken = (torch.rand(len(position)).log() < gain).unsqueeze(-1)
        position = torch.where(taken, place, position)
        slope = torch.where(taken, steep, slope)
        value = torch.where(taken.squeeze(-1), height, value)
    return position


def quantities(model: models.LDS, values: Mapping[str, Tensor], recording: dyn.Recording) -> dict[str, np.ndarray]:
    """What is ranked, of sites (draw, 1, *event): what no rotation of the latent changes, and the log likelihood."""
    with torch.no_grad(), double_precision():
        parameters = globals_given(model, values, recording)
        found = {name: value[:, 0] for name, (_, value) in model.invariants(parameters).items()}
        lagged = parameters.loading @ parameters.dynamics @ parameters.loading.mT
        likelihood = log_terms(collapse(model), values, recording)[1].sum(-1)
    ranked = {f"eigenvalue modulus {i + 1}": found["eigenvalue_modulus"][:, i] for i in range(model.latent_dim)}
    ranked |= {
        "log det of process noise": torch.logdet(parameters.process_noise[:, 0]),
        "signal sd, unit 0": found["signal_sd"][:, 0],
        "signal sd, unit 1": found["signal_sd"][:, 1],
        "offset, unit 0": found["offset"][:, 0],
        "noise sd, unit 0": found["noise_sd"][:, 0],
        "lag-one covariance, unit 0": found["lag_one_covariance"][:, 0],
        "lag-one covariance, units 0 and 1": lagged[:, 0, 0, 1],
        "log likelihood": likelihood,
    }
    return {name: value.numpy() for name, value in ranked.items()}


def batched(samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sites (chain, draw, *event) as (draw, 1, *event)."""
    return {name: value.flatten(0, 1).unsqueeze(1) for name, value in samples.items()}


def shares_below(
    draws: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], weights: np.ndarray | None = None
) -> dict[str, float]:
    """Posterior probability below the truth, of every quantity."""
    return {name: float(np.average(draws[name] < truth[name][0], weights=weights)) for name in draws}


@dataclass(frozen=True)
class Replicate:
    """One simulated recording, its true sites as a batch of one draw, and what Laplace found."""

    model: models.LDS
    recording: dyn.Recording
    sites: dict[str, Tensor]
    laplace: dict[str, Tensor]  # draws
    log_weights: np.ndarray  # of these draws towards the exact posterior
    root: Tensor

    @classmethod
    def simulate(cls, model: models.LDS, seed: int) -> Replicate:
        recording, truth = dyn.simulate(model, like().blank(), seed=seed)
        sites = {name: value.unsqueeze(0).unsqueeze(0) for name, value in true_sites(model, truth, recording).items()}
        found = inference.Laplace(draws=1000).run(model, recording, seed=ENGINE_SEED + seed)
        drawn = batched(found.samples)
        with torch.no_grad(), double_precision():
            density = LogDensity(collapse(model), recording)
            vectors = density.unconstrain(drawn)
            log_weights = density(vectors) - density.log_jacobian(vectors) - found.stats["log_q"].reshape(-1)
        precision = torch.linalg.inv(vectors.T.cov()) + torch.eye(density.dimension) / PRIOR_SD**2
        root = torch.linalg.cholesky(torch.linalg.inv(precision))
        return cls(model, recording, sites, drawn, log_weights.numpy(), root)

    def truth(self) -> dict[str, np.ndarray]:
        return quantities(self.model, self.sites, self.recording)

    def exact(self, model: models.LDS, recording: dyn.Recording, seed: int) -> dict[str, float]:
        """Places of the truth among exact draws, as ``model`` sees ``recording``: uniform if nothing is wrong."""
        with random_stream(seed, 1), double_precision():
            density = LogDensity(collapse(model), recording)
            start = density.unconstrain(self.sites)[0]
            draws = density.constrain(exact_draws(density, start, self.root).detach())
        drawn, true = quantities(model, draws, recording), quantities(model, self.sites, recording)
        jitter, places = np.random.default_rng(seed), {}
        for name, values in drawn.items():
            apart = values - true[name]
            tied = np.abs(apart) < 1e-9 * (1.0 + np.abs(true[name]))  # a chain that never moved is still at the truth
            below, ties = np.sum((apart < 0.0) & ~tied), np.sum(tied)
            places[name] = float(below + (ties + 1) * jitter.uniform()) / (DRAWS + 1)
        return places

    def approximate(self, truth: Mapping[str, np.ndarray]) -> tuple[dict[str, float], dict[str, float], float]:
        """Shares below the truth under Laplace draws, the same with Pareto-smoothed weights, and k-hat."""
        drawn = quantities(self.model, self.laplace, self.recording)
        plain = shares_below(drawn, truth)
        log_weights = np.nan_to_num(self.log_weights, nan=-np.inf)
        log_weights = np.maximum(log_weights, log_weights.max() - 700.0)
        try:
            smooth, shape = (-xr.DataArray(log_weights, dims="draw")).azstats.psislw(dim="draw")
        except ValueError:  # no tail to fit: all the weight lies on a few draws
            return plain, plain, np.inf
        return plain, shares_below(drawn, truth, np.exp(smooth.values - smooth.values.max())), float(shape)


def tests(places: list[dict[str, float]]) -> dict[str, tuple[float, float, float, float]]:
    """For each quantity: p of Kolmogorov-Smirnov, p of chi-square in ten bins, coverage of 50% and 90% intervals."""
    found = {}
    for name in places[0]:
        u = np.array([place[name] for place in places])
        counts = np.histogram(u, 10, (0.0, 1.0))[0]
        ks, chi = scipy.stats.kstest(u, "uniform").pvalue, scipy.stats.chisquare(counts).pvalue
        found[name] = (float(ks), float(chi), *coverage(u))
    return found


def coverage(u: np.ndarray) -> tuple[float, float]:
    return float(np.mean(np.abs(u - 0.5) < 0.25)), float(np.mean(np.abs(u - 0.5) < 0.45))


def bounds(nominal: float, count: int) -> tuple[float, float]:
    """Where the coverage of ``count`` replicates lies with probability .998 if the intervals are right."""
    law = scipy.stats.binom(count, nominal)
    return law.ppf(0.001) / count, law.ppf(0.999) / count


def main() -> int:
    parser = argparse.ArgumentParser(description="Simulation-based calibration of the LDS.")
    parser.add_argument("--replicates", type=int, default=200, help="for each latent dimension")
    parser.add_argument("--bug-replicates", type=int, default=30, help="of these, with each planted bug")
    parser.add_argument("--svi-replicates", type=int, default=15, help="of these, fitted by SVI")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="write the tables to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", dyn.FitWarning)
    report, failed, began = Report(options.table), 0, time.process_time()
    approximate = {
        "SVI, 200 steps, full rank": inference.SVI(steps=200, draws=500),
        "SVI, 200 steps, structured guide": inference.SVI(steps=200, draws=500, guide=guides.Structured()),
    }
    for dim in (1, 2):
        model = models.LDS(dim, readout=readouts.Gaussian())
        places: dict[str, list[dict[str, float]]] = {}
        shapes = []
        bugs = {
            "likelihood counted twice": (model, twice),
            "noise sd halved": (HalvedNoise(dim, readout=readouts.Gaussian()), None),
            "dynamics transposed": (Transposed(dim, readout=readouts.Gaussian()), None),
        }
        if dim == 1:
            del bugs["dynamics transposed"]  # a number is its own transpose
        for i in range(options.replicates):
            seed = options.seed + 10_000 * dim + i
            replicate = Replicate.simulate(model, seed)
            recording, truth = replicate.recording, replicate.truth()
            places.setdefault("exact", []).append(replicate.exact(model, recording, seed))
            plain, smoothed, shape = replicate.approximate(truth)
            shapes.append(shape)
            places.setdefault("Laplace, Pareto-smoothed weights", []).append(smoothed)
            places.setdefault("Laplace", []).append(plain)
            if i < options.bug_replicates:
                for name, (wrong, change) in bugs.items():
                    seen = change(recording) if change else recording
                    places.setdefault(name, []).append(replicate.exact(wrong, seen, seed))
            if i < options.svi_replicates:
                for name, engine in approximate.items():
                    drawn = batched(engine.run(model, recording, seed=ENGINE_SEED + seed).samples)
                    places.setdefault(name, []).append(shares_below(quantities(model, drawn, recording), truth))
            if (i + 1) % 10 == 0:
                print(f"latent_dim {dim}: {i + 1} replicates, {time.process_time() - began:.0f} s", flush=True)
        failed += report.exact(dim, places["exact"])
        failed += report.planted(places, bugs)
        report.approximate(places, ["Laplace", "Laplace, Pareto-smoothed weights", *approximate], np.array(shapes))
    report.line(f"{time.process_time() - began:.0f} s of processor time on one 2.8 GHz core.")
    report.line("Every test was passed, every planted bug found." if not failed else f"{failed} failures.")
    report.write()
    return int(failed > 0)


class Report:
    """Lines of Markdown, printed as they come and written at the end."""

    def __init__(self, path: Path | None) -> None:
        command = " ".join(["python", *sys.argv])
        self.path, self.lines = path, ["# Simulation-based calibration of the LDS", "", f"Made by `{command}`.", ""]

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines.append(text)

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        for row in (header, ["---"] * len(header), *rows):
            self.line("| " + " | ".join(row) + " |")
        self.line()

    def exact(self, dim: int, places: list[dict[str, float]]) -> int:
        count = len(places)
        (low_50, high_50), (low_90, high_90) = bounds(0.5, count), bounds(0.9, count)
        self.line(f"## latent_dim = {dim}: {count} replicates of {TRIALS} trials, {BINS} bins, {UNITS} units")
        self.line()
        self.line(
            f"Ranks among {DRAWS} exact draws. A test fails where p < {LEAST_P:g}, or where the coverage leaves "
            f"[{low_50:.3f}, {high_50:.3f}] (50%) or [{low_90:.3f}, {high_90:.3f}] (90%), binomial bounds of 99.8%."
        )
        self.line()
        rows, failed = [], 0
        for name, (ks, chi, half, most) in tests(places).items():
            bad = min(ks, chi) < LEAST_P or not (low_50 <= half <= high_50 and low_90 <= most <= high_90)
            failed += bad
            rows.append([name, f"{ks:.3f}", f"{chi:.3f}", f"{half:.3f}", f"{most:.3f}", "FAILED" if bad else "passed"])
        self.table(["quantity", "KS p", "chi-square p", "in 50% interval", "in 90% interval", ""], rows)
        return failed

    def planted(self, places: Mapping[str, list[dict[str, float]]], names) -> int:
        rows, failed = [], 0
        for name in names:
            if name not in places:
                continue
            worst = sorted((min(found[:2]), quantity) for quantity, found in tests(places[name]).items())
            seen = worst[0][0] < LEAST_P
            failed += not seen
            flagged = sum(p < LEAST_P for p, _ in worst)
            rows.append([name, str(len(places[name])), worst[0][1], f"{worst[0][0]:.1e}", f"{flagged} of {len(worst)}",
                         "found" if seen else "MISSED"])  # fmt: skip
        if rows:
            self.line("Planted bugs, that the test must find:")
            self.line()
            self.table(["bug", "replicates", "clearest quantity", "p", "quantities that fail", ""], rows)
        return failed

    def approximate(self, places: Mapping[str, list[dict[str, float]]], names: list[str], shapes: np.ndarray) -> None:
        self.line("Approximate engines, measured coverage of their 50% / 90% intervals:")
        self.line()
        found = {f"{name} ({len(places[name])})": tests(places[name]) for name in names if name in places}
        ranked = next(iter(found.values()))
        rows = [[q, *(f"{engine[q][2]:.2f} / {engine[q][3]:.2f}" for engine in found.values())] for q in ranked]
        pooled = [np.mean([each[2:] for each in engine.values()], 0) for engine in found.values()]
        rows.append(["mean of these", *(f"{half:.2f} / {most:.2f}" for half, most in pooled)])
        self.table(["quantity (replicates beside the engine)", *found], rows)
        self.line(
            f"Pareto k-hat of the weights from Laplace to the exact posterior: median {np.median(shapes):.2f}, "
            f"over 0.7 in {np.mean(~(shapes <= 0.7)):.0%} of the replicates."
        )
        self.line()

    def write(self) -> None:
        if self.path is not None:
            self.path.write_text("\n".join(self.lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
