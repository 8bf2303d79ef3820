"""The published way: our own plain rendering of the loop as the published scripts run it, to be compared with.

float32, contiguous (NCHW), a forward hook on every BatchNorm2d, one task at a time, one synchronisation per iteration.
Follows the description in INFER (arXiv 2408.06927, section 3) and SRe2L (arXiv 2306.13092, section 3.2).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F


class StatisticsHook:
    """Keeps ||var - running_var||_2 + ||mean - running_mean||_2 of a BatchNorm2d's input at each forward pass."""

    def __init__(self, module: nn.BatchNorm2d):
        self.handle = module.register_forward_hook(self.hook)
        self.penalty: torch.Tensor | None = None

    def hook(self, module: nn.BatchNorm2d, inputs: tuple, output: torch.Tensor) -> None:
        x = inputs[0]
        channels = x.shape[1]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(channels, -1).var(1, unbiased=False)
        self.penalty = torch.norm(module.running_var - var, 2) + torch.norm(module.running_mean - mean, 2)

    def close(self) -> None:
        self.handle.remove()


def batch_norm_relu(norm: nn.BatchNorm2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One BatchNorm2d + ReLU with its penalty: (y, penalty)."""
    hook = StatisticsHook(norm)
    y = F.relu(norm(x))
    hook.close()
    return y, hook.penalty


def solve(teacher: nn.Module, base: torch.Tensor, settings, shift: torch.Tensor) -> torch.Tensor:
    """One INFER task the published way: base (C, 3, H, W), shift int64 (T, 2) -> compensator (3, H, W).

    The weights are frozen, as in the published scripts; the caller's teacher is copied.
    """
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    hooks = [StatisticsHook(m) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    targets = torch.arange(len(base), device=base.device)
    u = torch.zeros(1, *base.shape[1:], device=base.device, requires_grad=True)
    optimizer = torch.optim.Adam([u], lr=settings.lr, betas=(0.5, 0.9), eps=1e-8)
    for iteration in range(settings.iterations):
        optimizer.param_groups[0]["lr"] = settings.lr * (1 + math.cos(math.pi * iteration / settings.iterations)) / 2
        down, right = shift[iteration].tolist()
        images = torch.roll(base + u, shifts=(down, right), dims=(2, 3))
        optimizer.zero_grad()
        loss = F.cross_entropy(teacher(images), targets)
        weights = [settings.first_bn_multiplier] + [1.0] * (len(hooks) - 1)
        penalties = [w * h.penalty for w, h in zip(weights, hooks, strict=True) if h.penalty is not None]
        loss = loss + settings.r_bn * sum(penalties)
        loss.backward()
        optimizer.step()
        loss.item()  # the published loop prints it, and waits for it
    for hook in hooks:
        hook.close()
    return u.detach()[0]


def perturb(params: list[torch.Tensor], grads: list[torch.Tensor], rho: float) -> None:
    """Directed weight adjustment as a loop over the parameters."""
    norm = torch.norm(torch.stack([g.norm(2) for g in grads]), 2).item()
    with torch.no_grad():
        for param, grad in zip(params, grads, strict=True):
            param.add_(grad * (rho / (norm + 1e-12)))
