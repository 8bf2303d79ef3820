"""Class folders of images: ImageFolder, Tiny-ImageNet's and ImageNet's own layouts, and distilled sets of others.

Sets too large for the memory, and ImageNet always, stay on the disk (FileSplit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from infer_fast.data.decode import IMAGE_SUFFIXES, decode_all, image_files, open_rgb
from infer_fast.data.images import FileSplit, Split, most_resident
from infer_fast.errors import InferFastError

ANNOTATIONS = "val_annotations.txt"
SOLUTION = "LOC_val_solution.csv"  # the classes of ImageNet's validation images, where those lie in one folder


class Reading(NamedTuple):
    """How image files are read: brought to image_size (None: as they are) with a margin; on_disk: never all decoded.

    known: where the hashes of files that stay on the disk are kept (None: nowhere).
    """

    image_size: int | None = None
    margin: float = 1.0
    on_disk: bool = False
    known: Path | None = None


def read_image_folder(path: Path, reading: Reading) -> tuple[Split | FileSplit, Split | FileSplit, tuple[str, ...]]:
    """train/<class>/*.{png,jpg,...} and val/ or test/ likewise; class names in sorted order.

    ImageNet as it is published too: val/ without class folders, beside LOC_val_solution.csv that names their classes.
    """
    test = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if test is None:
        raise InferFastError(f"{path} has train/ but neither val/ nor test/: students are judged on images held out.")
    folders = _class_folders(path / "train")
    classes = tuple(folder.name for folder in folders)
    if (path / SOLUTION).is_file() and not has_folders(test):
        held_out = _read_solution(path / SOLUTION, test, classes, reading)
    else:
        unknown = sorted({p.name for p in test.iterdir() if p.is_dir()} - set(classes))
        if unknown:
            raise InferFastError(f"{test} has a class {unknown[0]!r} that {path / 'train'} has not.")
        held_out, _ = read_test_folders(test, classes, reading)
    return _read_class_folders(folders, path / "train", reading), held_out, _words(path, classes)


def read_test_folders(
    folder: Path, classes: tuple[str, ...] | None, reading: Reading
) -> tuple[Split | FileSplit, tuple[str, ...]]:
    """Class folders of test images, and the classes' names: those given, else the folders'.

    Folders are the classes' names, or as many as there are classes (then in sorted order). What is decoded stays in
    memory if it all fits. Raises InferFastError for a folder that is no class.
    """
    if not folder.is_dir():
        raise InferFastError(f"{folder} does not exist: it must be a folder of class folders.")
    folders = _class_folders(folder)
    names = tuple(f.name for f in folders)
    if classes is None or set(names) <= set(classes):
        by_name = {f.name: f for f in folders}
        ordered: Sequence[Path | None] = [by_name.get(name) for name in classes or names]
    elif len(names) == len(classes):
        ordered = folders
    else:
        unknown = sorted(set(names) - set(classes))[0]
        raise InferFastError(f"{folder} has a class {unknown!r} that is none of the {len(classes)} of the dataset.")
    return _read_class_folders(ordered, folder, reading, keep=True), classes or names


def has_folders(path: Path) -> bool:
    """Whether `path` is a folder with folders in it."""
    return path.is_dir() and any(p.is_dir() for p in path.iterdir())


def _class_folders(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.is_dir())
    if not found:
        raise InferFastError(f"{folder} holds no class folders.")
    return found


def _read_class_folders(
    folders: Sequence[Path | None], parent: Path, reading: Reading, *, keep: bool = False
) -> Split | FileSplit:
    """The images of a folder for each class (None: the class has none)."""
    files, labels = [], []
    for label, folder in enumerate(folders):
        found = image_files(folder) if folder is not None else []
        files += found
        labels += [label] * len(found)
    if not files:
        raise InferFastError(f"{parent} holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}).")
    return _split(files, labels, reading, keep=keep)


def _split(files: list[Path], labels: list[int], reading: Reading, *, keep: bool = False) -> Split | FileSplit:
    """The files decoded, or left on the disk where they would not fit the memory."""
    width, height = (reading.image_size,) * 2 if reading.image_size else open_rgb(str(files[0]), files[0]).size
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


def read_image_set(
    path: Path, classes: tuple[str, ...], image_size: int | None = None, each: int | None = None
) -> torch.Tensor:
    """A distilled set that anyone wrote as class folders of images, uint8 (C, k, 3, H, W).

    Folders are newCCC or CCC (CCC the class's position), or named as the classes, or as many as there are classes (then
    in sorted order). each: take the first so many files of every class, in sorted order (None: all, which must be as
    many in every class). Raises InferFastError for a missing class, too few images, or what doesn't decode.
    """
    folders = sorted(p for p in path.iterdir() if p.is_dir())
    place = _class_positions([p.name for p in folders], classes)
    missing = sorted(set(range(len(classes))) - set(place))
    if missing or len(place) != len(classes):
        raise InferFastError(
            f"{path} has {len(folders)} class folders for {len(classes)} classes: none for {classes[missing[0]]!r}."
            if missing
            else f"{path} has {len(folders)} class folders for {len(classes)} classes: expected one for each."
        )
    ordered = [folder for _, folder in sorted(zip(place, folders, strict=True))]
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


def _class_positions(names: list[str], classes: tuple[str, ...]) -> list[int]:
    digits = [name.removeprefix("new") for name in names]
    if all(d.isdigit() and int(d) < len(classes) for d in digits):
        return [int(d) for d in digits]
    if set(names) <= set(classes):
        return [classes.index(name) for name in names]
    return list(range(len(names)))


def read_tiny_imagenet(path: Path, reading: Reading) -> tuple[Split | FileSplit, Split | FileSplit, tuple[str, ...]]:
    """Tiny-ImageNet as it is published: train/<wnid>/images/*, val/images/* with their wnids in val_annotations.txt.

    Class names from words.txt where it is there; else the wnids.
    """
    folders = _class_folders(path / "train") if (path / "train").is_dir() else []
    wnids = tuple(folder.name for folder in folders)
    if not wnids:
        raise InferFastError(f"{path / 'train'} holds no class folders.")
    annotations = path / "val" / ANNOTATIONS
    lines = [line.partition("\t") for line in annotations.read_text().splitlines()]
    pairs = [(name, rest.partition("\t")[0]) for name, _, rest in lines]
    test = _read_listed(annotations, pairs, path / "val" / "images", wnids, reading)
    return _read_class_folders(folders, path / "train", reading), test, _words(path, wnids)


def _read_solution(csv: Path, folder: Path, wnids: tuple[str, ...], reading: Reading) -> Split | FileSplit:
    """ImageNet's validation images in one folder, with their wnids in a table "ImageId,PredictionString"."""
    pairs = [line.partition(",") for line in csv.read_text().splitlines()[1:]]
    return _read_listed(csv, [(f"{name}.JPEG", rest.split(" ")[0]) for name, _, rest in pairs], folder, wnids, reading)


def _read_listed(
    source: Path, pairs: list[tuple[str, str]], folder: Path, wnids: tuple[str, ...], reading: Reading
) -> Split | FileSplit:
    """Test images that a list names with their classes: (file name, wnid), a line each."""
    place = {wnid: label for label, wnid in enumerate(wnids)}
    for number, (name, wnid) in enumerate(pairs, start=1):
        if wnid not in place:
            raise InferFastError(f"{source} entry {number} ({name}): {wnid!r} is no class of train/.")
    if not pairs:
        raise InferFastError(f"{source} names no images.")
    return _split([folder / name for name, _ in pairs], [place[wnid] for _, wnid in pairs], reading, keep=True)


def _words(path: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    """The first word of each wnid, if Tiny-ImageNet's or ImageNet's list is there, has them all, and they differ."""
    words: dict[str, str] = {}
    for name, separator in (("words.txt", "\t"), ("LOC_synset_mapping.txt", " ")):
        lines = (path / name).read_text().splitlines() if (path / name).is_file() else []
        words |= {wnid: names.split(",")[0].strip() for wnid, _, names in (line.partition(separator) for line in lines)}
    named = tuple(words.get(wnid, wnid) for wnid in wnids)
    return named if len(set(named)) == len(wnids) else wnids
