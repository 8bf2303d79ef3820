"""How an iteration is run: the only place where anything is compiled or captured.

    eager          PyTorch as it is
    compile        torch.compile of the teacher's pass and of Adam's step
    graph          one whole iteration (view, pass, penalty, backward, Adam, schedule) as a CUDA graph that is replayed
    graph-compile  the compiled iteration, captured and replayed

A replay costs the host one call, however many kernels the iteration launches. Everything an iteration reads and writes
is a device tensor that stays where it is (see AdamState in infer_fast.synthesis.solver), so one capture serves every
iteration and every batch of tasks of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from infer_fast.errors import InferFastError
from infer_fast.models.surgery import MatchedTeacher

ENGINES = ("auto", "eager", "compile", "graph", "graph-compile")
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


def compiled(teacher: MatchedTeacher, adam_step: Callable) -> Callable:
    """Has `teacher` compiled in place, and returns `adam_step` compiled."""
    teacher.compile(dynamic=False)
    return torch.compile(adam_step, dynamic=False)


def compiling():
    """The context in which compiled functions are called: many teachers in one process are not a mistake."""
    return torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS, accumulated_recompile_limit=RECOMPILATIONS)


def capture(iterate: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
    """`iterate` as a CUDA graph: call what is returned to run it once more.

    restore() puts back what the warm-up changed; iterate must read and write the same tensors each time. cuDNN measures
    its algorithms in the warm-up, and the capture keeps the fastest ones.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        with torch.cuda.stream(stream):  # a capture must not be the first to run anything
            for _ in range(WARM_UP):
                iterate()
                restore()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            iterate()
    finally:
        torch.backends.cudnn.benchmark = before
    return graph.replay
