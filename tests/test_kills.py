"""The same command ends with the same bytes: killed, beside another run, on other numbers of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infer_fast
from infer_fast.files import read_tensors


@pytest.mark.slow
def test_runs_that_are_killed_end_with_the_same_bytes_and_two_at_once_lose_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.kills", "--kills=6", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{stage}: " in done.stdout for stage in ("squeeze", "import", "synthesis", "labelling", "students"))


@pytest.mark.slow
def test_threads_change_the_rounding_alone_and_nothing_that_is_finished(tmp_path, run_module, finished, small_flags):
    """The same command on one and on two threads, with the same teachers; then the other one goes on in its folder."""
    folders = {}
    for threads in (1, 2):
        root = tmp_path / f"threads-{threads}"
        root.mkdir()
        (root / "teachers").symlink_to(finished[0] / "runs" / "teachers")
        folders[threads] = root / "digits"
        done = on_threads(threads, tmp_path, small_flags, root)
        assert done.returncode == 0, done.stderr
    one, two = (infer_fast.load(folder) for folder in folders.values())
    assert torch.equal(one.base, two.base)
    for a, b in zip(*(sorted(folder.glob("tasks/*/*")) for folder in folders.values()), strict=True):
        assert a.name == b.name and a.parent.name == b.parent.name
        alone, together = (read_tensors(path)[0]["optimised"] for path in (a, b))
        assert (alone - together).norm() <= 1e-4 * alone.norm()
    before = {path: path.read_bytes() for path in folders[1].rglob("*") if path.is_file()}
    assert on_threads(2, tmp_path, small_flags, folders[1].parent).returncode == 0
    after = {path: path.read_bytes() for path in folders[1].rglob("*") if path.is_file()}
    assert {p for p in before if after.get(p) != before[p]} <= {folders[1] / "card.json"} and set(after) == set(before)


def on_threads(threads, place, flags, root):
    command = [sys.executable, "-m", "infer_fast.distill", *flags, "--compare=none", "--syn-data-path", str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
