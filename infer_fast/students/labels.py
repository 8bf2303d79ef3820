"""Soft labels from teachers: averaged logits of given images, of every batch, and of stored crops (FKD)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from infer_fast.data import fkd
from infer_fast.data.augment import Augmentation, Sampling, augmentation_of
from infer_fast.data.distilled import DistilledSet
from infer_fast.data.resident import Composer, batches
from infer_fast.data.sets import resident_distilled
from infer_fast.errors import InferFastError
from infer_fast.keys import key_of, surroundings
from infer_fast.models.execution import at_precision, choose_precision
from infer_fast.models.fold import folded
from infer_fast.models.layout import labelling_copy
from infer_fast.models.teacher import Teacher, device_of
from infer_fast.models.train import predict
from infer_fast.progress import stage
from infer_fast.settings import StudentSettings


def averaged_logits(
    teachers: Sequence[Teacher],
    images: Callable[[torch.Tensor], torch.Tensor],
    count: int,
    on_teacher: Callable[[], None] | None = None,
) -> torch.Tensor:
    """The teachers' averaged logits float32 (count, C) of images(positions), rounded to float16 as they are stored.

    on_teacher() is called after each teacher. Raises InferFastError for a teacher whose logits float16 can't hold.
    """
    total = torch.zeros(())
    for teacher in teachers:
        logits = predict(teacher.network, images, count)
        _check(logits, teacher.name)
        total = total + logits
        if on_teacher is not None:
            on_teacher()
    return (total / len(teachers)).half().float()


def _check(logits: torch.Tensor, name: str) -> None:
    largest = logits.abs().max().item()
    if not largest < torch.finfo(torch.float16).max:
        raise InferFastError(
            f"The logits of teacher {name} reach {largest:.3g}, more than float16 holds: it is hardly trained (more "
            "--squeeze.epochs, or a lower --squeeze.lr)."
        )


def dynamic_labels(
    teachers: Sequence[Teacher], precision: str, size: tuple[int, int]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that labels a batch as a student sees it: the teachers' averaged logits, float32 (B, C).

    The "dynamic" labels of INFER (arXiv 2408.06927, section 4.1): nothing is stored but the teachers. size: (H, W) of
    the images. On CUDA the teachers' BatchNorms are folded; a CPU keeps the rounding of the figures that are published.
    """
    networks = [_labelling(t.network, size) for t in teachers]
    chosen = choose_precision(device_of(teachers), precision)

    @torch.no_grad()
    def label(images: torch.Tensor) -> torch.Tensor:
        with at_precision(images.device, chosen):
            return sum(network(images).float() for network in networks) / len(networks)

    return label


def _labelling(network: nn.Module, size: tuple[int, int]) -> nn.Module:
    """A copy of a teacher's network that only labels."""
    if next(network.parameters()).device.type == "cuda":
        return folded(network, size)
    return labelling_copy(network, size)


def record_labels(
    distilled: DistilledSet, teachers: Sequence[Teacher], settings: StudentSettings, folder: Path, seed: int = 0
) -> Path:
    """Stores the labels of every batch of settings.epochs epochs (FKD); returns the folder below `folder` they are in.

    Every epoch has a generator of its own and a file of its own, written once: an interrupted run goes on, and more
    epochs are added to those that are there. The teachers are in eval mode. Raises DiskError when the disk is full.
    """
    augmentation, device = augmentation_of(settings), device_of(teachers)
    resident = resident_distilled(distilled, soft=True).to(device)
    kept = folder / fkd.FOLDER / _labels_key(distilled, teachers, settings, augmentation, seed)
    wanted = [e for e in range(settings.epochs) if not fkd.epoch_path(kept, e).is_file()]
    if not wanted:
        return kept
    label, compose = dynamic_labels(teachers, settings.precision, distilled.size), Composer(resident)
    per_epoch = -(-len(distilled) // settings.batch_size)
    with stage("relabel (FKD)", len(wanted), "epochs") as running:
        for epoch in wanted:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)  # what a generator takes
            draws = list(batches(resident, Sampling(settings.batch_size, per_epoch, augmentation, generator)))
            logits = [label(compose(*d)[0].contiguous(memory_format=torch.channels_last)).half() for d in draws]
            fkd.write_epoch(fkd.epoch_path(kept, epoch), draws, logits)
            running.advance()
    return kept


def _labels_key(
    distilled: DistilledSet, teachers: Sequence[Teacher], settings: StudentSettings, how: Augmentation, seed: int
) -> str:
    """A hash of what stored labels depend on: those of other settings never mix with these."""
    parts = {
        "teachers": [t.sha256 for t in teachers],
        "augmentation": asdict(how),
        "batch size": settings.batch_size,
        "precision": settings.precision,
        "seed": seed,
        "normalisation": distilled.pixels,
        "surroundings": surroundings(device_of(teachers)),
    }
    return key_of(parts, [distilled.base, *(distilled.compensators or ())])[:12]
