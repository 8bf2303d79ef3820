"""CIFAR's binary files: records of one or two label bytes and 3,072 of a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from infer_fast.data.folders import text_lines
from infer_fast.data.images import Split
from infer_fast.errors import InferFastError

FOLDERS = ("cifar-10-batches-bin", "cifar-100-binary")  # what the archives unpack to
PICTURE = (3, 32, 32)
CIFAR10 = tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt"
CIFAR100 = ("train.bin",), "test.bin", "fine_label_names.txt"


def cifar_folder(path: Path) -> Path | None:
    """`path`, or the folder in it, that holds CIFAR's binary files; None: there are none."""
    folders = [path, *(path / name for name in FOLDERS)]
    firsts = (CIFAR10[0][0], CIFAR100[0][0])
    return next((folder for folder in folders if any((folder / first).is_file() for first in firsts)), None)


def read_cifar(folder: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """CIFAR-10's or CIFAR-100's (fine labels) binary files, and their list of names if it is there.

    Raises InferFastError for a missing file, or one that is not whole records.
    """
    hundred = (folder / CIFAR100[0][0]).is_file()
    train, test, names = CIFAR100 if hundred else CIFAR10
    classes = text_lines(folder / names) if (folder / names).is_file() else []
    count = 100 if hundred else 10
    if classes and len(classes) != count:
        raise InferFastError(f"{folder / names} names {len(classes)} classes, expected {count}: remove or repair it.")
    splits = [_read([folder / name for name in files], 2 if hundred else 1) for files in (train, (test,))]
    return splits[0], splits[1], tuple(c.strip() for c in classes) or tuple(str(c) for c in range(count))


def _read(files: list[Path], label_bytes: int) -> Split:
    parts = [_records(file, label_bytes) for file in files]
    records = np.concatenate(parts)
    images = torch.from_numpy(records[:, label_bytes:].reshape(-1, *PICTURE).copy())
    return Split(images, torch.from_numpy(records[:, label_bytes - 1].astype(np.int64)))


def _records(file: Path, label_bytes: int) -> np.ndarray:
    """uint8 (N, label_bytes + 3072)."""
    if not file.is_file():
        raise InferFastError(f"{file} does not exist: CIFAR's binary files belong together.")
    raw, each = np.fromfile(file, np.uint8), label_bytes + int(np.prod(PICTURE))
    if len(raw) % each:
        raise InferFastError(f"{file} has {len(raw)} bytes, not whole records of {each}: copy it again.")
    return raw.reshape(-1, each)
