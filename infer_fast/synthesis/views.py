"""The random views of a task: drawn up front from the task's own generator, applied on the device.

A view is the same for the whole batch of a lane: for images of 64x64 and larger a random resized crop and a flip, then,
for all, one circular shift by (a, b) pixels, each uniform in 0..jitter inclusive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from infer_fast.data.crops import draw_crops, in_crop
from infer_fast.ops.view import serves
from infer_fast.ops.view import view as one_launch

CROPPED_FROM = 64  # pixels of the shorter side


@dataclass(frozen=True)
class Views:
    """The draws of L lanes over T iterations.

    shift: int64 (T, L, 2), rows and columns; for large images also crop: int64 (T, L, 4), top, left, height and width,
    and flip: bool (T, L).
    """

    shift: torch.Tensor
    crop: torch.Tensor | None = None
    flip: torch.Tensor | None = None

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Views:
        """function of every draw that there is."""
        crop, flip = (None if t is None else function(t) for t in (self.crop, self.flip))
        return Views(function(self.shift), crop, flip)

    def to(self, device: torch.device) -> Views:
        return self.each(lambda t: t.to(device))

    def lane(self, index: int) -> Views:
        """The draws of one lane, as Views of one lane."""
        return self.lanes(range(index, index + 1))

    def lanes(self, which: range) -> Views:
        """The draws of some lanes."""
        return self.each(lambda t: t[:, which.start : which.stop])

    def at(self, counter: torch.Tensor) -> View:
        """Iteration `counter`'s view; counter int64 (1,) on the device, and nothing is read back."""
        return View(self, counter)


@dataclass(frozen=True)
class View:
    """One iteration's draws of L lanes: row `counter`, int64 (1,), of all. They are read where they are needed.

    shift: int64 (L, 2); crop: int64 (L, 4) and flip: bool (L,), or None.
    """

    views: Views
    counter: torch.Tensor

    @cached_property
    def shift(self) -> torch.Tensor:
        return self._own(self.views.shift)

    @cached_property
    def crop(self) -> torch.Tensor | None:
        return None if self.views.crop is None else self._own(self.views.crop)

    @cached_property
    def flip(self) -> torch.Tensor | None:
        return None if self.views.flip is None else self._own(self.views.flip)

    def _own(self, draws: torch.Tensor) -> torch.Tensor:
        return draws.index_select(0, self.counter)[0]


def task_generator(seed: int, teacher: int, index: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on these four values alone, whatever ran before or beside it."""
    digest = hashlib.sha256(f"{seed}/{teacher}/{index}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw_views(
    seed: int, teacher: int, indices: list[int], *, iterations: int, jitter: int, size: tuple[int, int] | None = None
) -> Views:
    """The views of tasks (teacher, index) for index in `indices`, one lane each.

    size: of the images; with 64x64 and larger, crops and flips are drawn too (torchvision's RandomResizedCrop
    distribution: area 0.08..1, aspect ratio 3/4..4/3).
    """
    lanes = [
        torch.randint(0, jitter + 1, (iterations, 2), generator=task_generator(seed, teacher, index, "views"))
        for index in indices
    ]
    shift = torch.stack(lanes, dim=1)  # (T, L, 2)
    if size is None or min(size) < CROPPED_FROM:
        return Views(shift)
    crops, flips = [], []
    for index in indices:
        generator = task_generator(seed, teacher, index, "crops")
        crops.append(draw_crops(iterations, size, generator))
        flips.append(torch.rand(iterations, generator=generator) < 0.5)
    return Views(shift, torch.stack(crops, dim=1), torch.stack(flips, dim=1))


def seen(
    base: torch.Tensor,
    added: torch.Tensor | None,
    view: View,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> torch.Tensor:
    """The view of base (L, C, 3, H, W), and of `added` (L, 1, 3, H, W) with it, in one kernel where there is one.

    Differentiable in `added`, and without it in base. Only that kernel gives another dtype than base has.
    """
    draws = view.views
    if serves(base, added, draws.crop, backend):
        images = one_launch(base, added, draws.shift, draws.crop, draws.flip, view.counter, dtype=dtype)
        return images.unflatten(0, base.shape[:2])
    return apply_view(base, view) if added is None else view_of_sum(base, added, view)


def apply_view(x: torch.Tensor, view: View) -> torch.Tensor:
    """Lane l of x (L, ..., H, W) cropped and resized back, flipped and shifted as view says; differentiable.

    Crop, bilinear resize, flip and shift of one direction are together one linear map of rows (and one of columns):
    x is multiplied from both sides, (H, H) @ x @ (W, W), and so is its gradient.
    """
    maps = _maps(view, x)
    return circular_shift(x, view.shift) if maps is None else _mapped(x, *maps)


def view_of_sum(base: torch.Tensor, added: torch.Tensor, view: View) -> torch.Tensor:
    """apply_view(base + added, view): base (L, C, ..., H, W), added (L, 1, ..., H, W), differentiable in added alone.

    A view is linear, so the gradient is summed over the images first, and goes back through the view of one.
    """
    return _ViewOfSum.apply(base, added, view)


class _ViewOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base: torch.Tensor, added: torch.Tensor, view: View) -> torch.Tensor:
        x = base + added
        maps = _maps(view, x)
        ctx.mapped = maps is not None
        ctx.save_for_backward(*((view.shift,) if maps is None else maps))
        return _roll(x, view.shift) if maps is None else _mapped(x, *maps)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        one = grad.sum(dim=1, keepdim=True)
        if not ctx.mapped:
            return None, _roll(one, -ctx.saved_tensors[0]), None
        rows, columns = ctx.saved_tensors
        return None, _mapped(one, rows.transpose(-1, -2), columns.transpose(-1, -2)), None


def _maps(view: View, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What lines of x are multiplied with, (L, H, H) and (L, W, W); None for a view that only shifts."""
    if view.crop is None or view.flip is None:
        return None
    height, width = x.shape[-2:]
    rows = _resampling(view.crop[:, 0], view.crop[:, 2], view.shift[:, 0], torch.zeros_like(view.flip), height, x.dtype)
    columns = _resampling(view.crop[:, 1], view.crop[:, 3], view.shift[:, 1], view.flip, width, x.dtype)
    return rows, columns


def _mapped(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    pixels = x.reshape(len(x), -1, *x.shape[-2:])
    with torch.autocast(x.device.type, enabled=False):
        return (rows[:, None] @ pixels @ columns[:, None].transpose(-1, -2)).view(x.shape)


def _resampling(
    first: torch.Tensor, length: torch.Tensor, shift: torch.Tensor, flip: torch.Tensor, size: int, dtype: torch.dtype
) -> torch.Tensor:
    """The matrices (L, size, size) that take a line of pixels to its view; all arguments (L,).

    Pixel o of the view is pixel p = o - shift (mod size) of the resized crop, size-1-p if flipped, which lies at
    (p + 1/2) * length / size - 1/2 in the crop: bilinear, half-pixel centres, edges repeated (as torch's interpolate).
    """
    line = torch.arange(size, device=first.device)
    place = (line - shift[:, None]) % size  # (L, size)
    place = torch.where(flip[:, None], size - 1 - place, place)
    length = length[:, None].to(dtype)
    exact = in_crop(place, length, size).to(dtype)
    low = exact.floor()
    high = torch.minimum(low + 1, length - 1)
    weight = (exact - low)[..., None]
    at_low, at_high = ((first[:, None] + side.long())[..., None] == line for side in (low, high))  # (L, size, size)
    return at_low * (1 - weight) + at_high * weight


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
