"""Datasets that need no files of the user's: scikit-learn's digits, and what torchvision downloads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from infer_fast.data.images import Split
from infer_fast.errors import InferFastError, first_line

TORCHVISION_NAMES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "mnist": "MNIST",
    "svhn": "SVHN",
}
DIGITS_TEST_SHARE = 3  # every third image of each class is held out


def read_digits() -> tuple[Split, Split, tuple[str, ...]]:
    """scikit-learn's bundled 8x8 digits (1,797 grey images, levels 0..16): two thirds training, one third test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(np.round(data.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(10):
        held_out[torch.nonzero(labels == c).flatten()[::DIGITS_TEST_SHARE]] = True
    train, test = (Split(images[mask], labels[mask]) for mask in (~held_out, held_out))
    return train, test, tuple(str(c) for c in range(10))


def read_torchvision(name: str, root: Path, *, download: bool) -> tuple[Split, Split, tuple[str, ...]]:
    """A dataset that torchvision knows, kept under `root` in torchvision's own layout."""
    import torchvision

    cls = getattr(torchvision.datasets, TORCHVISION_NAMES[name])
    if root.name == getattr(cls, "base_folder", None):  # the folder that the archive unpacks to
        root = root.absolute().parent
    splits = []
    try:
        for train in (True, False):
            which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
            splits.append(cls(str(root), download=download, **which))
    except (RuntimeError, OSError) as error:
        advice = "or give its place with --data-path" if download else "expected torchvision's layout of it there"
        raise InferFastError(
            f"{name} could not be read under {root} ({first_line(error)}): check the network, {advice}."
        ) from error
    parts = []
    for split in splits:
        pixels = torch.as_tensor(split.data)
        if name == "svhn":
            images, targets = pixels, split.labels
        else:
            images = pixels.permute(0, 3, 1, 2) if pixels.dim() == 4 else pixels.unsqueeze(1)
            targets = split.targets
        parts.append(Split(images.contiguous(), torch.as_tensor(targets).long()))
    classes = getattr(splits[0], "classes", None) or [str(c) for c in range(10)]
    return parts[0], parts[1], tuple(classes)


def known_names(name: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Files without class names get torchvision's, where the dataset is one that it knows."""
    if name not in TORCHVISION_NAMES or any(not c.isdigit() for c in classes):
        return classes
    import torchvision

    names = getattr(getattr(torchvision.datasets, TORCHVISION_NAMES[name]), "classes", ())
    return tuple(names) if len(names) == len(classes) else classes
