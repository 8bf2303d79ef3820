"""Copies of a frozen teacher, and what about a module says that it is no more than its class."""

from __future__ import annotations

import copy

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def frozen_copy(teacher: nn.Module) -> nn.Module:
    """A copy of `teacher` in eval mode, without gradients; the caller's is not touched.

    Weights that hooks make anew in every forward (torch's older weight_norm and spectral_norm, prune) are copied as the
    values they have now, which deepcopy alone refuses to. What torch.compile wrapped is unwrapped.
    """
    teacher = getattr(teacher, "_orig_mod", teacher)
    made = [v for m in teacher.modules() for v in vars(m).values() if isinstance(v, torch.Tensor) and not v.is_leaf]
    memo: dict[int, object] = {id(tensor): tensor.detach().clone() for tensor in made}
    return copy.deepcopy(teacher, memo).eval().requires_grad_(False)


def in_layout(network: nn.Module, layout: torch.memory_format) -> nn.Module:
    """`network` with its convolutions' weights in `layout`: module.to takes no network that has others of five axes."""
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return network


def hooks_of(module: nn.Module) -> list[object]:
    """Whatever is called before or after the module's forward and backward."""
    return [hook for name in HOOKS for hook in getattr(module, name).values()]


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the module is of just one of these classes, with nothing hung on it that changes what it does."""
    return type(module) in kinds and not hooks_of(module) and "forward" not in vars(module)
