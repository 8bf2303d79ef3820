"""Copies of a frozen teacher, and what about a module says that it is no more than its class."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from infer_fast.errors import InferFastError, first_line

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def frozen_copy(teacher: nn.Module) -> nn.Module:
    """A copy of `teacher` in eval mode, without gradients; the caller's is not touched.

    Weights that hooks make anew in every forward (torch's older weight_norm and spectral_norm, prune) are copied as the
    values they have now, which deepcopy alone refuses to. What torch.compile or DataParallel wrapped is unwrapped.
    Raises InferFastError for a network that can't be copied.
    """
    while (
        inner := getattr(teacher, "module" if isinstance(teacher, nn.DataParallel) else "_orig_mod", None)
    ) is not None:
        teacher = inner
    made = [t for module in teacher.modules() for t in _held(module) if not t.is_leaf]
    memo: dict[int, object] = {id(tensor): tensor.detach().clone() for tensor in made}
    try:
        copied = copy.deepcopy(teacher, memo)
        copied.eval()
        return copied.requires_grad_(False)
    except Exception as error:  # whatever hangs on a module: locks, files, weights that are still to be made
        kind = type(teacher).__name__
        raise InferFastError(f"{kind} can't be copied ({type(error).__name__}: {first_line(error)}).") from error


def _held(module: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors that a module holds beside its parameters, in lists and dicts of its own too."""
    for value in (*vars(module).values(), *module._buffers.values()):
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        yield from (v for v in inner if isinstance(v, torch.Tensor))


def in_layout(network: nn.Module, layout: torch.memory_format) -> nn.Module:
    """`network` with its convolutions' weights in `layout`: module.to takes no network that has others of five axes."""
    for parameter in network.parameters():
        if parameter.dim() == 4:
            # Not contiguous(): of 1x1 convolutions it leaves the strides, which convolutions tell the layout by.
            parameter.data = parameter.data.to(parameter.device, memory_format=layout)
    return network


def hooks_of(module: nn.Module) -> list[object]:
    """Whatever is called before or after the module's forward and backward."""
    return [hook for name in HOOKS for hook in getattr(module, name).values()]


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the module is of just one of these classes, with nothing hung on it that changes what it does."""
    return type(module) in kinds and not hooks_of(module) and "forward" not in vars(module)
