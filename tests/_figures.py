"""What every picture owes to matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def leave_nothing(*draw: Callable[[], Figure]) -> None:
    """Assert that pictures are drawn and can be saved, and that no setting and no open figure is left behind."""
    before = dict(matplotlib.rcParams)
    for each in draw:
        file = io.BytesIO()
        each().savefig(file)
        assert file.getvalue()[:4] == b"\x89PNG"
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before
