"""Reference posteriors of posteriordb, as programs built from the library's parts and sampled by HMC.

Run `python benchmarks/posteriordb.py`; it writes docs/tables/posteriordb.md, in about two minutes on one core.
$PYRODYN_DATA names the folder of recordings. The exit code is 1 unless six posteriors or more agree with the reference.

The programs are written from the models' statements; parameters have the names that the reference draws have.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.nn.functional import pad

import pyrodyn as dyn
from pyrodyn import inference
from pyrodyn.diagnostics import nested_rhat
from pyrodyn.distributions import GaussianProcess
from pyrodyn.inference import LogDensity
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.integrators import FixedStep
from pyrodyn.linalg import mode_log_normaliser
from pyrodyn.program import trial_plate

TABLE = Path(__file__).resolve().parents[1] / "docs" / "tables" / "posteriordb.md"
FOLDER = Path(os.environ.get("PYRODYN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MEAN, LOW, HIGH, ENOUGH = 0.1, 0.9, 1.1, 6  # reference sds, ratios of sds, posteriors
FLAT = 100.0  # scale of a proper prior in place of a flat one: it moves no mean by 1e-4 posterior sds

Values = dict[str, Tensor]


class Restricted(TorchDistribution):
    """A law where it lies in a support; its density lacks the constant that would renormalise it."""

    arg_constraints = {}

    def __init__(self, base: TorchDistribution, support: Any) -> None:
        self.base, self._support = base, support
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self):
        return self._support

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        value = self.base.sample(sample_shape)
        while not bool((inside := self._support.check(value)).all()):
            value = torch.where(inside.unsqueeze(-1), value, self.base.sample(sample_shape))
        return value

    def expand(self, batch_shape, _instance=None) -> Restricted:
        return Restricted(self.base.expand(batch_shape), self._support)


ORDERED, ALL_POSITIVE = constraints.positive_ordered_vector, constraints.independent(constraints.positive, 1)


def restricted_normal(mean: list[float], sd: Any, support: Any) -> Restricted:
    return Restricted(dist.Normal(numbers(mean), numbers(sd)).to_event(1), support)


def numbers(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def recursion(decay: Tensor, drive: Tensor) -> Tensor:
    r""":math:`x_t = \phi x_{t-1} + u_t` with :math:`x_0 = 0`, along the last axis, in log2(time) steps.

    ``decay`` is (*draw, 1, 1), ``drive`` (*draw, 1, time).
    """
    bins, step = drive.shape[-1], 1
    while step < bins:
        drive = drive + decay**step * pad(drive, (step, 0))[..., :bins]
        step *= 2
    return drive


def observe(law: TorchDistribution, recording: dyn.Recording, seen: Tensor) -> Tensor:
    with trial_plate(recording):
        return pyro.sample("observations", law, obs=seen)


def autoregression(recording: dyn.Recording, lags: int = 5) -> Tensor:
    """arK: each value from the last five."""
    y = recording.values[..., 0]
    alpha = pyro.sample("alpha", dist.Normal(numbers([0.0]), 10.0).to_event(1))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(lags, dtype=torch.float64), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(numbers([2.5])).to_event(1))
    past = torch.stack([y[0, lags - k : len(y[0]) - k] for k in range(1, lags + 1)])
    return observe(dist.Normal(alpha + beta @ past, sigma).to_event(1), recording, y[:, lags:])


def moving_average(recording: dyn.Recording) -> Tensor:
    """arma11: autoregression whose errors are passed on; the error before the first bin is zero."""
    y = recording.values[..., 0]
    mu = pyro.sample("mu", dist.Normal(numbers([0.0]), 10.0).to_event(1))
    phi, theta = (pyro.sample(name, dist.Normal(numbers([0.0]), 2.0).to_event(1)) for name in ("phi", "theta"))
    sigma = pyro.sample("sigma", dist.HalfCauchy(numbers([2.5])).to_event(1))
    first = mu + torch.zeros_like(y[..., :1])  # what stands before the first bin
    before = torch.cat([first, y[..., :-1].expand(*first.shape[:-1], -1)], -1)
    error = recursion(-theta, y - mu - phi * before)
    # The map from values to errors has a unit determinant.
    return observe(dist.Normal(torch.zeros_like(error), sigma).to_event(1), recording, error)


def garch(recording: dyn.Recording, first: float = 0.5) -> Tensor:
    """garch11: the variance decays and is driven by the last squared deviation; ``first`` is its root in bin 1."""
    y = recording.values[..., 0]
    mu = pyro.sample("mu", dist.Normal(numbers([0.0]), FLAT).to_event(1))
    alpha0 = pyro.sample("alpha0", dist.HalfNormal(numbers([FLAT])).to_event(1))
    share = pyro.sample("share", dist.Dirichlet(numbers([1.0, 1.0, 1.0])))  # uniform where alpha1 + beta1 < 1
    alpha1, beta1 = share[..., :1], share[..., 1:2]
    driven = alpha0 + alpha1 * (y[..., :-1] - mu).square()
    start = torch.full_like(driven[..., :1], first**2)
    sd = recursion(beta1, torch.cat([start, driven], -1)).sqrt()
    return observe(dist.Normal(mu.expand(sd.shape), sd).to_event(1), recording, y)


def hidden_markov(recording: dyn.Recording, weights: Tensor, likelihood: Callable[[], Tensor]) -> Tensor:
    """Two modes, the first without a law; ``likelihood`` samples what they emit by: (*draw, 1, time, mode)."""
    rows = [pyro.sample(f"theta{k + 1}", dist.Dirichlet(weights[k])) for k in range(2)]
    emitted = likelihood()
    transition = torch.stack(rows, -2).log().unsqueeze(-3)
    with trial_plate(recording):
        total = mode_log_normaliser(emitted.new_zeros(2), transition, emitted)
        return pyro.factor("observations", total)


def two_levels(recording: dyn.Recording) -> Tensor:
    """hmm_example: values about one of two levels, with unit variance."""

    def likelihood() -> Tensor:
        level = pyro.sample("mu", restricted_normal([3.0, 10.0], [1.0, 1.0], ORDERED))
        return dist.Normal(level.unsqueeze(-2), 1.0).log_prob(recording.values)

    return hidden_markov(recording, numbers([[1.0, 1.0], [1.0, 1.0]]), likelihood)


def drive(recording: dyn.Recording) -> Tensor:
    """hmm_drive_0: a basketball player drives at the hoop or not; inverse speed and distance are exponential."""

    def likelihood() -> Tensor:
        rates = [pyro.sample(n, restricted_normal([0.0, 3.0], [1.0, 1.0], ORDERED)) for n in ("phi", "lambda")]
        return sum(
            dist.Exponential(rate.unsqueeze(-2)).log_prob(recording.values[..., unit : unit + 1])
            for unit, rate in enumerate(rates)
        )  # type: ignore[return-value]

    return hidden_markov(recording, numbers([[4.0, 2.0], [2.0, 4.0]]), likelihood)


def predators(recording: dyn.Recording) -> Tensor:
    """lotka_volterra: hares and lynxes, log-normal about a flow."""
    middle, spread = [1.0, 0.05, 1.0, 0.05], [0.5, 0.05, 0.5, 0.05]
    theta = pyro.sample("theta", restricted_normal(middle, spread, ALL_POSITIVE))
    start = pyro.sample("z_init", dist.LogNormal(numbers([10.0, 10.0]).log(), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(numbers([-1.0, -1.0]), 1.0).to_event(1))
    birth, eaten, death, fed = theta.unbind(-1)

    def field(state: Tensor) -> Tensor:
        prey, predator = state.unbind(-1)
        return torch.stack([(birth - eaten * predator) * prey, (fed * prey - death) * predator], -1)

    size = FixedStep(bins=0.2).solve(field, start, torch.from_numpy(recording.time.copy()), recording.bin_width)
    law = dist.LogNormal(size.log(), sigma.unsqueeze(-2)).to_event(2)
    return observe(law, recording, recording.values)


def smooth_counts(recording: dyn.Recording) -> Tensor:
    """gp_pois_regr: counts whose log rate is a Gaussian process."""
    rho = pyro.sample("rho", dist.Gamma(numbers([25.0]), 4.0).to_event(1))
    alpha = pyro.sample("alpha", dist.HalfNormal(numbers([2.0])).to_event(1))
    zeros = torch.zeros(recording.num_bins, dtype=torch.float64)
    noise = pyro.sample("f_tilde", dist.Normal(zeros, 1.0).to_event(1))
    f = log_rate({"rho": rho, "alpha": alpha, "f_tilde": noise}, recording)
    return observe(dist.Poisson(f.exp()).to_event(1), recording, recording.values[..., 0])


def log_rate(values: Mapping[str, Tensor], recording: dyn.Recording) -> Tensor:
    """The Gaussian process (*draw, 1, time) of standard normal noise."""
    x = torch.from_numpy(recording.time.copy())
    apart = (x[:, None] - x) / values["rho"][..., None]
    covariance = values["alpha"][..., None].square() * torch.exp(-0.5 * apart.square())
    covariance = covariance + 1e-10 * torch.eye(len(x), dtype=torch.float64)
    law = GaussianProcess(x.new_zeros(len(x), 1), covariance.unsqueeze(-3))
    return law.transform(values["f_tilde"].unsqueeze(-1)).squeeze(-1)


def as_shown(values: Values, recording: dyn.Recording) -> Values:
    """What the reference reports, in place of what is sampled."""
    if "share" in values:
        share = values["share"]
        return values | {"alpha1": share[..., :1], "beta1": share[..., 1:2]}
    if "f_tilde" in values:
        return values | {"f": log_rate(values, recording)}
    return values


def series(data: Mapping[str, Any]) -> dyn.Recording:
    return real_valued(np.array(data["y"])[:, None])


def real_valued(values: np.ndarray) -> dyn.Recording:
    return dyn.Recording.from_arrays(values[None], bin_width=1.0, counts=False)


class Case(NamedTuple):
    """A posterior of the database: its name, the file of its data, a program, and the data as a recording."""

    name: str
    data: str
    program: Callable[[dyn.Recording], Tensor]
    recording: Callable[[Mapping[str, Any]], dyn.Recording]
    start: Mapping[str, list[float]]  # of the climb to the mode, near the middle of the prior


CASES = (
    Case("arK-arK", "arK", autoregression, series, {"alpha": [0.0], "beta": [0.0] * 5, "sigma": [1.0]}),
    Case("arma-arma11", "arma", moving_average, series, {"mu": [0.0], "phi": [0.0], "theta": [0.0], "sigma": [1.0]}),
    Case("garch-garch11", "garch", garch, series, {"mu": [0.0], "alpha0": [1.0], "share": [1 / 3] * 3}),
    Case(
        "hmm_example-hmm_example",
        "hmm_example",
        two_levels,
        series,
        {"theta1": [0.5, 0.5], "theta2": [0.5, 0.5], "mu": [3.0, 10.0]},
    ),
    Case(
        "bball_drive_event_0-hmm_drive_0",
        "bball_drive_event_0",
        drive,
        lambda data: real_valued(np.stack([data["u"], data["v"]], -1)),
        {"theta1": [0.5, 0.5], "theta2": [0.5, 0.5], "phi": [1.0, 3.0], "lambda": [1.0, 3.0]},
    ),
    Case(
        "hudson_lynx_hare-lotka_volterra",
        "hudson_lynx_hare",
        predators,
        lambda data: real_valued(np.concatenate([[data["y_init"]], data["y"]])),
        # At half the prior's middle: from there it climbs to a hump 40 nats lower, another period of the cycle.
        {"theta": [0.5, 0.05, 0.5, 0.05], "z_init": [10.0, 10.0], "sigma": [0.5, 0.5]},
    ),
    Case(
        "gp_pois_regr-gp_pois_regr",
        "gp_pois_regr",
        smooth_counts,
        lambda data: dyn.Recording.from_arrays(np.array(data["k"])[None, :, None], time=data["x"], counts=True),
        {"rho": [6.0], "alpha": [1.5], "f_tilde": [0.0] * 11},
    ),
)


def read(name: str, folder: Path) -> Any:
    with zipfile.ZipFile(folder / "posteriordb_refs" / f"{name}.json.zip") as archive:
        return json.loads(archive.read(archive.namelist()[0]))


class Compared(NamedTuple):
    """Parameters of one posterior, beside the reference."""

    names: list[str]
    shift: np.ndarray  # of means, in reference sds
    ratio: np.ndarray  # of sds
    r_hat: float
    effective: float  # least number of effective draws

    @property
    def agrees(self) -> bool:
        return bool((np.abs(self.shift) <= MEAN).all() and ((self.ratio >= LOW) & (self.ratio <= HIGH)).all())


def compared(case: Case, engine: inference.HMC, folder: Path, seed: int) -> Compared:
    recording = case.recording(read(case.data, folder))
    with random_stream(seed), numerics():
        density = LogDensity(case.program, recording)
        start = density.unconstrain({name: numbers(value) for name, value in case.start.items()})
        vectors = engine.replicate(density, start.unsqueeze(0)).squeeze(0)
        values = as_shown(density.constrain(vectors), recording)  # (chain x draw, 1, ...)
    shown = {name: value.reshape(engine.chains, engine.draws, -1).numpy() for name, value in values.items()}
    reference = read(case.name, folder)
    names, shift, ratio, draws = list(reference[0]), [], [], {}
    for name in names:
        wanted = np.array([chain[name] for chain in reference])
        base, _, place = name.rstrip("]").partition("[")
        draws[name] = (("chain", "draw"), shown[base][..., int(place or 1) - 1])
        own = draws[name][1]
        shift.append((own.mean() - wanted.mean()) / wanted.std())
        ratio.append(own.std() / wanted.std())
    dataset = xr.Dataset(draws)
    r_hat = max(float(value) for value in nested_rhat(dataset, engine.superchains).data_vars.values())
    effective = min(float(value) for value in arviz_stats.ess(dataset).data_vars.values())
    return Compared(names, np.array(shift), np.array(ratio), r_hat, effective)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=60, help="of each of 64 chains")
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[case.data for case in CASES], help="names of data")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    engine = inference.HMC(draws=chosen.draws, warmup=chosen.warmup)
    began, lines, agreeing = time.perf_counter(), [], 0
    for case in (case for case in CASES if case.data in chosen.only):
        started = time.perf_counter()
        found = compared(case, engine, FOLDER, chosen.seed)
        agreeing += found.agrees
        far = found.names[int(np.abs(found.shift).argmax())]
        lines.append(
            f"| {case.name} | {len(found.names)} | {np.abs(found.shift).max():.3f} ({far}) | {found.ratio.min():.3f} | "
            f"{found.ratio.max():.3f} | {found.r_hat:.3f} | {found.effective:.0f} | "
            f"{'yes' if found.agrees else 'no'} | {time.perf_counter() - started:.0f} |"
        )
        print(lines[-1], flush=True)
    text = f"""# Reference posteriors

`python benchmarks/posteriordb.py --draws {chosen.draws} --warmup {chosen.warmup} --seed {chosen.seed}`,
{(time.perf_counter() - began) / 60:.0f} minutes on one core.

Posteriors of posteriordb (Magnusson et al.) that have reference draws and a latent process over time, written as Pyro
programs from parts of this library and sampled by `inference.HMC`: 64 chains of {chosen.draws} draws, started about the
mode, to which they climb from the middle of the prior. Shift is the difference of means in standard deviations of the
reference (bar {MEAN}), the ratios are of standard deviations (bar {LOW} to {HIGH}), over all parameters that the
reference reports.

| posterior | parameters | largest shift | least ratio | largest ratio | nested R-hat | least ESS | agrees | s |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

{agreeing} of {len(lines)} agree; the bar is {ENOUGH} of 8.
Hidden Markov chains are summed out by `linalg.mode_log_normaliser`; flows are `integrators.FixedStep`; the smooth log
rate is `distributions.GaussianProcess`. Flat priors are proper ones of scale {FLAT:g}.
"""
    print(text)
    if len(lines) == len(CASES):
        TABLE.write_text(text)
    return 0 if agreeing >= min(ENOUGH, len(lines)) else 1


if __name__ == "__main__":
    sys.exit(main())
