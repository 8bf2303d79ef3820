"""What students are trained on: the distilled set, and what else the same bytes could have bought."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from infer_fast.data.augment import augmentation_of
from infer_fast.data.budget import Base, Storage, filled
from infer_fast.data.distilled import DistilledSet
from infer_fast.data.fkd import epoch_bytes
from infer_fast.data.images import ImageDataset, Split, draw_of_each_class, drawing, smallest_class
from infer_fast.data.label_store import LabelStore
from infer_fast.data.sets import FileSet, ResidentSet, resident_distilled, resident_split, training_set
from infer_fast.errors import InferFastError
from infer_fast.models.teacher import Teacher
from infer_fast.settings import Compare, StudentSettings
from infer_fast.students.labels import averaged_logits, dynamic_labels

DISTILLED, RANDOM_REAL, RANDOM_CODED, WHOLE = "distilled", "random real", "random real, coded", "whole dataset"
LABELS = {  # what the table calls them
    "static": "soft labels",
    "dynamic": "dynamic labels",
    "fkd": "labels of every crop (FKD)",
    "hard": "hard labels",
}


@dataclass(frozen=True)
class Store:
    """A folder of finished students; resume: whether they are taken from it; keep: whether new ones go to it."""

    folder: Path
    resume: bool = True
    keep: bool = True

    def path(self, key: str) -> Path:
        """The file of the student of that key."""
        return self.folder / f"{key}.json"


@dataclass(frozen=True)
class Evaluation:
    """A distilled set that students judge, and how.

    dataset: what it stands for, on the students' device; teachers: label the random real images (needed unless compare
    is none) and every batch where the labels ask for it; ipc: images per class of the budget, the number of random real
    images; seeds: students per row, the first of them seeded by `seed`; store: where finished students are kept (None:
    nowhere); labels_folder: where the labels of every crop are kept, made if they are not there; budget: bytes of a
    whole file, which random real images fill too, raw and through the set's codec (None: ipc counts images alone).
    """

    distilled: DistilledSet
    dataset: ImageDataset
    teachers: Sequence[Teacher]
    settings: StudentSettings
    ipc: int
    compare: Compare = "random"
    seeds: int = 3
    seed: int = 0
    store: Store | None = None
    labels_folder: Path | None = None
    budget: int | None = None

    @property
    def updates_per_epoch(self) -> int:
        """Of the distilled set; what is compared gets as many."""
        return -(-len(self.distilled) // self.settings.batch_size)


class Kind(NamedTuple):
    """A row of the table before anything is made: what is trained on, and with which of LABELS."""

    trained_on: str
    labels: str


def kinds(compare: str, labels: Sequence[str], coded: bool = False) -> list[Kind]:
    """The rows that `compare` asks for, once for each kind of soft labels, in the table's order.

    coded: whether random real images through the set's own codec are among them.
    Raises InferFastError where they alone are asked for, and can't be had.
    """
    if compare == "coded" and not coded:
        raise InferFastError("--compare coded: only a budget of bytes counts what a codec makes of random real images.")
    own = list(dict.fromkeys(labels))
    every = [DISTILLED, RANDOM_CODED, RANDOM_REAL] if coded else [DISTILLED, RANDOM_REAL]
    rows = every[: {"none": 1, "coded": 2}.get(compare, len(every))]
    hard = ["hard"] if compare == "all" else []
    made = [Kind(row, label) for row in rows for label in (*own, *hard)]
    return [*made, Kind(WHOLE, "hard")] if compare == "all" else made


def epochs_of(kind: Kind, settings: StudentSettings, teachers: int) -> int:
    """Passes over the distilled set: dynamic labels divide them by teachers + 1 (INFER, arXiv 2408.06927, section 4)"""
    return max(1, settings.epochs // (teachers + 1 if kind.labels == "dynamic" else 1))


@dataclass(frozen=True)
class Candidate:
    """Something to train a student on: a name, its labels, its bytes, its updates, and the set itself for a given seed.

    label: makes the labels of every batch while the student trains (none where they are static, or replayed); teachers:
    hashes of the teachers that label every crop; replayed: the folder of stored labels of every crop.
    """

    trained_on: str
    labels: str
    image_bytes: int
    label_bytes: int
    updates: int
    source: Callable[[int], ResidentSet | FileSet]
    label: Callable[[torch.Tensor], torch.Tensor] | None = None
    teachers: tuple[str, ...] = ()
    replayed: Path | None = None


def candidates(evaluation: Evaluation, replayed: Path | None = None) -> list[Candidate]:
    """Everything that students are trained on; replayed: where the distilled set's labels of every crop are stored."""
    settings = evaluation.settings
    on_the_way = {"dynamic", "fkd"} & set(settings.labels)
    size = evaluation.dataset.size
    label = dynamic_labels(evaluation.teachers, settings.precision, size) if on_the_way else None

    @cache
    def plain(trained_on: str, soft: bool) -> Candidate:
        return PLAIN[trained_on](evaluation, soft)

    made = []
    for kind in kinds(evaluation.compare, settings.labels, evaluation.budget is not None):
        candidate = replace(
            plain(kind.trained_on, kind.labels != "hard"),
            labels=LABELS[kind.labels],
            updates=evaluation.updates_per_epoch * epochs_of(kind, settings, len(evaluation.teachers)),
        )
        if kind.labels in ("dynamic", "fkd"):
            candidate = _labelled_on_the_way(candidate, kind, evaluation, label, replayed)
        made.append(candidate)
    return made


def _labelled_on_the_way(
    candidate: Candidate,
    kind: Kind,
    evaluation: Evaluation,
    label: Callable[[torch.Tensor], torch.Tensor] | None,
    replayed: Path | None,
) -> Candidate:
    """Labels of every batch: replayed where they are stored; elsewhere the teachers give the same ones on the spot."""
    hashes = tuple(t.sha256 for t in evaluation.teachers)
    if kind.labels == "dynamic":
        weight = sum(t.weight_bytes for t in evaluation.teachers)
        return replace(candidate, label_bytes=weight, label=label, teachers=hashes)
    replayed = replayed if kind.trained_on == DISTILLED else None
    settings, classes = evaluation.settings, len(evaluation.dataset.classes)
    instances = len(evaluation.distilled) if kind.trained_on == DISTILLED else evaluation.ipc * classes
    epochs = -(-candidate.updates // -(-instances // settings.batch_size))
    stored = epochs * epoch_bytes(instances, settings.batch_size, classes, augmentation_of(settings))
    on_the_spot = label if replayed is None else None
    return replace(candidate, label_bytes=stored, label=on_the_spot, teachers=hashes, replayed=replayed)


def _hard_label_bytes(evaluation: Evaluation) -> int:
    return 1 if len(evaluation.dataset.classes) <= 256 else 2


def _distilled(evaluation: Evaluation, soft: bool) -> Candidate:
    distilled = evaluation.distilled
    hard = 0 if evaluation.budget is not None else _hard_label_bytes(evaluation) * len(distilled)
    label_bytes = distilled.label_bytes if soft else hard
    resident = resident_distilled(distilled, soft=soft).to(evaluation.dataset.device)
    return Candidate(DISTILLED, "", distilled.image_bytes, label_bytes, 0, lambda _: resident)


def _random_real(evaluation: Evaluation, soft: bool) -> Candidate:
    """Random training images, as many of every class as can be, drawn anew for each seed, stored raw."""
    dataset, classes = evaluation.dataset, len(evaluation.dataset.classes)
    each = 2 * classes if soft else _hard_label_bytes(evaluation)
    image = 3 * dataset.size[0] * dataset.size[1]
    count = evaluation.ipc * classes if evaluation.budget is None else evaluation.budget // (image + each)

    def drawn(seed: int) -> ResidentSet:
        generator = torch.Generator().manual_seed(seed)
        order = draw_of_each_class(dataset, -(-count // classes), generator)
        positions = order.flatten() if order.numel() == count else order.T.flatten()[:count]
        split = Split(dataset.train.at(positions), dataset.train.labels[positions.to(dataset.device)])
        return _labelled(evaluation, split, evaluation.distilled.label_store.in_16_bits() if soft else None)

    return Candidate(RANDOM_REAL, "", count * image, count * each, 0, drawn)


def _random_coded(evaluation: Evaluation, soft: bool) -> Candidate:
    """Random training images through the set's codec, with labels of as many bits: as many as its budget holds.

    Hard labels take no bytes, since images are stored class by class; they are those of the same images.
    """
    dataset, distilled = evaluation.dataset, evaluation.distilled
    assert evaluation.budget is not None and distilled.coded is not None
    budget, storage = evaluation.budget, Storage(distilled.coded.codec, distilled.label_store)
    most = smallest_class(dataset)

    @cache
    def base(seed: int) -> Base:
        draw = drawing(dataset, torch.Generator().manual_seed(seed))
        return filled(draw, most, storage, budget, distilled.base.shape[1])

    def drawn(seed: int) -> ResidentSet:
        images = base(seed).images
        labels = torch.arange(len(images)).repeat_interleave(images.shape[1])
        split = Split(images.flatten(0, 1), labels).to(dataset.device)
        return _labelled(evaluation, split, distilled.label_store if soft else None)

    first = base(evaluation.seed)
    shape = *first.images.shape[:2], len(dataset.classes)
    label_bytes = storage.labels.nbytes(torch.zeros(shape)) if soft else 0
    return Candidate(RANDOM_CODED, "", first.nbytes, label_bytes, 0, drawn)


def _labelled(evaluation: Evaluation, split: Split, store: LabelStore | None) -> ResidentSet:
    """Images with the teachers' labels as `store` keeps them; None: with their classes."""
    dataset, logits = evaluation.dataset, None
    if store is not None and evaluation.teachers:
        logits = averaged_logits(evaluation.teachers, lambda p: dataset.pixels.normalise(split.images[p]), len(split))
        logits = store.of(logits, split.labels.to(logits.device)).float()
    return resident_split(split, len(dataset.classes), dataset.pixels, logits)


def _whole(evaluation: Evaluation, soft: bool) -> Candidate:
    dataset = evaluation.dataset
    source = training_set(dataset.train, len(dataset.classes), dataset.pixels)
    label_bytes = _hard_label_bytes(evaluation) * len(dataset.train)
    return Candidate(WHOLE, "", dataset.train.nbytes, label_bytes, 0, lambda _: source)


PLAIN = {DISTILLED: _distilled, RANDOM_REAL: _random_real, RANDOM_CODED: _random_coded, WHOLE: _whole}
