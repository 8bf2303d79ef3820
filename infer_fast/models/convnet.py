"""ConvNets: small ones with BatchNorm, in a few shapes that differ as teachers, and the literature's ConvNet-128.

`depth` stages of convolution, norm and activation, each followed by 2x2 average pooling, then a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU}


@dataclass(frozen=True)
class Shape:
    """One ConvNet: channels of the first stage (doubled at each one after), stages, block, activation, kernel size."""

    width: int
    depth: int
    block: Literal["plain", "residual", "separable"]
    activation: Literal["relu", "relu6", "silu"]
    kernel: int = 3


SHAPES = {
    "convnet": Shape(width=32, depth=3, block="plain", activation="relu"),
    "convnet-residual": Shape(width=32, depth=3, block="residual", activation="relu"),
    "convnet-separable": Shape(width=48, depth=3, block="separable", activation="relu6"),
    "convnet-silu": Shape(width=32, depth=3, block="plain", activation="silu", kernel=5),
}


class ConvNet(nn.Module):
    """A ConvNet of the given shape: (B, 3, H, W) -> logits (B, classes); H and W at least 2**depth."""

    def __init__(self, shape: Shape, classes: int):
        super().__init__()
        widths = [shape.width * 2**stage for stage in range(shape.depth)]
        stages: list[nn.Module] = []
        for inputs, outputs in zip([3, *widths], widths, strict=False):
            stages += [_stage(shape, inputs, outputs), nn.AvgPool2d(2)]
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.pool(self.stages(x)).flatten(1))


class Residual(nn.Module):
    """act(BN(conv(h)) + h) on top of h = act(BN(conv(x)))."""

    def __init__(self, shape: Shape, inputs: int, outputs: int):
        super().__init__()
        self.first = _plain(shape, inputs, outputs)
        self.conv = nn.Conv2d(outputs, outputs, shape.kernel, padding=shape.kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.activation = ACTIVATIONS[shape.activation]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.activation(self.norm(self.conv(x)) + x)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instancenorm": lambda channels: nn.GroupNorm(channels, channels),
    "batchnorm": nn.BatchNorm2d,
    "groupnorm": lambda channels: nn.GroupNorm(4, channels),
    "none": lambda channels: nn.Identity(),
}
CONVNET_128 = {
    f"convnet128{depth_name}{norm_name}": (depth, norm)
    for depth, depth_name in ((3, ""), (4, "-d4"))
    for norm, norm_name in (("instancenorm", ""), *((name, f"-{name}") for name in list(NORMS)[1:]))
}


class HalvingPool(nn.AvgPool2d):
    """AvgPool2d(2), on the CPU as one matrix product: 6 times faster in bfloat16, 2 times in float32.

    Two rows of W pixels lie side by side in memory; (2 W) x (W / 2) quarters take them to one row of the pooled image.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        fused = x.is_cuda or torch.compiler.is_compiling()  # where the plain form is fast, or fused with its neighbours
        if fused or h % 2 or w % 2 or not x.is_contiguous():
            return super().forward(x)
        columns = torch.arange(w, device=x.device)
        quarters = x.new_zeros(2, w, w // 2)
        quarters[:, columns, columns // 2] = 0.25
        return (x.view(-1, 2 * w) @ quarters.view(2 * w, w // 2)).view(b, c, h // 2, w // 2)


class ConvNet128(nn.Module):
    """The student of the distillation literature (arXiv 2006.05929): 128 channels in every stage, instance norm.

    (B, 3, H, W) -> logits (B, classes); the linear layer sees all of the last stage's pixels.
    """

    WIDTH = 128

    def __init__(self, classes: int, size: tuple[int, int], depth: int = 3, norm: str = "instancenorm"):
        super().__init__()
        stages: list[nn.Module] = []
        for inputs in (3, *[self.WIDTH] * (depth - 1)):
            conv = nn.Conv2d(inputs, self.WIDTH, 3, padding=1)
            stages += [conv, NORMS[norm](self.WIDTH), nn.ReLU(inplace=True), HalvingPool()]
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Linear(self.WIDTH * (size[0] >> depth) * (size[1] >> depth), classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def _stage(shape: Shape, inputs: int, outputs: int) -> nn.Module:
    if shape.block == "residual":
        return Residual(shape, inputs, outputs)
    if shape.block == "separable" and inputs != 3:
        depthwise = _plain(shape, inputs, inputs, groups=inputs)
        return nn.Sequential(depthwise, *_convolution(1, shape, inputs, outputs))
    return _plain(shape, inputs, outputs)


def _plain(shape: Shape, inputs: int, outputs: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(*_convolution(shape.kernel, shape, inputs, outputs, groups))


def _convolution(kernel: int, shape: Shape, inputs: int, outputs: int, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        ACTIVATIONS[shape.activation](),
    ]
