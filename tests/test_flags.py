"""Every setting by its flag."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg

from infer_fast.flags import settings_of


@dataclass(frozen=True)
class Inner:
    rate: float | None = None
    pair: tuple[float, float] = (1.0, 2.0)
    how: tuple[Literal["a", "b"], ...] = ("a",)


@dataclass(frozen=True)
class Outer:
    inner: Annotated[Inner, arg(name="")] = field(default_factory=Inner)
    named_so: Inner = field(default_factory=Inner)
    count: Annotated[int, arg(name="number", aliases=["-n"])] = 3
    more_counts: Annotated[tuple[int, ...], arg(aliases=["-m"])] = ()


def test_settings_have_their_own_flags_before_those_of_nested_ones():
    flags = {setting.flag: setting for setting in settings_of(Outer())}
    assert list(flags) == [
        "--number", "--more-counts", "--rate", "--pair", "--how", "--named-so.rate", "--named-so.pair", "--named-so.how"
    ]  # fmt: skip
    assert (flags["--number"].owner, flags["--number"].name, flags["--number"].value) == ("Outer", "count", 3)


def test_what_values_a_setting_takes_is_read_off_its_type():
    flags = {setting.flag: setting for setting in settings_of(Outer())}
    assert flags["--rate"].kinds == (float, type(None)) and flags["--rate"].numeric and not flags["--rate"].whole
    assert flags["--more-counts"].whole and flags["--more-counts"].count is None
    assert flags["--pair"].count == 2 and flags["--pair"].values == (1.0, 2.0)
    assert flags["--how"].choices == ("a", "b") and not flags["--how"].numeric
    assert flags["--number"].values == (3,)
