"""Which backend serves an op: the default for the device, or the one that was forced.

CUDA -> triton, CPU -> native, anything else or anything missing -> reference. `backend=` or the environment variable
INFER_FAST_BACKEND forces one, and then it serves or fails loudly.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from types import ModuleType

import torch

from infer_fast.errors import InferFastError

BACKENDS = ("reference", "native", "triton")


try:
    from infer_fast import _native
except ImportError:  # no compiler when it was installed: the reference serves
    _native = None


HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter is on: its kernels then run in Python on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def native() -> ModuleType | None:
    """The compiled CPU backend, or None where it was not built."""
    return _native


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
        return default if why_not(op, tensor, default, dtypes) is None else "reference"
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
        return "the extension infer_fast._native was not built (reinstall where a C++17 compiler is found)"
    if backend == "triton" and not HAS_TRITON:
        return "Triton is not installed"
    return None
