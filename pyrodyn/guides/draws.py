"""Independent draws of a trained guide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyrodyn.guides.amortised import AmortisedGuide
from pyrodyn.guides.structured import StructuredGuide
from pyrodyn.program import is_random
from pyrodyn.recording import Recording

PART = 4_000_000  # (draw, trial, time, unit) entries in one call


def draw_globals(guide: nn.Module, recording: Recording, draws: int) -> tuple[dict[str, Tensor], Tensor]:
    """Draws (draw, *event) of the globals, (draw, trial, *event) of what is local to a trial, and their log density
    (draw,).

    Of a guide with a part for the globals, these alone are drawn.
    """
    source = guide.globals if isinstance(guide, StructuredGuide | AmortisedGuide) else guide
    with torch.no_grad():
        with pyro.plate("draw", draws, dim=-2):
            trace = poutine.trace(source).get_trace(recording)
        trace.compute_log_prob()
    values, log_q = {}, torch.zeros(draws, dtype=torch.float64)
    nodes: Any = trace.nodes
    for name, site in nodes.items():
        if is_random(site):
            log_q = log_q + site["log_prob"].reshape(draws, -1).sum(-1)
            if not site["infer"].get("is_auxiliary", False):
                local = any(frame.name == "trial" for frame in site["cond_indep_stack"])
                # A point is the parameter itself: detached, or whatever is computed from it would carry a graph.
                values[name] = site["value"].detach() if local else site["value"].detach().squeeze(1)
    return values, log_q


def draw_trials(
    guide: AmortisedGuide | StructuredGuide, values: Mapping[str, Tensor], recording: Recording, draws: int
) -> dict[str, Tensor]:
    """Draws (draw, trial, *event) of the sites of trials, for every draw (draw, *event) of the globals.

    Globals of which there is one draw alone serve all draws of the trials. Where a network reads the trials, it does so
    in parts.
    """
    shared = all(len(value) == 1 for value in values.values())
    held = {name: value.squeeze(0) if shared else value.unsqueeze(1) for name, value in values.items()}
    size = recording.num_trials
    if isinstance(guide, AmortisedGuide):
        size = max(1, PART // (draws * recording.num_bins * recording.num_units))
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, recording.num_trials, size):
        part = recording.isel(trial=slice(start, start + size)) if size < recording.num_trials else recording
        with torch.no_grad(), poutine.block(), pyro.plate("draw", draws, dim=-2):
            for name, value in guide.local_given(held, part).items():
                parts.setdefault(name, []).append(value)
    return {name: torch.cat(values, 1) for name, values in parts.items()}
