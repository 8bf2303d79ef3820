"""A run's folder: what may be its name, who is at work in it, where its card may lead, and what became stale in it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from infer_fast.errors import InferFastError, InferFastWarning
from infer_fast.files import open_folder, write_json

TEACHERS, DATASETS = "teachers", "datasets"  # beside the runs' folders
STUDENTS = "students"  # in a run's folder
JUDGED = ("table.md", "results.json", "curve.json", "curve.png", "tsne.png")  # what students said of the set


def check_name(flag: str, name: str) -> str:
    """`name`, which becomes a part of a file's name. Raises InferFastError where it could lead out of the folder."""
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(not p or set(p) <= {"."} or len(p.encode()) > 100 for p in parts):
        raise InferFastError(
            f"{flag} {name!r:.120} can't name a file below a folder: choose a name of 1 to 100 letters and digits."
        )
    return name


def writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or in the nearest folder above it that is there."""
    there = next((f for f in (folder, *folder.absolute().parents) if f.exists()), folder)
    return os.access(there, os.W_OK | os.X_OK)


@contextlib.contextmanager
def at_work(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keeps other runs out of `folder` while it lasts; shared: but for those that share the work too.

    The lock is the system's, on the folder itself: nothing stays behind, however the process ends.
    Raises InferFastError if another run is at work there.
    """
    with open_folder(folder.resolve()) as held:
        try:
            fcntl.flock(held, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InferFastError(
                f"Another run is at work in {folder}: wait for its end, or give this one an --exp-name of its own."
            ) from None
        except OSError as error:  # some network file systems have no locks on folders
            warnings.warn(
                f"{folder} can't be locked ({error.strerror}): see that no other run works in it.", InferFastWarning, 2
            )
        yield


def remember_places(root: Path, places: Iterable[Path | None]) -> None:
    """Keeps in datasets/ that the user gave these folders for runs below `root`; see place_in_card."""
    for place in places:
        if place is not None:
            write_json(_memory_of(root, str(place)), {"place": str(place)})


def place_in_card(folder: Path, place: str | None, flag: str) -> Path | None:
    """The dataset's folder that the card in `folder` names: one in the card's own folder, or one that was given here
    before, for a card that came from elsewhere could name any.

    Raises InferFastError, asking for the flag, for another.
    """
    if place is None:
        return None
    if not _leads_out(place) and (folder / place).exists():
        return folder / place
    if _memory_of(folder.parent, place).is_file():
        return Path(place)
    raise InferFastError(
        f"The card in {folder} names {place!r:.200}, which is not in its folder: if the dataset lies there, say so "
        f"with {flag}."
    )


def teacher_in_card(folder: Path, place: str) -> Path:
    """The teacher's file that the card in `folder` names: in its own folder, or in the teachers/ beside the runs.

    Raises InferFastError for another place.
    """
    *up, beside, name = ("", "", *PurePosixPath(place).parts)
    ours = beside == TEACHERS and name != ".." and "\\" not in place and up[2:] and set(up[2:]) == {".."}
    if _leads_out(place) and not ours:
        raise InferFastError(
            f"The card in {folder} names the teacher {place!r:.200}, which is out of its folder: give its file with "
            "--arch-name and --arch-path."
        )
    return folder / place


def clear_judgement(folder: Path) -> None:
    """Removes what students said of a set that is no longer the one in `folder`."""
    for name in JUDGED:
        (folder / name).unlink(missing_ok=True)


def _leads_out(place: str) -> bool:
    return place.startswith(("/", "~")) or ".." in PurePosixPath(place).parts or "\0" in place


def _memory_of(root: Path, place: str) -> Path:
    digest = hashlib.sha256(str(Path.cwd() / place).encode(errors="surrogateescape")).hexdigest()
    return root / DATASETS / f"place-{digest[:16]}.json"
