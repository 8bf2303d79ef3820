"""Which encoded images every decoder reads alike: NVIDIA DALI is given those, and the rest as Pillow has decoded them.

Plain is a JPEG of 8 bits, grey or YCbCr, and a PNG of 8 bits, grey or RGB, without transparency. What decoders make of
16 bits, palettes, CMYK, alpha, EXIF data that are damaged or outside of a JPEG, and of what is cut short, differs.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from infer_fast.data.decode import open_rgb, too_large

SIGNATURE = b"\x89PNG\r\n\x1a\n"
ODD_CHUNKS = (b"tRNS", b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"acTL")  # alpha; and where PNG keeps EXIF data
FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive, with Huffman codes
OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
SCAN, END, APP1, APP14 = 0xDA, b"\xff\xd9", 0xE1, 0xEE
EXIF = b"Exif\0\0"
TURNED = {2, 3, 4, 5, 6, 7, 8}  # orientations that are not upright


class Segment(NamedTuple):
    """A part of a JPEG's head: its marker, where it lies in the file, and what it holds."""

    marker: int
    start: int
    end: int
    held: bytes


def for_every_decoder(path: Path) -> np.ndarray:
    """A file's bytes, uint8 (n,), if they are plain, else those of a PPM of the same image.

    A plain JPEG's EXIF data are replaced by its orientation alone, as Pillow reads it: where they are damaged, decoders
    disagree, and DALI's can crash. Raises InferFastError naming a file that can't be decoded.
    """
    data = read_file(path)
    if not is_plain(data):
        image = open_rgb(str(path), data)
        data = b"P6\n%d %d\n255\n" % image.size + image.tobytes()
    elif any(_is_exif(segment) for segment in _head(data)):
        data = _with_orientation_alone(data)
    return np.frombuffer(data, np.uint8)


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises InferFastError, as open_rgb does, where there are none."""
    try:
        return path.read_bytes()
    except OSError:
        open_rgb(str(path), path)  # says why not
        raise


def is_plain(data: bytes) -> bool:
    """Whether every decoder gives the same pixels for these bytes of a file."""
    return _plain_jpeg(data) or _plain_png(data)


def _plain_png(data: bytes) -> bool:
    """Its header is the first chunk: width, height, bits, colour (0 grey, 2 RGB), two methods, interlacing."""
    size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    alike = data[24:25] == b"\x08" and data[25:26] in (b"\0", b"\x02") and data[28:29] == b"\0"
    whole = data.startswith(SIGNATURE) and b"IEND" in data[-64:]
    return alike and whole and not too_large(size) and not any(chunk in data for chunk in ODD_CHUNKS)


def _plain_jpeg(data: bytes) -> bool:
    head = _head(data)
    frames = [segment.held for segment in head if segment.marker in FRAMES]
    if len(frames) != 1 or not _plain_frame(frames[0]):
        return False
    return not any(_is_odd(segment) for segment in head) and data.rfind(END) > head[-1].end


def _head(data: bytes) -> list[Segment]:
    """The segments of a JPEG up to its first scan; none where it has no such head."""
    place = 2
    found: list[Segment] = []
    while data[:2] == b"\xff\xd8" and place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xFF:  # a filling byte
            place += 1
            continue
        if marker == SCAN:
            return found
        found.append(Segment(marker, place, place + 2 + length, data[place + 4 : place + 2 + length]))
        place += 2 + length
    return []


def _plain_frame(held: bytes) -> bool:
    """A frame's header: bits, height, width, components."""
    height, width = int.from_bytes(held[1:3], "big"), int.from_bytes(held[3:5], "big")
    return len(held) > 5 and held[0] == 8 and held[5] in (1, 3) and not too_large((width, height))


def _is_odd(segment: Segment) -> bool:
    """Another kind of frame, Adobe's mark for RGB in place of YCbCr, or an orientation outside of the EXIF data."""
    if segment.marker == APP14:
        return segment.held[:5] == b"Adobe" and segment.held[11:12] == b"\0"
    outside = segment.marker == APP1 and b"tiff:Orientation" in segment.held
    return outside or segment.marker in OTHER_FRAMES


def _is_exif(segment: Segment) -> bool:
    return segment.marker == APP1 and segment.held.startswith(EXIF)


def _with_orientation_alone(data: bytes) -> bytes:
    """A plain JPEG without its EXIF data, but for the orientation."""
    orientation, clean, rest, place = _orientation(data), b"", b"", 2
    if orientation in TURNED:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        held = exif.tobytes()
        clean = bytes((0xFF, APP1)) + (2 + len(held)).to_bytes(2, "big") + held
    for segment in _head(data):
        if _is_exif(segment):
            rest, place = rest + data[place : segment.start], segment.end
    return data[:2] + clean + rest + data[place:]


def _orientation(data: bytes) -> int:
    """A JPEG's orientation as infer_fast.data.decode sees it: 1 where its EXIF data can't be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # every way in which they can be damaged
        return 1
