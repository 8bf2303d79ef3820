"""Batches of image files in plain Python threads: Pillow decodes, crops and resizes (it leaves other threads running).

The reference for DALI's pipeline of the same name in infer_fast.data.dali, and what runs where DALI is not installed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from infer_fast.data.crops import ATTEMPTS, crop_boxes
from infer_fast.data.decode import open_rgb
from infer_fast.data.sets import FileSet, sent

AHEAD = 2  # batches that are being decoded while one is trained on


def file_batches(
    source: FileSet,
    *,
    batch_size: int,
    flip: bool = True,
    generator: torch.Generator,
    workers: int = 4,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch for training: images float32 (B, 3, H, W), normalised, and classes int64 (B,), on the set's device.

    RandomResizedCrop (area 0.08..1) and flip, shuffled: all from `generator`, whatever the number of workers. Raises
    InferFastError naming a file that can't be decoded.
    """
    split = source.split
    order = torch.randperm(len(source), generator=generator)
    numbers = torch.rand(len(source), ATTEMPTS, 4, generator=generator)
    flips = torch.rand(len(source), generator=generator) < (0.5 if flip else 0.0)
    waiting: deque[tuple[torch.Tensor, list[Future]]] = deque()

    def ready() -> tuple[torch.Tensor, torch.Tensor]:
        positions, views = waiting.popleft()
        images = sent(torch.from_numpy(np.stack([view.result() for view in views])), split.device).permute(0, 3, 1, 2)
        return source.pixels.normalise(images), split.labels[sent(positions, split.device)]

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for positions in order.split(batch_size):
            views = [
                pool.submit(_view, split.files[p], numbers[p], bool(flips[p]), split.size) for p in positions.tolist()
            ]
            waiting.append((positions, views))
            if len(waiting) > AHEAD:
                yield ready()
        while waiting:
            yield ready()


def _view(path: Path, numbers: torch.Tensor, flip: bool, size: tuple[int, int]) -> np.ndarray:
    """A random resized crop of one file, uint8 (H, W, 3)."""
    image = open_rgb(str(path), path)
    top, left, height, width = crop_boxes((image.height, image.width), numbers[None])[0].tolist()
    box = (left, top, left + width, top + height)
    view = image.resize(size[::-1], Image.Resampling.BILINEAR, box=box)
    return np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view)
