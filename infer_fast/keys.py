"""The hash that a stored result is found by: of all that it depends on, as values and as tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable

import torch


def key_of(parts: object, tensors: Iterable[torch.Tensor | None] = ()) -> str:
    """SHA-256, in hexadecimal, of tensors with their types and shapes and of `parts`, which JSON can spell.

    Spell dataclasses out whole (dataclasses.asdict), so that a field that comes later is never forgotten.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()


def surroundings(device: torch.device) -> dict[str, str | None]:
    """What no setting says and results depend on all the same.

    Threads are not among it, nor are versions: they change the rounding alone, and what is finished is finished. So
    machines of different sizes can share a run, and its card says who made it.
    """
    return {"device": device.type, "forced": os.environ.get("INFER_FAST_BACKEND")}
