"""How a command behaves as a process: it ends well when it is told to stop, and goes on when nobody listens any more.

Nothing but the standard library is imported, for `python -m infer_fast.distill` begins with this file, before the
seconds that torch takes to be imported.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 10.0  # seconds from a signal to the end at any price, should a library swallow what it raises or not let go
UNTOUCHED = b"infer_fast: Stopped before the work began.\n"


class Stopped(KeyboardInterrupt):
    """The process was told to stop by the signal of this number."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__()
        self.number = number


def exit_code(stopped: KeyboardInterrupt) -> int:
    """What a shell would say of the signal: 130 for an interrupt, 143 for SIGTERM."""
    return 128 + (stopped.number if isinstance(stopped, Stopped) else signal.SIGINT)


def begin() -> None:
    """The first thing of `python -m infer_fast.NAME`: a signal ends it at once, for there is nothing to put in order
    yet, and no closed stream leaves its number to the next file that is opened. Elsewhere nothing happens.
    """
    if sys.argv[:1] != ["-m"] or not any(word.startswith("infer_fast.") for word in sys.orig_argv[1:]):
        return
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    _listen(_leave)


def _leave(number: int, _: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, UNTOUCHED)
    os._exit(128 + number)


def _listen(handler: Any) -> dict[int, Any]:
    """Hands the signals to `handler`, but for those that whoever started the process has it ignore; the former ones."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    former: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    for number, was in former.items():
        if was is not signal.SIG_IGN:
            signal.signal(number, handler)
    return former


@contextlib.contextmanager
def told_to_stop() -> Iterator[None]:
    """Inside it the first signal raises Stopped, and a second one ends the process, as does the first one's grace.

    Afterwards a command's own process pays no heed to signals: what it did is done, and it is about to end.
    """
    told = False

    def handler(number: int, _: FrameType | None) -> None:
        nonlocal told
        if told:
            os._exit(128 + number)
        told = True
        signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
        signal.setitimer(signal.ITIMER_REAL, GRACE)
        raise Stopped(number)

    former = _listen(handler)
    try:
        yield
    finally:
        if told:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, was in former.items():
            if was is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_IGN if was is _leave else was)


NOWHERE = Path(os.devnull).open("w")  # noqa: SIM115 (it stands for streams that are closed from the start)


class Output:
    """A text stream that can lose its reader, or know fewer letters than a text has, without an error.

    lost: why what is written goes nowhere any more (None: it arrives). A pipe whose reader left is no fault.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = NOWHERE if stream is None else stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Writes what the stream's encoding has, and the rest as escapes."""
        encoding = self.stream.encoding or "utf-8"
        with self._listened_to():
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered."""
        with self._listened_to():
            self.stream.flush()

    @contextlib.contextmanager
    def _listened_to(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self.lost is None and error.errno not in (errno.EPIPE, errno.EBADF):
                self.lost = error
            with contextlib.suppress(OSError, ValueError):  # what is buffered is not tried again when Python ends
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def forgiving_streams() -> Iterator[tuple[Output, Output]]:
    """Standard output and standard error as Outputs while it lasts, and flushed in the end."""
    former = sys.stdout, sys.stderr
    out, error = Output(former[0]), Output(former[1])
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, error)
    try:
        yield out, error
    finally:
        out.flush()
        error.flush()
        sys.stdout, sys.stderr = former
