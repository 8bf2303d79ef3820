"""How networks are run: precision, engine and backend, resolved for a device once and carried as one value."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from infer_fast.errors import InferFastError, InferFastWarning
from infer_fast.models.engine import choose_engine
from infer_fast.settings import Precision

PRECISIONS = get_args(Precision)
AUTOCAST = {"float32": False, "tf32": False, "bfloat16": True}  # the precisions that a pass can have


@dataclass(frozen=True)
class Execution:
    """How passes are run, as it was asked for; on(device) is what that means there.

    precision: of the networks' passes (weights, losses and what is optimised stay float32), see choose_precision;
    engine: see infer_fast.models.engine; backend: of the fused ops, auto is the fastest for the device.
    any_engine: auto chose the engine, and where a network can't be captured, eager serves as well.
    """

    precision: str = "auto"
    engine: str = "auto"
    backend: str = "auto"
    any_engine: bool = False

    def on(self, device: torch.device) -> Execution:
        """The same with nothing left to choose but the backend, which each op chooses for its tensor.

        Raises InferFastError for a name nobody knows, or what `device` can't do.
        """
        return replace(
            self,
            precision=choose_precision(device, self.precision),
            engine=choose_engine(self.engine, device),
            any_engine=self.any_engine or self.engine == "auto",
        )

    @property
    def forced_backend(self) -> str | None:
        """The backend for an op's `backend=`: None where it may choose."""
        return None if self.backend == "auto" else self.backend


AUTO = Execution()


def choose_precision(device: torch.device, precision: str) -> str:
    """What `precision` means on `device`: auto is bfloat16 on CUDA and float32 elsewhere; fast is bfloat16 also where
    the processor has instructions for it. Warns of a bfloat16 that was asked for by name where it has none.

    Raises InferFastError for an unknown precision, or TF32 where no tensor core rounds to it.
    """
    if precision not in PRECISIONS:
        raise InferFastError(f"{precision!r} is not a precision: choose one of {', '.join(PRECISIONS)}.")
    if precision == "tf32" and device.type != "cuda":
        raise InferFastError(f"tf32 is a mode of CUDA devices, this run is on {device.type}: choose float32.")
    if precision in ("auto", "fast"):
        pays = device.type == "cuda" or (precision == "fast" and processor_has_bfloat16())
        return "bfloat16" if pays else "float32"
    if precision == "bfloat16" and device.type == "cpu" and not processor_has_bfloat16():
        warnings.warn("This processor emulates bfloat16: float32 is several times faster here.", InferFastWarning, 2)
    return precision


def dtype_of(precision: str) -> torch.dtype:
    """Of what a pass is given, in a precision that choose_precision has returned."""
    return torch.bfloat16 if AUTOCAST[precision] else torch.float32


def processor_has_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 kernels for this processor; emulated, they are slower than float32's."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def at_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Passes inside it run in float32, in tf32 (convolutions and matrix products), or in bfloat16 autocast.

    precision: one that choose_precision has returned.
    """
    flags: tuple[Any, Any] = torch.backends.cudnn, torch.backends.cuda.matmul  # torch types the flag of neither alike
    before = [f.allow_tf32 for f in flags]
    for f in flags:
        f.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=AUTOCAST[precision]):
            yield
    finally:
        for f, value in zip(flags, before, strict=True):
            f.allow_tf32 = value
