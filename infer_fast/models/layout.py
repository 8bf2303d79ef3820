"""In which layout a network's tensors lie: channels_last where it is served well and takes it."""

from __future__ import annotations

import torch
from torch import nn

from infer_fast.models.census import TOLERANCE, apart
from infer_fast.models.copies import frozen_copy, in_layout
from infer_fast.models.execution import at_precision


def layout_of(network: nn.Module, images: torch.Tensor) -> torch.memory_format:
    """The layout for `network` on `images` (B, 3, H, W): channels_last, but contiguous with instance or group norms,
    whose channels_last kernels are slow or missing, and where its code takes views that only contiguous tensors have
    (x.view(B, -1) of more than one pixel)."""
    if any(isinstance(module, (nn.GroupNorm, nn.InstanceNorm2d)) for module in network.modules()):
        return torch.contiguous_format
    return torch.channels_last if takes_channels_last(network, images) else torch.contiguous_format


@torch.no_grad()
def takes_channels_last(network: nn.Module, images: torch.Tensor) -> bool:
    """Whether a copy of `network` in eval mode gives for the first images (B, 3, H, W) what it gives where they are
    contiguous: what is a view there may be a copy, or impossible."""
    trial, first = frozen_copy(network), images[:4].contiguous()
    try:
        with at_precision(images.device, "float32"):
            expected = trial(first.clone())
            in_layout(trial, torch.channels_last)
            found = trial(first.clone(memory_format=torch.channels_last))
    except RuntimeError as error:
        return "view size is not compatible" not in str(error)  # another error is raised where it is met
    return not isinstance(found, torch.Tensor) or not apart(found, expected, TOLERANCE)


class Apart(nn.Module):
    """A network that is given images of its own, contiguous ones: what it does to them is nobody else's business."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.clone(memory_format=torch.contiguous_format))


def labelling_copy(teacher: nn.Module, size: tuple[int, int]) -> nn.Module:
    """A frozen copy of `teacher` that takes images of `size` (H, W) in channels_last, as fast as it can."""
    network = frozen_copy(teacher)
    images = 2 * noise_for(network, (4, 3, *size))
    if takes_channels_last(network, images) and not _overwrites(network, images):
        return in_layout(network, torch.channels_last)
    return Apart(network)


def noise_for(network: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """The same normal noise every time, of the type and on the device of a network's first floating parameter."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return noise.to(like.device, like.dtype)


@torch.no_grad()
def _overwrites(network: nn.Module, images: torch.Tensor) -> bool:
    """Whether a frozen network changes the images that it is given."""
    given = images.clone()
    try:
        network(given)
    except RuntimeError:  # it is raised where it is met
        return False
    return not torch.equal(given, images)
