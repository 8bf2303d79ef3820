"""Batches for training, from a set that stays resident on the device as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from infer_fast.data.distilled import DistilledSet
from infer_fast.data.images import Split
from infer_fast.ops import Quantised, compose


@dataclass(frozen=True)
class Augmentation:
    """Random crop with `padding` black pixels on each side, horizontal flip, MixUp with Beta(alpha, alpha)."""

    padding: int = 0
    flip: bool = False
    mix_alpha: float = 0.0


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


def batches(
    resident: ResidentSet,
    *,
    batch_size: int,
    updates: int,
    augmentation: Augmentation,
    generator: torch.Generator,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`updates` batches (images, targets), epoch after epoch; each epoch is one shuffle, its last batch may be short.

    Targets are mixed as the images are: logits (B, C) for soft sets, class probabilities (B, C) for hard ones.
    """
    done = 0
    while done < updates:
        order = torch.randperm(len(resident), generator=generator)
        for positions in order.split(batch_size)[: updates - done]:
            yield draw_batch(resident, positions, augmentation, generator)
            done += 1


def draw_batch(
    resident: ResidentSet, positions: torch.Tensor, augmentation: Augmentation, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch at these positions, with fresh augmentation: images float32 (B, 3, H, W) and targets float32 (B, C)."""
    device, count, pad = resident.base.device, len(positions), augmentation.padding
    shift = torch.randint(-pad, pad + 1, (count, 2), generator=generator).to(device) if pad else None
    flip = (torch.rand(count, generator=generator) < 0.5).to(device) if augmentation.flip else None
    lam = partner = None
    if augmentation.mix_alpha > 0:
        lam = beta(augmentation.mix_alpha, generator).expand(count).to(device)
        partner = torch.randperm(count, generator=generator).to(device)
    positions = positions.to(device)
    index = resident.compensator_index
    images = compose(
        resident.base,
        resident.base_index[positions],
        resident.compensators,
        None if index is None else index[positions],
        shift=shift,
        flip=flip,
        lam=lam,
        partner=partner,
        mean=resident.mean,
        std=resident.std,
    )
    targets = resident.targets[positions]
    if not resident.soft:
        targets = F.one_hot(targets, resident.classes).float()
    if lam is not None:
        weight = lam.view(-1, 1)
        targets = weight * targets + (1 - weight) * targets[partner]
    return images, targets


def beta(alpha: float, generator: torch.Generator) -> torch.Tensor:
    """One draw of Beta(alpha, alpha), float32 (1,), fixed by `generator` (torch's own Beta takes none)."""
    seed = int(torch.randint(0, 2**62, (1,), generator=generator))
    return torch.tensor([np.random.default_rng(seed).beta(alpha, alpha)], dtype=torch.float32)
