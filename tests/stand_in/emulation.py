"""Everything that kernels would do, computed on the CPU over the same addresses; CUDA graphs are tapes that replay.

Emulated are torch's ops (by their CPU versions), convolutions and matrix products among them, and each launcher in
infer_fast.kernels (by plain PyTorch, once the launcher has run, so that what it allocates and launches is recorded).
Views, allocations and everything about streams and captures are torch's own. Random numbers are the CPU generator's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from infer_fast.kernels import adam, bn_match, compose, max_pool, objective, perturb, scale_shift, view
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.stand_in import arithmetic
from tests.stand_in.record import Record, recorded_launches

EMPTY = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
OWN = {"record_stream", "is_pinned", "_pin_memory", "pin_memory", "set_", "detach", "alias", "resize_"}  # torch does it
LAUNCHERS: dict[tuple[ModuleType, str], Callable[..., None]] = {
    (adam, "adam"): arithmetic.adam,
    (bn_match, "forward"): arithmetic.bn_match_forward,
    (bn_match, "backward"): arithmetic.bn_match_backward,
    (compose, "compose"): arithmetic.compose,
    (max_pool, "forward"): arithmetic.max_pool_forward,
    (max_pool, "backward"): arithmetic.max_pool_backward,
    (objective, "forward"): arithmetic.objective_forward,
    (objective, "backward"): arithmetic.objective_backward,
    (perturb, "perturb"): arithmetic.perturb,
    (view, "view"): arithmetic.view,
    (view, "sum_back"): arithmetic.sum_back,
    (view, "uncropped"): arithmetic.uncropped,
    (scale_shift, "scale_shift"): arithmetic.scale_shift,
}


@dataclass(frozen=True)
class Place:
    """Where a device tensor lies. It keeps no memory alive: a graph's addresses are its pool's."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Place:
        return cls(tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def on_cpu(self) -> torch.Tensor:
        """A CPU tensor over the same memory."""
        if 0 in self.shape:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        count = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        memory = (ctypes.c_char * (count * self.dtype.itemsize)).from_address(self.address)
        return torch.frombuffer(memory, dtype=self.dtype, count=count).as_strided(self.shape, self.stride)


class Call(NamedTuple):
    """One op of a tape; `outputs` are where its results go, None for one that writes to its arguments."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: list[Place] | None

    def run(self) -> None:
        results = self.function(*_on_cpu(self.args), **_on_cpu(self.kwargs))
        if self.outputs is not None:
            tensors = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
            for place, result in zip(self.outputs, tensors, strict=True):
                place.on_cpu().copy_(result)


class TapedGraph(torch.cuda.CUDAGraph):
    """A CUDA graph, captured as ever, whose replay runs its tape."""

    recording: list[Call] | None = None  # of the graph that is being captured
    tape: list[Call]

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        super().capture_begin(*args, **kwargs)
        self.tape = TapedGraph.recording = []

    def capture_end(self) -> None:
        TapedGraph.recording = None
        super().capture_end()

    def replay(self) -> None:
        with torch._C._DisableTorchDispatch():
            for call in self.tape:
                call.run()


class Emulation(TorchDispatchMode):
    """Computes every op on device tensors, or puts it on the tape of the graph that is being captured."""

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if not any(t.is_cuda for t in tensors) and (asked is None or asked.type != "cuda"):
            return function(*args, **kwargs)
        if function.namespace == "infer_fast":  # its parts are ops again
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
        if function.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):  # those parts may be
            with self:
                return function.decompose(*args, **kwargs)
        self.record.note_op(function, tensors)
        name = function._schema.name.split("::")[1]
        if function.namespace not in ("aten", "prims") or _is_view(function) or name in EMPTY | OWN:
            return function(*args, **kwargs)
        return self._emulate(function, name, args, kwargs, asked)

    def _emulate(self, function, name: str, args, kwargs: dict[str, Any], asked: torch.device | None) -> Any:
        tape = TapedGraph.recording if torch.cuda.is_current_stream_capturing() else None
        to_host = asked is not None and asked.type == "cpu"
        if to_host and tape is not None:
            self.record.noted.append(f"{function} copies to the host inside a capture")
        if name == "_local_scalar_dense" and tape is not None:
            raise RuntimeError("operation not permitted when stream is capturing")  # as CUDA has it
        kwargs.pop("pin_memory", None)
        packed, named = _packed(args), _packed(kwargs)
        writes = [a for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        given, given_named = _on_cpu(packed), _on_cpu(named)
        if tape is not None and (writes or "batch_norm" in name):  # a capture runs nothing: copies are written to
            given, given_named = _cloned(given), _cloned(given_named)
        with torch._C._DisableTorchDispatch():
            results = function(*given, **given_named)
        if name == "_local_scalar_dense" or to_host:
            return results
        if writes and len(function._schema.returns) <= 1:
            if tape is not None:
                tape.append(Call(function, packed, named, None))
            if not function._schema.returns:
                return None
            position = function._schema.arguments.index(writes[0])
            return kwargs[writes[0].name] if writes[0].kwarg_only else args[position]
        outputs: list[Place] = []
        found = tree_map(lambda r: _on_device(r, function, args, outputs), results)
        if tape is not None:
            tape.append(Call(function, packed, named, outputs))
        return found


@contextmanager
def emulated() -> Iterator[Record]:
    """Inside it device tensors hold what they would on a GPU. Fails at its end if there was a hazard."""
    record = Record()
    with ExitStack() as stack:
        stack.enter_context(recorded_launches(record))
        stack.enter_context(mock.patch.object(torch.cuda, "CUDAGraph", TapedGraph))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        for (module, name), computed in LAUNCHERS.items():
            stack.enter_context(mock.patch.object(module, name, _launcher(getattr(module, name), computed)))
        stack.enter_context(Emulation(record))
        yield record
    record.check()


def value(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU of what a device tensor holds."""
    with torch._C._DisableTorchDispatch():
        return Place.of(tensor).on_cpu().clone()


def _launcher(launch: Callable[..., None], computed: Callable[..., None]) -> Callable[..., None]:
    """The launcher, and then what its kernels would have done."""

    def launched(*args: Any) -> None:
        launch(*args)
        call = Call(computed, _packed(args), {}, None)
        if torch.cuda.is_current_stream_capturing():
            assert TapedGraph.recording is not None
            TapedGraph.recording.append(call)
            return
        with torch._C._DisableTorchDispatch():
            call.run()

    return launched


def _is_view(function: torch._ops.OpOverload) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)


def _packed(arguments: Any) -> Any:
    """Device tensors as their places, devices and generators as the CPU's."""

    def pack(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return Place.of(value)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return None if isinstance(value, torch.Generator) and value.device.type == "cuda" else value

    return tree_map(pack, arguments)


def _on_cpu(arguments: Any) -> Any:
    return tree_map(lambda v: v.on_cpu() if isinstance(v, Place) else v, arguments)


def _cloned(arguments: Any) -> Any:
    return tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, arguments)


def _on_device(result: Any, function: torch._ops.OpOverload, args: Any, outputs: list[Place]) -> Any:
    """A device tensor that holds a result, in the layout that CUDA would give it."""
    if not isinstance(result, torch.Tensor):
        return result
    stride = result.stride()
    if function in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
        weight = args[1] if function is torch.ops.aten.convolution.default else args[2]
        formats = [torch._prims_common.suggest_memory_format(t) for t in (weight, args[0])]
        if result.dim() == 4 and torch.channels_last in formats:
            stride = torch.empty(result.shape, device="meta").to(memory_format=torch.channels_last).stride()
    with torch._C._DisableTorchDispatch():
        tensor = torch.empty_strided(result.shape, stride, dtype=result.dtype, device="cuda")
        outputs.append(Place.of(tensor))
        outputs[-1].on_cpu().copy_(result)
    return tensor
