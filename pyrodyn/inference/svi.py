"""Stochastic variational inference, with Pyro's ELBO and a guide of the user's choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
from torch import Tensor, nn

from pyrodyn.checkpoint import StateStore
from pyrodyn.guides import (
    Amortised,
    AmortisedGuide,
    FullRank,
    GuideFactory,
    LastLayerGuide,
    LowRank,
    PointEstimate,
    Start,
    StructuredGuide,
    draw_globals,
    draw_trials,
    recognised,
)
from pyrodyn.inference.collapse import Collapsed, collapse, collapses
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.engine import (
    Draws,
    numerics,
    random_stream,
    split_local,
    starting_values,
    treat_path,
    vector_of,
)
from pyrodyn.inference.loop import MAX_FAILURES as MAX_FAILURES
from pyrodyn.inference.loop import Run as _Run
from pyrodyn.inference.mode import covariance_root, negative_hessian
from pyrodyn.inference.training import Cosine, EarlyStopping, Training
from pyrodyn.program import Program
from pyrodyn.recording import Recording

FULL_RANK_LIMIT = 300  # unconstrained globals; above, a full covariance has more entries than the data can fix
CLIMB = 200  # steps of L-BFGS towards the mode, where the guide is centred at the start
RATE, NETWORK_RATE = 0.02, 0.005  # of learning, for a Gaussian over globals and for networks
LOCAL_DRAWS = 100  # draws of what is latent in trials that are kept, where a network draws it
LARGEST_GLOBALS = 20_000_000  # numbers in all draws of the globals: 160 MB
SMALL_BATCH, FEW_TRIALS = 64, 20  # trials in a step of a network's training; trials of which none are held out


@dataclass(frozen=True)
class SVI:
    r"""Maximise the evidence lower bound :math:`E_q[\log p(y, z) - \log q(z)]` by Adam.

    Parameters
    ----------
    steps : int
        At most; `Training.stopping` may end it earlier.
    learning_rate : float, optional
        At the start; it falls to a hundredth along a half cosine, or as `Training.schedule` says. By default .02, and
        .005 with an amortised guide.
    particles : int
        Draws of the guide in every step, scored in one batched call.
    draws : int
        Independent draws of the fitted guide that make the posterior; one where the globals are a point estimate, and
        fewer than asked for where there are so many globals that they would fill the memory.
    guide : callable, optional
        One of `pyrodyn.guides`, or any function of (program, recording, initial values). By default a recognition
        network where what is latent in trials cannot be integrated out and there is such a network for it; otherwise a
        full-rank Gaussian up to 300 globals and a low-rank one above, which starts as narrow as the model says
        (``guide_scale``). `guides.Structured()` samples the path together
        with the globals.
    collapse : bool, optional
        None integrates the path out where it can be, unless the guide samples it.
    training : Training, optional
        Batches of trials, clipping, schedules, dropout, early stopping. By default all trials in every step and nothing
        else; with an amortised guide what suits networks and the number of trials (`network_training`).

    References
    ----------
    Hoffman et al., JMLR 14:1303 (2013); Kucukelbir et al., JMLR 18:14 (2017).
    """

    steps: int = 1500
    learning_rate: float | None = None
    particles: int = 4
    draws: int = 500
    guide: GuideFactory | None = None
    collapse: bool | None = None
    training: Training | None = None

    def run(self, program: Program, recording: Recording, *, seed: int, checkpoint: StateStore | None = None) -> Draws:
        with random_stream(seed), numerics(), pyro.settings.context(module_local_params=True):
            values = starting_values(program, recording, CLIMB, "SVI: start")
            factory: Any = self.guide
            if self._amortises(program, recording):
                factory = Amortised()
            treatment = getattr(factory, "treatment", None)
            treated = program
            if treatment is None:
                treated, treatment = treat_path(program, recording, self.collapse, values)
            guide, factory = self._build(factory, program, treated, recording, values)
            amortised = isinstance(guide, AmortisedGuide)
            training = self.training or (network_training(program, recording, self.steps) if amortised else Training())
            run = _Run(
                treated,
                guide,
                recording,
                training,
                steps=self.steps,
                rate=self.learning_rate or (NETWORK_RATE if amortised else RATE),
                particles=self.particles,
                seed=seed,
            )
            run.train(checkpoint)
            if amortised and isinstance(guide.globals, LastLayerGuide):
                values, _ = draw_globals(guide, recording, 1)
                local = draw_trials(guide, values, recording, factory.weights.samples)
                guide.globals.settle(program, recording, local)
            samples, log_q, local, kept = self._draw(guide, factory, treated, recording)
        losses = run.losses[: run.step]
        notes = {
            "elbo": -float(losses[-max(1, len(losses) // 20) :].mean()),
            "globals": getattr(factory, "posterior_of_globals", "a guide of the user's own"),
        }
        if run.portion.held_out is not None:
            notes |= {
                "held_out_trials": recording.trial[run.portion.positions].tolist(),
                "held_out_bound": run.best_bound,
            }
        if training.dropout:
            notes["elbo_is_of"] = f"entries hidden by coordinated dropout, a share of {training.dropout:g}"
        return Draws(
            samples,
            treatment,
            local=local,
            kept=kept,
            # Beside the globals' density with the path integrated out, that of globals and path together says nothing.
            stats={"log_q": log_q.unsqueeze(0)} if not local else {},
            history=run.history,
            notes=notes,
        )

    def _amortises(self, program: Program, recording: Recording) -> bool:
        """Whether a recognition network is the guide because the user asked for nothing else."""
        asked = self.guide is not None or self.collapse is not None
        if hasattr(program, "guide_scale"):  # trial by trial is better, unless trials have to be seen apart
            asked = asked or self.training is None or not self.training.by_trial
        return not asked and not collapses(program, recording) and recognised(program, recording)

    def _build(
        self, factory: Any, program: Program, treated: Program, recording: Recording, values: dict[str, Tensor]
    ) -> tuple[nn.Module, GuideFactory]:
        collapsible = isinstance(treated, Collapsed) or (treated is program and collapses(program, recording))
        density = LogDensity(collapse(program) if collapsible else treated, recording)
        small = density.dimension <= FULL_RANK_LIMIT
        root = None
        if small and collapsible:
            hessian = negative_hessian(density, vector_of(values, density), "SVI: curvature")
            root, _ = covariance_root(hessian, 1.0)  # no wider than the priors: flat directions are learned
        if factory is None:
            scale = getattr(program, "guide_scale", None)
            factory = (FullRank if small else LowRank)(**({} if scale is None else {"initial_scale": scale}))
        guide = factory(treated, recording, Start(values, root))
        guide(recording)  # Pyro builds an autoguide's parameters at its first call
        return guide, factory

    def _draw(
        self, guide: nn.Module, factory: Any, treated: Program, recording: Recording
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor], np.ndarray | None]:
        """Globals (1, draw, *event) with their log density, sites of trials, and the draws that these belong to."""
        read = isinstance(guide, AmortisedGuide)
        if not read and not (isinstance(guide, StructuredGuide) and not collapses(treated, recording)):
            values, log_q = draw_globals(guide, recording, self.draws)
            samples = {name: value.unsqueeze(0) for name, value in values.items()}
            samples, local = split_local(treated, recording, samples)
            return samples, log_q, local, None
        size = sum(parameter.numel() for parameter in guide.globals.parameters())
        draws = max(1, min(self.draws, LARGEST_GLOBALS // max(1, size)))
        point = read and isinstance(getattr(factory, "weights", None), PointEstimate)
        values, log_q = draw_globals(guide, recording, 1 if point else draws)
        kept = np.zeros(min(draws, LOCAL_DRAWS), dtype=int) if point else _spread(draws, LOCAL_DRAWS)
        chosen = values if point else {name: value[kept] for name, value in values.items()}
        local = draw_trials(guide, chosen, recording, len(kept))
        samples = {name: value.unsqueeze(0) for name, value in values.items()}
        return samples, log_q, {name: value.unsqueeze(0) for name, value in local.items()}, kept


def network_training(program: Program, recording: Recording, steps: int) -> Training:
    """How networks are trained on a recording of this size where the user does not say.

    Where the path could be integrated out, the globals start at the mode, and are held there until the recognition
    network has come near; elsewhere all start together, and what is latent is given time before it has to be sparing.
    A network that reads and writes the same entries may come to copy them: a model that runs this risk says by an
    attribute ``dropout`` how much coordinated dropout it wants.
    """
    trials, climbed = recording.num_trials, collapses(program, recording)
    return Training(
        batch=SMALL_BATCH if trials >= 2 * SMALL_BATCH else None,
        schedule=Cosine(warm_up=min(50, steps // 20)),
        clip=5.0,
        latent_warm_up=0 if climbed else steps // 5,
        hold=steps // 5 if climbed else 0,
        dropout=float(getattr(program, "dropout", 0.0)),
        stopping=EarlyStopping(every=max(1, steps // 60)) if trials >= FEW_TRIALS else None,
    )


def _spread(total: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, total - 1, min(total, wanted)).round().astype(int))
