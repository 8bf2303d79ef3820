"""Every setting of a dataclass of settings, those of nested ones too: its flag, its value, what values it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass `owner`, with its value.

    flag: as the command line has it; kinds: the types that its value, or each value of a tuple, may have (None's among
    them); choices: the values it may have, if they are few; count: of a tuple's values, None for any number.
    """

    owner: str
    name: str
    flag: str
    value: Any
    kinds: tuple[type, ...]
    choices: tuple[Any, ...]
    count: int | None

    @property
    def whole(self) -> bool:
        """Whether it is a whole number, or a tuple of them."""
        return int in self.kinds

    @property
    def numeric(self) -> bool:
        return self.whole or float in self.kinds

    @property
    def values(self) -> tuple[Any, ...]:
        """Its value as a tuple of one, unless it is a tuple."""
        return self.value if isinstance(self.value, tuple) else (self.value,)


def settings_of(settings: Any, prefix: str = "") -> Iterator[Setting]:
    """The settings of a dataclass: its own, then those of the dataclasses in it.

    prefix: of the flags, as "--squeeze." is made of "squeeze.".
    """
    kind: type = type(settings)
    nested: list[tuple[Any, str]] = []
    for name, hint in _hints(kind).items():
        value = getattr(settings, name)
        called = _name(name, hint)
        if is_dataclass(value):
            nested.append((value, f"{prefix}{called}." if called else prefix))
            continue
        kinds, choices = _takes(hint)
        yield Setting(kind.__name__, name, f"--{prefix}{called}", value, kinds, choices, _count(hint))
    for value, own_prefix in nested:
        yield from settings_of(value, own_prefix)


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _name(name: str, hint: Any) -> str:
    """What the command line calls a field: what its annotation says, else its name with hyphens."""
    given = [getattr(extra, "name", None) for extra in getattr(hint, "__metadata__", ())]
    return next((own for own in given if own is not None), name.replace("_", "-"))


def _takes(hint: Any) -> tuple[tuple[type, ...], tuple[Any, ...]]:
    """(kinds, choices) of a type, or of each value of a tuple."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _takes(parts[0])
    if origin is Literal:
        return (), parts
    if origin in (Union, UnionType, tuple):
        inner = [_takes(part) for part in parts if part is not Ellipsis]
        return tuple(k for kinds, _ in inner for k in kinds), tuple(c for _, choices in inner for c in choices)
    return (hint,), ()


def _count(hint: Any) -> int | None:
    """Values of a tuple of a fixed length."""
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        return None if Ellipsis in parts else len(parts)
    return next((count for part in parts if (count := _count(part)) is not None), None)
