"""Time value and gradient of the collapsed LDS log likelihood, against Pyro's GaussianHMM and statsmodels' filter.

Run `python benchmarks/bench_kernel.py`. One thread, float64, processor time, medians of five runs after one that is not
counted. The gradient is with respect to dynamics, process noise, loading, offset and noise sd; statsmodels gives the
value alone. The exit code is 1 where the three values disagree.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodyn.conditioning import path_evidence
from pyrodyn.distributions import GaussMarkov
from pyrodyn.readouts import AffineReadout, Gaussian, Poisson, Readout

# Trials, bins, latents, units.
SIZES = ((1, 1000, 4, 30), (100, 100, 10, 100), (100, 500, 10, 100), (1, 100_000, 4, 30))
POISSON = (50, 100, 8, 60)
RUNS = 5


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
    for _ in range(RUNS):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return value, 1e3 * float(np.median(seconds)), 1e3 * min(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the collapsed LDS log likelihood.")
    parser.add_argument("--table", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    lines = ["# The collapsed LDS log likelihood", "", f"Made by `{' '.join(['python', *sys.argv])}`.", ""]

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    say(f"Milliseconds of processor time on one 2.8 GHz core, one thread, float64: median of {RUNS} runs (least).")
    say("")
    say("| (trials, bins, latents, units) | pyrodyn, value and gradient | Pyro GaussianHMM, value and gradient | "
        "statsmodels, value | values agree to |")  # fmt: skip
    say("| --- | --- | --- | --- | --- |")
    bad = 0
    for size in SIZES:
        system = System(size, Gaussian())
        ours = timed(lambda s=system: value_and_gradient(s.pyrodyn, s.parameters))
        theirs = timed(lambda s=system: value_and_gradient(s.pyro, s.parameters))
        kalman = timed(system.statsmodels())
        apart = max(abs(other[0] / ours[0] - 1.0) for other in (theirs, kalman))
        bad += apart > 1e-8
        cells = [f"{median:,.1f} ({least:,.1f})" for _, median, least in (ours, theirs, kalman)]
        say(f"| {size} | " + " | ".join(cells) + f" | {apart:.0e} |")
    system = System(POISSON, Poisson())
    _, median, least = timed(lambda: value_and_gradient(system.pyrodyn, system.parameters))
    say("")
    say(f"Poisson readout, {POISSON}: Laplace evidence and gradient {median:,.1f} ms ({least:,.1f}).")
    if options.table is not None:
        options.table.write_text("\n".join(lines) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
