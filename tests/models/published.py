"""The public CIFAR networks once more, written from their papers' tables as plain functions over a state dict.

Nothing here is shared with infer_fast.models: names and shapes are those of the public checkpoints (torchvision's
ResNet with a 3x3 stem, and the pytorch-cifar family), so that a checkpoint made here stands for one of theirs.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


class Kernel(NamedTuple):
    """A square convolution's kernel, and how it is moved over how many groups of channels."""

    size: int
    stride: int = 1
    groups: int = 1


class Weights:
    """A state dict that grows as a forward pass asks for its layers, in the order and with the shapes that it does."""

    def __init__(self, generator):
        self.state, self.generator = {}, generator

    def tensor(self, name, *shape, around=0.0):
        if name not in self.state:
            inputs = torch.Size(shape[1:]).numel() if len(shape) > 1 else 200
            self.state[name] = around + (2 / inputs) ** 0.5 * torch.randn(*shape, generator=self.generator)
        return self.state[name]

    def conv(self, name, x, outputs, kernel, bias=False):
        weight = self.tensor(f"{name}.weight", outputs, x.shape[1] // kernel.groups, kernel.size, kernel.size)
        offset = self.tensor(f"{name}.bias", outputs) if bias else None
        return F.conv2d(x, weight, offset, kernel.stride, kernel.size // 2, groups=kernel.groups)

    def norm(self, name, x):
        weight, bias = (self.tensor(f"{name}.{kind}", x.shape[1], around=1.0 * (kind == "weight")) for kind in
                        ("weight", "bias"))  # fmt: skip
        mean = self.tensor(f"{name}.running_mean", x.shape[1])
        self.state.setdefault(f"{name}.running_var", torch.rand(x.shape[1], generator=self.generator) + 0.5)
        self.state.setdefault(f"{name}.num_batches_tracked", torch.tensor(7))
        variance = self.state[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, weight, bias, training=False)

    def linear(self, name, x, outputs):
        return F.linear(x, self.tensor(f"{name}.weight", outputs, x.shape[1]), self.tensor(f"{name}.bias", outputs))


def pooled(x):
    return x.mean((2, 3))


def resnet18(w, x, classes):
    x = w.norm("bn1", w.conv("conv1", x, 64, Kernel(3))).relu()
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = w.norm(f"{name}.bn1", w.conv(f"{name}.conv1", x, width, Kernel(3, stride))).relu()
            out = w.norm(f"{name}.bn2", w.conv(f"{name}.conv2", out, width, Kernel(3)))
            if stride == 2:
                x = w.norm(f"{name}.downsample.1", w.conv(f"{name}.downsample.0", x, width, Kernel(1, 2)))
            x = (out + x).relu()
    return w.linear("fc", pooled(x), classes)


def mobilenetv2(w, x, classes):
    x = w.norm("bn1", w.conv("conv1", x, 32, Kernel(3))).relu()
    number = 0
    for expansion, width, count, first in [
        (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ]:  # fmt: skip
        for block in range(count):
            name, stride, inner = f"layers.{number}", first if block == 0 else 1, expansion * x.shape[1]
            out = w.norm(f"{name}.bn1", w.conv(f"{name}.conv1", x, inner, Kernel(1))).relu()
            out = w.norm(f"{name}.bn2", w.conv(f"{name}.conv2", out, inner, Kernel(3, stride, inner))).relu()
            out = w.norm(f"{name}.bn3", w.conv(f"{name}.conv3", out, width, Kernel(1)))
            if stride == 1 and x.shape[1] != width:
                x = w.norm(f"{name}.shortcut.1", w.conv(f"{name}.shortcut.0", x, width, Kernel(1)))
            x = out + x if stride == 1 else out
            number += 1
    x = w.norm("bn2", w.conv("conv2", x, 1280, Kernel(1))).relu()
    return w.linear("linear", pooled(x), classes)


def efficientnet_b0(w, x, classes):
    x = F.silu(w.norm("bn1", w.conv("conv1", x, 32, Kernel(3))))
    number = 0
    for expansion, width, count, kernel, first in [
        (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2), (6, 112, 3, 5, 1), (6, 192, 4, 5, 2),
        (6, 320, 1, 3, 1),
    ]:  # fmt: skip
        for block in range(count):
            name, stride, inner = f"layers.{number}", first if block == 0 else 1, expansion * x.shape[1]
            expands = expansion > 1  # the first block has the layers all the same, and does not use them
            out = F.silu(w.norm(f"{name}.bn1", w.conv(f"{name}.conv1", x, inner, Kernel(1))))
            out = out if expands else x
            out = F.silu(w.norm(f"{name}.bn2", w.conv(f"{name}.conv2", out, inner, Kernel(kernel, stride, inner))))
            gate = F.silu(
                w.conv(f"{name}.se.se1", out.mean((2, 3), keepdim=True), x.shape[1] // 4, Kernel(1), bias=True)
            )
            out = out * w.conv(f"{name}.se.se2", gate, inner, Kernel(1), bias=True).sigmoid()
            out = w.norm(f"{name}.bn3", w.conv(f"{name}.conv3", out, width, Kernel(1)))
            x = out + x if stride == 1 and x.shape[1] == width else out
            number += 1
    return w.linear("linear", pooled(x), classes)


def shufflenet_g2(w, x, classes):
    x = w.norm("bn1", w.conv("conv1", x, 24, Kernel(1))).relu()
    for stage, (width, count) in enumerate([(200, 4), (400, 8), (800, 4)], start=1):
        for block in range(count):
            name, stride = f"layer{stage}.{block}", 2 if block == 0 else 1
            outputs = width - x.shape[1] if stride == 2 else width
            groups = 1 if x.shape[1] == 24 else 2
            out = w.norm(f"{name}.bn1", w.conv(f"{name}.conv1", x, outputs // 4, Kernel(1, groups=groups))).relu()
            out = out.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
            out = w.norm(f"{name}.bn2", w.conv(f"{name}.conv2", out, outputs // 4, Kernel(3, stride, outputs // 4)))
            out = w.norm(f"{name}.bn3", w.conv(f"{name}.conv3", out.relu(), outputs, Kernel(1, groups=2)))
            x = torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if stride == 2 else out + x
            x = x.relu()
    return w.linear("linear", pooled(x), classes)


def vgg16(w, x, classes):
    position = 0
    for stage in [(64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3]:
        for width in stage:
            x = w.conv(f"features.{position}", x, width, Kernel(3), bias=True)
            x = w.norm(f"features.{position + 1}", x).relu()
            position += 3  # convolution, norm, ReLU
        x = F.max_pool2d(x, 2)
        position += 1
    return w.linear("classifier", x.flatten(1), classes)


NETWORKS = {f.__name__: f for f in (resnet18, mobilenetv2, efficientnet_b0, shufflenet_g2, vgg16)}
