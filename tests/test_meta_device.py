"""One iteration on the meta device, which has no values: whatever reads one, or takes a host tensor, is found without a
GPU and at once."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infer_fast.models import MatchedTeacher, build
from infer_fast.models.pool import freeze_pooling
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis import draw_views, problem
from infer_fast.synthesis.iteration import iterate, start_state
from infer_fast.synthesis.problem import Problem

SETTINGS = SynthesisSettings(iterations=3, jitter=2, mean=(0.5,) * 3, std=(0.25,) * 3)
LANES, CLASSES = 2, 4


class Watched(TorchDispatchMode):
    """Notes ops that take host tensors beside those on the meta device. A read of a value raises by itself."""

    def __init__(self):
        super().__init__()
        self.mixed: list[str] = []
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim() > 0}
        if len(devices) > 1:
            self.mixed.append(str(function))
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has none."""
    monkeypatch.setattr(problem, "at_precision", lambda device, precision: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: nullcontext())


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize(
    ("size", "changes"),
    [(32, {}), (64, {}), (32, {"optimise": "images", "tv_l2": 1e-3, "l2_scale": 1e-3})],
    ids=["compensator", "crops", "images"],
)
@pytest.mark.parametrize("name", ["convnet-residual", "resnet18"])
def test_an_iteration_reads_no_value_and_takes_no_host_tensor(name, size, changes, chunk):
    device, settings = torch.device("meta"), replace(SETTINGS, **changes)
    views = draw_views(0, 0, list(range(LANES)), iterations=3, jitter=2, size=(size, size)).to(device)
    with device:
        teacher = MatchedTeacher(build(name, CLASSES, (size, size)), backend="reference")
        base, targets = torch.empty(LANES, CLASSES, 3, size, size), torch.arange(CLASSES)
    task = Problem(teacher, base, targets, settings, chunk=chunk)
    state = start_state(task, views)
    with Watched() as watched:
        iterate(task, state)
    assert watched.mixed == []


def test_nor_does_max_pooling_as_a_gpu_has_it():
    pool = freeze_pooling(torch.nn.MaxPool2d(3, 2, 1))
    x = torch.empty(2, 8, 9, 9, device="meta", requires_grad=True)
    with Watched() as watched, mock.patch("infer_fast.ops.max_pool.choose", lambda *_: "triton"):
        (gradient,) = torch.autograd.grad(pool(x).sum(), x)
    assert watched.mixed == [] and gradient.shape == x.shape
    assert {"infer_fast.max_pool.default", "infer_fast.max_pool_backward.default"} <= watched.names


def test_a_read_and_a_host_tensor_are_noticed():
    values = torch.empty(3, device="meta")
    with Watched() as watched, pytest.raises(RuntimeError):
        values.sum().item()
    with Watched() as watched, pytest.raises(RuntimeError):
        values + torch.ones(3)
    assert watched.mixed == ["aten.add.Tensor"]
