"""The tasks of a plan: solved batch by batch, each on the disk the moment it is done, and put together in the end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from infer_fast.data.budget import Base, Storage, unlabelled
from infer_fast.data.distilled import DistilledSet, quantise
from infer_fast.data.images import ImageDataset
from infer_fast.errors import InferFastError
from infer_fast.files import holds_tensors, read_tensor, write_tensors
from infer_fast.keys import key_of, surroundings
from infer_fast.models.build import SMALL_IMAGE
from infer_fast.models.engine import release
from infer_fast.models.execution import Execution
from infer_fast.models.teacher import Teacher, device_of
from infer_fast.progress import stage
from infer_fast.recipes import SKIPPED_BATCHNORMS
from infer_fast.settings import SynthesisSettings, asked
from infer_fast.synthesis.plan import Plan, TaskBatch
from infer_fast.synthesis.problem import pixels_of
from infer_fast.synthesis.solver import LOG_EVERY, NonFiniteLossError, Solver
from infer_fast.synthesis.views import draw_views, task_generator


@dataclass(frozen=True)
class TaskResult:
    """One solved task, read from its file when it is asked for."""

    path: Path

    @property
    def whole(self) -> bool:
        """Whether the file is there and not cut short: else the task is solved again."""
        return holds_tensors(self.path, ("optimised", "losses"))

    @property
    def optimised(self) -> torch.Tensor:
        """What was optimised, float32: (3, H, W), or images (C', 3, H, W). Raises InferFastError for NaN."""
        return self._finite("optimised")

    @property
    def losses(self) -> list[float]:
        """The losses along the way, every LOG_EVERY iterations. Raises InferFastError for NaN."""
        return self._finite("losses").tolist()

    def _finite(self, name: str) -> torch.Tensor:
        tensor = read_tensor(self.path, name)
        if not bool(tensor.isfinite().all()):
            raise InferFastError(
                f"{self.path} holds NaN or infinite values: delete it and run the same command again, which makes it "
                "anew."
            )
        return tensor


Results = dict[tuple[int, int, int], TaskResult]  # of (teacher, index, first class)


@dataclass(frozen=True)
class Synthesis:
    """Everything that the results of a plan's tasks depend on.

    base: on the CPU; execution: as the teachers' device resolves it; chunks: images of a task in one pass, for each
    teacher (None: all), on which only the rounding depends, as on the lanes of a batch.
    """

    plan: Plan
    teachers: Sequence[Teacher]
    base: Base
    settings: SynthesisSettings
    execution: Execution
    chunks: Sequence[int | None]

    @cached_property
    def key(self) -> str:
        """A hash of all that a task's result depends on, to the last bit: other settings never mix with these."""
        together = [[b.teacher, b.indices, b.first_class, b.last_class] for b in self.plan.batches]
        whole = {**self._parts, "batches": together, "chunks": self.chunks}
        return key_of({**whole, "surroundings": surroundings(device_of(self.teachers))})[:12]

    @cached_property
    def former_key(self) -> str:
        """The key up to version 0.1.0, which did not tell batches and chunks apart."""
        return key_of(self._parts)[:12]

    @property
    def _parts(self) -> dict[str, Any]:
        how = self.execution
        return {
            "settings": asked(self.settings),
            "teachers": [t.sha256 for t in self.teachers],
            "base": hashlib.sha256(self.base.images.numpy().data).hexdigest(),
            "how": [how.precision, how.engine, how.backend, device_of(self.teachers).type],
        }

    def path(self, folder: Path, batch: TaskBatch, index: int) -> Path:
        """Where a task's result lies in a run's folder, or did for a version before the key had chunks."""
        part = f"-classes-{batch.first_class:04d}" if self.plan.optimise == "images" else ""
        name = f"{batch.teacher}-{self.plan.teachers[batch.teacher]}-{index:04d}{part}.safetensors"
        path, former = (folder / "tasks" / key / name for key in (self.key, self.former_key))
        return former if self.chunks[batch.teacher] is None and former.is_file() and not path.is_file() else path


def synthesise(work: Synthesis, folder: Path, wanted: range) -> Results | None:
    """Solves the plan's tasks, each saved below `folder` the moment it is done; tasks already there are read back.

    wanted: the task indices to solve here.
    Returns the results, or None when tasks outside `wanted` are still missing. Raises
    InferFastError naming the tasks whose loss became NaN or infinite.
    """
    plan = work.plan
    paths = {
        (batch.teacher, index, batch.first_class): work.path(folder, batch, index)
        for batch in plan.batches
        for index in batch.indices
    }
    failed: dict[str, list[str]] = {}  # where, by what is to blame
    solver = None
    with stage("synthesis", plan.tasks * plan.iterations, "task iterations") as running:
        for batch in plan.batches:
            own = [paths[batch.teacher, index, batch.first_class] for index in batch.indices]
            if all(TaskResult(path).whole for path in own) or not any(index in wanted for index in batch.indices):
                running.advance(len(own) * plan.iterations)
                continue
            if solver is None or solver.teacher is not work.teachers[batch.teacher].network:
                solver = None  # what it holds on the device goes first
                release()
                solver = _solver(work, batch.teacher)
            for cause, where in _solve_batch(work, batch, own, solver, running.advance):
                failed.setdefault(cause, []).append(where)
    if failed:
        told = "; ".join(f"{', '.join(where)} ({cause})" for cause, where in failed.items())
        raise InferFastError(f"The loss became NaN or infinite in {told}; the other tasks are saved.")
    found = {key: TaskResult(path) for key, path in paths.items() if TaskResult(path).whole}
    return found if len(found) == plan.tasks else None


def _solver(work: Synthesis, position: int) -> Solver:
    teacher, settings = work.teachers[position], work.settings
    small = max(work.plan.size) <= SMALL_IMAGE  # the layer that is left out is one that only the CIFAR form has
    skipped = SKIPPED_BATCHNORMS.get(teacher.name, ()) if small else ()
    settings = replace(settings, skip_bn=(*settings.skip_bn, *skipped))
    return Solver(teacher.network, settings=settings, execution=work.execution, chunk=work.chunks[position])


def _solve_batch(
    work: Synthesis, batch: TaskBatch, paths: list[Path], solver: Solver, advance: Callable[[float], None]
) -> list[tuple[str, str]]:
    """Solves one batch of lanes and saves each lane's result; (cause, where) of each lane that diverged, in words."""
    settings, device, name = work.settings, device_of(work.teachers), work.teachers[batch.teacher].name
    classes = torch.arange(batch.first_class, batch.last_class)
    losses: list[list[float]] = [[] for _ in batch.indices]
    furthest = [0 for _ in batch.indices]  # a lane that ran out of memory starts anew

    def on_iteration(lanes: range, done: int, latest: torch.Tensor) -> None:
        for lane, loss in zip(lanes, latest.tolist(), strict=True):
            losses[lane] = [*losses[lane][: (done - 1) // LOG_EVERY], loss]
            advance(max(0, done - furthest[lane]))
            furthest[lane] = max(done, furthest[lane])

    failures: dict[int, int] = {}
    causes: dict[int, str] = {}
    try:
        result = solver.solve(
            _start(work, batch, classes).to(device),
            draw_views(
                settings.seed,
                batch.teacher,
                list(batch.indices),
                iterations=settings.iterations,
                jitter=settings.jitter,
                size=work.plan.size,
            ),
            classes.to(device),
            on_iteration,
        )
    except NonFiniteLossError as error:
        result, failures, causes = error.result, error.failures, error.causes
    for lane, path in enumerate(paths):
        if lane not in failures:
            write_tensors(path, {"optimised": result[lane], "losses": torch.tensor(losses[lane])})
    return [
        (causes[lane], f"teacher {name}, index {batch.indices[lane]}, iteration {iteration}")
        for lane, iteration in failures.items()
    ]


def _start(work: Synthesis, batch: TaskBatch, classes: torch.Tensor) -> torch.Tensor:
    """The normalised images (L, C', 3, H, W) that the batch's lanes start from."""
    base, settings = work.base.images, work.settings
    if settings.optimise == "images" and settings.start == "noise":
        shape = (base.shape[0], *base.shape[2:])
        lanes = [
            torch.randn(shape, generator=task_generator(settings.seed, batch.teacher, index, "noise"))[classes]
            for index in batch.indices
        ]
        return torch.stack(lanes)
    images = base[classes][:, list(batch.indices)].transpose(0, 1)
    return pixels_of(settings).normalise(images)


def assemble(work: Synthesis, storage: Storage, results: Results, dataset: ImageDataset) -> DistilledSet:
    """The distilled set of solved tasks, with labels still zero; in image mode one task is in memory at a time."""
    plan, base = work.plan, work.base
    if plan.optimise == "images":
        stored, compensators = torch.empty(plan.classes, plan.k, *base.images.shape[2:], dtype=torch.uint8), None
        for (_, index, first), result in results.items():
            images = dataset.pixels.to_bytes(result.optimised)  # (C', 3, H, W)
            stored[first : first + len(images), index] = images
        base = Base(stored) if storage.codec.name == "raw" else storage.coded(stored)
    elif plan.n:
        dense = torch.stack(
            [torch.stack([results[m, j, 0].optimised for j in range(plan.n)]) for m in range(len(plan.teachers))]
        )  # (M, n, 3, H, W)
        compensators = quantise(dense, dataset.pixels.std)
    else:
        compensators = None
    return unlabelled(base, compensators, storage.labels, dataset)
