"""What can be trained on: instances that stay resident on the device as bytes, or image files on the disk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from infer_fast.data.distilled import DistilledSet
from infer_fast.data.images import FileSplit, Split
from infer_fast.data.pixels import Pixels
from infer_fast.ops import Quantised


@dataclass(frozen=True)
class ResidentSet:
    """Training instances as stored bytes plus what each is labelled with, all on one device.

    base: uint8 (N, 3, H, W); base_index: int64 (n,); compensators and compensator_index (n,) or None; targets: float32
    (n, C) logits (soft) or int64 (n,) classes (hard).
    """

    base: torch.Tensor
    base_index: torch.Tensor
    compensators: Quantised | None
    compensator_index: torch.Tensor | None
    targets: torch.Tensor
    classes: int
    pixels: Pixels

    def __len__(self) -> int:
        return len(self.base_index)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every image."""
        return self.base.shape[2], self.base.shape[3]

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
        compensators, index = self.compensators, self.compensator_index
        return replace(
            self,
            base=self.base.to(device),
            base_index=self.base_index.to(device),
            compensators=None if compensators is None else Quantised(*(t.to(device) for t in compensators)),
            compensator_index=None if index is None else index.to(device),
            targets=self.targets.to(device),
        )


@dataclass(frozen=True)
class FileSet:
    """Training images that stay on the disk, with their classes."""

    split: FileSplit
    classes: int
    pixels: Pixels

    soft = False

    def __len__(self) -> int:
        return len(self.split)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`; a GPU goes on with its work meanwhile."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def training_set(split: Split | FileSplit, classes: int, pixels: Pixels) -> ResidentSet | FileSet:
    """Real images with their classes, to be trained on: resident, or on the disk."""
    if isinstance(split, FileSplit):
        return FileSet(split, classes, pixels)
    return resident_split(split, classes, pixels)


def resident_distilled(distilled: DistilledSet, *, soft: bool) -> ResidentSet:
    """Every instance of a distilled set, with its soft labels or its class."""
    base, base_index, compensators, index = distilled.sources(torch.arange(len(distilled)))
    targets = distilled.logits.reshape(len(distilled), -1).float() if soft else distilled.labels()
    classes = distilled.logits.shape[-1]
    return ResidentSet(base, base_index, compensators, index, targets, classes, distilled.pixels)


def resident_split(split: Split, classes: int, pixels: Pixels, logits: torch.Tensor | None = None) -> ResidentSet:
    """Real images with their classes, or with teachers' logits float32 (N, C)."""
    index = torch.arange(len(split), device=split.images.device)
    targets = split.labels if logits is None else logits
    return ResidentSet(split.images, index, None, None, targets, classes, pixels)
