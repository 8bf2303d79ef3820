"""How an iteration of synthesis or a training step is run: the only place where anything is compiled or captured.

    eager          PyTorch as it is
    compile        torch.compile of the network's pass (and of Adam's step in synthesis)
    graph          the whole iteration (view, pass, penalty, backward, Adam, schedule) or training step (batch from the
                   stored bytes, pass, loss, backward, optimiser) as a CUDA graph that is replayed
    graph-compile  the compiled iteration, captured and replayed

A replay costs the host one call, however many kernels the iteration launches. Everything an iteration reads and writes
is a device tensor that stays where it is (see AdamState in infer_fast.synthesis.iteration), so one capture serves every
iteration and every batch of tasks of the same shape.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, get_args

import torch
from torch import nn

from infer_fast.errors import InferFastError, InferFastWarning, first_line, out_of_memory
from infer_fast.settings import Engine

ENGINES = get_args(Engine)
WARM_UP = 3  # iterations before a capture: libraries choose their algorithms, Triton tunes its kernels
RECOMPILATIONS = 1024  # dynamo counts per function, and every teacher runs through the same ones


def choose_engine(engine: str, device: torch.device) -> str:
    """What `engine` means on `device`: auto is a CUDA graph on CUDA and eager elsewhere.

    Compilation is never chosen unasked. On a CPU it was measured: 8 to 128 s per teacher to compile, and an iteration
    then 0.3 to 1.4 times as fast as an eager one, because the fused operators leave little to fuse.
    Raises InferFastError for an unknown engine, or a graph where there is no CUDA.
    """
    if engine not in ENGINES:
        raise InferFastError(f"{engine!r} is not an engine: choose one of {', '.join(ENGINES)}.")
    if engine.startswith("graph") and device.type != "cuda":
        raise InferFastError(f"The engine {engine} needs a CUDA device, this run is on {device.type}: choose eager.")
    if engine == "auto":
        return "graph" if device.type == "cuda" else "eager"
    return engine


def compiled(teacher: nn.Module, adam_step: Callable) -> Callable:
    """Has `teacher` compiled in place, and returns `adam_step` compiled."""
    teacher.compile(dynamic=False)
    return torch.compile(adam_step, dynamic=False)


def compiling() -> AbstractContextManager[object]:
    """The context in which compiled functions are called: many teachers in one process are not a mistake."""
    return torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS, accumulated_recompile_limit=RECOMPILATIONS)


@contextmanager
def measured_convolutions() -> Iterator[None]:
    """cuDNN measures its algorithms for shapes it has not met, and keeps the fastest ones."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def side_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """`stream`, in step with the current one: what runs before a capture has to run on one of its own."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class CaptureError(RuntimeError):
    """Something can't be captured as a CUDA graph; its text is the cause. The stream is the one it was before."""


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """What runs inside it is recorded in `graph`, and not run.

    Other threads may go on calling CUDA (DALI prefetches in some), and no garbage is collected meanwhile: to free a
    tensor of another graph in the middle of a capture is an error. pool: torch's handle of memory shared with graphs
    that are never replayed at the same time. Raises CaptureError with what went wrong first, or the out-of-memory
    error itself: torch's own context hides the cause behind the broken capture, and leaves its stream the current one.
    """
    stream, collects, cause = torch.cuda.current_stream(), gc.isenabled(), None
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                yield
            except Exception as error:
                cause = error
                raise
    except Exception as error:
        torch.cuda.set_stream(stream)
        first = cause or error
        if out_of_memory(first):
            raise first from None
        raise CaptureError(first_line(first)) from first
    finally:
        if collects:
            gc.enable()


def release() -> None:
    """Gives back the device memory of what nobody holds any more: traced graphs and captured loops are cycles, which
    the collector alone frees."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def capture(iterate: Callable[[], object], restore: Callable[[], None]) -> Callable[[], None]:
    """`iterate` as a CUDA graph: call what is returned to run it once more.

    restore() puts back what the warm-up changed; iterate must read and write the same tensors each time.
    Raises CaptureError for what can't be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with measured_convolutions():
        with side_stream(torch.cuda.Stream()):
            for _ in range(WARM_UP):
                iterate()
                restore()
        with capturing(graph):
            iterate()
    return graph.replay


class Replayed:
    """A training step as CUDA graphs, one for each shape of its inputs, which are copied into the graph's own tensors.

    The first WARM_UP steps of a shape run as they are: they train too. step(*inputs) takes tensors or None, returns
    nothing, and changes nothing but the network, the optimiser and the device's random state. any_engine: a step that
    can't be captured goes on eager, with a warning; else it is a CaptureError.
    """

    def __init__(self, step: Callable[..., None], *, any_engine: bool = False):
        self.step, self.any_engine, self.eager = step, any_engine, False
        self.seen: Counter[tuple] = Counter()
        self.graphs: dict[tuple, tuple[list[torch.Tensor | None], torch.cuda.CUDAGraph]] = {}
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()  # one graph is replayed at a time

    def __call__(self, *inputs: torch.Tensor | None) -> None:
        shapes = tuple(None if t is None else (*t.shape, t.dtype) for t in inputs)
        if shapes not in self.graphs and not self.eager and self.seen[shapes] >= WARM_UP:
            self._capture(shapes, inputs)
        if shapes not in self.graphs:
            self.seen[shapes] += 1
            with measured_convolutions(), side_stream(self.stream):
                self.step(*inputs)
            return
        own, graph = self.graphs[shapes]
        for mine, given in zip(own, inputs, strict=True):
            if mine is not None and given is not None:  # both or neither: `shapes` says which
                mine.copy_(given, non_blocking=True)
        graph.replay()

    def _capture(self, shapes: tuple, inputs: tuple[torch.Tensor | None, ...]) -> None:
        own = [None if t is None else t.clone() for t in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with measured_convolutions(), capturing(graph, self.pool):
                self.step(*own)
        except CaptureError as error:
            if not self.any_engine:
                raise
            self.eager = True
            warnings.warn(f"No CUDA graph of this training ({error}): going on eager.", InferFastWarning, stacklevel=4)
            return
        self.graphs[shapes] = own, graph
