"""A labelled image dataset in memory, in one shape whatever it came from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from infer_fast.data.class_names import class_positions
from infer_fast.data.decode import decode_all
from infer_fast.data.pixels import Pixels
from infer_fast.data.survey import content_hashes
from infer_fast.errors import InferFastError
from infer_fast.files import read_json, write_json

STATISTICS_SAMPLE = 10_000  # images that a set on the disk has its mean and deviation from


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, 3, H, W) and labels int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every image."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of all images, decoded."""
        return self.images.nbytes

    @property
    def device(self) -> torch.device:
        return self.images.device

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """The images at int64 `positions` of any shape: uint8 (*positions.shape, 3, H, W)."""
        return self.images[positions.to(self.device)]

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def part(self, positions: torch.Tensor) -> Split:
        """The images and labels at int64 `positions` (n,)."""
        return Split(self.at(positions), self.labels[positions.to(self.device)])


@dataclass(frozen=True, eq=False)
class FileSplit:
    """Image files that stay on the disk, and labels int64 (N,): the same face as Split, decoded when asked for.

    size: (H, W) that every file is brought to, H = W; margin: see infer_fast.data.decode.decode; keep: whether what was
    decoded once stays in memory; known: where the files' hashes are kept (infer_fast.data.survey; None: nowhere).
    """

    files: tuple[Path, ...]
    labels: torch.Tensor
    size: tuple[int, int]
    margin: float = 1.0
    keep: bool = False
    known: Path | None = None
    _kept: list[torch.Tensor] = field(default_factory=list, repr=False)  # the images, and which are there

    def __len__(self) -> int:
        return len(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all images, decoded."""
        return len(self) * 3 * self.size[0] * self.size[1]

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """The images at int64 `positions` of any shape: uint8 (*positions.shape, 3, H, W), on the device.

        Raises InferFastError naming a file that does not decode.
        """
        flat = positions.flatten().cpu()
        if not self.keep:
            return self._decoded(flat).view(*positions.shape, 3, *self.size)
        if not self._kept:
            images = torch.empty(len(self), 3, *self.size, dtype=torch.uint8, device=self.device)
            self._kept.extend([images, torch.zeros(len(self), dtype=torch.bool)])
        images, there = self._kept
        missing = flat[~there[flat]].unique()
        if len(missing):
            images[missing.to(self.device)] = self._decoded(missing)
            there[missing] = True
        return images[positions.to(self.device)]

    def to(self, device: torch.device) -> FileSplit:
        return replace(self, labels=self.labels.to(device), _kept=[])

    def part(self, positions: torch.Tensor) -> FileSplit:
        """The files and labels at int64 `positions` (n,)."""
        files = tuple(self.files[position] for position in positions.tolist())
        return replace(self, files=files, labels=self.labels[positions.to(self.device)], _kept=[])

    def _decoded(self, positions: torch.Tensor) -> torch.Tensor:
        files = [self.files[position] for position in positions.tolist()]
        return decode_all([(str(file), file) for file in files], self.size[0], self.margin).to(self.device)


def memory() -> int:
    """Bytes of RAM that the machine has: no dataset that is held in memory can be larger."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def most_resident() -> int:
    """Bytes of images that are decoded into memory at once, larger sets stay on the disk: a quarter of the RAM."""
    return memory() // 4


@dataclass(frozen=True)
class ImageDataset:
    """A training and a test split, the class names, and the training images' channel statistics.

    pixels: what the images are normalised with, over all training images.
    """

    name: str
    train: Split | FileSplit
    test: Split | FileSplit
    classes: tuple[str, ...]
    pixels: Pixels

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every image."""
        return self.test.size

    @property
    def device(self) -> torch.device:
        return self.test.device

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all images (of files, their content) and labels: what caches and cards know the dataset by."""
        return _fingerprint(self.train, self.test)

    def to(self, device: torch.device) -> ImageDataset:
        """The same dataset with its tensors on `device`."""
        result = replace(self, train=self.train.to(device), test=self.test.to(device))
        on_disk = isinstance(self.train, FileSplit) or isinstance(self.test, FileSplit)
        if not on_disk or "fingerprint" in self.__dict__:  # files are read for it only when it is asked for
            result.__dict__["fingerprint"] = self.fingerprint
        return result

    def with_classes(self, classes: tuple[str, ...], where: Path | str) -> ImageDataset:
        """The same images with the labels that they have among `classes`, matched as folders in `where` are.

        Raises InferFastError for a class that is none of them (infer_fast.data.class_names).
        """
        if classes == self.classes:
            return self
        place = torch.tensor(class_positions(self.classes, classes, where), device=self.device)
        train, test = (replace(split, labels=place[split.labels]) for split in (self.train, self.test))
        return replace(self, train=train, test=test, classes=classes)


def image_dataset(
    name: str,
    train: Split | FileSplit,
    test: Split | FileSplit,
    classes: tuple[str, ...],
    cache: Path | None = None,
    pixels: Pixels | None = None,
) -> ImageDataset:
    """Checks the parts, brings them to one form and adds the channel statistics.

    Grey images (N, 1, H, W) are repeated to 3 channels; 28x28 is padded to 32x32 with black, as the field does.
    pixels: mean and deviation where they are known; else those of the training images (of files on the disk, of
    10,000 drawn from them). cache: a folder where they are kept under the dataset's fingerprint, computed once: files
    on the disk are then read before anything else is done with them.
    Raises InferFastError for an empty split, mixed sizes between the splits, or a label out of range.
    """
    for split, which in ((train, "training"), (test, "test")):
        _check(name, split, which, len(classes))
    train, test = _standard_form(train), _standard_form(test)
    if train.size != test.size:
        raise InferFastError(
            f"{name}: training images are {_size(train)} and test images {_size(test)}: all must have one size "
            "(--image-size N brings them to NxN)."
        )
    if cache is None:
        return ImageDataset(name, train, test, classes, pixels or channel_statistics(_sample(train)))
    on_disk = isinstance(train, FileSplit) or isinstance(test, FileSplit)
    if pixels is not None and not on_disk:
        return ImageDataset(name, train, test, classes, pixels)
    fingerprint = _fingerprint(train, test)
    pixels = pixels or _cached_statistics(train, cache / f"{name}-{fingerprint[:16]}.json")
    dataset = ImageDataset(name, train, test, classes, pixels)
    dataset.__dict__["fingerprint"] = fingerprint  # hashed once: the property would hash every image again
    return dataset


def held_out(dataset: ImageDataset, count: int) -> ImageDataset:
    """The same with `count` of its training images, always the same ones, as test images: to choose settings on.

    The test images are then not looked at; the channel statistics stay. Raises InferFastError if nothing is left.
    """
    if not 0 < count < len(dataset.train):
        raise InferFastError(
            f"--held-out {count}: {dataset.name} has {len(dataset.train)} training images, and some must be left."
        )
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
    judged, kept = order[:count].sort().values, order[count:].sort().values
    return replace(dataset, train=dataset.train.part(kept), test=dataset.train.part(judged))


def channel_statistics(images: torch.Tensor) -> Pixels:
    """Mean and standard deviation per channel of uint8 images (N, 3, H, W), in [0,1] pixels; exact in integers."""
    mean, std = [], []
    levels = torch.arange(256, dtype=torch.float64)
    for channel in range(images.shape[1]):
        # A histogram of 256 levels: no float copy of the images.
        counts = torch.bincount(images[:, channel].reshape(-1).int().cpu(), minlength=256).double()
        average = (counts * levels).sum() / counts.sum()
        variance = (counts * (levels - average) ** 2).sum() / counts.sum()
        mean.append(float(average) / 255)
        std.append(max(float(variance.sqrt()) / 255, 1 / 255))
    return Pixels((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def smallest_class(dataset: ImageDataset) -> int:
    """Training images of the class that has the fewest."""
    return int(dataset.train.labels.bincount(minlength=len(dataset.classes)).min())


def draw_of_each_class(dataset: ImageDataset, count: int, generator: torch.Generator) -> torch.Tensor:
    """Positions int64 (C, count) of `count` different training images of each class, on the CPU.

    Raises InferFastError when a class has fewer.
    """
    labels, rows = dataset.train.labels.cpu(), []
    for label, name in enumerate(dataset.classes):
        own = torch.nonzero(labels == label).flatten()
        if len(own) < count:
            raise InferFastError(
                f"Class {name!r} has {len(own)} training images, fewer than the {count} wanted of each: lower --ipc."
            )
        rows.append(own[torch.randperm(len(own), generator=generator)[:count]])
    return torch.stack(rows)


def drawing(dataset: ImageDataset, generator: torch.Generator) -> Callable[[int], torch.Tensor]:
    """draw(k): k random training images of each class, uint8 (C, k, 3, H, W) on the CPU; more begin with the same."""
    state = generator.get_state()

    def draw(k: int) -> torch.Tensor:
        return dataset.train.at(draw_of_each_class(dataset, k, torch.Generator().set_state(state))).cpu()

    return draw


def _check(name: str, split: Split | FileSplit, which: str, classes: int) -> None:
    count = len(split.files if isinstance(split, FileSplit) else split.images)
    if count == 0:
        raise InferFastError(f"{name}: the {which} split holds no images.")
    if count != len(split.labels):
        raise InferFastError(f"{name}: the {which} split has {count} images but {len(split.labels)} labels.")
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise InferFastError(
            f"{name}: label {wrong} in the {which} split is out of range: {classes} classes are 0..{classes - 1}."
        )


def _standard_form(split: Split | FileSplit) -> Split | FileSplit:
    if isinstance(split, FileSplit):
        return split
    images = split.images
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    if tuple(images.shape[2:]) == (28, 28):
        images = torch.nn.functional.pad(images, (2, 2, 2, 2))
    return Split(images.contiguous(), split.labels.long())


def _cached_statistics(split: Split | FileSplit, path: Path) -> Pixels:
    if path.is_file():
        stored = read_json(path)
        return Pixels(tuple(stored["mean"]), tuple(stored["std"]))
    pixels = channel_statistics(_sample(split))
    write_json(path, pixels._asdict())
    return pixels


def _sample(split: Split | FileSplit) -> torch.Tensor:
    """The images that the statistics are taken of: all that are in memory, some of those on the disk."""
    if isinstance(split, Split):
        return split.images
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return split.at(order[:STATISTICS_SAMPLE])


def _fingerprint(*splits: Split | FileSplit) -> str:
    digest = hashlib.sha256()
    for split in splits:
        if isinstance(split, FileSplit):
            digest.update(f"{split.size} {split.margin} ".encode())
            digest.update(b"".join(content_hashes(split.files, split.known)))
        else:
            digest.update(str(tuple(split.images.shape)).encode())
            digest.update(split.images.cpu().contiguous().numpy().data)
        digest.update(split.labels.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _size(split: Split | FileSplit) -> str:
    return "x".join(str(n) for n in split.size)
