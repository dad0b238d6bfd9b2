"""The command line and the demonstration: what they write, and one readable line for whatever fails."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

import pyrodyn as dyn
from pyrodyn import demo, readers
from pyrodyn.cli import app
from pyrodyn.errors import IntegrityError

QUICK = ["--latent-dim", "1", "--steps", "3", "--draws", "6"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(result) -> str:
    """The only line on stderr of a command that failed."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("pyrodyn: ")
    return line


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    rng = np.random.default_rng(2)
    slow = np.cumsum(rng.normal(size=(3, 10, 1)), 1) * 0.4
    return rng.poisson(np.exp(slow * np.array([1.0, -1.0, 0.5]))).astype(np.int64)


@pytest.fixture
def folder(tmp_path: Path, counts: np.ndarray) -> Path:
    np.savez(tmp_path / "counts.npz", observations=counts, region=np.array(["V1", "V1", "V2"]))
    np.savez(tmp_path / "alone.npz", whatever=counts)
    np.savez(tmp_path / "two.npz", one=counts, other=counts)
    np.save(tmp_path / "real.npy", counts + 0.5)
    np.save(tmp_path / "objects.npy", np.array([{}, None]), allow_pickle=True)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "text.csv").write_text("1,2\n")
    dyn.Recording.from_arrays(counts, bin_width=0.1).to_xarray().to_netcdf(tmp_path / "counts.nc")
    xr.Dataset({"rates": ("time", [1.0])}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    return tmp_path


def test_a_graph_of_regions(folder: Path) -> None:
    fit = ["--model", "regions", "--latent-dim", "1", "--engine", "gibbs", "--draws", "4", "--warmup", "3"]
    done = run("fit", folder / "counts.npz", "--bin-width", "0.1", *fit, "--chains", "2", "--output", folder / "r.nc")
    assert done.exit_code == 0, done.stderr
    shown = run("graph", folder / "r.nc", "--graphml", folder / "g.graphml", "--figure", folder / "g.png")
    assert shown.exit_code == 0, shown.stderr
    assert "p_present" in shown.stdout and "V2" in shown.stdout
    assert set(nx.read_graphml(folder / "g.graphml").nodes) == {"V1", "V2"} and (folder / "g.png").stat().st_size > 1000
    assert run("fit", folder / "counts.npz", "--bin-width", "0.1", *fit, "--steps", "3").exit_code == 2
    plain = folder / "lds.nc"
    assert run("fit", folder / "counts.npz", "--bin-width", "0.1", *QUICK, "--output", plain).exit_code == 0
    assert "MultiRegionLDS" in one_line(run("graph", plain))


def test_fits_are_compared_and_checked(folder: Path) -> None:
    for dim in (1, 2):
        fit = ["--engine", "laplace", "--draws", "60", "--latent-dim", dim, "--output", folder / f"{dim}.nc"]
        assert run("fit", folder / "counts.npz", "--bin-width", "0.1", *fit).exit_code == 0
    files = [folder / "1.nc", folder / "2.nc"]
    done = run("compare", *files, "--method", "kfold", "--output", folder / "c.nc", "--figure", folder / "c.png")
    assert done.exit_code == 0, done.stderr
    found = dyn.load(folder / "c.nc").to_dataset()
    expected = dyn.compare({path.stem: dyn.load(path) for path in files}, method=dyn.comparison.KFold())
    assert found.drop_vars("seconds").equals(expected.drop_vars("seconds"))
    assert "elpd" in done.stdout and str(found["model"].values[0]) in done.stdout.splitlines()[2]
    assert (folder / "c.png").stat().st_size > 1000
    assert "other.nc" in one_line(run("compare", folder / "other.nc"))
    done = run("check", folder / "1.nc", "--draws", 5, "--figure", folder / "k.png")
    assert done.exit_code == 0, done.stderr
    assert "autocorrelation" in done.stdout and (folder / "k.png").stat().st_size > 1000


def test_models_lists_the_zoo() -> None:
    result = run("models")
    assert result.exit_code == 0
    listed = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert list(listed) == dyn.models.__all__
    assert listed["LDS"] == "Linear dynamical system with any readout."


def test_fit_and_predict_as_in_python(folder: Path, counts: np.ndarray) -> None:
    fit, prediction, pictures = folder / "fit.nc", folder / "prediction.nc", folder / "new" / "pictures"
    options = ["--bin-width", 0.1, "--seed", 4, "--figures", pictures]
    result = run("fit", folder / "counts.npz", *QUICK, *options, "--output", fit)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "3 trials x 10 bins x 3 units" in result.stdout and "V2 (1)" in result.stdout
    assert {path.name for path in pictures.iterdir()} == {f"{n}.png" for n in "latents eigenvalues trace rates".split()}

    recording = dyn.Recording.from_arrays(counts, bin_width=0.1, region=["V1", "V1", "V2"])
    posterior = dyn.fit(dyn.models.LDS(latent_dim=1), recording, dyn.inference.SVI(steps=3, draws=6), seed=4)
    assert dyn.load(fit)["posterior"].to_dataset().equals(posterior["posterior"].to_dataset())

    result = run("predict", fit, folder / "counts.npz", "--bin-width", 0.1, "--draws", 5, "--output", prediction)
    assert (result.exit_code, result.stderr) == (0, "")
    expected = dyn.predict(posterior, recording, draws=5)
    found = dyn.load(prediction).to_dataset()
    assert found.equals(expected)
    with xr.open_dataset(prediction, engine="h5netcdf") as plain:  # others can read it, too
        assert np.array_equal(plain["expected"].values, expected["expected"].values)


@pytest.mark.parametrize(
    ("engine", "options", "expected"),
    [
        ("laplace", ["--draws", 6], dyn.inference.Laplace(draws=6)),
        ("hmc", ["--draws", 4, "--warmup", 2, "--chains", 8], dyn.inference.HMC(draws=4, warmup=2, chains=8)),
        ("nuts", ["--draws", 4, "--warmup", 2, "--chains", 2], dyn.inference.NUTS(draws=4, warmup=2, chains=2)),
    ],
)
def test_engines_and_readouts_are_chosen_by_name(folder: Path, engine: str, options: list, expected) -> None:
    output = folder / "fit.nc"
    arguments = ["--engine", engine, *options, "--latent-dim", 1, "--readout", "negative-binomial", "--output", output]
    result = run("fit", folder / "counts.nc", *arguments, "--checkpoint", folder / "run.checkpoint")
    assert result.exit_code == 0
    assert (folder / "run.checkpoint").is_file()
    assert repr(expected) in result.stdout
    assert dyn.model_of(dyn.load(output)) == dyn.models.LDS(latent_dim=1, readout=dyn.readouts.NegativeBinomial())
    for line in result.stderr.splitlines():  # chains this short cannot have converged, and one line says so
        assert line.startswith("pyrodyn: warning: ") and ("R-hat" in line or "diverged" in line)
    assert not (engine == "laplace" and result.stderr)
    assert not (engine == "nuts" and not result.stderr)


@pytest.mark.parametrize(
    ("file", "readout"), [("alone.npz", dyn.readouts.Poisson()), ("real.npy", dyn.readouts.Gaussian())]
)
def test_readout_follows_the_data(folder: Path, file: str, readout) -> None:
    output = folder / "fit.nc"
    result = run("fit", folder / file, *QUICK, "--bin-width", 0.1, "--output", output)
    assert result.exit_code == 0
    assert dyn.model_of(dyn.load(output)) == dyn.models.LDS(latent_dim=1, readout=readout)


def test_arrays_are_arguments_by_name_and_the_rest_is_reported(folder: Path, counts: np.ndarray) -> None:
    lengths = np.array([10, 7, 10])
    np.savez(folder / "more.npz", observations=counts, lengths=lengths, session=np.array("monday"), notes=np.zeros(2))
    result = run("fit", folder / "more.npz", *QUICK, "--bin-width", 0.1, "--output", folder / "fit.nc")
    assert result.exit_code == 0
    assert "ignored notes" in one_line(result)
    found = dyn.recording_of(dyn.load(folder / "fit.nc"))
    assert found.session == "monday" and np.array_equal(found.lengths, lengths)


def test_nwb_options_reach_the_reader(folder: Path, counts: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def read_nwb(path, **options):
        seen.update(path=path, **options)
        return dyn.Recording.from_arrays(counts, bin_width=options["bin_width"])

    monkeypatch.setattr(readers, "read_nwb", read_nwb)
    file = folder / "session.nwb"
    file.touch()
    options = ["--trials", "epochs", "--align-to", "go", "--window", -0.2, 0.8]
    assert run("fit", file, *QUICK, "--bin-width", 0.1, *options, "--output", folder / "fit.nc").exit_code == 0
    assert seen == {"path": file, "bin_width": 0.1, "trials": "epochs", "align_to": "go", "window": (-0.2, 0.8)}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("fit missing.npz --bin-width 0.1", 1, "missing.npz: there is no such file"),
        ("fit real.npy --bin-width 0.1 --readout poisson", 1, "Poisson takes non-negative whole counts"),
        ("fit counts.nc --latent-dim 9", 1, "latent_dim is 9 but the recording has 3 units"),
        (
            "fit counts.npz --bin-width 0.1 --engine foo",
            2,
            "'foo' is not one of 'gibbs', 'svi', 'laplace', 'hmc', 'nuts'",
        ),
        ("fit counts.npz --bin-width 0.1 --readout foo", 2, "'foo' is not one of 'poisson'"),
        ("fit counts.npz --bin-width 0.1 --warmup 3", 2, "--engine svi takes no --warmup"),
        ("fit counts.npz --bin-width 0.1 --steps 0", 2, "--steps"),
        ("fit counts.npz --bin-width 0.1 --output nowhere/fit.nc", 1, "there is no folder nowhere"),
        ("fit counts.npz", 2, "give --bin-width"),
        ("fit counts.npz --bin-width 0.1 --align-to go", 2, "--align-to: only for .nwb files"),
        ("fit counts.nc --bin-width 0.1", 2, "has its own"),
        ("fit two.npz --bin-width 0.1", 1, "holds ['one', 'other']"),
        ("fit objects.npy --bin-width 0.1", 1, "objects.npy: not a readable .npy file"),
        ("fit broken.npz --bin-width 0.1", 1, "broken.npz: not a readable .npz file"),
        ("fit text.csv --bin-width 0.1", 2, "text.csv: a recording is a .nc, .npz, .npy or .nwb file"),
        ("fit other.nc", 1, "other.nc: has no variable 'observations'"),
        ("predict counts.nc counts.nc", 1, "not written by pyrodyn.save"),
        ("predict missing.nc counts.nc", 1, "missing.nc: there is no such file"),
        ("fit", 2, "Missing argument"),
        ("fitt", 2, "No such command 'fitt'"),
        ("--nonsense", 2, "--nonsense"),
    ],
)
def test_failures_are_one_line(
    folder: Path, arguments: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = run(*arguments.split())
    assert result.exit_code == code
    assert message in one_line(result)
    assert not (folder / "fit.nc").exists()


def test_damaged_posterior_is_refused(folder: Path) -> None:
    file = folder / "fit.nc"
    assert run("fit", folder / "counts.nc", *QUICK, "--output", file).exit_code == 0
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    result = run("predict", file, folder / "counts.nc", "--output", folder / "prediction.nc")
    assert result.exit_code == 1
    assert str(file) in one_line(result)
    assert not (folder / "prediction.nc").exists()


def test_debug_lets_the_error_through(folder: Path) -> None:
    result = run("--debug", "predict", folder / "counts.nc", folder / "counts.nc")
    assert result.exit_code == 1
    assert isinstance(result.exception, IntegrityError)


def test_python_m_pyrodyn_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["pyrodyn", "fit", str(tmp_path / "missing.npz")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("pyrodyn", run_name="__main__")
    assert stopped.value.code == 1
    assert capsys.readouterr().err.endswith("missing.npz: there is no such file\n")


def test_a_fault_of_the_program_says_how_to_see_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dyn, "load", lambda path: {}["gone"])
    result = run("predict", folder / "counts.nc", folder / "counts.nc")
    assert result.exit_code == 1
    assert "unexpected KeyError: 'gone'" in one_line(result) and "--debug" in one_line(result)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["fit", "--help"]])
def test_help(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: ")


# The demonstration.


def test_demo_writes_what_it_names(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRODYN_DATA", str(data_dir))
    threads = torch.get_num_threads()
    result = run("demo", "--quick", "--output", tmp_path / "demo")
    assert result.exit_code == 0
    assert torch.get_num_threads() == threads
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"bold_svi.nc", "bold_hmc.nc", "spikes_svi.nc", "demo.png", "spikes_rates.png"} <= written
    named = {Path(line.split(": ")[0].strip()) for line in result.stdout.splitlines() if str(tmp_path) in line}
    assert {path.name for path in named} == written
    assert "SVI: mean ± sd [90% interval]" in result.stdout and "HMC: mean ± sd" in result.stdout
    svi, hmc = (dyn.load(tmp_path / "demo" / f"bold_{engine}.nc") for engine in ("svi", "hmc"))
    assert set(svi["posterior"].data_vars) == set(hmc["posterior"].data_vars)
    bold = demo.bold_recording(demo.QUICK.regions).isel(time=slice(demo.QUICK.scans))
    assert dyn.recording_of(svi).digest() == dyn.recording_of(hmc).digest() == bold.digest()


def test_demo_without_nitime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run("demo", "--output", tmp_path / "demo")
    assert result.exit_code == 1
    assert 'pip install "pyrodyn[demo]"' in one_line(result)


def test_bold_recording_has_the_regions_of_the_file(data_dir: Path) -> None:
    recording = demo.bold_recording()
    table = np.genfromtxt(data_dir / "nitime_fmri" / "fmri_timeseries.csv", delimiter=",", names=True, deletechars='"')
    assert recording.bin_width == 1.89 and not recording.counts
    assert recording.unit.tolist() == [name.strip('"') for name in table.dtype.names[3:]]
    columns = np.array([table[name] for name in table.dtype.names[3:]]).T
    assert np.array_equal(recording.observations.numpy()[0], columns)


def test_spikes_recording_sums_pairs_of_bins(data_dir: Path) -> None:
    recording = demo.spikes_recording(data_dir / demo.SESSION, units=7, trials=5, new_trials=2)
    with np.load(data_dir / demo.SESSION) as held:
        spikes, area = held["spikes"].astype(int), held["brain_area"]
    total = spikes[:5].sum((0, 2))
    others = np.delete(total, recording.unit)
    assert total[recording.unit].min() >= others.max()
    assert recording.region.tolist() == area[recording.unit].tolist()
    assert recording.split.tolist() == ["train"] * 5 + ["test"] * 2
    trial, bin_, unit = 6, 4, 3
    pair = spikes[trial, recording.unit[unit], 2 * bin_ : 2 * bin_ + 2].sum()
    assert recording.observations[trial, bin_, unit] == pair
    assert recording.observations.sum() == spikes[:7, recording.unit].sum()


def known(moduli: list[float], angle: float, bin_width: float) -> xr.DataTree:
    """A posterior of one latent with these moduli over four draws."""
    coords = {"latent": [0]}
    values = np.reshape(moduli, (1, 4, 1))
    invariants = {
        "eigenvalue_modulus": (("chain", "draw", "latent"), values),
        "eigenvalue_angle": (("chain", "draw", "latent"), np.full_like(values, angle)),
    }
    data = xr.Dataset(attrs={"bin_width": bin_width})
    return xr.DataTree.from_dict({"invariants": xr.Dataset(invariants, coords), "constant_data": data})


def test_compare_summaries_in_seconds_and_hertz() -> None:
    one, two = known([0.5, 0.5, 0.7, 0.7], np.pi / 2, 0.2), known([0.8, 0.8, 1.0, 1.0], 0.0, 0.2)
    header, modulus, time_constant, frequency = demo.compare_summaries({"A": one, "B": two}).splitlines()
    assert header.split() == "A: mean ± sd [90% interval] B: mean ± sd [90% interval] difference/sd".split()
    assert modulus.split()[3:] == "0.6 ± 0.1 [0.5, 0.7] 0.9 ± 0.1 [0.8, 1] 3.00".split()
    # Half the size after one bin of .2 s: a time constant of .2 / ln 2 = .289 s; and .2 / -ln .7 = .561 s.
    assert "0.425 ± 0.14 [0.289, 0.561]" in time_constant
    assert "0.896 ± 0 [0.896, 0.896]" in time_constant  # modulus 1 has no finite time constant
    assert "1.25 ± 0 [1.25, 1.25]" in frequency  # a quarter turn in .2 s
    assert frequency.split()[-1] == "-"
