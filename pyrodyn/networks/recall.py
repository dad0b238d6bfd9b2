"""What a recognition network has run already, so that the program that it guides need not run it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# One run: a guide's, until the program takes it or another guide runs.
_LAST: list[tuple[Tensor, tuple[Tensor | None, ...], Tensor]] = []


def remember(drawn: Tensor, others: Sequence[Tensor | None], result: Tensor) -> None:
    """Keep ``result`` for the program that is called with the very tensor ``drawn``, and with ``others``."""
    _LAST[:] = [(drawn, tuple(others), result)]


def recalled(drawn: Tensor | None, others: Sequence[Tensor | None]) -> Tensor | None:
    """The result for the same draw, the same object, and equal ``others``; it is handed out once.

    What is drawn is made anew by every guide's call, so that the rest was then drawn with it; program and guide compute
    their own copies of what follows from a site, such as a weight in units of its inputs.
    """
    if not _LAST or _LAST[0][0] is not drawn or len(_LAST[0][1]) != len(others):
        return None
    if not all(_same(one, other) for one, other in zip(_LAST[0][1], others, strict=True)):
        return None
    return _LAST.pop()[2]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
