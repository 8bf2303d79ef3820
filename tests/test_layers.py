"""The house: each room imports only from the rooms below it, and no imports go in a circle."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STOREYS = (  # from the ground up; rooms in one pair of braces may import each other, though never in a circle
    {"errors", "exported", "extras", "files", "flags", "keys", "markup", "process", "progress"}
    | {"ranges", "recipes", "run_folder", "settings", "void"},
    {"kernels", "_native"},
    {"ops"},
    {"models"},
    {"data"},
    {"synthesis"},
    {"students"},
    {"", "cli"},
    {"squeeze"},
    {"relabel", "report", "export", "dry_run", "curve"},
    {"judging"},
    {"validate"},
    {"job"},
    {"distill"},
)
APART = {("models", "data"), ("data", "models")}  # of one storey


def modules() -> dict[str, Path]:
    """Every module of the package: name without `infer_fast.` (the package itself is empty) -> file."""
    found = {}
    for folder, prefix in ((ROOT / "infer_fast", ()), (ROOT / "kernels", ("kernels",))):
        for file in folder.rglob("*.py"):
            parts = (*prefix, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, source: str, known: set[str]) -> set[str]:
    """The package's own modules that `source` imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            whole = [alias.name for alias in node.names]
        else:
            continue
        for path in whole:
            if path.split(".")[0] == "infer_fast":
                own = path.removeprefix("infer_fast").removeprefix(".")
                while own and own not in known:
                    own = own.rpartition(".")[0]
                found.add("_native" if path == "infer_fast._native" else own)
    return found - {name}


@cache
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, file.read_text(), {*known, "_native"}) for name, file in known.items()}


def storey(name: str) -> int:
    """The storey of a module's room; a module that stands in none is an error."""
    room = name.split(".")[0]
    return next(level for level, rooms in enumerate(STOREYS) if room in rooms)


def faults(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go up, or across between rooms that stand apart."""
    found = []
    for name, imported in graph.items():
        for other in sorted(imported):
            rooms = name.split(".")[0], other.split(".")[0]
            if storey(other) > storey(name) or rooms in APART:
                found.append(f"{name or 'infer_fast'} imports {other or 'infer_fast'}")
    return found


def test_each_room_imports_only_from_the_rooms_below_it():
    assert faults(graph()) == []


def test_no_imports_go_in_a_circle():
    TopologicalSorter(graph()).prepare()


def test_a_room_that_stands_nowhere_and_imports_that_go_up_or_in_a_circle_are_noticed():
    planted = {**graph(), "ops.perturb": {"models.train"}, "data.pixels": {"models.build"}}
    assert faults(planted) == ["ops.perturb imports models.train", "data.pixels imports models.build"]
    with pytest.raises(CycleError):
        TopologicalSorter({**graph(), "files": {"errors", "extras"}, "errors": {"files"}}).prepare()
    with pytest.raises(StopIteration):
        storey("helpers.strings")
    inside = "def f():\n    from infer_fast.data import loader\n    import infer_fast.files as kept\n"
    assert imports("ops.x", inside, set(graph())) == {"data.loader", "files"}


def test_the_benchmarks_and_tests_are_never_imported_by_the_package():
    for file in modules().values():
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else
                         [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        }  # fmt: skip
        assert not names & {"bench", "tests"}, file
