"""One line per stage."""

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


def test_a_stage_that_fails_prints_no_last_line(capsys):
    try:
        with progress.stage("solve", 4, "tasks"):
            raise ValueError
    except ValueError:
        pass
    assert capsys.readouterr().err == ""
