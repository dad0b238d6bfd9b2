"""Tables of results as the documents keep them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write(path: Path, title: str, *paragraphs: str, head: Sequence[str], rows: Sequence[str]) -> None:
    """A page with a title, what made it and what it shows, and one table whose rows are written out."""
    table = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *rows]
    path.write_text("\n\n".join([f"# {title}", *paragraphs, "\n".join(table)]) + "\n")
