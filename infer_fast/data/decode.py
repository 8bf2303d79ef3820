"""Files and byte strings of images, decoded with Pillow on all cores."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from infer_fast.errors import InferFastError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def image_files(folder: Path) -> list[Path]:
    """The image files in `folder` and below, in sorted order."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def decode_all(
    items: Sequence[tuple[str, Path | bytes]], image_size: int | None = None, margin: float = 1.0
) -> torch.Tensor:
    """Named files or byte strings as one uint8 tensor (N, 3, H, W); image_size and margin: see decode.

    Raises InferFastError naming what does not decode, or has another size than the first.
    """
    first = decode(*items[0], image_size, margin)
    images = np.empty((len(items), *first.shape), np.uint8)

    def place(position: int) -> None:
        name, source = items[position]
        pixels = decode(name, source, image_size, margin)
        if pixels.shape != first.shape:
            raise InferFastError(
                f"{name} is {_pixels(pixels)} where {items[0][0]} is {_pixels(first)}: "
                "all images must have one size (--image-size N brings them to NxN)."
            )
        images[position] = pixels

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(place, range(len(items)), chunksize=256):
            pass
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def decode(name: str, source: Path | bytes, image_size: int | None = None, margin: float = 1.0) -> np.ndarray:
    """One image as uint8 (H, W, 3), grey, CMYK and transparent ones too.

    image_size: the shorter side is brought to margin times image_size, and image_size squared is cut from the centre.
    """
    rgb = open_rgb(name, source)
    return np.asarray(rgb if image_size is None else _resize_and_crop(rgb, image_size, margin))


def open_rgb(name: str, source: Path | bytes) -> Image.Image:
    """One image, decoded. Raises InferFastError naming what does not decode."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds; each means this image can't be read
        raise InferFastError(f"{name} does not decode as an image ({error}): repair or remove it.") from error


def _resize_and_crop(image: Image.Image, size: int, margin: float) -> Image.Image:
    scale = round(size * margin) / min(image.size)
    width, height = (max(size, round(n * scale)) for n in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _pixels(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
