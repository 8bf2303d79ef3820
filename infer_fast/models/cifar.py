"""The published networks' 32x32 forms beside ResNet: MobileNetV2, EfficientNet-B0, ShuffleNetG2 and VGG16.

Attribute names follow the public CIFAR checkpoints, so that their state dicts load without renaming. Architectures:
MobileNetV2 (arXiv 1801.04381), EfficientNet (arXiv 1905.11946), ShuffleNet (arXiv 1707.01083), VGG (arXiv 1409.1556)
with BatchNorm.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection; a (projected) shortcut where the stride is 1."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        super().__init__()
        self.stride = stride
        planes = expansion * inputs
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, groups=planes, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride == 1 and inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class MobileNetV2(nn.Module):
    """MobileNetV2 with strides for 32x32: (B, 3, 32, 32) -> logits (B, classes)."""

    # expansion, output channels, blocks, stride of the first block
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks, inputs = [], 32
        for expansion, outputs, count, stride in self.STAGES:
            for position in range(count):
                blocks.append(InvertedResidual(inputs, outputs, expansion, stride if position == 0 else 1))
                inputs = outputs
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(320, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layers(out)
        out = F.relu(self.bn2(self.conv2(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class SqueezeExcitation(nn.Module):
    """Channel gates from pooled features."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.se1 = nn.Conv2d(channels, squeezed, 1)
        self.se2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self.se1(F.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.se2(gate))


class MBConv(nn.Module):
    """Expansion, depthwise, squeeze-and-excitation (a quarter of the block's inputs), projection; SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, drop: float):
        super().__init__()
        planes = expansion * inputs
        self.expands, self.drop = expansion != 1, drop
        self.has_skip = stride == 1 and inputs == outputs
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel, stride, padding=kernel // 2, groups=planes, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.se = SqueezeExcitation(planes, inputs // 4)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.silu(self.bn1(self.conv1(x))) if self.expands else x
        out = F.silu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.se(out)))
        if not self.has_skip:
            return out
        if self.training and self.drop > 0:
            out = _drop_images(out, self.drop)
        return out + x


class EfficientNetB0(nn.Module):
    """EfficientNet-B0 with strides for 32x32: (B, 3, 32, 32) -> logits (B, classes)."""

    # expansion, output channels, blocks, kernel, stride of the first block
    STAGES = (
        (1, 16, 1, 3, 1),
        (6, 24, 2, 3, 2),
        (6, 40, 2, 5, 2),
        (6, 80, 3, 3, 2),
        (6, 112, 3, 5, 1),
        (6, 192, 4, 5, 2),
        (6, 320, 1, 3, 1),
    )
    DROP_PATH, DROPOUT = 0.2, 0.2

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks: list[nn.Module] = []
        inputs = 32
        total = sum(stage[2] for stage in self.STAGES)
        for expansion, outputs, count, kernel, stride in self.STAGES:
            for position in range(count):
                drop = self.DROP_PATH * len(blocks) / total
                blocks.append(MBConv(inputs, outputs, kernel, stride if position == 0 else 1, expansion, drop))
                inputs = outputs
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(320, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.silu(self.bn1(self.conv1(x)))
        out = self.layers(out)
        out = F.dropout(F.adaptive_avg_pool2d(out, 1).flatten(1), self.DROPOUT, self.training)
        return self.linear(out)


class ShuffleBottleneck(nn.Module):
    """Grouped 1x1, channel shuffle, 3x3 depthwise, grouped 1x1; concatenated with the pooled input at stride 2."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int):
        super().__init__()
        self.stride, self.groups = stride, groups
        middle = outputs // 4
        first_groups = 1 if inputs == 24 else groups
        self.conv1 = nn.Conv2d(inputs, middle, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.shuffled = first_groups
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(_shuffle_channels(out, self.shuffled))))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1))
        return F.relu(out + x)


class ShuffleNetG2(nn.Module):
    """ShuffleNet with 2 groups for 32x32: (B, 3, 32, 32) -> logits (B, classes)."""

    GROUPS = 2
    WIDTHS, BLOCKS = (200, 400, 800), (4, 8, 4)

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        widths = (24, *self.WIDTHS)
        self.layer1, self.layer2, self.layer3 = (
            self._stage(widths[i], widths[i + 1], self.BLOCKS[i]) for i in range(3)
        )
        self.linear = nn.Linear(800, classes)

    def _stage(self, inputs: int, outputs: int, count: int) -> nn.Sequential:
        first = ShuffleBottleneck(inputs, outputs - inputs, 2, self.GROUPS)
        return nn.Sequential(first, *(ShuffleBottleneck(outputs, outputs, 1, self.GROUPS) for _ in range(count - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class VGG16(nn.Module):
    """VGG16 with BatchNorm and one linear layer: (B, 3, H, W) -> logits (B, classes), H and W at least 32."""

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage in self.STAGES:
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def _shuffle_channels(x: torch.Tensor, groups: int) -> torch.Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def _drop_images(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Stochastic depth: whole images of the branch are dropped, the rest scaled up."""
    keep = torch.empty(len(x), 1, 1, 1, device=x.device, dtype=x.dtype).bernoulli_(1 - rate)
    return x / (1 - rate) * keep


NETWORKS = {
    "mobilenetv2": MobileNetV2,
    "efficientnet_b0": EfficientNetB0,
    "shufflenet_g2": ShuffleNetG2,
    "vgg16": VGG16,
}
