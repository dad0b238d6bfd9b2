"""Stochastic gradient Langevin dynamics: draws of weights from gradients of some trials at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrodyn.checkpoint import StateStore
from pyrodyn.errors import ModelError, NonFiniteError
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.engine import (
    Draws,
    numerics,
    random_stream,
    split_local,
    starting_values,
    stream_seed,
    treat_path,
    vector_of,
)
from pyrodyn.inference.training import Portion, Training
from pyrodyn.program import Program, log_terms
from pyrodyn.progress import progress
from pyrodyn.recording import Recording

CLIMB = 200  # steps of L-BFGS towards the mode, where the path is integrated out
RATE, FINAL_RATE = 0.02, 0.002  # of Adam, which climbs in the first third of the warm-up
AVERAGE, SQUARES = 0.9, 0.98  # what Adam and the preconditioner keep of gradients and of their squares a step
PROBES, NEAR = 10, 1e-4  # of the first curvature: random steps, and their size
LEAST_CURVATURE = 1.0  # of any direction: no wider than its prior


@dataclass(frozen=True)
class SGLD:
    r"""Preconditioned stochastic gradient Langevin dynamics, all chains in one batched call.

    .. math::
        z \leftarrow z + \tfrac{\epsilon}{2}\, G\, \hat\nabla \log p(z, y) + (\epsilon\, G)^{1/2} \xi, \qquad
        \xi \sim N(0, I),

    with the gradient of all trials estimated from a batch of them. A third of the warm-up climbs by Adam, without
    noise; in the rest the diagonal G is learned and then held: the inverse of the mean squared gradient, which under a
    posterior is the curvature.

    No step is refused, so that draws are approximate: where a coordinate is independent of the others its variance is
    too large by a factor of :math:`1 + \epsilon / 4`, and more the more gradients vary between batches. The posterior's
    notes say so. `HMC` is exact, for as long as all trials can be seen at every step.

    Parameters
    ----------
    draws, thin : int
        Draws of each chain, and steps between two of them.
    warmup : int
        Steps before the first.
    chains : int
    batch : int, optional
        Trials in a step; None takes all. What is latent in a trial moves only with its batch.
    step_size : float
        :math:`\epsilon`; steps of about :math:`2 / \epsilon` are needed to forget.
    collapse : bool, optional
        None integrates the path out where it can be; False samples it, in whitened coordinates.

    References
    ----------
    Welling & Teh, ICML 2011; Li, Chen, Carlson & Carin, AAAI 2016 (preconditioning).
    """

    draws: int = 250
    thin: int = 20
    warmup: int = 2000
    chains: int = 4
    batch: int | None = None
    step_size: float = 0.05
    collapse: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("draws", 1), ("thin", 1), ("warmup", 3), ("chains", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ModelError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not 0.0 < self.step_size <= 1.0:
            raise ModelError(f"step_size must be above 0 and at most 1, got {self.step_size!r}")

    def run(self, program: Program, recording: Recording, *, seed: int, checkpoint: StateStore | None = None) -> Draws:
        with random_stream(seed), numerics():
            values = starting_values(program, recording, CLIMB, "SGLD: start")
            treated, treatment = treat_path(program, recording, self.collapse, values)
            if self.batch is not None and getattr(treated, "point", None) is not None:
                raise ModelError(
                    "batch needs a path that is integrated out or whitened by its prior, and this one is whitened at a "
                    "path of all trials; leave batch at None"
                )
            density = LogDensity(treated, recording)
            run = _Run(self, density, vector_of(values, density), seed)
            run.go(checkpoint)
            values = density.constrain(run.vectors.flatten(0, 1))
            lead = run.vectors.shape[:2]
            samples = {site.name: values[site.name].reshape(*lead, *site.shape) for site in density.sites}
            samples, local = split_local(treated, recording, samples)
        return Draws(
            samples,
            treatment,
            local=local,
            notes={
                "globals": "draws of stochastic gradient Langevin dynamics, without a correction of its steps",
                "step_size": self.step_size,
                "refused_steps": run.refused,
            },
        )


class _Estimate(NamedTuple):
    """The log density of every chain (chain) and its gradient (chain, dimension), estimated from a batch."""

    value: Tensor
    gradient: Tensor
    moving: Tensor  # (dimension): which coordinates the batch knows anything of


class _Run:
    """The chains, their preconditioner, and what a checkpoint needs."""

    def __init__(self, options: SGLD, density: LogDensity, start: Tensor, seed: int) -> None:
        self.options, self.density = options, density
        training = Training(batch=options.batch)
        self.portion = Portion(training, density.recording, lambda stream: stream_seed(seed, stream))
        self.position = start + 0.01 * torch.randn(options.chains, len(start))
        self.mean, self.square = torch.zeros_like(self.position), torch.zeros_like(self.position)
        self.curvature, self.counted = torch.zeros_like(start), torch.zeros_like(start)
        self.step, self.refused = 0, 0
        self.vectors = self.position.new_zeros(options.chains, options.draws, len(start))

    def go(self, store: StateStore | None) -> None:
        """Run to the end, from where a checkpoint left off."""
        options = self.options
        held = store.read() if store else None
        if held is not None:
            self._restore(held)
        total = options.warmup + options.draws * options.thin
        climb = options.warmup // 3
        with progress(total, "SGLD", self.step) as bar:
            while self.step < total:
                found = self._estimate()
                if self.step < climb:
                    self._ascend(found, climb)
                else:
                    self._diffuse(found, climb)
                self.step += 1
                past = self.step - options.warmup
                if past > 0 and past % options.thin == 0:
                    self.vectors[:, past // options.thin - 1] = self.position
                bar.update()
                if store and (store.due() or self.step == total):
                    store.write(self._state())

    def _estimate(self) -> _Estimate:
        trials = self.portion.positions_at(self.step)
        whole = len(trials) == self.portion.total
        recording = self.density.recording if whole else self.density.recording.batch(trials)
        share = self.portion.total / len(trials)
        vector = self.position.detach().requires_grad_()
        moving = torch.ones(vector.shape[-1], dtype=torch.bool)
        values, jacobian, scale = {}, vector.new_zeros(len(vector)), vector.new_ones(vector.shape[-1])
        for site in self.density.sites:
            lead = (len(vector),) if site.local else (len(vector), 1)
            raw = vector[:, site.place].reshape(*lead, *site.unconstrained)
            if site.local and not whole:
                raw = raw[:, torch.from_numpy(trials)]
                known = torch.zeros(self.portion.total, dtype=torch.bool)
                known[trials] = True
                moving[site.place] = known.repeat_interleave(site.unconstrained[1:].numel())
            if site.local:
                scale[site.place] = 1.0 / share  # a trial's own terms are not scaled up for what is its own
            value: Any = site.transform(raw)
            term = site.transform.log_abs_det_jacobian(raw, value).reshape(len(vector), -1).sum(-1)
            jacobian = jacobian + (share * term if site.local else term)
            values[site.name] = value
        shared, of_trials = log_terms(self.density.program, values, recording)
        total = shared + share * of_trials.sum(-1) + jacobian
        (gradient,) = torch.autograd.grad(total.sum(), vector)
        return _Estimate(total.detach(), gradient * scale, moving)

    def _ascend(self, found: _Estimate, steps: int) -> None:
        """A step of Adam."""
        good = self._good(found)
        rate = RATE + (FINAL_RATE - RATE) * self.step / steps
        slope = torch.where(good, found.gradient, 0.0)
        self.mean = AVERAGE * self.mean + (1.0 - AVERAGE) * slope
        self.square = SQUARES * self.square + (1.0 - SQUARES) * slope.square()
        mean = self.mean / (1.0 - AVERAGE ** (self.step + 1))
        square = self.square / (1.0 - SQUARES ** (self.step + 1))
        self.position = self.position + torch.where(good, rate * mean / (square.sqrt() + 1e-8), 0.0)

    def _diffuse(self, found: _Estimate, climb: int) -> None:
        """A step with noise; the preconditioner follows the gradients of the last steps, and is held after them."""
        good = self._good(found)
        if self.step == climb:
            self.square = self._first_curvature(found)
        if self.step < self.options.warmup:
            seen = torch.where(good, found.gradient.square(), self.square)
            self.square = SQUARES * self.square + (1.0 - SQUARES) * seen
            curvature = self.square.mean(0)
            if self.step - climb >= (self.options.warmup - climb) // 2:
                moved = good.to(seen.dtype)
                self.curvature = self.curvature + (moved * seen).sum(0)
                self.counted = self.counted + moved.sum(0)
        else:
            curvature = self.curvature / self.counted.clamp(min=1.0)
        size = self.options.step_size / curvature.clamp(min=LEAST_CURVATURE)
        noise = torch.randn_like(self.position)
        self.position = self.position + torch.where(good, 0.5 * size * found.gradient + size.sqrt() * noise, 0.0)

    def _first_curvature(self, found: _Estimate) -> Tensor:
        """The norms of the Hessian's rows, (chain, dimension): at the top of a climb gradients say nothing of it."""
        place, total = self.position, torch.zeros_like(self.position)
        for _ in range(PROBES):
            self.position = place + NEAR * torch.randn_like(place)
            total = total + ((self._estimate().gradient - found.gradient) / NEAR).square() / PROBES
        self.position = place
        rows = total.mean(0).sqrt()
        curvature = torch.where(found.moving & torch.isfinite(rows), rows, LEAST_CURVATURE)
        return curvature.clamp(min=LEAST_CURVATURE).expand_as(place)

    def _good(self, found: _Estimate) -> Tensor:
        """Which coordinates of which chains may move, (chain, dimension)."""
        fine = torch.isfinite(found.value) & torch.isfinite(found.gradient).all(-1)
        self.refused += int((~fine).sum())
        if not bool(fine.any()):
            raise NonFiniteError(
                f"SGLD: the log density is not finite in any chain at step {self.step}, at site "
                f"{self.density.culprit(self.position[0])!r}; lower step_size={self.options.step_size}, or look at "
                "that site's prior"
            )
        return fine.unsqueeze(-1) & found.moving

    def _state(self) -> dict[str, np.ndarray]:
        names = ("position", "mean", "square", "curvature", "counted", "vectors")
        state = {name: getattr(self, name).numpy().copy() for name in names}
        return state | {
            "step": np.array([self.step, self.refused]),
            "random": torch.get_rng_state().numpy().copy(),
        }

    def _restore(self, held: Any) -> None:
        for name in ("position", "mean", "square", "curvature", "counted", "vectors"):
            setattr(self, name, torch.from_numpy(np.array(held[name])))
        self.step, self.refused = (int(value) for value in held["step"])
        torch.set_rng_state(torch.from_numpy(np.array(held["random"])))
