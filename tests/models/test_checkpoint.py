"""Checkpoints of others: every usual wrapping loads, everything else is one clear error."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from infer_fast.errors import InferFastError
from infer_fast.extras import PIP, installed
from infer_fast.models import build
from infer_fast.models.checkpoint import load_checkpoint, load_pretrained, load_state, recorded

from .published import NETWORKS, Weights


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
        lambda s: {f"module._orig_mod.module.{k}": v for k, v in s.items()},
        lambda s: {f"module.{k}" if k.startswith("stages") else f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
        lambda s: {k: v.view(1) if k.endswith("num_batches_tracked") else v for k, v in s.items()},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "pytorch-lightning_version": "2.1"},
        lambda s: {"model": s, "args": argparse.Namespace(lr=0.1), "acc": np.float64(93.2)},
        lambda s: {"state_dict_ema": s, "best_acc1": torch.tensor(69.7)},
        lambda s: {**s, "total_ops": torch.zeros(1), "stages.0.total_params": torch.zeros(1)},
        lambda s: {k: v.double() if v.is_floating_point() else v for k, v in s.items()},
        lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
        lambda s: {k: v.numpy() for k, v in s.items()},
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


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("classifier.weight", lambda t: t.long(), "classifier.weight is torch.int64, expected floating numbers"),
        ("classifier.bias", lambda t: t + 1j, "classifier.bias is torch.complex64, expected floating numbers"),
        ("stages.0.0.weight", lambda t: t > 0, "stages.0.0.weight is torch.bool"),
        ("classifier.weight", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is no plain tensor"),
        ("classifier.weight", lambda t: t.to_sparse(), "is no plain tensor"),
        ("classifier.weight", lambda t: t / 0, "classifier.weight holds infinity|classifier.weight holds NaN"),
        ("classifier.weight", lambda t: t.double() + 1e300, "classifier.weight holds infinity"),
        ("stages.0.1.running_var", lambda t: -t, "stages.0.1.running_var holds a variance below 0"),
        ("stages.0.1.running_mean", lambda t: t * float("nan"), "stages.0.1.running_mean holds NaN"),
        ("stages.0.1.num_batches_tracked", lambda t: torch.zeros(2), r"is \(2,\), expected \(\)"),
    ],
)
def test_tensors_that_are_no_weights_are_refused_by_name(tmp_path, name, tensor, words):
    target = build("convnet", 4, (8, 8), seed=0)
    state = build("convnet", 4, (8, 8), seed=1).state_dict()
    before = target.classifier.weight.clone()
    with pytest.raises(InferFastError, match=words):
        load_state(target, {**state, name: tensor(state[name])}, "c.pth")
    assert torch.equal(target.classifier.weight, before)


def test_half_the_precision_is_brought_back(tmp_path):
    source, target = build("convnet", 4, (8, 8), seed=1), build("convnet", 4, (8, 8), seed=2)
    for dtype in (torch.float16, torch.bfloat16):
        load_checkpoint(target, saved(tmp_path / "c.pth", source.to(dtype).state_dict()))
        assert target.classifier.weight.dtype == torch.float32
        assert torch.equal(target.classifier.weight, source.classifier.weight.float())


def test_what_a_file_holds_is_listed_where_it_does_not_fit(tmp_path):
    path = saved(tmp_path / "c.pth", {"state_dict": {"features.0.weight": torch.ones(3), "fc.bias": torch.ones(3)}})
    with pytest.raises(InferFastError, match=r"missing.*2 unexpected names\), it holds features.0.weight, fc.bias"):
        load_checkpoint(build("convnet", 4, (8, 8)), path)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"acc": 93.2, "epoch": 199}, "accuracy 93.2, epoch 199"),
        ({"acc": np.float64(93.2), "epoch": np.int64(7)}, "accuracy 93.2, epoch 7"),
        ({"best_acc1": torch.tensor(69.7), "epoch": torch.tensor([90])}, "accuracy 69.7, epoch 90"),
        ({"acc": torch.ones(3)}, "accuracy not recorded, epoch not recorded"),
        ([1, 2], "accuracy not recorded, epoch not recorded"),
        ({0: 1, "accuracy": "91 %"}, "accuracy 91 %, epoch not recorded"),
    ],
)
def test_what_a_checkpoint_says_of_itself_is_read_in_whatever_type(tmp_path, made, said):
    assert recorded(saved(tmp_path / "c.pth", made)).endswith(said)


@pytest.mark.parametrize("card", ["not json", "[1]", '"text"', '{"accuracy": {"top1": 3}}'])
def test_anyone_may_call_anything_a_card(tmp_path, card):
    save_file({"a": torch.ones(1)}, tmp_path / "c.safetensors", metadata={"card": card, "epoch": "12"})
    assert recorded(tmp_path / "c.safetensors").endswith("accuracy not recorded, epoch 12")
    save_file({"a": torch.ones(1)}, tmp_path / "d.safetensors", metadata={"card": '{"accuracy": 91.25}'})
    assert "accuracy 91.25" in recorded(tmp_path / "d.safetensors")


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


def key_lists():
    """{network: ["name shape", ...]} of the public checkpoints for 100 classes, from the list that is kept beside."""
    lists, lines = {}, (Path(__file__).parent / "published_keys.txt").read_text().splitlines()
    for line in lines:
        if line.startswith("# "):
            lists[line[2:]] = own = []
        else:
            own.append(line)
    return lists


@pytest.mark.parametrize("name", NETWORKS)
def test_public_checkpoints_load_without_renaming_and_give_the_same_logits(generator, tmp_path, name):
    """A checkpoint in the authors' wrapping, made by a module that was written apart from ours."""
    weights, images = Weights(generator), torch.randn(2, 3, 32, 32, generator=generator)
    expected = NETWORKS[name](weights, images, 100)
    assert sorted(f"{k} {list(v.shape)}" for k, v in weights.state.items()) == sorted(key_lists()[name])
    published = {"state_dict": {f"module.{k}": v for k, v in weights.state.items()}, "acc": 77.5, "epoch": 199}
    network = build(name, 100, (32, 32))
    load_checkpoint(network, saved(tmp_path / "ckpt.pth", published))
    with torch.no_grad():
        logits = network.eval()(images)
    torch.testing.assert_close(logits, expected, atol=2e-4 * expected.abs().max().item(), rtol=1e-4)
    assert recorded(tmp_path / "ckpt.pth").endswith("accuracy 77.5, epoch 199")


def test_the_published_scripts_names_of_networks_are_known():
    for theirs, ours in {"mobilenetV2": "mobilenetv2", "efficientnet": "efficientnet_b0", "shufflenet": "shufflenet_g2"
                         }.items():  # fmt: skip
        assert type(build(theirs, 10, (32, 32))) is type(build(ours, 10, (32, 32)))


def test_torchvisions_weights_are_taken_from_the_hub(tmp_path, monkeypatch):
    """From the hub's folder, where a file of the published name lies; then not there, and asked for wrongly."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = build("resnet18", 1000, (224, 224), seed=1)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(source.state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    target = build("resnet18", 1000, (224, 224), seed=2)
    load_pretrained(target, "resnet18", "IMAGENET1K_V1")
    assert torch.equal(source.fc.weight, target.fc.weight)
    with pytest.raises(InferFastError, match=r"fc.weight is \(1000, 512\), expected \(8, 512\)"):
        load_pretrained(build("resnet18", 8, (224, 224)), "resnet18", "IMAGENET1K_V1")
    with pytest.raises(InferFastError, match="IMAGENET1K_V9 is not published: choose one of IMAGENET1K_V1"):
        load_pretrained(target, "resnet18", "IMAGENET1K_V9")

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(InferFastError, match="could not be fetched .no network.: check the network"):
        load_pretrained(target, "resnet18", "IMAGENET1K_V1")


@pytest.mark.skipif(installed("timm"), reason="timm is there")
def test_weights_that_torchvision_does_not_publish_ask_for_timm():
    with pytest.raises(InferFastError, match=f"no weights of resnet10t.*--arch-path, or {PIP['timm']}"):
        load_pretrained(build("convnet", 4, (8, 8)), "resnet10t", "IMAGENET1K_V1")
