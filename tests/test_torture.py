"""Bad input by rules, of which the hostile cards are run here; `make torture` runs all."""

import contextlib
import importlib
import io
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from infer_fast import cli
from tests.conftest import SEED
from tests.torture import SMALL, Ended, every_case, run, standing_in


@pytest.fixture(scope="module")
def run_to_copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torture")
    with standing_in(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert cli.run(importlib.import_module("infer_fast.distill")._main, list(SMALL)) == 0
    return folder


@pytest.mark.slow
def test_there_are_hundreds_of_cases_and_a_few_of_a_strangers_end_well(run_to_copy):
    cases = every_case()
    assert len(cases) > 400 and max(Counter(case.name for case in cases).values()) == 1
    hostile = [case for case in cases if ": card " in case.name]
    for case in Random(SEED).sample(hostile, 30):
        ended = run(case, run_to_copy)
        assert ended.fault(case.said) is None, (case.name, ended)


def test_what_would_be_wrong_is_noticed():
    good = Ended(1, "", "infer_fast: One sentence.\n")
    assert good.fault(False) is None and Ended(0, "", "infer_fast: Said.\n").fault(True) is None
    for ended in (
        Ended(0, "", ""), Ended(0, "", "infer_fast: Said.\n"), Ended(None, "", ""), Ended(1, "", ""),
        Ended(1, "", "infer_fast: Unexpected KeyError: x.\n"), Ended(130, "", "infer_fast: Stopped.\n"),
        Ended(1, "", "infer_fast: One.\ninfer_fast: Two.\n"), Ended(1, "", "Traceback (most recent call last):\n"),
    ):  # fmt: skip
        assert ended.fault(False) is not None
