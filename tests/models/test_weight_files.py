"""Files are called what they are, read by their content, and run no code."""

import argparse
import collections
import gzip
import os
import pathlib
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from infer_fast.errors import InferFastError, InferFastWarning
from infer_fast.models.weight_files import read_file

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.count": torch.tensor(3)}


def saved(path, value, **how):
    torch.save(value, path, **how)
    return path


def scripted(path):
    with pytest.warns(FutureWarning):
        torch.jit.script(nn.Linear(2, 2)).save(str(path))


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "x")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: p.write_text("<!DOCTYPE html><html>quota exceeded</html>"), "is a web page"),
        (lambda p: p.write_text("\n  <html>"), "is a web page"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "git lfs pull"),
        (lambda p: p.write_text('{"error": "not found"}'), "is JSON text"),
        (lambda p: p.write_bytes(gzip.compress(b"weights")), "is compressed: unpack it"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "is an HDF5 file"),
        (lambda p: np.save(p.open("wb"), np.zeros(3)), "is a NumPy array"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(bytes(100)), "is not a whole checkpoint"),
        (lambda p: p.write_text("hello"), "is not a whole checkpoint"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: None, "does not exist"),
        (scripted, "is TorchScript"),
        (zipped, "is a zip archive without a checkpoint"),
        (lambda p: saved(p, nn.Linear(2, 2)), r"holds more than weights \(torch.nn.modules.linear.Linear\)"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, recwarn, suffix, write, words):
    path = tmp_path / f"c{suffix}"
    write(path)
    with pytest.raises(InferFastError, match=words) as caught:
        read_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_files_kind_is_told_by_its_content(tmp_path, legacy):
    torch_file = saved(tmp_path / "a.safetensors", STATE, _use_new_zipfile_serialization=not legacy)
    save_file(STATE, tmp_path / "b.pth", metadata={"epoch": "3"})
    for path, kind in ((torch_file, "torch"), (tmp_path / "b.pth", "safetensors")):
        with pytest.warns(InferFastWarning, match=f"is a {kind} file under another name"):
            loaded, texts = read_file(path)
        assert loaded.keys() == STATE.keys() and torch.equal(loaded["a.weight"], STATE["a.weight"])
        assert texts == ({"epoch": "3"} if kind == "safetensors" else {})


@pytest.mark.parametrize(
    "beside",
    [
        np.float64(93.5), np.float32(1.5), np.int64(3), np.bool_(True), np.arange(3), pathlib.Path("a/b"), {1, 2},
        argparse.Namespace(lr=0.1, out=pathlib.Path("x")), collections.defaultdict(float),
        collections.defaultdict(list, {"loss": [1.0]}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_nothing_but_data_may_stand_beside_the_weights(tmp_path, beside, legacy):
    path = saved(tmp_path / "c.pth", {"net": STATE, "beside": beside}, _use_new_zipfile_serialization=not legacy)
    loaded, _ = read_file(path)
    assert np.array_equal(loaded["beside"], beside) if isinstance(beside, np.ndarray) else loaded["beside"] == beside


class Malicious:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, exec, open, getattr, print])
@pytest.mark.parametrize(
    "wrap", [lambda o: o, lambda o: argparse.Namespace(a=o), lambda o: collections.defaultdict(list, a=o)]
)
def test_code_is_never_run(tmp_path, function, wrap):
    target = tmp_path / "ran"
    argument = {eval: f"open({str(target)!r}, 'w')", exec: f"open({str(target)!r}, 'w')", os.system: f"touch {target}"}
    path = saved(
        tmp_path / "evil.pth", {"net": STATE, "x": wrap(Malicious(function, argument.get(function, str(target))))}
    )
    with pytest.raises(InferFastError, match="could run code"):
        read_file(path)
    assert not target.exists()


def test_any_cut_or_changed_byte_is_read_or_one_sentence(tmp_path, generator):
    """Torch files old and new, and safetensors: cut at random, and with random bytes changed."""
    saved(tmp_path / "new.pth", STATE)
    saved(tmp_path / "old.pth", STATE, _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "s.safetensors")
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for _ in range(60):
            at = int(torch.randint(0, len(whole), (1,), generator=generator))
            byte = int(torch.randint(1, 256, (1,), generator=generator))
            for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ byte]) + whole[at + 1 :]):
                path.write_bytes(damaged)
                try:
                    read_file(path)
                except InferFastError as error:
                    assert "\n" not in str(error)
