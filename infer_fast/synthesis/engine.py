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

    Compilation is never chosen unasked: it takes longer than most runs gain by it (bench/results has the figures).
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

    restore() puts back what the warm-up changed; iterate must read and write the same tensors each time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture must not be the first to run anything
        for _ in range(WARM_UP):
            iterate()
            restore()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate()
    return graph.replay
