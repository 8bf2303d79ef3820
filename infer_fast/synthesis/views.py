"""The random views of a task: drawn up front from the task's own generator, applied on the device.

A view is one circular shift by (a, b) pixels, each uniform in 0..jitter inclusive, the same for the whole batch of a
lane.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Views:
    """The draws of L lanes over T iterations: shift int64 (T, L, 2), rows and columns."""

    shift: torch.Tensor

    def to(self, device: torch.device) -> Views:
        return Views(self.shift.to(device))

    def lane(self, index: int) -> Views:
        """The draws of one lane, as Views of one lane."""
        return self.lanes(range(index, index + 1))

    def lanes(self, which: range) -> Views:
        """The draws of some lanes."""
        return Views(self.shift[:, which.start : which.stop])


def task_generator(seed: int, teacher: int, index: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on these four values alone, whatever ran before or beside it."""
    digest = hashlib.sha256(f"{seed}/{teacher}/{index}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw_views(seed: int, teacher: int, indices: list[int], *, iterations: int, jitter: int) -> Views:
    """The views of tasks (teacher, index) for index in `indices`, one lane each."""
    lanes = [
        torch.randint(0, jitter + 1, (iterations, 2), generator=task_generator(seed, teacher, index, "views"))
        for index in indices
    ]
    return Views(torch.stack(lanes, dim=1))  # (T, L, 2)


class _CircularShift(torch.autograd.Function):
    """x rolled by shift; the gradient is rolled back. A gather both ways: no scatter, no atomics, no host values."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(shift)
        return _roll(x, shift)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (shift,) = ctx.saved_tensors
        return _roll(grad, -shift), None


def circular_shift(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Lane l of x (L, ..., H, W) rolled down by shift[l, 0] and right by shift[l, 1]; shift int64 (L, 2)."""
    return _CircularShift.apply(x, shift)


def _roll(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    lanes, height, width = len(x), x.shape[-2], x.shape[-1]
    rows = (torch.arange(height, device=x.device) - shift[:, :1]) % height  # (L, H)
    columns = (torch.arange(width, device=x.device) - shift[:, 1:]) % width  # (L, W)
    flat = (rows[:, :, None] * width + columns[:, None, :]).view(lanes, 1, height * width)
    pixels = x.reshape(lanes, -1, height * width)
    return pixels.gather(2, flat.expand_as(pixels)).view(x.shape)
