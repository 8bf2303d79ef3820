"""The exceptions that a user is meant to read, and the one that asks for less at a time."""

from __future__ import annotations

import torch


class InferFastError(Exception):
    """Something the user can put right. Its text is one sentence: what was given, what was expected, what to do."""


class DiskError(InferFastError):
    """A file could not be written; nothing that was there before is lost."""


class InferFastWarning(UserWarning):
    """Something the user should know of, in one sentence; the work goes on."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the machine's or the device's memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error).lower()
