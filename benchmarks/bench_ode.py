"""Time of a neural ODE's value and gradient: the fused Runge-Kutta scheme against torchdiffeq.

Run `python benchmarks/bench_ode.py --table docs/tables/ode_speed.md`. A network with one hidden layer, 64 states of ten
dimensions at 100 times; one core, median processor time of some runs; errors are against tolerances of 1e-10.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchdiffeq
from torch import Tensor

from pyrodyn.integrators import Adaptive, FixedStep, Network

BATCH, DIM, HIDDEN, TIMES, SPAN = 64, 10, 64, 100, 2.0
RUNS = 15


def network(dtype: torch.dtype) -> Network:
    """A field whose paths neither die nor run off."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, sd: float) -> Tensor:
        drawn = sd * torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()

    return Network(
        normal(DIM, DIM, sd=0.3),
        normal(DIM, sd=0.3),
        normal(HIDDEN, DIM, sd=DIM**-0.5),
        normal(HIDDEN, sd=1.0),
        normal(HIDDEN, DIM, sd=1.5 * HIDDEN**-0.5),
    )


def timed(solve: Callable[[Network, Tensor, Tensor], Tensor], dtype: torch.dtype) -> tuple[float, Tensor]:
    """Median seconds of value and gradient, and the paths."""
    field = network(dtype)
    initial = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    initial.requires_grad_()
    times = torch.linspace(0.0, SPAN, TIMES, dtype=torch.float64).to(dtype)
    seconds = []
    for _ in range(RUNS):
        began = time.process_time()
        path = solve(field, initial, times)
        torch.autograd.grad(path.square().mean(), (initial, *field))
        seconds.append(time.process_time() - began)
    return statistics.median(seconds), path.detach().double()


def commonly(field: Network, initial: Tensor, times: Tensor) -> Tensor:
    """As torchdiffeq is commonly called: its default method and tolerances."""
    return torchdiffeq.odeint(lambda _, x: field(x), initial, times, method="dopri5").movedim(0, -2)  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    _, exact = timed(lambda f, x, t: Adaptive(rtol=1e-10, atol=1e-10).solve(f, x, t, 0.02), torch.float64)
    width = SPAN / (TIMES - 1)
    rows = {
        "torchdiffeq dopri5, defaults": (commonly, torch.float32),
        "torchdiffeq dopri5, 1e-4": (
            lambda f, x, t: Adaptive(rtol=1e-4, atol=1e-4).solve(f, x, t, width),
            torch.float32,
        ),
        **{
            f"fused, a step each {bins} bins, {str(dtype).removeprefix('torch.')}": (
                lambda f, x, t, bins=bins: FixedStep(bins).solve(f, x, t, width),
                dtype,
            )
            for bins, dtype in ((1, torch.float32), (4, torch.float32), (8, torch.float32), (4, torch.float64))
        },
    }
    lines = ["| solver | ms | faster than the first | largest error |", "| --- | --- | --- | --- |"]
    first = None
    for name, (solve, dtype) in rows.items():
        seconds, path = timed(solve, dtype)
        first = first or seconds
        error = float((path - exact).abs().max())
        lines.append(f"| {name} | {1e3 * seconds:.2f} | {first / seconds:.1f}x | {error:.1e} |")
        print(lines[-1], flush=True)
    if options.table:
        options.table.write_text(
            "# Value and gradient of a neural ODE\n\nMade by `python benchmarks/bench_ode.py --table "
            f"docs/tables/ode_speed.md`.\n\nOne core, median processor time of {RUNS} runs; {BATCH} states of {DIM} "
            f"dimensions at {TIMES} times, {HIDDEN} hidden units. Errors are of states of size one, against "
            "tolerances of 1e-10.\n\n" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
