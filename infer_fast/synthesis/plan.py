"""The plan: which tasks there are, which share a batch, and what the distilled set will weigh.

The plan follows from the settings alone, never from what is already done: a resumed or sharded run makes the same
batches, and so the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infer_fast.data.distilled import QUANTISATION_BYTES
from infer_fast.errors import InferFastError
from infer_fast.ranges import check, check_counts
from infer_fast.recipes import base_images_per_class
from infer_fast.settings import Recipe, SynthesisSettings


@dataclass(frozen=True)
class TaskBatch:
    """Tasks of one teacher that are solved side by side: one lane for each index, over a range of classes."""

    teacher: int
    indices: tuple[int, ...]
    first_class: int
    last_class: int  # exclusive


@dataclass(frozen=True)
class Plan:
    """What one distillation will do.

    k: base images per class (image mode: images per class); n: compensators of each teacher; added: their (height,
    width); image_bytes counts base images, compensators and their scales and offsets, all raw; label_bytes the float16
    logits; budget_bytes is classes x ipc x 3*H*W.
    """

    teachers: tuple[str, ...]
    classes: int
    size: tuple[int, int]
    ipc: int
    k: int
    n: int
    added: tuple[int, int]
    optimise: str
    iterations: int
    batches: tuple[TaskBatch, ...]

    @property
    def tasks(self) -> int:
        return sum(len(batch.indices) for batch in self.batches)

    @property
    def indices(self) -> int:
        """Tasks of one teacher on the same classes, which are counted from 0."""
        return self.k if self.optimise == "images" else self.n

    def wanted(self, start: int, end: int | None) -> range:
        """The indices from `start` to before `end` (None, or beyond the last: all that are left).

        Raises InferFastError where that is none of the tasks there are.
        """
        if self.tasks and start >= self.indices:
            raise InferFastError(f"--ipc-start {start}: the tasks are 0 to {self.indices - 1}.")
        return range(start, self.indices if end is None else min(end, self.indices))

    @property
    def compensators(self) -> int:
        return len(self.teachers) * self.n

    @property
    def views(self) -> int:
        """Instances that are made of each base image."""
        return 1 + len(self.teachers) if self.n else 1

    @property
    def instances(self) -> int:
        return self.classes * self.k * self.views

    @property
    def stored_images(self) -> int:
        return self.classes * self.k + self.compensators

    @property
    def image_bytes(self) -> int:
        return stored_bytes(self.classes * self.k, self.compensators, self.size, self.added)

    @property
    def label_bytes(self) -> int:
        return self.instances * self.classes * 2

    @property
    def budget_bytes(self) -> int:
        return self.ipc * self.classes * 3 * self.size[0] * self.size[1]


def make_plan(
    recipe: Recipe, classes: int, size: tuple[int, int], lanes: int | Sequence[int] = 1, k: int | None = None
) -> Plan:
    """The plan of `recipe` for a dataset of `classes` classes and images of `size`.

    lanes: tasks per batch, for all teachers or for each; k: base images per class that fill a budget of bytes.
    Raises InferFastError for a setting out of its range, when ipc is too small for one base image per class, or
    compensators are larger than images.
    """
    check(recipe)
    settings = recipe.synthesis
    if not recipe.arch_name:
        raise InferFastError("No teacher was named: give at least one with --arch-name.")
    each = [lanes] * len(recipe.arch_name) if isinstance(lanes, int) else list(lanes)
    check_counts(lanes=min(each))
    if settings.optimise != "images" and settings.start == "noise":
        raise InferFastError(
            "--start noise: a compensator starts at zero, on real images (--optimise images has noise)."
        )
    if settings.optimise == "images" and recipe.store.budget == "bytes":
        raise InferFastError(
            "--optimise images fills --budget images: what a codec will make of such images is not known before."
        )
    added = _size_of_compensators(settings, size)
    if settings.optimise == "images":
        k, n, teachers, chunk = recipe.ipc, 0, range(1), settings.batch_size
    else:
        k, n = _counts(recipe, classes, size, added) if k is None else (k, _of_bytes(recipe, k))
        teachers, chunk = range(len(recipe.arch_name)), classes
    indices = k if settings.optimise == "images" else n
    batches = tuple(
        TaskBatch(teacher, tuple(range(first, min(first + each[teacher], indices))), low, min(low + chunk, classes))
        for teacher in teachers
        for low in range(0, classes, chunk)
        for first in range(0, indices, each[teacher])
    )
    iterations = settings.iterations
    return Plan(recipe.arch_name, classes, size, recipe.ipc, k, n, added, settings.optimise, iterations, batches)


def stored_bytes(images: int, compensators: int, size: tuple[int, int], added: tuple[int, int]) -> int:
    """Bytes of base images of `size` and compensators of size `added`, with the compensators' scales and offsets."""
    each = 3 * added[0] * added[1] + QUANTISATION_BYTES
    return images * 3 * size[0] * size[1] + compensators * each


def _size_of_compensators(settings: SynthesisSettings, size: tuple[int, int]) -> tuple[int, int]:
    side = settings.compensator_size
    if side is None:
        return size
    if settings.optimise == "images":
        raise InferFastError(f"--compensator-size {side}: --optimise images has no compensators.")
    if side > min(size):
        raise InferFastError(
            f"--compensator-size {side}: it must be 1 to {min(size)} for images of {size[1]}x{size[0]}."
        )
    return side, side


def _counts(recipe: Recipe, classes: int, size: tuple[int, int], added: tuple[int, int]) -> tuple[int, int]:
    """(k, n) of a budget of images: INFER's k, lowered where the scales and offsets would not fit any more.

    With n compensators of each teacher asked for, or smaller ones, k is the largest that fits beside them.
    """
    teachers, asked = len(recipe.arch_name), recipe.store.compensators
    budget = recipe.ipc * classes * 3 * size[0] * size[1]
    infer = asked is None and added == size
    k = base_images_per_class(recipe.ipc, teachers, classes) if infer else recipe.ipc
    while k > 0 and (over := stored_bytes(k * classes, teachers * _each(asked, k), size, added) - budget) > 0:
        k -= max(1, over // stored_bytes(classes, teachers, size, added))  # so many are too many in any case
    if k < 1 and asked is not None:
        raise InferFastError(
            f"ipc {recipe.ipc} is too small: a budget of {budget} bytes does not hold one base image per class and "
            f"{asked} compensators of each of {teachers} teachers (fewer --compensators, or a larger --ipc)."
        )
    if k < 1:
        least = next(
            n for n in range(recipe.ipc + 1, recipe.ipc + teachers + 3) if base_images_per_class(n, teachers, classes)
        )
        raise InferFastError(
            f"ipc {recipe.ipc} is too small: with {teachers} teachers and {classes} classes the budget of {budget} "
            f"bytes does not hold one base image per class and the compensators (--ipc {least} would)."
        )
    return k, _each(asked, k)


def _of_bytes(recipe: Recipe, k: int) -> int:
    """Compensators of each teacher in a budget of bytes: as many as were asked for."""
    asked = recipe.store.compensators
    return 0 if asked is None else _each(asked, k)


def _each(asked: int | None, k: int) -> int:
    """Compensators of each teacher beside k base images of each class."""
    return k if asked is None else min(asked, k)
