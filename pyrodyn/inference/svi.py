"""Stochastic variational inference, with Pyro's ELBO and a guide of the user's choice."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyrodyn.checkpoint import StateStore
from pyrodyn.errors import NonFiniteError
from pyrodyn.guides import FullRank, GuideFactory, LowRank, Start, Structured, draw_globals
from pyrodyn.inference.collapse import Collapsed, collapse
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.engine import (
    Draws,
    double_precision,
    random_stream,
    split_local,
    starting_values,
    treat_path,
    vector_of,
)
from pyrodyn.inference.mode import covariance_root, negative_hessian
from pyrodyn.program import Program, is_random
from pyrodyn.progress import progress
from pyrodyn.recording import Recording

FULL_RANK_LIMIT = 300  # unconstrained globals; above, a full covariance has more entries than the data can fix
CLIMB = 200  # steps of L-BFGS towards the mode, where the guide is centred at the start
SNAPSHOT = 50  # steps between the states that a failed step falls back to
MAX_FAILURES = 3  # since one of these states, each with half the step of the one before
FINAL_RATE = 0.01  # of the learning rate, at the last step of the cosine schedule


@dataclass(frozen=True)
class SVI:
    r"""Maximise the evidence lower bound :math:`E_q[\log p(y, z) - \log q(z)]` by Adam.

    Parameters
    ----------
    steps : int
    learning_rate : float
        At the start; it falls to a hundredth along a half cosine.
    particles : int
        Draws of the guide in every step, scored in one batched call.
    draws : int
        Independent draws of the fitted guide that make the posterior.
    guide : callable, optional
        One of `pyrodyn.guides`, or any function of (program, recording, initial values). By default a full-rank
        Gaussian up to 300 globals and a low-rank one above. `guides.Structured()` samples the path together with the
        globals.
    collapse : bool, optional
        None integrates the path out where it can be, unless the guide is `guides.Structured`.

    References
    ----------
    Hoffman et al., JMLR 14:1303 (2013); Kucukelbir et al., JMLR 18:14 (2017).
    """

    steps: int = 1500
    learning_rate: float = 0.02
    particles: int = 4
    draws: int = 500
    guide: GuideFactory | None = None
    collapse: bool | None = None

    def run(self, program: Program, recording: Recording, *, seed: int, checkpoint: StateStore | None = None) -> Draws:
        with random_stream(seed), double_precision(), pyro.settings.context(module_local_params=True):
            values = starting_values(program, recording, CLIMB, "SVI: start")
            if isinstance(self.guide, Structured):
                treated, treatment = program, "sampled by the structured guide"
            else:
                treated, treatment = treat_path(program, recording, self.collapse, values)
            guide = self._build(program, treated, recording, values)
            losses = _Run(self, treated, guide, recording).train(checkpoint)
            values, log_q = draw_globals(guide, recording, self.draws)
            samples = {name: value.unsqueeze(0) for name, value in values.items()}
            samples, local = split_local(treated, recording, samples)
        return Draws(
            samples,
            treatment,
            local=local,
            # Beside the globals' density with the path integrated out, that of globals and path together says nothing.
            stats={"log_q": log_q.unsqueeze(0)} if not local else {},
            history={"loss": losses},
            notes={"elbo": -float(losses[-max(1, len(losses) // 20) :].mean())},
        )

    def _build(self, program: Program, treated: Program, recording: Recording, values: dict[str, Tensor]) -> nn.Module:
        collapsible = isinstance(self.guide, Structured) or isinstance(treated, Collapsed)
        density = LogDensity(collapse(program) if collapsible else treated, recording)
        small = density.dimension <= FULL_RANK_LIMIT
        root = None
        if small and collapsible:
            hessian = negative_hessian(density, vector_of(values, density), "SVI: curvature")
            root, _ = covariance_root(hessian, 1.0)  # no wider than the priors: flat directions are learned
        factory = self.guide or (FullRank() if small else LowRank())
        guide = factory(treated, recording, Start(values, root))
        guide(recording)  # Pyro builds an autoguide's parameters at its first call
        return guide


class _Run:
    """The training loop with its state: guide, optimiser, schedule, losses, random numbers."""

    def __init__(self, options: SVI, program: Program, guide: nn.Module, recording: Recording) -> None:
        self.options, self.program, self.guide, self.recording = options, program, guide, recording
        vectorised = options.particles > 1
        elbo: Any = Trace_ELBO(num_particles=options.particles, vectorize_particles=vectorised, max_plate_nesting=1)
        self.elbo = elbo(program, guide)
        self.parameters = dict(guide.named_parameters())
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=options.learning_rate)
        self.losses = np.full(options.steps, np.nan)
        self.step, self.damping, self.failures = 0, 1.0, 0

    def train(self, checkpoint: StateStore | None) -> np.ndarray:
        held = checkpoint.read() if checkpoint else None
        snapshot = self._state()
        if held is not None:
            self._restore(_part(held, "now/"))
            snapshot = _part(held, "good/")
        with warnings.catch_warnings(), progress(self.options.steps, "SVI", self.step) as bar:
            warnings.filterwarnings("ignore", "Encountered NaN", UserWarning)  # Pyro's; such a step is taken back
            while self.step < self.options.steps:
                if self.step >= int(snapshot["step"][0]) + SNAPSHOT:
                    self.failures = 0
                    snapshot = self._state()
                if not self._advance():
                    self._fall_back(snapshot)
                    continue
                bar.update()
                if self.step % 20 == 0:
                    bar.set_postfix_str(f"loss {self.losses[self.step - 1]:.1f}", refresh=False)
                if checkpoint and checkpoint.due():
                    # With the state that a failed step returns to: a resumed run has to return to the same one.
                    both = {"now/": self._state(), "good/": snapshot}
                    checkpoint.write({place + key: v for place, state in both.items() for key, v in state.items()})
        return self.losses

    def _advance(self) -> bool:
        """One step of Adam; False, and nothing changed but the random state, where loss or gradient is not finite."""
        share = 0.5 * (1.0 + math.cos(math.pi * self.step / self.options.steps))
        rate = self.options.learning_rate * (FINAL_RATE + (1.0 - FINAL_RATE) * share) * self.damping
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.zero_grad()
        loss = self.elbo(self.recording)
        if not bool(torch.isfinite(loss)):
            return False
        loss.backward()
        if not all(bool(torch.isfinite(p.grad).all()) for p in self.parameters.values() if p.grad is not None):
            return False
        self.optimiser.step()
        self.losses[self.step] = float(loss.detach())
        self.step += 1
        return True

    def _fall_back(self, snapshot: dict[str, np.ndarray]) -> None:
        """Return to the last good state with half the step; the random numbers go on, so that the next try differs."""
        self.failures += 1
        if self.failures > MAX_FAILURES:
            raise NonFiniteError(
                f"SVI: the loss or its gradient was not finite at step {self.step}, for the {self.failures}th time "
                f"since step {int(snapshot['step'][0])}, at site {self._culprit()!r}; lower "
                f"learning_rate={self.options.learning_rate}, or look at that site's prior"
            )
        failures, damping, random_state = self.failures, 0.5 * self.damping, torch.get_rng_state()
        self._restore(snapshot)
        self.failures, self.damping = failures, damping
        torch.set_rng_state(random_state)

    def _culprit(self) -> str:
        """The first site of guide or program that is not finite."""
        with torch.no_grad():
            guided = poutine.trace(self.guide).get_trace(self.recording)
            traced = poutine.trace(poutine.replay(self.program, guided)).get_trace(self.recording)
            for trace in (guided, traced):
                trace.compute_log_prob()
                nodes: Any = trace.nodes
                for name, site in nodes.items():
                    if is_random(site) and not (
                        bool(torch.isfinite(site["value"]).all()) and bool(torch.isfinite(site["log_prob"]).all())
                    ):
                        return name
        return "unknown (finite when drawn again)"

    def _state(self) -> dict[str, np.ndarray]:
        state = {
            "step": np.array([self.step, self.failures]),
            "damping": np.array(self.damping),
            "losses": self.losses.copy(),
            "random": torch.get_rng_state().numpy().copy(),
        }
        for name, parameter in self.parameters.items():
            state[f"guide/{name}"] = parameter.detach().numpy().copy()
            for key, value in self.optimiser.state.get(parameter, {}).items():
                state[f"adam/{key}/{name}"] = value.numpy().copy()
        return state

    def _restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.step, self.failures = (int(v) for v in state["step"])
        self.damping = float(state["damping"])
        self.losses[:] = state["losses"]
        torch.set_rng_state(torch.from_numpy(np.array(state["random"])))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(state[f"guide/{name}"]))
                keys = [key for key in state if key.startswith("adam/") and key.split("/", 2)[2] == name]
                self.optimiser.state[parameter] = {
                    key.split("/")[1]: torch.from_numpy(np.array(state[key])) for key in keys
                }


def _part(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
