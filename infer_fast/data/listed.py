"""Lists that name classes: of Tiny-ImageNet's and ImageNet's test images, and the words that stand for their wnids."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from infer_fast.data.class_names import ClassName
from infer_fast.data.folders import text_lines
from infer_fast.errors import InferFastError

ANNOTATIONS = "val_annotations.txt"  # in Tiny-ImageNet's val/: name, wnid and a box, between tabs
SOLUTION = "LOC_val_solution.csv"  # ImageNet's "ImageId,PredictionString": a name without its suffix, wnids and boxes
WORDS = (("words.txt", "\t"), ("LOC_synset_mapping.txt", " "))
KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")  # where the images lie below the folder that holds Kaggle's lists


def images_root(path: Path) -> Path:
    """The folder with train/ and val/ in it: `path`, or below it, as Kaggle packs ImageNet."""
    return path / KAGGLE if (path / KAGGLE).is_dir() else path


def listed_images(path: Path, test: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]] | None:
    """The files in the folder `test`, and the labels, that a list names in `test` or `path`; None: there is no list.

    Raises InferFastError for a class that is none of `classes`, or a file that is not there.
    """
    if (test / ANNOTATIONS).is_file():
        folder = test / "images" if (test / "images").is_dir() else test
        return _found(test / ANNOTATIONS, _annotated(test / ANNOTATIONS), folder, classes)
    solution = _list_beside(test, SOLUTION) or _list_beside(path, SOLUTION)
    return None if solution is None else _found(solution, _solved(solution), test, classes)


def class_words(path: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    """The first word of each wnid that the dataset's list has one for, the wnid itself for the rest.

    The wnids alone if two classes would have the same word. The classes still know the wnids as their folders' names.
    """
    words: dict[str, str] = {}
    for name, separator in WORDS:
        file = _list_beside(path, name)
        parts = [line.partition(separator) for line in text_lines(file)] if file is not None else []
        words |= {wnid.strip(): first for wnid, _, names in parts if (first := names.split(",")[0].strip())}
    named = tuple(ClassName(words[wnid], wnid) if wnid in words else wnid for wnid in wnids)
    return named if len(set(named)) == len(wnids) else wnids


def _list_beside(path: Path, name: str) -> Path | None:
    """A list in a folder, or above it where that is Kaggle's."""
    whole = path.absolute()
    above = [whole.parents[2]] if whole.parts[-3:] == KAGGLE.parts else []
    return next((folder / name for folder in [path, *above] if (folder / name).is_file()), None)


def _annotated(file: Path) -> Iterator[tuple[str, str]]:
    for line in text_lines(file):
        name, _, rest = line.partition("\t")
        yield name, rest.partition("\t")[0].strip()


def _solved(file: Path) -> Iterator[tuple[str, str]]:
    for row in csv.reader(text_lines(file)):
        if row[0] != "ImageId":
            yield f"{row[0]}.JPEG", " ".join(row[1:]).split(" ")[0]


def _found(
    source: Path, pairs: Iterator[tuple[str, str]], folder: Path, classes: tuple[str, ...]
) -> tuple[list[Path], list[int]]:
    """The files and labels of pairs (file name, wnid)."""
    place = {getattr(name, "folder", name): label for label, name in enumerate(classes)}
    files, labels = [], []
    for number, (name, wnid) in enumerate(pairs, start=1):
        if wnid not in place:
            raise InferFastError(f"{source} entry {number} ({name}): {wnid!r} is no class of train/.")
        if not (folder / name).is_file():
            raise InferFastError(f"{source} entry {number}: {folder / name} does not exist.")
        files.append(folder / name)
        labels.append(place[wnid])
    if not files:
        raise InferFastError(f"{source} names no images.")
    return files, labels
