"""Files that are whole or not there."""

import errno
import os
import resource
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from infer_fast.errors import DiskError, InferFastError
from infer_fast.files import (
    file_hash,
    read_json,
    read_json_as,
    read_tensors,
    sweep,
    write_atomically,
    write_json,
    write_tensors,
)


def test_tensors_and_card_come_back(tmp_path, generator):
    tensors = {"b": torch.randn(3, 4, generator=generator), "a": torch.arange(5, dtype=torch.uint8)}
    write_tensors(tmp_path / "deep" / "x.safetensors", tensors, {"z": 1, "a": [2]})
    found, card = read_tensors(tmp_path / "deep" / "x.safetensors")
    assert card == {"z": 1, "a": [2]} and all(torch.equal(found[k], v) for k, v in tensors.items())


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name, order in (("one", "abcd"), ("two", "dcba")):
        write_tensors(tmp_path / name, {k: torch.full((2,), float(ord(k))) for k in order}, {"k": order == order})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_failing_writer_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": True})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskError, match="disk is full"):
        write_atomically(path, fail)
    assert read_json(path) == {"old": True} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.slow
def test_a_real_write_error_is_one_sentence(tmp_path):
    """The operating system itself refuses: files of this process may have 1000 bytes at most."""
    program = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from infer_fast.files import write_tensors\n"
        "from infer_fast.errors import DiskError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    write_tensors(Path(sys.argv[1]), {'a': torch.zeros(10000)})\n"
        "except DiskError as error:\n"
        "    print('DiskError:', error)\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "x"], capture_output=True, text=True, check=False)
    assert "DiskError" in done.stdout and "can't be written" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_errors(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.zeros(1000)})
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-50])
    with pytest.raises(InferFastError, match="x is damaged"):
        read_tensors(tmp_path / "x")
    (tmp_path / "c.json").write_text('{"a": ')
    with pytest.raises(InferFastError, match=r"c.json is damaged"):
        read_json(tmp_path / "c.json")
    with pytest.raises(InferFastError, match="does not exist"):
        read_tensors(tmp_path / "none")


@pytest.mark.parametrize("mask", [0o002, 0o027, 0o077])
def test_files_may_be_read_by_whom_the_umask_says(tmp_path, mask):
    former = os.umask(mask)
    try:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(former)
    assert [p.stat().st_mode & 0o777 for p in tmp_path.iterdir()] == [0o666 & ~mask] * 2


def test_a_file_that_holds_just_this_is_left_as_it_is(tmp_path, generator):
    tensors = {"a": torch.randn(7, 3, generator=generator), "b": torch.tensor([float("nan"), 0.0])}
    path = tmp_path / "x.safetensors"
    for card in (None, {"k": 1}):
        write_tensors(path, tensors, card)
        before = path.stat().st_ino, path.stat().st_mtime_ns
        announced = []
        write_tensors(path, tensors, card, announced.append)
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == before and announced == []
    for changed in ({**tensors, "a": -tensors["a"]}, {**tensors, "b": torch.tensor([float("nan"), -0.0])}):
        write_tensors(path, changed, {"k": 1}, announced.append)
        assert announced.pop() == file_hash(path)
        assert torch.equal(read_tensors(path)[0]["a"], changed["a"])
    write_json(tmp_path / "x.json", {"a": 1})
    before = (tmp_path / "x.json").stat().st_ino
    write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "x.json").stat().st_ino == before


KILLED = """
import sys, time
from pathlib import Path
from infer_fast.files import write_atomically
def write(temporary):
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
write_atomically(Path(sys.argv[1]), write)
"""


@pytest.mark.slow
def test_what_a_killed_run_was_writing_is_swept_and_what_a_live_one_writes_is_not(tmp_path):
    live, killed = (
        subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / name / "x"], stdout=subprocess.PIPE, text=True)
        for name in ("live", "killed")
    )
    assert live.stdout.readline() == killed.stdout.readline() == "writing\n"
    killed.kill()
    killed.wait()
    (tmp_path / ".y.123.tmp").write_text("of a version that wrote single files")
    assert len(list(tmp_path.rglob(".*.tmp"))) == 3
    sweep(tmp_path)
    assert [p.parent.name for p in tmp_path.rglob(".*.tmp")] == ["live"]
    live.kill()
    live.wait()
    write_json(tmp_path / "live" / "z", {})  # the next write to a folder sweeps it
    assert list(tmp_path.rglob(".*.tmp")) == []


def test_an_interrupted_writer_leaves_no_litter(tmp_path):
    def interrupted(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", interrupted)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Said:
    number: float
    text: str


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"number": NaN, "text": ""}', "number is nan, expected a finite number"),
        ('{"number": -Infinity, "text": ""}', "number is -inf, expected a finite number"),
        ('{"number": 1e999, "text": ""}', "number is inf, expected a finite number"),
        ('{"number": 1, "text": "\\ud800"}', "no text that can be written as UTF-8"),
        ("[" * 100000, "is damaged and can't be read"),
        ('{"number": ' + "9" * 5000 + "}", "is damaged and can't be read"),
        ('{"number": ' + "9" * 400 + ', "text": ""}', "number is 99999"),
    ],
)
def test_numbers_and_texts_that_are_none_are_refused(tmp_path, content, words):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InferFastError, match=words):
        read_json_as(tmp_path / "x.json", Said)
