"""The command line: `pyrodyn models`, `fit`, `predict`, `compare`, `check`, `graph`, `demo`.

Whatever fails ends in one line on stderr and a non-zero exit code: 2 for a command that was typed wrongly, 1 for all
else. `pyrodyn --debug ...` shows the traceback instead. What takes long to import is imported inside the commands.
"""

from __future__ import annotations

import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pyrodyn._cli_files import read_recording

if TYPE_CHECKING:
    import xarray as xr

    from pyrodyn.recording import Recording

INTERRUPTED = 130  # the shell's code for a command stopped by Ctrl-C


class ReadoutName(StrEnum):
    POISSON = "poisson"
    GAUSSIAN = "gaussian"
    NEGATIVE_BINOMIAL = "negative-binomial"
    BERNOULLI = "bernoulli"


class ModelName(StrEnum):
    LDS = "lds"
    REGIONS = "regions"


class EngineName(StrEnum):
    GIBBS = "gibbs"
    SVI = "svi"
    LAPLACE = "laplace"
    HMC = "hmc"
    NUTS = "nuts"


class MethodName(StrEnum):
    LOO = "loo"
    KFOLD = "kfold"
    FUTURE = "future"
    UNITS = "units"
    EVIDENCE = "evidence"


class OneLineErrors(TyperGroup):
    """Commands whose failures and warnings are one line each."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except Exception as error:
            if not (hasattr(error, "format_message") or isinstance(error, typer.Abort)):
                raise  # only with --debug: see `invoke`
            code = _report(error)
        if standalone_mode:
            sys.exit(code)
        return code

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _warn
            try:
                return super().invoke(ctx)
            except Exception as error:
                if ctx.params["debug"] or isinstance(error, typer.Exit):
                    raise
                raise typer.Exit(_report(error)) from None


app = typer.Typer(
    cls=OneLineErrors,
    help="Latent dynamics of neural populations: fit a model to a recording, and predict from its posterior.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

BinWidth = Annotated[float | None, typer.Option(help="Seconds; for .npz, .npy and .nwb files.")]
Trials = Annotated[str | None, typer.Option(help="Table of trials in an .nwb file.  [default: trials]")]
AlignTo = Annotated[str | None, typer.Option(help="Column of event times in that table.  [default: start_time]")]
Window = Annotated[tuple[float, float] | None, typer.Option(help="Start and stop in seconds about the event (.nwb).")]
RecordingFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A recording: .nc (from Recording.to_xarray), .npz, .npy or .nwb.")
]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
) -> None:
    del debug  # looked up by OneLineErrors
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("models")
def list_models() -> None:
    """List the zoo."""
    from pyrodyn import models

    width = max(map(len, models.__all__))
    for name in models.__all__:
        first, *_ = (getattr(models, name).__doc__ or "").strip().splitlines()
        typer.echo(f"{name:<{width}}  {first}")


@app.command()
def fit(
    file: RecordingFile,
    model: Annotated[ModelName, typer.Option(help="One population, or regions that may drive each other.")] = (
        ModelName.LDS
    ),
    latent_dim: Annotated[int, typer.Option(help="Number of latents, of each region where there are several.")] = 3,
    readout: Annotated[ReadoutName | None, typer.Option(help="Poisson for counts, Gaussian otherwise.")] = None,
    engine: Annotated[EngineName, typer.Option(help="How the posterior is found; gibbs is for regions.")] = (
        EngineName.SVI
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of svi.")] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="Draws, for gibbs, hmc and nuts in each chain.")] = None,
    warmup: Annotated[int | None, typer.Option(min=1, help="Warm-up of each chain of gibbs, hmc and nuts.")] = None,
    chains: Annotated[int | None, typer.Option(min=1, help="Chains of gibbs, hmc and nuts.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    output: Annotated[Path, typer.Option(help="The posterior, a netCDF file.")] = Path("fit.nc"),
    checkpoint: Annotated[Path | None, typer.Option(help="File from which a killed run resumes.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for pictures of the posterior.")] = None,
    bin_width: BinWidth = None,
    trials: Trials = None,
    align_to: AlignTo = None,
    window: Window = None,
) -> None:
    """Fit a linear dynamical system, or coupled ones of several regions, to a recording."""
    import pyrodyn as dyn

    for path in (output, checkpoint):
        _check_folder(path)  # now, not after an hour's fit
    given = {"steps": steps, "draws": draws, "warmup": warmup, "chains": chains}
    chosen = _engine(engine, {name: value for name, value in given.items() if value is not None})
    recording = read_recording(file, bin_width=bin_width, trials=trials, align_to=align_to, window=window)
    kind = {ModelName.LDS: dyn.models.LDS, ModelName.REGIONS: dyn.models.MultiRegionLDS}[model]
    program = kind(latent_dim=latent_dim, readout=_readout(readout, recording))
    typer.echo(f"{recording!r}\n{program}\n{chosen}")
    posterior = dyn.fit(program, recording, chosen, seed=seed, checkpoint=checkpoint)
    dyn.save(posterior, output)
    typer.echo(f"{output}: {posterior.attrs['wall_time_seconds']:.1f} s, diagnostics {posterior.attrs['diagnostics']}")
    if figures is not None:
        _draw(posterior, figures)


@app.command()
def predict(
    fitted: Annotated[Path, typer.Argument(metavar="FIT", help="A posterior written by `pyrodyn fit`.")],
    file: RecordingFile,
    output: Annotated[Path, typer.Option(help="The prediction, a netCDF file.")] = Path("prediction.nc"),
    draws: Annotated[int, typer.Option(min=1, help="Posterior draws to average over.")] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    bin_width: BinWidth = None,
    trials: Trials = None,
    align_to: AlignTo = None,
    window: Window = None,
) -> None:
    """Latents and expected observations of a recording under a posterior."""
    import xarray as xr

    import pyrodyn as dyn

    _check_folder(output)
    posterior = dyn.load(fitted)
    recording = read_recording(file, bin_width=bin_width, trials=trials, align_to=align_to, window=window)
    found = dyn.predict(posterior, recording, draws=draws, seed=seed)
    dyn.save(xr.DataTree(found), output)
    sizes = ", ".join(f"{found.sizes[dim]} {dim}s" for dim in ("trial", "time", "unit"))
    typer.echo(f"{output}: {', '.join(map(str, found.data_vars))} of {sizes}".replace("times", "bins"))


@app.command()
def compare(
    fits: Annotated[list[Path], typer.Argument(metavar="FIT...", help="Posteriors of one recording.")],
    method: Annotated[
        MethodName | None, typer.Option(help="loo over trials, by default, with kfold where its weights fail.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The comparison, a netCDF file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="A picture of the differences.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Which model predicts best what it has not seen: one table, best first."""
    import xarray as xr

    import pyrodyn as dyn
    from pyrodyn import comparison, plots

    for path in (output, figure):
        _check_folder(path)
    names = [path.stem for path in fits]
    if len(set(names)) < len(names):
        names = [str(path) for path in fits]
    chosen = {
        MethodName.LOO: comparison.LOO,
        MethodName.KFOLD: comparison.KFold,
        MethodName.FUTURE: comparison.LeaveFutureOut,
        MethodName.UNITS: comparison.HeldOutUnits,
        MethodName.EVIDENCE: comparison.Evidence,
    }
    posteriors = {name: dyn.load(path) for name, path in zip(names, fits, strict=True)}
    found = dyn.compare(posteriors, method=None if method is None else chosen[method](), seed=seed)
    typer.echo(comparison.as_table(found).to_string(float_format="{:.4g}".format))
    if output is not None:
        dyn.save(xr.DataTree(found), output)
        typer.echo(str(output))
    if figure is not None:
        plots.comparison(found).savefig(figure)
        typer.echo(str(figure))


@app.command()
def check(
    fitted: Annotated[Path, typer.Argument(metavar="FIT", help="A posterior written by `pyrodyn fit`.")],
    draws: Annotated[int, typer.Option(min=2, help="Replicated recordings.")] = 200,
    figure: Annotated[Path | None, typer.Option(help="A picture of data and replicates.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Whether a model makes recordings like the one it was fitted to."""
    import pyrodyn as dyn
    from pyrodyn import plots

    _check_folder(figure)
    found = dyn.check(dyn.load(fitted), draws=draws, seed=seed)
    typer.echo("share of p-values outside .01 to .99, of which a model that is right has 2%")
    typer.echo(found["extreme"].to_dataframe().to_string(float_format="{:.3f}".format))
    if figure is not None:
        plots.checks(found).savefig(figure)
        typer.echo(str(figure))


@app.command()
def graph(
    fitted: Annotated[Path, typer.Argument(metavar="FIT", help="A posterior of `pyrodyn fit --model regions`.")],
    hdi_prob: Annotated[float, typer.Option(help="Probability of the intervals.")] = 0.9,
    graphml: Annotated[Path | None, typer.Option(help="The graph, a GraphML file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="A picture of the graph.")] = None,
) -> None:
    """Which region drives which: every edge with its strength, interval, and probability of being there."""
    import pyrodyn as dyn
    from pyrodyn import plots
    from pyrodyn.coupling import edge_table

    for path in (graphml, figure):
        _check_folder(path)
    found = dyn.coupling_graph(dyn.load(fitted))
    table = edge_table(found, hdi_prob).to_dataframe().reset_index().query("target != source")
    typer.echo(table.to_string(index=False, float_format="{:.3g}".format))
    if graphml is not None:
        dyn.write_graphml(found, graphml, hdi_prob=hdi_prob)
        typer.echo(str(graphml))
    if figure is not None:
        plots.plot_coupling_graph(found).savefig(figure)
        typer.echo(str(figure))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for posteriors and pictures.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, only to see that it runs.")] = False,
) -> None:
    """Fit real recordings under two engines, compare, and draw; under three minutes."""
    from pyrodyn.demo import run

    run(output, quick=quick, say=typer.echo)


def main() -> None:
    """Entry point of the command `pyrodyn`."""
    app()


def _report(error: Exception) -> int:
    """Say in one line what went wrong; returns the exit code."""
    if hasattr(error, "format_message"):  # typer's own: a wrong option, command or argument
        text, code = error.format_message(), getattr(error, "exit_code", 2)  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(error, typer.Abort):
        text, code = "stopped", INTERRUPTED
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        text, code = f"{error.filename}: {error.strerror}", 1
    elif isinstance(error, (ValueError, OSError, ImportError)) or type(error).__module__ == "pyrodyn.errors":
        text, code = str(error), 1
    else:
        text, code = f"unexpected {type(error).__name__}: {error}; `pyrodyn --debug ...` shows where", 1
    typer.echo("pyrodyn: " + " ".join(text.split()), err=True)
    return code


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo("pyrodyn: warning: " + " ".join(str(message).split()), err=True)


def _check_folder(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")


def _engine(name: EngineName, options: dict[str, int]) -> Any:
    """The engine with the options given; an option that it does not have is an error."""
    from dataclasses import fields

    from pyrodyn import inference

    kind = {
        EngineName.GIBBS: inference.Gibbs,
        EngineName.SVI: inference.SVI,
        EngineName.LAPLACE: inference.Laplace,
        EngineName.HMC: inference.HMC,
        EngineName.NUTS: inference.NUTS,
    }[name]
    foreign = sorted(options.keys() - {field.name for field in fields(kind)})
    if foreign:
        raise typer.BadParameter(f"--engine {name} takes no {', '.join(f'--{option}' for option in foreign)}")
    return kind(**options)


def _readout(name: ReadoutName | None, recording: Recording) -> Any:
    from pyrodyn import readouts

    if name is None:
        return readouts.Poisson() if recording.counts else readouts.Gaussian()
    return {
        ReadoutName.POISSON: readouts.Poisson,
        ReadoutName.GAUSSIAN: readouts.Gaussian,
        ReadoutName.NEGATIVE_BINOMIAL: readouts.NegativeBinomial,
        ReadoutName.BERNOULLI: readouts.Bernoulli,
    }[name]()


def _draw(posterior: xr.DataTree, folder: Path) -> None:
    from pyrodyn import plots

    folder.mkdir(parents=True, exist_ok=True)
    for picture in (plots.latents, plots.eigenvalues, plots.trace, plots.rates):
        path = folder / f"{picture.__name__}.png"
        picture(posterior).savefig(path)
        typer.echo(str(path))
