"""Which backend serves an op: the default for the device, or the one that was forced.

CUDA -> triton, CPU -> native, anything else or anything missing -> reference. `backend=` or the environment variable
INFER_FAST_BACKEND forces one, and then it serves or fails loudly.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch

from infer_fast.errors import InferFastError, InferFastWarning, first_line

BACKENDS = ("reference", "native", "triton")
EXTENSION = "infer_fast._native"
NOT_BUILT = f"the extension {EXTENSION} was not built (reinstall where a C++17 compiler is found)"


def _load() -> tuple[ModuleType | None, str]:
    """(the extension, ""), or (None, why not). Whatever a broken build raises, the import goes on: native() says it."""
    try:
        return importlib.import_module(EXTENSION), ""
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError) or error.name != EXTENSION:
            return None, _does_not_load(first_line(error))
    others = [path.name for path in Path(__file__).parents[1].glob("_native.*")]
    return None, _does_not_load(f"{others[0]} is another Python's") if others else NOT_BUILT


def _does_not_load(reason: str) -> str:
    return f"the extension {EXTENSION} does not load ({reason}): reinstall infer_fast"


_native, _why_no_native = _load()
_said: set[str] = set()


def _say_once(sentence: str) -> None:
    """Warns of what would otherwise only be slower; not while torch.compile traces, which can't go through that."""
    if not torch.compiler.is_compiling() and sentence not in _said:
        _said.add(sentence)
        warnings.warn(sentence, InferFastWarning, stacklevel=2)


HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter is on: its kernels then run in Python on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def native() -> ModuleType | None:
    """The compiled CPU backend, or None where it was not built or, with a warning, does not load."""
    if _why_no_native not in ("", NOT_BUILT):
        _say_once(f"CPU tensors take the reference, slower: {_why_no_native}.")
    return _native


def compiled() -> ModuleType:
    """native(), for an op that was told to use it."""
    module = native()
    if module is None:
        raise InferFastError(f"The native backend can't serve: {_why_no_native or NOT_BUILT}.")
    return module


def buffer(tensor: torch.Tensor | None) -> tuple[int, int]:
    """(address, bytes) of a contiguous CPU tensor, (0, 0) for None: what the native backend takes."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.nbytes)


def choose(op: str, tensor: torch.Tensor, backend: str | None, dtypes: Mapping[str, tuple[torch.dtype, ...]]) -> str:
    """The backend that serves `op` on `tensor`.

    dtypes: for each compiled backend this op has, the dtypes it takes. Raises InferFastError when a forced backend
    (argument first, then INFER_FAST_BACKEND) is unknown or can't serve.
    """
    forced = backend or os.environ.get("INFER_FAST_BACKEND")
    if forced is None:
        default = {"cuda": "triton", "cpu": "native"}.get(tensor.device.type, "reference")
        reason = why_not(op, tensor, default, dtypes)
        if reason == NOT_BUILT:
            _say_once(f"CPU tensors take the reference, slower: {NOT_BUILT}.")
        return default if reason is None else "reference"
    if forced not in BACKENDS:
        raise InferFastError(f"{forced!r} is not a backend: choose one of {', '.join(BACKENDS)}.")
    reason = why_not(op, tensor, forced, dtypes)
    if reason is not None:
        raise InferFastError(f"The {forced} backend was asked for but can't serve {op}: {reason}.")
    return forced


def why_not(op: str, tensor: torch.Tensor, backend: str, dtypes: Mapping[str, tuple[torch.dtype, ...]]) -> str | None:
    """Why `backend` can't serve `op` on `tensor`, or None if it can."""
    if backend == "reference":
        return None
    if backend not in dtypes:
        return f"{op} has no {backend} version"
    device = "cpu" if backend == "native" or interpreted() else "cuda"
    if tensor.device.type != device:
        return f"it runs on {device} tensors, this one is on {tensor.device.type}"
    if tensor.dtype not in dtypes[backend]:
        return f"it does not take {tensor.dtype}"
    if backend == "native" and native() is None:
        return _why_no_native or NOT_BUILT
    if backend == "triton" and not HAS_TRITON:
        return "Triton is not installed"
    return None
