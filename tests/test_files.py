"""Files that are whole or not there."""

import errno
import resource
import subprocess
import sys

import pytest
import torch

from infer_fast.errors import DiskError, InferFastError
from infer_fast.files import read_json, read_tensors, write_atomically, write_json, write_tensors


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
