"""Class folders of images: training and test folders, and distilled sets of others.

Sets too large for the memory, and ImageNet always, stay on the disk (FileSplit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from infer_fast.data.class_names import class_positions
from infer_fast.data.decode import IMAGE_SUFFIXES, decode_all, image_files
from infer_fast.data.folders import class_folders, split_folder, subfolders
from infer_fast.data.images import FileSplit, Split, most_resident
from infer_fast.data.listed import class_words, listed_images
from infer_fast.errors import InferFastError

TEST_NAMES = ("val", "valid", "validation", "test")


class Reading(NamedTuple):
    """How image files are read: brought to image_size (None: as they are) with a margin; on_disk: never all decoded.

    known: where the hashes of files that stay on the disk are kept (None: nowhere).
    """

    image_size: int | None = None
    margin: float = 1.0
    on_disk: bool = False
    known: Path | None = None


def read_image_folder(path: Path, reading: Reading) -> tuple[Split | FileSplit, Split | FileSplit, tuple[str, ...]]:
    """train/<class>/*.{png,jpg,...}, and val/ or test/ likewise or beside a list of their classes.

    Classes are in the order of the training folders (see infer_fast.data.folders.subfolders), and named as these or by
    the first word that a list gives them. Raises InferFastError for a class without training images, a test folder that
    is no class, or test images without classes.
    """
    train = split_folder(path, "train") or path / "train"
    folders = class_folders(train)
    classes = class_words(path, tuple(folder.name for folder in folders))
    test = _test_images(path, classes, reading)
    found = [image_files(folder) for folder in folders]
    if any(found) and not all(found):
        raise InferFastError(
            f"{folders[found.index([])]} holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}): every class "
            "of the training images must have some, or no folder."
        )
    return _labelled(found, train, reading), test, classes


def _test_images(path: Path, classes: tuple[str, ...], reading: Reading) -> Split | FileSplit:
    """The first of val/ and test/ that says which class its images are, by its folders or by a list."""
    there = [folder for name in TEST_NAMES if (folder := split_folder(path, name)) is not None]
    if not there:
        raise InferFastError(f"{path} has train/ but neither val/ nor test/: students are judged on images held out.")
    for test in there:
        if _sorted_folders(test, classes):
            return read_test_folders(test, classes, reading)[0]
        listed = listed_images(path, test, classes)
        if listed is not None:
            return _split(*listed, reading, keep=True)
    raise InferFastError(
        f"{there[0]} holds no class folders, and there is no list of its images' classes: sort them into class "
        f"folders, or put val_annotations.txt into it or LOC_val_solution.csv into {path}."
    )


def _sorted_folders(test: Path, classes: tuple[str, ...]) -> list[Path]:
    """The class folders of test images. `images` is Tiny-ImageNet's: of images that a list names, or empty."""
    folders = subfolders(test)
    others = [f for f in folders if f.name != "images" or "images" in classes]
    return [f for f in folders if f in others or image_files(f)] if others else []


def read_test_folders(
    folder: Path, classes: tuple[str, ...] | None, reading: Reading
) -> tuple[Split | FileSplit, tuple[str, ...]]:
    """Class folders of test images, and the classes' names: those given, else the folders'.

    What is decoded stays in memory if it all fits. Raises InferFastError for a folder that is no class
    (infer_fast.data.class_names has the rule).
    """
    if not folder.is_dir():
        raise InferFastError(f"{folder} does not exist: it must be a folder of class folders.")
    folders = _sorted_folders(folder, classes or ()) or class_folders(folder)
    names = [f.name for f in folders]
    if classes is None:
        classes = class_words(folder.parent, tuple(names))
    place = dict(zip(class_positions(names, classes, folder), folders, strict=True))
    found = [image_files(place[label]) if label in place else [] for label in range(len(classes))]
    return _labelled(found, folder, reading, keep=True), classes


def has_folders(path: Path) -> bool:
    """Whether `path` is a folder with folders in it."""
    return path.is_dir() and bool(subfolders(path))


def read_image_set(
    path: Path, classes: tuple[str, ...], image_size: int | None = None, each: int | None = None
) -> torch.Tensor:
    """A distilled set that anyone wrote as class folders of images, uint8 (C, k, 3, H, W).

    Folders are named as the classes, or newCCC or CCC, CCC the class's position (infer_fast.data.class_names has the
    rule). each: take the first so many files of every class, in sorted order (None: all, which must be as many in every
    class). Raises InferFastError for a missing class, too few images, or what doesn't decode.
    """
    folders = class_folders(path)
    place = dict(zip(class_positions([f.name for f in folders], classes, path), folders, strict=True))
    missing = next((name for label, name in enumerate(classes) if label not in place), None)
    if missing is not None:
        raise InferFastError(
            f"{path} has {len(folders)} class folders for {len(classes)} classes: none for {missing!r}."
        )
    ordered = [place[label] for label in range(len(classes))]
    files = [image_files(folder)[:each] for folder in ordered]
    counts = [len(found) for found in files]
    if each is not None and min(counts) < each:
        few = ordered[counts.index(min(counts))]
        raise InferFastError(f"{few} holds {min(counts)} images: {each} of every class are wanted.")
    if min(counts) == 0 or min(counts) != max(counts):
        few, many = ordered[counts.index(min(counts))], ordered[counts.index(max(counts))]
        raise InferFastError(
            f"{few} holds {min(counts)} images and {many} {max(counts)}: every class must have as many, at least 1."
        )
    images = decode_all([(str(f), f) for found in files for f in found], image_size)
    return images.view(len(classes), counts[0], *images.shape[1:])


def _labelled(found: Sequence[list[Path]], parent: Path, reading: Reading, *, keep: bool = False) -> Split | FileSplit:
    """The images found for each class, labelled with its position."""
    files = [file for own in found for file in own]
    labels = [label for label, own in enumerate(found) for _ in own]
    if not files:
        raise InferFastError(f"{parent} holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}).")
    return _split(files, labels, reading, keep=keep)


def _split(files: list[Path], labels: list[int], reading: Reading, *, keep: bool = False) -> Split | FileSplit:
    """The files decoded, or left on the disk where they would not fit the memory."""
    height, width = (
        (reading.image_size,) * 2 if reading.image_size else decode_all([(str(files[0]), files[0])]).shape[2:]
    )
    if not reading.on_disk and len(files) * 3 * width * height <= most_resident():
        images = decode_all([(str(f), f) for f in files], reading.image_size, reading.margin)
        return Split(images, torch.tensor(labels))
    if width != height:
        raise InferFastError(
            f"{len(files)} images of {width}x{height} stay on the disk, and are brought to squares then: give "
            "--image-size N."
        )
    split = FileSplit(tuple(files), torch.tensor(labels), (height, width), reading.margin, known=reading.known)
    return replace(split, keep=keep and split.nbytes <= most_resident())
