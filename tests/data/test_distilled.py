"""The distilled set: quantisation, instances, disk and back."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import infer_fast
from infer_fast.data.codec import Codec, encode
from infer_fast.data.distilled import COMPENSATORS, DistilledSet, quantise
from infer_fast.data.label_store import LabelStore
from infer_fast.data.pixels import Pixels
from infer_fast.errors import InferFastError
from infer_fast.files import read_tensors, write_json, write_tensors
from infer_fast.ops import Quantised

from .test_card import card_of

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PIXELS = Pixels(MEAN, STD)


def make(generator, c=3, k=2, m=4, size=5, images=False):
    base = torch.randint(0, 256, (c, k, 3, size, size), generator=generator, dtype=torch.uint8)
    compensators = None if images else quantise(torch.randn(m, k, 3, size, size, generator=generator), STD)
    logits = torch.randn(c, k, 1 if images else m + 1, c, generator=generator).half()
    classes = tuple(f"class {i}" for i in range(c))
    return DistilledSet(base, compensators, logits, PIXELS, classes, card_of(classes, PIXELS))


def write(distilled, folder):
    distilled.save(folder)
    distilled.card.write(folder)


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_quantisation_is_within_half_a_step(generator, strength):
    dense = strength * torch.randn(2, 3, 3, 6, 6, generator=generator)
    values, scale, offset = quantise(dense, STD)
    assert values.dtype == torch.uint8 and scale.dtype == offset.dtype == torch.float16
    pixels = (dense * torch.tensor(STD).view(3, 1, 1)).clamp(-1, 1)
    restored = values.float() * scale.float()[..., None, None] + offset.float()[..., None, None]
    rounding = 2**-11 * pixels.abs().amax((3, 4), keepdim=True)  # float16's, of the offset
    assert ((restored - pixels).abs() <= 0.5 * scale.float()[..., None, None] + rounding).all()


def test_a_constant_compensator_is_exact_enough():
    values, scale, offset = quantise(torch.zeros(1, 1, 3, 4, 4), STD)
    assert (values.float() * scale.float()[..., None, None] + offset.float()[..., None, None]).abs().max() < 1e-6


@pytest.mark.parametrize("images", [False, True])
def test_instances_are_base_plus_compensator_clamped(generator, images):
    distilled = make(generator, images=images)
    assert len(distilled) == (3 * 2 * 5 if not images else 3 * 2)
    position = 0
    for c in range(3):
        for j in range(2):
            for v in range(distilled.views_per_base):
                instance, logits, label = distilled[position]
                pixels = distilled.base[c, j].float() / 255
                if v > 0:
                    values, scale, offset = (t[v - 1, j].float() for t in distilled.compensators)
                    pixels = (pixels + values * scale[:, None, None] + offset[:, None, None]).clamp(0, 1)
                expected = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
                torch.testing.assert_close(instance, expected, atol=1e-5, rtol=1e-5)
                assert torch.equal(logits, distilled.logits[c, j, v].float()) and label == c
                assert distilled.labels()[position] == c
                position += 1


@pytest.mark.parametrize("images", [False, True])
def test_disk_and_back(generator, tmp_path, images):
    distilled = make(generator, images=images)
    write(distilled, tmp_path)
    again = infer_fast.load(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(distilled._parts()[0].values(), again._parts()[0].values(), strict=True)
    )
    assert again.classes == distilled.classes and again.pixels == PIXELS
    batch = next(iter(DataLoader(again, batch_size=4)))
    assert batch[0].shape == (4, 3, 5, 5) and batch[0].dtype == torch.float32 and batch[1].shape == (4, 3)
    torch.testing.assert_close(again[0][0], PIXELS.normalise(distilled.base[0, 0]), atol=1e-5, rtol=1e-5)


def test_bytes_are_those_of_the_tensors(generator):
    distilled = make(generator)
    assert distilled.image_bytes == (3 * 2 + 4 * 2) * 3 * 25 + 4 * 2 * 12
    assert distilled.label_bytes == 3 * 2 * 5 * 3 * 2


def test_positions_outside_are_index_errors(generator):
    distilled = make(generator)
    torch.testing.assert_close(distilled[-1][0], distilled[len(distilled) - 1][0])
    with pytest.raises(IndexError):
        distilled[len(distilled)]


def test_missing_damaged_and_mismatched_sets_are_errors(generator, tmp_path):
    with pytest.raises(InferFastError, match="holds no distilled set"):
        infer_fast.load(tmp_path)
    distilled = make(generator)
    write(distilled, tmp_path)
    path = tmp_path / "distilled.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(InferFastError, match="is damaged"):
        infer_fast.load(path)
    path.write_bytes(whole)
    card_of(("one",)).write(tmp_path)
    with pytest.raises(InferFastError, match="names 1 classes"):
        infer_fast.load(tmp_path)
    write_json(tmp_path / "card.json", {})
    with pytest.raises(InferFastError, match="card.json: recipe_name is missing"):
        infer_fast.load(tmp_path)


@pytest.mark.parametrize("own", [Codec("raw", 0), Codec("webp", 60), Codec("jpeg", 90)], ids=lambda c: c.name)
@pytest.mark.parametrize("labels", [LabelStore(), LabelStore("uint8"), LabelStore("top", 1, 4.0)], ids=lambda s: s.how)
def test_coded_sets_go_to_the_disk_and_back(generator, tmp_path, own, labels):
    plain = make(generator, size=8)
    coded, base = encode(plain.base, own)
    card = replace(plain.card, pixels=coded.digest)
    distilled = replace(
        plain, base=base, coded=coded, label_store=labels, logits=labels.rounded(plain.logits), card=card
    )
    write(distilled, tmp_path)
    assert distilled.file_bytes == (tmp_path / "distilled.safetensors").stat().st_size
    assert distilled.image_bytes + distilled.label_bytes < distilled.file_bytes
    again = infer_fast.load(tmp_path)
    assert torch.equal(again.base, base) and torch.equal(again.logits, distilled.logits)
    assert all(torch.equal(a, b) for a, b in zip(again.compensators, plain.compensators, strict=True))
    assert again.label_store == labels and again.coded.codec == own
    before = (tmp_path / "distilled.safetensors").read_bytes()
    again.save(tmp_path)
    assert (tmp_path / "distilled.safetensors").read_bytes() == before
    plain.card.write(tmp_path)
    with pytest.raises(InferFastError, match="the card is that of other base images"):
        infer_fast.load(tmp_path)


def test_smaller_compensators_are_enlarged_on_loading(generator, tmp_path):
    plain = make(generator, size=8)
    small = quantise(torch.randn(4, 2, 3, 3, 3, generator=generator), STD)
    distilled = replace(plain, stored_compensators=small)
    pixels = small.values * small.scale.float()[..., None, None] + small.offset.float()[..., None, None]
    expected = F.interpolate(pixels.flatten(0, 1), (8, 8), mode="bilinear").unflatten(0, (4, 2))
    values, scale, offset = (t.float() for t in distilled.compensators)
    error = (values * scale[..., None, None] + offset[..., None, None] - expected).abs()
    assert (error <= scale[..., None, None] * 0.5 + 2**-10).all()
    assert distilled.compensator_bytes == 4 * 2 * (3 * 9 + 12)
    write(distilled, tmp_path)
    assert distilled.file_bytes == (tmp_path / "distilled.safetensors").stat().st_size
    again = infer_fast.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.compensators, distilled.compensators, strict=True))
    torch.testing.assert_close(again[1][0], distilled[1][0], rtol=0, atol=0)
    part = again.part(1, 2)
    assert part.stored_compensators.values.shape == (2, 1, 3, 3, 3)
    assert part.compensators.values.shape == (2, 1, 3, 8, 8)
    assert part.compensator_bytes == 2 * (3 * 9 + 12)


@pytest.mark.parametrize("shape", [(4, 2, 3, 9, 9), (4, 2, 3, 3, 4), (4, 3, 3, 5, 5), (4, 2, 1, 5, 5)])
def test_compensators_that_fit_no_image_are_an_error(generator, tmp_path, shape):
    write(make(generator, size=5), tmp_path)
    tensors, stored = read_tensors(tmp_path / "distilled.safetensors")
    added = Quantised(torch.zeros(shape, dtype=torch.uint8), *(torch.ones(shape[:3]).half() for _ in range(2)))
    tensors |= dict(zip(COMPENSATORS, added, strict=True))
    write_tensors(tmp_path / "distilled.safetensors", tensors, stored)
    with pytest.raises(InferFastError, match="the compensators are"):
        infer_fast.load(tmp_path)


def test_a_damaged_coded_set_is_named(generator, tmp_path):
    plain = make(generator, size=8, images=True)
    coded, base = encode(plain.base, Codec("webp", 60))
    write(replace(plain, base=base, coded=coded), tmp_path)
    tensors, stored = read_tensors(tmp_path / "distilled.safetensors")
    tensors["mosaic_0000"] = tensors["mosaic_0000"][:40]
    write_tensors(tmp_path / "distilled.safetensors", tensors, stored)
    with pytest.raises(InferFastError, match=r"distilled.safetensors: Mosaic 0 is damaged"):
        infer_fast.load(tmp_path)
    del stored["images"]["channels"]
    write_tensors(tmp_path / "distilled.safetensors", tensors, stored)
    with pytest.raises(InferFastError, match="is no whole distilled set: 'channels' is missing"):
        infer_fast.load(tmp_path)


def test_fewer_compensators_than_base_images_serve_them_in_turn(generator):
    whole = make(generator, k=4, m=2)
    few = replace(whole, stored_compensators=Quantised(*(t[:, :2] for t in whole.compensators)))
    positions = torch.arange(len(few))
    views, j = positions % 3, positions // 3 % 4
    index = few.sources(positions)[3]
    assert torch.equal(index, torch.where(views == 0, -1, (views - 1) * 2 + j % 2))
    first_two = positions[j < 2]
    assert torch.equal(few.instances(first_two), whole.instances(first_two))
    bare, twice = few.base[0, 2].float() / 255, [t[1, 0].float() for t in few.compensators]
    expected = (bare + twice[0] * twice[1][:, None, None] + twice[2][:, None, None]).clamp(0, 1)
    torch.testing.assert_close(few.instances(torch.tensor([2 * 3 + 2]))[0], normalised(expected))  # of class 0


def normalised(pixels):
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
