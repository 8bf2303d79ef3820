"""What files on the disk hold: each is read once, before the work, refused if it is broken, and known by a hash."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from infer_fast.data.decode import open_rgb, sizes_unannounced
from infer_fast.data.plain import is_plain, read_file
from infer_fast.errors import DiskError, InferFastError
from infer_fast.progress import stage

SPAN = 1024  # files after which what was read is kept
WAIT = 60.0  # seconds for another run that writes to the same store
TABLE = "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, state TEXT, sha256 BLOB) WITHOUT ROWID"


def content_hashes(files: Sequence[Path], kept: Path | None = None) -> list[bytes]:
    """SHA-256 of each file's content, 32 bytes each.

    kept: a file in which they are kept, so that a file is read again only when its size, its time of change or its
    inode is another (None: all are read). An interrupted survey goes on where it stopped. What is not a plain JPEG or
    PNG (infer_fast.data.plain) is decoded too. Raises InferFastError naming a file that can't be read or decoded, and
    DiskError if `kept` can't be written.
    """
    with _store(kept) as store:
        states = [(os.fsencode(file.absolute()), _state(file)) for file in files]
        hashes = [_lookup(store, *state) for state in states]
        missing = [i for i, known in enumerate(hashes) if known is None]
        if missing:
            with stage("files read", len(missing), "files") as running, ThreadPoolExecutor(_threads()) as pool:
                for first in range(0, len(missing), SPAN):
                    span = missing[first : first + SPAN]
                    for i, digest in zip(span, pool.map(_read, [files[i] for i in span]), strict=True):
                        hashes[i] = digest
                        running.advance()
                    rows = [(*states[i], hashes[i]) for i in span]
                    store.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", rows)
                    store.commit()
    return [digest for digest in hashes if digest is not None]


def _threads() -> int:
    return 2 * (os.cpu_count() or 1)  # half of them wait for the disk


def _state(file: Path) -> str:
    """What changes when a file does."""
    try:
        seen = file.stat()
    except OSError as error:
        raise InferFastError(f"{file} can't be read ({error.strerror}): repair or remove it.") from error
    return f"{seen.st_size} {seen.st_mtime_ns} {seen.st_ino}"


def _lookup(store: sqlite3.Connection, path: bytes, state: str) -> bytes | None:
    row = store.execute("SELECT sha256 FROM files WHERE path = ? AND state = ?", (path, state)).fetchone()
    return None if row is None else row[0]


def _read(file: Path) -> bytes:
    data = read_file(file)
    if not is_plain(data):
        open_rgb(str(file), data)
    return hashlib.sha256(data).digest()


@contextmanager
def _store(kept: Path | None) -> Iterator[sqlite3.Connection]:
    try:
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
        store = sqlite3.connect(":memory:" if kept is None else kept, timeout=WAIT)
        try:
            store.execute(TABLE)
            with sizes_unannounced():
                yield store
        finally:
            store.close()
    except sqlite3.OperationalError as error:
        raise DiskError(f"{kept} can't be written ({error}): choose a folder that can be.") from error
    except sqlite3.DatabaseError as error:
        raise InferFastError(f"{kept} is damaged and can't be read ({error}): delete it.") from error
