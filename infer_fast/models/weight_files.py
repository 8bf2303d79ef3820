"""Files of weights, told apart by their content and read without running any code that may be in them.

No pickle is ever loaded with weights_only=False. What may stand beside the weights, and is nothing but data, is read:
numpy's numbers and arrays, argparse's namespaces, paths, plain containers.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from infer_fast.errors import InferFastError, InferFastWarning, first_line, out_of_memory

SAFETENSORS = ".safetensors"
TORCH = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))  # a zip file, or as of old a pickle
HEAD = 512  # bytes that tell what a file is
OTHERS = (  # how files begin that are mistaken for checkpoints, in lower case; what they are, and what to do
    (b"<", "is a web page, not a checkpoint: download the file itself"),
    (b"version https://git-lfs", "is a pointer of Git LFS, not a checkpoint: fetch the file itself with git lfs pull"),
    (b"{", "is JSON text, not a checkpoint: give the file with the weights"),
    (b"\x89hdf", "is an HDF5 file, as Keras writes them: give a checkpoint of PyTorch"),
    (b"\x93numpy", "is a NumPy array, not a checkpoint: give a checkpoint of PyTorch"),
    (b"\x1f\x8b", "is compressed: unpack it first"),
    (b"\xfd7zxz", "is compressed: unpack it first"),
    (b"bzh", "is compressed: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed: unpack it first"),
)
SCALAR, ARRAY = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]  # what makes numpy's values when unpickled


def _plain_dict(*_: object) -> dict:
    """What a defaultdict is read as: torch fills no other kind of dict."""
    return {}


DATA: list[Any] = [  # types that are nothing but data, and functions that make nothing else
    argparse.Namespace,
    dict,
    float,
    int,
    list,
    np.dtype,
    np.ndarray,
    pathlib.PosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"),  # as Python 3.13 calls it
    types.SimpleNamespace,
    (_plain_dict, "collections.defaultdict"),
    *{type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"},
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # numpy 1 and 2
    *((ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def read_file(path: Path) -> tuple[object, dict[str, str]]:
    """(what a torch or safetensors file holds, the texts in a safetensors file's header).

    A safetensors file under another name is read all the same, and so is a torch file named .safetensors, with a
    warning. Raises InferFastError for a file that is missing, another thing, damaged, or holds more than data.
    """
    check_file(path)
    with path.open("rb") as file:
        head = file.read(HEAD)
    safe = _is_safetensors(head, path.stat().st_size)
    named, pickled = path.suffix == SAFETENSORS, head.startswith(TORCH)
    if safe != named and (safe or pickled):
        kind = "safetensors" if safe else "torch"
        warnings.warn(f"{path} is a {kind} file under another name: it is read as one.", InferFastWarning, stacklevel=2)
    if not (safe or pickled):
        _refuse_others(path, head)
    try:
        return _read_safetensors(path) if safe or (named and not pickled) else (_read_torch(path), {})
    except InferFastError:
        raise
    except Exception as error:  # whatever a reader comes upon in a file that is damaged
        if out_of_memory(error):
            raise
        raise InferFastError(
            f"{path} is not a whole checkpoint ({first_line(error)}): download or save it again."
        ) from error


def check_file(path: Path) -> None:
    """Raises InferFastError for a path that leads to no file, or to an empty one."""
    if path.is_dir():
        raise InferFastError(f"{path} is a folder: name the checkpoint file in it.")
    if not path.is_file():
        raise InferFastError(f"{path} does not exist: name a checkpoint file.")
    if path.stat().st_size == 0:
        raise InferFastError(f"{path} is empty: download or save it again.")


def _is_safetensors(head: bytes, size: int) -> bool:
    """Whether it begins as they do: the header's length in 8 bytes, then the header, which is JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _refuse_others(path: Path, head: bytes) -> None:
    begins = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, said in OTHERS:
        if begins.startswith(magic):
            raise InferFastError(f"{path} {said}.")


def _read_safetensors(path: Path) -> tuple[object, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  no dict


def _read_torch(path: Path) -> object:
    if zipfile.is_zipfile(path):
        _check_archive(path)
    try:
        with torch.serialization.safe_globals(DATA), path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders at what damage has made of a pickle's first byte
            return torch.load(file, map_location="cpu", weights_only=True)  # the file, for its name says nothing
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+)|Can only |Trying to ", str(error))
        if unsafe is None:
            raise InferFastError(f"{path} is not a whole checkpoint: download or save it again.") from error
        what = f" ({unsafe.group(1)})" if unsafe.group(1) else ""
        raise InferFastError(
            f"{path} holds more than weights{what}, and loading it could run code in it: save its state_dict alone."
        ) from error


def _check_archive(path: Path) -> None:
    """Raises InferFastError for a zip file that holds no torch checkpoint, or TorchScript."""
    with zipfile.ZipFile(path) as archive:
        inside = {Path(name).name for name in archive.namelist()}
    if "constants.pkl" in inside:
        raise InferFastError(
            f"{path} is TorchScript, a program with its weights: save the state_dict of the network it was made of."
        )
    if "data.pkl" not in inside:
        raise InferFastError(f"{path} is a zip archive without a checkpoint: unpack it first.")
