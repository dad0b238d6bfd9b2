"""Progress bars: on a terminal, and only for what takes longer than two seconds."""

from __future__ import annotations

from tqdm import tqdm


def progress(total: int, label: str, start: int = 0) -> tqdm:
    """A bar of ``total`` steps; silent where the output is not a terminal."""
    return tqdm(total=total, initial=start, desc=label, disable=None, leave=False, delay=2.0)
