"""Base images: as a student will see them, and as many as a budget of bytes holds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infer_fast.data.budget import storage_of
from infer_fast.data.images import draw_of_each_class
from infer_fast.errors import InferFastError
from infer_fast.settings import Recipe, StoreSettings, SynthesisSettings
from infer_fast.synthesis.base import base_images, expected_count
from infer_fast.synthesis.plan import make_plan
from infer_fast.synthesis.views import task_generator

RECIPE = Recipe(arch_name=("convnet",), ipc=3, synthesis=SynthesisSettings(seed=7))
BYTES = replace(RECIPE, store=StoreSettings("bytes", "webp", 100, "uint8", compensators=1))


def plan_of(dataset, recipe, k=None):
    return make_plan(recipe, len(dataset.classes), dataset.size, k=k)


def test_raw_base_images_are_the_training_images_that_were_drawn(tiny_dataset):
    plan = plan_of(tiny_dataset, RECIPE)
    base = base_images(tiny_dataset, RECIPE, plan)
    drawn = draw_of_each_class(tiny_dataset, plan.k, task_generator(7, 0, 0, "base images"))
    assert base.coded is None and torch.equal(base.images, tiny_dataset.train.images[drawn])


def test_coded_base_images_are_the_decoded_ones(tiny_dataset):
    raw = base_images(tiny_dataset, RECIPE, plan_of(tiny_dataset, RECIPE))
    recipe = replace(RECIPE, store=StoreSettings(codec="jpeg", quality=30))
    base = base_images(tiny_dataset, recipe, plan_of(tiny_dataset, recipe))
    assert base.images.shape == raw.images.shape and not torch.equal(base.images, raw.images)
    assert base.coded is not None and base.nbytes == base.coded.nbytes


def test_a_budget_of_bytes_is_filled_with_the_same_draw(tiny_dataset):
    about = expected_count(tiny_dataset, BYTES)
    plan = plan_of(tiny_dataset, BYTES, about)
    base = base_images(tiny_dataset, BYTES, plan)
    k = base.images.shape[1]
    assert abs(k - about) <= 2
    drawn = draw_of_each_class(tiny_dataset, k, task_generator(7, 0, 0, "base images"))
    assert torch.equal(base.images, tiny_dataset.train.images[drawn])  # lossless
    assert storage_of(BYTES, 1).file_bytes(base) <= plan.budget_bytes


def test_given_base_images_do_not_fill_a_budget(tiny_dataset, tmp_path):
    with pytest.raises(InferFastError, match="--init-path"):
        base_images(tiny_dataset, BYTES, plan_of(tiny_dataset, BYTES, 2), given=Path(tmp_path))


@pytest.mark.parametrize("asked, expected", [(None, (8, 8)), (0, (10, 0)), (1, (9, 1)), (3, (9, 3)), (20, (8, 8))])
def test_compensators_are_counted_against_base_images(asked, expected):
    recipe = Recipe(arch_name=("convnet",) * 2, ipc=10, store=StoreSettings(compensators=asked))
    plan = make_plan(recipe, 10, (8, 8))
    assert (plan.k, plan.n) == expected
    assert plan.image_bytes <= plan.budget_bytes and plan.tasks == 2 * plan.n
    assert plan.instances == 10 * plan.k * (3 if plan.n else 1)
