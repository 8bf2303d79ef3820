"""Hugging Face parquet files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from infer_fast.data.decode import decode_all
from infer_fast.data.images import Split
from infer_fast.errors import InferFastError
from infer_fast.extras import require


def read_parquet(path: Path, image_size: int | None = None) -> tuple[Split, Split, tuple[str, ...]]:
    """Hugging Face parquet: column image|img as {bytes, path}, column fine_label|label as integers.

    Splits by file name (train*, then test* or val*); class names from the Hugging Face schema if it is there.
    """
    files = sorted(path.rglob("*.parquet"))
    train = [f for f in files if f.name.startswith("train")]
    test = next((g for p in ("test", "val") if (g := [f for f in files if f.name.startswith(p)])), [])
    if not train or not test:
        raise InferFastError(f"{path} needs parquet files named train* and test* (or val*): found {_names(files)}.")
    splits, names = [], None
    for group in (train, test):
        split, found = _read_parquet_files(group, image_size)
        splits.append(split)
        names = names or found
    if names is None:
        names = tuple(str(c) for c in range(int(splits[0].labels.max()) + 1 if len(splits[0]) else 0))
    return splits[0], splits[1], names


def _read_parquet_files(files: list[Path], image_size: int | None) -> tuple[Split, tuple[str, ...] | None]:
    require("pyarrow", f"Reading {files[0].name}")
    import pyarrow
    from pyarrow import parquet

    items, labels, names = [], [], None
    for file in files:
        try:
            table = parquet.read_table(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise InferFastError(f"{file} is not a whole parquet file ({str(error).splitlines()[0]}).") from error
        image = _column(file, table.column_names, ("image", "img"))
        label = _column(file, table.column_names, ("fine_label", "label"))
        rows = table.column(image).to_pylist()
        if any(not isinstance(row, dict) or row.get("bytes") is None for row in rows):
            raise InferFastError(f"{file}: column {image} must hold {{bytes, path}} with the bytes of a PNG or JPEG.")
        items += [(f"{file} row {i}", row["bytes"]) for i, row in enumerate(rows)]
        labels.append(torch.from_numpy(table.column(label).to_numpy().astype(np.int64)))
        names = names or _class_names(table.schema.metadata, label)
    if not items:
        raise InferFastError(f"{_names(files)} hold no images.")
    return Split(decode_all(items, image_size), torch.cat(labels)), names


def _column(file: Path, present: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in present:
            return name
    raise InferFastError(f"{file} has columns {', '.join(present)}: expected one named {' or '.join(wanted)}.")


def _class_names(metadata: dict | None, label: str) -> tuple[str, ...] | None:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _names(files: list[Path]) -> str:
    return ", ".join(f.name for f in files[:4]) + (", ..." if len(files) > 4 else "") or "none"
