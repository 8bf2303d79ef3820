"""The range of every number that a user can set: the only place that says what is allowed.

The command lines check what they parsed, the stages check what they are given. NaN and infinity are in no range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from infer_fast.errors import InferFastError
from infer_fast.flags import Setting, settings_of

MANY = 1_000_000  # more than anybody wants, and few enough to be counted at once


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; without the ends themselves where open_low or open_high says so."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: Any) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:,}" if self.open_low else f"from {self.low:,}"
        return f"{low} to below {self.high:,}" if self.open_high else f"{low} to {self.high:,}"


# By the names of the fields, which mean one thing wherever they stand.
RANGES = {
    # squeeze and students
    "epochs": Range(1, MANY),
    "batch_size": Range(1, MANY),
    "lr": Range(0, MANY, open_low=True),
    "momentum": Range(0, 1, open_high=True),  # with 1 nothing is ever forgotten
    "weight_decay": Range(0, MANY),
    "padding": Range(0, 4096),
    "workers": Range(1, 1024),
    "lr_step_size": Range(1, MANY),
    "lr_gamma": Range(0, 1, open_low=True),  # with more the rate would rise
    "lr_warmup_epochs": Range(0, MANY),
    "lr_warmup_decay": Range(0, 1),
    "temperature": Range(0.01, 10_000),  # logits are divided by it, in float32
    "mix_alpha": Range(0, 10_000),  # 0: nothing is mixed
    "seeds": Range(1, 10_000),
    "seed": Range(0, 2**63 - 1),  # 64 bits with a sign, which every generator takes
    # synthesis
    "iterations": Range(1, MANY),
    "r_bn": Range(0, MANY),
    "r_var": Range(0, MANY),
    "first_bn_multiplier": Range(0, MANY),
    "jitter": Range(0, 4096),
    "steps": Range(0, 10_000),
    "rho": Range(0, MANY),
    "tv_l2": Range(0, MANY),
    "l2_scale": Range(0, MANY),
    "skip_bn": Range(0, 10_000),
    "mean": Range(0, 1),
    "std": Range(0, 1, open_low=True),  # pixels are divided by it
    "compensator_size": Range(1, 4096),
    # what is stored
    "ipc": Range(1, MANY),
    "quality": Range(0, 100),
    "label_top": Range(1, MANY),
    "label_truth": Range(0, 1, open_high=True),
    "compensators": Range(0, MANY),
    # where and how it runs
    "image_size": Range(1, 4096),
    "held_out": Range(0, 10**9),
    "M": Range(0, 1000),
    "ipc_start": Range(0, MANY),
    "ipc_end": Range(1, MANY),
    "lanes": Range(1, MANY),
    "chunk": Range(1, MANY),
}
NEVER_EMPTY = {"networks", "labels"}  # tuples that name at least one thing

Called = Callable[[Setting], str]


def field_name(setting: Setting) -> str:
    """What Python calls a setting."""
    return f"{setting.owner}.{setting.name}"


def flag(setting: Setting) -> str:
    """What the command line calls a setting."""
    return setting.flag


def check(settings: Any, called: Called = field_name) -> None:
    """Every setting of a dataclass, nested ones too, against its range or its choices.

    called: what the sentence calls it. Raises InferFastError for the first that is out of its range, of another type,
    or none of its choices.
    """
    for setting in settings_of(settings):
        if setting.numeric and setting.name in RANGES:  # benchmarks add numbers of their own
            for value in setting.values:
                if not (value is None and type(None) in setting.kinds):
                    _check_number(called(setting), setting.name, value, setting.whole)
        elif setting.choices:
            for value in setting.values:
                _check_choice(called(setting), value, setting.choices)
        _check_length(called(setting), setting)


def check_counts(**counts: int | None) -> None:
    """Whole numbers that are no dataclass's, by the names that RANGES knows. None is not looked at.

    Raises InferFastError for the first that is out of its range.
    """
    for name, value in counts.items():
        if value is not None:
            _check_number(name, name, value, whole=True)


def _check_number(called: str, name: str, value: Any, whole: bool) -> None:
    kind, allowed = (Integral, "a whole number") if whole else (Real, "a number")
    if isinstance(value, bool) or not isinstance(value, kind) or value not in RANGES[name]:
        raise InferFastError(f"{called} is {_given(value)}: it must be {allowed} {RANGES[name]}.")


def _check_choice(called: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise InferFastError(f"{called} is {value!r:.60}: choose one of {', '.join(map(str, choices))}.")


def _check_length(called: str, setting: Setting) -> None:
    if not isinstance(setting.value, tuple):
        return
    if setting.count is not None and len(setting.value) != setting.count:
        raise InferFastError(f"{called} has {len(setting.value)} values: it must have {setting.count}.")
    if setting.name in NEVER_EMPTY and not setting.value:
        raise InferFastError(f"{called} is empty: give at least one.")


def _given(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to write out the longest
        return f"a number of more than {int(value.bit_length() * math.log10(2))} digits"
    return f"{value!r:.60}"
