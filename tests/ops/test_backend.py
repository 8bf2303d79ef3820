"""The choice of backend."""

import pytest
import torch

from infer_fast.errors import InferFastError
from infer_fast.ops import backend as backends

DTYPES = {"native": (torch.float32,)}


def test_the_cpu_default_is_native_where_it_was_built(monkeypatch):
    monkeypatch.delenv("INFER_FAST_BACKEND", raising=False)
    monkeypatch.setattr(backends, "native", lambda: object())
    assert backends.choose("op", torch.zeros(1), None, DTYPES) == "native"
    assert backends.choose("op", torch.zeros(1, dtype=torch.float64), None, DTYPES) == "reference"
    monkeypatch.setattr(backends, "native", lambda: None)
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
