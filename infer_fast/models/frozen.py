"""A frozen teacher's convolutions and linear layers: constant weights, cast once, and no input kept for backward."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from infer_fast.models.average import GlobalAveragePool, is_one
from infer_fast.models.copies import is_plain
from infer_fast.ops.frozen_conv import frozen_conv2d


class _Frozen(nn.Module):
    """A layer whose weight is constant; under autocast the weight is cast once and kept."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.Linear):
        super().__init__()
        self.register_buffer("weight", layer.weight.detach())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.cast: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: as torch names it, and networks may."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        weight, bias = self._weights(dtype)
        with torch.autocast(kind, enabled=False):
            return self.apply_weights(input.to(dtype), weight, bias)

    def apply_weights(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer itself; all three have one dtype."""
        raise NotImplementedError

    def cast_again(self) -> None:
        """After the weight has changed: what it was cast to follows, where it is."""
        for weight, bias in self.cast.values():
            weight.copy_(self.weight)
            if bias is not None and self.bias is not None:
                bias.copy_(self.bias)

    def _weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        if dtype == self.weight.dtype:
            return self.weight, self.bias
        if dtype not in self.cast:
            with torch.inference_mode(False):  # what is kept serves passes with gradients too
                self.cast[dtype] = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        return self.cast[dtype]


class FrozenConv2d(_Frozen):
    """Takes the place of a Conv2d: keeps nothing of its input for backward."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv)
        assert not isinstance(conv.padding, str)  # freeze leaves those as they are
        self.rest = (pair(conv.stride), pair(conv.padding), pair(conv.dilation), conv.groups)

    def apply_weights(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return frozen_conv2d(x, weight, bias, *self.rest)


class FrozenLinear(_Frozen):
    """Takes the place of a Linear."""

    def apply_weights(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)


def pair(sizes: int | tuple[int, ...]) -> tuple[int, int]:
    """(vertical, horizontal) of what torch's layers take: one number for both, or two."""
    rows, columns = (sizes, sizes) if isinstance(sizes, int) else sizes
    return rows, columns


def freeze(network: nn.Module) -> nn.Module:
    """Every plain Conv2d, Linear and AdaptiveAvgPool2d(1) becomes its frozen form.

    Convolutions with string or non-zero padding modes stay as they are, and layers with hooks.
    """
    for name, child in network.named_children():
        setattr(network, name, freeze(child))
    if not is_plain(network, nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d):
        return network
    if isinstance(network, nn.Conv2d) and network.padding_mode == "zeros" and not isinstance(network.padding, str):
        return FrozenConv2d(network)
    if isinstance(network, nn.AdaptiveAvgPool2d) and is_one(network.output_size):
        return GlobalAveragePool()
    return FrozenLinear(network) if isinstance(network, nn.Linear) else network
