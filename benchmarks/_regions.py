"""How well a graph of regions is recovered: scores, and the floor and the ceiling that a fit is to be compared with.

Scripts about regions import this. Run by itself, `python benchmarks/_regions.py` prints floor and ceiling over seeds
for the three settings of `coupled_regions`, in under a minute.

Floor: counts under a Gaussian kernel, factor analysis in every region, Granger's block statistic between the factors.
Ceiling: the paths are smoothed under the true parameters, and blocks refitted to their posterior, one step of EM from
the truth. Being started there it is drawn to it: its graph is a bound, not what a fit can be expected to reach; its
global latent is what the spikes tell. Floor, ceiling and the regression on the true latents take their statistics from
second moments in the same way.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from scipy.ndimage import gaussian_filter1d
from scipy.stats import rankdata
from sklearn.decomposition import FactorAnalysis
from sklearn.exceptions import ConvergenceWarning

from pyrodyn.conditioning import path_given
from pyrodyn.distributions import GaussMarkov
from pyrodyn.readouts import AffineReadout, Poisson
from pyrodyn.systems import System, coupled_regions

# The best of 1, 2, 3 and 5 bins by mean AUROC over the three settings (.92, .88, .82, .69): wider kernels blur who came
# first. Chosen with the truth in hand, in the floor's favour.
KERNEL_SD = 1.0

SETTINGS: dict[str, dict] = {
    "easy": {"trials": 20},
    "hard 1": {"trials": 4},
    "hard 2": {"coupling": 0.08, "trials": 10},
}


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Entries (pair,) of (..., target, source) without the diagonal."""
    return np.asarray(matrix)[..., ~np.eye(matrix.shape[-1], dtype=bool)]


def edge_auroc(evidence: np.ndarray, adjacency: np.ndarray) -> float:
    """Probability that an edge has more evidence (target, source) than a pair without; ties count half.

    NaN where all pairs are edges, or none is.
    """
    score, present = off_diagonal(evidence), off_diagonal(adjacency).astype(bool)
    edges, others = present.sum(), (~present).sum()
    if not edges or not others:
        return float("nan")
    return float((rankdata(score)[present].sum() - edges * (edges + 1) / 2) / (edges * others))


def log_gain_correlation(found: np.ndarray, true: np.ndarray, adjacency: np.ndarray) -> float:
    """Correlation of log strengths over the edges that are present; strengths may be stacked, (..., target, source).

    NaN with fewer than three edges, where it says nothing.
    """
    present = off_diagonal(adjacency).astype(bool)
    if present.sum() < 3:
        return float("nan")
    logs = [np.log(np.maximum(off_diagonal(strength)[present], 1e-12)) for strength in (found, true)]
    return float(np.corrcoef(*logs)[0, 1])


def global_r2(found: np.ndarray, true: np.ndarray) -> float:
    """Share of the true global latent's variance that a regression on the one found explains; both (trial, time)."""
    return float(np.corrcoef(found.ravel(), true.ravel())[0, 1] ** 2)


@dataclass(frozen=True)
class Moments:
    """Sums over trials and bins of E x_t x_t', E x_t x_t-1' and E x_t-1 x_t-1', each (latent, latent)."""

    ahead: np.ndarray
    cross: np.ndarray
    behind: np.ndarray

    @classmethod
    def of_paths(cls, paths: np.ndarray) -> Moments:
        """Of paths (trial, time, latent) that are known."""
        later, earlier = (part.reshape(-1, paths.shape[-1]) for part in (paths[:, 1:], paths[:, :-1]))
        return cls(later.T @ later, later.T @ earlier, earlier.T @ earlier)

    @classmethod
    def of_posterior(cls, law: GaussMarkov) -> Moments:
        """Of paths that are known up to a posterior, with batch (trial,)."""
        known = cls.of_paths(law.mean.numpy())
        spread, cross = law.covariance, law.cross_covariance
        return cls(
            known.ahead + spread[:, 1:].sum((0, 1)).numpy(),
            known.cross + cross.sum((0, 1)).numpy().T,
            known.behind + spread[:, :-1].sum((0, 1)).numpy(),
        )


def residual(moments: Moments, target: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """What is left of the targets' second moments after a regression on the sources one bin before."""
    cross = moments.cross[np.ix_(target, sources)]
    left = moments.ahead[np.ix_(target, target)]
    return left - cross @ np.linalg.solve(moments.behind[np.ix_(sources, sources)], cross.T)


def block_statistics(moments: Moments, owner: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    r"""Granger's statistic and the strength of every block, both (target, source).

    The statistic is :math:`\log|R_{r, -s}| - \log|R_r|`, with R the residual covariance of region r given the past of
    all latents, and given that of all but region s. The strength is that of the regression's block.

    Parameters
    ----------
    moments : Moments
    owner : (latent,) region of each latent from 0 to size - 1; others (the global one) are always conditioned on
    size : number of regions
    """
    everything = np.arange(len(owner))
    dynamics = np.linalg.solve(moments.behind, moments.cross.T).T
    parts = [np.flatnonzero(owner == r) for r in range(size)]
    roots = [np.linalg.cholesky(moments.behind[np.ix_(part, part)]) for part in parts]
    statistic, strength = np.zeros((2, size, size))
    for r in range(size):
        full = np.linalg.slogdet(residual(moments, parts[r], everything))[1]
        for s in range(size):
            if s == r:
                continue
            without = residual(moments, parts[r], np.setdiff1d(everything, parts[s]))
            statistic[r, s] = np.linalg.slogdet(without)[1] - full
            strength[r, s] = np.linalg.norm(np.linalg.solve(roots[r], dynamics[np.ix_(parts[r], parts[s])] @ roots[s]))
    return statistic, strength


@dataclass(frozen=True)
class Recovered:
    """Evidence and strength (target, source), and the global latent (trial, time) where there is one."""

    evidence: np.ndarray
    strength: np.ndarray
    shared: np.ndarray | None = None


def owners(truth: xr.Dataset) -> np.ndarray:
    """Region (latent,) of each latent as a number, -1 for the global one."""
    names = truth["target"].values.tolist()
    return np.array([names.index(name) if name in names else -1 for name in truth["latent_region"].values.tolist()])


def floor(system: System, latent_dim: int = 2, kernel_sd: float = KERNEL_SD) -> Recovered:
    """Smoothing, factor analysis of every region, and Granger's statistic between the factors."""
    recording = system.recording
    counts = gaussian_filter1d(recording.values.numpy(), kernel_sd, axis=1, mode="nearest")
    factors = []
    for region in recording.regions:
        part = counts[..., recording.region == region]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            analysis = FactorAnalysis(latent_dim, random_state=0)
            factors.append(analysis.fit_transform(part.reshape(-1, part.shape[-1])).reshape(*part.shape[:2], -1))
    owner = np.repeat(np.arange(len(factors)), latent_dim)
    return Recovered(*block_statistics(Moments.of_paths(np.concatenate(factors, -1)), owner, len(factors)))


def path_under_truth(system: System) -> GaussMarkov:
    """Posterior (Laplace) of the path under the true parameters; batch (trial,). Dynamics of one lag, without drift."""
    truth = system.truth

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(truth[name].values).unsqueeze(0)

    prior = GaussMarkov.from_dynamics(
        tensor("dynamics"),
        tensor("process_noise"),
        num_bins=truth.sizes["time"],
        initial_covariance=tensor("stationary_covariance"),
    )
    zeros = torch.zeros(truth["latents"].shape, dtype=torch.float64)
    readout = AffineReadout(Poisson(), zeros, tensor("loading"), tensor("offset"), None)
    return path_given(prior, readout, system.recording.values)


def ceiling(system: System) -> Recovered:
    """What the true parameters reach from the same spikes."""
    law, owner = path_under_truth(system), owners(system.truth)
    size = system.truth.sizes["target"]
    shared = law.mean.numpy()[..., -1] if owner[-1] < 0 else None
    return Recovered(*block_statistics(Moments.of_posterior(law), owner, size), shared)


def regression(system: System) -> Recovered:
    """The same regression on the true latents."""
    latents = system.truth["latents"].values
    owner = owners(system.truth)
    shared = latents[..., -1] if owner[-1] < 0 else None
    return Recovered(*block_statistics(Moments.of_paths(latents), owner, system.truth.sizes["target"]), shared)


def scores(found: Recovered, truth: xr.Dataset) -> tuple[float, float, float]:
    """Edge AUROC, log-gain correlation, global R2; NaN where there is none."""
    adjacency, strength = truth["adjacency"].values, truth["strength"].values
    shared = float("nan")
    if found.shared is not None:
        shared = global_r2(found.shared, truth["latents"].sel(latent="global").values)
    return edge_auroc(found.evidence, adjacency), log_gain_correlation(found.strength, strength, adjacency), shared


METHODS = {"floor": floor, "ceiling": ceiling, "true latents": regression}

HEADER = """| setting | method | AUROC mean | worst | log-gain corr. median | worst | global R2 mean | worst |
|---|---|---|---|---|---|---|---|"""


def row(setting: str, method: str, values: np.ndarray) -> str:
    """A row of the table from scores (seed, score)."""
    auroc, gain, shared = (column[np.isfinite(column)] for column in values.T)
    entries = [f"{auroc.mean():.2f}", f"{auroc.min():.2f}", f"{np.median(gain):.2f}", f"{gain.min():.2f}"]
    entries += [f"{shared.mean():.2f}", f"{shared.min():.2f}"] if len(shared) else ["-", "-"]
    return f"| {setting} | {method} | {' | '.join(entries)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Floor and ceiling of the recovery of a region graph.")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--kernel-sd", type=float, default=KERNEL_SD, help="of the floor's smoothing, bins")
    parser.add_argument("--global-input", type=float, default=0.3)
    options = parser.parse_args()
    began = time.perf_counter()
    print(HEADER)
    for setting, arguments in SETTINGS.items():
        made = [
            coupled_regions(**arguments, global_input=options.global_input, seed=seed) for seed in range(options.seeds)
        ]
        for name, method in METHODS.items():
            width = {"kernel_sd": options.kernel_sd} if method is floor else {}
            found = np.array([scores(method(system, **width), system.truth) for system in made])
            print(row(setting, name, found), flush=True)
    print(f"{options.seeds} seeds, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
