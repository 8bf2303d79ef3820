"""Images in few bytes: mosaics of many, coded by an image codec of Pillow's, so that its headers are shared.

They are decoded once, on loading; everything after that has pixels and knows of no codec.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, features

from infer_fast.data.images import memory
from infer_fast.errors import InferFastError

MOST_PIXELS = 2**15  # of an image's side: larger ones are no images to train on, and numbers of batches are 16 bits
SIDE = 4096  # pixels of a mosaic's longer side, at most: WebP ends at 16,383, and memory is taken mosaic by mosaic
LOSSLESS = 100  # the quality of WebP that stands for its lossless form
AVIF_SPEED = 6  # of 0 (slow, small) to 10


@dataclass(frozen=True)
class Codec:
    """How images are coded: raw, webp, avif or jpeg, and the codec's quality, 0 to 100 (webp: 100 is lossless)."""

    name: str
    quality: int

    def check(self) -> None:
        """Raises InferFastError for a quality out of range, or a codec that this Pillow does not have."""
        if not 0 <= self.quality <= 100:
            raise InferFastError(f"--quality {self.quality}: a codec's quality is 0 to 100.")
        if self.name in ("webp", "avif") and not features.check(self.name):
            raise InferFastError(
                f"This installation of Pillow has no {self.name.upper()}, which the images are coded in: "
                "pip install --upgrade pillow (11.3 or later)."
            )


@dataclass(frozen=True)
class Coded:
    """Images (*shape, 3, H, W) as they are stored.

    parts: uint8, the mosaics' files, (n,) each; of the codec raw one part, (N, channels, H, W). channels: 1 for grey
    images, else 3. digest: SHA-256 of the decoded pixels.
    """

    codec: Codec
    parts: tuple[torch.Tensor, ...]
    shape: tuple[int, ...]
    size: tuple[int, int]
    channels: int
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def layout(self) -> dict[str, Any]:
        """All but the parts, for a file's header."""
        return {
            "codec": self.codec.name,
            "quality": self.codec.quality,
            "shape": self.shape,
            "size": self.size,
            "channels": self.channels,
            "pixels": self.digest,
        }


def coded_from(layout: dict[str, Any], parts: tuple[torch.Tensor, ...]) -> Coded:
    """What layout() described. Raises KeyError, TypeError or ValueError where a field is missing or no such value."""
    height, width = layout["size"]
    codec = Codec(str(layout["codec"]), int(layout["quality"]))
    shape = tuple(int(n) for n in layout["shape"])
    return Coded(codec, parts, shape, (int(height), int(width)), int(layout["channels"]), str(layout["pixels"]))


def encode(images: torch.Tensor, codec: Codec) -> tuple[Coded, torch.Tensor]:
    """uint8 images (..., 3, H, W) coded, and as they will be decoded, in the same shape.

    Images whose channels are all equal are coded in grey. Raises InferFastError as Codec.check does.
    """
    codec.check()
    *shape, _, height, width = images.shape
    flat = images.reshape(-1, 3, height, width)
    channels = 1 if bool((flat == flat[:, :1]).all()) else 3
    flat = flat[:, :channels]
    mosaics = [] if codec.name == "raw" else flat.split(_per_mosaic(height, width))
    parts = tuple(_file(_mosaic(some), codec) for some in mosaics) or (flat.contiguous(),)
    coded = Coded(codec, parts, tuple(shape), (height, width), channels, "")
    decoded = _decoded(coded)
    return Coded(codec, parts, tuple(shape), (height, width), channels, _digest(decoded)), decoded


def decode(coded: Coded) -> torch.Tensor:
    """The images, uint8 (*shape, 3, H, W).

    Raises InferFastError for parts that don't decode, or that decode to other pixels than they did when they were made.
    """
    coded.codec.check()
    images = _decoded(coded)
    if _digest(images) != coded.digest:
        raise InferFastError(
            f"The {coded.codec.name} images decode to other pixels than those the set was made with: the file is "
            "damaged, or this Pillow decodes them differently."
        )
    return images


def _decoded(coded: Coded) -> torch.Tensor:
    count, (height, width) = _count(coded), coded.size
    if coded.codec.name == "raw":
        flat = coded.parts[0]
    else:
        per_mosaic = _per_mosaic(height, width)
        if -(-count // per_mosaic) != len(coded.parts):
            raise InferFastError(
                f"{count} images take {-(-count // per_mosaic)} mosaics, and there are {len(coded.parts)}."
            )
        counts = [min(per_mosaic, count - first) for first in range(0, count, per_mosaic)]
        mosaics = [
            _images(_pixels(part, position, own, coded), own, coded)
            for position, (part, own) in enumerate(zip(coded.parts, counts, strict=True))
        ]
        flat = torch.cat(mosaics)
    if tuple(flat.shape) != (count, coded.channels, height, width) or flat.dtype != torch.uint8:
        raise InferFastError(f"The images are {tuple(flat.shape)}, not {(count, coded.channels, height, width)}.")
    return flat.expand(-1, 3, -1, -1).reshape(*coded.shape, 3, height, width).contiguous()


def _count(coded: Coded) -> int:
    """How many images there are. Raises InferFastError for sizes that can't be, or that no memory here would hold."""
    count, sizes = math.prod(coded.shape), (*coded.shape, *coded.size)
    if min(sizes) < 1 or max(coded.size) > MOST_PIXELS or coded.channels not in (1, 3) or not coded.parts:
        raise InferFastError(f"Images of {coded.size[1]}x{coded.size[0]} in {coded.shape} rows can't be.")
    weight = 3 * count * coded.size[0] * coded.size[1]
    if weight > memory():
        raise InferFastError(f"Decoded, the images take {weight:,} bytes, and this machine has {memory():,}.")
    return count


def _per_mosaic(height: int, width: int) -> int:
    return max(1, SIDE // height) * max(1, SIDE // width)


def _columns(count: int, height: int, width: int) -> int:
    """Images side by side, so that a mosaic is about square."""
    return min(max(1, SIDE // width), math.ceil(math.sqrt(count * height / width)))


def _mosaic(images: torch.Tensor) -> np.ndarray:
    """Images (N, channels, H, W) as one (rows*H, columns*W, channels), row by row; what is left over is black."""
    count, channels, height, width = images.shape
    columns = _columns(count, height, width)
    rows = -(-count // columns)
    grid = images.new_zeros(rows * columns, channels, height, width)
    grid[:count] = images
    grid = grid.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * height, columns * width, channels).numpy()


def _shape(count: int, coded: Coded) -> tuple[int, int, int]:
    """A mosaic of `count` images: (height, width, channels)."""
    height, width = coded.size
    columns = _columns(count, height, width)
    return -(-count // columns) * height, columns * width, coded.channels


def _images(mosaic: np.ndarray, count: int, coded: Coded) -> torch.Tensor:
    """The first `count` images of a mosaic, uint8 (count, channels, H, W)."""
    height, width = coded.size
    rows, columns = mosaic.shape[0] // height, mosaic.shape[1] // width
    grid = torch.from_numpy(mosaic).view(rows, height, columns, width, coded.channels).permute(0, 2, 4, 1, 3)
    return grid.reshape(rows * columns, coded.channels, height, width)[:count]


def _file(mosaic: np.ndarray, codec: Codec) -> torch.Tensor:
    """The mosaic's file, uint8 (n,)."""
    options: dict[str, Any] = {
        "jpeg": {"quality": codec.quality, "optimize": True},
        "webp": {"quality": codec.quality, "method": 6, "lossless": codec.quality == LOSSLESS},
        "avif": {"quality": codec.quality, "speed": AVIF_SPEED},
    }[codec.name]
    buffer = io.BytesIO()
    Image.fromarray(mosaic[..., 0] if mosaic.shape[-1] == 1 else mosaic).save(buffer, codec.name.upper(), **options)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _pixels(part: torch.Tensor, position: int, count: int, coded: Coded) -> np.ndarray:
    """A mosaic of `count` images, uint8 (height, width, channels): of another size, it is refused and not decoded."""
    expected = _shape(count, coded)
    try:
        with Image.open(io.BytesIO(part.numpy().tobytes()), formats=[coded.codec.name.upper()]) as image:
            found = (image.height, image.width, coded.channels)
            pixels = np.array(image.convert("L" if coded.channels == 1 else "RGB")) if found == expected else None
    except Exception as error:  # Pillow raises whatever its decoders do
        raise InferFastError(f"Mosaic {position} is damaged: it does not decode as {coded.codec.name}.") from error
    if pixels is None:
        raise InferFastError(f"Mosaic {position} is {found}, not {expected}.")
    return pixels.reshape(expected)


def _digest(images: torch.Tensor) -> str:
    return hashlib.sha256(images.numpy().data).hexdigest()
