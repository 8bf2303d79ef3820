"""How training instances are augmented: what is drawn for a batch, and the mixing of pairs that comes last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from infer_fast.data.crops import draw_crops
from infer_fast.errors import InferFastError
from infer_fast.settings import StudentSettings

MIXES = ("mixup", "cutmix", "none")


@dataclass(frozen=True)
class Augmentation:
    """Random crop with `padding` black pixels on each side, or a random resized crop (`resized`), horizontal flip, then
    MixUp or CutMix of pairs.

    mix_alpha: of the Beta(alpha, alpha) that mixing draws its weight from (MixUp, arXiv 1710.09412; CutMix, arXiv
    1905.04899): one weight, and one box, for a batch.
    """

    padding: int = 0
    flip: bool = False
    mix: str = "none"
    mix_alpha: float = 0.8
    resized: bool = False

    def __post_init__(self) -> None:
        if self.mix not in MIXES:
            raise InferFastError(f"{self.mix!r} is not a way of mixing: choose one of {', '.join(MIXES)}.")


def augmentation_of(settings: StudentSettings) -> Augmentation:
    """How a student's training instances are augmented."""
    return Augmentation(
        settings.padding, settings.flip, settings.mix_type, settings.mix_alpha, settings.crop == "resized"
    )


@dataclass(frozen=True)
class Sampling:
    """How batches are drawn from a set: `updates` batches of batch_size instances, augmented alike.

    Each epoch is one shuffle, whose last batch may be short. Everything random comes of the generator.
    """

    batch_size: int
    updates: int
    augmentation: Augmentation
    generator: torch.Generator


class Draw(NamedTuple):
    """The random numbers of one batch of B instances; None for what is not wanted.

    positions: int64 (B,), which instances; shift: int64 (B, 2), rows and columns of the padded crop; crop: int64
    (B, 4), top, left, height and width of the resized one; flip: bool (B,); weight: float32 (1,), of an image against
    its partner; partner: int64 (B,), positions in the batch; box: int64 (4,), CutMix's top, left, bottom and right.
    """

    positions: torch.Tensor
    shift: torch.Tensor | None = None
    crop: torch.Tensor | None = None
    flip: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    partner: torch.Tensor | None = None
    box: torch.Tensor | None = None


def draw(positions: torch.Tensor, size: tuple[int, int], how: Augmentation, generator: torch.Generator) -> Draw:
    count, pad = len(positions), how.padding
    shift = torch.randint(-pad, pad + 1, (count, 2), generator=generator) if pad and not how.resized else None
    crop = draw_crops(count, size, generator) if how.resized else None
    flip = (torch.rand(count, generator=generator) < 0.5) if how.flip else None
    return Draw(positions, shift, crop, flip, *draw_mixing(count, size, how, generator))


def draw_mixing(
    count: int, size: tuple[int, int], how: Augmentation, generator: torch.Generator
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(weight, partner, box) of a batch of `count` images, see Draw."""
    if how.mix == "none" or how.mix_alpha <= 0:
        return None, None, None
    weight, box = beta(how.mix_alpha, generator), None
    partner = torch.randperm(count, generator=generator)
    if how.mix == "cutmix":
        box, weight = cutmix_box(weight, size, generator)
    return weight, partner, box


def cutmix_box(
    weight: torch.Tensor, size: tuple[int, int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """CutMix's box (top, left, bottom, right) int64 (4,) and the weight (1,) that is left of the image itself.

    The box has 1 - weight of the image's area around a uniform centre and is cut at the borders; the weight is then
    what the box leaves (arXiv 1905.04899, section 3.1).
    """
    height, width = size
    share = (1 - weight.item()) ** 0.5
    cut_height, cut_width = int(height * share), int(width * share)
    row, column = (int(torch.randint(0, n, (1,), generator=generator)) for n in size)
    top, bottom = max(0, row - cut_height // 2), min(height, row + cut_height // 2)
    left, right = max(0, column - cut_width // 2), min(width, column + cut_width // 2)
    area = (bottom - top) * (right - left)
    return torch.tensor([top, left, bottom, right]), torch.tensor([1 - area / (height * width)])


def beta(alpha: float, generator: torch.Generator) -> torch.Tensor:
    """One draw of Beta(alpha, alpha), float32 (1,), fixed by `generator` (torch's own Beta takes none)."""
    seed = int(torch.randint(0, 2**62, (1,), generator=generator))
    return torch.tensor([np.random.default_rng(seed).beta(alpha, alpha)], dtype=torch.float32)


def finish(
    images: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    partner: torch.Tensor | None,
    box: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MixUp or CutMix of augmented images (B, 3, H, W) and targets (B, C)."""
    targets = mixed(targets, weight, partner)
    if box is None or partner is None:
        return mixed(images, weight, partner), targets
    return pasted(images, partner, box), targets


def mixed(values: torch.Tensor, weight: torch.Tensor | None, partner: torch.Tensor | None) -> torch.Tensor:
    """weight * values + (1 - weight) * values of the partners; as they are without a weight."""
    return values if weight is None else weight * values + (1 - weight) * values[partner]


def pasted(images: torch.Tensor, partner: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) with their partners' pixels in `box`."""
    return torch.where(inside(box, images.shape), images[partner], images)


def inside(box: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Which pixels of images (..., H, W) are in `box` int64 (4,): bool (H, W)."""
    rows = torch.arange(shape[-2], device=box.device).view(-1, 1)
    columns = torch.arange(shape[-1], device=box.device).view(1, -1)
    return (rows >= box[0]) & (rows < box[2]) & (columns >= box[1]) & (columns < box[3])
