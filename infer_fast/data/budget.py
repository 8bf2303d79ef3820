"""A budget of bytes, filled: as many base images as one file holds, with its labels, compensators and headers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from infer_fast.data.card import ByteCard
from infer_fast.data.codec import Codec, Coded, encode
from infer_fast.data.distilled import DistilledSet, quantise
from infer_fast.data.images import ImageDataset
from infer_fast.data.label_store import LabelStore
from infer_fast.data.pixels import AS_STORED
from infer_fast.errors import InferFastError
from infer_fast.ops import Quantised
from infer_fast.settings import Recipe

HEADER = 64  # bytes by which numbers in a header may be longer than those that are written for now
SAMPLE = 8  # images of each class whose coded size the search begins with


class Base(NamedTuple):
    """Base images, uint8 (C, k, 3, H, W) as they will be decoded, and what they are stored as (None: raw)."""

    images: torch.Tensor
    coded: Coded | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the images as stored."""
        return self.images.nbytes if self.coded is None else self.coded.nbytes


@dataclass(frozen=True)
class Storage:
    """How a set is stored: its images' codec, its labels', and how many compensators each of how many teachers adds.

    side: pixels of a compensator's side (None: as large as the images).
    """

    codec: Codec
    labels: LabelStore
    teachers: int = 0
    compensators: int = 0
    side: int | None = None

    def coded(self, images: torch.Tensor) -> Base:
        """Base images as this storage keeps them."""
        coded, decoded = encode(images, self.codec)
        return Base(decoded, coded)

    def file_bytes(self, base: Base) -> int:
        """Bytes of the whole file of a set with these base images, at most."""
        classes, k, channels, *size = base.images.shape
        views, compensators = 1, None
        if self.compensators:
            views += self.teachers
            size = size if self.side is None else [self.side, self.side]
            compensators = quantise(torch.zeros(self.teachers, self.compensators, channels, *size), AS_STORED.std)
        logits = torch.arange(classes, dtype=torch.float16).expand(classes, k, views, classes)
        names = tuple(map(str, range(classes)))
        empty = DistilledSet(base.images, compensators, logits, AS_STORED, names, None, base.coded, self.labels)
        return empty.file_bytes + HEADER


def unlabelled(base: Base, stored: Quantised | None, labels: LabelStore, dataset: ImageDataset) -> DistilledSet:
    """The set of these images and compensators as they are stored, labels still zero; labels: how they will be."""
    classes, k = base.images.shape[:2]
    views = 1 if stored is None else 1 + len(stored.values)
    logits = torch.zeros(classes, k, views, classes, dtype=torch.float16)
    return DistilledSet(
        base.images, stored, logits, dataset.pixels, dataset.classes, coded=base.coded, label_store=labels
    )


def storage_of(recipe: Recipe, compensators: int) -> Storage:
    """The recipe's, with so many compensators of each teacher. Raises InferFastError for a truth that is no share."""
    store = recipe.store
    if not 0 <= store.label_truth < 1:
        raise InferFastError(f"--label-truth {store.label_truth:g}: a label's share of the truth is 0 to less than 1.")
    top = store.label_top if store.label_bits == "top" else 0
    temperature = recipe.student.temperature if top or store.label_truth else 1.0  # where it matters
    labels = LabelStore(store.label_bits, top, temperature, store.label_truth)
    side = recipe.synthesis.compensator_size
    return Storage(Codec(store.codec, store.quality), labels, len(recipe.arch_name), compensators, side)


def filled(draw: Callable[[int], torch.Tensor], most: int, storage: Storage, budget: int, guess: int = SAMPLE) -> Base:
    """The most base images of each class whose set fits into `budget` bytes.

    draw(k): k images of each class, uint8 (C, k, 3, H, W); most: the largest k there is; guess: the k that is tried
    first, for coding many images takes its time. The size is taken to grow with k.
    Raises InferFastError where one image of each class does not fit.
    """
    best, fits, beyond = None, 0, most + 1
    k = min(most, guess)
    while beyond - fits > 1:
        base = storage.coded(draw(k))
        size = storage.file_bytes(base)
        if size <= budget:
            best, fits = base, k
        else:
            beyond = k
        k = min(max(k * budget // size, fits + 1), beyond - 1)
    if best is None:
        raise InferFastError(
            f"A budget of {budget:,} bytes does not hold one image of each class with its labels and compensators: "
            "raise --ipc, or choose another --codec, --quality, --label-bits or fewer --compensators."
        )
    return best


def weighed(distilled: DistilledSet, budget: int, dataset: int, *, whole_file: bool) -> ByteCard:
    """What a set weighs; dataset: bytes of the decoded training images; whole_file: whether the budget counts that."""
    file = distilled.file_bytes if whole_file else None
    return ByteCard(
        images=distilled.image_bytes,
        budget=budget,
        labels=distilled.label_bytes,
        dataset=dataset,
        ratio=dataset / (file or distilled.image_bytes),
        file=file,
    )
