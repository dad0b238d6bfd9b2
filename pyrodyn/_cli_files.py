"""Recordings from the files that the command line is given."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pyrodyn.recording import Recording


def read_recording(
    path: Path, *, bin_width: float | None, trials: str | None, align_to: str | None, window: tuple[float, float] | None
) -> Recording:
    """A recording from a file of any kind that this command line knows."""
    from pyrodyn import readers

    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    kind = path.suffix.lower()
    asked = {"trials": trials, "align_to": align_to, "window": window}
    asked = {name: value for name, value in asked.items() if value is not None}
    if kind not in (".nc", ".npz", ".npy", ".nwb"):
        raise typer.BadParameter(f"{path}: a recording is a .nc, .npz, .npy or .nwb file; rename or convert it")
    if asked and kind != ".nwb":
        raise typer.BadParameter(f"{', '.join('--' + name.replace('_', '-') for name in asked)}: only for .nwb files")
    if kind == ".nc":
        if bin_width is not None:
            raise typer.BadParameter(f"--bin-width: {path} has its own; leave the option out")
        return _from_netcdf(path)
    if bin_width is None:
        raise typer.BadParameter(f"{path} does not say how long its bins are: give --bin-width in seconds")
    if kind == ".nwb":
        return readers.read_nwb(path, bin_width=bin_width, **asked)  # pyright: ignore[reportArgumentType]
    return _from_numpy(path, bin_width)


def _from_netcdf(path: Path) -> Recording:
    import xarray as xr

    from pyrodyn._hdf5_guard import check_hdf5
    from pyrodyn.errors import RecordingError
    from pyrodyn.recording import Recording

    check_hdf5(path, error=RecordingError)
    with xr.open_dataset(path, engine="h5netcdf", decode_times=False, decode_timedelta=False) as dataset:
        if "observations" not in dataset:
            raise RecordingError(
                f"{path}: has no variable 'observations' at its root; write a recording by "
                "recording.to_xarray().to_netcdf(path)"
            )
        return Recording.from_xarray(dataset.load())


def _from_numpy(path: Path, bin_width: float) -> Recording:
    """`observations` or the only array; others go to the arguments of `Recording.from_arrays` of the same names."""
    import inspect
    from zipfile import BadZipFile

    import numpy as np

    from pyrodyn.errors import RecordingError
    from pyrodyn.recording import Recording

    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"observations": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, EOFError, BadZipFile, MemoryError, KeyError) as error:
        raise RecordingError(f"{path}: not a readable {path.suffix} file of plain arrays ({error})") from None
    known = inspect.signature(Recording.from_arrays).parameters.keys() - {"bin_width", "missing"}
    if "observations" not in arrays:
        others = [name for name in arrays if name not in known]
        if len(others) != 1:
            raise RecordingError(
                f"{path}: holds {sorted(arrays)}; name the array (trial, time, unit) 'observations', or store it alone"
            )
        arrays["observations"] = arrays.pop(others[0])
    ignored = sorted(arrays.keys() - known)
    if ignored:
        warnings.warn(
            f"{path}: ignored {', '.join(ignored)}, of which Recording.from_arrays knows nothing", stacklevel=2
        )
    arguments = {name: array.item() if array.ndim == 0 else array for name, array in arrays.items() if name in known}
    return Recording.from_arrays(bin_width=bin_width, **arguments)  # pyright: ignore[reportArgumentType]
