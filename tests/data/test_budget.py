"""A budget of bytes: filled to the last image of each class, everything in the file counted."""

from dataclasses import replace

import pytest
import torch

from infer_fast.data.budget import HEADER, Base, Storage, filled, storage_of
from infer_fast.data.codec import Codec
from infer_fast.data.distilled import DistilledSet, quantise
from infer_fast.data.label_store import AS_FLOAT16, LabelStore
from infer_fast.data.pixels import AS_STORED
from infer_fast.errors import InferFastError
from infer_fast.recipes import RECIPES
from infer_fast.settings import StoreSettings

STORAGES = [
    Storage(Codec("raw", 0), AS_FLOAT16),
    Storage(Codec("webp", 60), LabelStore("uint8"), teachers=2, compensators=1),
    Storage(Codec("jpeg", 60), LabelStore("top", 2, 4.0), teachers=1, compensators=2),
    Storage(Codec("avif", 60), LabelStore("uint8"), teachers=2, compensators=2, side=5),
]


def pool(generator, classes=5, most=60, size=16):
    images = torch.randint(0, 256, (classes, most, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return images.repeat_interleave(size // 4, 3).repeat_interleave(size // 4, 4)


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.codec.name)
def test_a_budget_holds_as_many_images_as_fit_and_no_more(generator, storage):
    images = pool(generator)
    asked = []

    def draw(k):
        asked.append(k)
        return images[:, :k]

    budget = storage.file_bytes(storage.coded(images[:, :40])) + 10
    base = filled(draw, 60, storage, budget)
    k = base.images.shape[1]
    assert 0 < k < 60 and storage.file_bytes(base) <= budget
    assert storage.file_bytes(storage.coded(images[:, : k + 1])) > budget
    assert len(asked) <= 10
    asked.clear()
    again = filled(draw, 60, storage, budget, guess=k + 1)
    assert torch.equal(again.images, base.images) and len(asked) <= 5


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.codec.name)
def test_the_size_is_that_of_the_file(generator, tmp_path, storage):
    base = storage.coded(pool(generator, most=6))
    classes, k, channels, *size = base.images.shape
    size = (storage.side, storage.side) if storage.side else size
    views = 1 + storage.teachers
    dense = torch.randn(storage.teachers, storage.compensators, channels, *size, generator=generator)
    distilled = DistilledSet(
        base.images,
        quantise(dense, (0.3, 0.3, 0.3)) if storage.compensators else None,
        torch.randn(classes, k, views if storage.compensators else 1, classes, generator=generator).half(),
        AS_STORED,
        tuple(map(str, range(classes))),
        coded=base.coded,
        label_store=storage.labels,
    )
    written = distilled.save(tmp_path).stat().st_size
    assert written <= storage.file_bytes(base) <= written + 2 * HEADER


def test_everything_may_fit(generator):
    images = pool(generator, most=9)
    base = filled(lambda k: images[:, :k], 9, STORAGES[0], 10**9)
    assert isinstance(base, Base) and torch.equal(base.images, images)


def test_a_budget_for_nothing_is_an_error(generator):
    images = pool(generator)
    with pytest.raises(InferFastError, match="budget of 100 bytes does not hold one image of each class"):
        filled(lambda k: images[:, :k], 60, STORAGES[0], 100)


def test_a_recipe_says_how_it_is_stored():
    store = StoreSettings(codec="avif", quality=45, label_bits="top", label_top=3)
    recipe = replace(RECIPES["digits-infer"], store=store)
    assert storage_of(recipe, 2) == Storage(Codec("avif", 45), LabelStore("top", 3, 4.0), 4, 2)
    mixed = replace(recipe, store=StoreSettings(label_bits="uint8", label_truth=0.5))
    assert storage_of(mixed, 0).labels == LabelStore("uint8", 0, 4.0, 0.5)
    assert storage_of(replace(recipe, store=StoreSettings()), 0).labels == AS_FLOAT16
    for share in (-0.1, 1.0):
        with pytest.raises(InferFastError, match=f"--label-truth {share:g}"):
            storage_of(replace(recipe, store=StoreSettings(label_truth=share)), 0)
    smaller = replace(recipe, synthesis=replace(recipe.synthesis, compensator_size=5))
    assert storage_of(smaller, 2) == replace(storage_of(recipe, 2), side=5)
