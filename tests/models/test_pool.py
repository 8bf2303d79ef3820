"""A frozen teacher's max-pooling: which modules become the op, and that on a CPU nothing changes."""

import pytest
import torch
from torch import nn

from infer_fast.models import MatchedTeacher, build
from infer_fast.models.pool import FrozenMaxPool2d, freeze_pooling


class Own(nn.MaxPool2d):
    """A subclass may do anything."""


@pytest.mark.parametrize(
    "backend", [None, "reference", pytest.param("triton", marks=pytest.mark.interpreter)], ids=["auto", "torch", "op"]
)
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2),
        nn.MaxPool2d((2, 3), (1, 2), (1, 0), ceil_mode=True),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
    ],
    ids=["padded", "plain", "oblong", "ceil"],
)
def test_a_plain_pool_becomes_the_op_and_gives_the_same_bytes(generator, pool, backend):
    frozen = freeze_pooling(nn.Sequential(nn.Sequential(pool)), backend)
    assert isinstance(frozen[0][0], FrozenMaxPool2d)
    x = torch.randn(2, 8, 9, 8, generator=generator).contiguous(memory_format=torch.channels_last).requires_grad_()
    got, expected = frozen(x), pool(x)
    upstream = torch.randn(expected.shape, generator=generator)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (got, expected)]
    assert torch.equal(got, expected) and torch.equal(*gradients)


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(2, dilation=2), nn.MaxPool2d((16, 2)), Own(2)],
    ids=["indices", "dilation", "large", "subclass"],
)
def test_what_the_op_does_not_do_stays_as_it_is(pool):
    network = nn.Sequential(pool)
    assert freeze_pooling(network)[0] is pool


@pytest.mark.slow
@pytest.mark.interpreter
def test_a_resnets_large_stem_gives_the_op_torchs_logits_and_gradients(generator):
    network = build("resnet18", 3, (72, 72), seed=0).eval()
    x = torch.randn(2, 3, 72, 72, generator=generator)
    matched = MatchedTeacher(network)
    pool = matched.network.get_submodule("0.maxpool")
    assert isinstance(pool, FrozenMaxPool2d)
    found = []
    for backend in ("reference", "triton"):
        pool.backend = backend
        own = x.clone().requires_grad_()
        logits, penalty = matched(own)
        found.append((logits, *torch.autograd.grad(logits.sum() + penalty.sum(), own)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
