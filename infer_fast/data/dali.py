"""NVIDIA DALI pipelines: augmentation of a resident set; decoding and augmentation of folders of JPEG and PNG files.

On a GPU the pipelines decode and augment there; the same code runs on the CPU without one. Which images come in which
order is decided here, not in DALI: an epoch is one shuffle, nothing is lost or doubled at its end, and shards share
nothing. DALI draws crops and flips, from a seed of the given generator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import ModuleType

import numpy as np
import torch

from infer_fast.data.augment import Augmentation, Sampling
from infer_fast.data.decode import open_rgb
from infer_fast.data.pixels import AS_STORED
from infer_fast.data.plain import for_every_decoder
from infer_fast.data.resident import Composer, batches
from infer_fast.data.sets import FileSet, ResidentSet, sent
from infer_fast.errors import InferFastError, first_line
from infer_fast.extras import require
from infer_fast.recipes import CROP_AREA, CROP_RATIO


def resident_batches(resident: ResidentSet, sampling: Sampling, *, workers: int = 4) -> Iterator[tuple]:
    """The batches of a resident set, cropped, flipped and normalised by DALI: what loader.finish takes.

    (images float32 (B, 3, H, W), targets (B, C), weight, partner, box), see Draw. Raises InferFastError without DALI.
    """
    augmentation, generator = sampling.augmentation, sampling.generator
    plain = Augmentation(mix=augmentation.mix, mix_alpha=augmentation.mix_alpha)
    clean = Composer(replace(resident, pixels=AS_STORED))  # [0,1] pixels as they are stored
    waiting: deque[tuple] = deque()

    def instances() -> Iterator[torch.Tensor | np.ndarray]:
        for draw in batches(resident, replace(sampling, augmentation=plain)):
            pixels, targets = clean(draw.positions)
            waiting.append((targets, draw.weight, draw.partner, draw.box))
            yield pixels if pixels.is_cuda else pixels.numpy()

    seed = int(torch.randint(0, 2**31, (1,), generator=generator))

    def augment(fn: ModuleType, types: ModuleType, device: str):
        images = fn.external_source(source=instances(), batch=True, layout="CHW", dtype=types.FLOAT, device=device)
        if augmentation.resized:
            images = fn.random_resized_crop(
                images, size=resident.size, random_area=CROP_AREA, random_aspect_ratio=CROP_RATIO, antialias=False
            )
        elif augmentation.padding:
            shifts = list(range(-augmentation.padding, augmentation.padding + 1))
            start = fn.random.uniform(values=shifts, shape=[2], dtype=types.INT32)
            images = fn.slice(
                images, start=start, shape=resident.size, axis_names="HW", out_of_bounds_policy="pad", fill_values=0
            )
        return _normalised(fn, types, images, *resident.pixels, augmentation.flip)

    for (images,) in _run(augment, sampling.batch_size, resident.base.device, seed, workers):
        yield images, *waiting.popleft()


def file_batches(
    source: FileSet,
    *,
    batch_size: int,
    flip: bool = True,
    generator: torch.Generator,
    shard: tuple[int, int] = (0, 1),
    workers: int = 4,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch for training of a shard: images float32 (B, 3, H, W), normalised, and classes int64 (B,), on the set's
    device.

    RandomResizedCrop (area 0.08..1) and flip, shuffled by `generator` (the same on every rank). Shard (s, n) takes
    every n-th image from s on. Files of every kind are decoded as infer_fast.data.decode says: DALI decodes the plain
    ones, and turns them upright too; Pillow the rest. Raises InferFastError naming a file that can't be decoded, or
    without DALI.
    """
    size = source.split.size[0]
    order = torch.randperm(len(source), generator=generator)
    seed = int(torch.randint(0, 2**31, (1,), generator=generator)) + shard[0]

    def view(fn: ModuleType, types: ModuleType, files, decoder: str):
        images = fn.decoders.image_random_crop(
            files, device=decoder, output_type=types.RGB, random_area=CROP_AREA, random_aspect_ratio=CROP_RATIO
        )
        return fn.resize(images, size=[size, size], antialias=True)

    return _decoded(source, _share(order, shard).split(batch_size), view, seed, flip=flip, workers=workers)


def centred_batches(
    source: FileSet, *, batch_size: int, shard: tuple[int, int] = (0, 1), workers: int = 4
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A shard's images in order, as file_batches gives them, but each the square in the centre of its file.

    The shorter side is resized to the split's margin times its size first.
    """
    size, margin = source.split.size[0], source.split.margin

    def view(fn: ModuleType, types: ModuleType, files, decoder: str):
        images = fn.decoders.image(files, device=decoder, output_type=types.RGB)
        return fn.crop(fn.resize(images, resize_shorter=round(size * margin), antialias=True), crop=[size, size])

    return _decoded(source, _share(torch.arange(len(source)), shard).split(batch_size), view, 0, workers=workers)


def _share(order: torch.Tensor, shard: tuple[int, int]) -> torch.Tensor:
    own, count = shard
    if not 0 <= own < count:
        raise InferFastError(f"shard {own} of {count}: it must be one of 0..{count - 1}.")
    return order[own::count]


def _decoded(
    source: FileSet, spans: Sequence[torch.Tensor], view: Callable, seed: int, *, flip: bool = False, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the files at the positions of each span; view(fn, types, encoded, decoder) decodes and resizes."""
    split, device, labels = source.split, source.split.device, source.split.labels.cpu()
    waiting: deque[torch.Tensor] = deque()

    def encoded() -> Iterator[list[np.ndarray]]:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for positions in spans:
                waiting.append(positions)
                yield list(pool.map(for_every_decoder, [split.files[p] for p in positions.tolist()]))

    def decode(fn: ModuleType, types: ModuleType, where: str):
        files = fn.external_source(source=encoded(), batch=True, dtype=types.UINT8, ndim=1)
        images = view(fn, types, files, "mixed" if where == "gpu" else "cpu")
        mean, std = ([255 * v for v in values] for values in source.pixels)
        return _normalised(fn, types, images, mean, std, flip)

    try:
        for (images,) in _run(decode, len(spans[0]), device, seed, workers):
            yield images, sent(labels[waiting.popleft()], device)
    except RuntimeError as error:
        for position in torch.cat(list(waiting)).tolist():
            open_rgb(str(split.files[position]), split.files[position])  # says which, and why
        raise InferFastError(
            f"DALI can't decode a file that Pillow can ({first_line(error)}): choose the loader torch."
        ) from error


def _normalised(fn: ModuleType, types: ModuleType, images, mean: Sequence[float], std: Sequence[float], flip: bool):
    mirror = fn.random.coin_flip() if flip else 0
    return fn.crop_mirror_normalize(
        images, mirror=mirror, mean=list(mean), std=list(std), output_layout="CHW", dtype=types.FLOAT
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


def _dali() -> tuple[ModuleType, ModuleType, Callable]:
    require("nvidia.dali", "The loader dali")
    from nvidia.dali import Pipeline, fn, types

    return fn, types, Pipeline
