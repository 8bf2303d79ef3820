"""One line per stage."""

import os
import pty
import subprocess
import sys

from infer_fast import progress


def test_plain_lines_have_rate_time_left_and_a_last_line(capsys, monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with progress.stage("solve", 4, "tasks") as running:
        for _ in range(4):
            running.advance()
        running.note("done well")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("solve: 4/4 tasks, in") and lines[-1].endswith("done well")
    assert any("tasks/s" in line and "left" in line for line in lines[:-1])


LIVE = """
import time
from infer_fast import progress
with progress.stage("solve", 30, "tasks") as running:
    for _ in range(30):
        time.sleep(0.03)
        running.advance()
    running.note("done well")
"""


def test_a_terminal_shows_one_line_that_is_written_over_and_a_last_one_that_stays():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", LIVE], stderr=theirs, stdin=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so when the other side is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    text = shown.decode()
    assert "tasks/s" in text and text.count("\x1b[2K") >= 3  # the line is cleared and written again
    last = text.splitlines()[-1]
    assert "solve: 30/30 tasks, in" in last and last.endswith("done well")
    assert text.count("\n") <= 3, "every refresh began a line of its own"


def test_a_stage_that_fails_prints_no_last_line(capsys):
    try:
        with progress.stage("solve", 4, "tasks"):
            raise ValueError
    except ValueError:
        pass
    assert capsys.readouterr().err == ""
