"""The state dict of a network in what a checkpoint holds: under whatever key, whatever prefix its names have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from infer_fast.errors import InferFastError

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys that are taken before others, in this order
PREFIXES = ("module.", "_orig_mod.")  # torch's own wrappers, which may wrap a part of a network too
COUNTERS = ("num_batches_tracked",)  # of BatchNorm; nothing that is computed here depends on them
ACCURACIES = ("acc", "accuracy", "best_acc1", "best_acc")  # what checkpoints call it
BESIDE = ("total_ops", "total_params", "epoch", *ACCURACIES)  # what tools and people leave among the weights
DEEPEST = 8  # dicts in each other
LISTED = 6  # names that a sentence shows

State = dict[str, torch.Tensor]


class Found(NamedTuple):
    """A state dict: the keys that lead to it, the prefix that was taken off its names, and what it holds."""

    keys: tuple[str, ...]
    prefix: str
    state: State

    def __str__(self) -> str:
        parts = [f"under {'.'.join(self.keys)}"] if self.keys else []
        return " ".join([*parts, f"with the prefix {self.prefix}"] if self.prefix else parts) or "without a prefix"


def find_state(loaded: object, expected: Mapping[str, Any], source: str) -> State:
    """The state dict in `loaded` whose names are `expected`'s; the likeliest one where none has them.

    Of several the one under one of WRAPPERS is taken. Raises InferFastError where `loaded`, which came from `source`,
    holds no tensors by names, or several such state dicts.
    """
    every = list(_state_dicts(loaded))
    if not every:
        raise InferFastError(f"{source} holds no state dict (names to tensors), it holds {listed(loaded)}.")
    fitting = [Found(keys, prefix, own) for keys, _, state in every for prefix, own in _fitted(state, expected)]
    usual = sorted((found for found in fitting if _usual(found)), key=_rank)
    chosen = [found for found in usual if found.keys == usual[0].keys] if usual else fitting
    if len(chosen) > 1:
        raise InferFastError(
            f"{source} holds several state dicts that fit ({', '.join(map(str, chosen))}): save the one that is wanted "
            "alone."
        )
    if chosen:
        return chosen[0].state
    return _unwrapped(max(every, key=lambda found: (_usual(found), len(found.state))).state)


def differences(expected: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The names that `state` lacks, and those that it should not have."""
    missing = [name for name in expected if name not in state and not name.endswith(COUNTERS)]
    return missing, [name for name in state if name not in expected and name.rpartition(".")[2] not in BESIDE]


def listed(loaded: object) -> str:
    """The first names in a dict, for a sentence; the type of anything else."""
    if not isinstance(loaded, Mapping):
        return f"a {type(loaded).__name__}"
    names = [f"{name!s:.60}" for name in loaded]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}" if names else "nothing"


def _state_dicts(loaded: object, keys: tuple[str, ...] = ()) -> Iterator[Found]:
    """Every dict that has tensors under names, with those alone."""
    if not isinstance(loaded, Mapping) or len(keys) > DEEPEST:
        return
    tensors = {name: _tensor(value) for name, value in loaded.items() if isinstance(name, str)}
    state = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if state:
        yield Found(keys, "", state)
    for name, value in loaded.items():
        yield from _state_dicts(value, (*keys, str(name)))


def _tensor(value: object) -> torch.Tensor | None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    return value if isinstance(value, torch.Tensor) else None


def _fitted(state: State, expected: Mapping[str, Any]) -> list[tuple[str, State]]:
    """(prefix, state without it) of every prefix without which the names fit."""
    plain = _unwrapped(state)
    for own in (state, plain):
        if differences(expected, own) == ([], []):
            return [("", own)]
    anchor = next((f".{name}" for name in expected if not name.endswith(COUNTERS)), None)
    if anchor is None:
        return []
    prefixes = [name[: 1 - len(anchor)] for name in plain if name.endswith(anchor)]
    parts = [(p, {name[len(p) :]: t for name, t in plain.items() if name.startswith(p)}) for p in prefixes]
    return [(prefix, part) for prefix, part in parts if differences(expected, part) == ([], [])]


def _unwrapped(state: State) -> State:
    """Without the prefixes of torch's wrappers, which wrap each other."""
    state = dict(state)  # without the metadata of torch's own, which speaks of the prefixed names
    while prefix := next((p for p in PREFIXES if any(name.startswith(p) for name in state)), None):
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def _usual(found: Found) -> bool:
    return all(key in WRAPPERS for key in found.keys)


def _rank(found: Found) -> list[int]:
    """Which of several under usual keys goes first."""
    return [WRAPPERS.index(key) for key in found.keys]
