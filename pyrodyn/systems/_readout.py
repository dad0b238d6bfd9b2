r"""From latent paths to a labelled recording: loadings, rates, draws, and the truth as a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from pyrodyn.recording import Recording
from pyrodyn.systems.fields import Field
from pyrodyn.systems.system import System


def observed(
    values: np.ndarray,
    latents: np.ndarray,
    rates: np.ndarray,
    *,
    bin_width: float,
    options: Mapping[str, Any],
    field: Field | None = None,
    mask: np.ndarray | None = None,
    condition: np.ndarray | None = None,
    extra: Mapping[str, Any] | None = None,
) -> System:
    """The recording of ``values`` (trial, time, unit), and its truth with the labels of the recording.

    ``rates`` are the expected observations; ``extra`` holds further variables of the truth.
    """
    counts = bool(options.get("readout", "poisson") != "gaussian")
    recording = Recording.from_arrays(
        values, bin_width=bin_width, counts=counts, mask=mask, condition=condition, session=str(options["system"])
    )
    data: dict[str, Any] = {
        "latents": (("trial", "time", "latent"), latents),
        "rates": (("trial", "time", "unit"), rates, {"units": "events a bin" if counts else "as observed"}),
    }
    attrs = {name: int(value) if isinstance(value, bool) else value for name, value in options.items()}
    attrs = {name: value for name, value in attrs.items() if value is not None}
    if field is not None:
        slopes = np.linalg.eigvals(field.jacobian(field.fixed_points))
        data["fixed_points"] = (("fixed_point", "latent"), field.fixed_points)
        # netCDF has no complex numbers.
        data["eigenvalues_real"] = (("fixed_point", "mode"), slopes.real)
        data["eigenvalues_imag"] = (("fixed_point", "mode"), slopes.imag)
        attrs |= {"field": field.name, **field.parameters}
    coords = {
        "trial": recording.trial,
        "time": ("time", recording.time, {"units": "s"}),
        "unit": recording.unit,
        "latent": np.arange(latents.shape[-1]),
        "condition": ("trial", recording.condition),
    }
    return System(recording, xr.Dataset(data | dict(extra or {}), coords, attrs | {"bin_width": bin_width}))
