"""What a pixel is: every kind of image file, upright and in 8 bits, or refused in a sentence that names it."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infer_fast.data.decode import decode, decode_all, image_files
from infer_fast.data.plain import for_every_decoder, is_plain
from infer_fast.errors import InferFastError

from .kinds import TURNS, deep_png, write_kinds

LYING = {  # how a picture lies in its file that each orientation turns upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture
def rng(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(0, 2**31, (1,), generator=generator)))


def stored(array, kind="TIFF"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_keep_their_high_byte(kind):
    ramp = decode("x", stored(np.arange(65536, dtype=np.uint16).reshape(256, 256), kind))
    assert len(np.unique(ramp)) == 256 and ramp.mean() == 127.5
    assert np.array_equal(ramp[..., 0], np.arange(65536).reshape(256, 256) >> 8)


def test_colours_of_16_bits_are_those_of_grey(rng):
    levels = rng.integers(0, 65536, (5, 7, 1), dtype=np.uint16).repeat(3, axis=2)
    assert np.array_equal(decode("x", deep_png(levels)), decode("x", stored(levels[..., 0], "PNG")))


def test_big_endian_and_portable_grey_maps_of_16_bits_are_read_alike(rng):
    levels = rng.integers(0, 65536, (5, 7), dtype=np.uint16)
    portable = b"P5 7 5 65535\n" + levels.astype(">u2").tobytes()
    assert np.array_equal(decode("x", portable)[..., 1], levels >> 8)
    assert np.array_equal(decode("x", stored(levels.astype(">u2")))[..., 2], levels >> 8)


def test_whole_numbers_of_32_bits_are_levels_of_16_or_refused(rng):
    levels = rng.integers(0, 65536, (6, 6)).astype(np.int32)
    assert np.array_equal(decode("x", stored(levels))[..., 0], levels >> 8)
    for wrong in (-1, 65536):
        levels[2, 3] = wrong
        with pytest.raises(InferFastError, match=r"odd.tif has whole numbers of .* expected 0 to 65535"):
            decode("odd.tif", stored(levels))


def test_floating_point_is_0_to_1_or_refused(rng):
    levels = rng.random((6, 6), dtype=np.float32)
    levels[0, :2] = 0, 1
    assert np.array_equal(decode("x", stored(levels))[..., 0], np.rint(levels * 255))
    for wrong in (-0.01, 1.01, 200, np.nan, np.inf):
        levels[2, 3] = wrong
        with pytest.raises(InferFastError, match=r"odd.tif has floating-point levels of .* expected 0 to 1"):
            decode("odd.tif", stored(levels))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_orientation_is_turned_upright(rng, kind):
    upright = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    for turn in TURNS:
        exif = Image.Exif()
        exif[0x112] = turn
        lying = Image.fromarray(upright)
        if turn > 1:
            lying = lying.transpose(LYING[turn])
        buffer = io.BytesIO()
        lying.save(buffer, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        assert np.array_equal(decode("x", buffer.getvalue()), upright), turn


def test_exif_data_that_cannot_be_read_turn_nothing(rng):
    picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    plain, broken = io.BytesIO(), io.BytesIO()
    picture.save(plain, "JPEG")
    picture.save(broken, "JPEG", exif=b"Exif\0\0no such thing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(decode("x", broken.getvalue()), decode("x", plain.getvalue()))


def test_images_above_pillows_limit_are_refused_before_they_are_decompressed(monkeypatch, rng):
    data = stored(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8), "PNG")
    for limit in (399, 150):  # Pillow warns of the first, and raises for the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decompressed"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(InferFastError, match=rf"bomb.png is larger than an image may be .*{limit} pixels"):
                decode_all([("bomb.png", data)])
        assert not is_plain(data)
    monkeypatch.undo()
    assert is_plain(data)


def test_a_strip_is_refused_that_would_be_larger_once_it_is_resized():
    strip = stored(np.zeros((2, 60_000, 3), np.uint8), "PNG")
    assert decode("x", strip).shape == (2, 60_000, 3) and decode("x", strip, 32).shape == (32, 32, 3)
    with pytest.raises(InferFastError, match=r"strip.png is larger .*\(7680000x256 once its shorter side is 256"):
        decode("strip.png", strip, 224, 256 / 224)


def test_plain_files_go_as_they_are_and_others_with_the_same_pixels(rng, tmp_path):
    plain = set()
    for path in write_kinds(tmp_path, rng):
        data = for_every_decoder(path).tobytes()
        assert np.array_equal(decode("x", data), decode("x", path)), path
        plain |= {path.name} if data == path.read_bytes() else set()
    assert plain == {"rgb.png", "grey.png", "rgb.jpg", "rgb.jfif", "grey.jpeg", "rgb.ppm"}


def test_what_is_cut_short_is_not_plain(rng, tmp_path):
    for path in write_kinds(tmp_path, rng):
        data = path.read_bytes()
        if is_plain(data):
            assert not any(is_plain(data[:length]) for length in range(0, len(data) - 12, 7)), path


def test_a_file_that_is_no_image_is_named_without_an_address(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for read in (lambda: decode("a.png", b"no picture"), lambda: for_every_decoder(Path(tmp_path / "a.png"))):
        with pytest.raises(InferFastError, match=r"a.png does not decode as an image \(of no kind that Pillow knows\)"):
            read()
    with pytest.raises(InferFastError, match="gone.png does not decode"):
        for_every_decoder(tmp_path / "gone.png")


def test_image_files_are_all_kinds_that_are_read(rng, tmp_path):
    written = write_kinds(tmp_path, rng)
    assert image_files(tmp_path) == written
