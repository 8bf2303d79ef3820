"""Batches for training, from a set that stays resident on the device as bytes, or from files on the disk.

A resident set takes two steps: the random numbers of an epoch are drawn on the host and sent over at once (`batches`);
a batch is then made on the device, with nothing read back (`Composer`), so that a training step can be captured
together with the making of its batch.

`feed` picks the loader: fused (one kernel from the stored bytes to the batch), torch (the same in plain PyTorch), or
dali (infer_fast.data.dali). All three draw from the same distribution of augmentations. Files on the disk
(FileSplit) are decoded by dali or by torch (infer_fast.data.folder).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from infer_fast.data.crops import draw_crops, resized_crop
from infer_fast.data.distilled import DistilledSet
from infer_fast.data.images import FileSplit, Split
from infer_fast.errors import InferFastError
from infer_fast.ops import Quantised, compose

LOADERS = ("auto", "fused", "dali", "torch")
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


class Draw(NamedTuple):
    """The random numbers of one batch of B instances; None for what is not wanted.

    positions: int64 (B,), which instances; shift: int64 (B, 2), rows and columns of the padded crop; crop: int64
    (B, 4), top, left, height and width of the resized one; flip: bool (B,); weight: float32 (1,), of an image against
    its partner; partner: int64 (B,), positions in the batch; box: int64 (4,), CutMix's top, left, bottom and right.
    """

    positions: torch.Tensor
    shift: torch.Tensor | None
    crop: torch.Tensor | None
    flip: torch.Tensor | None
    weight: torch.Tensor | None
    partner: torch.Tensor | None
    box: torch.Tensor | None


@dataclass(frozen=True)
class ResidentSet:
    """Training instances as stored bytes plus what each is labelled with, all on one device.

    base: uint8 (N, 3, H, W); base_index: int64 (n,); compensators and compensator_index (n,) or None; targets: float32
    (n, C) logits (soft) or int64 (n,) classes (hard); mean, std: in [0,1] pixels.
    """

    base: torch.Tensor
    base_index: torch.Tensor
    compensators: Quantised | None
    compensator_index: torch.Tensor | None
    targets: torch.Tensor
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.base_index)

    @property
    def soft(self) -> bool:
        """Whether the targets are teachers' logits."""
        return self.targets.is_floating_point()

    def targets_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Logits, or class probabilities, float32 (B, C)."""
        targets = self.targets[positions]
        return targets if self.soft else F.one_hot(targets, self.classes).float()

    def to(self, device: torch.device) -> ResidentSet:
        """The same set on `device`."""
        moved = {
            name: None if value is None else value.to(device)
            for name, value in vars(self).items()
            if value is None or isinstance(value, torch.Tensor)
        }
        if self.compensators is not None:
            moved["compensators"] = Quantised(*(t.to(device) for t in self.compensators))
        return replace(self, **moved)


@dataclass(frozen=True)
class FileSet:
    """Training images that stay on the disk, with their classes; mean, std: in [0,1] pixels."""

    split: FileSplit
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    soft = False

    def __len__(self) -> int:
        return len(self.split)


def training_set(split: Split | FileSplit, classes: int, mean: tuple, std: tuple) -> ResidentSet | FileSet:
    """Real images with their classes, to be trained on: resident, or on the disk."""
    if isinstance(split, FileSplit):
        return FileSet(split, classes, mean, std)
    return resident_split(split, classes, mean, std)


def resident_distilled(distilled: DistilledSet, *, soft: bool) -> ResidentSet:
    """Every instance of a distilled set, with its soft labels or its class."""
    base, base_index, compensators, index = distilled.sources(torch.arange(len(distilled)))
    targets = distilled.logits.reshape(len(distilled), -1).float() if soft else distilled.labels()
    classes = distilled.logits.shape[-1]
    return ResidentSet(base, base_index, compensators, index, targets, classes, distilled.mean, distilled.std)


def resident_split(
    split: Split, classes: int, mean: tuple, std: tuple, logits: torch.Tensor | None = None
) -> ResidentSet:
    """Real images with their classes, or with teachers' logits float32 (N, C)."""
    index = torch.arange(len(split), device=split.images.device)
    targets = split.labels if logits is None else logits
    return ResidentSet(split.images, index, None, None, targets, classes, mean, std)


def choose_loader(loader: str, source: ResidentSet | FileSet) -> str:
    """What `loader` means for `source`: auto is fused for a resident set, and dali for files, where it is installed.

    Raises InferFastError for an unknown loader, or fused for files.
    """
    if loader not in LOADERS:
        raise InferFastError(f"{loader!r} is not a loader: choose one of {', '.join(LOADERS)}.")
    if isinstance(source, ResidentSet):
        return "fused" if loader == "auto" else loader
    if loader == "fused":
        raise InferFastError(
            "The loader fused needs a set in memory, this one stays on the disk: choose dali or torch."
        )
    if loader == "auto":
        return "torch" if importlib.util.find_spec("nvidia.dali") is None else "dali"
    return loader


def feed(
    loader: str,
    source: ResidentSet | FileSet,
    *,
    batch_size: int,
    updates: int,
    augmentation: Augmentation,
    generator: torch.Generator,
    workers: int = 4,
) -> tuple[Iterator[tuple], Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    """(batches, make) for infer_fast.models.train.fit: `updates` batches of `source` through `loader`.

    make(*batch) gives images float32 (B, 3, H, W) normalised and targets float32 (B, C). Every epoch is one shuffle;
    its last batch may be short. Files on the disk always get a random resized crop. workers: threads of dali, and of
    the decoding of files. Raises InferFastError for a loader that can't serve, or dali where it is not installed.
    """
    options = {"batch_size": batch_size, "updates": updates, "augmentation": augmentation, "generator": generator}
    chosen = choose_loader(loader, source)
    if isinstance(source, FileSet):
        return _from_files(chosen, source, workers=workers, **options), finish
    if chosen == "dali":
        from infer_fast.data import dali

        return dali.resident_batches(source, workers=workers, **options), finish
    return batches(source, **options), Composer(source, backend="reference" if chosen == "torch" else None)


def finish(
    images: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    partner: torch.Tensor | None,
    box: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MixUp or CutMix of augmented images (B, 3, H, W) and targets (B, C)."""
    images = mixed(images, weight, partner) if box is None else pasted(images, partner, box)
    return images, mixed(targets, weight, partner)


def _from_files(
    loader: str,
    source: FileSet,
    *,
    batch_size: int,
    updates: int,
    augmentation: Augmentation,
    generator: torch.Generator,
    workers: int,
) -> Iterator[tuple]:
    """Batches of files, decoded, cropped, flipped and normalised: what `finish` takes."""
    from infer_fast.data import dali, folder

    epoch = dali.file_batches if loader == "dali" else folder.file_batches
    device, done = source.split.device, 0
    while done < updates:
        for images, labels in epoch(
            source, batch_size=batch_size, flip=augmentation.flip, generator=generator, workers=workers
        ):
            targets = F.one_hot(labels, source.classes).float()
            mixing = _mixing(len(images), source.split.size, augmentation, generator)
            yield images, targets, *(None if drawn is None else drawn.to(device) for drawn in mixing)
            done += 1
            if done == updates:
                return


def batches(
    resident: ResidentSet,
    *,
    batch_size: int,
    updates: int,
    augmentation: Augmentation,
    generator: torch.Generator,
) -> Iterator[Draw]:
    """The draws of `updates` batches, on the set's device; Composer(resident) makes the batches.

    Each epoch is one shuffle, whose last batch may be short.
    """
    done, size = 0, tuple(resident.base.shape[-2:])
    while done < updates:
        order = torch.randperm(len(resident), generator=generator)
        spans = order.split(batch_size)[: updates - done]
        epoch = [_draw(positions, size, augmentation, generator) for positions in spans]
        for alike in (epoch[:-1], epoch[-1:]):
            yield from _sent(alike, resident.base.device)
        done += len(epoch)


def _draw(positions: torch.Tensor, size: tuple[int, int], how: Augmentation, generator: torch.Generator) -> Draw:
    count, pad = len(positions), how.padding
    shift = torch.randint(-pad, pad + 1, (count, 2), generator=generator) if pad and not how.resized else None
    crop = draw_crops(count, size, generator) if how.resized else None
    flip = (torch.rand(count, generator=generator) < 0.5) if how.flip else None
    return Draw(positions, shift, crop, flip, *_mixing(count, size, how, generator))


def _mixing(
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


def _sent(draws: list[Draw], device: torch.device) -> Iterator[Draw]:
    """Draws of batches of one size, sent to the device in one piece per field."""
    if not draws:
        return
    stacked = []
    for parts in zip(*draws, strict=True):
        whole = None if parts[0] is None else torch.stack(parts)
        if whole is not None and device.type == "cuda":
            whole = whole.pin_memory().to(device, non_blocking=True)
        stacked.append(whole)
    for i in range(len(draws)):
        yield Draw(*(None if whole is None else whole[i] for whole in stacked))


@dataclass(frozen=True)
class Composer:
    """Makes batches of `resident` from their draws: images float32 (B, 3, H, W) normalised, targets float32 (B, C).

    Targets are mixed as the images are: logits for soft sets, class probabilities for hard ones. backend: of compose;
    reference is plain PyTorch. Runs on the device alone, so it can be captured.
    """

    resident: ResidentSet
    backend: str | None = None

    def __call__(
        self,
        positions: torch.Tensor,
        shift: torch.Tensor | None = None,
        crop: torch.Tensor | None = None,
        flip: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        partner: torch.Tensor | None = None,
        box: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.resident
        mixes = weight is not None and box is None and crop is None  # with the batch; after a resized crop or CutMix
        index = own.compensator_index
        images = compose(
            own.base,
            own.base_index[positions],
            own.compensators,
            None if index is None else index[positions],
            shift=shift,
            flip=flip if crop is None else None,
            lam=weight.expand(len(positions)) if mixes else None,
            partner=partner if mixes else None,
            mean=own.mean,
            std=own.std,
            backend=self.backend,
        )
        if crop is not None:
            images = resized_crop(images, crop, flip)
        targets = own.targets_at(positions)
        return (images, mixed(targets, weight, partner)) if mixes else finish(images, targets, weight, partner, box)


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
