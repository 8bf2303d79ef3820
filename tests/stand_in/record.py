"""What is asked of the stand-in: Triton's launches, what captures hold, and hazards that would fail on a GPU."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, KernelParam

from infer_fast.models.surgery import MatchedTeacher
from tests.stand_in.process import RUNTIME

aten = torch.ops.aten
LIBRARY = {  # ops that cuDNN and cuBLAS serve: what they launch can't be known here
    aten.addmm.default,
    aten.baddbmm.default,
    aten.bmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.mm.default,
    aten.native_batch_norm.default,
    aten.native_batch_norm_backward.default,
    aten.cudnn_batch_norm.default,
    aten.cudnn_batch_norm_backward.default,
    aten._batch_norm_with_update.default,
    aten.batch_norm_backward.default,
}
# Ops that take tensors of two devices: copies, and indices on the host of a tensor on the device.
BETWEEN_DEVICES = {"copy_", "_to_copy", "_foreach_copy_", "index", "index_put_", "_index_put_impl_", "set_"}
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # of a grid, in each direction


def runtime() -> ctypes.CDLL:
    """The preloaded runtime, for the functions that no CUDA has."""
    library = ctypes.CDLL(os.environ[RUNTIME])
    library.stand_in_violations.restype = ctypes.c_char_p
    return library


def violations() -> list[str]:
    """What captures forbade and the runtime was asked for all the same, since the process began."""
    return runtime().stand_in_violations().decode().splitlines()


@dataclass
class Record:
    """What was asked for. `captured` is that of captures alone.

    variants: specialisations of Triton kernels that would be compiled; tuned: keys that the autotuner has met;
    launches, library: Triton's launches by kernel, and cuDNN's and cuBLAS's by op; noted: hazards, in words.
    """

    variants: set[tuple] = field(default_factory=set)
    tuned: set[tuple] = field(default_factory=set)
    launches: Counter[str] = field(default_factory=Counter)
    captured_launches: Counter[str] = field(default_factory=Counter)
    captured_library: Counter[str] = field(default_factory=Counter)
    noted: list[str] = field(default_factory=list)
    earlier: int = field(default_factory=lambda: len(violations()))  # the runtime keeps those of the whole process

    def hazards(self) -> list[str]:
        """Everything that would fail or wait on a GPU: what was noted here, and by the runtime."""
        return sorted({*self.noted, *(f"{what} inside a capture" for what in violations()[self.earlier :])})

    def check(self) -> None:
        """Raises AssertionError if there was a hazard."""
        found = self.hazards()
        assert not found, "; ".join(found)

    def note_op(self, function: torch._ops.OpOverload, tensors: Sequence[torch.Tensor]) -> None:
        """Looks at an op before it is run: host tensors where they have no place."""
        name = function._schema.name.split("::")[1]
        hosted = [t for t in tensors if t.device.type == "cpu" and t.dim() > 0]  # a number may come from the host
        if hosted and any(t.is_cuda for t in tensors) and name not in BETWEEN_DEVICES:
            self.noted.append(f"{function} mixes tensors of host and device")
        if not torch.cuda.is_current_stream_capturing():
            return
        if hosted:
            self.noted.append(f"{function} takes a host tensor {tuple(hosted[0].shape)} inside a capture")
        if name == "_local_scalar_dense":
            self.noted.append("a tensor is read by the host inside a capture")
        if function in LIBRARY:
            self.captured_library[name] += 1

    def note_launch(self, kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any], grid: Any) -> None:
        """Looks at one launch of a Triton kernel."""
        name, capturing = kernel.__name__, torch.cuda.is_current_stream_capturing()
        variant = _variant(kernel, arguments, options)
        if capturing and variant not in self.variants:
            self.noted.append(f"{name} is compiled inside a capture")
        self.variants.add(variant)
        self.launches[name] += 1
        if capturing:
            self.captured_launches[name] += 1
        programs = grid(arguments) if callable(grid) else grid
        if any(not 0 < n <= most for n, most in zip(programs, MOST_PROGRAMS, strict=False)):
            self.noted.append(f"{name} has a grid of {tuple(programs)}")
        for argument, value in arguments.items():
            if isinstance(value, torch.Tensor) and not value.is_cuda:
                self.noted.append(f"{name} is given {argument} on the host")


def _variant(kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any]) -> tuple:
    """What Triton compiles a kernel anew for: constants, types, and what it knows of numbers and addresses."""
    parts: list[object] = [kernel.__name__, options.get("num_warps")]
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr:
            parts.append((name, str(value)))
        elif isinstance(value, torch.Tensor):
            aligned = value.data_ptr() % 16 == 0 and not _unaligned(parameter)
            parts.append((name, value.dtype, aligned))
        elif isinstance(value, int) and not isinstance(value, bool):
            known = (value == 1, value % 16 == 0) if not parameter.do_not_specialize else ()
            parts.append((name, *known, -(2**31) <= value < 2**31))
        else:
            parts.append((name, type(value)))
    return tuple(parts)


def _unaligned(parameter: KernelParam) -> bool:
    """Whether a kernel is compiled without looking at what this address is a multiple of."""
    return parameter.do_not_specialize or parameter.do_not_specialize_on_alignment


@contextmanager
def recorded_launches(record: Record) -> Iterator[None]:
    """Triton's kernels are neither compiled nor run, but noted; the autotuner tries all configurations of a new key."""

    def run(kernel: JITFunction, *values: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        arguments = dict(zip(kernel.arg_names, values, strict=False))
        arguments |= {name: value for name, value in options.items() if name in kernel.arg_names}
        record.note_launch(kernel, arguments, options, grid)

    def tune(tuner: Autotuner, *values: Any, **options: Any) -> None:
        given = dict(zip(tuner.arg_names, values, strict=False)) | options
        types = [str(v.dtype) for n, v in given.items() if n in tuner.arg_names and isinstance(v, torch.Tensor)]
        key = (tuner.base_fn.__name__, *(given[name] for name in tuner.keys), *types)
        if key not in record.tuned:
            if torch.cuda.is_current_stream_capturing():
                record.noted.append(f"{key[0]} is tuned inside a capture")
            record.tuned.add(key)
            for config in tuner.configs:
                tuner.fn.run(*values, **options, **config.all_kwargs())
        tuner.fn.run(*values, **options, **tuner.configs[0].all_kwargs())

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(Autotuner, "run", tune):
        yield


class Idle(TorchDispatchMode):
    """Nothing is computed: kernels do nothing, and what libraries would return is empty. For counting, not for values.

    The memory of what is passed on is real, so that it is counted as on a GPU.
    """

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.record.note_op(function, tensors)
        if function in LIBRARY and any(t.is_cuda for t in tensors):
            return _empty_results(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


@contextmanager
def idle() -> Iterator[Record]:
    """Inside it nothing is computed, so no network is held against another. Fails at its end if there was a hazard."""
    record = Record()
    with recorded_launches(record), Idle(record), mock.patch.object(MatchedTeacher, "check", lambda *_: None):
        yield record
    record.check()


def _empty_results(function: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Tensors like those that the op would return."""
    mode = FakeTensorMode()

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return FakeTensor(mode, meta, value.device)

    def empty(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    faked = tree_map(fake, (args, kwargs))
    with mode:
        results = function(*faked[0], **faked[1])
    return tree_map(empty, results)
