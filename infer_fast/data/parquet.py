"""Hugging Face parquet files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infer_fast.data.decode import decode_all
from infer_fast.data.folders import encodable, files_below
from infer_fast.data.images import Split, memory
from infer_fast.errors import InferFastError
from infer_fast.extras import require

SPLITS = ("train", "test", "validation", "valid", "val")  # training images, and where test images are looked for
FILE = re.compile(r"(train|test|validation|valid|val)(?:ing)?(?:[-.].*|_?\d.*)?")
IMAGE, LABEL = ("image", "img"), ("fine_label", "label")
BATCH = 64  # rows that are read at once: a page of few bytes can stand for many large images

Groups = dict[str, list[Path]]


def read_parquet(path: Path, image_size: int | None = None) -> tuple[Split, Split, tuple[str, ...]]:
    """Hugging Face parquet: column image|img as {bytes, path}, column fine_label|label as integers.

    Splits by the name of the file or its folder: train, and the first of test, validation, valid and val that has
    labels; those of one folder, as one configuration is. Class names from the Hugging Face schema if it is there.
    Raises InferFastError for missing splits, several configurations, labels that are no whole numbers, names that are
    no names, and what does not fit the memory or does not decode.
    """
    groups = _configuration(path, files_below(path, {".parquet"}))
    require("pyarrow", f"Reading {groups['train'][0].name}")
    train, labels = _labelled(path, groups, ["train"])
    test, judged = _labelled(path, groups, [name for name in SPLITS[1:] if name in groups])
    names = _class_names(groups["train"] + groups[test])
    if names is None:
        names = tuple(str(c) for c in range(int(labels.max()) + 1))
    return Split(_images(groups[train], image_size), labels), Split(_images(groups[test], image_size), judged), names


def _configuration(path: Path, files: list[Path]) -> Groups:
    """The files of each split, of the one configuration that has training and test images."""
    found: dict[Path, Groups] = {}
    for file in files:
        folder, split = _place(path, file)
        if split is not None:
            found.setdefault(folder, {}).setdefault(split, []).append(file)
    whole = [folder for folder, groups in found.items() if "train" in groups and len(groups) > 1]
    if len(whole) > 1:
        names = ", ".join(str(folder.relative_to(path)) for folder in whole)
        raise InferFastError(f"{path} holds several configurations ({names}): give the folder of one with --data-path.")
    if whole:
        return found[whole[0]]
    apart = [split for groups in found.values() for split in groups]
    if "train" not in apart or len(apart) < 2 or len(set(apart)) < len(apart):
        raise InferFastError(f"{path} needs parquet files named train* and test* (or val*): found {_names(files)}.")
    return {split: own for groups in found.values() for split, own in groups.items()}


def _place(path: Path, file: Path) -> tuple[Path, str | None]:
    """The folder of a file's configuration, and its split: train-0.parquet, or 0000.parquet in the folder train."""
    above = file.parent.name.lower() if file.parent != path else ""
    own = FILE.fullmatch(file.stem.lower())
    split = own[1] if own is not None else above if above in SPLITS else None
    return file.parent.parent if above in SPLITS else file.parent, split


def _labelled(path: Path, groups: Groups, names: list[str]) -> tuple[str, torch.Tensor]:
    """The first of the splits `names` that has labels, and those: int64 (N,)."""
    for name in names:
        labels = torch.cat([_labels_of(file) for file in groups[name]])
        if (labels >= 0).any():
            return name, labels
    raise InferFastError(f"{path}: no row of {' or '.join(names)} has a label: expected one in every row.")


def _labels_of(file: Path) -> torch.Tensor:
    """int64 (N,); -1 for no label, where no row has one."""
    import pyarrow

    with _opened(file) as source:
        name = _column(file, source.schema_arrow.names, LABEL)
        column = source.read([name]).column(name)
    kind = column.type
    if column.null_count == len(column):
        return torch.full((len(column),), -1)
    if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_boolean(kind)):
        raise InferFastError(
            f"{file}: column {name} holds {kind} (such as {column[0]!s:.40}), expected each class as a whole number "
            "from 0: encode the labels."
        )
    if column.null_count:
        row = next(i for i, value in enumerate(column) if not value.is_valid)
        raise InferFastError(f"{file}: column {name} has no label in row {row}: label it, or leave it out.")
    return torch.from_numpy(column.to_numpy().astype(np.int64))


def _images(files: list[Path], image_size: int | None) -> torch.Tensor:
    """uint8 (N, 3, H, W). Raises InferFastError before it reads more, encoded or decoded, than the memory holds."""
    rows, items, each = sum(_rows(file) for file in files), [], 0
    encoded = 0
    for file in files:
        for number, data in enumerate(_encoded(file)):
            items.append((f"{file} row {number}", data))
            encoded += len(data)
            if len(items) == 1:
                each = decode_all(items, image_size).nbytes
            if encoded + rows * each > memory():
                raise InferFastError(
                    f"{_names(files)}: {rows} images of {each} bytes don't fit the memory of {memory()} bytes: choose "
                    "a smaller --image-size, or export them to class folders, which stay on the disk."
                )
    if not items:
        raise InferFastError(f"{_names(files)} hold no images.")
    return decode_all(items, image_size)


def _encoded(file: Path) -> Iterator[bytes]:
    """The bytes of each row's image, a few rows at a time."""
    with _opened(file) as source:
        column = _column(file, source.schema_arrow.names, IMAGE)
        for batch in source.iter_batches(BATCH, columns=[column]):
            for row in batch.column(0).to_pylist():
                if not isinstance(row, dict) or row.get("bytes") is None:
                    raise InferFastError(
                        f"{file}: column {column} must hold {{bytes, path}} with the bytes of a PNG or JPEG."
                    )
                yield row["bytes"]


def _rows(file: Path) -> int:
    """The rows of a file, of which no group is larger than the memory once it is decompressed."""
    with _opened(file) as source:
        groups = [source.metadata.row_group(i) for i in range(source.metadata.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > memory():
            raise InferFastError(
                f"{file} has a row group of {largest} bytes, more than the {memory()} of memory: write smaller ones."
            )
        return source.metadata.num_rows


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A pyarrow ParquetFile. Raises InferFastError where it, or what is read from it, is damaged."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as source:
            yield source
    except (pyarrow.ArrowException, OSError) as error:
        raise InferFastError(f"{file} is not a whole parquet file ({str(error).splitlines()[0]}).") from error


def _column(file: Path, present: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in present:
            return name
    raise InferFastError(f"{file} has columns {', '.join(present)}: expected one named {' or '.join(wanted)}.")


def _class_names(files: list[Path]) -> tuple[str, ...] | None:
    """The names in the files' Hugging Face schemas, which must be the same; None: there are none."""
    found = {names: file for file in files if (names := _names_in(file)) is not None}
    if len(found) > 1:
        (first, one), (second, other) = list(found.items())[:2]
        raise InferFastError(
            f"{one} and {other} name other classes ({', '.join(first[:6])}; {', '.join(second[:6])}): write them with "
            "the same names."
        )
    return next(iter(found), None)


def _names_in(file: Path) -> tuple[str, ...] | None:
    with _opened(file) as source:
        metadata = source.schema_arrow.metadata or {}
        label = _column(file, source.schema_arrow.names, LABEL)
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if not isinstance(names, list) or not all(isinstance(n, str) and n and encodable(n) for n in names):
        raise InferFastError(f"{file}: the class names of column {label} are {names!r:.60}, expected a list of texts.")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InferFastError(
            f"{file}: two classes of column {label} are named {twice!r}: each needs a name of its own."
        )
    return tuple(names)


def _names(files: list[Path]) -> str:
    return ", ".join(f.name for f in files[:4]) + (", ..." if len(files) > 4 else "") or "none"
