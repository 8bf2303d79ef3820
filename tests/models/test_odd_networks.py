"""Networks as people write them: what surgery must not change, though their logits on one batch may not show it."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from infer_fast.errors import InferFastError, InferFastWarning
from infer_fast.models import MatchedTeacher
from infer_fast.models.execution import at_precision
from infer_fast.models.fold import folded
from infer_fast.models.layout import labelling_copy
from infer_fast.models.matching import AsItRuns
from infer_fast.models.train import predict
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis.solver import Solver
from tests.models.test_any_network import Net, check, quietly, settled

SETTINGS = SynthesisSettings(iterations=3, jitter=0, mean=(0.5,) * 3, std=(0.25,) * 3)


class Plain(Net):
    def features(self, x):
        return F.relu(self.norm(self.conv(x)))


class Straight(torch.autograd.Function):
    """Rounds forward, and lets gradients through, doubled."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class StraightThrough(Net):
    def features(self, x):
        return Straight.apply(self.norm(self.conv(x)))


class Gated(Net):
    """A gate that no gradient goes through."""

    def features(self, x):
        y = self.norm(self.conv(x))
        with torch.no_grad():
            gate = torch.sigmoid(y)
        return y * gate


class Masked(Net):
    """Logits that are no class's are far below the others, or infinitely so."""

    low = -1e9

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.relu.forward = lambda x: F.gelu(x) * 3
        self.register_buffer("mask", torch.tensor([False, True, False, False]))

    def features(self, x):
        return self.relu(self.norm(self.conv(x)))

    def forward(self, x):
        return super().forward(x).masked_fill(self.mask, self.low)


class MaskedOut(Masked):
    low = -float("inf")


class Renamed(Plain):
    """The statistics are held by two modules."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Module()
        self.extra.register_buffer("mean", self.norm.running_mean)


class Optional(Plain):
    """Its code asks for an argument that has a default."""

    def forward(self, x, features=False):
        y = self.features(x)
        return y if features else self.linear(y.mean((2, 3)))


class Named(Plain):
    """A module's name is one of torch.fx's own."""

    def __init__(self):
        super().__init__()
        self.graph = nn.ModuleDict({"class": nn.Identity()})

    def features(self, x):
        return self.graph["class"](super().features(x))


class ByName(Plain):
    """Layers are given their input by name, and a number is added to what a BatchNorm gives."""

    def features(self, x):
        return F.relu(self.norm(input=self.conv(input=x)) + x.size(1))


class Unused(Plain):
    """The result of one BatchNorm is not used."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(8)

    def features(self, x):
        self.other(self.conv(x))
        return super().features(x)


class Untrained(Plain):
    """Its train() returns nothing."""

    def train(self, mode=True):
        super().train(mode)


class Standardised(nn.Conv2d):
    def forward(self, x):
        flat = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)).view(self.weight.size(0), -1)
        return F.conv2d(x, flat.view_as(self.weight), self.bias)


class WeightStandardised(Plain):
    def __init__(self):
        super().__init__()
        self.conv = Standardised(3, 8, 3)


class Normalising(Plain):
    """Writes over the images that it is given."""

    def features(self, x):
        return super().features(x.sub_(0.5).div_(0.25))


FUSED = [Plain, Masked, MaskedOut, Renamed, Optional, ByName, Unused, Untrained, WeightStandardised, Normalising]


@pytest.mark.parametrize("kind", [*FUSED, StraightThrough, Gated, Named])
def test_logits_and_gradients_are_the_networks(generator, kind):
    network, x = kind(), torch.randn(4, 3, 8, 8, generator=generator)
    network.eval()  # as a statement: one of them returns nothing
    network.norm.running_mean.normal_(0, 0.3, generator=generator)
    matched, given = MatchedTeacher(network), x.clone()
    logits, penalty = quietly(matched, given.requires_grad_())
    assert isinstance(matched.network, AsItRuns) == (kind not in FUSED)
    exact = x.clone().requires_grad_()
    expected = network(exact * 1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    seen = expected.isfinite()
    (ours,), (theirs,) = (
        torch.autograd.grad(o[seen].square().sum(), i) for o, i in ((logits, given), (expected, exact))
    )
    assert (ours - theirs).norm() < 1e-3 * theirs.norm() and penalty.item() > 0
    for copy in (labelling_copy(network, (8, 8)), quietly(folded, network, (8, 8))):
        with torch.no_grad():
            given = x.clone()
            torch.testing.assert_close(copy(given), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(given, x) or kind is not Normalising
    found = predict(network, lambda positions: x[positions].clone(), 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class OfItsOwnPrecision(Plain):
    def features(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.relu(self.norm(self.conv(x.float()) + 1000.0))


def test_a_part_of_a_precision_of_its_own_keeps_it(generator):
    network, x = settled(OfItsOwnPrecision(), generator), torch.randn(4, 3, 8, 8, generator=generator)
    matched = MatchedTeacher(network)
    with torch.no_grad(), at_precision(x.device, "bfloat16"):
        logits, _ = quietly(matched, x)
        torch.testing.assert_close(logits, network(x), rtol=1e-2, atol=1e-2)


class Mixing(Plain):
    """An image's logits depend on the images beside it."""

    def features(self, x):
        return super().features(x - x.mean(0, keepdim=True))


def test_tasks_of_a_network_that_mixes_images_are_solved_apart(generator):
    network, base = settled(Mixing(), generator), torch.randn(2, 4, 3, 8, 8, generator=generator)
    with pytest.warns(InferFastWarning, match="Mixing makes an image's logits of the images beside it: one task"):
        together = Solver(network, settings=SETTINGS, chunk=2).solve(base)
    apart = quietly(Solver(network, settings=SETTINGS, lanes=1).solve, base)
    torch.testing.assert_close(together, apart, rtol=0, atol=0)


class Shared(Plain):
    """Its weights are put together in its own code."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(torch.randn(8, 3, 3, 3) for _ in range(2))

    def features(self, x):
        return F.relu(self.norm(F.conv2d(x, sum(self.parts.parameters()))))


def test_weights_that_code_puts_together_are_taken_over_too(generator):
    network, other = (settled(Shared(), generator) for _ in range(2))
    other.norm.load_state_dict(network.norm.state_dict())
    matched, x = MatchedTeacher(network), torch.randn(4, 3, 8, 8, generator=generator)
    matched.check(x)
    quietly(matched.take, other)
    with torch.no_grad():
        torch.testing.assert_close(matched(x)[0], other(x), rtol=1e-5, atol=1e-5)


def test_layers_that_share_their_statistics_have_one_weight(generator):
    network = settled(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten()), generator)
    network[2].running_mean, network[2].running_var = network[0].running_mean, network[0].running_var
    check(network, torch.randn(4, 3, 8, 8, generator=generator))


class Counting(Plain):
    """Keeps a count of its calls, and uses it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def features(self, x):
        self.calls += 1
        return super().features(x) * self.calls


class Drawing(Plain):
    def features(self, x):
        return F.dropout(super().features(x), 0.5)


class SecondOrder(Plain):
    def forward(self, x):
        x = x.requires_grad_()
        (gradient,) = torch.autograd.grad(torch.tanh(self.norm(self.conv(x))).sum(), x, create_graph=True)
        return super().forward(x) + gradient.square().mean((1, 2, 3))[:, None]


class Locked(Plain):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Counting, "gives other logits for the same images each time"),
        (Drawing, "gives other logits for the same images each time"),
        (SecondOrder, "no second derivative"),
        (Locked, "Locked can't be copied"),
    ],
)
def test_what_can_not_be_the_same_is_one_sentence(generator, kind, sentence):
    network = settled(kind(), generator)
    with pytest.raises(InferFastError, match=sentence) as caught:
        MatchedTeacher(network)(torch.randn(4, 3, 8, 8, generator=generator))
    assert "\n" not in str(caught.value)


def test_what_wraps_a_network_is_taken_off(generator):
    network, x = settled(Plain(), generator), torch.randn(4, 3, 8, 8, generator=generator)
    matched = MatchedTeacher(nn.DataParallel(network))
    with torch.no_grad():
        torch.testing.assert_close(matched(x)[0], network(x), rtol=1e-5, atol=1e-6)
    assert not isinstance(matched.network, AsItRuns)
