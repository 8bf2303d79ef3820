"""Commands as processes: told to stop at any moment, without readers, without letters."""

import os
import signal
import subprocess
import sys
import time
from random import Random

import pytest

from infer_fast import cli
from infer_fast.process import Output
from tests.conftest import SEED

HEAD = [sys.executable, "-m", "infer_fast.distill", "--list"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_imports_ends_with_one_sentence(number, code):
    """At random moments; Python itself takes the first hundredth of a second to get to our first line."""
    random = Random(SEED)
    for _ in range(4):
        process = subprocess.Popen(HEAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(random.uniform(0.15, 0.9))
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == code, error
        assert error.startswith("infer_fast: Stopped") and error.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_work_ends_with_one_sentence_and_puts_the_handlers_back(capsys, number, code):
    former = signal.getsignal(number)

    def job(_):
        os.kill(os.getpid(), number)
        time.sleep(60)

    assert cli.run(job, []) == code
    assert capsys.readouterr().err.startswith("infer_fast: Stopped; what was finished is kept")
    assert signal.getsignal(number) == former and signal.getitimer(signal.ITIMER_REAL)[0] == 0


SWALLOWED = """
import os, signal, time
from infer_fast import cli, process
process.GRACE = 0.2
def job(_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except BaseException:
        pass
    time.sleep(60)
cli.run(job, [])
"""


@pytest.mark.slow
def test_a_library_that_swallows_the_interrupt_does_not_keep_the_process_alive():
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, timeout=50, check=False)
    assert done.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["| head -1", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_nobody_reads_end_well(tmp_path, ending):
    command = f"set -o pipefail; {' '.join(HEAD)} {ending}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.slow
def test_a_full_device_is_said(tmp_path):
    command = f"{' '.join(HEAD)} > /dev/full"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "infer_fast: All is done, but what was printed is lost: No space left on device.\n"


def test_letters_that_a_terminal_does_not_know_are_escaped(tmp_path):
    for encoding, expected in (("ascii", b"1 \\xb1 2 \\udc80"), ("latin-1", b"1 \xb1 2 \\udc80")):
        with (tmp_path / encoding).open("w", encoding=encoding) as stream:
            assert Output(stream).write("1 ± 2 \udc80") == 7
        assert (tmp_path / encoding).read_bytes() == expected


def test_what_a_terminal_would_obey_is_shown_and_not_sent(capsys):
    def job(_):
        raise FileNotFoundError(2, "No such file", "a\x1b[2J\nb")

    assert cli.run(job, []) == 1
    assert capsys.readouterr().err == "infer_fast: No such file (a\\x1b[2J\\nb).\n"
