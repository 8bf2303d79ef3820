"""Checkpoints of others: every usual wrapping loads, everything else is one clear error."""

import os

import pytest
import torch
from safetensors.torch import save_file

from infer_fast.errors import InferFastError
from infer_fast.models import build
from infer_fast.models.checkpoint import load_checkpoint


def saved(path, value):
    torch.save(value, path)
    return path


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"net": {f"module.{k}": v for k, v in s.items()}, "acc": 0.5},
        lambda s: {"model": {"state_dict": {f"_orig_mod.module.{k}": v for k, v in s.items()}}},
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    ],
)
def test_usual_wrappings_load(tmp_path, wrap):
    source = build("convnet", 4, (8, 8), seed=1)
    target = build("convnet", 4, (8, 8), seed=2)
    load_checkpoint(target, saved(tmp_path / "c.pth", wrap(source.state_dict())))
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


def test_safetensors_load(tmp_path):
    source, target = build("convnet", 4, (8, 8), seed=1), build("convnet", 4, (8, 8), seed=2)
    save_file(source.state_dict(), tmp_path / "c.safetensors")
    assert len(load_checkpoint(target, tmp_path / "c.safetensors")) == 64
    assert torch.equal(source.classifier.weight, target.classifier.weight)


def test_what_does_not_fit_is_named(tmp_path):
    target = build("convnet", 4, (8, 8))
    before = target.classifier.weight.clone()
    other_classes = saved(tmp_path / "a.pth", build("convnet", 5, (8, 8)).state_dict())
    with pytest.raises(InferFastError, match=r"classifier.weight is \(5, 128\), expected \(4, 128\)"):
        load_checkpoint(target, other_classes)
    other_network = saved(tmp_path / "b.pth", build("resnet18", 4, (8, 8)).state_dict())
    with pytest.raises(InferFastError, match="missing"):
        load_checkpoint(target, other_network)
    with pytest.raises(InferFastError, match="does not exist"):
        load_checkpoint(target, tmp_path / "none.pth")
    with pytest.raises(InferFastError, match="no state dict"):
        load_checkpoint(target, saved(tmp_path / "d.pth", {"epoch": 3}))
    assert torch.equal(target.classifier.weight, before)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    path = saved(tmp_path / "evil.pth", {"state_dict": Malicious(str(tmp_path / "ran"))})
    with pytest.raises(InferFastError, match="could run code"):
        load_checkpoint(build("convnet", 4, (8, 8)), path)
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_errors(tmp_path):
    whole = saved(tmp_path / "c.pth", build("convnet", 4, (8, 8)).state_dict()).read_bytes()
    for name, content in {
        "cut.pth": whole[: len(whole) // 2],
        "text.pth": b"hello",
        "cut.safetensors": b"\x00" * 40,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InferFastError, match=name):
            load_checkpoint(build("convnet", 4, (8, 8)), tmp_path / name)
