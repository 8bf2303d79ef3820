"""Plans: INFER's counting, and bytes that never exceed the budget."""

from dataclasses import replace

import pytest

from infer_fast.errors import InferFastError
from infer_fast.recipes import RECIPES, base_images_per_class
from infer_fast.synthesis.plan import make_plan, stored_bytes


def test_k_is_the_papers_formula():
    for ipc in (1, 5, 10, 50, 100):
        for teachers in (1, 3, 4):
            for classes in (10, 100, 200, 1000):
                exact = ipc / (teachers / classes + 1)
                assert base_images_per_class(ipc, teachers, classes) == int(exact + 1e-9)


def test_cifar100_at_ipc_10():
    plan = make_plan(RECIPES["cifar100-infer-ipc10"], 100, (32, 32))
    assert (plan.tasks, plan.k, plan.classes, plan.instances) == (36, 9, 100, 100 * 9 * 5)
    assert plan.budget_bytes == 100 * 10 * 3072


@pytest.mark.parametrize("ipc", [1, *range(2, 30), 50, 100])
@pytest.mark.parametrize("size", [(8, 8), (32, 32)])
def test_the_budget_is_never_exceeded(ipc, size):
    recipe = replace(RECIPES["digits-infer"], ipc=ipc)
    if ipc == 1:
        with pytest.raises(InferFastError, match=r"ipc 1 is too small.*--ipc 2 would"):
            make_plan(recipe, 10, size)
        return
    plan = make_plan(recipe, 10, size)
    assert 0 < plan.image_bytes <= plan.budget_bytes
    assert plan.k >= base_images_per_class(ipc, 4, 10) - 1


def test_smaller_compensators_leave_room_for_base_images():
    recipe = RECIPES["digits-infer"]
    smaller = replace(recipe, synthesis=replace(recipe.synthesis, compensator_size=2))
    plan = make_plan(smaller, 10, (8, 8))
    assert plan.added == (2, 2) and plan.n == plan.k == 9
    assert plan.image_bytes == 9 * 10 * 192 + 4 * 9 * (3 * 4 + 12) <= plan.budget_bytes
    published = replace(recipe, synthesis=replace(recipe.synthesis, compensator_size=8))
    assert make_plan(published, 10, (8, 8)) == make_plan(recipe, 10, (8, 8))


@pytest.mark.parametrize(("side", "optimise"), [(0, "compensator"), (9, "compensator"), (4, "images")])
def test_compensators_of_a_size_that_cannot_be_are_an_error(side, optimise):
    recipe = RECIPES["digits-infer"]
    recipe = replace(recipe, synthesis=replace(recipe.synthesis, compensator_size=side, optimise=optimise))
    with pytest.raises(InferFastError, match=f"compensator.size (is )?{side}: "):
        make_plan(recipe, 10, (8, 8))


def test_every_task_is_in_one_batch_whatever_the_lanes():
    for lanes in (1, 3, 100, (1, 2, 3, 100)):
        plan = make_plan(RECIPES["digits-infer"], 10, (8, 8), lanes)
        tasks = [(b.teacher, j) for b in plan.batches for j in b.indices]
        assert sorted(tasks) == [(m, j) for m in range(4) for j in range(plan.k)]
        most = [lanes] * 4 if isinstance(lanes, int) else lanes
        assert all(len(b.indices) <= most[b.teacher] for b in plan.batches)


def test_image_mode_splits_the_classes():
    recipe = RECIPES["digits-infer"]
    recipe = replace(recipe, synthesis=replace(recipe.synthesis, optimise="images", batch_size=4))
    plan = make_plan(recipe, 10, (8, 8), lanes=10)
    assert [(b.first_class, b.last_class) for b in plan.batches] == [(0, 4), (4, 8), (8, 10)]
    assert plan.k == 10 and plan.image_bytes == plan.budget_bytes and plan.instances == 100


def test_a_compensator_is_shared_by_all_classes_whatever_the_batch_size():
    recipe = RECIPES["digits-infer"]
    plan = make_plan(replace(recipe, synthesis=replace(recipe.synthesis, batch_size=4)), 101, (8, 8))
    assert {(b.first_class, b.last_class) for b in plan.batches} == {(0, 101)}


def test_settings_that_cannot_work_are_errors():
    recipe = RECIPES["digits-infer"]
    with pytest.raises(InferFastError, match="SynthesisSettings.batch_size is 0"):
        make_plan(replace(recipe, synthesis=replace(recipe.synthesis, batch_size=0)), 10, (8, 8))
    with pytest.raises(InferFastError, match="Recipe.ipc is 0"):
        make_plan(replace(recipe, ipc=0), 10, (8, 8))
    with pytest.raises(InferFastError, match="No teacher"):
        make_plan(replace(recipe, arch_name=()), 10, (8, 8))
    with pytest.raises(InferFastError, match="lanes is 0"):
        make_plan(recipe, 10, (8, 8), lanes=0)
    with pytest.raises(InferFastError, match="--start noise: a compensator starts at zero"):
        make_plan(replace(recipe, synthesis=replace(recipe.synthesis, start="noise")), 10, (8, 8))


@pytest.mark.parametrize("ipc", [1, 3, 10, 77, 500])
@pytest.mark.parametrize("teachers", [1, 4])
@pytest.mark.parametrize(("asked", "side"), [(0, None), (1, None), (5, 3), (None, 2)])
def test_k_is_the_largest_that_fits(ipc, teachers, asked, side):
    """Against a search from the largest down, one by one."""
    recipe = replace(RECIPES["digits-infer"], ipc=ipc, arch_name=("convnet",) * teachers)
    recipe = replace(recipe, synthesis=replace(recipe.synthesis, compensator_size=side))
    recipe = replace(recipe, store=replace(recipe.store, compensators=asked))
    added = (8, 8) if side is None else (side, side)

    def fits(k):
        n = k if asked is None else min(asked, k)
        return stored_bytes(10 * k, teachers * n, (8, 8), added) <= ipc * 10 * 192

    largest = next((k for k in range(ipc, 0, -1) if fits(k)), 0)
    if largest == 0:
        with pytest.raises(InferFastError, match="too small"):
            make_plan(recipe, 10, (8, 8))
    else:
        assert make_plan(recipe, 10, (8, 8)).k == largest


def test_tasks_of_a_range_are_those_that_there_are():
    plan = make_plan(RECIPES["digits-infer"], 10, (8, 8))
    assert plan.wanted(0, None) == range(7) and plan.wanted(2, 50) == range(2, 7) and plan.wanted(2, 3) == range(2, 3)
    with pytest.raises(InferFastError, match="--ipc-start 7: the tasks are 0 to 6"):
        plan.wanted(7, 9)
    assert make_plan(RECIPES["digits"], 10, (8, 8), k=3).wanted(0, None) == range(0)


def test_images_that_are_optimised_do_not_fill_a_budget_of_bytes():
    recipe = RECIPES["digits-infer"]
    synthesis, store = replace(recipe.synthesis, optimise="images"), replace(recipe.store, budget="bytes")
    with pytest.raises(InferFastError, match="--optimise images fills --budget images"):
        make_plan(replace(recipe, synthesis=synthesis, store=store), 10, (8, 8))
