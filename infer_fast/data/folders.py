"""Which files and folders of a dataset count: what systems, editors and annotators leave is skipped everywhere."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from infer_fast.errors import InferFastError

SKIPPED = {  # beside every name that begins with a dot
    "$recycle.bin",
    "@eadir",
    "__macosx",
    "__pycache__",
    "annotations",
    "desktop.ini",
    "lost+found",
    "system volume information",
    "thumbs.db",
}


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder`, links followed: numbers by their value if all are numbers, else sorted as text.

    Raises InferFastError for a link that leads nowhere, or a name that is no text.
    """
    found = sorted(Path(entry.path) for entry in _entries(folder, ()) if entry.is_dir())
    if all(is_number(path.name) for path in found):
        found.sort(key=lambda path: int(path.name))
    return found


def class_folders(folder: Path) -> list[Path]:
    """The folders in `folder` as subfolders gives them. Raises InferFastError if there is none."""
    found = subfolders(folder)
    if not found:
        raise InferFastError(f"{folder} holds no class folders.")
    return found


def split_folder(path: Path, *names: str) -> Path | None:
    """The folder in `path` with the first of `names` that is there, in small or capital letters; None: none is."""
    found = sorted(subfolders(path), key=lambda folder: folder.name == folder.name.lower())  # the last one counts
    by_name = {folder.name.lower(): folder for folder in found}
    return next((by_name[name] for name in names if name in by_name), None)


def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files in `folder` and below whose suffix, in small letters, is one of `suffixes`, sorted.

    Links are followed, but none that leads back to where it lies. Pipes and devices are no files. Raises InferFastError
    for a link that leads nowhere, or a name that is no text.
    """
    return sorted(_below(folder, suffixes, frozenset([_identity(folder)])))


def is_number(name: str) -> bool:
    """Whether a name is a whole number in plain digits."""
    return name.isascii() and name.isdigit()


def encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: a file's name in another encoding can't, nor half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text that aren't blank. Raises InferFastError for another encoding."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InferFastError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    return [line for line in lines if line.strip()]


def _below(folder: Path, suffixes: Collection[str], above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    for entry in _entries(folder, suffixes):
        path = Path(entry.path)
        if entry.is_dir():
            own = _identity(path)
            if own not in above:
                yield from _below(path, suffixes, above | {own})
        elif path.suffix.lower() in suffixes and entry.is_file():
            yield path


def _entries(folder: Path, suffixes: Collection[str]) -> Iterator[os.DirEntry]:
    """What is in a folder and not skipped."""
    _check_name(str(folder))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in SKIPPED:
                continue
            path = Path(entry.path)
            counts = not path.suffix or path.suffix.lower() in suffixes
            if counts or entry.is_dir():
                _check_name(entry.path)
            if counts and entry.is_symlink() and not path.exists():
                raise InferFastError(f"{path} is a link that leads nowhere: repair or remove it.")
            yield entry


def _check_name(path: str) -> None:
    if not encodable(path):
        raise InferFastError(f"{repr(os.fsencode(path))[2:-1]} has a name that is not UTF-8 text: rename it.")


def _identity(folder: Path) -> tuple[int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino
