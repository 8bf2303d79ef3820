"""A distilled set as other tools read it: the published scripts' class folders of images, or Hugging Face parquet.

    python -m infer_fast.export --syn-data-path runs/digits --output DIR                 # newCCC/classCCC_idIII.png
    python -m infer_fast.export --syn-data-path runs/digits --output DIR --format jpg    # as published, lossy
    python -m infer_fast.export --syn-data-path runs/digits --output DIR --format parquet

Images are the instances a student sees: base images bare and with each compensator. The parquet has the soft labels
too.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from infer_fast import cli
from infer_fast.data.distilled import DistilledSet, load
from infer_fast.errors import InferFastError
from infer_fast.exported import PARQUET, Exported, Format, begin_export, end_export
from infer_fast.extras import require
from infer_fast.files import write_atomically, write_bytes
from infer_fast.progress import stage

JPEG_QUALITY = 95


def export(distilled: DistilledSet, folder: Path, format: Format = "png", *, own: bool = False) -> int:
    """Writes every instance of `distilled` below `folder`; returns how many.

    png (lossless) and jpg: newCCC/classCCC_idIII.png, CCC the class and III the instance within it, counted from 0.
    parquet: train.parquet with columns image {bytes, path}, label, logits (float16), and the class names in its schema.
    What an export before left there and this one does not write is removed; own: images of such names that are there
    are ours, though no export says so. Raises InferFastError for an unknown format, or a folder with others' images,
    that would be taken for the set's; DiskError when something can't be written.
    """
    if format not in ("png", "jpg", "parquet"):
        raise InferFastError(f"{format!r} is not a format: choose png, jpg or parquet.")
    if format == "parquet":
        require("pyarrow", "The format parquet")
    written = Exported(format, len(distilled.classes), len(distilled) // len(distilled.classes))
    left = begin_export(folder, written, own=own)
    rows = []
    with stage("export", len(distilled), "images") as running:
        for position, (name, label) in enumerate(zip(written.images(), distilled.labels().tolist(), strict=True)):
            data = encoded(pixels_of(distilled, position), format)
            if format == "parquet":
                rows.append((name, data, label))
            else:
                write_bytes(folder / name, data)
            running.advance()
    if format == "parquet":
        write_atomically(folder / PARQUET, lambda path: _write_parquet(path, rows, distilled))
    end_export(folder, written, left)
    return len(distilled)


def pixels_of(distilled: DistilledSet, position: int) -> np.ndarray:
    """One clean instance as uint8 (H, W, 3)."""
    image = distilled.instances(torch.tensor([position]))
    return distilled.pixels.to_bytes(image)[0].permute(1, 2, 0).numpy()


def encoded(pixels: np.ndarray, format: Format) -> bytes:
    """A PNG, or a JPEG of quality 95."""
    buffer = io.BytesIO()
    options = {"format": "JPEG", "quality": JPEG_QUALITY} if format == "jpg" else {"format": "PNG"}
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()


def _write_parquet(path: Path, rows: list[tuple[str, bytes, int]], distilled: DistilledSet) -> None:
    import pyarrow
    from pyarrow import parquet

    logits = distilled.logits.reshape(len(distilled), -1).numpy()
    table = pyarrow.table(
        {
            "image": [{"bytes": data, "path": name} for name, data, _ in rows],
            "label": [label for _, _, label in rows],
            "logits": pyarrow.array(list(logits), type=pyarrow.list_(pyarrow.float16())),
        }
    )
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": list(distilled.classes)},
        "logits": {"_type": "Sequence", "feature": {"_type": "Value", "dtype": "float16"}},
    }
    described = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    parquet.write_table(table.replace_schema_metadata(described), path)


@dataclass(frozen=True)
class ExportOptions:
    """Flags of python -m infer_fast.export."""

    output: Path
    """folder to write to"""
    syn_data_path: Path = Path("runs/digits")
    """the distilled set's folder"""
    format: Format = "png"
    """png: lossless files; jpg: as the published scripts write them; parquet: one file, soft labels included"""


def _main(args: list[str]) -> None:
    default = ExportOptions(Path("exported"))
    options = cli.parse(ExportOptions, default, args, "python -m infer_fast.export", "A distilled set as plain files.")
    count = export(load(options.syn_data_path), options.output, options.format)
    print(f"{count:,} images are in {options.output}.")


if __name__ == "__main__":
    sys.exit(cli.run(_main))
