"""Weights of others, read safely: no pickle is ever loaded with weights_only=False."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from infer_fast.errors import InferFastError, first_line
from infer_fast.extras import PIP, installed

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
ACCURACIES = ("acc", "accuracy", "best_acc1", "best_acc")  # what checkpoints call it
PREFIXES = ("module.", "_orig_mod.")


def load_checkpoint(network: nn.Module, path: Path) -> str:
    """Loads the state dict in `path` (.safetensors, or a torch file read with weights_only) into `network`.

    Wrappers such as {"state_dict": ...} and prefixes such as "module." are taken off. Returns the file's SHA-256.
    Raises InferFastError when the file is missing, damaged or unsafe, or when a name or shape does not fit.
    """
    load_state(network, read_state(path), str(path))
    return file_hash(path)


def load_state(network: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Loads `state`, which came from `source`. Raises InferFastError when a name or shape does not fit."""
    expected = network.state_dict()
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    wrong = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    kind = type(network).__name__
    if wrong:
        first = wrong[0]
        raise InferFastError(
            f"{source} does not fit {kind}: {first} is {tuple(state[first].shape)}, expected "
            f"{tuple(expected[first].shape)} ({len(wrong)} such) - another class count or another network?"
        )
    if missing or unexpected:
        example = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is not expected"
        raise InferFastError(
            f"{source} does not fit {kind}: {example} ({len(missing)} missing, {len(unexpected)} unexpected names)."
        )
    network.load_state_dict({**expected, **state})


def load_pretrained(network: nn.Module, name: str, weights: str) -> None:
    """Loads what torchvision publishes for `name` as `weights`, or what timm does if only timm knows the name.

    Downloaded, unless torch's hub (or timm's) has the file already. Raises InferFastError for unknown weights, a
    failed download, a name that needs timm where it is not installed, or weights that do not fit (another class count).
    """
    import torchvision

    source = f"{name} {weights}"
    try:
        enumeration = torchvision.models.get_model_weights(name)
    except ValueError:
        load_state(network, _timm_state(name), f"timm's {name}")
        return
    if weights not in enumeration.__members__:
        raise InferFastError(f"{source} is not published: choose one of {', '.join(enumeration.__members__)}.")
    try:
        state = enumeration[weights].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InferFastError(
            f"{source} could not be fetched ({error}): check the network, or give a file with --arch-path."
        ) from error
    load_state(network, state, source)


def _timm_state(name: str) -> dict[str, torch.Tensor]:
    if not installed("timm"):
        raise InferFastError(
            f"torchvision has no weights of {name}: give a file with --arch-path, or {PIP['timm']}, which has more."
        )
    try:
        import timm

        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # timm and its hub raise many kinds; each means that there are no weights
        raise InferFastError(
            f"No weights of {name} could be fetched ({first_line(error)}): check the network, or give a file with "
            "--arch-path."
        ) from error


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, unwrapped and without prefixes. Raises InferFastError as load_checkpoint does."""
    state = _unwrap(_loaded(path))
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InferFastError(f"{path} holds no state dict (names to tensors), bare or under {', '.join(WRAPPERS)}.")
    state = dict(state)  # without the metadata of torch's own, which speaks of the prefixed names
    while prefix := next((p for p in PREFIXES if any(name.startswith(p) for name in state)), None):
        consume_prefix_in_state_dict_if_present(state, prefix)  # one layer of them: wrappers wrap each other
    return state


def recorded(path: Path) -> str:
    """What a checkpoint says of itself, in words: the accuracy and epoch stored beside its weights.

    Raises InferFastError as load_checkpoint does.
    """
    said = _loaded(path)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get("card", "{}"))
    said = {k: v for k, v in said.items() if isinstance(v, (int, float, str))} if isinstance(said, dict) else {}
    accuracy = next((said[name] for name in ACCURACIES if name in said), "not recorded")
    return f"{path}: accuracy {accuracy}, epoch {said.get('epoch', 'not recorded')}"


def _loaded(path: Path) -> object:
    """What a checkpoint file holds, read without running any code in it."""
    if not path.is_file():
        raise InferFastError(f"{path} does not exist: --arch-path must name a checkpoint for each teacher.")
    try:
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise InferFastError(
            f"{path} holds more than weights, and loading it could run code in it: save its state_dict alone."
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise InferFastError(f"{path} is not a whole checkpoint ({first_line(error)}).") from error
    return loaded


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _unwrap(loaded: object) -> object:
    while isinstance(loaded, dict):
        inner = next((loaded[w] for w in WRAPPERS if isinstance(loaded.get(w), dict)), None)
        if inner is None:
            return loaded
        loaded = inner
    return loaded
