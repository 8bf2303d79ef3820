"""A labelled image dataset in memory, in one shape whatever it came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from infer_fast.data.files import read_json, write_json
from infer_fast.errors import InferFastError


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, 3, H, W) and labels int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageDataset:
    """A training and a test split, the class names, and the training images' channel statistics.

    mean, std: three floats each, of [0,1] pixels over all training images; std is never 0.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every image."""
        return self.train.images.shape[2], self.train.images.shape[3]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all images and labels: the identity of the dataset in caches and cards."""
        return _fingerprint(self.train, self.test)

    def to(self, device: torch.device) -> ImageDataset:
        """The same dataset with its tensors on `device`."""
        moved = [Split(s.images.to(device), s.labels.to(device)) for s in (self.train, self.test)]
        result = ImageDataset(self.name, *moved, self.classes, self.mean, self.std)
        result.__dict__["fingerprint"] = self.fingerprint
        return result


def image_dataset(
    name: str, train: Split, test: Split, classes: tuple[str, ...], cache: Path | None = None
) -> ImageDataset:
    """Checks the parts, brings them to one form and adds the channel statistics.

    Grey images (N, 1, H, W) are repeated to 3 channels; 28x28 is padded to 32x32 with black, as the field does.
    `cache`: a folder where the statistics are kept under the dataset's fingerprint, computed once.
    Raises InferFastError for an empty split, mixed sizes between the splits, or a label out of range.
    """
    for split, which in ((train, "training"), (test, "test")):
        _check(name, split, which, len(classes))
    train, test = _standard_form(train), _standard_form(test)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise InferFastError(
            f"{name}: training images are {_size(train)} and test images {_size(test)}: all must have one size "
            "(--image-size N brings them to NxN)."
        )
    if cache is None:
        return ImageDataset(name, train, test, classes, *channel_statistics(train.images))
    fingerprint = _fingerprint(train, test)
    dataset = ImageDataset(
        name, train, test, classes, *_cached_statistics(train.images, cache / f"{name}-{fingerprint[:16]}.json")
    )
    dataset.__dict__["fingerprint"] = fingerprint  # hashed once: the property would hash every image again
    return dataset


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
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
    return tuple(mean), tuple(std)


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 (..., 3, H, W) -> float32 (images/255 - mean) / std, same shape."""
    mean_, std_ = _columns(images.device, mean, std)
    return (images.float() / 255 - mean_) / std_


def to_bytes(normalised: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """float32 (..., 3, H, W), normalised -> uint8 pixels, rounded to nearest and clamped to 0..255."""
    mean_, std_ = _columns(normalised.device, mean, std)
    return ((normalised * std_ + mean_) * 255).round().clamp(0, 255).to(torch.uint8)


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


def _columns(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1) for v in (mean, std))


def _check(name: str, split: Split, which: str, classes: int) -> None:
    if len(split.images) == 0:
        raise InferFastError(f"{name}: the {which} split holds no images.")
    if len(split.images) != len(split.labels):
        raise InferFastError(
            f"{name}: the {which} split has {len(split.images)} images but {len(split.labels)} labels."
        )
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise InferFastError(
            f"{name}: label {wrong} in the {which} split is out of range: {classes} classes are 0..{classes - 1}."
        )


def _standard_form(split: Split) -> Split:
    images = split.images
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    if tuple(images.shape[2:]) == (28, 28):
        images = torch.nn.functional.pad(images, (2, 2, 2, 2))
    return Split(images.contiguous(), split.labels.long())


def _cached_statistics(images: torch.Tensor, path: Path) -> tuple:
    if path.is_file():
        stored = read_json(path)
        return tuple(stored["mean"]), tuple(stored["std"])
    mean, std = channel_statistics(images)
    write_json(path, {"mean": mean, "std": std})
    return mean, std


def _fingerprint(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(str(tuple(split.images.shape)).encode())
        digest.update(split.images.cpu().contiguous().numpy().data)
        digest.update(split.labels.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _size(split: Split) -> str:
    return "x".join(str(n) for n in split.images.shape[2:])
