"""Settings beside others: what another one makes void is said, and what contradicts another one is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infer_fast.errors import InferFastError
from infer_fast.flags import Setting, settings_of
from infer_fast.ranges import Called, check, field_name


@dataclass(frozen=True)
class Rule:
    """The settings `names` of the dataclass `owner` have no effect where `other` has one of `values` (none named: has
    any value at all), unless `unless`, of the same dataclasses, has the value that is given with it."""

    owner: str
    names: str
    other: str
    values: tuple[Any, ...] = ()
    unless: tuple[str, Any] | None = None


NO_COMPENSATORS: dict[str, Any] = {"other": "compensators", "values": (0,), "unless": ("optimise", "images")}
RULES = (
    Rule("SynthesisSettings", "rho", "steps", (0,)),
    Rule("SynthesisSettings", "r_var first_bn_multiplier skip_bn", "r_bn", (0,)),
    Rule(
        "SynthesisSettings",
        "iterations batch_size lr r_bn r_var first_bn_multiplier jitter steps rho tv_l2 l2_scale skip_bn "
        "compensator_size",
        **NO_COMPENSATORS,
    ),
    Rule("DistillOptions", "lanes chunk ipc_start", **NO_COMPENSATORS),
    Rule("DistillOptions", "init_path", "start", ("noise",)),
    Rule("StoreSettings", "compensators", "optimise", ("images",)),
    Rule("StoreSettings", "quality", "codec", ("raw",)),
    Rule("StoreSettings", "label_top", "label_bits", ("float16", "uint8")),
    Rule("StudentSettings", "momentum", "optimizer", ("adamw",)),
    Rule("StudentSettings", "mix_alpha", "mix_type", ("none",)),
    Rule("StudentSettings", "padding", "crop", ("resized",)),
    Rule("StudentSettings", "cos", "lr_scheduler", ("steplr", "exponentiallr")),
    Rule("StudentSettings", "lr_step_size", "lr_scheduler", ("cosineannealinglr", "exponentiallr")),
    Rule("StudentSettings", "lr_gamma", "lr_scheduler", ("cosineannealinglr",)),
    Rule("StudentSettings", "lr_warmup_decay lr_warmup_method", "lr_warmup_epochs", (0,)),
    Rule(
        "SqueezeSettings",
        "epochs batch_size lr momentum weight_decay padding flip loader workers engine precision",
        "arch_path",
    ),
    Rule(
        "SqueezeSettings",
        "epochs batch_size lr momentum weight_decay padding flip loader workers engine precision",
        "arch_weights",
    ),
    Rule("SqueezeOptions", "arch_weights", "arch_path"),
    Rule("ValidateOptions", "arch_weights", "arch_path"),
    Rule("Recipe", "arch_weights", "arch_path"),
)


def void(options: Any, default: Any) -> list[str]:
    """A sentence for each rule by which settings that differ from `default`'s have no effect."""
    before = {setting.flag: setting.value for setting in settings_of(default)}
    every = list(settings_of(options))
    asked = [setting for setting in every if setting.flag in before and setting.value != before[setting.flag]]
    said = [_sentence(rule, every, asked) for rule in RULES]
    return [sentence for sentence in said if sentence]


def _sentence(rule: Rule, every: Sequence[Setting], asked: Sequence[Setting]) -> str:
    own = [setting.flag for setting in asked if setting.owner == rule.owner and setting.name in rule.names.split()]
    cause = next((setting for setting in every if setting.name == rule.other and _holds(rule, setting)), None)
    spared = rule.unless is not None and any((setting.name, setting.value) == rule.unless for setting in every)
    if not own or cause is None or spared:
        return ""
    has = "has" if len(own) == 1 else "have"
    shown = f" {cause.value}" if rule.values else ""
    return f"{', '.join(own)} {has} no effect with {cause.flag}{shown}."


def _holds(rule: Rule, setting: Setting) -> bool:
    return setting.value in rule.values if rule.values else setting.value not in (None, ())


def check_options(options: Any, called: Called = field_name) -> None:
    """Raises InferFastError for a setting out of its range (see infer_fast.ranges), or two that contradict each other.

    called: what the sentence calls a setting that is out of its range.
    """
    check(options, called)
    values = {setting.name: setting for setting in settings_of(options)}
    start, end = values.get("ipc_start"), values.get("ipc_end")
    if start is not None and end is not None and end.value is not None and start.value >= end.value:
        raise InferFastError(
            f"{start.flag} {start.value} is not before {end.flag} {end.value}: that leaves no task to solve."
        )
    held_out, given = values.get("held_out"), values.get("val_dir")
    if held_out is not None and given is not None and held_out.value and given.value is not None:
        raise InferFastError(
            f"{held_out.flag} judges on training images and {given.flag} on images of its own: choose one of them."
        )


def check_image_size(name: str, size: tuple[int, int], asked: int | None) -> None:
    """Raises InferFastError where --image-size was asked for, and dataset `name` is not resized: its images are `size`
    (H, W) whatever was asked for. (Images of 28x28 are padded to 32x32.)"""
    if asked is not None and size != (asked, asked) and (asked, size) != (28, (32, 32)):
        raise InferFastError(
            f"--image-size {asked} has no effect on {name}, whose images are {size[1]}x{size[0]}: it is for class "
            "folders and parquet files."
        )
