"""Base images: the real images that are kept in a distilled set, and that synthesis starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from infer_fast.data.budget import SAMPLE, Base, filled, storage_of
from infer_fast.data.class_folders import has_folders, read_image_set
from infer_fast.data.images import ImageDataset, drawing, smallest_class
from infer_fast.errors import InferFastError
from infer_fast.settings import Recipe, SynthesisSettings
from infer_fast.synthesis.plan import Plan
from infer_fast.synthesis.problem import pixels_of
from infer_fast.synthesis.views import task_generator


def base_images(dataset: ImageDataset, recipe: Recipe, plan: Plan, given: Path | None = None) -> Base:
    """uint8 (C, k, 3, H, W) on the CPU: random training images of every class, or those in `given`.

    They are what a student will see: coded and decoded again where the recipe codes them. k is the plan's, or with a
    budget of bytes the largest that fits. given: class folders of images, or tensor_0.pt to tensor_{k-1}.pt, each
    (C, 3, H, W), as bytes or normalised.
    Raises InferFastError for a class with too few images, a budget that is too small, or files that are missing,
    damaged or of another shape.
    """
    storage = storage_of(recipe, plan.n)
    if recipe.store.budget == "bytes":
        return filled(drawn(dataset, recipe), smallest_class(dataset), storage, plan.budget_bytes)
    images = drawn(dataset, recipe)(plan.k) if given is None else _given(dataset, recipe.synthesis, plan, given)
    return Base(images) if recipe.store.codec == "raw" else storage.coded(images)


def check_enough(dataset: ImageDataset, recipe: Recipe, plan: Plan, given: Path | None = None) -> None:
    """Raises InferFastError where a class has fewer training images than will be drawn of it, or base images that are
    given can't be had: before any of the work.

    They are drawn for base images, unless those are given, and to compare them with random real images.
    """
    if recipe.store.budget == "bytes":  # filled with as many as there are
        if given is not None:
            raise InferFastError("--init-path gives as many base images as --budget images counts: choose that budget.")
        return
    compared = recipe.ipc if recipe.compare != "none" else 0
    wanted = max(compared, 0 if given is not None else plan.k)
    least = smallest_class(dataset)
    if least < wanted:
        raise InferFastError(
            f"The smallest class of {dataset.name} has {least} training images, fewer than the {wanted} that will be "
            "drawn of each: lower --ipc."
        )
    if given is not None:
        _given(dataset, recipe.synthesis, plan, given)  # or an error


def expected_count(dataset: ImageDataset, recipe: Recipe) -> int:
    """About how many base images of each class a budget of bytes holds: by the size of a few."""
    asked = recipe.store.compensators
    draw, storage = drawn(dataset, recipe), storage_of(recipe, 0 if asked is None else asked)
    most = smallest_class(dataset)
    some = min(most, SAMPLE)
    empty, size = (storage.file_bytes(storage.coded(draw(k))) for k in (1, some))
    each = max(1, (size - empty) // max(1, some - 1))
    budget = recipe.ipc * len(dataset.classes) * 3 * dataset.size[0] * dataset.size[1]
    return max(1, min(most, (budget - empty) // each))


def drawn(dataset: ImageDataset, recipe: Recipe) -> Callable[[int], torch.Tensor]:
    """draw(k): the recipe's base images, as infer_fast.data.images.drawing gives them."""
    return drawing(dataset, task_generator(recipe.synthesis.seed, 0, 0, "base images"))


def _given(dataset: ImageDataset, settings: SynthesisSettings, plan: Plan, given: Path) -> torch.Tensor:
    if not (given / "tensor_0.pt").is_file() and has_folders(given):
        return read_image_set(given, dataset.classes, plan.size[0], plan.k)
    columns = [_column(given, j, plan, settings) for j in range(plan.k)]
    return torch.stack(columns, dim=1)  # (C, k, 3, H, W)


def _column(folder: Path, j: int, plan: Plan, settings: SynthesisSettings) -> torch.Tensor:
    """Base image j of every class, uint8 (C, 3, H, W)."""
    path, expected = folder / f"tensor_{j}.pt", (plan.classes, 3, *plan.size)
    if not path.is_file():
        raise InferFastError(f"{path} does not exist: --init-path needs tensor_0.pt to tensor_{plan.k - 1}.pt.")
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every way a torch file can be damaged, or hold more than tensors
        raise InferFastError(f"{path} is not a tensor file that can be loaded safely.") from error
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != expected:
        found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise InferFastError(f"{path} holds {found}, expected a tensor {expected}.")
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        raise InferFastError(f"{path} holds {tensor.dtype}, expected bytes (uint8) or normalised floating numbers.")
    if not tensor.isfinite().all():
        raise InferFastError(f"{path} holds NaN or infinity, expected normalised images: make the file again.")
    return pixels_of(settings).to_bytes(tensor.float())
