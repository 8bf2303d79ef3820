"""The tasks of a plan: solved batch by batch, each on the disk the moment it is done, and put together in the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from infer_fast.data.distilled import DistilledSet, quantise
from infer_fast.data.images import ImageDataset
from infer_fast.errors import InferFastError
from infer_fast.files import read_tensor, write_tensors
from infer_fast.models.build import SMALL_IMAGE
from infer_fast.models.engine import choose_engine
from infer_fast.models.train import choose_precision
from infer_fast.progress import stage
from infer_fast.recipes import SKIPPED_BATCHNORMS, SynthesisSettings
from infer_fast.relabel import device_of
from infer_fast.squeeze import Teacher
from infer_fast.synthesis import NonFiniteLossError, draw_views
from infer_fast.synthesis.plan import Plan, TaskBatch
from infer_fast.synthesis.problem import pixels_of
from infer_fast.synthesis.solver import LOG_EVERY, Solver
from infer_fast.synthesis.views import task_generator


class How(NamedTuple):
    """How the passes are run, as it was asked for: see infer_fast.synthesis.solve."""

    precision: str = "auto"
    engine: str = "auto"
    backend: str = "auto"

    def resolved(self, device: torch.device) -> dict[str, str]:
        """What `auto` becomes on `device`, for the card and for the tasks' key."""
        return {
            "precision": choose_precision(device, self.precision),
            "engine": choose_engine(self.engine, device),
            "backend": self.backend,
            "device": device.type,
        }


@dataclass(frozen=True)
class TaskResult:
    """One solved task, read from its file when it is asked for."""

    path: Path

    @property
    def optimised(self) -> torch.Tensor:
        """What was optimised, float32: (3, H, W), or images (C', 3, H, W)."""
        return read_tensor(self.path, "optimised")

    @property
    def losses(self) -> list[float]:
        """The losses along the way, every LOG_EVERY iterations."""
        return read_tensor(self.path, "losses").tolist()


def synthesise(
    plan: Plan,
    teachers: list[Teacher],
    base: torch.Tensor,
    settings: SynthesisSettings,
    folder: Path,
    how: How,
    chunks: Sequence[int | None],
    wanted: range,
) -> dict[tuple[int, int, int], TaskResult] | None:
    """Solves the plan's tasks, each saved the moment it is done; tasks already on the disk are read back.

    base: uint8 (C, k, 3, H, W); chunks: images of a task in one pass, for each teacher (None: all); wanted: the task
    indices to solve here.
    Returns {(teacher, index, first class): result}, or None when tasks outside `wanted` are still missing. Raises
    InferFastError naming the tasks whose loss became NaN or infinite.
    """
    tasks = folder / "tasks" / _task_key(teachers, base, settings, how.resolved(device_of(teachers)))
    failed: list[str] = []
    solver = None
    with stage("synthesis", plan.tasks * plan.iterations, "task iterations") as running:
        for batch in plan.batches:
            paths = [_task_path(tasks, plan, batch, index) for index in batch.indices]
            if all(p.is_file() for p in paths) or not any(index in wanted for index in batch.indices):
                running.advance(len(paths) * plan.iterations)
                continue
            teacher = teachers[batch.teacher]
            if solver is None or solver.teacher is not teacher.network:
                solver = None  # what it holds on the device goes first
                solver = _solver(teacher, settings, how, chunks[batch.teacher], plan.size)
            failed += _solve_batch(batch, paths, solver, teacher.name, base, running.advance)
    if failed:
        raise InferFastError(
            f"The loss became NaN or infinite in {', '.join(failed)}: lower --lr or --r-bn; the other tasks are saved."
        )
    found = {
        (batch.teacher, index, batch.first_class): path
        for batch in plan.batches
        for index in batch.indices
        if (path := _task_path(tasks, plan, batch, index)).is_file()
    }
    if len(found) < plan.tasks:
        return None
    return {key: TaskResult(path) for key, path in found.items()}


def _solver(
    teacher: Teacher, settings: SynthesisSettings, how: How, chunk: int | None, size: tuple[int, int]
) -> Solver:
    small = max(size) <= SMALL_IMAGE  # the layer that is left out is one that only the CIFAR form has
    skipped = SKIPPED_BATCHNORMS.get(teacher.name, ()) if small else ()
    return Solver(
        teacher.network,
        settings=replace(settings, skip_bn=(*settings.skip_bn, *skipped)),
        backend=None if how.backend == "auto" else how.backend,
        engine=how.engine,
        precision=how.precision,
        chunk=chunk,
    )


def _solve_batch(
    batch: TaskBatch,
    paths: list[Path],
    solver: Solver,
    name: str,
    base: torch.Tensor,
    advance: Callable[[float], None],
) -> list[str]:
    """Solves one batch of lanes and saves each lane's result; returns a sentence part for each lane that diverged."""
    settings, device = solver.settings, next(solver.teacher.parameters()).device
    classes = torch.arange(batch.first_class, batch.last_class)
    losses: list[list[float]] = [[] for _ in batch.indices]
    furthest = [0 for _ in batch.indices]  # a lane that ran out of memory starts anew

    def on_iteration(lanes: range, done: int, latest: torch.Tensor) -> None:
        for lane, loss in zip(lanes, latest.tolist(), strict=True):
            losses[lane] = [*losses[lane][: (done - 1) // LOG_EVERY], loss]
            advance(max(0, done - furthest[lane]))
            furthest[lane] = max(done, furthest[lane])

    failures: dict[int, int] = {}
    try:
        result = solver.solve(
            _start(batch, classes, base, settings).to(device),
            draw_views(
                settings.seed,
                batch.teacher,
                list(batch.indices),
                iterations=settings.iterations,
                jitter=settings.jitter,
                size=tuple(base.shape[-2:]),
            ),
            classes.to(device),
            on_iteration,
        )
    except NonFiniteLossError as error:
        result, failures = error.result, error.failures
    for lane, path in enumerate(paths):
        if lane not in failures:
            write_tensors(path, {"optimised": result[lane], "losses": torch.tensor(losses[lane])})
    return [
        f"teacher {name}, index {batch.indices[lane]}, iteration {iteration}" for lane, iteration in failures.items()
    ]


def _start(batch: TaskBatch, classes: torch.Tensor, base: torch.Tensor, settings: SynthesisSettings) -> torch.Tensor:
    """The normalised images (L, C', 3, H, W) that the batch's lanes start from."""
    if settings.optimise == "images" and settings.start == "noise":
        shape = (base.shape[0], *base.shape[2:])
        lanes = [
            torch.randn(shape, generator=task_generator(settings.seed, batch.teacher, index, "noise"))[classes]
            for index in batch.indices
        ]
        return torch.stack(lanes)
    images = base[classes][:, list(batch.indices)].transpose(0, 1)
    return pixels_of(settings).normalise(images)


def assemble(
    plan: Plan, base: torch.Tensor, results: dict[tuple[int, int, int], TaskResult], dataset: ImageDataset
) -> DistilledSet:
    """The distilled set of solved tasks, with labels still zero; in image mode one task is in memory at a time."""
    if plan.optimise == "images":
        stored, compensators = torch.empty(plan.classes, plan.k, *base.shape[2:], dtype=torch.uint8), None
        for (_, index, first), result in results.items():
            images = dataset.pixels.to_bytes(result.optimised)  # (C', 3, H, W)
            stored[first : first + len(images), index] = images
    else:
        dense = torch.stack(
            [torch.stack([results[m, j, 0].optimised for j in range(plan.k)]) for m in range(len(plan.teachers))]
        )  # (M, k, 3, H, W)
        stored, compensators = base, quantise(dense, dataset.pixels.std)
    views = 1 if compensators is None else 1 + len(plan.teachers)
    logits = torch.zeros(plan.classes, plan.k, views, plan.classes, dtype=torch.float16)
    return DistilledSet(stored, compensators, logits, dataset.pixels, dataset.classes)


def _task_key(teachers: list[Teacher], base: torch.Tensor, settings: SynthesisSettings, how: dict[str, str]) -> str:
    """A hash of everything a task's result depends on: other settings never mix with these."""
    parts = {
        "settings": asdict(settings),
        "teachers": [t.sha256 for t in teachers],
        "base": hashlib.sha256(base.numpy().data).hexdigest(),
        "how": list(how.values()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _task_path(folder: Path, plan: Plan, batch: TaskBatch, index: int) -> Path:
    chunk = f"-classes-{batch.first_class:04d}" if plan.optimise == "images" else ""
    return folder / f"{batch.teacher}-{plan.teachers[batch.teacher]}-{index:04d}{chunk}.safetensors"
