"""Time value and gradient of log likelihoods with paths or modes summed out, beside those of the peers.

Run `make bench`, or `python benchmarks/bench_kernel.py`. One core, one thread, processor time; medians of three turns,
ours and dynamax's by turns, of three runs or more after warm-up; compile time apart. Ours is float64, the peers run in
their default: dynamax in float32, in the environment of the Python that the variable PYRODYN_PEERS names (without it
that column is empty). The gradient is with respect to all parameters; statsmodels gives the value alone. The exit code
is 1 where values disagree.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from pyrodyn.conditioning import path_evidence
from pyrodyn.distributions import GaussMarkov
from pyrodyn.linalg import mode_log_normaliser
from pyrodyn.readouts import AffineReadout, Gaussian, Poisson, Readout

# Trials, bins, latents, units.
MILLION, PIECE = (1, 1_000_000, 4, 10), 5000  # bins of the piece that is filtered in longer floats
SIZES = ((1, 1000, 4, 30), (100, 100, 10, 100), (100, 500, 10, 100), (1, 100_000, 4, 30), (20, 1000, 40, 200))
POISSON = (50, 100, 8, 60)
RUNS, SECONDS, TURNS = 3, 0.3, 3  # as many runs a turn as fill the seconds, and no fewer than that


class System:
    """Parameters that want a gradient, and observations."""

    def __init__(self, size: tuple[int, int, int, int], law: Readout) -> None:
        trials, self.bins, dim, units = size
        torch.manual_seed(0)
        turn = torch.linalg.qr(torch.randn(dim, dim))[0]
        self.law, self.dim = law, dim
        self.dynamics = 0.97 * turn
        self.process_noise = (1.0 - 0.97**2) * torch.eye(dim)
        self.loading = torch.randn(units, dim) / math.sqrt(dim)
        self.offset = torch.zeros(units) if law.is_gaussian else torch.full((units,), -2.0)
        self.noise_sd = torch.full((units,), 0.7)
        with torch.no_grad():
            prior = self.prior()
            path = prior.expand((trials,)).sample()
            noise = self.noise_sd[None] if law.is_gaussian else None
            self.values = AffineReadout(law, path, self.loading[None], self.offset[None], noise).sample()
        self.parameters = [self.dynamics, self.process_noise, self.loading, self.offset]
        if law.is_gaussian:
            self.parameters.append(self.noise_sd)
        for parameter in self.parameters:
            parameter.requires_grad_()

    def prior(self) -> GaussMarkov:
        initial = torch.eye(self.dim)[None]
        return GaussMarkov.from_dynamics(
            self.dynamics[None], self.process_noise[None], num_bins=self.bins, initial_covariance=initial
        )

    def pyrodyn(self) -> Tensor:
        zeros = torch.zeros(len(self.values), self.bins, self.dim)
        noise = self.noise_sd[None] if self.law.is_gaussian else None
        readout = AffineReadout(self.law, zeros, self.loading[None], self.offset[None], noise)
        return path_evidence(self.prior(), readout, self.values).sum()

    def pyro(self) -> Tensor:
        # Pyro's chain has a step before the first observation; started so that the first latent is N(0, I).
        back = torch.linalg.inv(self.dynamics)
        start = back @ (torch.eye(self.dim) - self.process_noise) @ back.mT
        law = dist.GaussianHMM(
            dist.MultivariateNormal(torch.zeros(self.dim), 0.5 * (start + start.mT)),
            self.dynamics.mT,
            dist.MultivariateNormal(torch.zeros(self.dim), self.process_noise),
            self.loading.mT,
            dist.Normal(self.offset, self.noise_sd).to_event(1),
            duration=self.bins,
        )
        return law.log_prob(self.values).sum()

    def statsmodels(self) -> Callable[[], float]:
        """Their log likelihood; a filter for every trial, built beforehand, since one filter keeps its first data."""
        from statsmodels.tsa.statespace.kalman_filter import KalmanFilter

        dynamics, process_noise, loading, offset, noise_sd = (p.detach().numpy() for p in self.parameters)
        filters = []
        for trial in self.values.numpy():
            model = KalmanFilter(k_endog=len(loading), k_states=self.dim)
            model["design"], model["transition"], model["selection"] = loading, dynamics, np.eye(self.dim)
            model["state_cov"], model["obs_cov"] = process_noise, np.diag(noise_sd**2)
            model["obs_intercept"] = offset[:, None]
            model.filter_collapsed = True  # units become as many sufficient statistics as there are latents
            model.set_conserve_memory(model.memory_conserve)
            model.initialize_known(np.zeros(self.dim), np.eye(self.dim))
            model.bind(np.ascontiguousarray(trial))
            filters.append(model)
        return lambda: float(sum(model.loglike() for model in filters))


def value_and_gradient(score: Callable[[], Tensor], parameters: list[Tensor]) -> float:
    value = score()
    torch.autograd.grad(value, parameters)
    return float(value.detach())


def timed(call: Callable[[], float]) -> tuple[float, float, float]:
    """The value, and median and least processor time of a call, in milliseconds: wall time on a core that is free."""
    value, seconds = call(), []
    while len(seconds) < RUNS or sum(seconds) < SECONDS:
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return value, 1e3 * float(np.median(seconds)), 1e3 * min(seconds)


def dynamax(case: str, **inputs: Tensor) -> dict[str, float] | None:
    """The same on JAX, in the environment of the peers; None where there is none."""
    python = os.environ.get("PYRODYN_PEERS")
    if not python:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.npz"
        np.savez(file, **{name: value.detach().numpy() for name, value in inputs.items()})
        script = Path(__file__).with_name("peers_jax.py")
        run = subprocess.run([python, str(script), case, str(file)], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def beside(call: Callable[[], float], case: str, **inputs: Tensor) -> tuple[float, float, dict[str, float] | None]:
    """The value and milliseconds of ours, and what `dynamax` gives: medians of turns, since the core has its moods."""
    turns = [(timed(call), dynamax(case, **inputs)) for _ in range(TURNS)]
    theirs = [found for _, found in turns if found is not None]
    ours = float(np.median([found[1] for found, _ in turns]))
    if not theirs:
        return turns[0][0][0], ours, None
    return turns[0][0][0], ours, {name: float(np.median([found[name] for found in theirs])) for name in theirs[0]}


def floor() -> str:
    """What this core can do: products of matrices and traffic with memory, in float64."""
    matrix, long = torch.randn(1000, 1000), torch.randn(20_000_000)
    _, product, _ = timed(lambda: float((matrix @ matrix)[0, 0]))
    _, copy, _ = timed(lambda: float(long.clone()[0]))
    return f"This core: {2e3 / product:.1f} GFLOP/s in matrix products, {0.32e3 / copy:.1f} GB/s in copies."


def modes(count: int) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Potentials of 100 hidden Markov chains of 500 bins, and their log likelihood."""
    torch.manual_seed(0)
    potentials = [torch.randn(count), torch.randn(count, count), torch.randn(100, 500, count)]
    for part in potentials:
        part.requires_grad_()
    initial, transition, likelihood = potentials

    def score() -> Tensor:
        steps = torch.log_softmax(transition, -1)
        return mode_log_normaliser(torch.log_softmax(initial, -1), steps[None], likelihood).sum()

    return potentials, score


def longer(system: System, bins: int) -> float:
    """Log likelihood of the first bins of the first trial by a Kalman filter in 80-bit floats, unit after unit."""
    dynamics, process_noise, loading, offset, noise_sd = (p.detach().numpy().astype(np.longdouble) for p in
                                                          system.parameters)  # fmt: skip
    mean, spread = np.zeros(system.dim, np.longdouble), np.eye(system.dim, dtype=np.longdouble)
    total = np.longdouble(0.0)
    for t, seen in enumerate(system.values[0, :bins].numpy().astype(np.longdouble)):
        if t:
            mean, spread = dynamics @ mean, dynamics @ spread @ dynamics.T + process_noise
        for row, value, base, sd in zip(loading, seen, offset, noise_sd, strict=True):
            gain, apart = spread @ row, value - base - row @ mean
            variance = row @ gain + sd**2
            total -= 0.5 * (np.log(2.0 * np.longdouble(np.pi) * variance) + apart**2 / variance)
            mean, spread = mean + gain * (apart / variance), spread - np.outer(gain, gain) / variance
    return float(total)


def million() -> dict[str, float]:
    """Seconds and peak memory of a million bins, and how far a piece is from longer floats, in nats."""
    system = System(MILLION, Gaussian())
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was the simulation's
    _, median, _ = timed(lambda: value_and_gradient(system.pyrodyn, system.parameters))
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    system.values, system.bins = system.values[:, :PIECE].clone(), PIECE
    error = abs(longer(system, PIECE) - float(system.pyrodyn().detach()))
    return {"s": 1e-3 * median, "gb": int(peak.split()[1]) / 2**20, "error": error}


def grown(base: tuple[int, int, int, int], axis: int, values: tuple[int, ...]) -> list[float]:
    """Milliseconds as one of trials, bins, latents, units grows."""
    found = []
    for value in values:
        size = (*base[:axis], value, *base[axis + 1 :])
        system = System(size, Gaussian())
        found.append(timed(lambda s=system: value_and_gradient(s.pyrodyn, s.parameters))[1])
    return found


def picture(path: Path) -> None:
    """How cost grows with the size of the recording and of the model."""
    from matplotlib.figure import Figure

    base = (20, 200, 6, 50)
    ranges = {
        "trials": (5, 20, 80, 320),
        "bins": (100, 1000, 10_000, 100_000),
        "latents": (2, 4, 8, 16, 32),
        "units": (25, 50, 100, 200, 400),
    }
    figure = Figure(figsize=(9.0, 2.4), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for axis, (panel, (name, values)) in enumerate(zip(panels, ranges.items(), strict=True)):
        panel.loglog(values, grown(base, axis, values), "o-", color="#0072B2", linewidth=1.4, markersize=4)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("value and gradient (ms)")
    figure.suptitle("{} trials, {} bins, {} latents, {} units, one of them varied".format(*base), fontsize=9)
    figure.savefig(path, dpi=120)


def cell(found: dict[str, float] | None, ours: float) -> list[str]:
    return ["-", "-"] if found is None else [f"{found['ms']:,.1f} (compiles {found['compile_s']:.0f} s)",
                                              f"{found['ms'] / ours:,.1f}x"]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Time log likelihoods and their gradients.")
    parser.add_argument("--table", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--million", action="store_true", help="nothing but a million bins, as JSON")
    parser.add_argument("--picture", type=Path, help="draw how cost grows into this file")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    threadpool_limits(1)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    if options.million:
        print(json.dumps(million()))
        return 0
    lines = ["# Log likelihoods and gradients", "", f"Made by `{' '.join(['python', *sys.argv])}`.", ""]

    def say(text: str = "") -> None:
        print(text, flush=True)
        lines.append(text)

    def row(cells: list[str]) -> None:
        say("| " + " | ".join(cells) + " |")

    say(f"Milliseconds of processor time on one core, median of {TURNS} turns of {RUNS} runs or more.")
    say(f"Ours is float64. {floor()}")
    say()
    say("## Linear-Gaussian model, value and gradient")
    say()
    row(["trials, bins, latents, units", "pyrodyn", "dynamax, float32", "ratio", "Pyro GaussianHMM", "ratio",
         "statsmodels, value alone", "ratio", "values agree to"])  # fmt: skip
    row(["---"] * 9)
    bad = 0
    for size in SIZES:
        system = System(size, Gaussian())
        names = ("dynamics", "process_noise", "loading", "offset", "noise_sd")
        inputs = {"values": system.values, **dict(zip(names, system.parameters, strict=True))}
        value, ours, jax = beside(lambda s=system: value_and_gradient(s.pyrodyn, s.parameters), "gaussian", **inputs)
        others = []
        if size[2] < 40:  # minutes, and many gigabytes
            others.append(timed(lambda s=system: value_and_gradient(s.pyro, s.parameters)))
            others.append(timed(system.statsmodels()))
        apart = max((abs(other[0] / value - 1.0) for other in others), default=0.0)
        bad += apart > 1e-8 or (jax is not None and abs(jax["value"] / value - 1.0) > 1e-2)
        cells = [text for _, median, _ in others for text in (f"{median:,.1f}", f"{median / ours:,.1f}x")]
        row([", ".join(map(str, size)), f"{ours:,.1f}", *cell(jax, ours), *(cells or ["-"] * 4), f"{apart:.0e}"])
    # In a process of its own, whose memory is counted.
    run = subprocess.run([sys.executable, __file__, "--million"], capture_output=True, text=True, check=True)
    long = json.loads(run.stdout.splitlines()[-1])
    bad += long["error"] > 1e-4
    say()
    say(
        f"A million bins, {MILLION[2]} latents, {MILLION[3]} units: {long['s']:.2f} s, the process never above "
        f"{long['gb']:.2f} GB meanwhile; {PIECE} of the bins are {long['error']:.0e} nats from a Kalman filter in "
        "80-bit floats."
    )
    say()
    say("## Hidden Markov model, 100 trials x 500 bins, value and gradient")
    say()
    row(["modes", "pyrodyn", "dynamax, float32", "ratio"])
    row(["---"] * 4)
    for count in (10, 50):
        potentials, score = modes(count)
        inputs = dict(zip(("initial", "transition", "likelihood"), potentials, strict=True))
        value, ours, jax = beside(lambda s=score, p=potentials: value_and_gradient(s, p), "modes", **inputs)
        bad += jax is not None and abs(jax["value"] / value - 1.0) > 1e-3
        row([str(count), f"{ours:,.1f}", *cell(jax, ours)])
    say()
    say("## Poisson LDS, path integrated out: ours by Laplace, dynamax by an extended Kalman filter")
    say()
    row(["trials, bins, latents, units", "pyrodyn", "dynamax, float32", "ratio"])
    row(["---"] * 4)
    system = System(POISSON, Poisson())
    names = ("dynamics", "process_noise", "loading", "offset")
    inputs = {"values": system.values, **dict(zip(names, system.parameters, strict=True))}
    _, ours, jax = beside(lambda: value_and_gradient(system.pyrodyn, system.parameters), "poisson", **inputs)
    row([", ".join(map(str, POISSON)), f"{ours:,.1f}", *cell(jax, ours)])
    if options.picture is not None:
        picture(options.picture)
    if options.table is not None:
        options.table.write_text("\n".join(lines) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
