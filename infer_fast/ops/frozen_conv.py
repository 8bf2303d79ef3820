"""frozen_conv2d: a convolution whose weight is constant, so that nothing but the weight is kept for backward.

PyTorch's own convolution node keeps its input even when no weight gradient is wanted; the input gradient
(a transposed convolution of the output's gradient with the weight) needs only the input's shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.rest = (x.shape, stride, padding, dilation, groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        shape, stride, padding, dilation, groups = ctx.rest
        stand_in = grad.new_empty(1).expand(shape)  # the input's shape without its memory
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad, stand_in, weight, None, stride, padding, dilation, False, (0, 0), groups, (True, False, False)
        )
        return grad_x, None, None, None, None, None, None


def frozen_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    """torch.nn.functional.conv2d with a gradient for x (B, C, H, W) alone; weight and bias have x's dtype."""
    return _FrozenConv2d.apply(x, weight, bias, stride, padding, dilation, groups)
