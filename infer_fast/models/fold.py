"""A teacher made for labelling: every BatchNorm2d folded into two vectors, everything else about it constant.

A BatchNorm2d, the residual add after it and the activation after that become one scale_shift; convolutions have their
weights cast once; nothing is there for a gradient.

Folded into its convolution's weight and bias a BatchNorm would save nothing on a GPU: PyTorch adds a bias to what cuDNN
convolves in a pass of its own. scale_shift is that pass, with the add and the activation in it.
"""

from __future__ import annotations

import warnings

import torch
from torch import fx, nn

from infer_fast.errors import InferFastWarning, out_of_memory
from infer_fast.models.census import TOLERANCE, apart
from infer_fast.models.copies import frozen_copy, in_layout
from infer_fast.models.engine import release
from infer_fast.models.execution import at_precision
from infer_fast.models.frozen import freeze
from infer_fast.models.fuse import Norm, fuse
from infer_fast.models.layout import labelling_copy, noise_for
from infer_fast.models.pool import freeze_pooling
from infer_fast.ops import scale_shift
from infer_fast.ops.bn_match import ACTIVATIONS

PROBED = 4  # images of noise


class FoldedNorm(nn.Module):
    """Takes the place of one eval-mode BatchNorm2d, of a residual add and an activation after it if there are such."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, norm: Norm, activation: str = "none"):
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None  # folded() leaves others as they are
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        shift = shift if norm.bias is None else shift + norm.bias.double()
        dtype = norm.running_var.dtype
        self.register_buffer("scale", scale.detach().to(dtype))
        self.register_buffer("shift", shift.detach().to(dtype))
        self.activation = activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if x.dim() != 4:  # of no images
            shape = (-1, *[1] * (x.dim() - 2))
            y = x * self.scale.view(shape) + self.shift.view(shape)
            return ACTIVATIONS[self.activation](y if residual is None else y + residual)
        # An add of a number, or that broadcasts, stays an add.
        if residual is not None and not (isinstance(residual, torch.Tensor) and residual.shape == x.shape):
            return ACTIVATIONS[self.activation](scale_shift(x, self.scale, self.shift) + residual)
        return scale_shift(x, self.scale, self.shift, residual=residual, activation=self.activation)


def folded(teacher: nn.Module, size: tuple[int, int]) -> nn.Module:
    """A channels_last, eval-mode copy of `teacher` that gives its logits, (B, 3, H, W) -> (B, C), and no gradient.

    size: (H, W) of images, a few of which are passed through both: where their logits are not the same it is a plain
    copy, and a warning says so; a network that can't be rewritten is copied too. The caller's teacher is not touched.
    """
    plain = labelling_copy(teacher, size)
    norms = [module for module in plain.modules() if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    if any(norm.running_mean is None or norm.running_var is None for norm in norms):
        return plain
    network = fuse(in_layout(frozen_copy(teacher), torch.channels_last), FoldedNorm)
    if network is None:
        return plain
    network = freeze_pooling(freeze(_without_circles(network)))
    if _agree(network, plain, size):
        return network
    warnings.warn(
        f"The logits of {type(teacher).__name__} change where its BatchNorms are folded: it labels as it is, slower.",
        InferFastWarning,
        stacklevel=2,
    )
    return plain


def _without_circles(network: nn.Module) -> nn.Module:
    """The same, held by nothing but its user: torch leaves a tracer that knows it, and a graph that it is known to."""
    if isinstance(network, fx.GraphModule):
        network.delete_all_unused_submodules()
        network.graph.owning_module = None
    release()
    return network


@torch.no_grad()
def _agree(network: nn.Module, plain: nn.Module, size: tuple[int, int]) -> bool:
    """Whether both give the same logits, up to TOLERANCE."""
    images = noise_for(plain, (PROBED, 3, *size)).contiguous(memory_format=torch.channels_last)
    with at_precision(images.device, "float32"):
        expected = plain(images.clone())
        try:
            return not apart(network(images.clone()), expected, TOLERANCE)
        except Exception as error:  # whatever the network's own code raises where it is rewritten
            if out_of_memory(error):
                raise
            return False
