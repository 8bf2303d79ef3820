"""A frozen teacher's max-pooling, by the op that keeps a byte for each output for backward."""

from __future__ import annotations

import torch
from torch import nn

from infer_fast.models.copies import is_plain
from infer_fast.models.frozen import pair
from infer_fast.ops import max_pool
from infer_fast.ops.max_pool import LARGEST


class FrozenMaxPool2d(nn.Module):
    """Takes the place of a MaxPool2d without dilation and indices; see infer_fast.ops.max_pool."""

    def __init__(self, pool: nn.MaxPool2d, backend: str | None = None):
        super().__init__()
        self.window = pair(pool.kernel_size), pair(pool.stride), pair(pool.padding)
        self.ceil_mode, self.backend = pool.ceil_mode, backend

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: as torch names it, and networks may."""
        return max_pool(input, *self.window, ceil_mode=self.ceil_mode, backend=self.backend)


def freeze_pooling(network: nn.Module, backend: str | None = None) -> nn.Module:
    """Every plain MaxPool2d becomes a FrozenMaxPool2d (with dilation, indices or a large window it stays as it is)."""
    for name, child in network.named_children():
        setattr(network, name, freeze_pooling(child, backend))
    if is_plain(network, nn.MaxPool2d) and isinstance(network, nn.MaxPool2d) and _served(network):
        return FrozenMaxPool2d(network, backend)
    return network


def _served(pool: nn.MaxPool2d) -> bool:
    """Whether the op does it."""
    undilated = pair(pool.dilation) == (1, 1)
    return undilated and not pool.return_indices and max(pair(pool.kernel_size)) <= LARGEST
