"""What an install brings and needs. `.ci/packages` builds and tries the real thing; this takes a moment."""

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import setuptools

import infer_fast

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "infer_fast").rglob("*.py"))
# What a plain install brings on every system. Triton is missing here: it comes on Linux alone.
PLAIN = {"PIL", "numpy", "rich", "safetensors", "sklearn", "torch", "torchvision", "tyro"}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What setup.py hands to setuptools. pybind11 is needed for a build alone, so it may be missing here."""
    handed = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "pybind11", MagicMock())
    monkeypatch.setitem(sys.modules, "pybind11.setup_helpers", MagicMock(build_ext=object))
    monkeypatch.setattr(setuptools, "setup", handed.update)
    runpy.run_path("setup.py")
    return handed


def imported_at_once(node: ast.AST) -> Iterator[str]:
    """The top-level packages that importing a module imports: not those in functions or for type checkers."""
    if isinstance(node, ast.Import):
        yield from (alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield (node.module or "").split(".")[0] if node.level == 0 else "infer_fast"
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.orelse:
            yield from imported_at_once(child)
    elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        for child in ast.iter_child_nodes(node):
            yield from imported_at_once(child)


def test_every_folder_with_code_is_packaged(settings):
    folders = {".".join(module.parent.relative_to(ROOT).parts) for module in MODULES}
    assert sorted(settings["packages"]) == sorted({*folders, "infer_fast.kernels"})
    assert (ROOT / settings["package_dir"]["infer_fast.kernels"] / "__init__.py").exists()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_extras_are_imported_only_where_they_are_used(module):
    found = set(imported_at_once(ast.parse(module.read_text())))
    assert found <= PLAIN | sys.stdlib_module_names | {"infer_fast"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import matplotlib.pyplot as plt, torch", {"matplotlib", "torch"}),
        ("try:\n    from nvidia.dali import fn\nexcept ImportError:\n    fn = None", {"nvidia"}),
        ("class A:\n    import timm", {"timm"}),
        ("def f():\n    import wandb", set()),
        ("if TYPE_CHECKING:\n    import pyarrow\nelse:\n    import rich", {"rich"}),
        ("from . import files", {"infer_fast"}),
    ],
)
def test_what_counts_as_imported_at_once(source, found):
    assert set(imported_at_once(ast.parse(source))) == found


def test_the_change_log_begins_with_this_version():
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == infer_fast.__version__


def test_type_checkers_are_told_that_there_are_types():
    assert (ROOT / "infer_fast" / "py.typed").exists()
