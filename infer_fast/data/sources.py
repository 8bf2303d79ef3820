"""Where datasets come from: each source is read into the same ImageDataset.

digits (scikit-learn's own), torchvision's names (downloaded, or found under the given path), a folder of idx(.gz) or of
CIFAR's binary files, an ImageFolder (train/ and val/ or test/), Tiny-ImageNet's and ImageNet's own layouts, and Hugging
Face parquet files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from infer_fast.data.cifar_binary import cifar_folder, read_cifar
from infer_fast.data.class_folders import Reading, has_folders, read_image_folder, read_test_folders
from infer_fast.data.folders import files_below, split_folder
from infer_fast.data.idx import has_idx, read_idx
from infer_fast.data.images import FileSplit, ImageDataset, Split, held_out, image_dataset
from infer_fast.data.known import TORCHVISION_NAMES, known_names, read_digits, read_torchvision
from infer_fast.data.listed import images_root
from infer_fast.data.parquet import read_parquet
from infer_fast.data.pixels import Pixels
from infer_fast.errors import InferFastError

AnySplit = Split | FileSplit
ALIASES = {
    "fashionmnist": "fashion-mnist",
    "tiny": "tiny-imagenet",
    "imagenet-1k": "imagenet",
    "imagenet1k": "imagenet",
}
KNOWN_FILES = "files.sqlite"  # in the cache: the hashes of files on the disk
IMAGENET_SIZE = 224
IMAGENET_MARGIN = 256 / 224  # a test image's shorter side over the square cut from its centre, as torchvision measures
IMAGENET_PIXELS = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what torchvision's weights were trained with


def load_dataset(
    name: str,
    data_path: Path | None = None,
    *,
    image_size: int | None = None,
    cache: Path | None = None,
    val_path: Path | None = None,
    hold_out: int = 0,
) -> ImageDataset:
    """Reads dataset `name`: from `data_path` in whatever layout is found there, else from its public source.

    image_size: resize (shorter side) and centre-crop every image of a folder or parquet to this many pixels squared
    (ImageNet: 224 unless given, the shorter side to 256/224 of it). cache: a folder where channel statistics are kept,
    and hashes of files that stay on the disk.
    val_path: class folders of test images, in place of the dataset's own; without a data_path there are then no
    training images (but digits'), and the statistics are those of the test images. hold_out: so many training images
    are the test images, in place of the dataset's own (0: none).
    Raises InferFastError when a path is missing or holds no images, an image does not decode, sizes are mixed,
    labels are out of range, or a download fails.
    """
    key = canonical_name(name)
    hashes = None if cache is None else cache / KNOWN_FILES
    reading, pixels = Reading(image_size, known=hashes), None
    if key == "imagenet":
        reading = Reading(image_size or IMAGENET_SIZE, IMAGENET_MARGIN, on_disk=True, known=hashes)
        pixels = IMAGENET_PIXELS
    if data_path is not None:
        parts = _read_path(key, data_path, reading)
        parts = (*parts[:2], known_names(key, parts[2]))
    elif key == "digits":
        parts = read_digits()
    elif val_path is not None:
        test, classes = read_test_folders(val_path, None, reading)
        return _without_training(key, test, classes, cache, pixels)
    elif key in TORCHVISION_NAMES:
        parts = read_torchvision(key, Path("data"), download=True)
    else:
        known = ", ".join(["digits", *TORCHVISION_NAMES])
        raise InferFastError(
            f"{name} is not a dataset that can be fetched by name ({known}): give its place with --data-path."
        )
    if val_path is not None:
        parts = (parts[0], *read_test_folders(val_path, parts[2], reading))
    dataset = image_dataset(key, *parts, cache=cache, pixels=pixels)
    return held_out(dataset, hold_out) if hold_out else dataset


def canonical_name(name: str) -> str:
    """The one name of a dataset that goes by several: hyphens and underscores alike, `tiny` for tiny-imagenet."""
    key = name.lower().replace("_", "-")
    return ALIASES.get(key, key)


def _without_training(
    name: str, test: AnySplit, classes: tuple[str, ...], cache: Path | None, pixels: Pixels | None
) -> ImageDataset:
    """A dataset of test images alone: no training image, statistics of the test images where none are known."""
    judged = image_dataset(name, test, test, classes, cache, pixels)
    nothing = Split(torch.empty(0, 3, *judged.size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    return replace(judged, train=nothing)


def _read_path(name: str, path: Path, reading: Reading) -> tuple[AnySplit, AnySplit, tuple[str, ...]]:
    if not path.exists():
        raise InferFastError(f"{path} does not exist: --data-path must be the folder that holds the dataset.")
    if not path.is_dir():
        raise InferFastError(f"{path} is a file: --data-path must be the folder that holds the dataset.")
    path = images_root(path)
    train = split_folder(path, "train")
    if train is not None and has_folders(train):
        return read_image_folder(path, reading)
    if files_below(path, {".parquet"}):
        return read_parquet(path, reading.image_size)
    if has_idx(path):
        return read_idx(path, name)
    if (folder := cifar_folder(path)) is not None:
        return read_cifar(folder)
    if train is not None:
        raise InferFastError(f"{train} holds no class folders.")
    if name in TORCHVISION_NAMES:
        return read_torchvision(name, path, download=False)
    raise InferFastError(
        f"{path} holds no images in a known layout: expected *.parquet, idx files (train-images-idx3-ubyte[.gz] ...), "
        "CIFAR's *.bin, or train/<class>/ and val|test/<class>/ folders."
    )
