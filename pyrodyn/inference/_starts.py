"""Where chains of Gibbs sampling start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from pyrodyn.conditionals.paths import levelled
from pyrodyn.inference.collapse import collapse, collapses
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.engine import NEAR
from pyrodyn.inference.mode import Rescaled, ascend
from pyrodyn.program import IntegratedModel, Values, globals_given
from pyrodyn.recording import Recording

ROUNDS, CLIMB = 5, 200  # renewals of the pseudo-observations, and steps of L-BFGS in all, on the way to the start


@runtime_checkable
class Nesting(Protocol):
    """A model around a simpler one, at whose mode chains may start."""

    def simpler(
        self, recording: Recording
    ) -> tuple[Any, Callable[[Values], Values], Callable[[Values], Values]] | None:
        """The simpler model, and what makes of its values those of this one, without or with a guess of what it lacks.

        None where there is none.
        """
        ...


def starts(model: Any, recording: Recording, several: bool) -> list[Values]:
    """Values of the globals near posterior modes.

    That of the simpler model that this one nests, the one climbed to from there, and the one climbed to from the
    model's own first guess. With ``several`` false, only the first of them.
    """
    around: Any = model
    simpler = around.simpler(recording) if isinstance(around, Nesting) else None
    if simpler is None:
        return [climb(model, recording, model.initial_values(recording))]
    inner, widened, filled = simpler
    values = climb(inner, recording, inner.initial_values(recording))
    found = [widened(values)]
    if several:
        found += [climb(model, recording, guess) for guess in (filled(values), model.initial_values(recording))]
    return found


def climb(model: Any, recording: Recording, values: Values) -> Values:
    """Values of the globals near a posterior mode, counts taken as Gaussian about a path that follows.

    A model whose path cannot be integrated out brings a start that is good enough as it is.
    """
    if not collapses(model, recording):
        return values
    if isinstance(model, IntegratedModel) or model.readout.is_gaussian:
        density = LogDensity(collapse(model), recording)
        return density.constrain(ascend(density, density.unconstrain(values), CLIMB, "Gibbs: start", NEAR)[0])
    centre = None
    for turn in range(ROUNDS):
        parameters = globals_given(model, values, recording)
        program, centre = levelled(model, parameters, recording, centre, 2 if turn else 4)
        density = LogDensity(program, recording)
        vector = density.unconstrain(values)
        # The curvature is read where the first steps lead: that of the first guess may point to another mode.
        if turn:
            vector = Rescaled(density, vector).ascend(vector, CLIMB // ROUNDS, "Gibbs: start", NEAR)
        else:
            vector = ascend(density, vector, CLIMB // ROUNDS, "Gibbs: start", NEAR)[0]
        values = density.constrain(vector)
    return values
