"""Rules that a reader of one file cannot see: layers, import cycles, declared dependencies, unsafe calls."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "pyrodyn"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# From the ground up. A module may import from the layers before its own and from its own package; two names in one
# layer never import each other. A new module is put where its imports allow, or the tests below fail.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(layer.split())
    for layer in (
        "errors",
        "_files _hdf5_guard _manifest _recording_checks progress",
        "_recording_selection _recording_values",
        "recording",
        "checkpoint storage",
        "readers systems",
        "linalg",
        "distributions",
        "readouts networks integrators",
        "conditioning",
        "expectations",
        "program shooting smoothing",
        "alignment drifts",
        "conditionals diffusion",
        "guides",
        "models inference",
        "diagnostics",
        "posterior",
        "sessions",
        "fitting",
        "scoring statistics coupling decoding geometry",
        "evaluation",
        "comparison checks calibration",
        "plots",
        "report",
        "__init__",
        "demo _cli_files",
        "cli",
        "__main__",
    )
)

# What an installation without extras has, by the name in an import.
CORE_IMPORTS = frozenset(
    "torch pyro torchdiffeq numpy scipy sklearn xarray h5netcdf h5py networkx arviz_base arviz_stats "
    "matplotlib numba threadpoolctl tqdm typer".split()
)
# What an extra brings: imported inside the function that needs it, so that `import pyrodyn` works without.
EXTRA_IMPORTS = frozenset("pynwb hdmf pynapple nitime gudhi umap".split())

UNSAFE_MODULES = frozenset("pickle cloudpickle dill joblib marshal shelve".split())
UNSAFE_CALLS = frozenset(
    "eval exec compile __import__ torch.load torch.jit.load joblib.load yaml.load yaml.unsafe_load".split()
)


def parsed() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name below the package; the package itself is `__init__`."""
    modules = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        modules[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return modules


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[ast.stmt, str]]:
    """Absolute dotted name of everything imported anywhere in the tree, at the top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *([] if module == "__init__" else module.split("."))]
                above = here[: len(here) - node.level + (is_package or module == "__init__")]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)


def graph(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which modules of the package each one imports when it runs. A name that is no module counts as its parent.

    What stands under TYPE_CHECKING is for a type checker alone.
    """
    packages = {name.rpartition(".")[0] for name in modules}
    edges: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in modules.items():
        typing_only = {
            child
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING")
            for child in ast.walk(node)
        }
        for node, target in imported(tree, name, name in packages):
            if node in typing_only:
                continue
            head, _, rest = target.partition(".")
            if head != PACKAGE:
                continue
            while rest and rest not in modules:
                rest = rest.rpartition(".")[0]
            edges[name].add(rest or "__init__")
    return edges


def layer_faults(edges: dict[str, set[str]]) -> list[str]:
    height = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    faults = [f"{top} stands in no layer" for top in sorted({n.split(".")[0] for n in edges} - height.keys())]
    for name, targets in edges.items():
        top = name.split(".")[0]
        for target in sorted(targets):
            other = target.split(".")[0]
            if other != top and height.get(other, -1) >= height.get(top, len(LAYERS)):
                faults.append(f"{name} imports {target}, which is not below it")
    return faults


def cycle(edges: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(tree: ast.Module) -> list[str]:
    """Lines that could run code from a file, and imports of the umbrella package arviz, which breaks on Python 3.11."""
    # The one door for users of ArviZ 0.x opens only when they call it.
    allowed = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "to_inferencedata"
        for child in ast.walk(node)
    }
    faults = []
    for node, target in imported(tree, "", False):
        head = target.split(".")[0]
        if head in UNSAFE_MODULES or target in UNSAFE_CALLS or (head == "arviz" and node not in allowed):
            faults.append(f"line {node.lineno}: imports {target}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        pickled = [k for k in node.keywords if k.arg == "allow_pickle" and getattr(k.value, "value", True) is not False]
        if name in UNSAFE_CALLS or name.endswith("read_pickle") or pickled:
            faults.append(f"line {node.lineno}: calls {name}")
    return faults


def undeclared(tree: ast.Module) -> list[str]:
    """Imports of packages that pyproject.toml does not require, and of an extra's packages at the top of a module."""
    at_top = {
        child for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef) for child in ast.walk(node)
    }
    typing_only = {
        child
        for node in tree.body
        if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING")
        for child in ast.walk(node)
    }
    faults = []
    for node, target in imported(tree, "", False):
        head = target.split(".")[0]
        if head in sys.stdlib_module_names or head in CORE_IMPORTS or head == PACKAGE or (head == "arviz"):
            continue
        if head not in EXTRA_IMPORTS:
            faults.append(f"line {node.lineno}: {head} is not a dependency")
        elif node in at_top - typing_only:
            faults.append(
                f"line {node.lineno}: {head} belongs to an extra; import it inside the function that needs it"
            )
    return faults


def test_imports_point_down_the_layers() -> None:
    assert layer_faults(graph(parsed())) == []


def test_no_import_cycle() -> None:
    assert cycle(graph(parsed())) == []


@pytest.mark.parametrize("check", [unsafe, undeclared])
def test_package_is_free_of(check) -> None:
    faults = [f"{name}: {fault}" for name, tree in parsed().items() for fault in check(tree)]
    assert faults == []


# The checks themselves, on planted faults.


def planted(**sources: str) -> dict[str, set[str]]:
    return graph({name.replace("__dot__", "."): ast.parse(source) for name, source in sources.items()})


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("recording", "from pyrodyn.errors import RecordingError", 0),
        ("recording", "from pyrodyn.plots import latents", 1),
        ("models", "from pyrodyn import inference", 1),
        ("inference", "def run():\n    from pyrodyn.models import LDS", 1),
        ("linalg", "from .recording import Recording\nfrom . import readouts", 1),
        ("linalg", "import pyrodyn", 1),
        ("unheard_of", "", 1),
    ],
)
def test_layer_faults_are_found(name: str, source: str, found: int) -> None:
    others = {top: "" for layer in LAYERS for top in layer if top != name}
    assert len(layer_faults(planted(**others, **{name: source}))) == found


def test_cycles_are_found() -> None:
    linear = planted(linalg="", linalg__dot__a="from pyrodyn.linalg import b", linalg__dot__b="")
    assert cycle(linear) == []
    knot = planted(linalg="", linalg__dot__a="from .b import f", linalg__dot__b="def f():\n    from . import a")
    assert set(cycle(knot)) == {"linalg.a", "linalg.b"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", 1),
        ("from joblib import load", 1),
        ("from torch import load", 1),
        ("torch.load(path, weights_only=True)", 1),
        ("yaml.load(text)", 1),
        ("np.load(path, allow_pickle=True)", 1),
        ("np.load(path, allow_pickle=flag)", 1),
        ("np.load(path, allow_pickle=False)", 0),
        ("eval(text)", 1),
        ("model.eval()", 0),
        ("import arviz", 1),
        ("import arviz_base", 0),
        ("def to_inferencedata(tree):\n    import arviz", 0),
        ("def summary(tree):\n    from arviz import summary", 1),
    ],
)
def test_unsafe_lines_are_found(source: str, found: int) -> None:
    assert len(unsafe(ast.parse(source))) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import json, torch", 0),
        ("import requests", 1),
        ("import pynwb", 1),
        ("try:\n    import pynwb\nexcept ImportError:\n    pynwb = None", 1),
        ("def read():\n    import pynwb", 0),
        ("if TYPE_CHECKING:\n    import pynwb", 0),
    ],
)
def test_undeclared_imports_are_found(source: str, found: int) -> None:
    assert len(undeclared(ast.parse(source))) == found
