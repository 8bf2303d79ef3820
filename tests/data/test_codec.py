"""Coded images: what is decoded is what was coded, and what can't be decoded says so."""

from dataclasses import replace

import pytest
import torch

from infer_fast.data import codec
from infer_fast.data.codec import Codec, coded_from, decode, encode
from infer_fast.errors import InferFastError

CODECS = [Codec("raw", 0), Codec("webp", 50), Codec("webp", 100), Codec("avif", 60), Codec("jpeg", 80)]


def smooth(generator, *shape, grey=False):
    """Images (*shape, 3, H, W) that codecs were made for: waves of a few colours."""
    *counts, height, width = shape
    channels = 1 if grey else 3
    phase = torch.rand(*counts, channels, 1, 1, generator=generator)
    lines = torch.linspace(0, 1, height).view(-1, 1) + torch.linspace(0, 1, width)
    waves = (128 + 60 * torch.sin(1.5 * (phase + lines))).round().to(torch.uint8)
    return waves.expand(*counts, 3, height, width).contiguous()


@pytest.mark.parametrize("own", CODECS, ids=lambda c: f"{c.name}{c.quality}")
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 32, 32), (2, 3, 8, 12), (1, 1, 7, 5)])
def test_decoding_gives_what_encoding_said(generator, own, grey, shape):
    images = smooth(generator, *shape, grey=grey)
    coded, decoded = encode(images, own)
    assert decoded.shape == images.shape and decoded.dtype == torch.uint8
    assert coded.channels == (1 if grey else 3)
    assert torch.equal(decode(coded), decoded)
    assert torch.equal(decode(coded_from(coded.layout(), coded.parts)), decoded)
    error = (decoded.float() - images.float()).abs().mean()
    assert error == 0 if own.name == "raw" or own.quality == 100 else error < 16
    if grey:
        assert torch.equal(decoded[..., 0, :, :], decoded[..., 2, :, :])


@pytest.mark.parametrize("own", CODECS[1:], ids=lambda c: f"{c.name}{c.quality}")
def test_many_images_take_several_mosaics(generator, own, monkeypatch):
    monkeypatch.setattr(codec, "SIDE", 40)
    images = smooth(generator, 3, 4, 16, 16)
    coded, decoded = encode(images, own)
    assert len(coded.parts) == 3  # 2x2 images each
    assert torch.equal(decode(coded), decoded)
    assert (decoded.float() - images.float()).abs().mean() < 16


def test_coded_images_are_smaller_than_raw_ones(generator):
    images = smooth(generator, 10, 10, 32, 32)
    for own in CODECS[1:]:
        assert 10 * encode(images, own)[0].nbytes < images.nbytes


def test_damage_and_other_decoders_are_named(generator, monkeypatch):
    coded, _ = encode(smooth(generator, 4, 8, 8), Codec("webp", 50))
    (part,) = coded.parts
    with pytest.raises(InferFastError, match="Mosaic 0 is damaged"):
        decode(replace(coded, parts=(part[: len(part) // 2],)))
    with pytest.raises(InferFastError, match="Mosaic 0 is damaged: it does not decode as avif"):
        decode(replace(coded, codec=Codec("avif", 50)))
    with pytest.raises(InferFastError, match="other pixels"):
        decode(replace(coded, digest="0" * 64))
    with pytest.raises(InferFastError, match=r"Mosaic 0 is \(16, 16, 3\), not \(24, 24, 3\)"):
        decode(replace(coded, shape=(9,)))
    with pytest.raises(InferFastError, match="1 mosaics, and there are 2"):
        decode(replace(coded, parts=(part, part)))
    monkeypatch.setattr(codec.features, "check", lambda name: False)
    with pytest.raises(InferFastError, match="has no WEBP"):
        decode(coded)


def test_a_damaged_part_never_gives_other_images(generator):
    coded, decoded = encode(smooth(generator, 4, 16, 16), Codec("jpeg", 80))
    (part,) = coded.parts
    for position in torch.randperm(len(part), generator=generator)[:20].tolist():
        changed = part.clone()
        changed[position] ^= 1 + int(torch.randint(0, 255, (1,), generator=generator))
        try:
            found = decode(replace(coded, parts=(changed,)))
        except InferFastError:
            continue
        assert torch.equal(found, decoded)  # a byte that no pixel depends on


@pytest.mark.parametrize("quality", [-1, 101])
def test_a_quality_out_of_range_is_an_error(generator, quality):
    with pytest.raises(InferFastError, match="quality is 0 to 100"):
        encode(smooth(generator, 1, 8, 8), Codec("webp", quality))
