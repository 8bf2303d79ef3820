"""A folder of idx files, as MNIST and EMNIST are published."""

from __future__ import annotations

import gzip
import math
import re
import struct
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch

from infer_fast.data.images import Split, memory
from infer_fast.errors import InferFastError

NAME = re.compile(r"(?P<set>.*?)(?P<part>train|t10k|test)-(?P<what>images|labels)[-.]idx[13]-ubyte(?:\.gz)?")
AXES = {"images": "idx3", "labels": "idx1"}
GZIP_RATIO = 1032  # bytes that one byte of gzip can stand for at most
LETTERS = "letters"  # EMNIST's split whose classes are 1..26


def has_idx(path: Path) -> bool:
    """Whether a folder holds idx files."""
    return any(NAME.fullmatch(file.name) and file.is_file() for file in path.iterdir())


def read_idx(path: Path, name: str = "") -> tuple[Split, Split, tuple[str, ...]]:
    """A folder of idx files: {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz].

    `test` stands for `t10k`, and a dot for the second hyphen; all four names may begin with a set's own, as EMNIST's do
    (emnist-letters-). `name` chooses where there are several sets. Raises InferFastError for a missing or damaged file,
    or several sets of which none has the name.
    """
    there = (file for file in sorted(path.iterdir()) if file.is_file())
    found = {match: file for file in there if (match := NAME.fullmatch(file.name))}
    chosen = _chosen(path, sorted({match["set"] for match in found}), name)
    files = {
        ("t10k" if match["part"] == "test" else match["part"], match["what"]): file
        for match, file in reversed(found.items())
        if match["set"] == chosen
    }
    splits = []
    for part in ("train", "t10k"):
        images, labels = (_read_idx_file(_found(path, files, chosen, part, what)) for what in AXES)
        if images.ndim != 3 or labels.ndim != 1:
            axes = f"{images.ndim} and {labels.ndim} axes"
            raise InferFastError(f"{path}: the {part} idx files have {axes}, not 3 and 1.")
        splits.append(Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))))
    return _named(splits[0], splits[1], chosen)


def _found(path: Path, files: dict[tuple[str, str], Path], chosen: str, part: str, what: str) -> Path:
    if (part, what) not in files:
        name = f"{chosen}{part}-{what}-{AXES[what]}-ubyte"
        raise InferFastError(f"{path} has no {name} or {name}.gz: an idx dataset needs all four files.")
    return files[part, what]


def _chosen(path: Path, sets: list[str], name: str) -> str:
    if len(sets) == 1:
        return sets[0]
    own = [s for s in sets if s.rstrip("-_.") == name]
    if len(own) != 1:
        shown = ", ".join(s.rstrip("-_.") or "one without a name" for s in sets)
        raise InferFastError(f"{path} holds the idx files of several sets ({shown}): name one of them with --dataset.")
    return own[0]


def _named(train: Split, test: Split, chosen: str) -> tuple[Split, Split, tuple[str, ...]]:
    """The splits with their classes: torchvision's where the files are EMNIST's, else numbers, 10 at least."""
    import torchvision

    kind = chosen.rstrip("-_.").removeprefix("emnist").strip("-_.")
    names = torchvision.datasets.EMNIST.classes_split_dict.get(kind) if chosen.startswith("emnist") else None
    if names is not None and kind == LETTERS:
        return Split(train.images, train.labels - 1), Split(test.images, test.labels - 1), tuple(names[1:])
    if names is not None:
        return train, test, tuple(names)
    classes = max(10, max(int(s.labels.max()) + 1 if len(s) else 0 for s in (train, test)))
    return train, test, tuple(str(c) for c in range(classes))


def _read_idx_file(path: Path) -> np.ndarray:
    try:
        with cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            start = file.read(4)
            zero, kind, axes = struct.unpack(">HBB", start)
            if zero != 0 or kind != 0x08:
                raise ValueError(f"magic number {start.hex()} is not that of unsigned bytes")
            shape = struct.unpack(f">{axes}I", file.read(4 * axes))
            count = math.prod(shape)
            _check_size(path, count)
            raw = file.read(count + 1)
        if len(raw) != count:
            had = f"{len(raw)}" if len(raw) < count else "more"
            raise ValueError(f"its header says {count} bytes, it has {had}")
        return np.frombuffer(raw, np.uint8).reshape(shape).copy()
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise InferFastError(f"{path} is not a whole idx file ({error}).") from error


def _check_size(path: Path, count: int) -> None:
    """Before anything is decompressed: what the header says must fit the memory, and the file be able to hold it."""
    there = path.stat().st_size * (GZIP_RATIO if path.suffix == ".gz" else 1)
    if count > there:
        raise ValueError(f"its header says {count} bytes, more than the file can hold")
    if count > memory():
        raise ValueError(f"its header says {count} bytes, more than the {memory()} of memory")
