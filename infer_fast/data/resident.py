"""Batches of a set that stays resident on the device as bytes.

The random numbers of an epoch are drawn on the host and sent over at once (`batches`); a batch is then made on the
device, with nothing read back (`Composer`), so that a training step can be captured together with the making of its
batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from infer_fast.data.augment import Draw, Sampling, draw, finish, mixed
from infer_fast.data.crops import resized_crop
from infer_fast.data.sets import ResidentSet, sent
from infer_fast.ops import compose


def batches(resident: ResidentSet, sampling: Sampling) -> Iterator[Draw]:
    """The draws of all batches, on the set's device; Composer(resident) makes the batches."""
    done, size, generator = 0, resident.size, sampling.generator
    while done < sampling.updates:
        order = torch.randperm(len(resident), generator=generator)
        spans = order.split(sampling.batch_size)[: sampling.updates - done]
        epoch = [draw(positions, size, sampling.augmentation, generator) for positions in spans]
        for alike in (epoch[:-1], epoch[-1:]):
            yield from _sent(alike, resident.base.device)
        done += len(epoch)


def _sent(draws: list[Draw], device: torch.device) -> Iterator[Draw]:
    """Draws of batches of one size, sent to the device in one piece per field."""
    if not draws:
        return
    stacked = {}
    for name, parts in zip(Draw._fields, zip(*draws, strict=True), strict=True):
        if parts[0] is not None:
            stacked[name] = sent(torch.stack(parts), device)
    for i in range(len(draws)):
        yield Draw(**{name: whole[i] for name, whole in stacked.items()})


@dataclass(frozen=True)
class Composer:
    """Makes batches of `resident` from their draws: images float32 (B, 3, H, W) normalised, targets float32 (B, C).

    Targets are mixed as the images are: logits for soft sets, class probabilities for hard ones. backend: of compose;
    reference is plain PyTorch. Runs on the device alone, so it can be captured.
    """

    resident: ResidentSet
    backend: str | None = None

    def __call__(self, positions: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of a Draw's parts, in its order."""
        own, d = self.resident, Draw(positions, *others)
        # With the batch; after a resized crop or CutMix, which come later, `finish` mixes.
        weight = d.weight if d.box is None and d.crop is None else None
        index = own.compensator_index
        images = compose(
            own.base,
            own.base_index[positions],
            own.compensators,
            None if index is None else index[positions],
            shift=d.shift,
            flip=d.flip if d.crop is None else None,
            lam=None if weight is None else weight.expand(len(positions)),
            partner=None if weight is None else d.partner,
            mean=own.pixels.mean,
            std=own.pixels.std,
            backend=self.backend,
        )
        if d.crop is not None:
            images = resized_crop(images, d.crop, d.flip)
        targets = own.targets_at(positions)
        if weight is not None:
            return images, mixed(targets, weight, d.partner)
        return finish(images, targets, d.weight, d.partner, d.box)
