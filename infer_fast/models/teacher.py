"""Teachers: frozen networks, and the files they are kept in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from infer_fast.errors import InferFastError
from infer_fast.files import file_hash, read_tensors, write_tensors
from infer_fast.models.build import build
from infer_fast.models.weights import faulty


@dataclass(frozen=True)
class Teacher:
    """A frozen network, its test accuracy in percent, and the file that holds it (with the file's SHA-256)."""

    name: str
    network: nn.Module
    accuracy: float
    path: Path
    sha256: str

    @property
    def weight_bytes(self) -> int:
        """What the network's weights and statistics weigh."""
        return sum(t.nbytes for t in self.network.state_dict().values())


def save_teacher(path: Path, network: nn.Module, accuracy: float, made_of: dict[str, object]) -> None:
    """Writes a teacher's weights, its test accuracy in percent, and in words what it was made of.

    Raises DiskError when the disk is full or the folder not writable.
    """
    write_tensors(path, network.state_dict(), {**made_of, "accuracy": accuracy})


def load_teacher(name: str, path: Path, classes: int, size: tuple[int, int], sha256: str | None = None) -> Teacher:
    """Reads a teacher that squeeze saved.

    Raises InferFastError if the file is missing, damaged or another one, or a weight is not finite.
    """
    state, card = read_tensors(path)
    digest = file_hash(path)
    if sha256 is not None and digest != sha256:
        raise InferFastError(f"{path} is not the teacher that was used (its SHA-256 differs): make the teachers again.")
    if not isinstance(card, dict) or not isinstance(card.get("accuracy"), (int, float)):
        raise InferFastError(f"{path} does not say how good the teacher is: make the teachers again.")
    if (fault := faulty(state)) is not None:
        raise InferFastError(f"{path} holds no teacher that works ({fault}): take another checkpoint.")
    network = build(name, classes, size, seed=0)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InferFastError(
            f"{path} does not hold a {name} for {classes} classes: make the teachers again."
        ) from error
    return Teacher(name, network.eval().requires_grad_(False), card["accuracy"], path, digest)


def device_of(teachers: Sequence[Teacher]) -> torch.device:
    """Where the teachers are."""
    return next(teachers[0].network.parameters()).device
