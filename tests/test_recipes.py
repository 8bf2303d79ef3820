"""Every number of a published recipe, written down a second time."""

from dataclasses import asdict, replace

import pytest

from infer_fast.recipes import IMAGENET_TEACHERS, INFER_TEACHERS, RECIPES
from infer_fast.settings import StoreSettings, SynthesisSettings, asked

OURS = {"digits", "fashion-mnist", "cifar100-small", "digits-infer", "fashion-mnist-infer"}

# recipe: ipc, teachers, optimise, start, iterations, lr, r_bn, r_var, steps, rho, batch
PUBLISHED = {
    "cifar10-infer-ipc10": (10, 4, "compensator", "real", 1000, 0.25, 1.0, 1.0, 0, None, 10),
    "cifar100-infer-ipc50": (50, 4, "compensator", "real", 1000, 0.25, 1.0, 1.0, 0, None, 100),
    "cifar100-dwa-ipc100": (100, 1, "images", "real", 1000, 0.25, 0.01, 11.0, 12, 15e-3, 100),
    "cifar10-sre2l-ipc50": (50, 1, "images", "noise", 1000, 0.25, 0.01, 1.0, 0, None, 10),
    "tiny-infer-ipc10": (10, 4, "compensator", "real", 2000, 0.1, 1.0, 1.0, 0, None, 200),
    "tiny-dwa-ipc50": (50, 1, "images", "real", 2000, 0.1, 0.01, 11.0, 12, 15e-3, 200),
    "tiny-sre2l-ipc100": (100, 1, "images", "noise", 2000, 0.1, 0.01, 1.0, 0, None, 200),
    "imagenet-infer-ipc10": (10, 3, "compensator", "real", 2000, 0.25, 0.01, 1.0, 0, None, 1000),
    "imagenet-dwa-ipc50": (50, 1, "images", "real", 2000, 0.25, 0.01, 2.0, 15, 15e-3, 100),
    "imagenet-sre2l-ipc10": (10, 1, "images", "noise", 2000, 0.25, 0.01, 1.0, 0, None, 100),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_numbers(name):
    recipe, (ipc, teachers, optimise, start, iterations, lr, r_bn, r_var, steps, rho, batch) = (
        RECIPES[name],
        PUBLISHED[name],
    )
    s = recipe.synthesis
    assert (recipe.ipc, len(recipe.arch_name), s.optimise, s.start) == (ipc, teachers, optimise, start)
    assert (s.iterations, s.lr, s.r_bn, s.r_var, s.steps, s.batch_size) == (iterations, lr, r_bn, r_var, steps, batch)
    assert rho is None or s.rho == rho
    assert s.first_bn_multiplier == 10 and s.jitter == (32 if name.startswith("imagenet") else 4)
    assert recipe.arch_name == {1: ("resnet18",), 3: IMAGENET_TEACHERS, 4: INFER_TEACHERS}[teachers]
    assert recipe.arch_weights == ("IMAGENET1K_V1" if name.startswith("imagenet") else None)


def test_students_have_the_published_numbers():
    for name, recipe in RECIPES.items():
        s, q = recipe.student, recipe.squeeze
        if name in OURS:
            continue
        if name.startswith("imagenet"):
            assert (s.batch_size, s.epochs, s.temperature, s.mix_type, s.mix_alpha) == (128, 300, 20, "cutmix", 1.0)
            assert (s.crop, s.flip, s.optimizer, s.lr, s.weight_decay) == ("resized", True, "auto", 1e-3, 0.01)
            assert s.momentum is None and s.labels == (("fkd",) if "dwa" in name or "sre2l" in name else ("static",))
            continue
        assert (q.epochs, q.lr, q.momentum, q.weight_decay, q.padding, q.flip) == (200, 0.1, 0.9, 5e-4, 4, True)
        assert (s.batch_size, s.temperature, s.mix_type, s.mix_alpha, s.padding) == (64, 30, "mixup", 0.8, 4)
        if name.startswith("tiny-dwa"):
            assert (s.optimizer, s.lr, s.momentum, s.weight_decay, s.epochs) == ("auto", 0.2, 0.9, 1e-4, 200)
            assert (s.lr_warmup_epochs, s.lr_warmup_decay) == (5, 0.01)
        else:
            assert (s.optimizer, s.lr, s.weight_decay, s.epochs, s.lr_warmup_epochs) == ("auto", 1e-3, 0.01, 400, 0)
            assert s.momentum is None


def test_all_names_are_there():
    expected = {f"{d}-{m}-ipc{n}" for d in ("cifar10", "cifar100", "tiny") for m in ("infer", "dwa", "sre2l")
                for n in (10, 50, 100)}  # fmt: skip
    imagenet = {f"imagenet-{m}-ipc{n}" for m in ("infer", "dwa", "sre2l") for n in (10, 50)}
    best = {f"{d}-best-ipc{n}" for d in ("cifar10", "cifar100", "tiny", "imagenet") for n in (10, 50)}
    assert set(RECIPES) == expected | imagenet | best | OURS


def test_the_best_recipes_are_infers_but_for_what_is_stored():
    for name, recipe in RECIPES.items():
        if "-best-" not in name:
            assert name in OURS or recipe.store == StoreSettings()
            continue
        infer = RECIPES[name.replace("-best-", "-infer-")]
        assert replace(recipe, store=infer.store) == infer
        assert recipe.store.budget == "bytes" and recipe.store.codec == "avif"
        assert recipe.store.label_bits == ("uint8" if name.startswith("cifar10-") else "top")


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_the_small_sets_have_infer_beside_what_is_best(name):
    best, infer = RECIPES[name], RECIPES[f"{name}-infer"]
    assert best.store.budget == "bytes" and infer.store == StoreSettings()
    assert (best.arch_name, best.squeeze, best.ipc) == (infer.arch_name, infer.squeeze, infer.ipc)
    assert (infer.student.temperature, infer.synthesis.r_bn, infer.synthesis.first_bn_multiplier) == (4, 1, 10)


def test_fields_that_were_added_later_count_where_they_say_something():
    """A task that was solved before they were there is found by its key."""
    plain = SynthesisSettings()
    assert {**asked(plain), "compensator_size": None} == asdict(plain) != asked(plain)
    assert asked(replace(plain, compensator_size=4)) == {**asked(plain), "compensator_size": 4}
