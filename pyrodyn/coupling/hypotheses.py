"""Rival explanations of why two regions vary together, as models for `compare`."""

from __future__ import annotations

from dataclasses import replace

from pyrodyn.errors import CouplingError
from pyrodyn.models import MultiRegionLDS
from pyrodyn.recording import Recording


def hypotheses(
    model: MultiRegionLDS, recording: Recording, *, source: str | None = None, target: str | None = None
) -> dict[str, MultiRegionLDS]:
    """No coupling, common input, a direct edge either way, a feedback loop: five models that differ in nothing else.

    Compare them on the likelihood of trials with the path integrated out::

        compare(hypotheses(model, recording, source="V1", target="V2"), recording)

    Parameters
    ----------
    model : MultiRegionLDS
        Gives latents, readout, time-locked input, trial level and the edges among other regions to all of them. Its
        ``global_dim`` and ``shared_innovations``, at least one of each, are the common input.
    recording : Recording
    source, target : str, optional
        The two regions; those of the recording, where it has two.

    Returns
    -------
    dict of str to MultiRegionLDS
        ``no coupling``, ``common input``, ``V1 -> V2``, ``V2 -> V1`` and ``feedback loop``. Edges are there for sure:
        what is compared is which of them, and how much they explain.

    Raises
    ------
    CouplingError
        Where the two regions are not named, or not in the recording.
    """
    present = list(recording.regions)
    if source is None and target is None and len(present) == 2:
        source, target = present
    if source not in present or target not in present or source == target:
        raise CouplingError(
            f"source and target must be two different regions of the recording, got {source!r} and {target!r}; its "
            f"regions: {present}"
        )
    pair = {source, target}
    sure = [edge._replace(probability=1.0) for edge in model.possible_edges(recording)]
    others = [edge for edge in sure if {edge.source, edge.target} != pair]
    scale = {(edge.source, edge.target): edge.scale for edge in sure}

    def variant(*edges: tuple[str, str], common: bool = False) -> MultiRegionLDS:
        return replace(
            model,
            edges=(*others, *((*edge, 1.0, scale.get(edge, 1.0)) for edge in edges)),
            global_dim=max(1, model.global_dim) if common else 0,
            shared_innovations=max(1, model.shared_innovations) if common else 0,
        )

    ahead, back = (source, target), (target, source)
    return {
        "no coupling": variant(),
        "common input": variant(common=True),
        f"{source} -> {target}": variant(ahead),
        f"{target} -> {source}": variant(back),
        "feedback loop": variant(ahead, back),
    }
