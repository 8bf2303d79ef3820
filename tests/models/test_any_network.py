"""Any network: what surgery and folding give is the network they were given, or a sentence says why not."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from bench import published
from infer_fast.errors import InferFastError, InferFastWarning
from infer_fast.models import MatchedTeacher, build
from infer_fast.models.copies import frozen_copy, in_layout
from infer_fast.models.fold import folded
from infer_fast.models.layout import layout_of
from infer_fast.models.matching import AsItRuns
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis import solve
from tests.models.random_networks import CLASSES, SIZE, LeakyNorm, drawn

SETTINGS = SynthesisSettings(iterations=2, mean=(0.5,) * 3, std=(0.25,) * 3)


def quietly(function, *args):
    """What it returns; that a teacher is matched as it runs is no failure here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferFastWarning)
        return function(*args)


def differentiable(network, x):
    """Whether PyTorch itself has a gradient of this network."""
    try:
        network(x.clone().requires_grad_() * 1).sum().backward()
    except RuntimeError:
        return False
    return True


def check(network, x):
    """Logits of the matched and of the labelling copy, and the sum of the penalties, are the network's own."""
    with torch.no_grad():
        expected = network(x.clone())
    matched = MatchedTeacher(network, first_bn_multiplier=1.0)
    try:
        logits, penalty = quietly(matched, x.clone())
    except InferFastError as error:
        assert "can't be matched" in str(error) and not differentiable(network, x)
        return None
    assert (logits - expected).abs().max() <= 1e-3 * expected.abs().max()
    with torch.no_grad():
        labels = quietly(folded, network, tuple(x.shape[2:]))(x.clone())
    assert (labels - expected).abs().max() <= 1e-3 * expected.abs().max()
    return matched, penalty


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 10))])
def test_networks_drawn_at_random_stay_what_they_are(generator, part):
    """200 networks in all, other ones in every run."""
    fused, count = 0, 20
    for seed in torch.randint(2**31, (count,), generator=generator).tolist():
        network, x = drawn(seed), torch.randn(4, 3, SIZE, SIZE, generator=generator)
        try:
            outcome = check(network, x)
        except AssertionError as error:
            raise AssertionError(f"the network of seed {seed}: {network}") from error
        fused += outcome is not None and not isinstance(outcome[0].network, AsItRuns)
    assert 0 < fused < count  # both ways were taken


class Net(nn.Module):
    """Convolution, BatchNorm, what is to be tried, linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.linear(self.features(x).mean((2, 3)))


class Dropped(Net):
    def features(self, x):
        x = self.norm(self.conv(x))
        self.relu(x)
        return x


class Reordered(Net):
    def features(self, x):
        x = self.conv(x)
        y = self.norm(x)
        return F.relu(x, inplace=True) + y


class Written(Net):
    """A part is written: no form of that overwrites nothing."""

    def features(self, x):
        x = self.norm(self.conv(x))
        x[:, :2] = 0
        return x


class Listed(Net):
    """The BatchNorm is called out of a plain list, and the code can't be traced."""

    def __init__(self):
        super().__init__()
        self.norms = [self.norm]

    def features(self, x):
        assert x.shape[1] == 3 and x.isfinite().all() and self.conv.out_channels == 8
        return self.norms[0](self.conv(x))


class Subclass(Net):
    def __init__(self):
        super().__init__()
        self.norm = LeakyNorm(8)

    def features(self, x):
        return self.norm(self.conv(x))


class Viewed(Net):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8 * 36, CLASSES)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.linear(x.view(x.size(0), -1))


class FiveAxes(Net):
    def __init__(self):
        super().__init__()
        self.deep = nn.Conv3d(1, 1, 3, padding=1)

    def features(self, x):
        return self.deep(self.norm(self.conv(x))[:, None])[:, 0]


class Synchronised(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.SyncBatchNorm(8)

    def features(self, x):
        return F.relu(self.norm(self.conv(x)))


class Watched(Net):
    """A hook of its own that looks and one that changes what comes out."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.norm.register_forward_hook(lambda module, args, output: self.seen.append(output.shape))
        self.conv.register_forward_hook(lambda module, args, output: output * 2)

    def features(self, x):
        return self.norm(self.conv(x))


FUSED = {Dropped, Reordered, Viewed, FiveAxes, Synchronised}
KINDS = [Dropped, Reordered, Written, Listed, Subclass, Viewed, FiveAxes, Synchronised, Watched]


def settled(network, generator):
    """The network in eval mode, with running statistics unlike the initial ones."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_matched_and_solved(generator, kind):
    network, x = settled(kind(), generator), torch.randn(CLASSES, 3, 8, 8, generator=generator)
    matched, penalty = check(network, x)
    assert isinstance(matched.network, AsItRuns) == (kind not in FUSED)
    own = network.norm if kind is not Synchronised else settled(nn.BatchNorm2d(8), generator)
    own.load_state_dict(network.norm.state_dict())
    inputs = []
    network.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    network(x)
    var, mean = torch.var_mean(inputs[-1], dim=(0, 2, 3), correction=0)
    expected = (var - own.running_var).norm() + (mean - own.running_mean).norm()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-4)
    assert quietly(lambda: solve(kind().eval(), x[None], settings=SETTINGS)).isfinite().all()


@pytest.mark.parametrize("kind", [Dropped, Listed])
def test_the_gradient_and_chunks_are_those_of_the_published_loop(generator, kind):
    network, x = settled(kind(), generator).double(), torch.randn(6, 3, 8, 8, generator=generator).double()
    matched, own = MatchedTeacher(network), x.clone().requires_grad_()
    logits, penalty = quietly(matched, own)
    (ours,) = torch.autograd.grad(logits.square().sum() + penalty.sum(), own)
    exact = x.clone().requires_grad_()
    hooks = published.hooks_of(network, 1.0)
    expected = network(exact).square().sum() + published.weighted_penalty(hooks, first_bn_multiplier=10.0)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, exact)[0], rtol=1e-9, atol=1e-9)
    assert len(matched.statistics(x)) == 1


def weight_normed(network):
    weight_norm(network.conv)
    weight_norm(network.linear)


def spectrally_normed(network):
    spectral_norm(network.conv)


def pruned(network):
    prune.l1_unstructured(network.conv, "weight", amount=0.5)


def parametrised(network):
    parametrizations.weight_norm(network.conv)
    parametrizations.spectral_norm(network.linear)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("hung", [weight_normed, spectrally_normed, pruned, parametrised])
@pytest.mark.parametrize("used", [False, True])
def test_weights_that_are_made_anew_in_every_call_are_those_of_now(generator, hung, used):
    trained, network = Dropped(), Dropped()
    for each in (trained, network):
        hung(each)
    trained.train()(torch.randn(8, 3, 8, 8, generator=generator))
    for parameter in trained.parameters():
        parameter.data.mul_(1.7)
    if used:
        with torch.no_grad():
            network.eval()(torch.randn(1, 3, 8, 8, generator=generator))
    network.eval().load_state_dict(trained.eval().state_dict())
    x = torch.randn(4, 3, 8, 8, generator=generator)
    with torch.no_grad():
        expected = trained(x)
        for own in (frozen_copy(network)(x), MatchedTeacher(network)(x)[0], folded(network, (8, 8))(x)):
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


def test_adjusted_weights_of_a_network_that_runs_as_it_is_are_taken(generator):
    network, other = (settled(Listed(), generator) for _ in range(2))
    other.norm.load_state_dict(network.norm.state_dict())
    matched, x = MatchedTeacher(network), torch.randn(4, 3, 8, 8, generator=generator)
    quietly(matched, x)
    matched.take(other)
    with torch.no_grad():
        torch.testing.assert_close(matched(x)[0], other(x), rtol=1e-5, atol=1e-6)


class Many(Net):
    def features(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        logits = super().forward(x)
        return {"logits": logits, "x": x}


class Both(Many):
    def forward(self, x):
        return Net.forward(self, x), x


class Hidden(Net):
    """A BatchNorm that no module holds."""

    def __init__(self):
        super().__init__()
        self.own = [nn.BatchNorm2d(8).eval()]

    def features(self, x):
        return self.own[0](self.norm(self.conv(x)))


class ByTheBatch(Net):
    """Normalises by the batch in eval mode too."""

    def features(self, x):
        self.norm.training = True
        return self.norm(self.conv(x))


class Unused(Net):
    def features(self, x):
        return self.conv(x)


def poisoned(name, value):
    def make():
        network = Dropped()
        getattr(network.norm, name)[3] = value
        return network

    return make


REFUSED = {
    "dict": (Many, "Many returns a dict of 2: a teacher returns its logits alone"),
    "tuple": (Both, "Both returns a tuple of 2"),
    "no module holds it": (Hidden, "calls a BatchNorm whose running statistics none of its modules holds"),
    "by the batch": (ByTheBatch, "BatchNorm norm normalises by the batch in eval mode too"),
    "never called": (Unused, "calls none of its BatchNorm layers"),
    "NaN mean": (poisoned("running_mean", float("nan")), "norm.running_mean holds NaN"),
    "negative variance": (poisoned("running_var", -1.0), "norm.running_var holds a variance below 0"),
    "script": (lambda: torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))), "is TorchScript"),
    "no images": (lambda: nn.Sequential(nn.BatchNorm2d(5)), "does not take float32 images of 2x3x8x8"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_matched_is_one_sentence(generator, case):
    make, sentence = REFUSED[case]
    with pytest.raises(InferFastError, match=sentence) as caught:
        solve(make().eval(), torch.randn(1, 4, 3, 8, 8, generator=generator), settings=SETTINGS)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_that_a_network_is_matched_as_it_runs_is_said_once(generator):
    matched, x = MatchedTeacher(settled(Listed(), generator)), torch.randn(4, 3, 8, 8, generator=generator)
    with pytest.warns(InferFastWarning, match="Listed is matched as it runs, slower: its code cannot be rewritten"):
        matched(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matched(x)


class Auxiliary(Dropped):
    """Has a BatchNorm for training alone."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(3)


def test_a_layer_that_is_not_called_is_named(generator):
    with pytest.warns(InferFastWarning, match="does not call 1 of its 2 BatchNorms on images: other is not matched"):
        MatchedTeacher(settled(Auxiliary(), generator))(torch.randn(4, 3, 8, 8, generator=generator))


def test_a_copy_of_a_compiled_network_is_of_what_was_compiled(generator):
    network = settled(Dropped(), generator)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    with torch.no_grad():
        logits, _ = MatchedTeacher(torch.compile(network))(x)
        torch.testing.assert_close(logits, network(x), rtol=1e-5, atol=1e-6)


def test_networks_that_take_views_are_trained_and_measured_contiguous(generator):
    x = torch.randn(4, 3, 8, 8, generator=generator)
    assert layout_of(Viewed(), x) is torch.contiguous_format
    assert layout_of(build("convnet", 4, (8, 8), seed=0), x) is torch.channels_last
    assert layout_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), x) is torch.contiguous_format


def test_weights_of_one_pixel_are_channels_last_by_their_strides_too():
    conv = in_layout(nn.Conv2d(8, 6, 1), torch.channels_last)
    assert conv.weight.stride() == (8, 1, 8, 8)
