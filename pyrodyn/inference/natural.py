r"""Natural gradients for the paths of diffusions, exact updates of their drifts, and profiles for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pyrodyn.checkpoint import StateStore
from pyrodyn.diffusion import DiffusionModel
from pyrodyn.errors import ModelError
from pyrodyn.inference._diffusion_fit import WEIGHTS, DiffusionFit, Schedule
from pyrodyn.inference._profile import Profile, WeightPrior
from pyrodyn.inference.engine import Draws, numerics, random_stream, starting_values
from pyrodyn.inference.mode import covariance_root, negative_hessian
from pyrodyn.program import Program, globals_given
from pyrodyn.recording import Recording

CLIMB = 200  # steps of L-BFGS of the linear relative
KEPT = 100  # draws with a path
CURVATURES = 16  # finite differences of the profile at once
LEAST_CURVATURE = 1.0  # of the Laplace approximation: no direction wider than its prior


@dataclass(frozen=True)
class NaturalGradient:
    r"""Variational inference for diffusions: a Gauss-Markov law of every path, a normal law of the drift's weights.

    .. math:: \log p(y) \ge E_q[\log p(y, x, W \mid \theta) - \log q(x)\,q(W)]

    A round takes some steps in which the natural parameters of :math:`q(x)` move along the gradient of this bound in
    its mean parameters, and :math:`q(W)` is set to its optimum given :math:`q(x)`, which is normal since the drift is
    linear in W. Then the prior of W climbs the evidence of that regression, and the other globals (diffusion, loading,
    noise) climb a profile of the bound in which the path is integrated out under the drift expanded along its law. What
    the features of the drift depend on (the hidden layers of a network) follows the gradient of the bound by Adam.

    With a linear drift and Gaussian observations one step of the path ends at the exact smoother.

    Parameters
    ----------
    rounds : int
        At most; a gain of the bound below ``tolerance`` nats a trial, twice in a row, ends the run before.
    path_steps : int
        Steps of path and weights in a round.
    path_rate : float
        Of the natural steps: 1 goes all the way to what the last expansion says. Halved where the bound falls.
    nodes : int
        Of the quadrature, in each dimension of the latent.
    learning_rate : float
        Of Adam.
    tolerance : float
    rest : int
        Steps of the path alone at the end.
    draws : int

    Notes
    -----
    Path, weights and other globals are independent in q. The globals beside the drift have the normal law of a Laplace
    approximation of their profile; hidden layers are points. The posterior's notes name them.

    References
    ----------
    Khan & Lin, AISTATS 2017; Verma, Adam & Solin, AISTATS 2024; Hu, Smith & Linderman (2025).
    """

    rounds: int = 40
    path_steps: int = 3
    path_rate: float = 0.7
    nodes: int = 3
    learning_rate: float = 0.01
    tolerance: float = 0.05
    rest: int = 10
    draws: int = 500

    def __post_init__(self) -> None:
        for name in ("rounds", "path_steps", "nodes", "draws"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ModelError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if not 0.0 < self.path_rate <= 1.0:
            raise ModelError(f"path_rate must be above 0 and at most 1, got {self.path_rate!r}")

    def run(self, program: Program, recording: Recording, *, seed: int, checkpoint: StateStore | None = None) -> Draws:
        if not isinstance(program, DiffusionModel):
            raise ModelError(
                f"NaturalGradient is for diffusions such as models.NeuralSDE, and {type(program).__name__} is none; "
                "use SVI, HMC or NUTS"
            )
        with random_stream(seed), numerics():
            schedule = Schedule(
                self.rounds, self.path_steps, self.path_rate, self.nodes, self.learning_rate, self.tolerance
            )
            start = starting_values(program.linear_relative(), recording, CLIMB, "NaturalGradient: start")
            fitted = DiffusionFit(schedule, program, recording, start)
            fitted.train(checkpoint)
            return self._draw(fitted, program, recording)

    def _draw(self, fitted: DiffusionFit, model: DiffusionModel, recording: Recording) -> Draws:
        settled = fitted.settle(self.rest)
        statistics = fitted.move_weights()
        bound = float(settled.value.sum() - fitted.weights.divergence(fitted.prior_sd()))
        place, sites = fitted.place, fitted.sites
        vectors = place.expand(self.draws, -1).clone()
        hills: list[Profile | WeightPrior] = [fitted.profile()]
        if sites.prior:
            hills.append(fitted.weight_prior(statistics))
        spread = [own for own in hills if fitted.defined(own)]
        lifted = 0
        for own in spread:
            hessian = negative_hessian(own, place[own.index], "NaturalGradient: curvature", CURVATURES)
            root, flat = covariance_root(hessian, LEAST_CURVATURE)
            lifted += int(flat)
            vectors[:, own.index] = place[own.index] + torch.randn(self.draws, len(own.index)) @ root.mT
        values = fitted.density.constrain(vectors)
        drift = model.drift_parameters(globals_given(model, values, recording))
        sd = model.drift.prior_sd(drift, model.latent_dim, model.pace(recording))
        values[WEIGHTS] = (fitted.weights.sample(self.draws) / sd.reshape(-1, sd.shape[-1], 1)).unsqueeze(1)
        kept = np.unique(np.linspace(0, self.draws - 1, min(KEPT, self.draws)).round().astype(int))
        converged = fitted.at_rest() and len(spread) == len(hills)
        treatment = {
            "latent": "Gauss-Markov",
            WEIGHTS: "normal",
            **dict.fromkeys(sites.prior, "Laplace of the weights' evidence"),
            **dict.fromkeys(sites.features, "point"),
            **dict.fromkeys(sites.others, "Laplace of the profile" if hills[0] in spread else "point"),
        }
        return Draws(
            {site.name: values[site.name].reshape(1, self.draws, *site.shape) for site in fitted.density.sites},
            "a Gauss-Markov law, independent of the globals",
            local={"latent": fitted.law.sample(torch.Size((len(kept),))).unsqueeze(0)},
            kept=kept,
            history={"bound": fitted.bounds[: fitted.round]},
            notes={
                "globals": "a law for each site, see treatment",
                "elbo": bound,
                "converged": converged,
                "treatment": treatment,
                "lifted_directions": lifted,
            },
            warnings=()
            if converged
            else (f"NaturalGradient: the bound still moved after rounds={self.rounds}; raise rounds",),
        )
