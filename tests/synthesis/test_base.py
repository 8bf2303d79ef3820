"""Base images: as a student will see them, and as many as a budget of bytes holds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infer_fast.data.budget import storage_of
from infer_fast.data.images import draw_of_each_class
from infer_fast.errors import InferFastError
from infer_fast.settings import Recipe, StoreSettings, SynthesisSettings
from infer_fast.synthesis.base import base_images, check_enough, expected_count
from infer_fast.synthesis.plan import make_plan
from infer_fast.synthesis.problem import with_statistics
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
        check_enough(tiny_dataset, BYTES, plan_of(tiny_dataset, BYTES, 2), given=Path(tmp_path))


@pytest.mark.parametrize("asked, expected", [(None, (8, 8)), (0, (10, 0)), (1, (9, 1)), (3, (9, 3)), (20, (8, 8))])
def test_compensators_are_counted_against_base_images(asked, expected):
    recipe = Recipe(arch_name=("convnet",) * 2, ipc=10, store=StoreSettings(compensators=asked))
    plan = make_plan(recipe, 10, (8, 8))
    assert (plan.k, plan.n) == expected
    assert plan.image_bytes <= plan.budget_bytes and plan.tasks == 2 * plan.n
    assert plan.instances == 10 * plan.k * (3 if plan.n else 1)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (
            lambda t: t.index_put((torch.tensor(0),) * 4, torch.tensor(float("nan"))),
            "tensor_0.pt holds NaN or infinity",
        ),
        (lambda t: t + float("inf"), "tensor_0.pt holds NaN or infinity"),
        (lambda t: t.long(), "tensor_0.pt holds torch.int64, expected bytes"),
        (lambda t: t[:, :2], "expected a tensor"),
    ],
)
def test_given_tensors_that_are_no_images_are_refused(tiny_dataset, tmp_path, generator, tensor, words):
    recipe = replace(RECIPE, synthesis=with_statistics(RECIPE.synthesis, tiny_dataset.pixels))
    plan = plan_of(tiny_dataset, recipe)
    good = torch.randn(4, 3, 8, 8, generator=generator)
    for j in range(plan.k):
        torch.save(good, tmp_path / f"tensor_{j}.pt")
    assert base_images(tiny_dataset, recipe, plan, tmp_path).images.shape == (4, plan.k, 3, 8, 8)
    torch.save(tensor(good), tmp_path / "tensor_0.pt")
    with pytest.raises(InferFastError, match=words):
        base_images(tiny_dataset, recipe, plan, tmp_path)


@pytest.mark.parametrize(("ipc", "compare", "given", "enough"), [
    (12, "random", False, True), (13, "random", False, False), (13, "none", False, True), (20, "none", False, False),
    (20, "none", True, True), (20, "random", True, False),
])  # fmt: skip
def test_what_will_be_drawn_of_each_class_is_counted_before_the_work(
    tiny_dataset, tmp_path, ipc, compare, given, enough
):
    """12 training images of each class; with 1 teacher and 4 classes, k is 4/5 of ipc."""
    recipe = replace(RECIPE, ipc=ipc, compare=compare)
    plan = plan_of(tiny_dataset, recipe)
    for j in range(plan.k):
        torch.save(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), tmp_path / f"tensor_{j}.pt")
    if enough:
        check_enough(tiny_dataset, recipe, plan, tmp_path if given else None)
    else:
        with pytest.raises(InferFastError, match="has 12 training images, fewer than the .*: lower --ipc"):
            check_enough(tiny_dataset, recipe, plan, tmp_path if given else None)
