"""The same random picture as a file of every kind that people have, for the tests of what decodes it."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

TURNS = range(1, 9)  # EXIF's orientations


def write_kinds(folder: Path, rng: np.random.Generator, size: int = 24) -> list[Path]:
    """A file of each kind that is decoded, `size` pixels squared."""
    pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    image, deep = Image.fromarray(pixels), rng.integers(0, 65536, (size, size), dtype=np.uint16)
    shown = {
        "rgb.png": image,
        "grey.png": image.convert("L"),
        "bits.png": image.convert("1"),
        "palette.png": image.convert("P"),
        "alpha.png": _with_alpha(image, rng),
        "grey_alpha.png": _with_alpha(image, rng).convert("LA"),
        "deep.png": Image.fromarray(deep),
        "deep.tif": Image.fromarray(deep),
        "whole.tif": Image.fromarray(deep.astype(np.int32)),
        "float.tiff": Image.fromarray(rng.random((size, size), dtype=np.float32)),
        "rgb.jpg": image,
        "rgb.jfif": image,
        "grey.jpeg": image.convert("L"),
        "cmyk.jpg": image.convert("CMYK"),
        "rgb.webp": image,
        "rgb.bmp": image,
        "rgb.ppm": image,
        "rgb.gif": image,
    }
    for name, made in shown.items():
        made.save(folder / name, "JPEG" if name.endswith("jfif") else None)
    transparent = image.convert("P")
    transparent.save(folder / "palette_alpha.png", transparency=3)
    (folder / "deep_rgb.png").write_bytes(deep_png(rng.integers(0, 65536, (size, size, 3), dtype=np.uint16)))
    for turn in TURNS:
        exif = Image.Exif()
        exif[0x112] = turn
        for ending in ("jpg", "png", "tif"):
            image.save(folder / f"turned_{turn}.{ending}", exif=exif)
    image.save(folder / "xmp.jpg", xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    return sorted(folder.iterdir())


def deep_png(levels: np.ndarray) -> bytes:
    """A PNG of 16 bits, RGB, from uint16 (H, W, 3): Pillow writes none."""

    def chunk(kind: bytes, held: bytes) -> bytes:
        return struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held))

    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _with_alpha(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    alpha = rng.integers(0, 256, image.size[::-1], dtype=np.uint8)
    return Image.merge("RGBA", (*image.split(), Image.fromarray(alpha)))
