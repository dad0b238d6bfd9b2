"""`pyrodyn demo`: real recordings, two engines with one argument changed, a graph of regions, and pictures."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure

import pyrodyn as dyn
from pyrodyn import plots
from pyrodyn.inference import HMC, SVI, Gibbs
from pyrodyn.models import LDS, MultiRegionLDS
from pyrodyn.readouts import Gaussian, Poisson
from pyrodyn.scoring import bits_per_spike_over_trials

BOLD_INTERVAL = 1.89  # seconds from scan to scan
NUISANCE = 3  # the first columns: white matter, ventricles, whole brain
SESSION = Path("steinmetz2019_multiregion") / "session1.npz"
SESSION_BIN = 0.01  # seconds, as stored


@dataclass(frozen=True)
class Sizes:
    """How much of the data is used, and how long the engines run."""

    svi: SVI
    hmc: HMC
    regions: tuple[str, ...] | None
    scans: int
    units: int
    trials: int
    new_trials: int
    spikes_svi: SVI
    graph: Gibbs
    graph_units: int
    graph_trials: int


FULL = Sizes(SVI(), HMC(), None, 250, 40, 40, 20, SVI(steps=300), Gibbs(draws=100, warmup=100, chains=2), 60, 80)
QUICK = Sizes(
    SVI(steps=20, draws=30), HMC(draws=5, warmup=5, chains=8), ("LPCC", "RPCC", "LPrec", "RPrec"), 25, 4, 3, 3,
    SVI(steps=5, draws=10), Gibbs(draws=6, warmup=4, chains=2), 20, 6,
)  # fmt: skip


def run(folder: Path, *, quick: bool = False, say: Callable[[str], None] = print) -> list[Path]:
    """Fit, compare and draw; every file is written into ``folder``.

    Parameters
    ----------
    folder : made where it does not exist
    quick : tiny sizes, for a test that it runs; the results mean nothing
    say : gets each line of the report

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    ModuleNotFoundError
        Where the package nitime, whose data are used, is not installed.
    """
    sizes = QUICK if quick else FULL
    began = time.perf_counter()
    report = _Report(folder, say)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small lose more by a second thread than they win
    try:
        _bold(report, sizes)
        session = Path(os.environ.get("PYRODYN_DATA", "../shared/data")) / SESSION
        if session.is_file():
            _spikes(report, sizes, session)
            _graph(report, sizes, session)
        else:
            say(f"\n(no spikes: PYRODYN_DATA names no folder with {SESSION})")
    finally:
        torch.set_num_threads(threads)
    say(f"\nDone in {time.perf_counter() - began:.0f} s. What to look at:")
    say("  the table above: engines agree where the last column is well under one")
    for path, seen in report.written.items():
        say(f"  {path}: {seen}")
    return list(report.written)


def bold_recording(regions: Sequence[str] | None = None) -> dyn.Recording:
    """Resting-state BOLD from the package nitime, without nuisance signals: (1 trial, 250 scans, 28 regions).

    Parameters
    ----------
    regions : names of those to keep; all by default

    Raises
    ------
    ModuleNotFoundError
        Where nitime is not installed.
    """
    # Located, not imported: nitime brings in much that nothing here needs.
    spec = importlib.util.find_spec("nitime")
    path = Path(spec.origin).parent / "data" / "fmri_timeseries.csv" if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise ModuleNotFoundError('the demo reads data of the package nitime; install it: pip install "pyrodyn[demo]"')
    with path.open(newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    names, values = names[NUISANCE:], np.array(rows, dtype=np.float64)[:, NUISANCE:]
    recording = dyn.Recording.from_arrays(
        values[None], bin_width=BOLD_INTERVAL, unit=names, region=names, session="resting fMRI", counts=False
    )
    return recording if regions is None else recording.sel(unit=list(regions))


def spikes_recording(path: Path, *, units: int, trials: int, new_trials: int) -> dyn.Recording:
    """Spike counts of the busiest units of a Steinmetz session in 20 ms bins; ``split`` is "train", then "test".

    Reference: Steinmetz et al., Nature 576:266 (2019).
    """
    with np.load(path, allow_pickle=False) as held:
        fine = held["spikes"][: trials + new_trials].astype(np.int64)  # (trial, unit, 10 ms bin)
        areas = held["brain_area"].astype(str)
        session = f"{held['mouse']} {held['date']}"
    busiest = np.sort(np.argsort(-fine[:trials].sum((0, 2)), kind="stable")[:units])
    pairs = fine[:, busiest].reshape(len(fine), len(busiest), -1, 2).sum(-1)
    return dyn.Recording.from_arrays(
        pairs.transpose(0, 2, 1),
        bin_width=2 * SESSION_BIN,
        unit=busiest,
        region=areas[busiest],
        split=["train"] * trials + ["test"] * (len(fine) - trials),
        session=session,
    )


def compare_summaries(posteriors: Mapping[str, xr.DataTree]) -> str:
    r"""Eigenvalues of the dynamics under every posterior, side by side, as a table in text.

    An eigenvalue of modulus m and angle w has the time constant :math:`-\Delta / \ln m` seconds and the frequency
    :math:`w / 2 \pi \Delta` Hz, with bin width :math:`\Delta`. Each cell is mean, sd and [5%, 95%] over draws where the
    quantity is finite; the last column is the largest difference of two means in units of the root mean square sd.
    """
    rows = [["", *(f"{name}: mean ± sd [90% interval]" for name in posteriors), "difference/sd"]]
    found = {name: _rhythms(posterior) for name, posterior in posteriors.items()}
    for quantity in next(iter(found.values())):
        draws = [values[quantity][np.isfinite(values[quantity])] for values in found.values()]
        means, sds = np.array([d.mean() for d in draws]), np.array([d.std() for d in draws])
        scale = np.sqrt(np.mean(sds**2))
        cells = []
        for mean, sd, values in zip(means, sds, draws, strict=True):
            lower, upper = np.quantile(values, (0.05, 0.95))
            cells.append(f"{mean:.3g} ± {sd:.2g} [{lower:.3g}, {upper:.3g}]")
        rows.append([quantity, *cells, f"{np.ptp(means) / scale:.2f}" if scale > 0 else "-"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _rhythms(posterior: xr.DataTree) -> dict[str, np.ndarray]:
    """Moduli, time constants and frequencies by name, each (chain x draw,)."""
    invariants = posterior["invariants"].to_dataset()
    width = posterior["constant_data"].attrs["bin_width"]
    found = {}
    for latent in invariants["latent"].values:
        modulus = invariants["eigenvalue_modulus"].sel(latent=latent).values.ravel()
        angle = invariants["eigenvalue_angle"].sel(latent=latent).values.ravel()
        with np.errstate(divide="ignore"):
            found[f"eigenvalue {latent + 1}, modulus"] = modulus
            found[f"eigenvalue {latent + 1}, time constant (s)"] = -width / np.log(modulus)
            found[f"eigenvalue {latent + 1}, frequency (Hz)"] = angle / (2.0 * np.pi * width)
    return found


class _Report:
    """Writes files and remembers what is seen in each."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.say = folder, say
        self.written: dict[Path, str] = {}

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.say(f"  {what}: {time.perf_counter() - began:.1f} s")

    def picture(self, name: str, figure: Figure, seen: str) -> None:
        figure.savefig(self.folder / name)
        self.written[self.folder / name] = seen

    def posterior(self, name: str, tree: xr.DataTree, seen: str) -> None:
        self.written[dyn.save(tree, self.folder / name)] = seen


def _bold(report: _Report, sizes: Sizes) -> None:
    recording = bold_recording(sizes.regions).isel(time=slice(sizes.scans))
    report.say(
        f"Resting fMRI: {recording.num_bins} scans, one every {BOLD_INTERVAL} s; {recording.num_units} regions\n"
        "  model = LDS(latent_dim=2, readout=Gaussian())"
    )
    model = LDS(latent_dim=2, readout=Gaussian())
    engines = {"SVI": sizes.svi, "HMC": sizes.hmc}
    posteriors = {}
    for name, engine in engines.items():
        with report.step(f"dyn.fit(model, recording, {_call(engine)})"):
            posteriors[name] = dyn.fit(model, recording, engine, seed=0)
        report.posterior(
            f"bold_{name.lower()}.nc",
            posteriors[name],
            f"the posterior under {name}; dyn.load reads it, dyn.predict uses it",
        )
    report.say("\n" + compare_summaries(posteriors))
    report.say(f"diagnostics: {_diagnostics(posteriors)}\n")
    with report.step("pictures"):
        report.picture(
            "demo.png",
            plots.summary(posteriors),
            "left, the regions' signals and the two latents that they share, HMC drawn over SVI: the same paths; "
            "right, the eigenvalues, on the real axis or close to it: decays over seconds without a clear rhythm",
        )
        report.picture(
            "bold_latents.png", plots.latents(posteriors["HMC"]), "the latents beside the data, with 90% bands"
        )
        report.picture(
            "bold_eigenvalues.png",
            plots.eigenvalues(posteriors["HMC"]),
            "every draw's eigenvalues lie inside the unit circle: the dynamics are stable",
        )
        report.picture(
            "bold_svi_loss.png", plots.trace(posteriors["SVI"]), "the loss levels off: more steps would change little"
        )
        report.picture(
            "bold_hmc_trace.png", plots.trace(posteriors["HMC"]), "chains that have mixed lie over each other"
        )
        report.picture(
            "bold_signals.png",
            plots.rates(posteriors["HMC"]),
            "points on the diagonal: predictions are right on average",
        )


def _spikes(report: _Report, sizes: Sizes, session: Path) -> None:
    recording = spikes_recording(session, units=sizes.units, trials=sizes.trials, new_trials=sizes.new_trials)
    train, test = recording.sel(split="train"), recording.sel(split="test")
    report.say(f"\nSpikes: {train!r}\n  model = LDS(latent_dim=3, readout=Poisson())")
    with report.step(f"dyn.fit(model, train, {_call(sizes.spikes_svi)})"):
        posterior = dyn.fit(LDS(latent_dim=3, readout=Poisson()), train, sizes.spikes_svi, seed=0)
    report.posterior("spikes_svi.nc", posterior, "the posterior of the spikes")
    hidden = recording.unit[::4]
    with report.step(f"predict {len(hidden)} hidden units from the others in {test.num_trials} new trials"):
        prediction = dyn.predict(posterior, test.hide(unit=hidden), seed=0).sel(unit=hidden)
    observed = test.to_xarray()["observations"].sel(unit=hidden)
    mean = train.to_xarray()["observations"].sel(unit=hidden).mean(("trial", "time"))
    if float(observed.sum()) > 0:
        score = bits_per_spike_over_trials(prediction["expected"], observed, null=np.maximum(mean.values, 1e-3))
        report.say(f"  that explains {score} more than each unit's mean rate")
    with report.step("pictures"):
        report.picture(
            "spikes_latents.png", plots.latents(posterior), "spike counts by region, and the latents of three trials"
        )
        report.picture(
            "spikes_rates.png",
            plots.rates(posterior, prediction, recording=test),
            "rates of hidden units in new trials: near the diagonal, as high as predicted",
        )


def _graph(report: _Report, sizes: Sizes, session: Path) -> None:
    whole = spikes_recording(session, units=sizes.graph_units, trials=sizes.graph_trials, new_trials=0)
    units = Counter(whole.region.tolist())
    chosen = [name for name, count in units.most_common(3) if count > 1]
    recording = whole.sel(region=chosen)
    model = MultiRegionLDS(2, time_bumps=6)
    report.say(f"\nRegions: {recording!r}\n  model = MultiRegionLDS(2, time_bumps=6)")
    with report.step(f"dyn.fit(model, recording, {_call(sizes.graph)})"):
        posterior = dyn.fit(model, recording, sizes.graph, seed=0)
    report.posterior("regions_gibbs.nc", posterior, "the posterior of the region graph; dyn.coupling_graph reads it")
    with report.step("the graph"):
        graph = dyn.coupling_graph(posterior)
    report.say(
        "  P(present), by target and source; in brackets, how much of the target's variance is the source's noise:"
    )
    probability, share = graph["probability"], graph["variance_share"].mean(("chain", "draw"))
    report.say(f"{'':>6}" + "".join(f"{name:>13}" for name in chosen))
    for target in chosen:
        cells = [
            "-"
            if source == target
            else f"{float(probability.sel(target=target, source=source)):.2f} "
            f"({float(share.sel(target=target, origin=source)):.2f})"
            for source in chosen
        ]
        report.say(f"{target:>6}" + "".join(f"{cell:>13}" for cell in cells))
    with report.step("pictures"):
        report.picture(
            "regions_graph.png",
            plots.plot_coupling_graph(graph),
            "who drives whom: wide arrows are strong, faint ones uncertain",
        )
        report.picture(
            "regions_strengths.png",
            plots.plot_strengths(graph),
            "the same with intervals: an edge whose interval reaches zero may not be there",
        )


def _call(engine: SVI | HMC | Gibbs) -> str:
    """The engine as one would type it: only the options that are not the default."""
    values = {field.name: getattr(engine, field.name) for field in fields(engine)}
    given = {field.name: values[field.name] for field in fields(engine) if values[field.name] != field.default}
    return f"{type(engine).__name__}({', '.join(f'{name}={value}' for name, value in given.items())})"


def _diagnostics(posteriors: Mapping[str, xr.DataTree]) -> str:
    found = {name: json.loads(posterior.attrs["diagnostics"]) for name, posterior in posteriors.items()}
    return "; ".join(
        f"{name} " + ", ".join(f"{key} {value:.3g}" for key, value in d.items()) for name, d in found.items()
    )
