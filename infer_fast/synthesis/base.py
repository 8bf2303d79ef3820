"""Base images: the real images that are kept in a distilled set, and that synthesis starts from."""

from __future__ import annotations

from pathlib import Path

import torch

from infer_fast.data.class_folders import has_folders, read_image_set
from infer_fast.data.images import ImageDataset, draw_of_each_class
from infer_fast.errors import InferFastError
from infer_fast.recipes import SynthesisSettings
from infer_fast.synthesis.plan import Plan
from infer_fast.synthesis.problem import pixels_of
from infer_fast.synthesis.views import task_generator


def base_images(
    dataset: ImageDataset, settings: SynthesisSettings, plan: Plan, given: Path | None = None
) -> torch.Tensor:
    """uint8 (C, k, 3, H, W) on the CPU: k random training images of every class, or those that lie in `given`.

    given: class folders of images, or tensor_0.pt to tensor_{k-1}.pt, each (C, 3, H, W), as bytes or normalised.
    Raises InferFastError for a class with too few images, or files that are missing, damaged or of another shape.
    """
    if given is None:
        generator = task_generator(settings.seed, 0, 0, "base images")
        return dataset.train.at(draw_of_each_class(dataset, plan.k, generator)).cpu()  # (C, k, 3, H, W)
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
    return tensor if tensor.dtype == torch.uint8 else pixels_of(settings).to_bytes(tensor)
