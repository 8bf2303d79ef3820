"""Random resized crops, drawn for many images at once: torchvision's distribution (area 0.08..1, ratio 3/4..4/3)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from infer_fast.recipes import CROP_AREA, CROP_RATIO

ATTEMPTS = 10  # boxes that are tried before the largest allowed one is taken from the middle


def draw_crops(count: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """`count` boxes for images of `size` (H, W): int64 (count, 4), top, left, height and width."""
    return crop_boxes(size, torch.rand(count, ATTEMPTS, 4, generator=generator))


def crop_boxes(size: tuple[int, int], numbers: torch.Tensor) -> torch.Tensor:
    """The boxes (N, 4) in images of `size` that uniform numbers (N, ATTEMPTS, 4) stand for: area, ratio, two places."""
    height, width = size
    share, ratio, down, across = numbers.double().unbind(2)  # (N, ATTEMPTS)
    area = height * width * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * share)
    narrow, wide = (math.log(bound) for bound in CROP_RATIO)
    aspect = (narrow + (wide - narrow) * ratio).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    boxes = torch.stack([(down * (height - h + 1)).floor(), (across * (width - w + 1)).floor(), h, w], dim=2).long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1)  # the first that fits
    chosen = boxes[torch.arange(len(boxes)), first]
    return torch.where(fits.any(dim=1, keepdim=True), chosen, _middle(size))


def resized_crop(images: torch.Tensor, crop: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
    """Each of images (B, 3, H, W) cropped to its box int64 (B, 4), resized back to (H, W), and flipped where flip (B,).

    Bilinear, half-pixel centres, the box's edges repeated: torchvision's resized_crop (a crop is never larger than the
    image here, so there is nothing to anti-alias). Runs on the device alone.
    """
    height, width = images.shape[-2:]
    rows = _places(crop[:, 0], crop[:, 2], None, height)
    columns = _places(crop[:, 1], crop[:, 3], flip, width)
    grid = torch.stack(
        [columns[:, None, :].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)], dim=3
    )  # (B, H, W, 2)
    return F.grid_sample(images, grid.to(images.dtype), "bilinear", "border", align_corners=False)


def in_crop(pixel: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """Where a pixel of a crop resized to `size` lies in the crop of `length`: half-pixel centres, at least 0."""
    return ((pixel + 0.5) * (length / size) - 0.5).clamp(min=0)


def _places(first: torch.Tensor, length: torch.Tensor, flip: torch.Tensor | None, size: int) -> torch.Tensor:
    """Where each of `size` pixels of a line lies in the image, in grid_sample's -1..1: (B, size)."""
    line = torch.arange(size, device=first.device).expand(len(first), -1)
    if flip is not None:
        line = torch.where(flip[:, None], size - 1 - line, line)
    length = length[:, None].float()
    inside = in_crop(line, length, size).minimum(length - 1)
    return (2 * (first[:, None] + inside) + 1) / size - 1


def _middle(size: tuple[int, int]) -> torch.Tensor:
    """The largest box of an allowed ratio in the middle of an image of `size`."""
    height, width = size
    w, h = min(width, round(height * CROP_RATIO[1])), min(height, round(width / CROP_RATIO[0]))
    return torch.tensor([(height - h) // 2, (width - w) // 2, h, w])
