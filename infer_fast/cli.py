"""What the command-line modules share: recipe and flags, exit codes, one sentence instead of a traceback.

Exit 0: done; 2: bad usage; 130 or 143: told to stop, by an interrupt or SIGTERM; 1: anything else.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import tyro

from infer_fast.errors import InferFastError, InferFastWarning, out_of_memory
from infer_fast.ops.backend import native
from infer_fast.process import exit_code, forgiving_streams, told_to_stop
from infer_fast.ranges import flag
from infer_fast.recipes import RECIPES
from infer_fast.settings import Recipe
from infer_fast.void import check_options, void

THREADS_PER_CORE = 4
Options = TypeVar("Options")


def take_recipe(args: list[str]) -> tuple[str, Recipe, list[str]]:
    """Splits [RECIPE] off the arguments: (name, recipe, the flags). Exits with 2 on a name that is no recipe."""
    if not args or args[0].startswith("-"):
        return "digits", RECIPES["digits"], args
    if args[0] not in RECIPES:
        print(f"{args[0]!r} is not a recipe: choose one of {', '.join(RECIPES)}.", file=sys.stderr)
        raise SystemExit(2)
    return args[0], RECIPES[args[0]], args[1:]


def glance(kind: type[Options], args: list[str], prog: str) -> Options:
    """Those of the flags that `kind` has (every field with a default), needed before the rest can be parsed."""
    asked = [word for word in args if word not in ("-h", "--help")]  # for all flags, not for these alone
    known, _ = tyro.cli(kind, args=asked, prog=prog, return_unknown_args=True)
    return known


def parse(kind: type[Options], default: Options, args: list[str], prog: str, description: str) -> Options:
    """The flags as a typed dataclass; hyphens and underscores alike. Exits with 0 on --help, 2 on bad usage: a number
    out of its range too. Notes on standard error which settings another one makes void.
    """
    options = tyro.cli(kind, args=args, default=default, prog=prog, description=description)
    try:
        check_options(options, flag)
    except InferFastError as error:
        print(f"infer_fast: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    for sentence in void(options, default):
        print(f"note: {sentence}", file=sys.stderr)
    return options


def device() -> torch.device:
    """The device stages run on: the first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(job: Callable[[list[str]], None], args: list[str] | None = None) -> int:
    """Runs `job(args)` and turns what it raises into an exit code and one sentence on standard error.

    It can be told to stop at any moment, and goes on when nobody reads what it prints.
    """
    args = sys.argv[1:] if args is None else args
    try:
        with forgiving_streams() as (output, _), told_to_stop():
            code = _attempt(job, args)
            output.flush()
            if output.lost is not None and code == 0:
                return _fail(f"All is done, but what was printed is lost: {output.lost.strerror}.", args)
            return code
    except KeyboardInterrupt as stopped:  # which can come while the streams are put back, too
        return exit_code(stopped)


def _attempt(job: Callable[[list[str]], None], args: list[str]) -> int:
    """The exit code of `job(args)`, what it raised said."""
    warnings.showwarning = partial(_show_warning, warnings.showwarning)
    _bound_threads()
    if (backend := native()) is not None:
        backend.keep_freed_memory()
    try:
        job([a for a in args if a != "--debug"])
    except KeyboardInterrupt as stopped:
        _fail("Stopped; what was finished is kept: run the same command again to go on.", args)
        return exit_code(stopped)
    except Exception as error:
        return _fail(_sentence(error), args)
    return 0


def _bound_threads() -> None:
    """No more threads than a few for each core: the system may not even give as many as OMP_NUM_THREADS can say."""
    most = THREADS_PER_CORE * (os.cpu_count() or 1)
    if torch.get_num_threads() > most:
        torch.set_num_threads(most)
        warnings.warn(f"More threads than {most} were asked for: {most} are used.", InferFastWarning, 2)


def _show_warning(show: Callable, message: Warning | str, category: type[Warning], *rest: object) -> None:
    """Our own warnings are one line, like our errors; others look as they always do."""
    if issubclass(category, InferFastWarning):
        print(f"infer_fast: {_one_line(str(message))}", file=sys.stderr)
    else:
        show(message, category, *rest)


def _fail(sentence: str, args: list[str]) -> int:
    if "--debug" in args:
        traceback.print_exc()
    print(f"infer_fast: {_one_line(sentence)}", file=sys.stderr)
    return 1


def _one_line(text: str) -> str:
    """Without what a terminal would obey, such as a name in a file of somebody else can have."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _sentence(error: Exception) -> str:
    if isinstance(error, InferFastError):
        return str(error)
    if out_of_memory(error):
        return "Not enough memory: lower --lanes or the batch sizes, or use smaller images."
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename or 'no file'})."
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"Unexpected {type(error).__name__}: {first} (run again with --debug for the traceback)."
