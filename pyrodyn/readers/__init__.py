"""A file, or another library's object, becomes a `Recording` in one call.

`read_nwb` and `list_nwb` need pynwb, `read_pynapple` needs pynapple (``pip install "pyrodyn[nwb]"``); either is
imported only when it is called.
"""

from __future__ import annotations

from pyrodyn.readers.nwb import list_nwb, read_nwb
from pyrodyn.readers.pynapple import read_pynapple
from pyrodyn.readers.spikes import ReadReport, ReadWarning, count_spikes

__all__ = ["ReadReport", "ReadWarning", "count_spikes", "list_nwb", "read_nwb", "read_pynapple"]
