"""The choice of backend."""

import importlib
import subprocess
import sys
import warnings

import pytest
import torch

from infer_fast.errors import InferFastError, InferFastWarning
from infer_fast.ops import backend as backends

DTYPES = {"native": (torch.float32,)}
# A program in which the extension is found but does not load; the import must not mind, even with warnings as errors.
BROKEN = """
import importlib.abc, importlib.machinery, sys, warnings

class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "infer_fast._native" else None

    def create_module(self, spec):
        raise ImportError("undefined symbol: _ZN3xyzEv")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Broken())
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import torch
    from infer_fast.ops import bn_match, backend
ones = torch.ones(3)
for _ in range(2):
    y, _ = bn_match(torch.ones(2, 3, 4, 4), ones, ones, ones, ones, 1e-5)
assert backend.native() is None and torch.equal(y, torch.ones(2, 3, 4, 4))
"""


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.delenv("INFER_FAST_BACKEND", raising=False)


def test_the_cpu_default_is_native_where_it_was_built(monkeypatch):
    monkeypatch.setattr(backends, "native", lambda: object())
    assert backends.choose("op", torch.zeros(1), None, DTYPES) == "native"
    assert backends.choose("op", torch.zeros(1, dtype=torch.float64), None, DTYPES) == "reference"
    monkeypatch.setattr(backends, "native", lambda: None)
    with pytest.warns(InferFastWarning):
        assert backends.choose("op", torch.zeros(1), None, DTYPES) == "reference"


def test_a_forced_backend_that_cannot_serve_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "native", lambda: None)
    with pytest.raises(InferFastError, match="was not built"):
        backends.choose("op", torch.zeros(1), "native", DTYPES)
    with pytest.raises(InferFastError, match="has no triton version"):
        backends.choose("op", torch.zeros(1), "triton", DTYPES)
    with pytest.raises(InferFastError, match="float64"):
        backends.choose("op", torch.zeros(1, dtype=torch.float64), "native", DTYPES)
    with pytest.raises(InferFastError, match="not a backend"):
        backends.choose("op", torch.zeros(1), "cuda", DTYPES)


def test_the_environment_forces_and_the_argument_wins(monkeypatch):
    monkeypatch.setattr(backends, "native", lambda: object())
    monkeypatch.setenv("INFER_FAST_BACKEND", "reference")
    assert backends.choose("op", torch.zeros(1), None, DTYPES) == "reference"
    assert backends.choose("op", torch.zeros(1), "native", DTYPES) == "native"


def test_that_native_was_not_built_is_said_once_by_the_first_cpu_tensor_it_would_have_served(monkeypatch):
    monkeypatch.setattr(backends, "_native", None)
    monkeypatch.setattr(backends, "_why_no_native", backends.NOT_BUILT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.native() is None
        backends.choose("op", torch.zeros(1, dtype=torch.float64), None, DTYPES)
        backends.choose("op", torch.zeros(1, device="meta"), None, DTYPES)
        backends.choose("op", torch.zeros(1), None, {})
        backends.choose("op", torch.zeros(1), "reference", DTYPES)
    with pytest.warns(InferFastWarning, match="slower.*was not built.*C\\+\\+17 compiler") as told:
        for _ in range(2):
            assert backends.choose("op", torch.zeros(1), None, DTYPES) == "reference"
    assert len(told) == 1


@pytest.mark.slow
def test_an_extension_that_does_not_load_is_said_once_and_breaks_no_import():
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("InferFastWarning") == 1
    assert "does not load (undefined symbol: _ZN3xyzEv)" in done.stderr


def test_an_extension_that_was_built_for_another_python_is_named(monkeypatch, tmp_path):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "ops" / "backend.py"))
    assert backends._load() == (None, backends.NOT_BUILT)
    (tmp_path / "_native.cpython-27-x86_64-linux-gnu.so").touch()
    assert "cpython-27" in backends._load()[1] and "does not load" in backends._load()[1]


def test_a_broken_extension_is_why_native_can_not_be_forced(monkeypatch):
    monkeypatch.setattr(backends, "_native", None)
    monkeypatch.setattr(backends, "_why_no_native", backends._does_not_load("undefined symbol"))
    with pytest.raises(InferFastError, match="undefined symbol"), pytest.warns(InferFastWarning):
        backends.choose("op", torch.zeros(1), "native", DTYPES)
