"""The published way: our own plain rendering of the loop as the published scripts run it, to be compared with.

The benchmarks time it, and the tests hold ours against it in float64: one baseline for both. As it is timed: float32,
contiguous (NCHW), a forward hook on every BatchNorm2d, one task at a time, one synchronisation per iteration.
Follows the description in INFER (arXiv 2408.06927, section 3) and SRe2L (arXiv 2306.13092, section 3.2).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import hflip, resized_crop

from infer_fast.models.convnet import HalvingPool
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis import Views

Channels = tuple[float, float, float]


class StatisticsHook:
    """Keeps r_var * ||var - running_var||_2 + ||mean - running_mean||_2 of a BatchNorm2d's input at each pass."""

    def __init__(self, module: nn.BatchNorm2d, r_var: float = 1.0):
        self.r_var = r_var
        self.handle = module.register_forward_hook(self.hook)
        self.penalty: torch.Tensor | None = None

    def hook(self, module: nn.BatchNorm2d, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0]
        channels = x.shape[1]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(channels, -1).var(1, unbiased=False)
        running_mean, running_var = module.running_mean, module.running_var
        assert running_mean is not None and running_var is not None  # without them there is nothing to match
        variance = torch.norm(running_var - var, 2)
        if self.r_var != 1:  # the published scripts have no such factor
            variance = self.r_var * variance
        self.penalty = variance + torch.norm(running_mean - mean, 2)

    def close(self) -> None:
        self.handle.remove()


def batch_norm_relu(norm: nn.BatchNorm2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One BatchNorm2d + ReLU with its penalty: (y, penalty)."""
    hook = StatisticsHook(norm)
    y = F.relu(norm(x))
    hook.close()
    assert hook.penalty is not None  # the pass above has called it
    return y, hook.penalty


def hooks_of(teacher: nn.Module, r_var: float = 1.0) -> list[StatisticsHook]:
    """A hook on every BatchNorm2d, in module order."""
    return [StatisticsHook(m, r_var) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]


def weighted_penalty(hooks: list[StatisticsHook], first_bn_multiplier: float) -> torch.Tensor | float:
    """The sum of the last pass's penalties, the first layer's times first_bn_multiplier; 0 if no layer was called."""
    weights = [first_bn_multiplier] + [1.0] * (len(hooks) - 1)
    penalties = [w * h.penalty for w, h in zip(weights, hooks, strict=True) if h.penalty is not None]
    return sum(penalties)


def objective(
    teacher: nn.Module,
    hooks: list[StatisticsHook],
    images: torch.Tensor,
    targets: torch.Tensor,
    settings: SynthesisSettings,
) -> torch.Tensor:
    """INFER's loss (eq. 5): cross-entropy and the penalty of one pass of the hooked teacher, in the images' dtype."""
    loss = F.cross_entropy(teacher(images), targets)
    return loss + settings.r_bn * weighted_penalty(hooks, settings.first_bn_multiplier)


class HostView(NamedTuple):
    """One iteration's view of one lane, read to the host, where the published scripts draw it."""

    shift: tuple[int, int]
    crop: tuple[int, int, int, int] | None = None
    flip: bool = False


def host_view(views: Views, iteration: int) -> HostView:
    """What the first lane of `views` sees at an iteration."""
    crop, flip = (None if t is None else t[iteration].tolist()[0] for t in (views.crop, views.flip))
    return HostView(views.shift[iteration].tolist()[0], crop, bool(flip))


def viewed(images: torch.Tensor, view: HostView) -> torch.Tensor:
    """The images (C, 3, H, W) cropped and resized, flipped and shifted."""
    if view.crop is not None:
        images = resized_crop(images, *view.crop, list(images.shape[-2:]))
    if view.flip:
        images = hflip(images)
    return torch.roll(images, shifts=view.shift, dims=(2, 3))


class Task:
    """One INFER task the published way: base (C, 3, H, W), views of one lane -> compensator `u`, (1, 3, H, W).

    The weights are frozen, as in the published scripts; the caller's teacher is copied. step() is one iteration.
    """

    def __init__(self, teacher: nn.Module, base: torch.Tensor, settings: SynthesisSettings, views: Views):
        self.base, self.settings, self.views = base, settings, views
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.hooks = hooks_of(self.teacher, settings.r_var)
        self.targets = torch.arange(len(base), device=base.device)
        self.u = torch.zeros(1, *base.shape[1:], dtype=base.dtype, device=base.device, requires_grad=True)
        self.restart()

    def restart(self) -> None:
        """Back to iteration 0."""
        with torch.no_grad():
            self.u.zero_()
        self.done = 0
        self.optimizer = torch.optim.Adam([self.u], lr=self.settings.lr, betas=(0.5, 0.9), eps=1e-8)

    def step(self) -> None:
        settings = self.settings
        self.optimizer.param_groups[0]["lr"] = (
            settings.lr * (1 + math.cos(math.pi * self.done / settings.iterations)) / 2
        )
        view = host_view(self.views, self.done)
        images = viewed(self.base + self.u, view)
        self.optimizer.zero_grad()
        loss = objective(self.teacher, self.hooks, images, self.targets, settings)
        loss.backward()
        self.optimizer.step()
        loss.item()  # the published loop prints it, and waits for it
        self.done += 1


def solve(teacher: nn.Module, base: torch.Tensor, settings: SynthesisSettings, views: Views) -> torch.Tensor:
    """One INFER task the published way, from set-up to the compensator (3, H, W); arguments as Task's."""
    task = Task(teacher, base, settings, views)
    for _ in range(settings.iterations):
        task.step()
    return task.u.detach()[0]


def perturb(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], rho: float) -> None:
    """Directed weight adjustment as a loop over the parameters."""
    norm = torch.norm(torch.stack([g.norm(2) for g in grads]), 2).item()
    with torch.no_grad():
        for param, grad in zip(params, grads, strict=True):
            param.add_(grad * (rho / (norm + 1e-12)))


def write_jpegs(images: torch.Tensor, labels: torch.Tensor, folder: Path) -> None:
    """uint8 (N, 3, H, W) as class folders of JPEG files, as the published scripts store a distilled set."""
    for position, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        place = folder / f"new{label:03d}"
        place.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"class{label:03d}_id{position:05d}.jpg")


class Loader:
    """A torchvision ImageFolder of JPEG files behind a DataLoader with 2 workers, and MixUp on the device."""

    def __init__(self, folder: Path, size: int, batch_size: int, mean: Channels, std: Channels, *, resized: bool):
        crop = transforms.RandomResizedCrop(size) if resized else transforms.RandomCrop(size, padding=4)
        steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)]
        files = Positioned(folder, transform=transforms.Compose(steps))
        self.loader: DataLoader[tuple[torch.Tensor, int]] = DataLoader(
            files, batch_size, shuffle=True, num_workers=2, persistent_workers=True
        )

    def epoch(
        self, logits: torch.Tensor, device: torch.device, alpha: float = 0.8
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Mixed images and their mixed soft labels, one epoch."""
        for images, positions in self.loader:
            images, targets = images.to(device), logits[positions].to(device)
            weight = float(np.random.beta(alpha, alpha))
            partner = torch.randperm(len(images), device=device)
            yield weight * images + (1 - weight) * images[partner], weight * targets + (1 - weight) * targets[partner]

    def epochs(
        self, count: int, logits: torch.Tensor, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """So many epochs, one after the other."""
        for _ in range(count):
            yield from self.epoch(logits, device)

    def close(self) -> None:
        """Ends the workers."""
        self.loader._iterator = None


class Positioned(ImageFolder):
    """An ImageFolder that gives an image's position in place of its class: its soft label is looked up."""

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        return super().__getitem__(position)[0], position


def with_plain_pools(student: nn.Module) -> nn.Module:
    """The student with torch's average pooling in place of ours, changed in place."""
    for parent in list(student.modules()):
        for name, child in parent.named_children():
            if isinstance(child, HalvingPool):
                setattr(parent, name, nn.AvgPool2d(2))
    return student


class Trainer:
    """An eager float32 training step with AdamW, contiguous tensors, and the loss read back for printing."""

    def __init__(self, student: nn.Module, temperature: float):
        self.student, self.temperature = with_plain_pools(student).train(), temperature
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.01)

    def step(self, images: torch.Tensor, targets: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        student = F.log_softmax(self.student(images) / self.temperature, dim=1)
        loss = F.kl_div(student, F.softmax(targets / self.temperature, dim=1), reduction="batchmean")
        loss.backward()
        self.optimizer.step()
        return loss.item()


@torch.no_grad()
def label(images: torch.Tensor, networks: list[nn.Module], device: torch.device, batch: int = 64) -> torch.Tensor:
    """The networks' averaged logits (N, C) on the CPU, a small batch at a time."""
    parts = [sum(net(part.to(device)) for net in networks).cpu() / len(networks) for part in images.split(batch)]
    return torch.cat(parts)
