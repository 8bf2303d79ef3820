"""NVIDIA DALI pipelines: augmentation of a resident set; decoding and augmentation of folders of JPEG and PNG files.

On a GPU the pipelines decode and augment there; the same code runs on the CPU without one. Which images come in which
order is decided here, not in DALI: an epoch is one shuffle, nothing is lost or doubled at its end, and shards share
nothing. DALI draws crops and flips, from a seed of the given generator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from infer_fast.data.augment import Augmentation
from infer_fast.data.pixels import AS_STORED, Pixels
from infer_fast.data.resident import Composer, batches
from infer_fast.data.sets import FileSet, ResidentSet
from infer_fast.errors import InferFastError
from infer_fast.recipes import CROP_AREA, CROP_RATIO


def resident_batches(
    resident: ResidentSet,
    *,
    batch_size: int,
    updates: int,
    augmentation: Augmentation,
    generator: torch.Generator,
    workers: int = 4,
) -> Iterator[tuple]:
    """`updates` batches of a resident set, cropped, flipped and normalised by DALI: what loader.finish takes.

    (images float32 (B, 3, H, W), targets (B, C), weight, partner, box), see Draw. Raises InferFastError without DALI.
    """
    plain = Augmentation(mix=augmentation.mix, mix_alpha=augmentation.mix_alpha)
    clean = Composer(replace(resident, pixels=AS_STORED))  # [0,1] pixels as they are stored
    waiting: deque[tuple] = deque()

    def instances() -> Iterator[torch.Tensor | np.ndarray]:
        for draw in batches(resident, batch_size=batch_size, updates=updates, augmentation=plain, generator=generator):
            pixels, targets = clean(draw.positions)
            waiting.append((targets, draw.weight, draw.partner, draw.box))
            yield pixels if pixels.is_cuda else pixels.numpy()

    seed = int(torch.randint(0, 2**31, (1,), generator=generator))
    size = tuple(resident.base.shape[-2:])

    def augment(fn: ModuleType, types: ModuleType, device: str):
        images = fn.external_source(source=instances(), batch=True, layout="CHW", dtype=types.FLOAT, device=device)
        if augmentation.resized:
            images = fn.random_resized_crop(
                images, size=size, random_area=CROP_AREA, random_aspect_ratio=CROP_RATIO, antialias=False
            )
        elif augmentation.padding:
            shifts = list(range(-augmentation.padding, augmentation.padding + 1))
            start = fn.random.uniform(values=shifts, shape=[2], dtype=types.INT32)
            images = fn.slice(
                images, start=start, shape=size, axis_names="HW", out_of_bounds_policy="pad", fill_values=0
            )
        return _normalised(fn, types, images, resident.pixels, augmentation.flip)

    for (images,) in _run(augment, batch_size, resident.base.device, seed, workers):
        yield images, *waiting.popleft()


def file_batches(
    source: FileSet,
    *,
    batch_size: int,
    training: bool = True,
    flip: bool = True,
    generator: torch.Generator | None = None,
    shard: int = 0,
    shards: int = 1,
    workers: int = 4,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of a shard: images float32 (B, 3, H, W), normalised, and classes int64 (B,), on the set's device.

    training: RandomResizedCrop (area 0.08..1) and flip, shuffled by `generator` (the same on every rank); else the
    shorter side resized to the split's margin times its size, centre crop, in order. Shard s of n takes every n-th
    image from s on. Grey and CMYK files become RGB. Raises InferFastError naming a file that can't be decoded, or
    without DALI.
    """
    split, device = source.split, source.split.device
    size, labels = split.size[0], split.labels.cpu()
    if not 0 <= shard < shards:
        raise InferFastError(f"shard {shard} of {shards}: it must be one of 0..{shards - 1}.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    order = torch.randperm(len(split), generator=generator) if training else torch.arange(len(split))
    seed = int(torch.randint(0, 2**31, (1,), generator=generator))
    own = order[shard::shards]
    waiting: deque[torch.Tensor] = deque()

    def encoded() -> Iterator[list[np.ndarray]]:
        for positions in own.split(batch_size):
            waiting.append(positions)
            yield [np.fromfile(split.files[p], dtype=np.uint8) for p in positions.tolist()]

    def decode(fn: ModuleType, types: ModuleType, where: str):
        files = fn.external_source(source=encoded(), batch=True, dtype=types.UINT8, ndim=1)
        decoder = "mixed" if where == "gpu" else "cpu"
        if training:
            images = fn.decoders.image_random_crop(
                files, device=decoder, output_type=types.RGB, random_area=CROP_AREA, random_aspect_ratio=CROP_RATIO
            )
            images = fn.resize(images, size=[size, size], antialias=True)
        else:
            images = fn.decoders.image(files, device=decoder, output_type=types.RGB)
            images = fn.resize(images, resize_shorter=round(size * split.margin), antialias=True)
            images = fn.crop(images, crop=[size, size])
        levels = Pixels(*(tuple(255 * v for v in values) for values in source.pixels))
        return _normalised(fn, types, images, levels, training and flip)

    try:
        for (images,) in _run(decode, batch_size, device, seed + shard, workers):
            yield images, labels[waiting.popleft()].to(device, non_blocking=True)
    except RuntimeError as error:
        read = [split.files[p] for positions in waiting for p in positions.tolist()]
        broken = next((path for path in read if not _decodes(path)), None)
        if broken is None:
            raise
        raise InferFastError(f"{broken} is no image that can be decoded: remove or replace it.") from error


def _normalised(fn: ModuleType, types: ModuleType, images, pixels: Pixels, flip: bool):
    mirror = fn.random.coin_flip() if flip else 0
    return fn.crop_mirror_normalize(
        images, mirror=mirror, mean=list(pixels.mean), std=list(pixels.std), output_layout="CHW", dtype=types.FLOAT
    )


def _run(
    build: Callable, batch_size: int, device: torch.device, seed: int, workers: int
) -> Iterator[list[torch.Tensor]]:
    """The outputs of a pipeline, batch after batch until its source ends; build(fn, types, "cpu" or "gpu") makes it."""
    fn, types, pipeline = _dali()
    on_gpu = device.type == "cuda"
    running = pipeline(batch_size, workers, (device.index or 0) if on_gpu else None, seed=seed)
    with running:
        running.set_outputs(build(fn, types, "gpu" if on_gpu else "cpu"))
    while True:
        try:
            outputs = running.run()
        except StopIteration:
            return
        yield [_tensor(output, device) for output in outputs]


def _tensor(output, device: torch.device) -> torch.Tensor:
    """A pipeline's output, all samples of one shape, as a torch tensor of its own."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    tensor = torch.empty((len(output), *output.shape()[0]), dtype=torch.float32, device=device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    feed_ndarray(output.as_tensor(), tensor, cuda_stream=stream)
    return tensor


def _decodes(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.convert("RGB")
    except Exception:  # every way in which a file can be broken
        return False
    return True


def _dali() -> tuple[ModuleType, ModuleType, Callable]:
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        raise InferFastError(
            "The loader dali needs NVIDIA DALI, which is not installed here: pip install nvidia-dali-cuda130, "
            "or choose --loader fused."
        ) from error
    return fn, types, Pipeline
