"""A function in a process of its own, so that each way of doing a thing can be timed as its users run it.

    with Apart() as published:
        published.make(build_it, *arguments)        # in that process: function = build_it(*arguments)
        measure.in_turns({"published": published.milliseconds, "ours": ...}, rounds=9, each=3)

The process keeps the C library's way with freed memory: that of the published scripts, which set nothing.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench import measure


class Apart:
    """A child process that makes a function and times it when asked. Raises RuntimeError with what went wrong there."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, torch.get_num_threads()), daemon=True)
        self._process.start()
        there.close()

    def make(self, build: Callable[..., Callable[[], object]], *arguments: object) -> None:
        self._ask((build, arguments))

    def milliseconds(self, times: int) -> list[float]:
        """As measure.milliseconds, of the function that was made last."""
        return self._ask(times)

    def _ask(self, message: object) -> Any:
        self._here.send(message)
        try:
            answer = self._here.recv()
        except EOFError:
            raise RuntimeError("the process that was timed has died") from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"in the process that was timed: {answer}") from answer
        return answer

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self._here.close()
        self._process.join()


def _serve(pipe: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    function: Callable[[], object] | None = None
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        try:
            if isinstance(message, int):
                if function is None:
                    raise RuntimeError("nothing was made that could be timed")
                pipe.send(measure.milliseconds(function, message))
            else:
                build, arguments = message
                function = build(*arguments)
                pipe.send(None)
        except Exception as error:
            pipe.send(error)
