"""Teachers that only label: the same logits, what must not be fused, and the way back where logits change."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from infer_fast.errors import InferFastWarning
from infer_fast.models import build
from infer_fast.models.execution import at_precision
from infer_fast.models.fold import FoldedNorm, folded
from infer_fast.models.frozen import FrozenConv2d
from infer_fast.ops.scale_shift import scale_shift
from tests.models.test_surgery import NAMES, trained_looking


def norms_left(network):
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.fixture
def without_warnings():
    """Going back to the plain copy is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", InferFastWarning)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_networks_and_no_norm_is_left(generator, without_warnings, name):
    network = trained_looking(name, generator).double()
    labelling = folded(network.float(), (32, 32)).double()
    x = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    expected = network.double()(x)
    assert norms_left(labelling) == 0 and norms_left(network) > 0
    assert (labelling(x) - expected).norm() / expected.norm() < 1e-5  # the vectors are float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_in_bfloat16_it_is_as_near_to_float32_as_the_network(generator, name):
    network = trained_looking(name, generator)
    x = torch.randn(8, 3, 32, 32, generator=generator)
    labelling = folded(network, (32, 32))
    with torch.no_grad():
        exact = network(x)
        with at_precision(x.device, "bfloat16"):
            errors = [float((n(x).float() - exact).norm() / exact.norm()) for n in (labelling, network)]
    assert errors[0] <= 1.5 * errors[1] + 1e-3


class Mixed(nn.Module):
    """A norm before a convolution, norms and convolutions used twice, a depthwise and a bare one, activations and adds
    in place, an add that broadcasts."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.stem, self.shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.depthwise, self.bare = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.act, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        x = self.stem(self.act(self.first(x)))
        kept = self.twice(self.shared(x))
        y = F.relu_(self.twice(self.shared(kept)))
        y += kept
        z = self.last(self.depthwise(y))
        z += y
        z = self.pool(self.act(z))
        return (self.last(self.bare(z)) + z.mean((2, 3), keepdim=True)).relu().flatten(1)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return (self.conv(self.norm(x)) if x.sum() > 0 else self.norm(self.conv(x)).relu()).flatten(1)


class Batchwise(nn.Module):
    """A norm that keeps no statistics can't be folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.own = (
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False),
        )  # fmt: skip

    def forward(self, x):
        return self.own(self.norm(self.conv(x))).flatten(1)


@pytest.mark.parametrize(("kind", "left"), [(Mixed, 0), (Untraceable, 1), (Batchwise, 2)])
def test_networks_of_every_kind_keep_their_logits(generator, without_warnings, kind, left):
    network = kind().eval()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    labelling = folded(network, (8, 8))
    for sign in (1, -1):
        x = sign * torch.rand(4, 3, 8, 8, generator=generator)
        torch.testing.assert_close(labelling(x.clone()), network(x.clone()), rtol=1e-4, atol=1e-5)
    assert norms_left(labelling) == left
    assert any(isinstance(m, FrozenConv2d) for m in labelling.modules()) == (left == 0)  # else it is a plain copy
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert not any(p.requires_grad for p in labelling.parameters())


def test_where_logits_change_the_network_labels_as_it_is(generator, monkeypatch):
    network = trained_looking("convnet", generator)
    wrong = lambda x, scale, shift, **rest: scale_shift(x, 2 * scale, shift, **rest)  # noqa: E731
    monkeypatch.setattr("infer_fast.models.fold.scale_shift", wrong)
    with pytest.warns(InferFastWarning, match="ConvNet change where its BatchNorms are folded"):
        labelling = folded(network, (32, 32))
    x = torch.randn(2, 3, 32, 32, generator=generator)
    assert not any(isinstance(module, FoldedNorm) for module in labelling.modules())
    torch.testing.assert_close(labelling(x), network(x))


@pytest.mark.interpreter
def test_the_op_gives_the_references_logits(generator, monkeypatch):
    network = build("convnet-residual", 3, (8, 8), seed=0).eval()
    labelling = folded(network, (8, 8))
    x = torch.randn(2, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = network(x)
        monkeypatch.setenv("INFER_FAST_BACKEND", "triton")
        torch.testing.assert_close(labelling(x), expected, rtol=1e-4, atol=1e-5)
