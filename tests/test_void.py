"""Settings that others make void are said, and contradictions refused."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from infer_fast import cli
from infer_fast.distill import DistillOptions
from infer_fast.errors import InferFastError
from infer_fast.flags import settings_of
from infer_fast.recipes import RECIPES
from infer_fast.settings import Recipe, SqueezeSettings, StoreSettings, StudentSettings, SynthesisSettings
from infer_fast.squeeze import SqueezeOptions
from infer_fast.validate import ValidateOptions
from infer_fast.void import RULES, check_image_size, check_options, void

DEFAULT = DistillOptions(RECIPES["digits-infer"])
OWNERS = (DistillOptions, ValidateOptions, SqueezeOptions, Recipe, SqueezeSettings, SynthesisSettings, StudentSettings,
          StoreSettings)  # fmt: skip


def notes(capsys, words, default=DEFAULT):
    """What the command line notes."""
    cli.parse(type(default), default, words.split(), "prog", "")
    return capsys.readouterr().err.splitlines()


def test_every_rule_speaks_of_settings_that_are_there():
    names = {owner.__name__: {field.name for field in fields(owner)} for owner in OWNERS}
    every = set().union(*names.values())
    for rule in RULES:
        assert set(rule.names.split()) <= names[rule.owner], rule
        assert rule.other in every and (rule.unless is None or rule.unless[0] in every), rule


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rho 0.1", "--rho has no effect with --steps 0."),
        ("--rho 0.1 --steps 3", None),
        ("--compensators 0 --iteration 5 --lr 0.5", "--iteration, --lr have no effect with --compensators 0."),
        ("--compensators 0 --chunk 5", "--chunk has no effect with --compensators 0."),
        ("--compensators 0 --optimise images --iteration 5", "--compensators has no effect with --optimise images."),
        ("--r-bn 0 --r-var 2", "--r-var has no effect with --r-bn 0.0."),
        ("--quality 5", "--quality has no effect with --codec raw."),
        ("--codec jpeg --quality 5", None),
        ("--label-top 5", "--label-top has no effect with --label-bits float16."),
        ("--student.mix-alpha 0.5", "--student.mix-alpha has no effect with --student.mix-type none."),
        ("--student.momentum 0.5", None),
        ("--student.momentum 0.5 --student.optimizer adamw",
         "--student.momentum has no effect with --student.optimizer adamw."),
        ("--student.crop resized --student.padding 3", "--student.padding has no effect with --student.crop resized."),
        ("--student.lr-gamma 0.5",
         "--student.lr-gamma has no effect with --student.lr-scheduler cosineannealinglr."),
        ("--student.lr-warmup-decay 0.5", "--student.lr-warmup-decay has no effect with --student.lr-warmup-epochs 0."),
        ("--arch-path a.pth --squeeze.epochs 3", "--squeeze.epochs has no effect with --arch-path."),
        ("--start noise --optimise images --init-path x", "--init-path has no effect with --start noise."),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_said(capsys, words, said):
    assert notes(capsys, words) == ([] if said is None else [f"note: {said}"])


def test_flags_are_called_as_the_command_has_them(capsys):
    assert notes(capsys, "--arch-path a.pth --epochs 3", SqueezeOptions("digits", ("convnet",))) == [
        "note: --epochs has no effect with --arch-path."
    ]
    assert notes(capsys, "--padding 3 --crop resized", ValidateOptions(Path("x"))) == [
        "note: --padding has no effect with --crop resized."
    ]


def test_a_recipes_own_settings_are_not_complained_of():
    for recipe in RECIPES.values():
        own = DistillOptions(recipe)
        assert void(own, own) == [] and len(list(settings_of(own))) > 50


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ipc_start": 3, "ipc_end": 3}, "--ipc-start 3 is not before --ipc-end 3"),
        ({"ipc_start": 5, "ipc_end": 3}, "leaves no task"),
        ({"held_out": 10, "val_dir": Path("x")}, "--held-out .* --val-dir .* choose one"),
        ({"lanes": 0}, "DistillOptions.lanes is 0"),
    ],
)
def test_contradictions_are_refused(change, words):
    check_options(DEFAULT)
    with pytest.raises(InferFastError, match=words):
        check_options(replace(DEFAULT, **change))


def test_contradictions_on_the_command_line_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        notes(capsys, "--ipc-start 5 --ipc-end 3")
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_image_size_that_changes_nothing_is_refused():
    check_image_size("digits", (8, 8), None)
    check_image_size("x", (16, 16), 16)
    check_image_size("mnist", (32, 32), 28)
    for size in ((8, 8), (16, 24), (28, 28)):
        with pytest.raises(InferFastError, match="--image-size 16 has no effect on digits, whose images are"):
            check_image_size("digits", size, 16)
