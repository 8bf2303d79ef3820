"""A folder of idx files, as MNIST is published."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch

from infer_fast.data.images import Split
from infer_fast.errors import InferFastError


def read_idx(path: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """A folder of idx files as MNIST is published: {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]."""
    splits = []
    for prefix in ("train", "t10k"):
        images = _read_idx_file(_find_idx(path, f"{prefix}-images-idx3-ubyte"))
        labels = _read_idx_file(_find_idx(path, f"{prefix}-labels-idx1-ubyte"))
        if images.ndim != 3 or labels.ndim != 1:
            raise InferFastError(
                f"{path}: the {prefix} idx files have {images.ndim} and {labels.ndim} axes, not 3 and 1."
            )
        splits.append(Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))))
    classes = max(10, max(int(s.labels.max()) + 1 if len(s) else 0 for s in splits))
    return splits[0], splits[1], tuple(str(c) for c in range(classes))


def _find_idx(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise InferFastError(f"{folder} has no {name} or {name}.gz: an idx dataset needs all four files.")


def _read_idx_file(path: Path) -> np.ndarray:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, axes = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
        if zero != 0 or kind != 0x08:
            raise ValueError(f"magic number {raw[:4].hex()} is not that of unsigned bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise InferFastError(f"{path} is not a whole idx file ({error}).") from error
