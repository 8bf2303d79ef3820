"""Weights of others, fitted to a network: names, shapes, types and values are looked at before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from infer_fast.errors import InferFastError, first_line
from infer_fast.extras import PIP, installed
from infer_fast.files import file_hash
from infer_fast.models.state_dicts import ACCURACIES, COUNTERS, State, differences, find_state, listed
from infer_fast.models.weight_files import read_file
from infer_fast.models.weights import faulty


def load_checkpoint(network: nn.Module, path: Path) -> str:
    """Loads the state dict in `path` (safetensors, or a torch file read with weights_only) into `network`.

    Wrappers such as {"state_dict": ...} and prefixes such as "module." are taken off. Returns the file's SHA-256.
    Raises InferFastError when the file is missing, damaged or unsafe, when a name, shape or type does not fit, or for a
    value that no network has.
    """
    loaded, _ = read_file(path)
    load_state(network, find_state(loaded, network.state_dict(), str(path)), str(path))
    return file_hash(path)


def load_state(network: nn.Module, state: State, source: str) -> None:
    """Loads `state`, which came from `source`.

    Raises InferFastError when a name, shape or type does not fit, a value is not finite, or a variance is negative.
    """
    expected = network.state_dict()
    kind = type(network).__name__
    state = {name: _counter(tensor) if name.endswith(COUNTERS) else tensor for name, tensor in state.items()}
    wrong = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    missing, unexpected = differences(expected, state)
    if wrong:
        first = wrong[0]
        raise InferFastError(
            f"{source} does not fit {kind}: {first} is {tuple(state[first].shape)}, expected "
            f"{tuple(expected[first].shape)} ({len(wrong)} such) - another class count or another network?"
        )
    if missing or unexpected:
        example = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is not expected"
        raise InferFastError(
            f"{source} does not fit {kind}: {example} ({len(missing)} missing, {len(unexpected)} unexpected names), it "
            f"holds {listed(state)}."
        )
    own = {name: _cast(name, tensor, expected[name], source) for name, tensor in state.items() if name in expected}
    fault = faulty(own)
    if fault is not None:
        raise InferFastError(f"{source}: {fault}, so none of its results would be a number: take another checkpoint.")
    network.load_state_dict({**expected, **own})


def _counter(tensor: torch.Tensor) -> torch.Tensor:
    """Old versions counted in one dimension."""
    return tensor.reshape(()) if tensor.numel() == 1 else tensor


def _cast(name: str, tensor: torch.Tensor, expected: torch.Tensor, source: str) -> torch.Tensor:
    """A tensor in the network's own type. Raises InferFastError for one that is no weight."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise InferFastError(
            f"{source}: {name} is no plain tensor with values: save the state_dict of a plain network."
        )
    if expected.is_floating_point() and not tensor.is_floating_point():
        raise InferFastError(
            f"{source}: {name} is {tensor.dtype}, expected floating numbers: save the network as it was before it was "
            "quantised or converted."
        )
    return tensor.detach().to(expected.dtype)


def load_pretrained(network: nn.Module, name: str, weights: str) -> None:
    """Loads what torchvision publishes for `name` as `weights`, or what timm does if only timm knows the name.

    Downloaded, unless torch's hub (or timm's) has the file already. Raises InferFastError for unknown weights, a
    failed download, a name that needs timm where it is not installed, or weights that do not fit (another class count).
    """
    published, source = published_weights(name, weights), f"{name} {weights}"
    if published is None:
        load_state(network, _timm_state(name), f"timm's {name}")
        return
    try:
        state = published.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InferFastError(
            f"{source} could not be fetched ({error}): check the network, or give a file with --arch-path."
        ) from error
    load_state(network, state, source)


def published_weights(name: str, weights: str) -> Any | None:
    """torchvision's entry of these weights; None for a name that timm alone knows. Fetches nothing.

    Raises InferFastError for unknown weights, or a name that needs timm where it is not installed.
    """
    import torchvision

    try:
        enumeration = torchvision.models.get_model_weights(name)
    except ValueError:
        _check_timm(name)
        return None
    if weights not in enumeration.__members__:
        choices = ", ".join(enumeration.__members__)
        raise InferFastError(f"{name} {weights} is not published: choose one of {choices}.")
    return enumeration[weights]


def _check_timm(name: str) -> None:
    if not installed("timm"):
        raise InferFastError(
            f"torchvision has no weights of {name}: give a file with --arch-path, or {PIP['timm']}, which has more."
        )


def _timm_state(name: str) -> State:
    try:
        import timm

        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # timm and its hub raise many kinds; each means that there are no weights
        raise InferFastError(
            f"No weights of {name} could be fetched ({first_line(error)}): check the network, or give a file with "
            "--arch-path."
        ) from error


def recorded(path: Path) -> str:
    """What a checkpoint says of itself, in words: the accuracy and epoch stored beside its weights.

    Raises InferFastError for a file that is missing, damaged or unsafe.
    """
    loaded, texts = read_file(path)
    said = {**_recorded(loaded), **texts, **_recorded(_card(texts))}
    accuracy = next((said[name] for name in ACCURACIES if name in said), "not recorded")
    return f"{path}: accuracy {accuracy}, epoch {said.get('epoch', 'not recorded')}"


def _card(texts: dict[str, str]) -> object:
    """What the header of our own files says; others may call anything a card."""
    try:
        return json.loads(texts.get("card", "{}"))
    except ValueError:
        return {}


def _recorded(loaded: object) -> dict[str, str]:
    """The numbers and texts by name in what a file holds, as they are shown."""
    if not isinstance(loaded, dict):
        return {}
    shown = {name: _shown(value) for name, value in loaded.items() if isinstance(name, str)}
    return {name: value for name, value in shown.items() if value is not None}


def _shown(value: Any) -> str | None:
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.item() if np.prod(value.shape) == 1 else None
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) if isinstance(value, (int, str)) else None
