"""A set that somebody else made: every reader says what is wrong with it, in a sentence, before it takes any room."""

import json
from dataclasses import asdict, replace
from random import Random

import numpy as np
import pytest
import torch

import infer_fast
from infer_fast.data.card import read_card
from infer_fast.data.codec import Codec, Coded, decode, encode
from infer_fast.data.distilled import TENSORS
from infer_fast.data.label_store import LabelStore
from infer_fast.errors import InferFastError
from infer_fast.files import file_hash, read_tensors, write_json, write_tensors
from tests.conftest import SEED
from tests.data.test_distilled import make


def coded_set(generator, labels=None):
    """A set of 3 classes whose images are WebP, labels the top one of each row."""
    plain, labels = make(generator, size=8), labels or LabelStore("top", 1, 4.0)
    coded, base = encode(plain.base, Codec("webp", 60))
    card = replace(plain.card, pixels=coded.digest)
    return replace(plain, base=base, coded=coded, label_store=labels, logits=labels.rounded(plain.logits), card=card)


def test_the_card_has_the_hash_of_the_tensors_and_another_file_is_refused(generator, tmp_path):
    distilled = make(generator)
    card = distilled.publish(distilled.card, tmp_path)
    assert card.sha256 == (file_hash(tmp_path / TENSORS),) and infer_fast.load(tmp_path).card == card
    other = replace(distilled, logits=distilled.logits.flip(0))
    other.save(tmp_path)
    with pytest.raises(InferFastError, match=r"distilled.safetensors is not the file that card.json tells of"):
        infer_fast.load(tmp_path)
    replace(card, sha256=()).write(tmp_path)  # a set from before the hash was kept
    assert torch.equal(infer_fast.load(tmp_path).logits, other.logits)


@pytest.mark.parametrize("cut", ["after the card", "after the tensors"])
def test_labels_renewed_and_cut_short_leave_a_whole_set(generator, tmp_path, monkeypatch, cut):
    distilled = make(generator)
    card = distilled.publish(distilled.card, tmp_path)
    other = replace(distilled, logits=distilled.logits.flip(0))
    writes = []

    def write(self, folder):
        if writes or cut == "after the card":
            write_json(folder / "card.json", asdict(self))
        if writes or cut == "after the card":
            raise KeyboardInterrupt
        writes.append(self)
        write_json(folder / "card.json", asdict(self))

    monkeypatch.setattr(type(card), "write", write)
    with pytest.raises(KeyboardInterrupt):
        other.publish(card, tmp_path)
    found = infer_fast.load(tmp_path)
    assert torch.equal(found.logits, (distilled if cut == "after the card" else other).logits)


@pytest.mark.parametrize("name", ["logits", "compensator_scale", "compensator_offset"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_said(generator, tmp_path, name, value):
    distilled = make(generator)
    distilled.publish(replace(distilled.card, sha256=()), tmp_path)
    tensors, stored = read_tensors(tmp_path / TENSORS)
    tensors[name].view(-1)[int(torch.randint(tensors[name].numel(), (), generator=generator))] = value
    write_tensors(tmp_path / TENSORS, tensors, stored)
    replace(read_card(tmp_path), sha256=()).write(tmp_path)
    with pytest.raises(InferFastError, match="NaN or infinite values"):
        infer_fast.load(tmp_path)


def test_labels_of_eight_bits_with_a_span_that_is_no_number_are_said(generator, tmp_path):
    distilled = coded_set(generator, LabelStore("uint8"))
    distilled.save(tmp_path)
    distilled.card.write(tmp_path)
    tensors, stored = read_tensors(tmp_path / TENSORS)
    for span in ([0.0, float("nan")], [0.0, 1e30]):
        stored["labels"]["span"] = span
        write_tensors(tmp_path / TENSORS, tensors, stored)
        with pytest.raises(InferFastError, match="NaN or infinite values"):
            infer_fast.load(tmp_path)


BOMBS = {
    "more images than memory": ({"shape": [3, 10**12]}, "Decoded, the images take|mosaics, and there"),
    "more mosaics than there are": ({"shape": [3, 10**6]}, "mosaics, and there are 1"),
    "an image of a kilometre": ({"size": [10**6, 10**6]}, "can't be"),
    "large images": ({"size": [20000, 20000]}, "mosaics, and there are 1"),
    "no images": ({"shape": [3, 0]}, "can't be"),
    "negative": ({"shape": [3, -2]}, "can't be"),
    "many channels": ({"channels": 100}, "can't be"),
}


def write_with_header(distilled, folder, part, changed):
    """Writes a set whose file's header has other values in one part than fit its tensors."""
    distilled.save(folder)
    distilled.card.write(folder)
    tensors, stored = read_tensors(folder / TENSORS)
    stored[part] |= changed
    write_tensors(folder / TENSORS, tensors, stored)


@pytest.mark.parametrize("case", BOMBS)
def test_sizes_in_a_header_are_checked_before_anything_is_decoded(generator, tmp_path, case):
    changed, words = BOMBS[case]
    write_with_header(coded_set(generator), tmp_path, "images", changed)
    with pytest.raises(InferFastError, match=words):
        infer_fast.load(tmp_path)


def test_a_mosaic_that_is_larger_than_its_images_is_not_decoded(monkeypatch):
    """A few kilobytes that would be 48 MB of pixels: they are looked at, and refused by their size."""
    large, _ = encode(torch.zeros(1, 1, 3, 4000, 4000, dtype=torch.uint8), Codec("webp", 50))
    assert large.nbytes < 2**17
    bomb = Coded(large.codec, large.parts, (1, 1), (8, 8), 1, large.digest)
    monkeypatch.setattr(np, "array", None)  # what would be called for its pixels
    with pytest.raises(InferFastError, match=r"Mosaic 0 is \(4000, 4000, 1\), not \(8, 8, 1\)"):
        decode(bomb)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"classes": 10**12}, "the images call for"),
        ({"classes": "many"}, "the images call for"),
        ({"temperature": 0}, "the labels have a temperature of 0"),
        ({"temperature": float("nan")}, "the labels have a temperature of nan"),
        ({"truth": 1}, "and 1 of the truth"),
    ],
)
def test_labels_that_cannot_be_take_no_room(generator, tmp_path, changed, words):
    write_with_header(coded_set(generator), tmp_path, "labels", changed)
    with pytest.raises(InferFastError, match=words):
        infer_fast.load(tmp_path)


def test_a_class_that_there_is_not_is_said(generator, tmp_path):
    distilled = coded_set(generator)
    distilled.save(tmp_path)
    distilled.card.write(tmp_path)
    tensors, stored = read_tensors(tmp_path / TENSORS)
    tensors["logit_classes"].view(-1)[0] = 3
    write_tensors(tmp_path / TENSORS, tensors, stored)
    with pytest.raises(InferFastError, match="names a class that there is not: 3 classes are 0..2"):
        infer_fast.load(tmp_path)


STRANGE = [None, -1, 0, 10**30, 0.5, float("nan"), "x", "../..", "\0", [], [[]], {}, {"a": 1}, [1, 2, 3, 4], True]


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def changed_at(value, path, new):
    copied = json.loads(json.dumps(value))
    inner = copied
    for step in path[:-1]:
        inner = inner[step]
    if not path:
        return new
    inner[path[-1]] = new
    return copied


@pytest.mark.parametrize("coded", [False, True])
def test_whatever_stands_in_the_header_or_the_card_is_read_or_refused_in_a_sentence(generator, tmp_path, coded):
    """Every place of both, and strange values drawn for it; many are not read at all, and then nothing is wrong."""
    random, refused = Random(SEED), 0
    distilled = coded_set(generator) if coded else make(generator)
    distilled.save(tmp_path)
    distilled.card.write(tmp_path)
    tensors, stored = read_tensors(tmp_path / TENSORS)
    card = json.loads((tmp_path / "card.json").read_text())
    for path in places(stored):
        for value in random.sample(STRANGE, 6):
            write_tensors(tmp_path / TENSORS, tensors, changed_at(stored, path, value) or None)
            refused += not readable(tmp_path)
    distilled.save(tmp_path)
    for path in places(card):
        write_json(tmp_path / "card.json", changed_at(card, path, random.choice(STRANGE)))
        refused += not readable(tmp_path)
    distilled.card.write(tmp_path)
    for name in tensors:
        for shape in ((), (0,), (3,), (3, 2), (1, 1, 1, 1, 1)):
            kind = random.choice([torch.uint8, torch.float16, torch.float64, torch.int64, torch.bool])
            write_tensors(tmp_path / TENSORS, {**tensors, name: torch.zeros(shape).to(kind)}, stored or None)
            refused += not readable(tmp_path)
        write_tensors(tmp_path / TENSORS, {n: t for n, t in tensors.items() if n != name}, stored or None)
        assert not readable(tmp_path)
    assert refused > 60


def readable(folder):
    """Whether the set is read, and is then whole; anything but one sentence is raised."""
    try:
        distilled = infer_fast.load(folder)
    except InferFastError as error:
        assert str(error).count("\n") == 0
        return False
    image, logits, label = distilled[len(distilled) - 1]
    assert image.isfinite().all() and logits.isfinite().all() and label == 2
    return True


def test_a_damaged_file_is_refused_wherever_the_damage_is(generator, tmp_path):
    """Single bytes of a published set: the hash sees what the tensors' own checks can't."""
    distilled = make(generator)
    distilled.publish(distilled.card, tmp_path)
    whole = (tmp_path / TENSORS).read_bytes()
    for position in torch.randint(len(whole), (40,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (tmp_path / TENSORS).write_bytes(damaged)
        with pytest.raises(InferFastError):
            infer_fast.load(tmp_path)
