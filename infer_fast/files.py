"""Files that a reader never sees half written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from infer_fast.errors import DiskError, InferFastError

Kind = TypeVar("Kind")
KINDS = {
    bool: "true or false", dict: "an object", float: "a number", int: "a whole number", list: "a list", str: "a text"
}  # fmt: skip


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and renames the temporary file to `path` once its bytes are on the disk.

    Raises DiskError if the disk is full or the folder is not writable; an older file at `path` then stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DiskError(_disk_sentence(path, error)) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], card: dict | None = None) -> None:
    """Writes a safetensors file atomically; the same tensors and card always give the same bytes.

    `card` travels in the header as one JSON string under the key "card" (one key: safetensors does not fix the order
    of several).
    """
    stored, metadata = _stored(tensors, card)
    write_atomically(path, lambda temporary: save_file(stored, temporary, metadata=metadata))


def stored_bytes(tensors: dict[str, torch.Tensor], card: dict | None = None) -> int:
    """Bytes of the file that write_tensors would write, its header included."""
    stored, metadata = _stored(tensors, card)
    return len(save(stored, metadata=metadata))


def _stored(
    tensors: dict[str, torch.Tensor], card: dict | None
) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    metadata = None if card is None else {"card": json.dumps(card, sort_keys=True)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Reads what write_tensors wrote: (tensors, card). Raises InferFastError on a missing or damaged file."""
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        return tensors, json.loads((file.metadata() or {}).get("card", "{}"))


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
    except (SafetensorError, OSError, ValueError) as error:
        raise InferFastError(f"{path} is damaged and can't be read ({error}): delete it and make it again.") from error


def read_json(path: Path) -> dict:
    """Reads a JSON object. Raises InferFastError on a missing or damaged file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InferFastError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise InferFastError(f"{path} is damaged and can't be read ({error}).") from error
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
        return {k: _as(parts[1], v, file, _inside(place, k)) for k, v in _expect(dict, value, file, place).items()}
    if get_origin(kind) is Literal:
        if value not in parts:
            raise InferFastError(f"{file}: {place} is {value!r}, expected one of {', '.join(map(str, parts))}.")
        return value
    return _expect(kind, value, file, place)


def _expect(kind: type, value: Any, file: str, place: str) -> Any:
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InferFastError(f"{file}: {place or 'it'} is {value!r:.60}, expected {KINDS[kind]}.")
    return value


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _disk_sentence(path: Path, error: Exception) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return f"The disk is full: {path} was not written. Free some space and run the same command again."
    return f"{path} can't be written ({error}): choose a folder that can be, or change its permissions."
