"""A folder that a set is exported to: what is in it already, and whose it is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from infer_fast.errors import InferFastError
from infer_fast.files import read_json_as, write_json

Format = Literal["png", "jpg", "parquet"]
PARQUET = "train.parquet"
RECORD = ".infer_fast_export.json"  # hidden: readers of class folders pass it over
IMAGE = re.compile(r"new(\d{3,})/class\1_id(\d{3,})\.(png|jpg)")


@dataclass(frozen=True)
class Exported:
    """What an export wrote: `each` instances of each class."""

    format: Format
    classes: int
    each: int

    def images(self) -> Iterator[str]:
        """The names of its images, class by class."""
        ending = "jpg" if self.format == "jpg" else "png"
        for label in range(self.classes):
            for number in range(self.each):
                yield f"new{label:03d}/class{label:03d}_id{number:03d}.{ending}"

    def wrote(self, name: str) -> bool:
        """Whether `name` is a file of it."""
        image = IMAGE.fullmatch(name)
        if self.format == "parquet" or image is None:
            return self.format == "parquet" and name == PARQUET
        return int(image[1]) < self.classes and int(image[2]) < self.each and image[3] == self.format


@dataclass(frozen=True)
class Record:
    """The exports whose files may be in a folder: the last one, and while one is at work, those before."""

    exports: tuple[Exported, ...]


def begin_export(folder: Path, new: Exported, *, own: bool) -> list[Path]:
    """Makes `folder` ready for an export; the files that ones before left there and this one will not write.

    own: images named as ours are ours, whatever the folder's record says.
    Raises InferFastError where others' files would be taken for a part of the set.
    """
    if folder.exists() and not folder.is_dir():
        raise InferFastError(f"{folder} is a file: name a folder to export to.")
    record = folder / RECORD
    before = read_json_as(record, Record).exports if record.is_file() else ()
    there = sorted(_parts_of_sets(folder, new.format))
    strange = [n for n in there if not any(e.wrote(n) for e in before) and not (own and IMAGE.fullmatch(n))]
    if strange:
        raise InferFastError(
            f"{folder} holds {strange[0]!r:.200}, which no export to this folder wrote and which would pass for a part "
            "of the set: choose an empty folder."
        )
    write_json(record, asdict(Record((*dict.fromkeys(before), new))))
    return [folder / name for name in there if not new.wrote(name)]


def end_export(folder: Path, new: Exported, left: list[Path]) -> None:
    """Removes what exports before left, and class folders that are empty then."""
    for path in left:
        path.unlink(missing_ok=True)
        if path.parent != folder:
            with contextlib.suppress(OSError):  # others are in it
                path.parent.rmdir()
    write_json(folder / RECORD, asdict(Record((new,))))


def _parts_of_sets(folder: Path, format: Format) -> Iterator[str]:
    """Files that readers would take: of parquet parquet, else what lies in folders of `folder`; nothing hidden."""
    for path in folder.rglob("*.parquet" if format == "parquet" else "*/*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield str(name)
