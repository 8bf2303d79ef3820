"""Another value of a setting, by its type: so that a setting that comes later is tried too."""

from dataclasses import Field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from infer_fast.settings import StudentSettings


def other_value(field: Field, value: Any) -> Any:
    """A value of a student's setting that is not `value`. Raises AssertionError for a type nobody thought of."""
    kind = get_type_hints(StudentSettings)[field.name]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    assert value is None and float in get_args(kind), field
    return 0.5
