"""Batches of a set that stays resident on the device as bytes.

The random numbers of an epoch are drawn on the host and sent over at once (`batches`); a batch is then made on the
device, with nothing read back (`Composer`), so that a training step can be captured together with the making of its
batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from infer_fast.data.augment import Augmentation, Draw, draw, finish, mixed
from infer_fast.data.crops import resized_crop
from infer_fast.data.sets import ResidentSet
from infer_fast.ops import compose


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
        epoch = [draw(positions, size, augmentation, generator) for positions in spans]
        for alike in (epoch[:-1], epoch[-1:]):
            yield from _sent(alike, resident.base.device)
        done += len(epoch)


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
            mean=own.pixels.mean,
            std=own.pixels.std,
            backend=self.backend,
        )
        if crop is not None:
            images = resized_crop(images, crop, flip)
        targets = own.targets_at(positions)
        return (images, mixed(targets, weight, partner)) if mixes else finish(images, targets, weight, partner, box)
