"""BatchNorm surgery: same logits, the right penalties, clear errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import published
from infer_fast.errors import InferFastError
from infer_fast.models import MatchedTeacher, build
from infer_fast.models.execution import at_precision
from infer_fast.models.surgery import MatchedBatchNorm

NAMES = [
    "convnet", "convnet-residual", "convnet-separable", "convnet-silu", "resnet18", "mobilenetv2", "efficientnet_b0",
    "shufflenet_g2", "mobilenet_v2", "densenet121", "vgg16_bn", "resnet50", "shufflenet_v2_x1_0",
]  # fmt: skip


def trained_looking(name, generator, size=(32, 32)):
    """A network whose running statistics are not the initial 0 and 1."""
    network = build(name, 5, size, seed=1).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network


def smooth(network):
    """SiLU in the place of ReLU, which flips whole elements of any float32 gradient within rounding of 0."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6)):
                setattr(module, name, nn.SiLU())
    return network


def published_penalty(network, x, r_var=1.0, skipped=()):
    """The logits and the same sum the published way, without the layers `skipped`."""
    hooks = published.hooks_of(network, r_var)
    logits = network(x)
    for position, hook in enumerate(hooks):
        hook.close()
        if position in skipped:
            hook.penalty = None  # as if it had not been called
    return logits, published.weighted_penalty(hooks, first_bn_multiplier=10.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_and_penalties_equal_the_published(generator, name):
    network = trained_looking(name, generator).double()
    x = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    logits, penalty = MatchedTeacher(network, r_var=3.0)(x)
    expected_logits, expected = published_penalty(network, x, r_var=3.0)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(penalty[0], expected, rtol=1e-9, atol=1e-9)


FUSED = {  # (BatchNorms with a residual, with an activation, activations left over) of each network
    "resnet18": (8, 17, 0),
    "mobilenet_v2": (10, 35, 0),
    "mobilenetv2": (14, 36, 0),
    "vgg16_bn": (0, 13, 2),
    "densenet121": (0, 121, 0),
    "convnet-residual": (3, 6, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_residuals_and_activations_are_fused(name):
    network = MatchedTeacher(build(name, 5, (32, 32), seed=0)).network
    calls = [(node, network.get_submodule(node.target)) for node in network.graph.nodes if node.op == "call_module"]
    matched = [(node, module) for node, module in calls if isinstance(module, MatchedBatchNorm)]
    left = sum(isinstance(module, (nn.ReLU, nn.ReLU6, nn.SiLU)) for _, module in calls)
    residuals = sum(len(node.args) == 2 for node, _ in matched)
    assert (residuals, sum(module.activation != "none" for _, module in matched), left) == FUSED[name]


class Branching(nn.Module):
    """What must not be fused: an output used twice, a product, an in-place add onto something used later."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        twice = self.a(x)
        product = self.b(x) * torch.relu(twice)
        kept = x * 2
        kept += self.c(x)
        return product + twice + kept + kept.mean((2, 3), keepdim=True)


class Broadcasting(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.relu(self.norm(x) + x.mean((2, 3), keepdim=True))


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.conv(self.norm(x)) if x.sum() > 0 else self.norm(self.conv(x)).relu()


@pytest.mark.parametrize("kind", [Branching, Broadcasting, DataDependent])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_cannot_be_fused_safely_stays_right(generator, kind, sign):
    network = kind().double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
    x = sign * torch.rand(4, 3, 6, 6, generator=generator, dtype=torch.float64)
    logits, penalty = MatchedTeacher(network)(x)
    expected_logits, expected = published_penalty(network, x.clone())
    torch.testing.assert_close(logits, expected_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(penalty[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "efficientnet_b0", "shufflenet_g2", "convnet-silu"])
def test_gradients_of_the_input_equal_autograds_in_float32(generator, name, monkeypatch):
    monkeypatch.setattr(F, "relu", F.silu)  # see smooth
    network = smooth(trained_looking(name, generator))
    x = torch.randn(4, 3, 32, 32, generator=generator).requires_grad_()
    logits, penalty = MatchedTeacher(network)(x)
    (ours,) = torch.autograd.grad(logits.square().mean() + penalty.sum(), x)
    exact_x = x.detach().double().requires_grad_()
    exact_logits, exact_penalty = published_penalty(network.double(), exact_x)
    (exact,) = torch.autograd.grad(exact_logits.square().mean() + exact_penalty, exact_x)
    assert (logits.double() - exact_logits).norm() / exact_logits.norm() < 1e-4
    assert (ours.double() - exact).norm() / exact.norm() < 1e-4


def test_frozen_convolutions_equal_torchs_and_keep_only_their_weight(generator):
    from infer_fast.models.frozen import FrozenConv2d

    for options in (
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1, "stride": 2, "bias": False},
        {"kernel_size": 3, "groups": 4, "dilation": 2},
    ):
        conv = nn.Conv2d(8, 12, **options)
        x = torch.randn(2, 8, 9, 7, generator=generator).requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            ours = FrozenConv2d(conv)(x)
        assert sum(kept) == conv.weight.numel()
        upstream = torch.randn(ours.shape, generator=generator)
        (got,) = torch.autograd.grad(ours, x, upstream)
        (expected,) = torch.autograd.grad(conv(x), x, upstream)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_linear_layer_is_torchs_to_the_byte_and_its_kept_cast_follows_the_weight(generator, shape, bias):
    from infer_fast.models.frozen import FrozenLinear

    linear = nn.Linear(7, 4, bias=bias).requires_grad_(False)
    frozen = FrozenLinear(linear)
    x = torch.randn(shape, generator=generator).requires_grad_()
    for precision in (torch.float32, torch.bfloat16, torch.bfloat16):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            ours, expected = frozen(x), linear(x)
        upstream = torch.randn(ours.shape, generator=generator).to(ours.dtype)
        gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (ours, expected)]
        assert ours.dtype == expected.dtype == precision
        assert torch.equal(ours, expected) and torch.equal(*gradients)
        linear.weight.mul_(2)
        frozen.cast_again()
    (kept,) = frozen.cast.values()
    assert torch.equal(kept[0], linear.weight.bfloat16())


def test_a_resnet18_pass_keeps_little_but_its_batch_norm_inputs(generator):
    network = build("resnet18", 10, (32, 32), seed=0)
    x = torch.randn(8, 3, 32, 32, generator=generator).requires_grad_()
    inputs = []
    handles = [
        m.register_forward_pre_hook(lambda _, args: inputs.append(args[0].nbytes))
        for m in network.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    network.eval()(x.detach())
    for handle in handles:
        handle.remove()
    matched = MatchedTeacher(network)
    weights = {t.data_ptr() for t in [*matched.parameters(), *matched.buffers()]}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights and tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        matched(x)
    assert sum(kept.values()) <= 1.15 * sum(inputs)


@pytest.mark.slow
def test_compiled_and_eager_agree_on_a_whole_resnet18(generator):
    network = trained_looking("resnet18", generator, (16, 16))
    matched = MatchedTeacher(network)
    x = torch.randn(4, 3, 16, 16, generator=generator)
    u = torch.zeros(1, 3, 16, 16)

    def loss(u):
        logits, penalty = matched(x + u, 1)
        return logits.square().mean() + penalty.sum()

    results = []
    for function in (loss, torch.compile(loss)):
        own = u.clone().requires_grad_()
        value = function(own)
        results.append((value.detach(), *torch.autograd.grad(value, own)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=0)
    assert (results[1][1] - results[0][1]).norm() / results[0][1].norm() < 1e-4


def test_skipped_layers_are_left_out(generator):
    network = trained_looking("convnet", generator).double()
    x = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    _, penalty = MatchedTeacher(network, skip_bn=(1,))(x)
    _, expected = published_penalty(network, x, skipped=(1,))
    torch.testing.assert_close(penalty[0], expected, rtol=1e-9, atol=1e-9)


def test_the_teacher_itself_is_not_touched(generator):
    network = trained_looking("convnet", generator).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    MatchedTeacher(network)(torch.randn(4, 3, 32, 32, generator=generator))
    assert network.training and all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules())


def test_timm_networks_with_batch_norm_act(generator):
    timm = pytest.importorskip("timm")
    network = timm.create_model("efficientnet_b0", num_classes=5).eval().double()
    x = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    logits, penalty = MatchedTeacher(network)(x)
    torch.testing.assert_close(logits, network(x), rtol=1e-9, atol=1e-9)
    assert penalty.item() > 0


def test_a_network_without_batch_norm_is_an_error():
    with pytest.raises(InferFastError, match="has no BatchNorm2d"):
        MatchedTeacher(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(InferFastError, match="no running statistics"):
        MatchedTeacher(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))
    with pytest.raises(InferFastError, match="layer 5"):
        MatchedTeacher(nn.Sequential(nn.BatchNorm2d(3)), skip_bn=(5,))


def test_a_bare_batch_norm_is_matched_too():
    logits, penalty = MatchedTeacher(nn.BatchNorm2d(3))(torch.zeros(2, 3, 4, 4))
    assert logits.shape == (2, 3, 4, 4) and penalty.item() == pytest.approx(10 * 3**0.5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_taken_weights_give_what_a_fresh_copy_gives(generator, name, precision):
    first, other = (build(name, 4, (16, 16), seed=seed).eval() for seed in (0, 1))
    other.load_state_dict({k: v for k, v in first.state_dict().items() if "running" in k}, strict=False)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    matched, expected = MatchedTeacher(first), MatchedTeacher(other)
    with at_precision(images.device, precision):
        before, _ = matched(images)  # what convolutions are cast to is kept from here on
        matched.take(other)
        found, wanted = matched(images), expected(images)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) and not torch.equal(before, found[0])
