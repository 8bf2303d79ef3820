"""Networks drawn at random from a grammar of blocks: operations in place, residuals, hooks, odd ways to BatchNorm.

network  = stem, 2 to 5 blocks, head
block    = norm, activation, convolution, residual, branch or overwriting, in any order that keeps (B, WIDTH, H, W)
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

WIDTH, SIZE, CLASSES = 8, 8, 4


class LeakyNorm(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.1)


class OwnAffine(nn.BatchNorm2d):
    """A subclass that calls batch_norm itself, with an affine part of its own making."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight + 1, self.bias, False, 0.1, self.eps)


class Functional(nn.Module):
    """No BatchNorm layer: buffers and a call of the function."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.register_buffer("running_var", torch.ones(WIDTH))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var)


class Sliced(nn.Module):
    """A part of the input is normalised, written over, or both."""

    def __init__(self, way: int):
        super().__init__()
        self.norm, self.way = nn.BatchNorm2d(WIDTH // 2), way

    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        if self.way == 0:
            return torch.cat([self.norm(first), second.relu_()], dim=1)
        y = x.clone()
        if self.way == 1:
            y[:, : WIDTH // 2] = self.norm(first)
            return y
        half = y[:, : WIDTH // 2]
        half.mul_(0.5).add_(self.norm(second))
        return y


class Overwriting(nn.Module):
    """An operation in place whose result is not taken, or whose target is read before or after it."""

    def __init__(self, way: int):
        super().__init__()
        self.norm, self.act, self.way = nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), way

    def forward(self, x):
        x = x * 1  # the block's own
        if self.way == 0:
            x = self.norm(x)
            self.act(x)
            return x
        if self.way == 1:
            y = self.norm(x)
            return y + F.relu(x, inplace=True)
        if self.way == 2:
            kept = x.flatten(1)
            x.clamp_(-0.2, 0.2)
            return self.norm(x) + kept.view_as(x)
        if self.way == 3:
            y = self.norm(x)
            y += x
            y.relu_()
            return y * x
        if self.way == 4:
            x += self.norm(x)
            torch.relu_(x)
            return x
        y = self.norm(self.act(x))
        return F.hardswish(y, inplace=True) + x


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, way: int):
        super().__init__()
        self.inner, self.way = inner, way

    def forward(self, x):
        if self.way == 0:
            return F.relu(self.inner(x) + x)
        if self.way == 1:
            out = self.inner(x * 1)
            out += x
            return out.relu_()
        return torch.add(x, self.inner(x * 1), alpha=0.5)


class Untraceable(nn.Module):
    """Asks its input for a value."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.norms = [nn.BatchNorm2d(WIDTH)]
        self.norm, self.inner = self.norms[0], inner

    def forward(self, x, feature=False):
        if x.isnan().any():
            return x
        y = self.inner(self.norms[0](x))
        return (y, x) if feature else y


class Head(nn.Module):
    def __init__(self, way: int):
        super().__init__()
        self.way, inputs = way, WIDTH * SIZE * SIZE if way == 0 else WIDTH
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(inputs, CLASSES)

    def forward(self, x):
        if self.way == 0:
            return self.linear(x.view(x.size(0), -1))
        return self.linear(self.pool(x).flatten(1) if self.way == 1 else x.mean((2, 3)))


def _norm(rng: random.Random) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [
        *[lambda: nn.BatchNorm2d(WIDTH)] * 24,
        *(lambda: LeakyNorm(WIDTH), lambda: OwnAffine(WIDTH), Functional, lambda: nn.SyncBatchNorm(WIDTH)),
        lambda: nn.BatchNorm2d(WIDTH, affine=False),
    ]
    return rng.choice(kinds)()


def _convolution(rng: random.Random) -> nn.Module:
    groups, size = rng.choice((1, 1, 2, WIDTH)), rng.choice((1, 3))
    conv = nn.Conv2d(WIDTH, WIDTH, size, padding=size // 2, groups=groups, bias=rng.random() < 0.5)
    if rng.random() < 0.12:
        return parametrizations.weight_norm(conv)
    if rng.random() < 0.12:
        return prune.l1_unstructured(conv, "weight", amount=0.3)
    return conv


def _activation(rng: random.Random) -> nn.Module:
    inplace = rng.random() < 0.5
    kinds = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU)
    return rng.choice([kind(inplace=inplace) for kind in kinds] + [nn.GELU(), nn.Dropout(0.3), nn.Identity()])


def _block(rng: random.Random, depth: int = 0) -> nn.Module:
    kind = rng.random()
    if kind < 0.45 or depth > 1:
        parts = [_convolution(rng), _norm(rng), _activation(rng)]
        if rng.random() < 0.4:
            rng.shuffle(parts)
        return nn.Sequential(*parts)
    if kind < 0.65:
        return Overwriting(rng.randrange(6))
    if kind < 0.7:
        return Sliced(rng.randrange(3))
    if kind < 0.98:
        return Residual(_block(rng, depth + 1), rng.randrange(3))
    return Untraceable(_block(rng, depth + 1))


def _hooked(network: nn.Module, rng: random.Random) -> None:
    """Hangs hooks on some modules: one that halves an output, one that overwrites it, one that only looks."""
    hooks = (
        lambda module, args, output: output * 0.5,
        lambda module, args, output: output.mul_(0.5) if output._base is None else None,
        lambda module, args, output: None,
    )
    inner = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Sequential, nn.GELU))]
    for module in rng.sample(inner, min(len(inner), 2)):
        module.register_forward_hook(rng.choice(hooks))


def drawn(seed: int) -> nn.Module:
    """The network of that seed, (B, 3, SIZE, SIZE) -> (B, CLASSES), in eval mode, with statistics of its own."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [_block(rng) for _ in range(rng.randint(2, 5))]
        stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        network = nn.Sequential(stem, nn.BatchNorm2d(WIDTH), *blocks, Head(rng.randrange(3))).eval()
        for module in network.modules():
            if (mean := module._buffers.get("running_mean")) is not None:
                mean.normal_(0, 0.3)
                module._buffers["running_var"].uniform_(0.5, 2)
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    if rng.random() < 0.1:
        _hooked(network, rng)
    return network
