"""The packages that a plain install leaves out, and the line that brings each."""

from __future__ import annotations

import importlib.util

from infer_fast.errors import InferFastError

PIP = {
    "matplotlib": "pip install matplotlib",
    "nvidia.dali": "pip install nvidia-dali-cuda130 (or nvidia-dali-cuda120)",
    "pyarrow": "pip install pyarrow",
    "timm": "pip install timm",
    "wandb": "pip install wandb",
}


def installed(module: str) -> bool:
    """Whether `module` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package it is a part of is not there
        return False


def require(module: str, what: str) -> None:
    """Raises InferFastError, saying that `what` needs `module` and how to get it, where it is not installed."""
    if not installed(module):
        raise InferFastError(f"{what} needs the package {module}, which is not installed: {PIP[module]}.")
