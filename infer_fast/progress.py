"""One line of progress per stage: a live line with rate and time left in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

PLAIN_SECONDS = 15.0  # between two plain lines of one stage
LIVE_SECONDS = 0.1


class Stage:
    """A running stage: call advance() as work gets done and note() with what its line should end with."""

    def __init__(self, name: str, total: float, unit: str):
        self.name, self.total, self.unit = name, total, unit
        self.done, self.text = 0.0, ""
        self.began = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def advance(self, amount: float = 1) -> None:
        """Counts `amount` more units as done."""
        self.done += amount
        now = time.monotonic()
        if now - self.shown >= (LIVE_SECONDS if self.live else PLAIN_SECONDS):
            self.shown = now
            self._show(f"{self._rate()}, {_duration(self._left())} left")

    def note(self, text: str) -> None:
        """What the stage's last line ends with, such as an accuracy."""
        self.text = text

    def finish(self) -> None:
        """The stage's last line: what was done and how long it took."""
        took = f"in {_duration(time.monotonic() - self.began)}"
        self._show(", ".join(part for part in (took, self.text) if part), last=True)

    def _rate(self) -> str:
        return f"{self.done / max(time.monotonic() - self.began, 1e-9):.3g} {self.unit}/s"

    def _left(self) -> float:
        spent = time.monotonic() - self.began
        return spent * (self.total - self.done) / max(self.done, 1e-9)

    def _show(self, tail: str, last: bool = False) -> None:
        line = f"{self.name}: {self.done:.0f}/{self.total:.0f} {self.unit}, {tail}"
        if not self.live:
            print(line, file=sys.stderr, flush=True)
            return
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        console.print(f"\r\x1b[2K{line}"[: console.width + 5], end="\n" if last else "", markup=False, soft_wrap=True)


@contextmanager
def stage(name: str, total: float, unit: str) -> Iterator[Stage]:
    """A stage of `total` units; its last line is printed when the block ends without an error."""
    running = Stage(name, total, unit)
    yield running
    running.finish()


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
