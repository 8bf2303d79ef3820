"""Batches for training, whatever the set: which loader makes them, and how.

fused: one kernel from the stored bytes to the batch; torch: the same in plain PyTorch (infer_fast.data.resident); dali:
NVIDIA DALI (infer_fast.data.dali). All three draw from the same distribution of augmentations. Files on the disk are
decoded by dali or by torch (infer_fast.data.threads).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from infer_fast.data import dali, threads
from infer_fast.data.augment import Sampling, draw_mixing, finish
from infer_fast.data.resident import Composer, batches
from infer_fast.data.sets import FileSet, ResidentSet, sent
from infer_fast.errors import InferFastError
from infer_fast.extras import installed, require

LOADERS = ("auto", "fused", "dali", "torch")


def choose_loader(loader: str, source: ResidentSet | FileSet) -> str:
    """What `loader` means for `source`: auto is fused for a resident set, and dali for files, where it is installed.

    Raises InferFastError for an unknown loader, fused for files, or dali where it is not installed.
    """
    check_loader(loader)
    if isinstance(source, ResidentSet):
        return "fused" if loader == "auto" else loader
    if loader == "fused":
        raise InferFastError(
            "The loader fused needs a set in memory, this one stays on the disk: choose dali or torch."
        )
    if loader == "auto":
        return "dali" if installed("nvidia.dali") else "torch"
    return loader


def check_loader(loader: str) -> None:
    """Raises InferFastError for an unknown loader, or dali where it is not installed."""
    if loader not in LOADERS:
        raise InferFastError(f"{loader!r} is not a loader: choose one of {', '.join(LOADERS)}.")
    if loader == "dali":
        require("nvidia.dali", "The loader dali")


def feed(
    loader: str, source: ResidentSet | FileSet, sampling: Sampling, *, workers: int = 4
) -> tuple[Iterator[tuple], Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    """(batches, make) for infer_fast.models.train.Training: the batches of `source` through `loader`.

    make(*batch) gives images float32 (B, 3, H, W) normalised and targets float32 (B, C). Files on the disk always get a
    random resized crop. workers: threads of dali, and of the decoding of files. Raises InferFastError for a loader that
    can't serve, or dali where it is not installed.
    """
    chosen = choose_loader(loader, source)
    if isinstance(source, FileSet):
        return _from_files(chosen, source, sampling, workers), finish
    if chosen == "dali":
        return dali.resident_batches(source, sampling, workers=workers), finish
    return batches(source, sampling), Composer(source, backend="reference" if chosen == "torch" else None)


def _from_files(loader: str, source: FileSet, sampling: Sampling, workers: int) -> Iterator[tuple]:
    """Batches of files, decoded, cropped, flipped and normalised: what `finish` takes."""
    how, generator = sampling.augmentation, sampling.generator
    epoch = dali.file_batches if loader == "dali" else threads.file_batches
    device, done = source.split.device, 0
    while done < sampling.updates:
        for images, labels in epoch(
            source, batch_size=sampling.batch_size, flip=how.flip, generator=generator, workers=workers
        ):
            targets = F.one_hot(labels, source.classes).float()
            mixing = draw_mixing(len(images), source.split.size, how, generator)
            yield images, targets, *(None if drawn is None else sent(drawn, device) for drawn in mixing)
            done += 1
            if done == sampling.updates:
                return
