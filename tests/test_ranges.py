"""The range of every number: there is one for each, and each of its ends is held."""

from __future__ import annotations

import importlib
import math
import pkgutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

import infer_fast
from infer_fast import cli
from infer_fast.distill import DistillOptions
from infer_fast.errors import InferFastError
from infer_fast.export import ExportOptions
from infer_fast.flags import settings_of
from infer_fast.models import build
from infer_fast.ranges import RANGES, check, check_counts, field_name, flag
from infer_fast.recipes import RECIPES
from infer_fast.relabel import RelabelOptions
from infer_fast.report import ReportOptions
from infer_fast.settings import Recipe, SqueezeSettings, StoreSettings, StudentSettings, SynthesisSettings
from infer_fast.squeeze import Origin, SqueezeOptions, squeeze
from infer_fast.synthesis.plan import make_plan
from infer_fast.validate import ValidateOptions

EXAMPLES = {
    type(e): e
    for e in (
        SqueezeSettings(), SynthesisSettings(), StudentSettings(), StoreSettings(), Recipe(), Origin(SqueezeSettings()),
        SqueezeOptions("digits", ("convnet",)), DistillOptions(Recipe()), ValidateOptions(Path("x")), RelabelOptions(),
        ExportOptions(Path("x")), ReportOptions(),
    )
}  # fmt: skip
NUMBERS = [
    pytest.param(example, setting, id=field_name(setting))
    for example in EXAMPLES.values()
    for setting in settings_of(example)
    if setting.numeric and setting.owner == type(example).__name__
]


def changed(example, setting, value):
    many = isinstance(setting.value, tuple) or setting.count is not None
    return replace(example, **{setting.name: (value,) * (setting.count or 1) if many else value})


def settings_classes():
    """Every dataclass of settings in the package, by the habits of its names."""
    for module in pkgutil.walk_packages(infer_fast.__path__, "infer_fast."):
        if module.name.split(".")[1] not in ("kernels", "_native"):
            for value in vars(importlib.import_module(module.name)).values():
                named = getattr(value, "__name__", "").endswith(("Settings", "Options")) or value in (Recipe, Origin)
                if isinstance(value, type) and is_dataclass(value) and named:
                    yield value


def test_every_number_of_every_dataclass_of_settings_has_a_range():
    assert set(settings_classes()) == set(EXAMPLES)
    without = [field_name(p.values[1]) for p in NUMBERS if p.values[1].name not in RANGES]
    assert without == []
    assert set(RANGES) == {p.values[1].name for p in NUMBERS}, "a range that no field has"


def test_every_recipe_and_default_is_in_range():
    for settings in (*RECIPES.values(), *EXAMPLES.values()):
        check(settings)


@pytest.mark.parametrize(("example", "setting"), NUMBERS)
def test_each_bound_is_held(example, setting):
    own = RANGES[setting.name]
    step = 1 if setting.whole else 1e-6
    inside = [own.low + step * own.open_low, own.high - step * own.open_high]
    outside = [own.low - step * (not own.open_low), own.high + step * (not own.open_high)]
    if not setting.whole:
        outside += [math.nan, math.inf, -math.inf]
    for value in inside:
        check(changed(example, setting, value))
    for value in outside:
        with pytest.raises(InferFastError, match=rf"{field_name(setting)} is .*: it must be a .*number"):
            check(changed(example, setting, value))
        with pytest.raises(InferFastError, match=f"^{setting.flag} is "):
            check(changed(example, setting, value), flag)


@pytest.mark.parametrize(("example", "setting"), NUMBERS)
def test_what_is_no_number_is_refused(example, setting):
    wrong = ["3", True, 3j, [1]] + [2.5, 10**5000] * setting.whole + [None] * (type(None) not in setting.kinds)
    for value in wrong:
        with pytest.raises(InferFastError, match=field_name(setting)):
            check(changed(example, setting, value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 0}, "StudentSettings.epochs is 0: it must be a whole number from 1 to 1,000,000"),
        ({"lr": math.nan}, "StudentSettings.lr is nan: it must be a number above 0 to 1,000,000"),
        ({"momentum": 1.0}, "StudentSettings.momentum is 1.0: it must be a number from 0 to below 1"),
        ({"temperature": 0.0}, "temperature is 0.0: it must be a number from 0.01 to 10,000"),
        ({"mix_type": "mixed"}, "mix_type is 'mixed': choose one of mixup, cutmix, none"),
        ({"labels": ("static", "soft")}, "labels is 'soft': choose one of static, dynamic, fkd"),
        ({"labels": ()}, "labels is empty"),
        ({"networks": ()}, "networks is empty"),
    ],
)
def test_the_sentence_says_what_was_given_and_what_is_allowed(change, words):
    with pytest.raises(InferFastError) as caught:
        check(replace(StudentSettings(), **change))
    assert words in str(caught.value)


def test_tuples_have_as_many_values_as_they_should():
    with pytest.raises(InferFastError, match="SynthesisSettings.mean has 2 values: it must have 3"):
        check(SynthesisSettings(mean=(0.5, 0.5)))
    with pytest.raises(InferFastError, match="SynthesisSettings.std is 0.0"):
        check(SynthesisSettings(std=(0.5, 0.0, 0.5)))


def test_settings_inside_settings_are_looked_at():
    with pytest.raises(InferFastError, match="^--squeeze.batch-size is 0"):
        check(DistillOptions(Recipe(squeeze=SqueezeSettings(batch_size=0))), flag)
    with pytest.raises(InferFastError, match="^--iteration is 0"):
        check(DistillOptions(Recipe(synthesis=SynthesisSettings(iterations=0))), flag)


def test_counts_have_the_ranges_of_their_names():
    check_counts(lanes=1, chunk=None)
    with pytest.raises(InferFastError, match="chunk is 0"):
        check_counts(lanes=1, chunk=0)


def test_the_python_api_looks_before_it_works(tiny_dataset, tmp_path):
    base = torch.zeros(1, 4, 3, 8, 8)
    with pytest.raises(InferFastError, match="SynthesisSettings.lr is nan"):
        infer_fast.solve(build("convnet", 4, (8, 8)), base, settings=SynthesisSettings(lr=math.nan))
    with pytest.raises(InferFastError, match="SqueezeSettings.epochs is -1"):
        squeeze(tiny_dataset, ("convnet",), Origin(SqueezeSettings(epochs=-1)), tmp_path)
    with pytest.raises(InferFastError, match="Origin.seed is 18446744073709551616"):
        squeeze(tiny_dataset, ("convnet",), Origin(SqueezeSettings(), seed=2**64), tmp_path)
    with pytest.raises(InferFastError, match="Recipe.ipc is 999999999999"):
        make_plan(Recipe(ipc=999_999_999_999), 10, (8, 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["--ipc 999999999999", "--lr inf", "--seed -1", "--mean 0.5 0.5 nan", "--M -1"])
def test_the_command_line_names_the_flag_and_exits_with_2(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(DistillOptions, DistillOptions(Recipe()), words.split(), "prog", "")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith(f"infer_fast: {words.split()[0]} is ") and said.count("\n") == 1


def test_every_field_keeps_the_range_of_its_name_whoever_has_it():
    """Names mean one thing: those of two dataclasses are alike whole, or alike not."""
    kinds: dict[str, set[bool]] = {}
    for example in EXAMPLES.values():
        for setting in settings_of(example):
            if setting.numeric and setting.name in {field.name for field in fields(example)}:
                kinds.setdefault(setting.name, set()).add(setting.whole)
    assert all(len(own) == 1 for own in kinds.values())
