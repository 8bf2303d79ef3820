"""What an H100's limits allow one synthesis iteration, predicted from a trace: nothing is measured, no GPU is needed.

    python -m bench.roofline --quick
    python -m bench.roofline --output bench/results/roofline.json

One iteration in bfloat16 is recorded on tensors without memory: each operator that computes something, the bytes of its
arguments and results, and its floating-point operations. What only looks at memory in another way, or allocates it,
counts nothing. An operator is one launch, ours are as many as their Triton launchers make. A kernel takes the longer of
its bytes at the memory's rate and its operations at the matrix units' rate, and LAUNCH more: the predicted
time is the sum. It leaves out what caches save, and what kernels lose that are too small to fill the device or read
memory twice.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import measure
from infer_fast.models import build
from infer_fast.models.pool import FrozenMaxPool2d
from infer_fast.models.surgery import MatchedTeacher
from infer_fast.ops import adam, bn_match_operator, objective, view
from infer_fast.ops.max_pool import _backward as unpool
from infer_fast.ops.max_pool import _forward as pool
from infer_fast.recipes import INFER_TEACHERS
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis import draw_views
from infer_fast.synthesis.iteration import iterate, start_state
from infer_fast.synthesis.problem import Problem

MEMORY = 3.35e12  # bytes per second of an H100 SXM, by its data sheet
MATRIX = 800e12  # operations per second: what large bfloat16 products reach of the data sheet's 989e12
LAUNCH = 1.5e-6  # seconds between two kernels of a CUDA graph: an assumption

CASES = [*((name, 100, 32) for name in INFER_TEACHERS), ("resnet18", 100, 224)]  # teacher, classes, pixels
QUICK = [("resnet18", 10, 32), ("mobilenetv2", 10, 32)]

OURS: dict[str, Callable[..., Any]] = {  # what runs in place of a registered operator
    "infer_fast.bn_match.default": bn_match_operator._run_forward,
    "infer_fast.bn_match_backward.default": bn_match_operator._run_backward,
    "infer_fast.adam_.default": lambda backend, **given: adam._adam._init_fn(**given),
    "infer_fast.view.default": lambda backend, **given: view._view._init_fn(**given),
    "infer_fast.view_backward.default": lambda backend, **given: view._view_backward._init_fn(**given),
    "infer_fast.lane_loss.default": lambda backend, **given: objective._lose._init_fn(**given),
    "infer_fast.lane_loss_backward.default": lambda backend, **given: objective._slope._init_fn(**given),
    "infer_fast.max_pool.default": lambda backend, **given: pool._init_fn(**given),
    "infer_fast.max_pool_backward.default": lambda backend, **given: unpool._init_fn(**given),
}
NO_KERNEL = {  # allocations and looks at memory that their schemas don't tell apart from work
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "as_strided_", "_unsafe_view"),
    *("detach_", "lift_fresh", "promote_types", "set_"),
}
GATHERS = {"gather", "index_select", "index"}  # read no more than they write
FILLS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "copy_"}  # don't read the first


@dataclass(frozen=True)
class Kernel:
    """An operator of a trace: its launches, the bytes that it reads and writes, its floating-point operations."""

    name: str
    launches: int
    moved: int
    operations: int

    @property
    def seconds(self) -> float:
        """What the limits allow, launches included."""
        return max(self.moved / MEMORY, self.operations / MATRIX) + self.launches * LAUNCH


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0])
    rows: list[dict] = []
    limits = {"bytes_per_second": MEMORY, "operations_per_second": MATRIX, "seconds_per_launch": LAUNCH}
    for name, classes, size in QUICK if options.quick else CASES:
        teacher = build(name, classes, (size, size), seed=0).eval()
        rows.append(row(name, f"{classes} classes {size}x{size}", iteration(teacher, classes, size)))
        measure.write(options.output, rows, predicted_for="one H100, by its limits; nothing was measured", **limits)
    print(
        f"predicted for one H100, nothing measured: {MEMORY / 1e12:.2f} TB/s, {MATRIX / 1e12:.0f} TFLOP/s, "
        f"{LAUNCH * 1e6:.1f} us a launch"
    )
    print(measure.table(rows))


def row(teacher: str, case: str, kernels: Sequence[Kernel]) -> dict:
    own = [k for k in kernels if k.name.startswith("infer_fast.bn_match")]
    operations, predicted = sum(k.operations for k in kernels), sum(k.seconds for k in kernels)
    launches, moved = sum(k.launches for k in kernels), sum(k.moved for k in kernels)
    return {
        "case": case,
        "teacher": teacher,
        "launches": launches,
        "of bn_match": sum(k.launches for k in own),
        "MB moved": moved / 1e6,
        "by bn_match": sum(k.moved for k in own) / 1e6,
        "GFLOP": operations / 1e9,
        "memory alone ms": 1e3 * moved / MEMORY,
        "matrix units alone ms": 1e3 * operations / MATRIX,
        "launches alone ms": 1e3 * launches * LAUNCH,
        "predicted ms": 1e3 * predicted,
        "predicted share of matrix rate": operations / MATRIX / predicted,
    }


def iteration(teacher: nn.Module, classes: int, size: int) -> list[Kernel]:
    """The kernels of one iteration of one INFER task, after one that has cast the weights."""
    settings = SynthesisSettings(iterations=2, lr=0.01, batch_size=classes)
    views = draw_views(0, 0, [0], iterations=2, jitter=settings.jitter)
    matched = MatchedTeacher(teacher, backend="native")  # any operator will do: OURS takes its place
    matched.check(torch.zeros(1, 3, size, size))
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(FrozenMaxPool2d, "forward", _pool):
        base = torch.empty(1, classes, 3, size, size)
        problem = Problem(matched, base, torch.arange(classes), settings, "bfloat16")
        state = start_state(problem, views)
        with as_on_a_gpu():
            iterate(problem, state)
            return record(lambda: iterate(problem, state, _adam))


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Views and losses come of our operators inside, whatever the device."""
    with (
        mock.patch("infer_fast.synthesis.views.serves", lambda *_: True),
        mock.patch("infer_fast.ops.objective.choose", lambda *_: "triton"),
    ):
        yield


def _adam(*tensors: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    """adam_ as a GPU has it."""
    torch.ops.infer_fast.adam_(*tensors, *(bounds or (None, None)))


def _pool(module: FrozenMaxPool2d, x: torch.Tensor) -> torch.Tensor:
    """max_pool as a GPU has it."""
    return torch.ops.infer_fast.max_pool(x, *map(list, module.window), module.ceil_mode)[0]


def record(run: Callable[[], object]) -> list[Kernel]:
    """The kernels of run(), called under a FakeTensorMode."""
    with _Recorder() as recorder:
        run()
    return recorder.kernels


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        launches, result = 1, None
        if str(operator) in OURS:
            names = [argument.name for argument in operator._schema.arguments]
            given = dict(zip(names, args, strict=True)) | {"backend": "triton"}
            with self, counted_launches() as counted:  # the copies that it makes are recorded as well
                result = OURS[str(operator)](**given)
            launches = len(counted)
        else:
            result = operator(*args, **kwargs)
        if not _is_kernel(operator):
            return result
        count = flop_registry.get(operator.overloadpacket)
        operations = 0 if count is None else count(*args, **kwargs, out_val=result)
        moved = _bytes_moved(operator, tree_leaves((args, kwargs)), tree_leaves(result))
        self.kernels.append(Kernel(str(operator), launches, moved, operations))
        return result


def _is_kernel(operator: Any) -> bool:
    """Whether it computes anything: not a view, an allocation, or a question about a tensor."""
    looks = any(r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)
    return not looks and operator.namespace != "prim" and _name(operator) not in NO_KERNEL


def _name(operator: Any) -> str:
    return operator._schema.name.split("::")[1]


def _bytes_moved(operator: Any, arguments: Sequence[object], results: Sequence[object]) -> int:
    """Of all tensors among the arguments, read, and among the results (without any: in place), written."""
    read = [_bytes(t) for t in arguments if isinstance(t, torch.Tensor)]
    written = sum(_bytes(t) for t in results if isinstance(t, torch.Tensor))
    if not operator._schema.returns:
        changed = [a.alias_info is not None and a.alias_info.is_write for a in operator._schema.arguments]
        written = sum(size for size, own in zip(read, changed, strict=False) if own)
    if _name(operator) in FILLS:
        read = read[1:]
    if _name(operator) in GATHERS:
        read[0] = min(read[0], written)
    return sum(read) + written


def _bytes(tensor: torch.Tensor) -> int:
    """In memory: a dimension that is only expanded has one element there."""
    sizes = (n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step != 0 or n == 0)
    return math.prod(sizes) * tensor.element_size()


class _Counted:
    """Stands in for a Triton kernel, and runs nothing: kernel[grid](...) is noted down."""

    def __init__(self, name: str, launches: list[str]):
        self.name, self.launches, self.fn = name, launches, self

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: self.launches.append(self.name)


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The names of our kernels as they are launched inside, none of which runs."""
    import infer_fast.kernels.adam
    import infer_fast.kernels.bn_match
    import infer_fast.kernels.max_pool
    import infer_fast.kernels.objective
    import infer_fast.kernels.view  # noqa: F401  # Triton is imported where it is used

    launches: list[str] = []
    found = [
        (module, name, value)
        for module in [m for n, m in sys.modules.items() if n.startswith("infer_fast.kernels.")]
        for name, value in vars(module).items()
        if type(value).__module__.startswith("triton.runtime")
    ]
    for module, name, _ in found:
        setattr(module, name, _Counted(name, launches))
    try:
        yield launches
    finally:
        for module, name, value in found:
            setattr(module, name, value)


if __name__ == "__main__":
    main()
