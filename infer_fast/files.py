"""Files that a reader never sees half written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from infer_fast.errors import DiskError, InferFastError, first_line

TEMPORARY = ".tmp"
LARGEST = 2**64  # of whole numbers: seeds have 64 bits
SWEPT: set[Path] = set()  # folders that this process has swept
Kind = TypeVar("Kind")
KINDS = {
    bool: "true or false", dict: "an object", float: "a number", int: "a whole number", list: "a list", str: "a text"
}  # fmt: skip


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and renames the temporary file to `path` once its bytes are on the disk.

    The file's permissions are those that the umask leaves. Raises DiskError if the disk is full or the folder is not
    writable; an older file at `path` then stays as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
        with _desk(path) as desk:
            temporary = desk / path.name
            write(temporary)
            temporary.chmod(desk.stat().st_mode & 0o666)  # some libraries write for the owner alone
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise DiskError(_disk_sentence(path, error)) from error


@contextlib.contextmanager
def _desk(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to write it in, locked while somebody is at it; gone whatever ends the block.

    A folder, because libraries have temporary files of their own beside the one that they write.
    """
    desk = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    _remove(desk)  # of a killed process that had this number
    desk.mkdir()
    with open_folder(desk) as held:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield desk
        finally:
            _remove(desk)


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """A descriptor of a folder, to be locked: the lock ends with its process, however that ends."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield held
    finally:
        os.close(held)


def sweep(folder: Path) -> None:
    """Removes what killed runs were writing in `folder` and below it; what live runs write is locked."""
    for left in folder.rglob(f".*{TEMPORARY}"):
        _remove_unlocked(left)


def _sweep_once(folder: Path) -> None:
    if folder not in SWEPT:
        SWEPT.add(folder)
        for left in folder.glob(f".*{TEMPORARY}"):
            _remove_unlocked(left)


def _remove_unlocked(left: Path) -> None:
    """Removes a desk, or the single file that it was in former versions, unless somebody holds its lock."""
    with contextlib.suppress(OSError):  # gone by now, held, another's, or of a file system without locks
        if left.is_dir():
            with open_folder(left) as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left)
        else:
            _remove(left)


def _remove(left: Path) -> None:
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically; one that holds just these bytes is left as it is, so that it may be read-only."""
    with contextlib.suppress(OSError):
        if path.stat().st_size == len(data) and path.read_bytes() == data:
            return
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file as write_bytes does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON, as write_bytes does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path,
    tensors: dict[str, torch.Tensor],
    card: dict | None = None,
    announce: Callable[[str], object] = lambda _: None,
) -> None:
    """Writes a safetensors file atomically; the same tensors and card always give the same bytes.

    `card` travels in the header as one JSON string under the key "card" (one key: safetensors does not fix the order
    of several). A file that holds just these is left as it is. announce: told the new file's SHA-256 before it takes
    its place.
    """
    stored, metadata = _stored(tensors, card)

    def write(temporary: Path) -> None:
        save_file(stored, temporary, metadata=metadata)
        announce(file_hash(temporary))

    if not _holds(path, stored, metadata):
        write_atomically(path, write)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stored_bytes(tensors: dict[str, torch.Tensor], card: dict | None = None) -> int:
    """Bytes of the file that write_tensors would write, its header included."""
    stored, metadata = _stored(tensors, card)
    return len(save(stored, metadata=metadata))


def _stored(
    tensors: dict[str, torch.Tensor], card: dict | None
) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    metadata = None if card is None else {"card": json.dumps(card, sort_keys=True)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata


def _holds(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> bool:
    """Whether a file has these tensors, bit by bit, and this header; one tensor is in memory at a time."""
    try:
        with _opened(path) as file:
            return (
                (file.metadata() or None) == metadata
                and set(file.keys()) == set(tensors)
                and all(_same_bits(file.get_tensor(name), tensor) for name, tensor in tensors.items())
            )
    except InferFastError:  # it is missing or damaged
        return False


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Reads what write_tensors wrote: (tensors, card). Raises InferFastError on a missing or damaged file."""
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        return tensors, json.loads((file.metadata() or {}).get("card", "{}"))


def holds_tensors(path: Path, names: Collection[str]) -> bool:
    """Whether a file is there, has its full length, and has tensors of these names; what they hold is not looked at."""
    try:
        with _opened(path) as file:
            return set(names) <= set(file.keys())
    except InferFastError:
        return False


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Reads one tensor of what write_tensors wrote, and no other. Raises InferFastError as read_tensors does."""
    with _opened(path) as file:
        return file.get_tensor(name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    if not path.is_file():
        raise InferFastError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InferFastError(f"{path} is damaged and can't be read ({first_line(error)}).") from error


def read_json(path: Path) -> dict:
    """Reads a JSON object. Raises InferFastError on a missing or damaged file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InferFastError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InferFastError(f"{path} is damaged and can't be read ({first_line(error)}).") from error
    if not isinstance(value, dict):
        raise InferFastError(f"{path} is damaged: a JSON object was expected, a {type(value).__name__} was found.")
    return value


def read_json_as(path: Path, kind: type[Kind]) -> Kind:
    """Reads a JSON object as a dataclass: every field there, and of its type.

    Raises InferFastError on a missing or damaged file, or a field that is missing or of another type.
    """
    return _as(kind, read_json(path), str(path), "")


def _as(kind: Any, value: Any, file: str, place: str) -> Any:
    """`value`, as JSON gives it, as `kind`: a dataclass, tuple, dict or plain type, or one of them or None."""
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        (inner,) = (part for part in parts if part is not type(None))
        return None if value is None else _as(inner, value, file, place)
    if isinstance(kind, type) and is_dataclass(kind):
        hints, given = get_type_hints(kind), _expect(dict, value, file, place)
        there = [f.name for f in fields(kind) if f.name in given or not f.metadata.get("added later")]
        missing = next((name for name in there if name not in given), None)
        if missing is not None:
            raise InferFastError(f"{file}: {_inside(place, missing)} is missing.")
        return kind(**{name: _as(hints[name], given[name], file, _inside(place, name)) for name in there})
    if get_origin(kind) is tuple:
        values = _expect(list, value, file, place)
        kinds = parts[:1] * len(values) if parts[-1] is Ellipsis else parts
        if len(kinds) != len(values):
            raise InferFastError(f"{file}: {place} has {len(values)} values, expected {len(kinds)}.")
        return tuple(_as(k, v, file, f"{place}[{i}]") for i, (k, v) in enumerate(zip(kinds, values, strict=True)))
    if get_origin(kind) is dict:
        own = _expect(dict, value, file, place)
        return {_as(parts[0], k, file, place): _as(parts[1], v, file, _inside(place, k)) for k, v in own.items()}
    if get_origin(kind) is Literal:
        if value not in parts:
            raise InferFastError(f"{file}: {place} is {value!r:.60}, expected one of {', '.join(map(str, parts))}.")
        return value
    return _expect(kind, value, file, place)


def _expect(kind: type, value: Any, file: str, place: str) -> Any:
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InferFastError(f"{file}: {place or 'it'} is {value!r:.60}, expected {KINDS[kind]}.")
    if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= LARGEST):
        raise InferFastError(f"{file}: {place} is {value!r:.60}, expected a finite number.")
    if isinstance(value, str) and not _encodes(value):
        raise InferFastError(f"{file}: {place} is {value!r:.60}, which is no text that can be written as UTF-8.")
    return value


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return False
    return True


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _disk_sentence(path: Path, error: Exception) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return f"The disk is full: {path} was not written. Free some space and run the same command again."
    return f"{path} can't be written ({error}): choose a folder that can be, or change its permissions."
