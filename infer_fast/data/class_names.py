"""Which class a folder stands for: one rule for training, test and given images, and for the sets of others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from infer_fast.data.folders import is_number
from infer_fast.errors import InferFastError

SHOWN = 12  # names of a list in a message


class ClassName(str):
    """A class's name that is not the name of its folder: `tench`, in the folder `n01440764`."""

    folder: str

    def __new__(cls, name: str, folder: str = "") -> ClassName:
        made = super().__new__(cls, name)
        made.folder = folder
        return made


def class_positions(folders: Sequence[str], classes: Sequence[str], where: Path | str) -> list[int]:
    """The position among `classes` of the class that each of `folders`, all in `where`, stands for.

    By name, if each is the name of a class, or of the folder that a class was read from. Else by number, if each is a
    number, CCC or newCCC: that of the one class whose name has this value, where all do; else the class's position,
    from 0. Says on one line of standard error which it was. Raises InferFastError, with both lists, if it is neither,
    or if two folders stand for one class.
    """
    positions = _by_name(folders, classes)
    how = "name" if positions is not None else "number"
    if positions is None:
        positions = _by_number(folders, classes)
    if positions is None:
        raise InferFastError(
            f"{where} {_fault(folders, classes)}: its folders are {_listed(folders)}, the classes {_listed(classes)}."
        )
    seen: dict[int, str] = {}
    for name, position in zip(folders, positions, strict=True):
        if position in seen:
            raise InferFastError(
                f"{where} has two folders for the class {classes[position]!r}, {seen[position]!r} and {name!r}: put "
                "their images into one."
            )
        seen[position] = name
    print(f"{where}: {len(folders)} of {len(classes)} classes, folders matched by {how}", file=sys.stderr, flush=True)
    return positions


def _places(classes: Sequence[str]) -> dict[str, int]:
    """The position of every name that a class goes by."""
    places = {c.folder: i for i, c in enumerate(classes) if isinstance(c, ClassName) and c.folder}
    return places | {name: i for i, name in enumerate(classes)}


def _by_name(folders: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    places = _places(classes)
    return [places[name] for name in folders] if all(name in places for name in folders) else None


def _by_number(folders: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    digits = [name.removeprefix("new") for name in folders]
    if not all(is_number(name) for name in digits):
        return None
    numbers = [int(name) for name in digits]
    values = {int(name): i for i, name in enumerate(classes)} if all(is_number(c) for c in classes) else {}
    if len(values) == len(classes) and digits == list(folders) and all(n in values for n in numbers):
        return [values[n] for n in numbers]
    return numbers if all(n < len(classes) for n in numbers) else None


def _fault(folders: Sequence[str], classes: Sequence[str]) -> str:
    """What is wrong with folders that are neither all names of classes nor all their numbers."""
    alone = ((name, _by_name([name], classes) or _by_number([name], classes)) for name in folders)
    wrong = next((name for name, position in alone if position is None), None)
    if wrong is None:
        return "has folders that are names of classes beside folders that are numbers"
    return f"has a class {wrong!r} that is none of the {len(classes)} of the dataset, by name or by number"


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
