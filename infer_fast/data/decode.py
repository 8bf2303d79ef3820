"""Files and byte strings of images, decoded with Pillow on all cores: one rule for what a pixel is, for every loader.

Images are turned upright as their EXIF data say. Colours are 8-bit RGB: of 16 bits the high byte is taken, in grey
images as in Pillow's own reading of coloured ones; whole numbers of 32 bits are taken as 16-bit levels, and floating
point as 0..1, or refused where they are not within; transparency is dropped, and the colour below it kept. Of an
animation it is the first picture.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from infer_fast.data.folders import files_below
from infer_fast.errors import InferFastError

IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"
}  # fmt: skip


def image_files(folder: Path) -> list[Path]:
    """The image files in `folder` and below, in sorted order (infer_fast.data.folders says which count)."""
    return files_below(folder, IMAGE_SUFFIXES)


def decode_all(
    items: Sequence[tuple[str, Path | bytes]], image_size: int | None = None, margin: float = 1.0
) -> torch.Tensor:
    """Named files or byte strings as one uint8 tensor (N, 3, H, W); image_size and margin: see decode.

    Raises InferFastError naming what does not decode, or has another size than the first.
    """
    with sizes_unannounced():
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
    """One image as uint8 (H, W, 3), of any kind that open_rgb reads.

    image_size: the shorter side is brought to margin times image_size, and image_size squared is cut from the centre.
    """
    rgb = open_rgb(name, source)
    return np.asarray(rgb if image_size is None else _resize_and_crop(name, rgb, image_size, margin))


def open_rgb(name: str, source: Path | bytes) -> Image.Image:
    """One image, upright and in 8-bit RGB, by the rule on top of this file.

    Raises InferFastError naming what does not decode, what has levels out of range, and what would have more pixels
    than Pillow's limit (PIL.Image.MAX_IMAGE_PIXELS), before it is decompressed.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if too_large(image.size):
                raise InferFastError(_too_large_sentence(name, f"{image.width}x{image.height}"))
            image.load()
            _turn(image)
            return _levels(name, image)
    except InferFastError:
        raise
    except Image.DecompressionBombError as error:
        raise InferFastError(_too_large_sentence(name, str(error))) from error
    except Exception as error:  # Pillow's decoders raise many kinds; each means this image can't be read
        why = "of no kind that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise InferFastError(f"{name} does not decode as an image ({why}): repair or remove it.") from error


def too_large(size: tuple[int, int]) -> bool:
    """Whether an image of this width and height has more pixels than Pillow's limit."""
    return Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS


@contextlib.contextmanager
def sizes_unannounced() -> Iterator[None]:
    """Pillow warns of images above its limit before open_rgb refuses them; in here it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _too_large_sentence(name: str, size: str) -> str:
    return (
        f"{name} is larger than an image may be ({size}, where Pillow's limit is {Image.MAX_IMAGE_PIXELS} pixels): "
        "make it smaller, or remove it."
    )


def _turn(image: Image.Image) -> None:
    """Turns a decoded image upright; EXIF data that can't be read say nothing."""
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _levels(name: str, image: Image.Image) -> Image.Image:
    """A decoded image of any mode as 8-bit RGB."""
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values, kind = np.asarray(image), image.mode[0]
    most = 65535 if kind == "I" else 1
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= most):  # a NaN is in no range
        numbers = "whole numbers" if kind == "I" else "floating-point levels"
        raise InferFastError(f"{name} has {numbers} of {low:g} to {high:g}, expected 0 to {most}: save it with 8 bits.")
    bytes_ = values.astype(np.uint16) >> 8 if kind == "I" else np.rint(values * 255)
    return Image.fromarray(bytes_.astype(np.uint8)).convert("RGB")


def _resize_and_crop(name: str, image: Image.Image, size: int, margin: float) -> Image.Image:
    scale = round(size * margin) / min(image.size)
    width, height = (max(size, round(n * scale)) for n in image.size)
    if too_large((width, height)):  # a narrow strip
        raise InferFastError(
            _too_large_sentence(name, f"{width}x{height} once its shorter side is {min(width, height)}")
        )
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _pixels(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
