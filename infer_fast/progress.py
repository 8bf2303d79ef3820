"""One line of progress per stage: a live bar with rate and time left in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 15.0  # between two plain lines of one stage
LIVE_SECONDS = 0.1


class Stage:
    """A running stage: call advance() as work gets done and note() with what its line should end with.

    bar: where it is shown live, or None.
    """

    def __init__(self, name: str, total: float, unit: str, bar: Progress | None = None):
        self.name, self.total, self.unit = name, total, unit
        self.done, self.text = 0.0, ""
        self.began = self.shown = time.monotonic()
        self.bar = bar
        self.task = None if bar is None else bar.add_task(name, total=total, unit=unit, rate="")

    def advance(self, amount: float = 1) -> None:
        """Counts `amount` more units as done."""
        self.done += amount
        now = time.monotonic()
        if now - self.shown < (LIVE_SECONDS if self.bar is not None else PLAIN_SECONDS):
            return
        self.shown = now
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, rate=self._rate())
        else:
            self._print(f"{self._rate()}, {_duration(self._left())} left")

    def note(self, text: str) -> None:
        """What the stage's last line ends with, such as an accuracy."""
        self.text = text

    def finish(self) -> None:
        """The stage's last line: what was done and how long it took."""
        took = f"in {_duration(time.monotonic() - self.began)}"
        self._print(", ".join(part for part in (took, self.text) if part))

    def _rate(self) -> str:
        return f"{self.done / max(time.monotonic() - self.began, 1e-9):.3g} {self.unit}/s"

    def _left(self) -> float:
        spent = time.monotonic() - self.began
        return spent * (self.total - self.done) / max(self.done, 1e-9)

    def _print(self, tail: str) -> None:
        line = f"{self.name}: {self.done:.0f}/{self.total:.0f} {self.unit}, {tail}"
        print(line, file=sys.stderr, flush=True)


@contextmanager
def stage(name: str, total: float, unit: str) -> Iterator[Stage]:
    """A stage of `total` units; its last line is printed when the block ends without an error."""
    bar = _bar() if sys.stderr.isatty() else None
    with bar or nullcontext():
        running = Stage(name, total, unit, bar)
        yield running
    running.finish()


def _bar() -> Progress:
    """A bar that is gone when its stage ends: the last line stays in its place."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}", markup=False),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )


class Clock:
    """Seconds that each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what runs inside it."""
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
