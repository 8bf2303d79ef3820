"""Global average pooling of a frozen teacher, whose gradient is a view of one division.

torch's own relabels a channels_last result in place, and the gradient of that fills and copies a tensor of its size.
"""

from __future__ import annotations

import torch
from torch import nn


class GlobalAveragePool(nn.Module):
    """Takes the place of an AdaptiveAvgPool2d(1)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: as torch names it, and networks may."""
        return global_average(input)


def global_average(x: torch.Tensor, output_size: object = 1) -> torch.Tensor:
    """torch.nn.functional.adaptive_avg_pool2d(x, 1), with the same values, gradients and layout.

    x: (B, C, H, W) or (C, H, W), floating -> (B, C, 1, 1) or (C, 1, 1), x's dtype. output_size: as is_one has it.
    """
    if x.dim() == 4 and x.stride(1) == 1 and x.stride(3) == x.shape[1]:  # channels_last, with one pixel too
        return x.mean(dim=(2, 3))[:, None, None].permute(0, 3, 1, 2)
    return x.mean(dim=(-2, -1), keepdim=True)


def is_one(output_size: object) -> bool:
    """Whether a pool of that size gives one pixel."""
    return output_size in (1, (1, 1), [1, 1])
