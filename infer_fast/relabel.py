"""Stage 3: static soft labels, the teachers' logits averaged on every clean instance; or those of every crop.

python -m infer_fast.relabel --syn-data-path runs/digits          # labels a distilled set again with its own teachers
python -m infer_fast.relabel --syn-data-path runs/digits --fkd    # stores the labels of every epoch's batches
python -m infer_fast.validate --syn-data-path runs/digits --labels fkd    # ... and replays them
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from infer_fast import cli
from infer_fast.data import fkd
from infer_fast.data.augment import Augmentation, augmentation_of
from infer_fast.data.distilled import CARD, DistilledSet, load
from infer_fast.data.pixels import Pixels
from infer_fast.data.resident import Composer, batches
from infer_fast.data.sets import resident_distilled
from infer_fast.errors import InferFastError
from infer_fast.files import write_json
from infer_fast.models.train import at_precision, predict
from infer_fast.progress import stage
from infer_fast.recipes import StudentSettings, student_of
from infer_fast.squeeze import Teacher, load_teacher


def relabel(distilled: DistilledSet, teachers: list[Teacher]) -> DistilledSet:
    """The same set with logits float16 (C, k, M+1, C) averaged over `teachers` (INFER, arXiv 2408.06927, section 3.3).

    The labels are those of the instances as stored: after quantisation, as a student will see them. Raises
    InferFastError for a teacher whose logits float16 can't hold.
    """
    on = device_of(teachers)
    with stage("relabel", len(teachers), "teachers") as running:
        total = torch.zeros(distilled.logits.shape).flatten(0, 2)
        for teacher in teachers:
            logits = predict(teacher.network, lambda p: distilled.instances(p).to(on), len(distilled))
            total += _checked(logits, teacher.name).cpu()
            running.advance()
    return replace(distilled, logits=(total / len(teachers)).half().view(distilled.logits.shape))


def _checked(logits: torch.Tensor, name: str) -> torch.Tensor:
    largest = logits.abs().max().item()
    if not largest < torch.finfo(torch.float16).max:
        raise InferFastError(
            f"The logits of teacher {name} reach {largest:.3g}, more than float16 holds: it is hardly trained (more "
            "--squeeze.epochs, or a lower --squeeze.lr)."
        )
    return logits


def label_images(images: torch.Tensor, pixels: Pixels, teachers: list[Teacher]) -> torch.Tensor:
    """The teachers' averaged logits float32 (N, C) for real images uint8 (N, 3, H, W), rounded to float16 as stored."""
    total = sum(
        _checked(predict(t.network, lambda p: pixels.normalise(images[p]), len(images)), t.name) for t in teachers
    )
    return (total / len(teachers)).half().float()


def dynamic_labels(teachers: list[Teacher], precision: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that labels a batch as a student sees it: the teachers' averaged logits, float32 (B, C).

    The "dynamic" labels of INFER (arXiv 2408.06927, section 4.1): nothing is stored but the teachers.
    """
    networks = [copy.deepcopy(t.network).eval().to(memory_format=torch.channels_last) for t in teachers]

    @torch.no_grad()
    def label(images: torch.Tensor) -> torch.Tensor:
        with at_precision(images.device, precision):
            return sum(network(images).float() for network in networks) / len(networks)

    return label


def record_labels(
    distilled: DistilledSet, teachers: list[Teacher], settings: StudentSettings, folder: Path, seed: int = 0
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
    label, compose = dynamic_labels(teachers, settings.precision), Composer(resident)
    with stage("relabel (FKD)", len(wanted), "epochs") as running:
        for epoch in wanted:
            draws = list(
                batches(
                    resident,
                    batch_size=settings.batch_size,
                    updates=-(-len(distilled) // settings.batch_size),
                    augmentation=augmentation,
                    generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch),
                )
            )
            logits = [label(compose(*d)[0].contiguous(memory_format=torch.channels_last)).half() for d in draws]
            fkd.write_epoch(fkd.epoch_path(kept, epoch), draws, logits)
            running.advance()
    return kept


def _labels_key(
    distilled: DistilledSet, teachers: list[Teacher], settings: StudentSettings, how: Augmentation, seed: int
) -> str:
    """A hash of what stored labels depend on: those of other settings never mix with these."""
    digest = hashlib.sha256()
    for tensor in (distilled.base, *(distilled.compensators or ())):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    parts = [[t.sha256 for t in teachers], asdict(how), settings.batch_size, settings.precision, seed]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def device_of(teachers: list[Teacher]) -> torch.device:
    """Where the teachers are."""
    return next(teachers[0].network.parameters()).device


def teachers_of(distilled: DistilledSet, folder: Path) -> list[Teacher]:
    """The teachers named in the card of the distilled set in `folder`, on the stages' device."""
    size = tuple(distilled.base.shape[-2:])
    teachers = [
        load_teacher(t["name"], folder / t["path"], len(distilled.classes), size, t["sha256"])
        for t in distilled.card["teachers"]
    ]
    for teacher in teachers:
        teacher.network.to(cli.device())
    return teachers


@dataclass(frozen=True)
class RelabelOptions:
    """Flags of python -m infer_fast.relabel."""

    syn_data_path: Path = Path("runs/digits")
    """the distilled set's folder"""
    fkd: bool = False
    """store the labels of every batch of every epoch of the set's own students, in the set's folder fkd/"""
    epochs: int | None = None
    """epochs to store (with --fkd); None: those of the set's recipe"""


def _main(args: list[str]) -> None:
    options = cli.parse(
        RelabelOptions, RelabelOptions(), args, "python -m infer_fast.relabel", "Soft labels for a distilled set."
    )
    folder = options.syn_data_path
    distilled = load(folder)
    teachers = teachers_of(distilled, folder)
    if options.fkd:
        student = student_of(distilled.card["recipe"])
        student = replace(student, epochs=options.epochs or student.epochs)
        kept = record_labels(distilled, teachers, student, folder, distilled.card["recipe"]["synthesis"]["seed"])
        weight = sum(file.stat().st_size for file in kept.iterdir())
        print(
            f"{student.epochs} epochs' labels are in {kept}: {weight:,} bytes, {weight / distilled.label_bytes:.0f} "
            f"times the {distilled.label_bytes:,} bytes of the static labels."
        )
        return
    relabelled = relabel(distilled, teachers)
    relabelled.save(folder)
    changed = not torch.equal(relabelled.logits, distilled.logits)
    if changed:
        # Results were measured with the old labels.
        write_json(folder / CARD, {**distilled.card, "results": []})
    print(f"{len(relabelled)} instances labelled, {'labels changed' if changed else 'same labels as before'}.")


if __name__ == "__main__":
    sys.exit(cli.run(_main))
