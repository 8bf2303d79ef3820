"""Exit codes and sentences."""

import os
import warnings

import pytest
import torch

from infer_fast import cli
from infer_fast.errors import InferFastError
from infer_fast.recipes import RECIPES


def fail(error):
    def job(_):
        raise error

    return job


def out_of_memory(_):
    torch.empty(2**47)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (fail(InferFastError("Do this.")), "infer_fast: Do this."),
        (fail(MemoryError()), "Not enough memory"),
        (out_of_memory, "Not enough memory"),
        (fail(PermissionError(13, "Permission denied", "/x")), "Permission denied (/x)"),
        (fail(ZeroDivisionError("why")), "Unexpected ZeroDivisionError: why"),
    ],
)
def test_errors_are_one_sentence_and_exit_1(capsys, job, words):
    assert cli.run(job, []) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert cli.run(job, ["--debug"]) == 1 and "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_one_sentence_and_exit_130(capsys):
    assert cli.run(fail(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == (
        "infer_fast: Stopped; what was finished is kept: run the same command again to go on.\n"
    )


def test_success_is_0_and_debug_is_not_passed_on(capsys):
    seen = []
    assert cli.run(seen.extend, ["--a", "--debug"]) == 0 and seen == ["--a"]


def test_recipes_by_name():
    assert cli.take_recipe(["--ipc", "3"]) == ("digits", RECIPES["digits"], ["--ipc", "3"])
    assert cli.take_recipe(["fashion-mnist", "--ipc", "3"])[0] == "fashion-mnist"
    with pytest.raises(SystemExit) as stop:
        cli.take_recipe(["fashion"])
    assert stop.value.code == 2


def test_threads_are_bounded_by_the_cores(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100_000)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    assert cli.run(lambda _: None, []) == 0
    assert asked == [4 * os.cpu_count()] and "More threads than" in capsys.readouterr().err
